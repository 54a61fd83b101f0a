//! Runs that exist, as cells of one table.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::log::Log;
use super::run::describe;
use super::{Cell, Given, Score};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pretrain;
use crate::probe::{ProbeRecord, ProbeResult};
use crate::train::{INDEX_FILE, RunFolder};

const PRE_TRAINED_ON: &str = "fingerprint of the images pre-trained on";

/// Cells of runs that exist, from their probe results; refused where they were scored on different images or sizes. A run
/// that has method, encoder and seed in common with an earlier one is called by its folder.
pub fn cells_of_runs(paths: &[PathBuf]) -> Result<Vec<Cell>> {
    let mut cells: Vec<Cell> = Vec::new();
    let mut first: Option<(&Path, BTreeMap<String, String>)> = None;
    for path in paths {
        let run = RunFolder::open(path)?;
        let config = pretrain::resumed_config(&run, None)?;
        let records = ProbeRecord::all(&run)?;
        if records.is_empty() {
            return Err(Error::Refused(format!(
                "{}: has no probe results; `qbheat probe {} --data …` makes them",
                path.display(),
                path.display()
            )));
        }
        let found = circumstances(&run, &config, &records)?;
        let (other, expected) = first.get_or_insert((path, found.clone()));
        // A protocol that only one of them was scored by is no contradiction.
        let differs = |(key, value): &(&String, &String)| {
            expected.get(*key).is_some_and(|other| other != *value)
        };
        if let Some((key, value)) = found.iter().find(differs) {
            return Err(Error::Refused(format!(
                "{} and {} cannot be compared: {key} is {value} here and {} there",
                path.display(),
                other.display(),
                expected[key]
            )));
        }
        let log = Log::of(&run.read_events()?);
        let given = Given {
            data: found[PRE_TRAINED_ON].clone(),
            ..Given::default()
        };
        let taken = |method: &str, cells: &[Cell]| {
            let same = |cell: &Cell| {
                cell.method == method
                    && cell.encoder == config.encoder.name
                    && cell.seed == config.seed
            };
            cells.iter().any(same)
        };
        let mut own = config.method_name().to_owned();
        if taken(&own, &cells) {
            own = path.display().to_string();
        }
        for record in records {
            let is_own = record.weights == config.method_name();
            let method = if is_own { own.clone() } else { record.weights };
            let score = Score::from(&record.result);
            let same = |cell: &&mut Cell| {
                cell.method == method
                    && cell.encoder == config.encoder.name
                    && cell.seed == config.seed
            };
            match cells.iter_mut().find(same) {
                // The untrained network, say, scored into several runs.
                Some(cell) if cell.score(score.protocol, score.labels).is_some() => {}
                Some(cell) => cell.scores.push(score),
                None => cells.push(Cell {
                    method,
                    encoder: config.encoder.name.clone(),
                    seed: config.seed,
                    epochs: if is_own { config.optim.epochs } else { 0 },
                    minutes: if is_own { log.minutes } else { 0.0 },
                    loss: log.loss.filter(|_| is_own),
                    curve: if is_own {
                        log.curve.clone()
                    } else {
                        Vec::new()
                    },
                    ranks: if is_own {
                        log.ranks.clone()
                    } else {
                        Vec::new()
                    },
                    scores: vec![score],
                    config: describe(&config, !is_own),
                    given: given.clone(),
                }),
            }
        }
    }
    Ok(cells)
}

/// What must be alike of runs that are compared.
fn circumstances(
    run: &RunFolder,
    config: &Config,
    records: &[ProbeRecord],
) -> Result<BTreeMap<String, String>> {
    let index = run.file(INDEX_FILE);
    let index = std::fs::read(&index).map_err(Error::io(&index))?;
    let mut found = BTreeMap::from([
        ("image_size".to_owned(), config.image_size.to_string()),
        (
            PRE_TRAINED_ON.to_owned(),
            blake3::hash(&index).to_hex()[..8].to_owned(),
        ),
    ]);
    for record in records {
        let ProbeResult {
            protocol,
            labels,
            train_images,
            held_out_images,
            ..
        } = &record.result;
        let absolute = |text: &str| match std::path::absolute(text) {
            Ok(path) if !text.starts_with("builtin:") => path.display().to_string(),
            _ => text.to_owned(),
        };
        let val = record.val.as_deref().map_or("its own".into(), absolute);
        found.insert("data of probes".into(), absolute(&record.data));
        found.insert("val of probes".into(), val);
        found.insert(
            format!(
                "number of images ({}, {labels} of the labels)",
                protocol.name()
            ),
            format!("{train_images} and {held_out_images}"),
        );
    }
    Ok(found)
}
