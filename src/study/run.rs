//! A study of encoders: what is missing is pre-trained and scored, cell by cell.

use std::cell::{OnceCell, RefCell};
use std::path::Path;
use std::rc::Rc;

use serde_json::Value;
use toml::Table;

use super::fit::{OF_THE_MACHINE, check_equal, check_same, refused, without};
use super::folder::{StudyFolder, StudyOutcome};
use super::log::Log;
use super::{Cell, Given, Plan, PlannedCell, Score, StudyFile, check_path, unaugmented};
use crate::bench::{BenchConfig, Work, bench};
use crate::config::{Config, Method};
use crate::data::{DataConfig, Dataset, Split, place};
use crate::error::{Error, Result};
use crate::pretrain::{self, suited};
use crate::probe::{ProbeConfig, ProbeRecord, ProbeResult, Task, UNTRAINED, probe, probe_data};
use crate::train::{ENCODER_FILE, Surroundings};
use crate::weights::Weights;

/// Steps from which the pace is measured.
const PACE_STEPS: usize = 30;

/// Known only once the images are.
const FOUND: [&str; 1] = ["supervised.classes"];

/// A study in its folder.
pub struct Study<'a> {
    file: &'a StudyFile,
    plan: Plan,
    folder: StudyFolder<'a>,
    /// Image sets that were opened, by how.
    opened: RefCell<Vec<(DataConfig, u64, Rc<Dataset>)>>,
    given: OnceCell<Given>,
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
            folder: StudyFolder::at(out, around),
            opened: RefCell::default(),
            given: OnceCell::new(),
        })
    }

    /// What is to be run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The epochs of every cell that is planned, without running any; where the study counts minutes, paces are measured.
    pub fn lengths(&self) -> Result<Vec<(String, Result<usize>)>> {
        self.folder.lengths(
            &self.plan.cells,
            PlannedCell::name,
            |planned| self.check_kept(planned),
            |planned| self.epochs(planned),
        )
    }

    /// Runs what is missing. A cell that fails does not keep the others from being run. After each cell `progress` is told
    /// how the study stands.
    pub fn run(&self, progress: impl FnMut(&StudyOutcome) -> Result<()>) -> Result<StudyOutcome> {
        self.folder.run(
            &self.plan.cells,
            PlannedCell::name,
            |planned| self.check_kept(planned),
            |planned| self.make(planned),
            |planned| self.kept(planned),
            progress,
        )
    }

    /// What is known of a cell, with the scores that the study asks for.
    fn kept(&self, planned: &PlannedCell) -> Result<Option<Cell>> {
        let Some(mut cell) = self.folder.kept::<Cell>(&planned.name())? else {
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
            let untrained = cell.epochs == 0;
            check_equal(&name, "untrained", &untrained, &planned.untrained)?;
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
        if let Some(run) = self.folder.begun(&name).filter(|_| !planned.untrained) {
            let begun = pretrain::resumed_config(&run, None)?;
            let expected = self.with_epochs(planned, begun.optim.epochs)?;
            let [begun, expected] = [&begun, &expected].map(|config| describe(config, false));
            check_same(&name, &begun, &expected, &defaults)?;
            if let Some(found) = self.folder.begun_with::<Given>(&name)? {
                check_equal(&name, "minutes", &found.minutes, &self.file.minutes)?;
            }
            // Killed before it had an index, a run has not used its images yet.
            if let Some(index) = pretrain::read_index(&run)?
                && index.fingerprint() != self.given(&planned.config)?.data
                && !self
                    .dataset(&planned.config, &self.file.data)?
                    .is_of(&index)
            {
                return Err(refused(&name, "its run was begun on other images"));
            }
        }
        Ok(())
    }

    /// Does what is missing of a cell.
    fn make(&self, planned: &PlannedCell) -> Result<()> {
        // With the scores that the study no longer asks for, which stay.
        let kept = self.folder.kept::<Cell>(&planned.name())?;
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
        let run = self.folder.run_of(&planned.name());
        let (weights, mut cell) = if planned.untrained {
            let config = &planned.config;
            let name = format!("{UNTRAINED}:{}", config.encoder.name);
            let weights = Weights::open(&name, config.seed, config.images())?;
            (weights, self.measured(planned, config, &[])?)
        } else {
            let config = self.pretrain(planned)?;
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
            search: true,
            ..ProbeConfig::new(config.image_size, config.seed)
        };
        let Surroundings { observer, stop } = self.folder.around;
        probe(
            &weights.encoder,
            &data,
            &missing,
            &probing,
            *observer,
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
                self.folder.keep(&planned.name(), &cell)?;
                if stop() { Err(Error::Stopped) } else { Ok(()) }
            },
        )
    }

    /// Trains a cell's run to its end; its configuration.
    fn pretrain(&self, planned: &PlannedCell) -> Result<Config> {
        let (name, around) = (planned.name(), self.folder.around);
        let (config, outcome) = if let Some(run) = self.folder.begun(&name) {
            let mut begun = pretrain::resumed_config(&run, None)?;
            if run.file(ENCODER_FILE).is_file() {
                return Ok(begun);
            }
            // The images may have moved; whether they are the same is checked by their index.
            begun.data.path = planned.config.data.path.clone();
            let dataset = pretrain::reopen_data(&run, &begun, false, around.observer)?;
            let outcome = pretrain::resume(run, &begun, &dataset, around)?;
            (begun, outcome)
        } else {
            let config = self.with_epochs(planned, self.epochs(planned)?)?;
            let dataset = self.dataset(&config, &self.file.data)?;
            let run = self.folder.run_of(&name);
            self.folder.begin_with(&name, self.given(&config)?)?;
            let outcome = pretrain::start(&config, &dataset, run.path(), around)?;
            (config, outcome)
        };
        if outcome.course.stopped() {
            return Err(Error::Stopped);
        }
        Ok(config)
    }

    /// The epochs that a cell has, or is to have where the study counts minutes; none where nothing is trained.
    fn epochs(&self, planned: &PlannedCell) -> Result<usize> {
        if planned.untrained {
            return Ok(0);
        }
        let Some(minutes) = self.file.minutes else {
            return Ok(planned.config.optim.epochs);
        };
        if let Some(cell) = self.kept(planned)? {
            return Ok(cell.epochs);
        }
        let name = planned.name();
        if let Some(run) = self.folder.begun(&name) {
            return Ok(pretrain::resumed_config(&run, None)?.optim.epochs);
        }
        let (pace, images) = self.pace(planned)?;
        let images = [images, planned.config.optim.batch_size];
        Ok(self.folder.epochs_in(minutes, pace, images, &name))
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
        let observer = self.folder.around.observer;
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
        let pace = self.folder.pace(key, measure)?;
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
        let data = DataConfig {
            path: path.to_owned(),
            ..unaugmented(&config.data)
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
        let observer = self.folder.around.observer;
        let dataset = Rc::new(Dataset::open(&data, config.seed, observer)?);
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
        let StudyFile { data, val, .. } = self.file;
        ProbeRecord {
            weights: config.method_name().to_owned(),
            data: place(data),
            val: (!val.as_os_str().is_empty()).then(|| place(val)),
            seed: config.seed,
            has_seen_scored: false,
            result,
        }
    }
}

/// A configuration without what concerns the machine and the watch over a run, and, for untrained networks, without what
/// concerns training.
pub(super) fn describe(config: &Config, untrained: bool) -> String {
    let of_methods = Method::ALL.iter().flat_map(|method| method.sections());
    let of_training = ["method", "optim"];
    let of_training = of_training.iter().chain(of_methods).filter(|_| untrained);
    without(
        table_of(config),
        OF_THE_MACHINE.iter().chain(&FOUND).chain(of_training),
    )
}

/// What pre-training depends on, beside its seed.
pub(super) fn recipe(config: &Config) -> String {
    let others = Method::ALL.iter().filter(|other| **other != config.method);
    let of_others = others.flat_map(|other| other.sections());
    let of_run = ["seed", "run"];
    without(
        table_of(config),
        OF_THE_MACHINE
            .iter()
            .chain(&FOUND)
            .chain(&of_run)
            .chain(of_others),
    )
}

fn table_of(config: &Config) -> Table {
    Table::try_from(config).expect("a configuration is valid TOML")
}
