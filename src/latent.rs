//! Beyond the paper: the same quarter and the same linear steps, but what they predict are an averaged teacher's
//! features of the whole image instead of pixels. There is no decoder.
//!
//! Targets as in I-JEPA (arXiv 2301.08243), a teacher as in BYOL (arXiv 2006.07733), a guard against collapse as in
//! Barlow Twins (arXiv 2103.03230).

use burn::module::Module;
use burn::tensor::Tensor;
use qbheat_kernels::weighted_squared_error;
use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::encoder::{Build, Encoder};
use crate::error::Result;
use crate::heat::{Arranged, Place, Propagator, QbHeatConfig, Visible, see};
use crate::nn::{Init, LayerNorm, Linear, follow, perceptron, teacher_of, total};
use crate::pretrain::{Images, PretrainModel};

const EPSILON: f32 = 1e-6;

/// What the masked quarters are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The image's own pixels, as in the paper.
    Pixels,
    /// A teacher's features.
    Latent,
}

/// What QB-Heat predicts, and for latent targets how; the defaults did best in `docs/results/recipe.md`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveConfig {
    /// Pixels or a teacher's features.
    pub target: Target,
    /// Share of its weights that the teacher keeps in each step.
    pub momentum: f64,
    /// λ: weight of the guard against collapse.
    pub decorrelation: f64,
    /// Width inside a two-layer perceptron that corrects the propagated features; 0 for none.
    pub head: usize,
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        Self {
            target: Target::Pixels,
            momentum: 0.99,
            decorrelation: 0.05,
            head: 384,
        }
    }
}

impl ObjectiveConfig {
    /// Whether every value is usable.
    pub(crate) fn check(&self) -> Result<()> {
        require(
            (0.0..=1.0).contains(&self.momentum),
            "objective.momentum",
            self.momentum,
            "a share from 0 to 1",
        )?;
        require(
            self.decorrelation.is_finite() && self.decorrelation >= 0.0,
            "objective.decorrelation",
            self.decorrelation,
            "a number from 0 up",
        )
    }
}

/// Encoder, propagator and teacher.
#[derive(Module, Debug)]
pub struct Latent {
    /// Sees the visible quarter only.
    pub encoder: Encoder,
    /// Over the features that the propagator steps from.
    pub feature_norm: Option<LayerNorm>,
    /// Predicts the features of the masked quarters.
    pub propagator: Propagator,
    /// Corrects what the propagator predicts, where there is one.
    head: Option<[Linear; 2]>,
    /// Sees the whole image; an average of the encoder over time.
    pub teacher: Encoder,
    patch: usize,
    momentum: f64,
    decorrelation: f64,
    visible_weight: f32,
    #[module(skip)]
    place: Place,
}

impl Latent {
    /// Fresh propagator and a teacher like the encoder, which was built so.
    pub fn new(
        config: &QbHeatConfig,
        objective: &ObjectiveConfig,
        encoder: Encoder,
        build: Build,
        init: &mut Init,
    ) -> Self {
        let channels = encoder.channels();
        Self {
            teacher: teacher_of(&encoder),
            encoder,
            feature_norm: config.feature_norm.then(|| init.layer_norm(channels)),
            propagator: Propagator::new(channels, config.propagator, init),
            head: (objective.head > 0).then(|| {
                [
                    init.linear(channels, objective.head),
                    init.linear(objective.head, channels),
                ]
            }),
            patch: build.stride,
            momentum: objective.momentum,
            decorrelation: objective.decorrelation,
            visible_weight: config.visible_weight,
            place: config.visible,
        }
    }

    /// The loss of a batch: images `[N, colours, H, W]`, normalised, H and W multiples of twice the stride, and the visible
    /// block of each.
    pub fn loss_of(&self, images: Tensor<4>, visible: &Visible) -> Tensor<1> {
        let batch = Arranged::new(images, visible, self.patch);
        let z = see(&self.encoder, &self.feature_norm, &batch);
        let guard = (self.decorrelation > 0.0).then(|| correlation(z.clone()) * self.decorrelation);
        let mut predicted = batch.complete(z, &self.propagator);
        if let Some([first, second]) = &self.head {
            predicted = predicted.clone() + perceptron(first, second, predicted);
        }
        let target = standardised(self.teacher.channels_last(batch.images.clone()).detach());
        let weights = batch.weights(self.visible_weight);
        let error = weighted_squared_error(predicted, target, weights);
        match guard {
            Some(guard) => error + guard,
            None => error,
        }
    }
}

/// Each channel of a map minus its mean over batch and positions, over its deviation: `[N, h, w, C]` to `[N, h·w, C]`.
fn standardised(map: Tensor<4>) -> Tensor<3> {
    let [n, h, w, c] = map.dims();
    standard_rows(map.reshape([n * h * w, c])).reshape([n, h * w, c])
}

fn standard_rows(rows: Tensor<2>) -> Tensor<2> {
    let centred = rows.clone() - rows.mean_dim(0);
    let variance = (centred.clone() * centred.clone()).mean_dim(0);
    centred / (variance + EPSILON).sqrt()
}

/// The sum of the squared off-diagonal entries of the channel correlation over batch and positions, over C: `[N, h, w, C]`
/// to `[1]`.
fn correlation(z: Tensor<4>) -> Tensor<1> {
    let [n, h, w, c] = z.dims();
    let rows = standard_rows(z.reshape([n * h * w, c]));
    let matrix = rows.clone().transpose().matmul(rows) / (n * h * w) as f32;
    let others = Tensor::<2>::eye(c, &matrix.device()).neg() + 1.0;
    let entries = matrix * others;
    total(entries.clone() * entries) / c as f32
}

impl PretrainModel for Latent {
    const TRIVIAL: &'static str = "predicting 0, without the guard,";
    const PRESET: &'static str = "
        [run]
        rank_floor = 3.0
    ";

    fn loss(&self, batch: &Images, seed: u64) -> Tensor<1> {
        let visible = batch.visible(self.place, self.patch, seed);
        self.loss_of(batch.pixels.clone(), &visible)
    }

    /// The student: it is what is scored and written, its teacher stays in the checkpoints.
    fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    fn with_encoder(mut self, encoder: Encoder) -> Self {
        self.teacher = teacher_of(&encoder);
        self.encoder = encoder;
        self
    }

    /// Targets have mean 0 and variance 1: predicting 0 costs 1.
    fn trivial_loss(&self, _batches: &[Images], _seed: u64) -> f64 {
        1.0
    }

    fn metrics(&self) -> Vec<(&'static str, f64)> {
        vec![("commutator", self.propagator.commutator())]
    }

    fn follow(mut self) -> Self {
        self.teacher = follow(self.teacher, &self.encoder, self.momentum);
        self
    }
}
