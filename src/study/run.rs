//! Runs what a study is missing, cell by cell.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::Value;
use toml::Table;

use super::{Cell, Plan, PlannedCell, Score, StudyFile};
use crate::bench::{BenchConfig, Work, bench};
use crate::config::Config;
use crate::data::{DataConfig, Dataset};
use crate::error::{Error, Result};
use crate::pretrain::{self, Surroundings, suited};
use crate::probe::{ProbeConfig, ProbeRecord, ProbeResult, Task, UNTRAINED, probe, probe_data};
use crate::train::{CONFIG_FILE, ENCODER_FILE, RunFolder, create_folder, write_durably};
use crate::weights::Weights;

/// Finished cells, one JSON file each; small enough to be kept with the results of a study.
const CELLS: &str = "cells";
/// Run folders.
const RUNS: &str = "runs";
/// Images a second of each method, measured once.
const PACE: &str = "pace.json";
/// Steps from which it is measured.
const PACE_STEPS: usize = 30;
/// Epochs of fine-tuning.
const FINETUNE_EPOCHS: usize = 15;
/// Feature maps up to this many MiB are kept.
const MEMORY_MIB: u64 = 4096;
/// Keys that say how, not what, a run computes.
const OF_THE_MACHINE: [&str; 7] = [
    "threads",
    "device",
    "kernels",
    "data.path",
    "data.loader_threads",
    "data.memory_mib",
    "run",
];

/// Keys that an untrained network does not depend on.
const OF_TRAINING: [&str; 6] = [
    "method",
    "qb_heat",
    "objective",
    "moco",
    "supervised",
    "optim",
];

/// A study in its folder.
pub struct Study<'a> {
    file: &'a StudyFile,
    plan: Plan,
    out: PathBuf,
    around: &'a Surroundings<'a>,
    /// Image sets that were opened, by how.
    opened: RefCell<Vec<(DataConfig, u64, Rc<Dataset>)>>,
}

/// How a study stands.
pub struct StudyOutcome {
    /// Cells with all their scores, in the study's order.
    pub cells: Vec<Cell>,
    /// Cells that failed: name and reason.
    pub failed: Vec<(String, String)>,
    /// Whether it was stopped before its end.
    pub stopped: bool,
}

impl<'a> Study<'a> {
    /// Resolves a study for the folder `out`; `common` are settings of the command line for all cells.
    pub fn new(
        file: &'a StudyFile,
        common: &[(String, String)],
        out: &Path,
        around: &'a Surroundings<'a>,
    ) -> Result<Self> {
        Ok(Self {
            plan: Plan::new(file, common)?,
            file,
            out: out.to_owned(),
            around,
            opened: RefCell::default(),
        })
    }

    /// What is to be run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Runs what is missing. A cell that fails does not keep the others from being run.
    pub fn run(&self) -> Result<StudyOutcome> {
        for folder in [CELLS, RUNS] {
            create_folder(&self.out.join(folder))?;
        }
        let mut outcome = StudyOutcome {
            cells: Vec::new(),
            failed: Vec::new(),
            stopped: false,
        };
        let count = self.plan.cells.len();
        for (i, planned) in self.plan.cells.iter().enumerate() {
            let name = planned.name();
            self.around
                .observer
                .note(&format!("cell {} of {count}: {name}", i + 1));
            match self.cell(planned) {
                Ok(Some(cell)) => outcome.cells.push(cell),
                Ok(None) => {
                    outcome.stopped = true;
                    break;
                }
                // What the study says of a cell is wrong, not what became of it.
                Err(error @ Error::Refused(_)) => return Err(error),
                Err(error) => {
                    self.around
                        .observer
                        .note(&format!("{name} failed: {error}"));
                    outcome.failed.push((name, error.to_string()));
                }
            }
        }
        Ok(outcome)
    }

    /// One cell, or none where it was stopped.
    fn cell(&self, planned: &PlannedCell) -> Result<Option<Cell>> {
        let path = self
            .out
            .join(CELLS)
            .join(format!("{}.json", planned.name()));
        let kept = read_cell(&path)?;
        let complete = |cell: &Cell| {
            let scored = |task: &&Task| cell.score(task.protocol, task.labels).is_some();
            planned.tasks.iter().filter(scored).count() == planned.tasks.len()
        };
        let config = match &kept {
            Some(cell) => {
                let found = with_epochs(&planned.config, cell.epochs)?;
                let config = if self.file.epochs.is_some() && !planned.is_untrained() {
                    &planned.config
                } else {
                    &found
                };
                let expected = describe(config, planned.is_untrained());
                check_same(planned, &cell.config, &expected)?;
                found
            }
            None => self.planned_config(planned)?,
        };
        if let Some(cell) = kept.filter(complete) {
            return Ok(Some(cell));
        }
        let run = self.out.join(RUNS).join(planned.name());
        if !planned.is_untrained() && !self.pretrain(planned, &config, &run)? {
            return Ok(None);
        }
        let mut cell = self.measured(planned, &config, &run)?;
        if let Some(kept) = read_cell(&path)? {
            cell.scores = kept.scores;
        }
        let dataset = self.dataset(&config, &self.file.data)?;
        let val = (!self.file.val.as_os_str().is_empty())
            .then(|| self.dataset(&config, &self.file.val))
            .transpose()?;
        let data = probe_data(&dataset, val.as_deref())?;
        let weights = if planned.is_untrained() {
            let name = format!("{UNTRAINED}:{}", config.encoder.name);
            Weights::open(&name, config.seed, config.images())?
        } else {
            Weights::open(&run.display().to_string(), config.seed, config.images())?
        };
        let probing = ProbeConfig {
            image_size: config.image_size,
            stride: config.encoder.stride,
            seed: config.seed,
            epochs: FINETUNE_EPOCHS,
            search: true,
            memory_mib: MEMORY_MIB,
        };
        let missing: Vec<Task> = planned
            .tasks
            .iter()
            .copied()
            .filter(|task| cell.score(task.protocol, task.labels).is_none())
            .collect();
        let stop = self.around.stop;
        let scored = probe(
            &weights.encoder,
            &data,
            &missing,
            &probing,
            self.around.observer,
            |result| {
                let score = Score::from(&result);
                self.around.observer.note(&format!(
                    "{}: {} with {} of the labels {:.2} %",
                    planned.name(),
                    score.protocol.name(),
                    score.labels,
                    score.top1
                ));
                if !planned.is_untrained() {
                    self.record(&config, result).save(&RunFolder::open(&run)?)?;
                }
                cell.scores.push(score);
                write_cell(&cell, &path)?;
                if stop() { Err(Error::Stopped) } else { Ok(()) }
            },
        );
        match scored {
            Err(Error::Stopped) if !complete(&cell) => Ok(None),
            Err(Error::Stopped) | Ok(()) => Ok(Some(cell)),
            Err(error) => Err(error),
        }
    }

    /// Trains a cell's run to its end; false where it was stopped.
    fn pretrain(&self, planned: &PlannedCell, config: &Config, run: &Path) -> Result<bool> {
        let observer = self.around.observer;
        if !run.join(CONFIG_FILE).is_file() {
            let dataset = self.dataset(config, &self.file.data)?;
            let outcome = pretrain::start(config, &dataset, run, self.around)?;
            return Ok(!outcome.stopped());
        }
        let folder = RunFolder::open(run)?;
        let begun = pretrain::resumed_config(&folder, None)?;
        check_same(planned, &describe(&begun, false), &describe(config, false))?;
        if folder.file(ENCODER_FILE).is_file() {
            return Ok(true);
        }
        let dataset = pretrain::reopen_data(&folder, &begun, false, observer)?;
        let outcome = pretrain::resume(folder, &begun, &dataset, self.around)?;
        Ok(!outcome.stopped())
    }

    /// The configuration with its epochs, where the study counts minutes.
    fn planned_config(&self, planned: &PlannedCell) -> Result<Config> {
        let (Some(minutes), false) = (self.file.minutes, planned.is_untrained()) else {
            return Ok(planned.config.clone());
        };
        // A run that was begun keeps its length.
        let run = self.out.join(RUNS).join(planned.name());
        if run.join(CONFIG_FILE).is_file() {
            let begun = pretrain::resumed_config(&RunFolder::open(&run)?, None)?;
            return with_epochs(&planned.config, begun.optim.epochs);
        }
        let (pace, images) = self.pace(planned)?;
        let epochs = (minutes * 60.0 * pace / images as f64).round().max(1.0);
        self.around.observer.note(&format!(
            "{}: {pace:.0} images/s, so {minutes} minutes are {epochs} epochs",
            planned.name()
        ));
        with_epochs(&planned.config, epochs as usize)
    }

    /// Images a second of a training step, measured once for each method and encoder, and the training images.
    fn pace(&self, planned: &PlannedCell) -> Result<(f64, usize)> {
        let path = self.out.join(PACE);
        let mut known: BTreeMap<String, f64> = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| Error::Foreign {
                path: path.clone(),
                message: format!("is damaged ({error}); delete it"),
            })?,
            Err(_) => BTreeMap::new(),
        };
        let config = &planned.config;
        let observer = self.around.observer;
        let dataset = self.dataset(config, &self.file.data)?;
        let config = suited(config, &dataset)?;
        let hash = blake3::hash(describe(&config, false).as_bytes()).to_hex();
        let key = format!("{} {}", planned.name(), &hash[..8]);
        if let Some(&pace) = known.get(&key) {
            return Ok((pace, dataset.train.len()));
        }
        let images = dataset.train.len();
        let timing = BenchConfig {
            work: Work::Pretrain,
            steps: PACE_STEPS,
            one_batch: false,
            keep_step: None,
        };
        let pace = bench(&config, &dataset, &timing, observer)?.median;
        known.insert(key, pace);
        let text = serde_json::to_vec_pretty(&known).expect("a map is valid JSON");
        write_durably(&path, &text)?;
        Ok((pace, images))
    }

    /// The images at `path` as a configuration prepares them; opened once where augmentation is all that differs.
    fn dataset(&self, config: &Config, path: &Path) -> Result<Rc<Dataset>> {
        let plain = DataConfig::default();
        let data = DataConfig {
            path: path.to_owned(),
            crop_scale: plain.crop_scale,
            crop_ratio: plain.crop_ratio,
            flip: plain.flip,
            jitter: plain.jitter,
            jitter_share: plain.jitter_share,
            grey: plain.grey,
            blur: plain.blur,
            ..config.data.clone()
        };
        let mut opened = self.opened.borrow_mut();
        let same = |entry: &&(DataConfig, u64, _)| entry.0 == data && entry.1 == config.seed;
        if let Some((_, _, dataset)) = opened.iter().find(same) {
            return Ok(dataset.clone());
        }
        let dataset = Rc::new(Dataset::open(&data, config.seed, self.around.observer)?);
        // Another seed or split seldom comes back, and decoded images are large.
        opened.retain(|(other, seed, _)| other.path != data.path && *seed == config.seed);
        opened.push((data, config.seed, dataset.clone()));
        Ok(dataset)
    }

    /// The epochs of every cell that is planned, without running any; where the study counts minutes, paces are measured.
    pub fn lengths(&self) -> Result<Vec<(String, usize)>> {
        create_folder(&self.out)?;
        let length = |planned: &PlannedCell| {
            let config = self.planned_config(planned)?;
            let trained = !planned.is_untrained();
            Ok((
                planned.name(),
                if trained { config.optim.epochs } else { 0 },
            ))
        };
        self.plan.cells.iter().map(length).collect()
    }

    fn measured(&self, planned: &PlannedCell, config: &Config, run: &Path) -> Result<Cell> {
        let mut cell = Cell {
            method: planned.method.clone(),
            encoder: config.encoder.name.clone(),
            seed: config.seed,
            epochs: 0,
            minutes: 0.0,
            loss: None,
            curve: Vec::new(),
            ranks: Vec::new(),
            scores: Vec::new(),
            config: describe(config, planned.is_untrained()),
        };
        if !planned.is_untrained() {
            cell.epochs = config.optim.epochs;
            let log = Log::of(&RunFolder::open(run)?.read_events()?);
            (cell.minutes, cell.loss) = (log.minutes, log.loss);
            (cell.curve, cell.ranks) = (log.curve, log.ranks);
        }
        Ok(cell)
    }

    fn record(&self, config: &Config, result: ProbeResult) -> ProbeRecord {
        let val = &self.file.val;
        ProbeRecord {
            weights: config.method_name().to_owned(),
            data: self.file.data.display().to_string(),
            val: (!val.as_os_str().is_empty()).then(|| val.display().to_string()),
            seed: config.seed,
            result,
        }
    }
}

impl From<&ProbeResult> for Score {
    fn from(result: &ProbeResult) -> Self {
        Self {
            protocol: result.protocol,
            labels: result.labels,
            top1: result.top1,
            top5: result.top5,
            images: [result.train_images, result.held_out_images],
            details: result.details.clone(),
        }
    }
}

/// What a run's log says of its course.
struct Log {
    minutes: f64,
    loss: Option<f64>,
    curve: Vec<(f64, f64)>,
    ranks: Vec<(f64, f64)>,
}

impl Log {
    fn of(events: &[Value]) -> Self {
        let mut log = Self {
            minutes: 0.0,
            loss: None,
            curve: Vec::new(),
            ranks: Vec::new(),
        };
        let mut losses: (f64, u64) = (0.0, 0);
        for event in events {
            match event["kind"].as_str() {
                Some("step") => {
                    let parts = event["ms"].as_object();
                    let milliseconds: f64 = parts
                        .into_iter()
                        .flat_map(|parts| parts.values())
                        .filter_map(Value::as_f64)
                        .sum();
                    log.minutes += milliseconds / 6e4;
                    losses = (
                        losses.0 + event["loss"].as_f64().unwrap_or(0.0),
                        losses.1 + 1,
                    );
                }
                Some("epoch") => {
                    let point = |key: &str| Some((log.minutes, event[key].as_f64()?));
                    log.curve.extend(point("knn_top1"));
                    log.ranks.extend(point("effective_rank"));
                    log.loss = (losses.1 > 0).then(|| losses.0 / losses.1 as f64);
                    losses = (0.0, 0);
                }
                _ => {}
            }
        }
        log
    }
}

fn with_epochs(config: &Config, epochs: usize) -> Result<Config> {
    let mut config = config.clone();
    if epochs > 0 {
        config.optim.epochs = epochs;
        // The warm-up may be bounded by the length.
        config.resolve()?;
    }
    Ok(config)
}

fn read_cell(path: &Path) -> Result<Option<Cell>> {
    let Ok(bytes) = std::fs::read(path) else {
        return Ok(None);
    };
    let cell = serde_json::from_slice(&bytes).map_err(|error| Error::Foreign {
        path: path.to_owned(),
        message: format!("is no cell of a study ({error}); delete it to have it run again"),
    })?;
    Ok(Some(cell))
}

fn write_cell(cell: &Cell, path: &Path) -> Result<()> {
    let text = serde_json::to_vec_pretty(cell).expect("a cell is valid JSON");
    write_durably(path, &text)
}

/// A configuration without what concerns the machine and the watch over a run, and, for untrained networks, without what
/// concerns training.
fn describe(config: &Config, untrained: bool) -> String {
    let mut table = Table::try_from(config).expect("a configuration is valid TOML");
    let of_training = OF_TRAINING.iter().filter(|_| untrained);
    for key in OF_THE_MACHINE.iter().chain(of_training) {
        match key.split_once('.') {
            Some((section, key)) => {
                let section = table.get_mut(section).and_then(toml::Value::as_table_mut);
                section.expect("a section of the configuration").remove(key);
            }
            None => {
                table.remove(*key);
            }
        }
    }
    // Known only once the images are.
    if let Some(supervised) = table
        .get_mut("supervised")
        .and_then(toml::Value::as_table_mut)
    {
        supervised.remove("classes");
    }
    toml::to_string(&table).expect("a table is valid TOML")
}

/// Refuses a cell that was run with another configuration than the study now asks for.
fn check_same(planned: &PlannedCell, found: &str, expected: &str) -> Result<()> {
    let [found, expected] = [found, expected].map(settings_of);
    let keys = found.keys().chain(expected.keys());
    let mut different = keys.filter(|&key| found.get(key) != expected.get(key));
    let Some(key) = different.next() else {
        return Ok(());
    };
    let value = |of: &BTreeMap<String, String>| of.get(key).cloned().unwrap_or("nothing".into());
    Err(Error::Refused(format!(
        "cell {}: it was run with {key} = {}, the study now says {}; choose another --out, or delete the cell's file \
         and run to have it run again",
        planned.name(),
        value(&found),
        value(&expected)
    )))
}

/// Dotted keys and values of a TOML text.
fn settings_of(text: &str) -> BTreeMap<String, String> {
    fn collect(table: &Table, prefix: &str, into: &mut BTreeMap<String, String>) {
        for (name, value) in table {
            let key = format!("{prefix}{name}");
            match value {
                toml::Value::Table(inner) => collect(inner, &format!("{key}."), into),
                other => {
                    into.insert(key, other.to_string());
                }
            }
        }
    }
    let mut settings = BTreeMap::new();
    collect(&text.parse().unwrap_or_default(), "", &mut settings);
    settings
}

/// Cells of runs that exist, from their probe results; refused where they were scored on different images or sizes.
pub fn cells_of_runs(paths: &[PathBuf]) -> Result<Vec<Cell>> {
    let mut cells: Vec<Cell> = Vec::new();
    let mut first: Option<(PathBuf, [String; 3])> = None;
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
        let log = Log::of(&run.read_events()?);
        for record in records {
            let circumstances = [
                record.data.clone(),
                record.val.clone().unwrap_or_default(),
                config.image_size.to_string(),
            ];
            let (other, expected) = first.get_or_insert((path.clone(), circumstances.clone()));
            let names = ["data", "val", "image_size"];
            for ((name, found), expected) in names.iter().zip(&circumstances).zip(&*expected) {
                if found != expected {
                    return Err(Error::Refused(format!(
                        "{} and {} cannot be compared: {name} is {found:?} here and {expected:?} there",
                        path.display(),
                        other.display()
                    )));
                }
            }
            let own = record.weights == config.method_name();
            let (method, epochs, minutes) = if own {
                (record.weights.clone(), config.optim.epochs, log.minutes)
            } else {
                (record.weights.clone(), 0, 0.0)
            };
            let same = |cell: &&mut Cell| {
                cell.method == method
                    && cell.encoder == config.encoder.name
                    && cell.seed == config.seed
                    && cell.epochs == epochs
            };
            let score = Score::from(&record.result);
            match cells.iter_mut().find(same) {
                Some(cell) if cell.score(score.protocol, score.labels).is_some() => {}
                Some(cell) => cell.scores.push(score),
                None => cells.push(Cell {
                    method,
                    encoder: config.encoder.name.clone(),
                    seed: config.seed,
                    epochs,
                    minutes,
                    loss: log.loss.filter(|_| own),
                    curve: if own { log.curve.clone() } else { Vec::new() },
                    ranks: if own { log.ranks.clone() } else { Vec::new() },
                    scores: vec![score],
                    config: describe(&config, !own),
                }),
            }
        }
    }
    Ok(cells)
}
