//! Runs that exist, as cells of one table.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::log::Log;
use super::run::{describe, recipe};
use super::{Cell, Given, Score};
use crate::config::Config;
use crate::data::place;
use crate::error::{Error, Result};
use crate::pretrain;
use crate::probe::{ProbeRecord, UNTRAINED, is_row, named};
use crate::train::RunFolder;

const REMEDY: &str =
    "; probe them alike, or remove what is not to be compared from the run's folder `probes`";

/// A run and what it has to compare.
struct Compared {
    /// Where it is.
    place: String,
    /// Its row.
    name: String,
    config: Config,
    /// Fingerprint of its images; empty where it is not known.
    data: String,
    log: Log,
    records: Vec<ProbeRecord>,
}

/// Cells of runs that exist, from their probe results; refused where they were scored on different images, sizes or by
/// other probes. Runs of one method and encoder that were trained alike are one row; those that were trained otherwise, or
/// with a seed that is there already, have a row that is called by their folder.
pub fn cells_of_runs(paths: &[PathBuf]) -> Result<Vec<Cell>> {
    let mut alike = Alike::default();
    let mut runs: Vec<Compared> = Vec::new();
    let mut rows: Vec<([String; 3], String)> = Vec::new();
    for path in paths {
        let run = RunFolder::open(path)?;
        let config = pretrain::resumed_config(&run, None)?;
        let own = named(&path.display().to_string());
        let records = ProbeRecord::all(&run)?;
        if records.is_empty() {
            return Err(Error::Refused(format!(
                "{own}: has no probe results; `qbheat probe {own} --data …` makes them"
            )));
        }
        let size = config.image_size.to_string();
        alike.check(&own, "image_size", size, "")?;
        let index = pretrain::read_index(&run)?;
        let data = index.map(|index| index.fingerprint());
        if let Some(data) = &data {
            let key = "fingerprint of the images pre-trained on";
            alike.check(&own, key, data[..8].to_owned(), "")?;
        }
        for record in &records {
            alike.check_record(&own, record)?;
        }
        let [method, encoder] = [config.method_name(), &config.encoder.name];
        let row = [method, encoder, &recipe(&config)].map(str::to_owned);
        let mut name = match rows.iter().find(|(other, _)| *other == row) {
            Some((_, name)) => name.clone(),
            None if rows.iter().any(|(other, _)| other[..2] == row[..2]) => own.clone(),
            None => method.to_owned(),
        };
        let taken = |other: &Compared| {
            other.name == name
                && other.config.encoder.name == *encoder
                && other.config.seed == config.seed
        };
        if runs.iter().any(taken) {
            name = own;
        } else {
            rows.push((row, name.clone()));
        }
        runs.push(Compared {
            place: place(path),
            name,
            config,
            data: data.unwrap_or_default(),
            log: Log::of(&run.read_events()?),
            records,
        });
    }
    let mut cells = Vec::new();
    // What was scored into another run neither takes the place of a run's own nor counts beside it.
    for own in [true, false] {
        for run in &runs {
            let records = run.records.iter();
            for record in records.filter(|record| run.variant(record).is_some() == own) {
                let weights = place(Path::new(&record.weights));
                let is_of = |other: &Compared| other.place == weights;
                if own || is_row(&record.weights) || !runs.iter().any(is_of) {
                    run.add(record, &mut cells);
                }
            }
        }
    }
    Ok(cells)
}

/// What is added to `name` in that of a variant of it.
fn variant_of<'a>(weights: &'a str, name: &str) -> Option<&'a str> {
    let rest = weights.strip_prefix(name)?;
    (rest.is_empty() || rest.starts_with(", ")).then_some(rest)
}

impl Compared {
    /// What the name of a result of the run's own weights adds to that of the method; nothing where the weights are others.
    fn variant<'a>(&self, record: &'a ProbeRecord) -> Option<&'a str> {
        variant_of(&record.weights, self.config.method_name())
    }

    fn add(&self, record: &ProbeRecord, cells: &mut Vec<Cell>) {
        let variant = self.variant(record);
        let is_own = variant.is_some();
        let method = variant.map_or_else(
            || record.weights.clone(),
            |rest| format!("{}{rest}", self.name),
        );
        let score = Score::from(&record.result);
        // A run's seed is that of its own weights and of untrained ones, not of those scored into it from elsewhere.
        let of_seed = is_own || variant_of(&record.weights, UNTRAINED).is_some();
        let same = |cell: &&mut Cell| {
            cell.method == method
                && cell.encoder == self.config.encoder.name
                && (cell.seed == self.config.seed || !of_seed)
        };
        if let Some(cell) = cells.iter_mut().find(same) {
            // The untrained network, say, may have been scored into several runs.
            if cell.score(score.protocol, score.labels).is_none() {
                cell.scores.push(score);
            }
            return;
        }
        // Variants have the course of their run.
        let course = |points: &[(f64, f64)]| match variant {
            Some("") => points.to_vec(),
            _ => Vec::new(),
        };
        cells.push(Cell {
            method,
            encoder: self.config.encoder.name.clone(),
            seed: self.config.seed,
            epochs: if is_own { self.config.optim.epochs } else { 0 },
            minutes: if is_own { self.log.minutes } else { 0.0 },
            loss: self.log.loss.filter(|_| is_own),
            curve: course(&self.log.curve),
            ranks: course(&self.log.ranks),
            scores: vec![score],
            config: describe(&self.config, !is_own),
            given: Given {
                data: self.data.clone(),
                ..Given::default()
            },
        });
    }
}

/// What must be alike of all that is compared, and whose it was first. What only one of them has, such as a protocol, is no
/// contradiction.
#[derive(Default)]
struct Alike(BTreeMap<String, (String, String)>);

impl Alike {
    fn check(&mut self, whose: &str, key: &str, value: String, remedy: &str) -> Result<()> {
        let entry = self.0.entry(key.to_owned());
        let (other, expected) = entry.or_insert_with(|| (whose.to_owned(), value.clone()));
        if value == *expected {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "{whose} and {other} cannot be compared: {key} is {value} here and {expected} there{remedy}"
        )))
    }

    fn check_record(&mut self, run: &str, record: &ProbeRecord) -> Result<()> {
        let whose = format!("{run} ({})", record.weights);
        let (protocol, labels) = (record.result.protocol.name(), record.result.labels);
        if record.has_seen_scored {
            return Err(Error::Refused(format!(
                "{whose}: pre-training saw some of the images that its result of {protocol} is of; probe it again, with its \
                 own seed and images or with --val, or remove that from the run's folder `probes`"
            )));
        }
        for (what, value) in record.conditions() {
            let key = format!("{what} ({protocol}, {labels} of the labels)");
            self.check(&whose, &key, value, REMEDY)?;
        }
        Ok(())
    }
}
