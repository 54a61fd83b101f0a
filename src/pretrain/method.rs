//! The pre-training methods by name, and what the training loop needs to know of one.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;

use crate::baseline::{MoCo, Supervised};
use crate::config::{Config, Method};
use crate::data::Batch;
use crate::encoder::{self, Build, Encoder};
use crate::error::Result;
use crate::heat::{Corner, Place, QbHeat, Quadrant, Reconstruction, Visible};
use crate::latent::{Latent, Target};
use crate::nn::Init;
use crate::random::{self, Purpose};

/// A network that pre-trains an encoder: what the training loop needs to know of a method.
pub trait PretrainModel: Module {
    /// Augmented views of each image that a batch has.
    const VIEWS: usize = 1;
    /// Whether it learns from labels.
    const LABELLED: bool = false;
    /// What has the trivial loss, in words.
    const TRIVIAL: &'static str;
    /// TOML: where its defaults differ from those of [`Config`].
    const PRESET: &'static str;

    /// Loss of a batch on `device`, `[1]`.
    fn loss(&self, batch: &Images, seed: u64) -> Tensor<1>;
    /// The encoder inside.
    fn encoder(&self) -> &Encoder;
    /// The same network around another encoder of the same shape.
    fn with_encoder(self, encoder: Encoder) -> Self;
    /// The loss that needs no learning, estimated on some batches.
    fn trivial_loss(&self, batches: &[Images], seed: u64) -> f64;
    /// Figures of its own to log once an epoch.
    fn metrics(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
    /// Moves what follows the trained weights, after each update of them.
    fn follow(self) -> Self {
        self
    }
    /// What it makes of images that it sees a part of, and that part; none where it sees all.
    fn reconstruct(&self, _batch: &Images, _seed: u64) -> Option<(Visible, Reconstruction)> {
        None
    }
}

/// A batch on the device.
pub struct Images {
    /// `[views·N, channels, H, W]`, normalised: the first views of all images, then the second ones, ….
    pub pixels: Tensor<4>,
    /// Numbers of the images in the data set.
    pub indices: Vec<usize>,
    /// Their classes, where all of them have one.
    pub labels: Vec<u32>,
    /// The epoch it belongs to.
    pub epoch: u64,
}

impl Images {
    /// Puts a batch on `device`.
    pub fn new(batch: Batch, device: &Device) -> Self {
        let labels: Option<Vec<u32>> = batch.labels.into_iter().collect();
        Self {
            pixels: Tensor::from_data(TensorData::new(batch.pixels, batch.shape), device),
            indices: batch.indices,
            labels: labels.unwrap_or_default(),
            epoch: batch.epoch,
        }
    }

    /// The visible block of each image, on maps of one position a `patch`: a pure function of seed, epoch and image.
    pub fn visible(&self, place: Place, patch: usize, seed: u64) -> Visible {
        let [_, _, height, width] = self.pixels.dims();
        let streams = self
            .indices
            .iter()
            .map(|&index| random::stream(seed, Purpose::Quadrant, self.epoch, index as u64));
        match place {
            Place::Corner => Visible::Quadrants(
                streams
                    .map(|mut random| Quadrant::ALL[random.random_range(0..4)])
                    .collect(),
            ),
            Place::Anywhere => Visible::Blocks(
                streams
                    .map(|mut random| Corner {
                        row: random.random_range(0..=height / patch / 2),
                        column: random.random_range(0..=width / patch / 2),
                    })
                    .collect(),
            ),
        }
    }
}

impl PretrainModel for QbHeat {
    const TRIVIAL: &'static str = "a guess without learning";
    const PRESET: &'static str = "";

    fn loss(&self, batch: &Images, seed: u64) -> Tensor<1> {
        let visible = batch.visible(self.place(), self.patch(), seed);
        self.loss(batch.pixels.clone(), &visible)
    }

    fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    fn with_encoder(mut self, encoder: Encoder) -> Self {
        self.encoder = encoder;
        self
    }

    fn trivial_loss(&self, batches: &[Images], seed: u64) -> f64 {
        let share = 1.0 / batches.len() as f32;
        let average = batches
            .iter()
            .map(|batch| self.average_patch(batch.pixels.clone()) * share)
            .reduce(|sum, patch| sum + patch)
            .expect("there is at least one batch");
        let losses = batches.iter().map(|batch| {
            let visible = batch.visible(self.place(), self.patch(), seed);
            let loss = self.trivial_loss(batch.pixels.clone(), &visible, average.clone());
            f64::from(loss.into_scalar::<f32>())
        });
        losses.sum::<f64>() * f64::from(share)
    }

    fn metrics(&self) -> Vec<(&'static str, f64)> {
        vec![("commutator", self.propagator.commutator())]
    }

    fn reconstruct(&self, batch: &Images, seed: u64) -> Option<(Visible, Reconstruction)> {
        let visible = batch.visible(self.place(), self.patch(), seed);
        let made = self.reconstruct(batch.pixels.clone(), &visible);
        Some((visible, made))
    }
}

/// What is known of a method before there is a network.
#[derive(Clone, Copy)]
pub(crate) struct Traits {
    pub views: usize,
    pub labelled: bool,
    pub trivial: &'static str,
    /// TOML.
    pub preset: &'static str,
}

impl Traits {
    const fn of<M: PretrainModel>() -> Self {
        Self {
            views: M::VIEWS,
            labelled: M::LABELLED,
            trivial: M::TRIVIAL,
            preset: M::PRESET,
        }
    }
}

/// The traits of a method.
pub(crate) fn traits(method: Method, target: Target) -> Traits {
    match (method, target) {
        (Method::QbHeat, Target::Pixels) => Traits::of::<QbHeat>(),
        (Method::QbHeat, Target::Latent) => Traits::of::<Latent>(),
        (Method::MocoV2, _) => Traits::of::<MoCo>(),
        (Method::Supervised, _) => Traits::of::<Supervised>(),
    }
}

/// Something to be done with the network of whichever method a configuration names.
pub(crate) trait WithModel {
    /// What comes of it.
    type Output;

    /// Does it.
    fn with<M: PretrainModel>(self, model: M) -> Result<Self::Output>;
}

/// Gives `work` a network with fresh weights of the configuration's method. Methods are picked by name here and in
/// [`traits`] only.
pub(crate) fn with_model<W: WithModel>(
    config: &Config,
    device: &Device,
    work: W,
) -> Result<W::Output> {
    let (encoder, build, mut init) = fresh_encoder(config, device)?;
    match (config.method, config.objective.target) {
        (Method::QbHeat, Target::Pixels) => {
            work.with(QbHeat::new(&config.qb_heat, encoder, build, &mut init))
        }
        (Method::QbHeat, Target::Latent) => work.with(Latent::new(
            &config.qb_heat,
            &config.objective,
            encoder,
            build,
            &mut init,
        )),
        (Method::MocoV2, _) => work.with(MoCo::new(&config.moco, encoder, &mut init)),
        (Method::Supervised, _) => {
            work.with(Supervised::new(&config.supervised, encoder, &mut init))
        }
    }
}

/// A QB-Heat network with fresh weights.
pub fn qb_heat(config: &Config, device: &Device) -> Result<QbHeat> {
    let (encoder, build, mut init) = fresh_encoder(config, device)?;
    Ok(QbHeat::new(&config.qb_heat, encoder, build, &mut init))
}

/// The encoder with fresh weights, how it was built, and where further layers get theirs from.
fn fresh_encoder(config: &Config, device: &Device) -> Result<(Encoder, Build, Init)> {
    let mut init = Init::new(config.seed, device);
    let build = Build {
        stride: config.encoder.stride,
        inputs: config.data.channels,
    };
    let encoder = encoder::find(&config.encoder.name)?.build(build, &mut init)?;
    Ok((encoder, build, init))
}
