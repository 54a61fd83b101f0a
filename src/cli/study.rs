//! `qbheat study` and `qbheat compare`

use std::path::{Path, PathBuf};

use clap::Args;
use qbheat::error::{Error, Result};
use qbheat::observe::Observer;
use qbheat::report::write_comparison;
use qbheat::study::{Cell, Study, StudyFile, cells_of_runs, rows, to_markdown};
use qbheat::train::Surroundings;
use serde_json::{Value, json};

use super::progress::Progress;
use super::{Answer, Common, Settings, compute_as, signals};

#[derive(Args)]
pub struct StudyCommand {
    /// The study's TOML file.
    study: PathBuf,
    /// Its folder: cells, runs, table.md, table.csv and report.html [default: runs/ and the file's name].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Only say how many epochs each cell is to be trained for; for a study in minutes this times every method.
    #[arg(long)]
    plan: bool,
    #[command(flatten)]
    pub common: Common,
}

impl StudyCommand {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        if let Some(seed) = self.common.seed {
            return Err(Error::Refused(format!(
                "--seed {seed}: a study names its seeds itself, `seeds = [{seed}]`"
            )));
        }
        let file = StudyFile::read(&self.study)?;
        let name = self.study.file_stem().unwrap_or_default();
        let out = self.out.clone().unwrap_or(Path::new("runs").join(name));
        let mut settings = Settings::default();
        settings
            .add("threads", self.common.threads)
            .add("device", self.common.device);
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        let study = Study::new(&file, &settings.0, &out, &around)?;
        if let Some(cell) = study.plan().cells.first() {
            compute_as(&cell.config, &self.common)?;
        }
        if self.plan {
            let lengths = study.lengths()?;
            let (lines, cells): (Vec<String>, Vec<Value>) = lengths
                .iter()
                .map(|(cell, epochs)| {
                    let json = json!({"cell": cell, "epochs": epochs});
                    (format!("{cell}: {epochs} epochs"), json)
                })
                .unzip();
            return Ok(Answer::done(json!({"cells": cells}), lines.join("\n")));
        }
        let title = name.to_string_lossy();
        let outcome =
            study.run(|outcome| write_comparison(&outcome.cells, &outcome.failed, &title, &out))?;
        write_comparison(&outcome.cells, &outcome.failed, &title, &out)?;
        let mut json = cells_json(&outcome.cells);
        json["out"] = json!(out);
        json["failed"] = outcome
            .failed
            .iter()
            .map(|(cell, reason)| json!({"cell": cell, "reason": reason}))
            .collect();
        let text = to_markdown(&rows(&outcome.cells), &outcome.failed);
        if let Some(signal) = outcome.stopped.then(signals::received).flatten() {
            return Ok(Answer {
                exit_code: 128 + signal as u8,
                json,
                text: format!("{text}\nstopped; the same command goes on with what is missing"),
            });
        }
        Ok(Answer {
            exit_code: u8::from(!outcome.failed.is_empty()),
            json,
            text: format!("{text}\nreport: {}", out.join("report.html").display()),
        })
    }
}

#[derive(Args)]
pub struct Compare {
    /// Run folders that have probe results.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Where to write table.md, table.csv and report.html.
    #[arg(long)]
    out: PathBuf,
    /// Print one JSON object on stdout and nothing else there.
    #[arg(long)]
    pub json: bool,
}

impl Compare {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let cells = cells_of_runs(&self.runs)?;
        write_comparison(&cells, &[], "comparison", &self.out)?;
        progress.note(&format!("{} runs", self.runs.len()));
        let text = format!(
            "{}\nreport: {}",
            to_markdown(&rows(&cells), &[]),
            self.out.join("report.html").display()
        );
        Ok(Answer::done(cells_json(&cells), text))
    }
}

fn cells_json(cells: &[Cell]) -> Value {
    let scores = cells.iter().flat_map(|cell| {
        cell.scores.iter().map(|score| {
            json!({
                "method": cell.method,
                "encoder": cell.encoder,
                "seed": cell.seed,
                "protocol": score.protocol.name(),
                "labels": score.labels,
                "top1": score.top1,
            })
        })
    });
    json!({"cells": scores.collect::<Vec<_>>()})
}
