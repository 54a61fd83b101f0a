//! Supervised pre-training: labels from class folders, cross-entropy with label smoothing (Szegedy et al.,
//! arXiv 1512.00567).

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::encoder::Encoder;
use crate::error::Result;
use crate::nn::{Init, cross_entropy};
use crate::pretrain::{Images, PretrainModel};
use crate::probe::Classifier;

/// The choices of supervised pre-training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SupervisedConfig {
    /// Classes to tell apart; 0 takes as many as the images have.
    pub classes: usize,
    /// Share of the target spread evenly over all classes.
    pub label_smoothing: f64,
}

impl Default for SupervisedConfig {
    fn default() -> Self {
        Self {
            classes: 0,
            label_smoothing: 0.1,
        }
    }
}

impl SupervisedConfig {
    /// Whether every value is usable.
    pub(crate) fn check(&self) -> Result<()> {
        require(
            (0.0..1.0).contains(&self.label_smoothing),
            "supervised.label_smoothing",
            self.label_smoothing,
            "a share from 0 to below 1",
        )
    }
}

/// An encoder with mean pooling and a linear classifier.
#[derive(Module, Debug)]
pub struct Supervised {
    network: Classifier,
    smoothing: f64,
    classes: usize,
}

impl Supervised {
    /// A fresh classifier behind an encoder.
    pub fn new(config: &SupervisedConfig, encoder: Encoder, init: &mut Init) -> Self {
        let classifier = init.linear(encoder.channels(), config.classes);
        Self {
            network: Classifier::new(encoder, classifier),
            smoothing: config.label_smoothing,
            classes: config.classes,
        }
    }
}

impl PretrainModel for Supervised {
    const LABELLED: bool = true;
    const TRIVIAL: &'static str = "all classes alike";
    const PRESET: &'static str = "
        [data]
        jitter = [0.4, 0.4, 0.4, 0.0]
        jitter_share = 1.0
    ";

    fn loss(&self, batch: &Images, _seed: u64) -> Tensor<1> {
        let scores = self.network.forward(batch.pixels.clone());
        cross_entropy(scores, &batch.labels, self.smoothing)
    }

    fn encoder(&self) -> &Encoder {
        &self.network.encoder
    }

    fn with_encoder(mut self, encoder: Encoder) -> Self {
        self.network.encoder = encoder;
        self
    }

    /// All classes alike.
    fn trivial_loss(&self, _batches: &[Images], _seed: u64) -> f64 {
        (self.classes as f64).ln()
    }
}
