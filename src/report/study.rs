//! The page of a study, or of runs that are compared.

use std::path::Path;

use askama::Template;

use super::plots;
use crate::error::Result;
use crate::study::{Cell, MINUTES, Row, rows, to_csv, to_markdown};
use crate::train::{create_folder, write_durably};

#[derive(Template)]
#[template(path = "study.html")]
struct Page<'a> {
    title: String,
    rows: &'a [Row],
    failed: &'a [(String, String)],
    minutes: &'static str,
    plots: Vec<(String, String)>,
}

/// Writes `table.md`, `table.csv` and `report.html` into `out`.
pub fn write_comparison(
    cells: &[Cell],
    failed: &[(String, String)],
    title: &str,
    out: &Path,
) -> Result<()> {
    let rows = rows(cells);
    let page = Page {
        title: title.to_owned(),
        rows: &rows,
        failed,
        minutes: MINUTES,
        plots: course_plots(cells)?,
    };
    let html = page.render().map_err(plots::failed)?;
    let (markdown, csv) = (to_markdown(&rows, failed), to_csv(&rows, failed));
    write_tables(out, &markdown, &csv, &html)
}

/// Writes a study's table in its three forms.
pub(super) fn write_tables(out: &Path, markdown: &str, csv: &str, html: &str) -> Result<()> {
    create_folder(out)?;
    for (name, text) in [
        ("table.md", markdown),
        ("table.csv", csv),
        ("report.html", html),
    ] {
        write_durably(&out.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// For each encoder: k-NN accuracy and effective rank by minutes of pre-training, a curve a method, of its first seed.
fn course_plots(cells: &[Cell]) -> Result<Vec<(String, String)>> {
    let mut encoders: Vec<&str> = Vec::new();
    for cell in cells {
        if !encoders.contains(&&*cell.encoder) {
            encoders.push(&cell.encoder);
        }
    }
    let mut plots = Vec::new();
    for encoder in encoders {
        for (label, of) in [
            (
                "k-NN top-1, %",
                (|cell| &cell.curve) as fn(&Cell) -> &Vec<(f64, f64)>,
            ),
            ("effective rank", |cell| &cell.ranks),
        ] {
            let mut curves: Vec<plots::Named> = Vec::new();
            for cell in cells.iter().filter(|cell| cell.encoder == encoder) {
                let title = crate::study::title(&cell.method);
                let seen = curves.iter().any(|(name, _)| *name == title);
                if !of(cell).is_empty() && !seen {
                    curves.push((title, cell.minutes().count(of(cell))));
                }
            }
            if !curves.is_empty() {
                let svg = plots::curves(&curves, "minutes of pre-training", label)?;
                plots.push((format!("{encoder}: {label}"), svg));
            }
        }
    }
    Ok(plots)
}
