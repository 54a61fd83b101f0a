//! What a detector finds in a set, and what that is worth.

use std::time::Instant;

use burn::tensor::Device;

use super::average_precision::{Prediction, Score, score};
use super::detector::{Detector, in_picture, pixels};
use super::loader::DetectionBatch;
use super::set::DetectionSet;
use crate::data::ImageSize;
use crate::error::Result;
use crate::observe::Observer;

/// Images at a time.
const BATCH: usize = 16;

/// How predictions are taken and looked at.
#[derive(Clone, Copy, Debug)]
pub struct EvaluationConfig {
    /// Size of the frames.
    pub image_size: ImageSize,
    /// Most predictions an image.
    pub limit: usize,
    /// Predictions of a class that overlap a more certain one of it by an IoU above this go; nothing keeps them all.
    pub suppress: Option<f64>,
    /// Least score of the predictions that the confusion of classes counts.
    pub confidence: f64,
}

impl EvaluationConfig {
    /// COCO's 100 predictions an image, none suppressed.
    pub fn new(image_size: ImageSize) -> Self {
        Self {
            image_size,
            limit: 100,
            suppress: None,
            confidence: 0.3,
        }
    }
}

/// What was found, and what that is worth.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Of each image, most certain first.
    pub predictions: Vec<Vec<Prediction>>,
    /// Against the true boxes.
    pub score: Score,
    /// Milliseconds an image takes, from its file to its boxes.
    pub ms_per_image: f64,
}

/// Scores a detector, as [`burn::module::Module::valid`] gives it, on all images of `set`.
pub fn evaluate(
    detector: &Detector,
    set: &DetectionSet,
    config: &EvaluationConfig,
    observer: &dyn Observer,
) -> Result<Evaluation> {
    let device: Device = crate::device();
    let all: Vec<usize> = (0..set.images.len()).collect();
    let mut predictions = Vec::with_capacity(all.len());
    let begin = Instant::now();
    observer.begin("finding objects", all.len() as u64);
    for indices in all.chunks(BATCH) {
        let batch = DetectionBatch::exactly(set, indices, config.image_size)?;
        let found = detector.detect(pixels(&batch, &device), &batch.placements, config.limit);
        predictions.extend(
            found
                .into_iter()
                .zip(&batch.placements)
                .map(|(found, placement)| in_picture(found, placement, config.suppress)),
        );
        observer.progress(predictions.len() as u64, "");
    }
    observer.end();
    let ms_per_image = begin.elapsed().as_secs_f64() * 1e3 / all.len() as f64;
    let score = score(&set.boxes(), &set.classes, &predictions, config.confidence)?;
    Ok(Evaluation {
        predictions,
        score,
        ms_per_image,
    })
}
