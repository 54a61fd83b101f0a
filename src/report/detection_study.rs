//! The page of a study of detectors.

use std::path::Path;

use askama::Template;

use super::plots;
use super::study::write_tables;
use crate::config::Method;
use crate::error::Result;
use crate::study::{
    DetectionCell, DetectionRow, DetectionTable, MINUTES, detection_csv, detection_markdown,
    detection_rows, title,
};

#[derive(Template)]
#[template(path = "detection_study.html")]
struct Page<'a> {
    title: &'a str,
    columns: Vec<&'static str>,
    /// Style and fields.
    rows: Vec<(&'static str, Vec<String>)>,
    failed: &'a [(String, String)],
    minutes: &'static str,
    plots: Vec<(String, String)>,
}

/// Writes `table.md`, `table.csv` and `report.html` into `out`.
pub fn write_detection_comparison(
    cells: &[DetectionCell],
    failed: &[(String, String)],
    title: &str,
    out: &Path,
) -> Result<()> {
    let rows = detection_rows(cells);
    let DetectionTable { columns, lines } = DetectionTable::of(&rows);
    let page = Page {
        title,
        columns,
        rows: rows.iter().map(style).zip(lines).collect(),
        failed,
        minutes: MINUTES,
        plots: course_plots(cells)?,
    };
    let html = page.render().map_err(plots::failed)?;
    let markdown = detection_markdown(&rows, failed);
    write_tables(out, &markdown, &detection_csv(&rows, failed), &html)
}

fn style(row: &DetectionRow) -> &'static str {
    match row.costs {
        None => "floor",
        Some(_) if row.method == Method::MocoV2.name() => "reference",
        Some(_) => "",
    }
}

/// For each encoder: AP by minutes of training, a curve a row, of its first seed.
fn course_plots(cells: &[DetectionCell]) -> Result<Vec<(String, String)>> {
    let mut encoders: Vec<(&str, Vec<&DetectionCell>)> = Vec::new();
    // One point makes no line.
    for cell in cells.iter().filter(|cell| cell.curve.len() > 1) {
        let place = encoders.iter().position(|(name, _)| *name == cell.encoder);
        let place = place.unwrap_or_else(|| {
            encoders.push((cell.encoder.as_str(), Vec::new()));
            encoders.len() - 1
        });
        let shown = &mut encoders[place].1;
        if !shown.iter().any(|other| other.method == cell.method) {
            shown.push(cell);
        }
    }
    let plot = |(encoder, cells): (&str, Vec<&DetectionCell>)| -> Result<(String, String)> {
        let curve = |cell: &&DetectionCell| {
            let mut points = cell.minutes().count(&cell.curve);
            points.iter_mut().for_each(|(_, ap)| *ap *= 100.0);
            (title(&cell.method), points)
        };
        let curves: Vec<plots::Named> = cells.iter().map(curve).collect();
        let svg = plots::curves(&curves, "minutes of training", "AP, %")?;
        Ok((encoder.to_owned(), svg))
    };
    encoders.into_iter().map(plot).collect()
}
