//! A study of detectors: what is missing is trained and scored, cell by cell.

use std::cell::Cell;
use std::io::ErrorKind;
use std::path::Path;

use toml::Table;

use super::images::Images;
use super::plan::{Planned, Ready};
use super::{ClassFigures, DetectionCell, DetectionFile, DetectionGiven};
use crate::config::DetectorConfig;
use crate::detect::{
    self, DetectionSet, Evaluation, EvaluationConfig, Figures, Floors, Sets, Trained, evaluate,
};
use crate::error::{Error, Result};
use crate::study::fit::{OF_THE_MACHINE, check_equal, check_same, without};
use crate::study::folder::{StudyFolder, StudyOutcome};
use crate::study::log::Log;
use crate::train::Surroundings;

/// Settings that say where something lies; what lies there is known by its fingerprint.
const PLACES: [&str; 3] = ["encoder.init", "detect.train", "detect.val"];
/// A short run from which the pace is taken.
const PACE_RUN: &str = "pace";
const PACE_STEPS: usize = 12;

/// A study of detectors in its folder.
pub struct DetectionStudy<'a> {
    file: &'a DetectionFile,
    cells: Vec<Planned>,
    folder: StudyFolder<'a>,
    images: Images<'a>,
}

impl<'a> DetectionStudy<'a> {
    /// Resolves a study for the folder `out`; `common` are settings of the command line for all cells. Weights are read
    /// here, and a row that has none fails when it is its turn.
    pub fn new(
        file: &'a DetectionFile,
        common: &[(String, String)],
        out: &Path,
        around: &'a Surroundings<'a>,
    ) -> Result<Self> {
        Ok(Self {
            cells: file.plan(common)?,
            file,
            folder: StudyFolder::at(out, around),
            images: Images::new(&file.test_part, around.observer),
        })
    }

    /// The epochs of every cell, without running any; where the study counts minutes, paces are measured.
    pub fn lengths(&self) -> Result<Vec<(String, Result<usize>)>> {
        self.folder.lengths(
            &self.cells,
            Planned::name,
            |planned| self.check_kept(planned),
            |planned| self.epochs(planned),
        )
    }

    /// Runs what is missing. A cell that fails does not keep the others from being run. After each cell `progress` is told
    /// how the study stands.
    pub fn run(
        &self,
        progress: impl FnMut(&StudyOutcome<DetectionCell>) -> Result<()>,
    ) -> Result<StudyOutcome<DetectionCell>> {
        self.folder.run(
            &self.cells,
            Planned::name,
            |planned| self.check_kept(planned),
            |planned| self.make(planned),
            |planned| self.kept(planned),
            progress,
        )
    }

    fn kept(&self, planned: &Planned) -> Result<Option<DetectionCell>> {
        self.folder.kept(&planned.name())
    }

    /// Refuses a cell or a run that was made with something else than the study now asks for.
    fn check_kept(&self, planned: &Planned) -> Result<()> {
        let (name, kept) = (planned.name(), self.kept(planned)?);
        // Without its weights there is nothing to compare it with.
        let Ok(ready) = planned.ready() else {
            return Ok(());
        };
        let defaults = DetectorConfig::default().to_toml();
        let check_config = |found: &str, epochs: usize| {
            let expected = describe(&self.with_epochs(ready, epochs)?);
            check_same(&name, found, &expected, &defaults)
        };
        let check_given = |found: &DetectionGiven| {
            check_equal(&name, "weights of hash", &found.weights, &ready.weights)?;
            check_equal(&name, "minutes", &found.minutes, &self.file.minutes)
        };
        if let Some(cell) = kept {
            check_config(&cell.config, cell.epochs)?;
            check_given(&cell.given)?;
            let (found, expected) = (&cell.given, self.given(ready)?);
            check_equal(&name, "data of fingerprint", &found.data, &expected.data)?;
            if found.test != expected.test {
                return Err(Error::Refused(format!(
                    "cell {name}: the study's test_part is not what it was scored on; choose another --out, or delete \
                     the cell's file, without its run, to have it scored again"
                )));
            }
        }
        if let Some(run) = self.folder.begun(&name) {
            let begun = DetectorConfig::of_run(&run)?;
            check_config(&describe(&begun), begun.optim.epochs)?;
            if let Some(given) = self.folder.begun_with(&name)? {
                check_given(&given)?;
            }
        }
        Ok(())
    }

    /// Trains a cell's detector to its end and scores it.
    fn make(&self, planned: &Planned) -> Result<()> {
        if self.kept(planned)?.is_some() {
            return Ok(());
        }
        let (name, ready) = (planned.name(), planned.ready()?);
        let config = self.with_epochs(ready, self.epochs(planned)?)?;
        let images = self.images.of(&config)?;
        let given = self.given(ready)?;
        let run = self.folder.run_of(&name);
        let around = self.folder.around;
        let outcome = match self.folder.begun(&name) {
            Some(begun) => detect::resume(begun, &config, &images.sets, around)?,
            None => {
                self.folder.begin_with(&name, &given)?;
                detect::start(&config, &images.sets, run.path(), around)?
            }
        };
        // One that was stopped has none.
        let Some(Evaluation {
            score,
            ms_per_image,
            ..
        }) = outcome.evaluation
        else {
            return Err(Error::Stopped);
        };
        let score_test = |set: &DetectionSet| -> Result<Figures> {
            let how = EvaluationConfig::new(config.image_size);
            let detector = Trained::open(&run, around.observer)?.detector;
            let found = evaluate(&detector, set, &how, around.observer)?;
            Ok(Figures::from(&found.score))
        };
        let test = images.test.as_ref().map(score_test).transpose()?;
        let Sets { train, val } = &images.sets;
        let Floors { mean_boxes, chance } = outcome.floors;
        let log = Log::of(&run.read_events()?);
        let classes = score.classes.iter().map(|class| ClassFigures {
            class: class.class.clone(),
            ap: class.ap,
            ap50: class.ap50,
        });
        let cell = DetectionCell {
            method: planned.method.clone(),
            encoder: config.encoder.name.clone(),
            seed: config.seed,
            epochs: config.optim.epochs,
            minutes: log.minutes,
            val: Figures::from(&score),
            test,
            classes: classes.collect(),
            curve: log.aps,
            mean_boxes,
            chance,
            images: [train.images.len(), val.images.len()],
            ms_per_image,
            config: describe(&config),
            given,
        };
        self.folder.keep(&name, &cell)
    }

    /// The epochs that a cell has, or is to have where the study counts minutes.
    fn epochs(&self, planned: &Planned) -> Result<usize> {
        if let Some(cell) = self.kept(planned)? {
            return Ok(cell.epochs);
        }
        let ready = planned.ready()?;
        let Some(minutes) = self.file.minutes else {
            return Ok(ready.config.optim.epochs);
        };
        let name = planned.name();
        if let Some(run) = self.folder.begun(&name) {
            return Ok(DetectorConfig::of_run(&run)?.optim.epochs);
        }
        let images = self.images.of(&ready.config)?;
        let pace = self.pace(&ready.config, &images.sets)?;
        let images = [
            images.sets.train.images.len(),
            ready.config.optim.batch_size,
        ];
        Ok(self.folder.epochs_in(minutes, pace, images, &name))
    }

    /// The configuration of a cell of so many epochs, where the study counts minutes; else as the study has it.
    fn with_epochs(&self, ready: &Ready, epochs: usize) -> Result<DetectorConfig> {
        if self.file.minutes.is_none() {
            return Ok(ready.config.clone());
        }
        // Loaded anew, because the warm-up may be bounded by the length.
        let mut settings = ready.settings.clone();
        settings.push(("optim.epochs".into(), epochs.to_string()));
        DetectorConfig::load(None, &settings)
    }

    /// Images a second of a training step. Measured once for each configuration, whatever seed and weights: rows that
    /// differ in their weights only get as many epochs as each other.
    fn pace(&self, config: &DetectorConfig, sets: &Sets) -> Result<f64> {
        let mut config = config.clone();
        config.seed = 0;
        let hash = blake3::hash(describe(&config).as_bytes()).to_hex();
        let key = format!("{} {}", config.encoder.name, &hash[..8]);
        // So long that it does not come to its end, where it would be scored.
        config.optim.epochs = PACE_STEPS + 1;
        config.run.watch_every = 0;
        let around = self.folder.around;
        self.folder.pace(key, || {
            let folder = self.folder.file(PACE_RUN);
            remove(&folder)?;
            let taken = Cell::new(0);
            let stop = || {
                taken.set(taken.get() + 1);
                taken.get() >= PACE_STEPS || (around.stop)()
            };
            let briefly = Surroundings {
                observer: around.observer,
                stop: &stop,
            };
            let outcome = detect::start(&config, sets, &folder, &briefly);
            remove(&folder)?;
            let pace = outcome?.course.images_per_s;
            if (around.stop)() {
                return Err(Error::Stopped);
            }
            Ok(pace)
        })
    }

    fn given(&self, ready: &Ready) -> Result<DetectionGiven> {
        let images = self.images.of(&ready.config)?;
        let test = images.test.as_ref();
        Ok(DetectionGiven {
            data: images.sets.fingerprint(),
            test: test.map(|set| set.fingerprint().to_owned()),
            weights: ready.weights.clone(),
            minutes: self.file.minutes,
        })
    }
}

/// A configuration without what concerns the machine and where things lie.
fn describe(config: &DetectorConfig) -> String {
    let table = Table::try_from(config).expect("a configuration is valid TOML");
    without(table, OF_THE_MACHINE.iter().chain(&PLACES))
}

/// Removes a folder with all that is in it, where there is one.
fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(folder)(error)),
        _ => Ok(()),
    }
}
