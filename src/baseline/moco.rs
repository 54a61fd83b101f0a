//! MoCo-v2: "Momentum Contrast for Unsupervised Visual Representation Learning" (He et al., arXiv 1911.05722) with the
//! projection and the augmentation of "Improved Baselines with Momentum Contrastive Learning" (Chen et
//! al., arXiv 2003.04297).

use std::ops::Range;

use burn::module::{Module, RunningState};
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::encoder::Encoder;
use crate::error::Result;
use crate::nn::{Init, Linear, cross_entropy, follow, rows_at, teacher_of};
use crate::pretrain::{Images, PretrainModel};
use crate::random::{self, Purpose};

/// PyTorch's, in `normalize`.
const EPSILON: f32 = 1e-12;

/// MoCo-v2's choices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoCoConfig {
    /// Keys of earlier batches that serve as negatives.
    pub queue: usize,
    /// What similarities are divided by; 0.2 in the paper, and less did better in `docs/results/recipe.md`.
    pub temperature: f64,
    /// Share of its weights that the key encoder keeps in each step.
    pub momentum: f64,
    /// Length of queries and keys.
    pub dim: usize,
    /// Parts of a batch that are normalised by statistics of their own, keys after shuffling; 1 for none.
    pub sub_batches: usize,
}

impl Default for MoCoConfig {
    fn default() -> Self {
        Self {
            queue: 8192,
            temperature: 0.1,
            momentum: 0.996,
            dim: 128,
            sub_batches: 4,
        }
    }
}

impl MoCoConfig {
    /// Whether every value is usable with batches of this size.
    pub(crate) fn check(&self, batch_size: usize) -> Result<()> {
        require(self.queue > 0, "moco.queue", self.queue, "at least 1")?;
        require(
            self.temperature.is_finite() && self.temperature > 0.0,
            "moco.temperature",
            self.temperature,
            "a number above 0",
        )?;
        require(
            (0.0..=1.0).contains(&self.momentum),
            "moco.momentum",
            self.momentum,
            "a share from 0 to 1",
        )?;
        require(self.dim > 0, "moco.dim", self.dim, "at least 1")?;
        require(
            self.sub_batches > 0 && batch_size >= 2 * self.sub_batches,
            "moco.sub_batches",
            self.sub_batches,
            &format!(
                "from 1 to half of optim.batch_size = {batch_size}: batch normalisation needs two images"
            ),
        )
    }
}

/// An encoder, mean pooling and a two-layer projection: image to a vector of length 1.
#[derive(Module, Debug)]
struct Branch {
    encoder: Encoder,
    hidden: Linear,
    projection: Linear,
}

impl Branch {
    /// `[N, C, H, W]` to `[N, dim]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let hidden = relu(self.hidden.forward(self.encoder.pooled(images)));
        unit(self.projection.forward(hidden))
    }
}

/// Rows divided by their lengths.
fn unit(rows: Tensor<2>) -> Tensor<2> {
    let lengths = (rows.clone() * rows.clone()).sum_dim(1).sqrt();
    rows / lengths.clamp_min(EPSILON)
}

/// Query encoder, key encoder and queue.
#[derive(Module, Debug)]
pub struct MoCo {
    query: Branch,
    /// An average of the query branch over time.
    key: Branch,
    /// Keys, `[queue, dim]`, the newest first. A running state: a step that comes to nothing leaves it as it was.
    running_queue: RunningState<Tensor<2>>,
    temperature: f64,
    momentum: f64,
    sub_batches: usize,
}

impl MoCo {
    /// A fresh projection, a key branch like the query branch, and a queue of random directions.
    pub fn new(config: &MoCoConfig, encoder: Encoder, init: &mut Init) -> Self {
        let channels = encoder.channels();
        let query = Branch {
            encoder,
            hidden: init.linear(channels, channels),
            projection: init.linear(channels, config.dim),
        };
        let queue = init.normal([config.queue, config.dim], 1.0);
        Self {
            key: teacher_of(&query),
            query,
            running_queue: RunningState::new(unit(queue.val().detach())),
            temperature: config.temperature,
            momentum: config.momentum,
            sub_batches: config.sub_batches,
        }
    }

    /// The keys in the queue, `[queue, dim]`, the newest first.
    pub fn queue(&self) -> Tensor<2> {
        self.running_queue.value()
    }

    /// InfoNCE (arXiv 1911.05722, equation 1), averaged, `[1]`: the key of the same image against the queue. The keys
    /// then enter the queue.
    ///
    /// `views`: `[2·N, C, H, W]`, the queries' views, then the keys'. `order`: the places of the keys' images in the
    /// order in which they are cut into sub-batches.
    pub fn info_nce(&self, views: Tensor<4>, order: &[usize]) -> Tensor<1> {
        let n = order.len();
        let queries = self.queries(views.clone().slice_dim(0, 0..n));
        let keys = self.keys(views.slice_dim(0, n..2 * n), order);
        let queue = self.running_queue.value();
        let positive = (queries.clone() * keys.clone()).sum_dim(1);
        let negative = queries.matmul(queue.clone().transpose());
        let logits = Tensor::cat(vec![positive, negative], 1) / self.temperature;
        // The first of each row is the own key.
        let loss = cross_entropy(logits, &vec![0; n], 0.0);
        let [kept, _] = queue.dims();
        let newest = Tensor::cat(vec![keys, queue], 0).slice_dim(0, 0..kept);
        self.running_queue.update(newest);
        self.running_queue.value_sync();
        loss
    }

    /// Queries of images, `[N, dim]`, each sub-batch normalised by its own statistics.
    pub fn queries(&self, images: Tensor<4>) -> Tensor<2> {
        let [n, ..] = images.dims();
        let parts = self
            .parts(n)
            .map(|part| self.query.forward(images.clone().slice_dim(0, part)));
        Tensor::cat(parts.collect(), 0)
    }

    /// The bounds of the sub-batches of `n` images.
    fn parts(&self, n: usize) -> impl Iterator<Item = Range<usize>> {
        let parts = self.sub_batches;
        (0..parts).map(move |part| part * n / parts..(part + 1) * n / parts)
    }

    /// Keys of images, `[N, dim]`, in the images' order. Each sub-batch of the images in `order` is normalised by its own
    /// statistics, as each of the queries in their own order is: a query and its key then do not share theirs
    /// (arXiv 1911.05722, "Shuffling BN").
    pub fn keys(&self, images: Tensor<4>, order: &[usize]) -> Tensor<2> {
        let mut back = vec![0; order.len()];
        for (shuffled, &place) in order.iter().enumerate() {
            back[place] = shuffled;
        }
        let parts = self
            .parts(order.len())
            .map(|part| self.key.forward(rows_at(images.clone(), &order[part])));
        rows_at(Tensor::cat(parts.collect(), 0), &back).detach()
    }
}

impl PretrainModel for MoCo {
    const VIEWS: usize = 2;
    const TRIVIAL: &'static str = "all keys alike";
    const PRESET: &'static str = "
        [data]
        crop_scale = [0.2, 1.0]
        jitter = [0.4, 0.4, 0.4, 0.1]
        jitter_share = 0.8
        grey = 0.2
        blur = 0.5
    ";

    fn loss(&self, batch: &Images, seed: u64) -> Tensor<1> {
        let first = batch.indices.first().map_or(0, |&index| index as u64);
        let mut stream = random::stream(seed, Purpose::Shuffle, batch.epoch, first);
        let order = random::shuffled(batch.indices.len(), &mut stream);
        self.info_nce(batch.pixels.clone(), &order)
    }

    fn encoder(&self) -> &Encoder {
        &self.query.encoder
    }

    fn with_encoder(mut self, encoder: Encoder) -> Self {
        self.key.encoder = teacher_of(&encoder);
        self.query.encoder = encoder;
        self
    }

    /// All keys alike.
    fn trivial_loss(&self, _batches: &[Images], _seed: u64) -> f64 {
        let [queue, _] = self.queue().dims();
        (1.0 + queue as f64).ln()
    }

    fn follow(mut self) -> Self {
        self.key = follow(self.key, &self.query, self.momentum);
        self
    }
}
