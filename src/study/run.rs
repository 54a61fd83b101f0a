//! Runs what a study is missing, cell by cell.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::de::DeserializeOwned;
use serde_json::Value;
use toml::Table;

use super::{Cell, Given, Plan, PlannedCell, Score, StudyFile};
use crate::bench::{BenchConfig, Work, bench};
use crate::config::Config;
use crate::data::{DataConfig, Dataset, Split};
use crate::error::{Error, Result};
use crate::observe::Observer;
use crate::pretrain::{self, suited};
use crate::probe::{
    FEATURE_MEMORY_MIB, ProbeConfig, ProbeRecord, ProbeResult, Task, UNTRAINED, probe, probe_data,
};
use crate::train::{
    CONFIG_FILE, ENCODER_FILE, INDEX_FILE, RunFolder, RunLock, Surroundings, create_folder,
    write_durably,
};
use crate::weights::Weights;

/// Finished cells, one JSON file each; small enough to be kept with the results of a study.
pub(super) const CELLS: &str = "cells";
/// Run folders.
pub(super) const RUNS: &str = "runs";
/// Images a second of a training step, measured once.
const PACE: &str = "pace.json";
/// Steps from which it is measured.
const PACE_STEPS: usize = 30;
/// Epochs of fine-tuning.
const FINETUNE_EPOCHS: usize = 15;
const PRE_TRAINED_ON: &str = "fingerprint of the images pre-trained on";
const REMEDY: &str = "choose another --out, or delete the cell's file and run to have it run again";
/// Keys that say how, not what, a run computes.
pub(super) const OF_THE_MACHINE: [&str; 10] = [
    "threads",
    "device",
    "kernels",
    "data.path",
    "data.loader_threads",
    "data.memory_mib",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.watch_every",
    "run.watch_images",
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
    folder: RunFolder,
    around: &'a Surroundings<'a>,
    /// Image sets that were opened, by how.
    opened: RefCell<Vec<(DataConfig, u64, Rc<Dataset>)>>,
    given: OnceCell<Given>,
}

/// How a study stands.
pub struct StudyOutcome<C = Cell> {
    /// Cells with the scores they have so far, in the study's order.
    pub cells: Vec<C>,
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
        check_path("data", &file.data)?;
        check_path("val", &file.val)?;
        Ok(Self {
            plan: Plan::new(file, common)?,
            file,
            folder: RunFolder::at(out),
            around,
            opened: RefCell::default(),
            given: OnceCell::new(),
        })
    }

    /// What is to be run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The epochs of every cell that is planned, without running any; where the study counts minutes, paces are measured.
    pub fn lengths(&self) -> Result<Vec<(String, usize)>> {
        create_folder(self.folder.path())?;
        let _lock = self.folder.lock()?;
        let length = |planned: &PlannedCell| {
            let epochs = if planned.untrained {
                0
            } else {
                self.epochs(planned)?
            };
            Ok((planned.name(), epochs))
        };
        self.plan.cells.iter().map(length).collect()
    }

    /// Runs what is missing. A cell that fails does not keep the others from being run. After each cell `progress` is told
    /// how the study stands.
    pub fn run(&self, progress: impl FnMut(&StudyOutcome) -> Result<()>) -> Result<StudyOutcome> {
        let _lock = begin(&self.folder)?;
        // What the study no longer fits is found before anything is run.
        for planned in &self.plan.cells {
            self.check_kept(planned)?;
        }
        in_turn(
            &self.plan.cells,
            self.around.observer,
            PlannedCell::name,
            |planned| self.cell(planned),
            |planned| self.kept(planned),
            progress,
        )
    }

    fn cell_file(&self, planned: &PlannedCell) -> PathBuf {
        let name = format!("{}.json", planned.name());
        self.folder.file(CELLS).join(name)
    }

    fn run_folder(&self, planned: &PlannedCell) -> RunFolder {
        RunFolder::at(&self.folder.file(RUNS).join(planned.name()))
    }

    /// What is known of a cell, with the scores that the study asks for.
    fn kept(&self, planned: &PlannedCell) -> Result<Option<Cell>> {
        let Some(mut cell) = read_kept::<Cell>(&self.cell_file(planned))? else {
            return Ok(None);
        };
        let is_asked = |score: &Score| {
            let same = |task: &Task| task.protocol == score.protocol && task.labels == score.labels;
            planned.tasks.iter().any(same)
        };
        cell.scores.retain(is_asked);
        Ok(Some(cell))
    }

    /// Refuses a cell or a run that was made with other settings than the study now asks for.
    fn check_kept(&self, planned: &PlannedCell) -> Result<()> {
        let name = planned.name();
        let defaults = Config::default().to_toml();
        if let Some(cell) = self.kept(planned)? {
            let (found, expected) = (&cell.given, self.given(&planned.config)?);
            check_equal(&name, "data of fingerprint", &found.data, &expected.data)?;
            check_equal(&name, "val of fingerprint", &found.val, &expected.val)?;
            if !planned.untrained {
                check_equal(&name, "minutes", &found.minutes, &expected.minutes)?;
            }
            let expected = self.with_epochs(planned, cell.epochs)?;
            let expected = describe(&expected, planned.untrained);
            check_same(&name, &cell.config, &expected, &defaults)?;
        }
        let run = self.run_folder(planned);
        if run.file(CONFIG_FILE).is_file() {
            let begun = pretrain::resumed_config(&run, None)?;
            let expected = self.with_epochs(planned, begun.optim.epochs)?;
            let [begun, expected] = [&begun, &expected].map(|config| describe(config, false));
            check_same(&name, &begun, &expected, &defaults)?;
        }
        Ok(())
    }

    /// Does what is missing of a cell.
    fn cell(&self, planned: &PlannedCell) -> Result<()> {
        let kept = self.kept(planned)?;
        let scores = kept.map_or_else(Vec::new, |cell| cell.scores);
        let is_missing = |task: &Task| {
            let same =
                |score: &Score| score.protocol == task.protocol && score.labels == task.labels;
            !scores.iter().any(same)
        };
        let missing: Vec<Task> = planned.tasks.iter().copied().filter(is_missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // What cannot be scored need not be trained.
        let dataset = self.dataset(&planned.config, &self.file.data)?;
        let val = self.val(&planned.config)?;
        let data = probe_data(&dataset, val.as_deref())?;
        let run = self.run_folder(planned);
        let (weights, mut cell) = if planned.untrained {
            let config = &planned.config;
            let name = format!("{UNTRAINED}:{}", config.encoder.name);
            let weights = Weights::open(&name, config.seed, config.images())?;
            (weights, self.measured(planned, config, &[])?)
        } else {
            let config = self.pretrain(planned, &run)?;
            let name = run.path().display().to_string();
            let weights = Weights::open(&name, config.seed, config.images())?;
            (
                weights,
                self.measured(planned, &config, &run.read_events()?)?,
            )
        };
        cell.scores = scores;
        let config = &planned.config;
        let probing = ProbeConfig {
            image_size: config.image_size,
            stride: config.encoder.stride,
            seed: config.seed,
            epochs: FINETUNE_EPOCHS,
            search: true,
            memory_mib: FEATURE_MEMORY_MIB,
        };
        let observer = self.around.observer;
        probe(
            &weights.encoder,
            &data,
            &missing,
            &probing,
            observer,
            |result| {
                let score = Score::from(&result);
                observer.note(&format!(
                    "{}: {} with {} of the labels {:.2} %",
                    planned.name(),
                    score.protocol.name(),
                    score.labels,
                    score.top1
                ));
                if !planned.untrained {
                    self.record(config, result).save(&run)?;
                }
                cell.scores.push(score);
                let text = serde_json::to_vec_pretty(&cell).expect("a cell is valid JSON");
                write_durably(&self.cell_file(planned), &text)?;
                if (self.around.stop)() {
                    Err(Error::Stopped)
                } else {
                    Ok(())
                }
            },
        )
    }

    /// Trains a cell's run to its end; its configuration.
    fn pretrain(&self, planned: &PlannedCell, run: &RunFolder) -> Result<Config> {
        let observer = self.around.observer;
        let (config, outcome) = if run.file(CONFIG_FILE).is_file() {
            let mut begun = pretrain::resumed_config(run, None)?;
            if run.file(ENCODER_FILE).is_file() {
                return Ok(begun);
            }
            // The images may have moved; whether they are the same is checked by their index.
            begun.data.path = planned.config.data.path.clone();
            let dataset = pretrain::reopen_data(run, &begun, false, observer)?;
            let outcome = pretrain::resume(run.clone(), &begun, &dataset, self.around)?;
            (begun, outcome)
        } else {
            let config = self.with_epochs(planned, self.epochs(planned)?)?;
            let dataset = self.dataset(&config, &self.file.data)?;
            let outcome = pretrain::start(&config, &dataset, run.path(), self.around)?;
            (config, outcome)
        };
        if outcome.course.stopped() {
            return Err(Error::Stopped);
        }
        Ok(config)
    }

    /// The epochs that a cell has, or is to have where the study counts minutes.
    fn epochs(&self, planned: &PlannedCell) -> Result<usize> {
        let Some(minutes) = self.file.minutes else {
            return Ok(planned.config.optim.epochs);
        };
        if let Some(cell) = self.kept(planned)? {
            return Ok(cell.epochs);
        }
        let run = self.run_folder(planned);
        if run.file(CONFIG_FILE).is_file() {
            return Ok(pretrain::resumed_config(&run, None)?.optim.epochs);
        }
        let (pace, images) = self.pace(planned)?;
        let observer = self.around.observer;
        Ok(epochs_in(minutes, pace, images, &planned.name(), observer))
    }

    /// The configuration of a cell of so many epochs, where the study counts minutes; else as the study has it.
    fn with_epochs(&self, planned: &PlannedCell, epochs: usize) -> Result<Config> {
        let mut config = planned.config.clone();
        if self.file.minutes.is_some() && !planned.untrained {
            config.optim.epochs = epochs;
            // The warm-up may be bounded by the length.
            config.resolve()?;
        }
        Ok(config)
    }

    /// Images a second of a training step, measured once for each method and encoder, whatever the seed, and the training
    /// images.
    fn pace(&self, planned: &PlannedCell) -> Result<(f64, usize)> {
        let observer = self.around.observer;
        let dataset = self.dataset(&planned.config, &self.file.data)?;
        let config = suited(&planned.config, &dataset)?;
        let mut seedless = config.clone();
        seedless.seed = 0;
        let hash = blake3::hash(describe(&seedless, false).as_bytes()).to_hex();
        let key = format!("{} {}", planned.kind(), &hash[..8]);
        let timing = BenchConfig {
            work: Work::Pretrain,
            steps: PACE_STEPS,
            one_batch: false,
            keep_step: None,
        };
        let measure = || Ok(bench(&config, &dataset, &timing, observer)?.mean);
        let pace = known_pace(&self.folder, key, measure)?;
        Ok((pace, dataset.train.len()))
    }

    fn val(&self, config: &Config) -> Result<Option<Rc<Dataset>>> {
        let given = !self.file.val.as_os_str().is_empty();
        given
            .then(|| self.dataset(config, &self.file.val))
            .transpose()
    }

    /// What all cells are made of; the split, which the seed may draw, has no part in it.
    fn given(&self, config: &Config) -> Result<&Given> {
        if let Some(given) = self.given.get() {
            return Ok(given);
        }
        let fingerprint = |dataset: &Rc<Dataset>| dataset.index().fingerprint();
        let given = Given {
            data: fingerprint(&self.dataset(config, &self.file.data)?),
            val: self.val(config)?.as_ref().map(fingerprint),
            minutes: self.file.minutes,
        };
        Ok(self.given.get_or_init(|| given))
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
        // The seed draws the split, where there is none of its own.
        let mut opened = self.opened.borrow_mut();
        let same = |entry: &&(DataConfig, u64, Rc<Dataset>)| {
            let own = matches!(entry.2.split, Split::Own { .. } | Split::None);
            entry.0 == data && (own || entry.1 == config.seed)
        };
        if let Some((_, _, dataset)) = opened.iter().find(same) {
            return Ok(dataset.clone());
        }
        let dataset = Rc::new(Dataset::open(&data, config.seed, self.around.observer)?);
        // Decoded images are large: one set of each path.
        opened.retain(|(other, _, _)| other.path != data.path);
        opened.push((data, config.seed, dataset.clone()));
        Ok(dataset)
    }

    fn measured(&self, planned: &PlannedCell, config: &Config, events: &[Value]) -> Result<Cell> {
        let log = Log::of(events);
        Ok(Cell {
            method: planned.method.clone(),
            encoder: config.encoder.name.clone(),
            seed: config.seed,
            epochs: if planned.untrained {
                0
            } else {
                config.optim.epochs
            },
            minutes: log.minutes,
            loss: log.loss,
            curve: log.curve,
            ranks: log.ranks,
            scores: Vec::new(),
            config: describe(config, planned.untrained),
            given: self.given(config)?.clone(),
        })
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

/// Makes a study's folders; no other process may write into it while the answer lives.
pub(super) fn begin(study: &RunFolder) -> Result<RunLock> {
    for folder in [CELLS, RUNS] {
        create_folder(&study.file(folder))?;
    }
    study.lock()
}

/// Runs cells one after the other until it is stopped. One that fails does not keep the others from being run. After each
/// `progress` is told how the study stands.
pub(super) fn in_turn<P, C>(
    planned: &[P],
    observer: &dyn Observer,
    name: impl Fn(&P) -> String,
    run: impl Fn(&P) -> Result<()>,
    kept: impl Fn(&P) -> Result<Option<C>>,
    mut progress: impl FnMut(&StudyOutcome<C>) -> Result<()>,
) -> Result<StudyOutcome<C>> {
    let mut outcome = StudyOutcome {
        cells: Vec::new(),
        failed: Vec::new(),
        stopped: false,
    };
    for (i, cell) in planned.iter().enumerate() {
        if outcome.stopped {
            outcome.cells.extend(kept(cell)?);
            continue;
        }
        let name = name(cell);
        observer.note(&format!("cell {} of {}: {name}", i + 1, planned.len()));
        let result = run(cell);
        outcome.cells.extend(kept(cell)?);
        match result {
            Ok(()) => {}
            Err(Error::Stopped) => outcome.stopped = true,
            Err(error) => {
                observer.note(&format!("{name} failed: {error}"));
                outcome.failed.push((name, error.to_string()));
            }
        }
        progress(&outcome)?;
    }
    Ok(outcome)
}

/// An error that names the key of a study where nothing is at its path.
pub(super) fn check_path(key: &str, path: &Path) -> Result<()> {
    let text = path.to_string_lossy();
    if text.is_empty() || text.starts_with("builtin:") || text.contains('{') || path.exists() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "{}: no such file or folder; check `{key}` of the study",
        path.display()
    )))
}

/// What a study has kept in a file; nothing where it has not.
pub(super) fn read_kept<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Ok(bytes) = std::fs::read(path) else {
        return Ok(None);
    };
    let kept = serde_json::from_slice(&bytes).map_err(|error| Error::Foreign {
        path: path.to_owned(),
        message: format!(
            "is nothing that a study wrote ({error}); delete it to have it made again"
        ),
    })?;
    Ok(Some(kept))
}

/// The images a second that a study knows by this key, else those that are measured, which it then knows.
pub(super) fn known_pace(
    study: &RunFolder,
    key: String,
    measure: impl FnOnce() -> Result<f64>,
) -> Result<f64> {
    let path = study.file(PACE);
    let mut known: BTreeMap<String, f64> = read_kept(&path)?.unwrap_or_default();
    if let Some(&pace) = known.get(&key) {
        return Ok(pace);
    }
    let pace = measure()?;
    known.insert(key, pace);
    let text = serde_json::to_vec_pretty(&known).expect("a map is valid JSON");
    write_durably(&path, &text)?;
    Ok(pace)
}

/// How many epochs of so many images come closest to so many minutes, at least one.
pub(super) fn epochs_in(
    minutes: f64,
    pace: f64,
    images: usize,
    cell: &str,
    observer: &dyn Observer,
) -> usize {
    let epochs = (minutes * 60.0 * pace / images as f64).round().max(1.0);
    observer.note(&format!(
        "{cell}: {pace:.0} images/s, so {minutes} minutes are {epochs} epochs"
    ));
    epochs as usize
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
pub(super) struct Log {
    pub minutes: f64,
    loss: Option<f64>,
    curve: Vec<(f64, f64)>,
    ranks: Vec<(f64, f64)>,
    /// AP of a detector along the way, by minutes.
    pub aps: Vec<(f64, f64)>,
}

impl Log {
    pub fn of(events: &[Value]) -> Self {
        let mut log = Self {
            minutes: 0.0,
            loss: None,
            curve: Vec::new(),
            ranks: Vec::new(),
            aps: Vec::new(),
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
                    log.aps.extend(point("ap"));
                    log.loss = (losses.1 > 0).then(|| losses.0 / losses.1 as f64);
                    losses = (0.0, 0);
                }
                _ => {}
            }
        }
        log
    }
}

/// A configuration without what concerns the machine and the watch over a run, and, for untrained networks, without what
/// concerns training.
fn describe(config: &Config, untrained: bool) -> String {
    let table = Table::try_from(config).expect("a configuration is valid TOML");
    let of_training = OF_TRAINING.iter().filter(|_| untrained);
    // Known only once the images are.
    let found = ["supervised.classes"];
    without(
        table,
        OF_THE_MACHINE.iter().chain(&found).chain(of_training),
    )
}

/// A configuration without these keys, as TOML.
pub(super) fn without<'a>(
    mut table: Table,
    keys: impl Iterator<Item = &'a &'static str>,
) -> String {
    for key in keys {
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
    toml::to_string(&table).expect("a table is valid TOML")
}

/// Refuses a cell that was made with something else than the study now has.
pub(super) fn check_equal<T: PartialEq + Debug>(
    cell: &str,
    key: &str,
    found: &T,
    expected: &T,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "cell {cell}: it was made with {key} {found:?}, the study now has {expected:?}; {REMEDY}"
    )))
}

/// Refuses a cell that was run with another configuration than the study now asks for.
pub(super) fn check_same(cell: &str, found: &str, expected: &str, defaults: &str) -> Result<()> {
    // A key that was not there yet had the effect of its default.
    let [found, expected, defaults] = [found, expected, defaults].map(settings_of);
    let value = |key: &String| found.get(key).or(defaults.get(key));
    let mut different = expected
        .iter()
        .filter(|(key, expected)| value(key) != Some(expected));
    let Some((key, expected)) = different.next() else {
        return Ok(());
    };
    Err(Error::Refused(format!(
        "cell {cell}: it was run with {key} = {}, the study now says {expected}; {REMEDY}",
        value(key).map_or("nothing", String::as_str)
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
