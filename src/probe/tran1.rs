//! The tran-1 probe: one transformer block over the positions of a frozen feature map.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::tensor::{Int, Tensor, TensorData};

use super::{Features, ProbeConfig, Scores, Whitening};
use crate::error::Result;
use crate::nn::{Init, LayerNorm, Linear, TransformerBlock, sin_cos_2d};
use crate::observe::Observer;
use crate::random::{self, Purpose};
use crate::train::{AdamW, AdamWConfig, LearningRate, Schedule, Stop, TrainState, give_up, train};

const HEADS: usize = 4;
const BATCH: usize = 128;
const LEARNING_RATE: f64 = 1e-3;
const WEIGHT_DECAY: f64 = 0.05;

/// Positions added, one block, norm, mean over positions, linear classifier.
#[derive(Module, Debug)]
struct Tran1 {
    block: TransformerBlock,
    norm: LayerNorm,
    classifier: Linear,
}

impl Tran1 {
    fn new(channels: usize, classes: usize, init: &mut Init) -> Self {
        Self {
            block: TransformerBlock::new(channels, HEADS, init),
            norm: init.layer_norm(channels),
            classifier: init.linear(channels, classes),
        }
    }

    /// `[N, h·w, C]` to `[N, classes]`.
    fn forward(&self, map: Tensor<3>, [h, w]: [usize; 2]) -> Tensor<2> {
        let channels = map.dims()[2];
        let tokens = map.clone() + sin_cos_2d(h, w, channels, &map.device());
        let pooled = self.norm.forward(self.block.forward(tokens)).mean_dim(1);
        self.classifier.forward(pooled.squeeze_dim::<2>(1))
    }
}

/// Class labels as a tensor.
pub(super) fn label_tensor(labels: &[u32], like: &Tensor<2>) -> Tensor<1, Int> {
    let labels: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
    let count = labels.len();
    Tensor::from_data(TensorData::new(labels, [count]), &like.device())
}

/// Cross-entropy of scores `[N, classes]`, averaged.
pub(super) fn cross_entropy(scores: Tensor<2>, labels: &[u32]) -> Tensor<1> {
    let labels = label_tensor(labels, &scores);
    CrossEntropyLossConfig::new()
        .init(&scores.device())
        .forward(scores, labels)
}

/// Scores of `held_out` by a block trained on `train`, both whitened.
pub fn tran1_scores(
    features: &Features,
    (labels, classes): (&[u32], usize),
    held_out: &Features,
    whitening: &Whitening,
    config: &ProbeConfig,
    observer: &dyn Observer,
) -> Result<Scores> {
    let device = crate::device().autodiff();
    let channels = features.pooled.columns;
    let batch = BATCH.min(features.len());
    let per_epoch = features.len() / batch;
    let total_steps = (config.epochs * per_epoch) as u64;
    let whitened = |features: &Features, places: &[usize]| -> Result<Tensor<3>> {
        let maps = features.maps(places)?;
        let [n, t, c] = maps.dims();
        Ok(whitening.apply(maps.reshape([n * t, c])).reshape([n, t, c]))
    };
    let rate = LearningRate {
        peak: LEARNING_RATE,
        warmup_steps: per_epoch as u64 / 2,
        total_steps,
        schedule: Schedule::Cosine,
    };
    let state = TrainState {
        model: Tran1::new(channels, classes, &mut Init::new(config.seed, &device)),
        optimizer: AdamW::new(AdamWConfig {
            betas: [0.9, 0.999],
            weight_decay: WEIGHT_DECAY,
            clip_norm: 0.0,
        }),
        step: 0,
    };
    let mut order = Vec::new();
    let mut step = 0;
    observer.begin("training the tran-1 probe", total_steps);
    let state = train(
        state,
        &rate,
        || {
            if step % per_epoch == 0 {
                let epoch = (step / per_epoch) as u64;
                order = random::permutation(config.seed, Purpose::Order, epoch, features.len());
            }
            let start = (step % per_epoch) * batch;
            step += 1;
            let places = &order[start..start + batch];
            let labels: Vec<u32> = places.iter().map(|&place| labels[place]).collect();
            Ok((Tensor::from_inner(whitened(features, places)?), labels))
        },
        |model: &Tran1, (maps, labels): (Tensor<3>, Vec<u32>)| {
            cross_entropy(model.forward(maps, features.grid), &labels)
        },
        give_up,
        |_, report| {
            observer.progress(report.step, &format!("loss {:.3}", report.loss));
            Ok(Stop::No)
        },
    )?;
    observer.end();
    let model = state.model.valid();
    let places: Vec<usize> = (0..held_out.len()).collect();
    let mut values = Vec::with_capacity(held_out.len() * classes);
    for places in places.chunks(BATCH) {
        let scores = model.forward(whitened(held_out, places)?, held_out.grid);
        values.extend(crate::nn::values(scores));
    }
    Ok(Scores { values, classes })
}
