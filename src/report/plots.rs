//! Curves as SVG.

use plotters::prelude::*;

use crate::error::{Error, Result};

const SIZE: (u32, u32) = (640, 320);
/// Points a curve is thinned to.
const POINTS: usize = 400;
const CURVE: RGBColor = RGBColor(196, 78, 32);
const AVERAGE: RGBColor = RGBColor(40, 60, 110);

/// The loss of each step, its running mean, and the trivial predictor's loss as a level.
pub fn loss(losses: &[(f64, f64)], trivial: Option<f64>) -> Result<String> {
    let smooth = running_mean(losses, (losses.len() / 50).max(1));
    draw(
        "loss",
        &[(losses, &CURVE.mix(0.35)), (&smooth, &AVERAGE.mix(1.0))],
        trivial,
    )
}

/// One curve.
pub fn line(points: &[(f64, f64)], label: &str) -> Result<String> {
    draw(label, &[(points, &AVERAGE.mix(1.0))], None)
}

fn draw(label: &str, curves: &[(&[(f64, f64)], &RGBAColor)], level: Option<f64>) -> Result<String> {
    let fail = |error: String| Error::Plot(error);
    let all = || curves.iter().flat_map(|(points, _)| points.iter());
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let values = || all().map(|p| p.1).chain(level);
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low.is_finite() {
        (low, high)
    } else {
        (0.0, 1.0)
    };
    let margin = ((high - low) * 0.05).max(high.abs() * 1e-3).max(1e-12);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..last, low - margin..high + margin)
            .map_err(|error| fail(error.to_string()))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("step")
            .y_desc(label)
            .draw()
            .map_err(|error| fail(error.to_string()))?;
        for (points, colour) in curves {
            chart
                .draw_series(LineSeries::new(thin(points), colour.stroke_width(2)))
                .map_err(|error| fail(error.to_string()))?;
        }
        if let Some(level) = level {
            chart
                .draw_series(LineSeries::new(
                    [(0.0, level), (last, level)],
                    BLACK.mix(0.6).stroke_width(1),
                ))
                .map_err(|error| fail(error.to_string()))?;
        }
        area.present().map_err(|error| fail(error.to_string()))?;
    }
    // A fixed size does not fit on a phone; the view box keeps the proportions.
    let fixed = format!("width=\"{}\" height=\"{}\" ", SIZE.0, SIZE.1);
    Ok(svg.replacen(&fixed, "", 1))
}

fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    let mut thinned: Vec<_> = points.iter().copied().step_by(step).collect();
    thinned.extend(points.last());
    thinned
}

fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    points
        .windows(window)
        .map(|part| {
            (
                part[part.len() - 1].0,
                part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64,
            )
        })
        .collect()
}
