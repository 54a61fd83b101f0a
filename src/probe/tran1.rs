//! The tran-1 probe: one transformer block over the positions of a frozen feature map.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Features, ProbeConfig, Scores, Whitening, begin, stratified_places};
use crate::error::Result;
use crate::nn::{Init, LayerNorm, Linear, TransformerBlock, cross_entropy, sin_cos_2d};
use crate::observe::Observer;
use crate::random::{self, Purpose};
use crate::train::{Stop, give_up, settled, train};

const HEADS: usize = 4;
const BATCH: usize = 128;
/// Lengths in epochs among which a search chooses, and how many images it looks at.
const LENGTHS: [usize; 3] = [4, 8, 16];
const SEARCHED: usize = 5000;
const HELD_OUT: f64 = 0.2;
/// Steps that count as an epoch where there are fewer batches.
const LEAST_STEPS: usize = 10;

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

/// Scores of `held_out` by a block trained on the images of `features` at `places`, with their labels and the number of
/// classes; all whitened. Beside them, the epochs that it was trained for: `config.epochs`, or with `config.search` the
/// length that does best on a stratified fifth of the training images (of at most [`SEARCHED`]) after fitting on the
/// others.
pub fn tran1_scores(
    (features, places): (&Features, &[usize]),
    (labels, classes): (&[u32], usize),
    held_out: &Features,
    whitening: &Whitening,
    config: &ProbeConfig,
    observer: &dyn Observer,
) -> Result<(Scores, usize)> {
    let block = Block {
        features,
        classes,
        whitening,
        seed: config.seed,
        observer,
    };
    let training: Vec<(usize, u32)> = places.iter().copied().zip(labels.iter().copied()).collect();
    let epochs = if config.search {
        block.best_length(&training)?
    } else {
        config.epochs
    };
    let model = block.fit(&training, epochs)?;
    let all: Vec<usize> = (0..held_out.len()).collect();
    Ok((block.scores(&model, held_out, &all)?, epochs))
}

/// What the fits of a probe share.
struct Block<'a> {
    features: &'a Features<'a>,
    classes: usize,
    whitening: &'a Whitening,
    seed: u64,
    observer: &'a dyn Observer,
}

impl Block<'_> {
    fn best_length(&self, training: &[(usize, u32)]) -> Result<usize> {
        let labels: Vec<u32> = training.iter().map(|&(_, label)| label).collect();
        let share = (SEARCHED as f64 / training.len() as f64).min(1.0);
        let (_, looked_at) = stratified_places(&labels, share, self.seed);
        let looked_at: Vec<(usize, u32)> = looked_at.iter().map(|&i| training[i]).collect();
        let labels: Vec<u32> = looked_at.iter().map(|&(_, label)| label).collect();
        let (fit, check) = stratified_places(&labels, HELD_OUT, self.seed);
        let fit: Vec<(usize, u32)> = fit.iter().map(|&i| looked_at[i]).collect();
        let (places, labels): (Vec<usize>, Vec<u32>) = check.iter().map(|&i| looked_at[i]).unzip();
        // Without an image to check by, none is chosen: the middle one.
        let mut best = (f64::NEG_INFINITY, LENGTHS[LENGTHS.len() / 2]);
        for epochs in LENGTHS.into_iter().filter(|_| !labels.is_empty()) {
            let model = self.fit(&fit, epochs)?;
            let score = self.scores(&model, self.features, &places)?.top(1, &labels);
            if score > best.0 {
                best = (score, epochs);
            }
        }
        Ok(best.1)
    }

    /// Trains a block on the images at these places, which have these labels. Few images are seen more often, so that
    /// there are steps enough.
    fn fit(&self, training: &[(usize, u32)], epochs: usize) -> Result<Tran1> {
        let device = crate::device().autodiff();
        let channels = self.features.pooled.columns;
        let batch = BATCH.min(training.len());
        let per_pass = training.len() / batch;
        let total_steps = (epochs * per_pass.max(LEAST_STEPS)) as u64;
        let model = Tran1::new(channels, self.classes, &mut Init::new(self.seed, &device));
        let (state, rate) = begin(model, per_pass, total_steps);
        let mut order = Vec::new();
        let mut step = 0;
        self.observer
            .begin("training the tran-1 probe", total_steps);
        let state = train(
            state,
            &rate,
            || {
                if step % per_pass == 0 {
                    let pass = (step / per_pass) as u64;
                    order = random::permutation(self.seed, Purpose::Order, pass, training.len());
                }
                let start = (step % per_pass) * batch;
                step += 1;
                let (places, labels): (Vec<usize>, Vec<u32>) = order[start..start + batch]
                    .iter()
                    .map(|&i| training[i])
                    .unzip();
                let maps = self.whitened(self.features, &places)?;
                Ok((Tensor::from_inner(maps), labels))
            },
            |model: &Tran1, (maps, labels): (Tensor<3>, Vec<u32>)| {
                cross_entropy(model.forward(maps, self.features.grid), &labels, 0.0)
            },
            settled,
            give_up,
            |_, report| {
                let detail = format!("loss {:.3}", report.loss);
                self.observer.progress(report.step, &detail);
                Ok(Stop::No)
            },
        )?;
        self.observer.end();
        Ok(state.model.valid())
    }

    fn scores(&self, model: &Tran1, features: &Features, places: &[usize]) -> Result<Scores> {
        let mut values = Vec::with_capacity(places.len() * self.classes);
        for places in places.chunks(BATCH) {
            let scores = model.forward(self.whitened(features, places)?, features.grid);
            values.extend(crate::nn::values(scores));
        }
        Ok(Scores {
            values,
            classes: self.classes,
        })
    }

    fn whitened(&self, features: &Features, places: &[usize]) -> Result<Tensor<3>> {
        let maps = features.maps(places)?;
        let [n, t, c] = maps.dims();
        let rows = maps.reshape([n * t, c]);
        Ok(self.whitening.apply(rows).reshape([n, t, c]))
    }
}
