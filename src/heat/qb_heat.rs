//! The pre-training model.

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::quarter::GroupSizes;
use super::{
    Corner, Decoder, DecoderConfig, Nearest, Parametrisation, Propagator, Quadrant, assemble,
    normalised_patches, patch_statistics, patches, sort_by_quadrant, unpatch, visible_quarters,
    weights,
};
use qbheat_kernels::weighted_squared_error;

use crate::encoder::{Build, Encoder};
use crate::nn::{Init, LayerNorm};

/// Where the visible block may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// In one of the four corners, as in the paper: blocks predict their neighbours.
    Corner,
    /// Anywhere on the grid of patches: positions are predicted from the nearest visible one.
    Anywhere,
}

/// The visible block of each image of a batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Visible {
    /// One quadrant an image.
    Quadrants(Vec<Quadrant>),
    /// One block of half the height and half the width an image.
    Blocks(Vec<Corner>),
}

impl Visible {
    /// The block of each image, on a map of `[rows, columns]` positions.
    pub fn corners(&self, [rows, columns]: [usize; 2]) -> Vec<Corner> {
        match self {
            Self::Quadrants(quadrants) => quadrants
                .iter()
                .map(|quadrant| {
                    let (lower, right) = quadrant.cell();
                    Corner {
                        row: lower * rows / 2,
                        column: right * columns / 2,
                    }
                })
                .collect(),
            Self::Blocks(corners) => corners.clone(),
        }
    }
}

/// What the paper leaves open, with our choices as defaults: those that did best in `docs/results/recipe.md`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QbHeatConfig {
    /// Where the visible block may lie.
    pub visible: Place,
    /// How a step from block to block is written.
    pub propagator: Parametrisation,
    /// Layer norm over the channels of each position before the first step.
    pub feature_norm: bool,
    /// Targets normalised by each patch's own mean and deviation, or plain pixels.
    pub normalise_patches: bool,
    /// Weight of the visible quarter in the loss, where the three masked ones have 1; 0 leaves it out.
    pub visible_weight: f32,
    /// The decoder's size.
    pub decoder: DecoderConfig,
}

impl Default for QbHeatConfig {
    fn default() -> Self {
        Self {
            visible: Place::Corner,
            propagator: Parametrisation::Signed,
            feature_norm: false,
            normalise_patches: true,
            visible_weight: 1.0,
            decoder: DecoderConfig::default(),
        }
    }
}

/// Encoder, propagator and decoder; after pre-training only the encoder is kept.
#[derive(Module, Debug)]
pub struct QbHeat {
    /// Sees the visible quarter only.
    pub encoder: Encoder,
    /// Over the features that the propagator steps from.
    pub feature_norm: Option<LayerNorm>,
    /// Predicts the features of the masked quarters.
    pub propagator: Propagator,
    /// Turns the features of all four quarters into pixels.
    pub decoder: Decoder,
    patch: usize,
    normalise_patches: bool,
    visible_weight: f32,
    #[module(skip)]
    place: Place,
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
            feature_norm: config.feature_norm.then(|| init.layer_norm(channels)),
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
            place: config.visible,
        }
    }

    /// Where the visible block may lie.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Image pixels a position of the feature map.
    pub fn patch(&self) -> usize {
        self.patch
    }

    /// The loss of a batch: images `[N, colours, H, W]`, normalised, H and W multiples of twice the stride, and the visible
    /// block of each.
    pub fn loss(&self, images: Tensor<4>, visible: &Visible) -> Tensor<1> {
        let batch = Arranged::new(images, visible, self.patch);
        let predicted = self.predict(&batch);
        let (target, weights) = self.target(batch);
        weighted_squared_error(predicted, target, weights)
    }

    /// The loss of the trivial predictor on a batch. With normalised targets that is the best constant patch,
    /// `average` (`[patch·patch·colours]`); without, the mean colour of each image's visible block.
    pub fn trivial_loss(
        &self,
        images: Tensor<4>,
        visible: &Visible,
        average: Tensor<1>,
    ) -> Tensor<1> {
        let batch = Arranged::new(images, visible, self.patch);
        let [n, colours, ..] = batch.images.dims();
        let guess = if self.normalise_patches {
            average.reshape([1, 1, -1])
        } else {
            batch
                .visible
                .clone()
                .mean_dim(3)
                .mean_dim(2)
                .reshape([n, 1, colours])
                .repeat(&[1, 1, self.patch * self.patch])
        };
        let (target, weights) = self.target(batch);
        let guess = guess.expand(target.dims());
        weighted_squared_error(guess, target, weights)
    }

    /// The mean target patch of a batch, `[patch·patch·colours]`.
    pub fn average_patch(&self, images: Tensor<4>) -> Tensor<1> {
        let targets = self.targets(images);
        let values = targets.dims()[2];
        targets.mean_dim(1).mean_dim(0).reshape([values])
    }

    /// What the model makes of the masked patches.
    pub fn reconstruct(&self, images: Tensor<4>, visible: &Visible) -> Reconstruction {
        let batch = Arranged::new(images, visible, self.patch);
        let mut predicted = self.predict(&batch);
        let original = patches(batch.images.clone(), self.patch);
        if self.normalise_patches {
            let (mean, deviation) = patch_statistics(&original);
            predicted = predicted * deviation + mean;
        }
        let seen = batch.weights(0.0).neg() + 1.0;
        let mut places = vec![0; batch.order.len()];
        for (sorted, &place) in batch.order.iter().enumerate() {
            places[place] = sorted as i32;
        }
        let count = places.len();
        let device = original.device();
        let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
        let restore =
            |patches: Tensor<3>| unpatch(patches, self.patch, batch.grid).select(0, places.clone());
        Reconstruction {
            predicted: restore(predicted),
            visible: restore(original * seen.unsqueeze_dim(2)),
        }
    }

    /// Patches of whole images, `[N, T, patch·patch·colours]`.
    fn predict(&self, batch: &Arranged) -> Tensor<3> {
        let z = see(&self.encoder, &self.feature_norm, batch);
        let map = batch.complete(z, &self.propagator);
        self.decoder.forward(map, batch.grid)
    }

    fn target(&self, batch: Arranged) -> (Tensor<3>, Tensor<2>) {
        let weights = batch.weights(self.visible_weight);
        (self.targets(batch.images), weights)
    }

    fn targets(&self, images: Tensor<4>) -> Tensor<3> {
        if self.normalise_patches {
            normalised_patches(images, self.patch)
        } else {
            patches(images, self.patch)
        }
    }
}

/// The encoder's features of the visible blocks, `[N, h, w, C]`, normalised where there is a norm.
pub(crate) fn see(encoder: &Encoder, norm: &Option<LayerNorm>, batch: &Arranged) -> Tensor<4> {
    let z = encoder.channels_last(batch.visible.clone());
    match norm {
        Some(norm) => norm.forward(z),
        None => z,
    }
}

/// A batch and what is visible of it.
pub(crate) struct Arranged {
    /// `[N, C, H, W]`.
    pub images: Tensor<4>,
    /// `[N, C, H/2, W/2]`.
    visible: Tensor<4>,
    /// Where the visible block of each image starts.
    corners: Vec<Corner>,
    /// How many images show each quadrant, where the blocks are quadrants.
    quadrants: Option<GroupSizes>,
    /// For each place the place it came from.
    order: Vec<usize>,
    /// Rows and columns of the whole map.
    grid: [usize; 2],
}

impl Arranged {
    /// Cuts out what is visible; images with the same visible quadrant stand together.
    pub fn new(images: Tensor<4>, visible: &Visible, patch: usize) -> Self {
        let [n, _, height, width] = images.dims();
        let grid = [height / patch, width / patch];
        let corners = visible.corners(grid);
        match visible {
            Visible::Quadrants(quadrants) => {
                let (images, sizes, order) = sort_by_quadrant(images, quadrants);
                Self {
                    visible: visible_quarters(&images, &sizes),
                    corners: order.iter().map(|&place| corners[place]).collect(),
                    quadrants: Some(sizes),
                    images,
                    order,
                    grid,
                }
            }
            Visible::Blocks(_) => Self {
                visible: visible_blocks(&images, &corners, patch),
                corners,
                quadrants: None,
                images,
                order: (0..n).collect(),
                grid,
            },
        }
    }

    /// Features of whole images, `[N, T, C]`, from those of the visible blocks, `[N, h, w, C]`.
    pub fn complete(&self, z: Tensor<4>, propagator: &Propagator) -> Tensor<3> {
        let [n, h, w, c] = z.dims();
        let z = z.reshape([n, h * w, c]);
        match &self.quadrants {
            Some(sizes) => assemble(propagator.propagate(z, sizes), sizes, [h, w]),
            None => {
                let nearest = Nearest::new(&self.corners, [h, w], &z.device());
                propagator.spread(nearest.gather(z), &nearest, [h, w])
            }
        }
    }

    /// The weight of each position in the loss, `[N, T]`: 1 on masked ones, `visible_weight` on visible ones.
    pub fn weights(&self, visible_weight: f32) -> Tensor<2> {
        let device = self.images.device();
        weights(&self.corners, self.grid, visible_weight, &device)
    }
}

/// Cuts out of each image its visible block of half its height and width.
fn visible_blocks(images: &Tensor<4>, corners: &[Corner], patch: usize) -> Tensor<4> {
    let [_, channels, height, width] = images.dims();
    let blocks = corners.iter().enumerate().map(|(i, corner)| {
        let (top, left) = (corner.row * patch, corner.column * patch);
        images.clone().slice([
            i..i + 1,
            0..channels,
            top..top + height / 2,
            left..left + width / 2,
        ])
    });
    Tensor::cat(blocks.collect(), 0)
}
