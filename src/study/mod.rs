//! Methods × encoders × seeds × protocols, or weights × seeds of detectors, as one table that can be gone on with.

mod compare;
mod detection;
mod fit;
mod folder;
mod log;
mod minutes;
mod plan;
mod run;
mod table;

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::config::read_toml;
use crate::data::{DataConfig, ImageSize};
use crate::error::{Error, Result};
use crate::probe::{ProbeResult, Protocol};

pub use compare::cells_of_runs;
pub use detection::{
    ClassFigures, Costs, DetectionCell, DetectionFile, DetectionGiven, DetectionRow,
    DetectionStudy, DetectionTable, detection_csv, detection_markdown, detection_rows,
    is_detection,
};
pub use folder::StudyOutcome;
pub(crate) use minutes::MINUTES;
pub use minutes::Minutes;
pub use plan::{Plan, PlannedCell};
pub use run::Study;
pub(crate) use table::title;
pub use table::{Interval, Row, rows, to_csv, to_markdown};

/// A study file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyFile {
    /// The images to pre-train on and to train probes on, as `--data` has them.
    pub data: PathBuf,
    /// The images to score; empty for those that the data set holds out.
    #[serde(default)]
    pub val: PathBuf,
    /// Size of the images.
    #[serde(default = "default_size")]
    pub image_size: ImageSize,
    /// Image pixels a position of the feature map; 0 chooses.
    #[serde(default)]
    pub stride: usize,
    /// Epochs of pre-training: the same for all.
    pub epochs: Option<usize>,
    /// Or minutes of pre-training at the pace that each method has on this machine.
    pub minutes: Option<f64>,
    /// Images a step.
    #[serde(default = "default_batch")]
    pub batch_size: usize,
    /// Encoders by name.
    pub encoders: Vec<String>,
    /// `qb-heat`, `qb-heat-latent`, `moco-v2`, `supervised`, `untrained`, or names that a table `[set.NAME]` explains.
    pub methods: Vec<String>,
    /// Seeds of pre-training.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// How features are scored.
    #[serde(default = "default_protocols")]
    pub protocols: Vec<Protocol>,
    /// Shares of the labels that linear and tran-1 are scored with.
    #[serde(default = "default_labels")]
    pub labels: Vec<f64>,
    /// For a method or an encoder: settings that differ, beside `method` (which one a made-up name is), `seeds`,
    /// `encoders` and `labels` (where it has not all).
    #[serde(default)]
    pub set: Table,
}

fn default_size() -> ImageSize {
    ImageSize::square(64)
}

fn default_batch() -> usize {
    128
}

fn default_seeds() -> Vec<u64> {
    vec![0]
}

fn default_protocols() -> Vec<Protocol> {
    vec![Protocol::Knn, Protocol::Linear, Protocol::Tran1]
}

fn default_labels() -> Vec<f64> {
    vec![1.0, 0.1, 0.01]
}

impl StudyFile {
    /// Reads and checks a study file.
    pub fn read(path: &Path) -> Result<Self> {
        read_checked(path, Self::check)
    }

    fn check(&self) -> Result<(), String> {
        check_length(self.epochs, self.minutes)?;
        for (key, empty) in [
            ("encoders", self.encoders.is_empty()),
            ("methods", self.methods.is_empty()),
            ("seeds", self.seeds.is_empty()),
            ("protocols", self.protocols.is_empty()),
            ("labels", self.labels.is_empty()),
        ] {
            if empty {
                return Err(format!("{key} = []: at least one"));
            }
        }
        for (key, twice) in [
            ("encoders", twice(&self.encoders)),
            ("methods", twice(&self.methods)),
            ("seeds", twice(&self.seeds)),
            ("protocols", twice(&self.protocols)),
            ("labels", twice(&self.labels)),
        ] {
            if let Some(twice) = twice {
                return Err(format!("{key} has {twice} twice"));
            }
        }
        if self.data.as_os_str().is_empty() {
            return Err("data = \"\": where are the images?".into());
        }
        if let Some((name, value)) = self.set.iter().find(|(_, own)| !own.is_table()) {
            return Err(format!("set.{name} = {value}: expected a table"));
        }
        for name in &self.encoders {
            let own = self.set.get(name).and_then(toml::Value::as_table);
            for key in ["method", "encoders"] {
                if own.is_some_and(|own| own.contains_key(key)) {
                    return Err(format!("[set.{name}] {key}: not of an encoder"));
                }
            }
        }
        if let Some(share) = self.labels.iter().find(|&&s| !(s > 0.0 && s <= 1.0)) {
            return Err(format!("labels has {share}: shares above 0 and up to 1"));
        }
        let known = |name: &str| self.methods.iter().chain(&self.encoders).any(|n| n == name);
        if let Some(name) = self.set.keys().find(|name| !known(name)) {
            return Err(format!(
                "[set.{name}]: no method or encoder of this study is called so"
            ));
        }
        Ok(())
    }
}

/// A study file that `check` has nothing against.
fn read_checked<T: DeserializeOwned>(
    path: &Path,
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<T> {
    let file: T = read_toml(path, "STUDY")?;
    check(&file).map_err(|message| Error::Config {
        path: path.to_owned(),
        message,
    })?;
    Ok(file)
}

/// Whether a study says how long training is, in one way.
fn check_length(epochs: Option<usize>, minutes: Option<f64>) -> Result<(), String> {
    match (epochs, minutes) {
        (None, None) => Err("needs `epochs` or `minutes`".into()),
        (Some(_), Some(_)) => Err("has `epochs` and `minutes`; give one".into()),
        (Some(0), _) => Err("epochs = 0: at least 1".into()),
        (_, Some(minutes)) if !(minutes > 0.0 && minutes.is_finite()) => {
            Err(format!("minutes = {minutes}: a number above 0"))
        }
        _ => Ok(()),
    }
}

/// An error that names the key of a study where nothing is at its path.
fn check_path(key: &str, path: &Path) -> Result<()> {
    let text = path.to_string_lossy();
    if text.is_empty() || text.starts_with("builtin:") || text.contains('{') || path.exists() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "{}: no such file or folder; check `{key}` of the study",
        path.display()
    )))
}

/// What decides how images are opened: all of it but augmentation.
fn unaugmented(data: &DataConfig) -> DataConfig {
    let plain = DataConfig::default();
    DataConfig {
        crop_scale: plain.crop_scale,
        crop_ratio: plain.crop_ratio,
        flip: plain.flip,
        jitter: plain.jitter,
        jitter_share: plain.jitter_share,
        grey: plain.grey,
        blur: plain.blur,
        ..data.clone()
    }
}

/// What occurs more than once.
fn twice<T: PartialEq + std::fmt::Debug>(values: &[T]) -> Option<String> {
    let mut places = values.iter().enumerate();
    let found = places.find(|(i, value)| values[..*i].contains(value));
    found.map(|(_, value)| format!("{value:?}"))
}

/// One score of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// How it was scored.
    pub protocol: Protocol,
    /// Share of the labels used.
    pub labels: f64,
    /// Share of scored images whose class came first, in percent.
    pub top1: f64,
    /// Among the first five, where there are more classes.
    pub top5: Option<f64>,
    /// Images that the probe was trained on, and scored.
    pub images: [usize; 2],
    /// What was chosen on held-out training images.
    pub details: serde_json::Map<String, serde_json::Value>,
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

/// A pre-trained (or untrained) encoder and its scores.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// As the study calls it.
    pub method: String,
    /// Name of the encoder.
    pub encoder: String,
    /// Seed of pre-training and of the probes.
    pub seed: u64,
    /// Epochs of pre-training.
    pub epochs: usize,
    /// Minutes that its steps took; other work on the machine is in it.
    pub minutes: f64,
    /// Loss of the last epoch's steps, averaged.
    pub loss: Option<f64>,
    /// k-NN accuracy along the way, in percent, by minutes of training.
    pub curve: Vec<(f64, f64)>,
    /// Effective rank of the features along the way, by minutes.
    pub ranks: Vec<(f64, f64)>,
    /// The scores.
    pub scores: Vec<Score>,
    /// The configuration without what concerns the machine, as TOML.
    pub config: String,
    /// Fingerprints of the images trained on and of those scored, and the minutes that the study had.
    pub given: Given,
}

/// What a cell was made of, beside its configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Given {
    /// Fingerprint of the index of the images.
    pub data: String,
    /// Of the images to score, where they are another set.
    pub val: Option<String>,
    /// Minutes of pre-training, where that is what the study counts.
    pub minutes: Option<f64>,
}

impl Cell {
    /// The score of a protocol with a share of the labels.
    pub fn score(&self, protocol: Protocol, labels: f64) -> Option<&Score> {
        self.scores
            .iter()
            .find(|score| score.protocol == protocol && score.labels == labels)
    }

    /// Minutes of pre-training.
    pub fn minutes(&self) -> Minutes {
        Minutes::of(self.given.minutes, self.epochs, self.minutes)
    }
}
