//! The file of a study of detectors: what it may say, and the settings that follow from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Table;

use crate::config::{DetectConfig, DetectorConfig, OF_PROCESS, read_toml};
use crate::data::ImageSize;
use crate::detect::{Origin, find_parts, only_with};
use crate::error::{Error, Result, one_of};
use crate::study::plan::own_settings;
use crate::study::{check_length, check_path, default_seeds, read_checked, twice};

/// The table of settings that all rows have.
pub(super) const ALL: &str = "all";
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
/// Sections of settings that a study makes itself.
const OF_IMAGES: [&str; 2] = ["detect.train", "detect.val"];
/// Keys that decide which images and boxes are scored: rows that differ in them could not be compared.
const OF_TRUTH: [&str; 2] = ["data.held_out", "detect.class_agnostic"];

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
    /// A piece of the name of an annotation file of `data`, not trained on, that finished detectors are scored on as well.
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
    /// (where it has not all). What the process computes with and what is scored are for `all` only.
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
        settings.extend_from_slice(common);
        DetectorConfig::of_process(settings)
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
                            "[set.{name}] weights = {entry}: not in [weights]; expected {}",
                            one_of(self.weights.keys(), name_of)
                        ));
                    }
                }
            }
        }
        let known = self.all_rows();
        match self.rows.iter().find(|row| !known.contains(row)) {
            Some(row) => Err(format!(
                "rows has {row:?}, which is neither in [weights] nor a [set.NAME] with weights; expected {}",
                one_of(&known, row)
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

    pub(super) fn rows(&self) -> Vec<String> {
        match self.rows.is_empty() {
            true => self.all_rows(),
            false => self.rows.clone(),
        }
    }

    /// The settings of `[set.NAME]`.
    pub(super) fn own_settings(&self, name: &str) -> Result<Vec<(String, String)>> {
        let of_study = |key: &str| {
            OF_STUDY.contains(&key)
                || OF_IMAGES.iter().any(|section| key.starts_with(section))
                || key == "optim.epochs" && self.minutes.is_some()
        };
        if name == ALL {
            // What only rows can have is refused here.
            return own_settings(&self.set, ALL, &[], of_study);
        }
        let of_all =
            |key: &str| of_study(key) || OF_PROCESS.contains(&key) || OF_TRUTH.contains(&key);
        own_settings(&self.set, name, &OWN_KEYS, of_all)
    }

    /// Where the images lie.
    pub(super) fn origins(&self) -> Result<DetectConfig> {
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
            self.check_test_part(&detect.train)?;
        }
        Ok(detect)
    }

    fn check_test_part(&self, train: &Origin) -> Result<()> {
        let files = train.annotation_files()?;
        let test = only_with(&files, &self.test_part);
        // A lone file is the one that is trained on.
        if files.len() > 1 && test.is_some() && test != only_with(&files, &train.part) {
            return Ok(());
        }
        Err(Error::Value {
            key: "test_part".into(),
            value: format!("{:?}", self.test_part),
            expected: format!(
                "a piece of the name of one annotation file of `data` that is not trained on; there are {}",
                files.join(", ")
            ),
        })
    }
}
