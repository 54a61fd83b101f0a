//! `qbheat study` and `qbheat compare`

use std::path::{Path, PathBuf};

use clap::Args;
use qbheat::error::{Error, Result};
use qbheat::observe::Observer;
use qbheat::report::{write_comparison, write_detection_comparison};
use qbheat::study::{
    Cell, DetectionCell, DetectionFile, DetectionStudy, Study, StudyFile, StudyOutcome,
    cells_of_runs, detection_markdown, detection_rows, is_detection, rows, to_markdown,
};
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
        let name = self.study.file_stem().unwrap_or_default();
        let title = name.to_string_lossy();
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
        if is_detection(&self.study)? {
            return self.run_detectors(&settings, &title, &out, &around);
        }
        let file = StudyFile::read(&self.study)?;
        let study = Study::new(&file, &settings.0, &out, &around)?;
        if let Some(cell) = study.plan().cells.first() {
            compute_as(&cell.config, &self.common)?;
        }
        if self.plan {
            return Ok(answer_of_plan(&study.lengths()?));
        }
        let outcome =
            study.run(|outcome| write_comparison(&outcome.cells, &outcome.failed, &title, &out))?;
        write_comparison(&outcome.cells, &outcome.failed, &title, &out)?;
        let text = to_markdown(&rows(&outcome.cells), &outcome.failed);
        Ok(answer(&outcome, cells_json(&outcome.cells), &text, &out))
    }

    fn run_detectors(
        &self,
        settings: &Settings,
        title: &str,
        out: &Path,
        around: &Surroundings,
    ) -> Result<Answer> {
        let file = DetectionFile::read(&self.study)?;
        // Weights are on the device as soon as they are read.
        compute_as(&file.machine(&settings.0)?.base, &self.common)?;
        let study = DetectionStudy::new(&file, &settings.0, out, around)?;
        if self.plan {
            return Ok(answer_of_plan(&study.lengths()?));
        }
        let write = |outcome: &StudyOutcome<DetectionCell>| {
            write_detection_comparison(&outcome.cells, &outcome.failed, title, out)
        };
        let outcome = study.run(write)?;
        write(&outcome)?;
        let text = detection_markdown(&detection_rows(&outcome.cells), &outcome.failed);
        Ok(answer(&outcome, detectors_json(&outcome.cells), &text, out))
    }
}

fn answer_of_plan(lengths: &[(String, Result<usize>)]) -> Answer {
    let (lines, cells): (Vec<String>, Vec<Value>) = lengths
        .iter()
        .map(|(cell, epochs)| match epochs {
            Ok(epochs) => {
                let json = json!({"cell": cell, "epochs": epochs});
                (format!("{cell}: {epochs} epochs"), json)
            }
            Err(error) => {
                let reason = error.to_string();
                let line = format!("{cell}: cannot be run: {reason}");
                (line, json!({"cell": cell, "reason": reason}))
            }
        })
        .unzip();
    Answer {
        exit_code: u8::from(lengths.iter().any(|(_, epochs)| epochs.is_err())),
        ..Answer::done(json!({"cells": cells}), lines.join("\n"))
    }
}

/// How a study ended; `json` has its cells, `text` its table.
fn answer<C>(outcome: &StudyOutcome<C>, mut json: Value, text: &str, out: &Path) -> Answer {
    json["out"] = json!(out);
    json["failed"] = outcome
        .failed
        .iter()
        .map(|(cell, reason)| json!({"cell": cell, "reason": reason}))
        .collect();
    if let Some(signal) = outcome.stopped.then(signals::received).flatten() {
        return Answer {
            exit_code: 128 + signal as u8,
            json,
            text: format!("{text}\nstopped; the same command goes on with what is missing"),
        };
    }
    Answer {
        exit_code: u8::from(!outcome.failed.is_empty()),
        json,
        text: format!("{text}\nreport: {}", out.join("report.html").display()),
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

fn detectors_json(cells: &[DetectionCell]) -> Value {
    let cells = cells.iter().map(|cell| {
        json!({
            "method": cell.method,
            "encoder": cell.encoder,
            "seed": cell.seed,
            "protocol": "detection",
            "labels": 1.0,
            "ap": cell.val.ap,
            "ap50": cell.val.ap50,
            "ap75": cell.val.ap75,
            "test": cell.test,
        })
    });
    json!({"cells": cells.collect::<Vec<_>>()})
}
