//! Detectors on given weights, weights × seeds, as one table that can be gone on with.

mod file;
mod images;
mod plan;
mod run;
mod table;

use serde::{Deserialize, Serialize};

use super::Minutes;
use crate::detect::Figures;

pub use file::{DetectionFile, is_detection};
pub use run::DetectionStudy;
pub use table::{
    Costs, DetectionRow, DetectionTable, detection_csv, detection_markdown, detection_rows,
};

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

impl DetectionCell {
    /// Minutes of training.
    pub fn minutes(&self) -> Minutes {
        Minutes::of(self.given.minutes, self.epochs, self.minutes)
    }
}
