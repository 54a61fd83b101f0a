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

/// As a tran-1 probe says that its length was chosen, not given.
const SEARCHED: &str = "searched";
const PRE_TRAINED_ON: &str = "fingerprint of the images pre-trained on";

/// Cells of runs that exist, from their probe results; refused where they were scored on different images, sizes or by
/// other probes. A run is called by its folder where an earlier one of the same method and encoder has the same seed, or
/// was trained in another way.
pub fn cells_of_runs(paths: &[PathBuf]) -> Result<Vec<Cell>> {
    let mut cells: Vec<Cell> = Vec::new();
    // A protocol that only one of them was scored by is no contradiction.
    let mut common: BTreeMap<String, (&Path, String)> = BTreeMap::new();
    let mut recipes: BTreeMap<(String, String), String> = BTreeMap::new();
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
        if let Some(record) = records.iter().find(|record| record.may_have_seen_scored) {
            return Err(Error::Refused(format!(
                "{}: its result of {} may be of images that the weights were trained on; probe them again, with their own \
                 seed, on images as they were, or with --val",
                path.display(),
                record.result.protocol.name()
            )));
        }
        for (key, value) in circumstances(&run, &config, &records)? {
            let entry = common.entry(key.clone());
            let (other, expected) = entry.or_insert_with(|| (path, value.clone()));
            if value != *expected {
                return Err(Error::Refused(format!(
                    "{} and {} cannot be compared: {key} is {value} here and {expected} there",
                    path.display(),
                    other.display()
                )));
            }
        }
        let log = Log::of(&run.read_events()?);
        let given = Given {
            data: common[PRE_TRAINED_ON].1.clone(),
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
        let mut seedless = config.clone();
        seedless.seed = 0;
        let recipe = describe(&seedless, false);
        let of_others = recipes
            .entry((own.clone(), config.encoder.name.clone()))
            .or_insert_with(|| recipe.clone());
        if *of_others != recipe || taken(&own, &cells) {
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
) -> Result<Vec<(String, String)>> {
    let index = run.file(INDEX_FILE);
    let index = std::fs::read(&index).map_err(Error::io(&index))?;
    let mut found = vec![
        ("image_size".to_owned(), config.image_size.to_string()),
        (
            PRE_TRAINED_ON.to_owned(),
            blake3::hash(&index).to_hex()[..8].to_owned(),
        ),
    ];
    let absolute = |text: &str| match std::path::absolute(text) {
        Ok(path) if !text.starts_with("builtin:") => path.display().to_string(),
        _ => text.to_owned(),
    };
    for record in records {
        let ProbeResult {
            protocol,
            labels,
            train_images,
            held_out_images,
            details,
            ..
        } = &record.result;
        let val = record.val.as_deref().map_or("its own".into(), absolute);
        let mut add = |what: &str, value: String| {
            let key = format!("{what} ({}, {labels} of the labels)", protocol.name());
            found.push((key, value));
        };
        add("data of probes", absolute(&record.data));
        add("val of probes", val);
        add(
            "number of images",
            format!("{train_images} and {held_out_images}"),
        );
        if let Some(size) = details.get("image_size") {
            add("image size of probes", size.to_string());
        }
        if let Some(epochs) = details.get("epochs") {
            let searched = details.contains_key(SEARCHED).then(|| SEARCHED.to_owned());
            add(
                "epochs of probes",
                searched.unwrap_or_else(|| epochs.to_string()),
            );
        }
    }
    Ok(found)
}
