//! Curves as SVG.

use std::fmt::Display;
use std::ops::Range;

use plotters::prelude::*;

use crate::error::{Error, Result};

const SIZE: (u32, u32) = (640, 320);
const SQUARE: (u32, u32) = (400, 400);
/// Points a curve is thinned to.
const POINTS: usize = 400;
/// Radius of a curve that is one point.
const DOT: u32 = 3;
/// What the names of curves take of a plot, in its units.
const LEGEND_MARGIN: f64 = 70.0;
const LETTER: f64 = 6.0;
const LEGEND_LINE: f64 = 18.0;
/// Places of a curve as long as the plot is wide at which it is looked whether names hide it.
const SAMPLES: f64 = 100.0;
const CURVE: RGBColor = RGBColor(196, 78, 32);
const AVERAGE: RGBColor = RGBColor(40, 60, 110);
/// Told apart by most people with a colour-vision deficiency (Okabe and Ito, 2008).
const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// Points of a curve and what it is called.
pub type Named = (String, Vec<(f64, f64)>);

/// The loss of each step, its running mean, and the trivial predictor's loss as a level.
pub fn loss(losses: &[(f64, f64)], trivial: Option<f64>) -> Result<String> {
    let smooth = running_mean(losses);
    let curves = [
        Curve::plain(losses, CURVE.mix(0.35)),
        Curve::plain(&smooth, AVERAGE.mix(1.0)),
    ];
    draw(["step", "loss"], &curves, trivial)
}

/// One curve over steps.
pub fn line(points: &[(f64, f64)], label: &str) -> Result<String> {
    draw(
        ["step", label],
        &[Curve::plain(points, AVERAGE.mix(1.0))],
        None,
    )
}

/// Curves with their names.
pub fn curves(curves: &[Named], x: &str, y: &str) -> Result<String> {
    draw([x, y], &named(curves), None)
}

/// Curves of shares over shares, both from 0 to 1 whatever the curves reach.
pub fn shares(curves: &[Named], x: &str, y: &str) -> Result<String> {
    let frame = Frame {
        x: 0.0..1.0,
        // A line along the edge would be cut in half.
        y: 0.0..1.02,
    };
    draw_in(frame, [x, y], &named(curves), None)
}

fn named(curves: &[Named]) -> Vec<Curve<'_>> {
    let curves = curves.iter().enumerate();
    curves
        .map(|(i, (name, points))| Curve {
            name: Some(name),
            points,
            colour: PALETTE[i % PALETTE.len()].mix(1.0),
        })
        .collect()
}

/// Points in the complex plane by name, and the unit circle where it fits. The axes reach the farthest point, and at
/// least `least`.
pub fn complex_plane(sets: &[(&str, &[[f64; 2]])], least: f64) -> Result<String> {
    let parts = sets.iter().flat_map(|(_, points)| points.iter().flatten());
    let farthest = parts.fold(f64::MIN_POSITIVE, |farthest, part| farthest.max(part.abs()));
    let reach = 1.1 * farthest.max(least);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SQUARE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(-reach..reach, -reach..reach)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("real part")
            .y_desc("imaginary part")
            .draw()
            .map_err(failed)?;
        if reach >= 1.0 {
            let angles = (0..=POINTS).map(|i| std::f64::consts::TAU * i as f64 / POINTS as f64);
            chart
                .draw_series(LineSeries::new(
                    angles.map(|angle| (angle.cos(), angle.sin())),
                    BLACK.mix(0.6).stroke_width(1),
                ))
                .map_err(failed)?;
        }
        for (i, (name, points)) in sets.iter().enumerate() {
            let colour = PALETTE[i % PALETTE.len()].mix(0.7);
            let circles = points
                .iter()
                .map(|&[real, imaginary]| Circle::new((real, imaginary), 3, colour.filled()));
            chart
                .draw_series(circles)
                .map_err(failed)?
                .label(*name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 3, colour.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .draw()
            .map_err(failed)?;
        area.present().map_err(failed)?;
    }
    Ok(flexible(&svg, SQUARE))
}

struct Curve<'a> {
    name: Option<&'a str>,
    points: &'a [(f64, f64)],
    colour: RGBAColor,
}

impl<'a> Curve<'a> {
    fn plain(points: &'a [(f64, f64)], colour: RGBAColor) -> Self {
        Self {
            name: None,
            points,
            colour,
        }
    }
}

/// What the axes span.
struct Frame {
    x: Range<f64>,
    y: Range<f64>,
}

impl Frame {
    /// As much as the curves and the level reach.
    fn around(curves: &[Curve], level: Option<f64>) -> Self {
        let all = || curves.iter().flat_map(|curve| curve.points.iter());
        let last = all().map(|p| p.0).fold(f64::MIN_POSITIVE, f64::max);
        let values = || all().map(|p| p.1).chain(level);
        let low = values().fold(f64::INFINITY, f64::min);
        let high = values().fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low.is_finite() {
            (low, high)
        } else {
            (0.0, 1.0)
        };
        let margin = ((high - low) * 0.05).max(high.abs() * 1e-3).max(1e-12);
        Self {
            x: 0.0..last,
            y: low - margin..high + margin,
        }
    }

    /// Where along the edges the curves' names hide the least of them.
    fn legend(&self, curves: &[Curve]) -> SeriesLabelPosition {
        let names = || curves.iter().filter_map(|curve| curve.name);
        let letters = names().map(|name| name.chars().count()).max().unwrap_or(0);
        let size = [
            (LEGEND_MARGIN + LETTER * letters as f64) / f64::from(SIZE.0),
            LEGEND_LINE * (names().count() + 1) as f64 / f64::from(SIZE.1),
        ];
        let part = |range: &Range<f64>, value| (value - range.start) / (range.end - range.start);
        let place = |&(x, y): &(f64, f64)| [part(&self.x, x), part(&self.y, y)];
        let pairs = curves.iter().flat_map(|curve| curve.points.windows(2));
        let lines: Vec<[[f64; 2]; 2]> = pairs
            .map(|pair| [place(&pair[0]), place(&pair[1])])
            .collect();
        // `corner` is 0, ½ or 1 along each axis.
        let hidden = |corner: [f64; 2]| -> f64 {
            let start = [0, 1].map(|axis| corner[axis] * (1.0 - size[axis]));
            let covers = |point: [f64; 2]| {
                [0, 1]
                    .iter()
                    .all(|&axis| (0.0..size[axis]).contains(&(point[axis] - start[axis])))
            };
            let of_line = |&[from, to]: &[[f64; 2]; 2]| {
                let length = (to[0] - from[0]).hypot(to[1] - from[1]);
                let samples = (length * SAMPLES).ceil().max(1.0);
                let covered = (0..samples as usize).filter(|&i| {
                    let share = (i as f64 + 0.5) / samples;
                    covers([0, 1].map(|axis| from[axis] + share * (to[axis] - from[axis])))
                });
                length * covered.count() as f64 / samples
            };
            lines.iter().map(of_line).sum()
        };
        let places = [
            ([1.0, 0.0], SeriesLabelPosition::LowerRight),
            ([1.0, 1.0], SeriesLabelPosition::UpperRight),
            ([0.0, 1.0], SeriesLabelPosition::UpperLeft),
            ([0.0, 0.0], SeriesLabelPosition::LowerLeft),
            ([1.0, 0.5], SeriesLabelPosition::MiddleRight),
            ([0.0, 0.5], SeriesLabelPosition::MiddleLeft),
            ([0.5, 1.0], SeriesLabelPosition::UpperMiddle),
            ([0.5, 0.0], SeriesLabelPosition::LowerMiddle),
        ];
        let hiding = places.map(|(corner, position)| (hidden(corner), position));
        let least = hiding.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        least.expect("there are places").1
    }
}

fn draw(labels: [&str; 2], curves: &[Curve], level: Option<f64>) -> Result<String> {
    draw_in(Frame::around(curves, level), labels, curves, level)
}

fn draw_in(
    frame: Frame,
    [x, y]: [&str; 2],
    curves: &[Curve],
    level: Option<f64>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(frame.x.clone(), frame.y.clone())
            .map_err(failed)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(x)
            .y_desc(y)
            .draw()
            .map_err(failed)?;
        for curve in curves {
            let colour = curve.colour;
            let line = LineSeries::new(thin(curve.points), colour.stroke_width(2));
            // A single point has no line.
            let size = if curve.points.len() == 1 { DOT } else { 0 };
            let drawn = chart.draw_series(line.point_size(size)).map_err(failed)?;
            if let Some(name) = curve.name {
                drawn.label(name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2))
                });
            }
        }
        if let Some(level) = level {
            chart
                .draw_series(LineSeries::new(
                    [(0.0, level), (frame.x.end, level)],
                    BLACK.mix(0.6).stroke_width(1),
                ))
                .map_err(failed)?;
        }
        if curves.iter().any(|curve| curve.name.is_some()) {
            chart
                .configure_series_labels()
                .position(frame.legend(curves))
                .background_style(WHITE.mix(0.8))
                .draw()
                .map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(flexible(&svg, SIZE))
}

/// A page or a plot could not be made.
pub fn failed(error: impl Display) -> Error {
    Error::Plot(error.to_string())
}

/// A fixed size does not fit on a phone; the view box keeps the proportions.
fn flexible(svg: &str, (width, height): (u32, u32)) -> String {
    let fixed = format!("width=\"{width}\" height=\"{height}\" ");
    svg.replacen(&fixed, "", 1)
}

fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    let mut thinned: Vec<_> = points.iter().copied().step_by(step).collect();
    thinned.extend(points.last());
    thinned
}

/// Means over a fiftieth of the points each.
pub fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points
        .windows((points.len() / 50).max(1))
        .map(|part| {
            (
                part[part.len() - 1].0,
                part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64,
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_curves_stand_where_they_hide_none() {
        let is = |points: &[(f64, f64)], expected: &str| {
            let curves = [Curve {
                name: Some("QB-Heat latent"),
                ..Curve::plain(points, AVERAGE.mix(1.0))
            }];
            let found = Frame::around(&curves, None).legend(&curves);
            assert_eq!(format!("{found:?}"), expected);
        };
        let [low, high] = [0.0, 1.0];
        is(&[(0.0, low), (1.0, high)], "LowerRight");
        is(&[(0.0, high), (1.0, low)], "UpperRight");
        is(
            &[(0.0, low), (0.5, low), (0.9, high), (1.0, low)],
            "UpperLeft",
        );
        is(
            &[(0.0, high), (0.2, high), (0.8, low), (1.0, high)],
            "LowerLeft",
        );
        is(
            &[(0.0, high), (1.0, high), (1.0, 0.9), (0.0, low), (1.0, low)],
            "MiddleRight",
        );
    }
}
