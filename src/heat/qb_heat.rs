//! The pre-training model.

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::quarter::{GroupSizes, groups};
use super::{
    Decoder, DecoderConfig, Parametrisation, Propagator, Quadrant, assemble, normalise_patches,
    patch_statistics, patches, sort_by_quadrant, unpatch, visible_quarters,
    weighted_mean_squared_error, weights,
};
use crate::encoder::{Build, Encoder};
use crate::nn::Init;

/// What the paper leaves open, with our choices as defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QbHeatConfig {
    /// How a step from block to block is written.
    pub propagator: Parametrisation,
    /// Targets normalised by each patch's own mean and deviation, or plain pixels.
    pub normalise_patches: bool,
    /// Weight of the visible quarter in the loss; the three masked ones have 1.
    pub visible_weight: f32,
    /// The decoder's size.
    pub decoder: DecoderConfig,
}

impl Default for QbHeatConfig {
    fn default() -> Self {
        Self {
            propagator: Parametrisation::Signed,
            normalise_patches: true,
            visible_weight: 0.0,
            decoder: DecoderConfig::default(),
        }
    }
}

/// Encoder, propagator and decoder; after pre-training only the encoder is kept.
#[derive(Module, Debug)]
pub struct QbHeat {
    /// Sees the visible quarter only.
    pub encoder: Encoder,
    /// Predicts the features of the masked quarters.
    pub propagator: Propagator,
    /// Turns the features of all four quarters into pixels.
    pub decoder: Decoder,
    patch: usize,
    normalise_patches: bool,
    visible_weight: f32,
}

/// Images as the model sees and completes them, each `[N, 3, H, W]`, in the order they were given.
pub struct Reconstruction {
    /// Prediction of all four quarters. With normalised targets it is scaled back by mean and deviation of each TRUE
    /// patch, which no model could know.
    pub predicted: Tensor<4>,
    /// The part that the encoder saw; 0 elsewhere.
    pub visible: Tensor<4>,
}

impl QbHeat {
    /// Fresh propagator and decoder around an encoder that was built so.
    pub fn new(config: &QbHeatConfig, encoder: Encoder, build: Build, init: &mut Init) -> Self {
        let channels = encoder.channels();
        Self {
            encoder,
            propagator: Propagator::new(channels, config.propagator, init),
            decoder: Decoder::new(
                &config.decoder,
                channels,
                build.inputs * build.stride * build.stride,
                init,
            ),
            patch: build.stride,
            normalise_patches: config.normalise_patches,
            visible_weight: config.visible_weight,
        }
    }

    /// The loss of a batch: images `[N, 3, H, W]`, normalised, H and W multiples of twice the stride, and one visible
    /// quadrant an image.
    pub fn loss(&self, images: Tensor<4>, visible: &[Quadrant]) -> Tensor<1> {
        let (images, sizes, _) = sort_by_quadrant(images, visible);
        let predicted = self.predict(visible_quarters(&images, &sizes), &sizes);
        let (target, weights) = self.target(images, &sizes);
        weighted_mean_squared_error(predicted, target, weights)
    }

    /// The loss of the trivial predictor on a batch. With normalised targets that is the best constant patch,
    /// `average` (`[patch·patch·3]`); without, the mean colour of each image's visible quarter.
    pub fn trivial_loss(
        &self,
        images: Tensor<4>,
        visible: &[Quadrant],
        average: Tensor<1>,
    ) -> Tensor<1> {
        let (images, sizes, _) = sort_by_quadrant(images, visible);
        let [n, colours, ..] = images.dims();
        let guess = if self.normalise_patches {
            average.reshape([1, 1, -1])
        } else {
            visible_quarters(&images, &sizes)
                .mean_dim(3)
                .mean_dim(2)
                .reshape([n, 1, colours])
                .repeat(&[1, 1, self.patch * self.patch])
        };
        let (target, weights) = self.target(images, &sizes);
        let guess = guess.expand(target.dims());
        weighted_mean_squared_error(guess, target, weights)
    }

    /// The mean target patch of a batch, `[patch·patch·3]`.
    pub fn average_patch(&self, images: Tensor<4>) -> Tensor<1> {
        let targets = self.targets(images);
        let values = targets.dims()[2];
        targets.mean_dim(1).mean_dim(0).reshape([values])
    }

    /// What the model makes of the masked quarters.
    pub fn reconstruct(&self, images: Tensor<4>, visible: &[Quadrant]) -> Reconstruction {
        let [_, _, height, width] = images.dims();
        let grid = [height / self.patch, width / self.patch];
        let (images, sizes, order) = sort_by_quadrant(images, visible);
        let mut predicted = self.predict(visible_quarters(&images, &sizes), &sizes);
        let original = patches(images, self.patch);
        if self.normalise_patches {
            let (mean, deviation) = patch_statistics(&original);
            predicted = predicted * deviation + mean;
        }
        let seen = self.weights(&sizes, grid, 0.0, &original).neg() + 1.0;
        let restore = |patches: Tensor<3>| {
            let images = unpatch(patches, self.patch, grid);
            let mut back: Vec<Tensor<4>> = Vec::with_capacity(order.len());
            for place in 0..order.len() {
                let sorted = order
                    .iter()
                    .position(|&from| from == place)
                    .unwrap_or(place);
                back.push(images.clone().slice_dim(0, sorted..sorted + 1));
            }
            Tensor::cat(back, 0)
        };
        Reconstruction {
            predicted: restore(predicted),
            visible: restore(original * seen.unsqueeze_dim(2)),
        }
    }

    /// Visible quarters `[N, 3, H/2, W/2]`, sorted, to patches of whole images `[N, T, patch·patch·3]`.
    fn predict(&self, quarters: Tensor<4>, sizes: &GroupSizes) -> Tensor<3> {
        let z = self.encoder.forward(quarters);
        let [n, c, h, w] = z.dims();
        let z = z.reshape([n, c, h * w]).swap_dims(1, 2);
        let maps = groups(sizes).map(|(visible, range)| {
            let quarters = self
                .propagator
                .propagate(z.clone().slice_dim(0, range), visible);
            assemble(quarters, visible, [h, w])
        });
        self.decoder
            .forward(Tensor::cat(maps.collect(), 0), [2 * h, 2 * w])
    }

    fn target(&self, images: Tensor<4>, sizes: &GroupSizes) -> (Tensor<3>, Tensor<2>) {
        let [_, _, height, width] = images.dims();
        let grid = [height / self.patch, width / self.patch];
        let target = self.targets(images);
        let weights = self.weights(sizes, grid, self.visible_weight, &target);
        (target, weights)
    }

    fn targets(&self, images: Tensor<4>) -> Tensor<3> {
        let patches = patches(images, self.patch);
        if self.normalise_patches {
            normalise_patches(patches)
        } else {
            patches
        }
    }

    fn weights(
        &self,
        sizes: &GroupSizes,
        [rows, columns]: [usize; 2],
        visible_weight: f32,
        like: &Tensor<3>,
    ) -> Tensor<2> {
        weights(
            sizes,
            [rows / 2, columns / 2],
            visible_weight,
            &like.device(),
        )
    }
}
