//! Detectors on given weights, weights × seeds, as one table that can be gone on with.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::plan::{flatten, is_among};
use super::run::{
    CELLS, Log, OF_THE_MACHINE, RUNS, StudyOutcome, begin, check_equal, check_path, check_same,
    epochs_in, in_turn, known_pace, read_kept, without,
};
use super::{check_length, default_seeds, read_checked, twice};
use crate::config::{DetectConfig, DetectorConfig, read_toml};
use crate::data::{DataConfig, ImageSize};
use crate::detect::{
    self, DetectionSet, Evaluation, EvaluationConfig, Figures, Floors, Origin, Sets, Trained,
    evaluate, find_parts,
};
use crate::error::{Error, Result, nearest};
use crate::nn::StateDict;
use crate::probe::file_name;
use crate::train::{CONFIG_FILE, RunFolder, Surroundings, create_folder, write_durably};

/// The table of settings that all rows have.
const ALL: &str = "all";
/// Keys of `[set.NAME]` that are not settings.
const OWN_KEYS: [&str; 2] = ["seeds", "weights"];
/// Settings that a study makes itself, beside those of the images.
const OF_STUDY: [&str; 6] = [
    "seed",
    "seeds",
    "weights",
    "encoder.name",
    "encoder.init",
    "detect.overfit",
];
/// Settings that say where something lies; what lies there is known by its fingerprint.
const PLACES: [&str; 3] = ["encoder.init", "detect.train", "detect.val"];
/// A short run from which the pace is taken.
const PACE_RUN: &str = "pace";
const PACE_STEPS: usize = 12;

/// A study file of detectors.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetectionFile {
    /// Images with boxes to train on, as `qbheat detect train` takes them with `--data`.
    pub data: PathBuf,
    /// As `--images`; empty where the images lie beside the annotations.
    #[serde(default)]
    pub images: PathBuf,
    /// As `--part`.
    #[serde(default)]
    pub part: String,
    /// Images to score, as `--val`.
    #[serde(default)]
    pub val: PathBuf,
    /// As `--val-part`.
    #[serde(default)]
    pub val_part: String,
    /// A piece of the name of an annotation file of `data` that finished detectors are scored on as well.
    #[serde(default)]
    pub test_part: String,
    /// Size of the frames.
    #[serde(default = "default_size")]
    pub image_size: ImageSize,
    /// Epochs of training: the same for all.
    pub epochs: Option<usize>,
    /// Or minutes of training steps at the pace they have on this machine; scoring along the way is not counted.
    pub minutes: Option<f64>,
    /// Images a step.
    #[serde(default = "default_batch")]
    pub batch_size: usize,
    /// Seeds of training.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// By name: a run, an `encoder.safetensors`, `untrained:ENCODER` or built-in weights.
    pub weights: BTreeMap<String, String>,
    /// Rows and their order; empty for all of `weights`, then those of `set` that name weights.
    #[serde(default)]
    pub rows: Vec<String>,
    /// For a row, or `all`: settings that differ, beside `weights` (which of them a row of its own has) and `seeds`
    /// (where it has not all).
    #[serde(default)]
    pub set: Table,
}

fn default_size() -> ImageSize {
    ImageSize::square(256)
}

fn default_batch() -> usize {
    8
}

/// Whether a study file is about detectors: it has `weights`.
pub fn is_detection(path: &Path) -> Result<bool> {
    Ok(read_toml::<Table>(path, "STUDY")?.contains_key("weights"))
}

impl DetectionFile {
    /// Reads and checks a study file.
    pub fn read(path: &Path) -> Result<Self> {
        read_checked(path, Self::check)
    }

    /// A configuration that says what computes, before anything does.
    pub fn machine(&self, common: &[(String, String)]) -> Result<DetectorConfig> {
        let mut settings = self.own_settings(ALL)?;
        settings.retain(|(key, _)| ["threads", "device", "kernels"].contains(&key.as_str()));
        settings.extend_from_slice(common);
        DetectorConfig::load(None, &settings)
    }

    fn check(&self) -> Result<(), String> {
        check_length(self.epochs, self.minutes)?;
        for (key, empty) in [
            ("seeds", self.seeds.is_empty()),
            ("weights", self.weights.is_empty()),
        ] {
            if empty {
                return Err(format!("{key} is empty: at least one"));
            }
        }
        for (key, twice) in [("seeds", twice(&self.seeds)), ("rows", twice(&self.rows))] {
            if let Some(twice) = twice {
                return Err(format!("{key} has {twice} twice"));
            }
        }
        if self.weights.contains_key(ALL) {
            return Err("[weights] all: [set.all] means every row; choose another name".into());
        }
        for (name, own) in &self.set {
            let is_entry = self.weights.contains_key(name);
            match own.get("weights") {
                _ if !own.is_table() => return Err(format!("set.{name}: expected a table")),
                _ if name == ALL => {}
                None if is_entry => {}
                None => {
                    return Err(format!(
                        "[set.{name}]: no row of this study is called so; give it weights = \"…\", an entry of [weights]"
                    ));
                }
                Some(_) if is_entry => {
                    return Err(format!(
                        "[set.{name}] weights: {name} is in [weights] itself; give the row a name of its own"
                    ));
                }
                Some(entry) => {
                    let name_of = entry.as_str().unwrap_or_default();
                    if !self.weights.contains_key(name_of) {
                        return Err(format!(
                            "[set.{name}] weights = {entry}: not in [weights]{}",
                            suggestion(name_of, self.weights.keys())
                        ));
                    }
                }
            }
        }
        let known = self.all_rows();
        match self.rows.iter().find(|row| !known.contains(row)) {
            Some(row) => Err(format!(
                "rows has {row:?}, which is neither in [weights] nor a [set.NAME] with weights{}",
                suggestion(row, &known)
            )),
            None => Ok(()),
        }
    }

    fn all_rows(&self) -> Vec<String> {
        let own = self.set.iter();
        let own = own.filter(|(name, own)| *name != ALL && own.get("weights").is_some());
        let own = own.map(|(name, _)| name);
        self.weights.keys().chain(own).cloned().collect()
    }

    fn rows(&self) -> Vec<String> {
        match self.rows.is_empty() {
            true => self.all_rows(),
            false => self.rows.clone(),
        }
    }

    /// The settings of `[set.NAME]`.
    fn own_settings(&self, name: &str) -> Result<Vec<(String, String)>> {
        // What only rows can have is refused of `all` below.
        let own_keys: &[&str] = if name == ALL { &[] } else { &OWN_KEYS };
        let mut own = Vec::new();
        if let Some(Value::Table(table)) = self.set.get(name) {
            flatten(table, "", own_keys, &mut own);
        }
        for (key, _) in &own {
            let of_images = ["detect.train", "detect.val"]
                .iter()
                .any(|section| key.starts_with(section));
            if OF_STUDY.contains(&key.as_str())
                || of_images
                || key == "optim.epochs" && self.minutes.is_some()
            {
                return Err(Error::Refused(format!(
                    "[set.{name}] {key}: that is the study's own to say, for all cells"
                )));
            }
        }
        Ok(own)
    }

    /// Where the images lie.
    fn origins(&self) -> Result<DetectConfig> {
        for (key, path) in [
            ("data", &self.data),
            ("images", &self.images),
            ("val", &self.val),
        ] {
            check_path(key, path)?;
        }
        let train = Origin {
            path: self.data.clone(),
            images: self.images.clone(),
            part: self.part.clone(),
        };
        let val = train.to_score(&self.val, Path::new(""), &self.val_part);
        let mut detect = DetectConfig {
            train,
            val,
            ..DetectConfig::default()
        };
        find_parts(&mut detect)?;
        if !self.test_part.is_empty() {
            let files = detect.train.annotation_files()?;
            let fitting = files.iter().filter(|name| name.contains(&self.test_part));
            // A lone file is the one that is trained on.
            if files.len() < 2 || fitting.count() != 1 {
                return Err(Error::Value {
                    key: "test_part".into(),
                    value: format!("{:?}", self.test_part),
                    expected: format!(
                        "a piece of the name of one of several annotation files of `data`, which has {}",
                        files.join(", ")
                    ),
                });
            }
        }
        Ok(detect)
    }

    /// The weights of a row, or why there are none.
    fn open(&self, row: &str) -> Result<RowWeights, String> {
        let own = self.set.get(row).and_then(|own| own.get("weights"));
        let entry = own.and_then(Value::as_str).unwrap_or(row);
        let name = self.weights.get(entry).ok_or("not in [weights]")?;
        let because = |reason: String| format!("[weights] {entry} = {name:?}: {reason}");
        let (weights, settings) =
            DetectorConfig::settings_of_weights(name).map_err(|error| match error {
                Error::Missing { .. } => because("no such file or folder".into()),
                other => because(other.to_string()),
            })?;
        let bytes = StateDict::of(&weights.encoder).to_bytes("");
        let bytes = bytes.map_err(|error| because(error.to_string()))?;
        Ok(RowWeights {
            settings,
            hash: blake3::hash(&bytes).to_hex().to_string(),
        })
    }

    /// All cells, seed by seed, so that an early stop leaves whole columns.
    fn plan(&self, common: &[(String, String)]) -> Result<Vec<Planned>> {
        let origins = self.origins()?;
        let rows = self.rows().into_iter().map(|row| {
            let weights = self.open(&row);
            (row, weights)
        });
        let rows: Vec<_> = rows.collect();
        let mut cells: Vec<Planned> = Vec::new();
        for &seed in &self.seeds {
            for (row, weights) in &rows {
                if !is_among(&self.set, row, "seeds", &self.seeds, &seed)? {
                    continue;
                }
                let ready = match weights {
                    Ok(weights) => Ok(self.ready(row, seed, weights, &origins, common)?),
                    Err(reason) => Err(reason.clone()),
                };
                let cell = Planned {
                    method: row.clone(),
                    seed,
                    ready,
                };
                if let Some(other) = cells.iter().find(|other| other.name() == cell.name()) {
                    return Err(Error::Refused(format!(
                        "rows `{}` and `{row}` would both be called {}; rename one",
                        other.method,
                        cell.name()
                    )));
                }
                cells.push(cell);
            }
        }
        Ok(cells)
    }

    fn ready(
        &self,
        row: &str,
        seed: u64,
        weights: &RowWeights,
        origins: &DetectConfig,
        common: &[(String, String)],
    ) -> Result<Ready> {
        let mut settings = weights.settings.clone();
        settings.extend(origins.train.settings("detect.train"));
        settings.extend(origins.val.settings("detect.val"));
        let mut add = |key: &str, value: String| settings.push((key.to_owned(), value));
        add("image_size", self.image_size.to_toml());
        add("optim.batch_size", self.batch_size.to_string());
        add("seed", seed.to_string());
        if let Some(epochs) = self.epochs {
            add("optim.epochs", epochs.to_string());
        }
        settings.extend(self.own_settings(ALL)?);
        settings.extend(self.own_settings(row)?);
        settings.extend_from_slice(common);
        Ok(Ready {
            config: DetectorConfig::load(None, &settings)?,
            settings,
            weights: weights.hash.clone(),
        })
    }
}

fn suggestion(given: &str, names: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    nearest(given, names).map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

/// What a row's weights give.
struct RowWeights {
    settings: Vec<(String, String)>,
    hash: String,
}

/// One cell to be run.
struct Planned {
    method: String,
    seed: u64,
    /// What it is run with, or why it cannot be.
    ready: Result<Ready, String>,
}

struct Ready {
    settings: Vec<(String, String)>,
    /// What these make; where the study counts minutes, its epochs are still to be found.
    config: DetectorConfig,
    /// Hash of the weights.
    weights: String,
}

impl Planned {
    /// Its name, also as part of a path.
    fn name(&self) -> String {
        format!("{}.seed{}", file_name(&self.method), self.seed)
    }

    fn ready(&self) -> Result<&Ready> {
        let ready = self.ready.as_ref();
        ready.map_err(|reason| Error::Refused(reason.clone()))
    }
}

/// Average precision of one class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    /// Its name.
    pub class: String,
    /// Mean over IoU thresholds.
    pub ap: Option<f64>,
    /// At IoU 0.5.
    pub ap50: Option<f64>,
}

/// A finished detector and its scores.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DetectionCell {
    /// Name of the row.
    pub method: String,
    /// Name of the encoder.
    pub encoder: String,
    /// Seed of training.
    pub seed: u64,
    /// Epochs of training.
    pub epochs: usize,
    /// Minutes that its steps took, without scoring; other work on the machine is in it.
    pub minutes: f64,
    /// On the images to score.
    #[serde(flatten)]
    pub val: Figures,
    /// On the test part, where the study has one.
    pub test: Option<Figures>,
    /// On the images to score, of each class.
    pub classes: Vec<ClassFigures>,
    /// AP along the way, by minutes.
    pub curve: Vec<(f64, f64)>,
    /// What the mean boxes of the training images reach, looking at no picture.
    pub mean_boxes: Figures,
    /// What random boxes reach.
    pub chance: Figures,
    /// Images trained on and scored.
    pub images: [usize; 2],
    /// Milliseconds that finding objects takes an image, from files to boxes in batches of 16.
    pub ms_per_image: f64,
    /// The configuration without what concerns the machine and where things lie, as TOML.
    pub config: String,
    /// What else it was made of.
    pub given: DetectionGiven,
}

/// What a cell was made of, beside its configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DetectionGiven {
    /// Fingerprint of the images and boxes, trained on and scored.
    pub data: String,
    /// That of the test part.
    pub test: Option<String>,
    /// Hash of the encoder's weights; of an untrained one those of seed 0.
    pub weights: String,
    /// Minutes of training, where that is what the study counts.
    pub minutes: Option<f64>,
}

/// Images that were opened, and what decided how.
struct Opened {
    key: (DetectConfig, DataConfig, usize, Option<u64>),
    sets: Sets,
    test: Option<DetectionSet>,
}

/// A study of detectors in its folder.
pub struct DetectionStudy<'a> {
    file: &'a DetectionFile,
    cells: Vec<Planned>,
    folder: RunFolder,
    around: &'a Surroundings<'a>,
    opened: RefCell<Option<Rc<Opened>>>,
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
            folder: RunFolder::at(out),
            around,
            opened: RefCell::default(),
        })
    }

    /// The epochs of every cell, without running any; where the study counts minutes, paces are measured.
    pub fn lengths(&self) -> Result<Vec<(String, usize)>> {
        create_folder(self.folder.path())?;
        let _lock = self.folder.lock()?;
        let cells = self.cells.iter();
        cells
            .map(|planned| Ok((planned.name(), self.epochs(planned)?)))
            .collect()
    }

    /// Runs what is missing. A cell that fails does not keep the others from being run. After each cell `progress` is told
    /// how the study stands.
    pub fn run(
        &self,
        progress: impl FnMut(&StudyOutcome<DetectionCell>) -> Result<()>,
    ) -> Result<StudyOutcome<DetectionCell>> {
        let _lock = begin(&self.folder)?;
        // What the study no longer fits is found before anything is run.
        for planned in &self.cells {
            self.check_kept(planned)?;
        }
        in_turn(
            &self.cells,
            self.around.observer,
            Planned::name,
            |planned| self.cell(planned),
            |planned| self.kept(planned),
            progress,
        )
    }

    fn cell_file(&self, planned: &Planned) -> PathBuf {
        let name = format!("{}.json", planned.name());
        self.folder.file(CELLS).join(name)
    }

    fn run_folder(&self, planned: &Planned) -> RunFolder {
        RunFolder::at(&self.folder.file(RUNS).join(planned.name()))
    }

    /// What a run was begun with, which it does not say itself.
    fn given_file(&self, planned: &Planned) -> PathBuf {
        let name = format!("{}.given.json", planned.name());
        self.folder.file(RUNS).join(name)
    }

    fn kept(&self, planned: &Planned) -> Result<Option<DetectionCell>> {
        read_kept(&self.cell_file(planned))
    }

    /// Refuses a cell or a run that was made with something else than the study now asks for.
    fn check_kept(&self, planned: &Planned) -> Result<()> {
        // Without its weights there is nothing to compare it with.
        let Ok(ready) = &planned.ready else {
            return Ok(());
        };
        let name = planned.name();
        let defaults = DetectorConfig::default().to_toml();
        let check_config = |found: &str, epochs: usize| {
            let expected = describe(&self.with_epochs(ready, epochs)?);
            check_same(&name, found, &expected, &defaults)
        };
        let check_given = |found: &DetectionGiven| {
            check_equal(&name, "weights of hash", &found.weights, &ready.weights)?;
            check_equal(&name, "minutes", &found.minutes, &self.file.minutes)
        };
        if let Some(cell) = self.kept(planned)? {
            check_config(&cell.config, cell.epochs)?;
            check_given(&cell.given)?;
            let (found, expected) = (&cell.given, self.given(ready)?);
            check_equal(&name, "data of fingerprint", &found.data, &expected.data)?;
            check_equal(
                &name,
                "test_part of fingerprint",
                &found.test,
                &expected.test,
            )?;
        }
        let run = self.run_folder(planned);
        if run.file(CONFIG_FILE).is_file() {
            let begun = DetectorConfig::of_run(&run)?;
            check_config(&describe(&begun), begun.optim.epochs)?;
            if let Some(given) = read_kept::<DetectionGiven>(&self.given_file(planned))? {
                check_given(&given)?;
            }
        }
        Ok(())
    }

    /// Trains a cell's detector to its end and scores it.
    fn cell(&self, planned: &Planned) -> Result<()> {
        if self.kept(planned)?.is_some() {
            return Ok(());
        }
        let ready = planned.ready()?;
        let config = self.with_epochs(ready, self.epochs(planned)?)?;
        let images = self.images(&config)?;
        let given = self.given(ready)?;
        let run = self.run_folder(planned);
        let outcome = if run.file(CONFIG_FILE).is_file() {
            detect::resume(run.clone(), &config, &images.sets, self.around)?
        } else {
            let text = serde_json::to_vec_pretty(&given).expect("it is valid JSON");
            write_durably(&self.given_file(planned), &text)?;
            detect::start(&config, &images.sets, run.path(), self.around)?
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
            let found = evaluate(
                &Trained::open(&run)?.detector,
                set,
                &how,
                self.around.observer,
            )?;
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
        let text = serde_json::to_vec_pretty(&cell).expect("a cell is valid JSON");
        write_durably(&self.cell_file(planned), &text)
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
        let run = self.run_folder(planned);
        if run.file(CONFIG_FILE).is_file() {
            return Ok(DetectorConfig::of_run(&run)?.optim.epochs);
        }
        let images = self.images(&ready.config)?;
        let batch = ready.config.optim.batch_size;
        // Of whole batches, as training takes them.
        let count = images.sets.train.images.len() / batch * batch;
        let pace = self.pace(&ready.config, &images.sets)?;
        let observer = self.around.observer;
        Ok(epochs_in(minutes, pace, count, &planned.name(), observer))
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
        known_pace(&self.folder, key, || {
            let folder = self.folder.file(PACE_RUN);
            remove(&folder)?;
            let taken = Cell::new(0);
            let stop = || {
                taken.set(taken.get() + 1);
                taken.get() >= PACE_STEPS || (self.around.stop)()
            };
            let around = Surroundings {
                observer: self.around.observer,
                stop: &stop,
            };
            let outcome = detect::start(&config, sets, &folder, &around);
            remove(&folder)?;
            let pace = outcome?.course.images_per_s;
            if (self.around.stop)() {
                return Err(Error::Stopped);
            }
            Ok(pace)
        })
    }

    fn given(&self, ready: &Ready) -> Result<DetectionGiven> {
        let images = self.images(&ready.config)?;
        let test = images.test.as_ref();
        Ok(DetectionGiven {
            data: images.sets.fingerprint(),
            test: test.map(|set| set.fingerprint().to_owned()),
            weights: ready.weights.clone(),
            minutes: self.file.minutes,
        })
    }

    /// The images of a cell; opened once for cells that follow each other and have the same.
    fn images(&self, config: &DetectorConfig) -> Result<Rc<Opened>> {
        let plain = DetectConfig::default();
        let detect = DetectConfig {
            unfreeze: plain.unfreeze,
            encoder_rate: plain.encoder_rate,
            ..config.detect.clone()
        };
        // The seed draws what is held out, and what a limit leaves.
        let is_drawn = detect.val.path.as_os_str().is_empty() || detect.limit > 0;
        let key = (
            detect,
            config.data.clone(),
            config.optim.batch_size,
            is_drawn.then_some(config.seed),
        );
        let mut opened = self.opened.borrow_mut();
        if let Some(images) = opened.as_ref().filter(|images| images.key == key) {
            return Ok(images.clone());
        }
        // Decoded images are large: those of one cell at a time.
        *opened = None;
        let observer = self.around.observer;
        let sets = Sets::open(config, observer)?;
        let test = match self.file.test_part.is_empty() {
            true => None,
            false => {
                let origin = Origin {
                    part: self.file.test_part.clone(),
                    ..config.detect.train.clone()
                };
                let detect = &config.detect;
                Some(detect.open_for(&origin, sets.classes(), &config.data, observer)?)
            }
        };
        for set in [&*sets.train, &*sets.val].into_iter().chain(&test) {
            observer.note(&set.describe());
        }
        let images = Rc::new(Opened { key, sets, test });
        *opened = Some(images.clone());
        Ok(images)
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
