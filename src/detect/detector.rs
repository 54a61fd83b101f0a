//! A detector: an encoder, frozen unless it is asked to learn too, the whitening of its features, and the head.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

use super::average_precision::Prediction;
use super::denoising::Noised;
use super::detections::{Detection, detections, suppress};
use super::head::{DetectionHead, Group, HeadConfig, Level};
use super::loader::DetectionBatch;
use super::view::Placement;
use crate::encoder::Encoder;
use crate::error::Result;
use crate::nn::{Init, use_batch_statistics};
use crate::probe::{Moments, Whitening};

/// Encoder, whitening and head.
#[derive(Module, Debug)]
pub struct Detector {
    /// Turns pictures into a map; its batch normalisations use their running statistics.
    encoder: Encoder,
    whitening: FixedWhitening,
    head: DetectionHead,
}

/// [`Whitening`] as a part of a network that does not learn.
#[derive(Module, Debug)]
struct FixedWhitening {
    /// `[1, C]`.
    mean: Param<Tensor<2>>,
    /// `[C, C]`.
    matrix: Param<Tensor<2>>,
}

impl FixedWhitening {
    fn of([mean, matrix]: [Tensor<2>; 2]) -> Self {
        let [mean, matrix] =
            [mean, matrix].map(|tensor| Param::initialized(ParamId::new(), tensor));
        Self { mean, matrix }.no_grad()
    }

    /// `[N, h, w, C]`, as it was computed.
    fn forward(&self, map: Tensor<4>) -> Tensor<4> {
        let [n, h, w, c] = map.dims();
        let recorded = map.is_autodiff();
        let [mean, matrix] = [&self.mean, &self.matrix].map(|fixed| match recorded {
            true => Tensor::from_inner(fixed.val()),
            false => fixed.val(),
        });
        let rows = map.reshape([n * h * w, c]);
        (rows - mean).matmul(matrix).reshape([n, h, w, c])
    }
}

/// What a detector is made of beside its encoder.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The head's sizes.
    pub head: HeadConfig,
    /// Pixels of the frame a position of the map.
    pub stride: usize,
    /// Kinds of objects.
    pub classes: usize,
    /// Whether the encoder learns.
    pub unfreeze: bool,
}

impl Detector {
    /// With a fresh head, on the autodiff device of `init`; the whitening does nothing yet.
    pub fn new(encoder: Encoder, shape: &Shape, init: &mut Init) -> Self {
        let channels = encoder.channels();
        let level = Level {
            channels,
            stride: shape.stride,
        };
        let head = DetectionHead::new(&shape.head, &[level], shape.classes, init);
        let device = init.device().clone().inner();
        Self {
            encoder: match shape.unfreeze {
                true => use_batch_statistics(encoder, false),
                false => encoder.valid().no_grad(),
            },
            whitening: FixedWhitening::of([
                Tensor::zeros([1, channels], &device),
                Tensor::eye(channels, &device),
            ]),
            head,
        }
    }

    /// With the whitening that the features of these batches ask for; padding has no part in it.
    pub fn whitened_for(
        mut self,
        batches: impl Iterator<Item = Result<DetectionBatch>>,
        stride: usize,
    ) -> Result<Self> {
        let encoder = self.encoder.valid();
        let device = crate::device();
        let mut moments: Option<Moments> = None;
        for batch in batches {
            let batch = batch?;
            let map = encoder.channels_last(pixels(&batch, &device));
            let channels = map.dims()[3];
            for (i, placement) in batch.placements.iter().enumerate() {
                let [rows, columns] = placement.shown(stride);
                let shown = map
                    .clone()
                    .slice([i..i + 1, 0..rows, 0..columns])
                    .reshape([rows * columns, channels]);
                moments
                    .get_or_insert_with(|| Moments::shifted_by_mean_of(&shown))
                    .add(shown);
            }
        }
        if let Some(moments) = moments {
            let whitening: Whitening = moments.whitening();
            self.whitening = FixedWhitening::of(whitening.tensors(&device));
        }
        Ok(self)
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The head.
    pub fn head(&self) -> &DetectionHead {
        &self.head
    }

    /// The head's answers for pictures `[N, channels, H, W]`, normalised and on the plain device, in training: where the
    /// encoder is frozen nothing of it is recorded.
    pub fn train_forward(
        &self,
        pixels: Tensor<4>,
        placements: &[Placement],
        noised: Option<&[Vec<Noised>]>,
        unfreeze: bool,
    ) -> Vec<Group> {
        let map = match unfreeze {
            true => self.features(Tensor::from_inner(pixels)),
            false => Tensor::from_inner(self.features(pixels)),
        };
        self.head.forward(&[map], placements, noised)
    }

    /// What is found in pictures `[N, channels, H, W]`, by a network that [`Module::valid`] gave: the `limit` most
    /// certain of each, most certain first.
    pub fn detect(
        &self,
        pixels: Tensor<4>,
        placements: &[Placement],
        limit: usize,
    ) -> Vec<Vec<Detection>> {
        let groups = self
            .head
            .forward(&[self.features(pixels)], placements, None);
        detections(&groups, limit)
    }

    fn features(&self, pixels: Tensor<4>) -> Tensor<4> {
        self.whitening.forward(self.encoder.channels_last(pixels))
    }
}

/// The pictures of a batch on `device`.
pub(super) fn pixels(batch: &DetectionBatch, device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(batch.pixels.clone(), batch.shape), device)
}

/// Detections as predictions in pixels of their picture, after suppression above an IoU of `most` where there is one.
pub(super) fn in_picture(
    detections: Vec<Detection>,
    placement: &Placement,
    most: Option<f64>,
) -> Vec<Prediction> {
    let kept = match most {
        Some(most) => suppress(detections, most),
        None => detections,
    };
    kept.into_iter()
        .map(|Detection { score, class, bbox }| Prediction {
            class,
            score: f64::from(score),
            bbox: placement.to_picture(bbox.map(f64::from)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{ImageSize, Picture};
    use crate::detect::View;
    use crate::encoder::{self, Build};
    use crate::nn::values;

    #[test]
    fn features_that_show_the_pictures_are_whitened_whatever_the_padding() {
        let device = crate::device().autodiff();
        let mut init = Init::new(1, &device);
        let build = Build {
            stride: 8,
            inputs: 3,
        };
        let encoder = encoder::find("mobilenet-tiny").unwrap();
        let encoder = encoder.build(build, &mut init).unwrap();
        let shape = Shape {
            head: HeadConfig::default(),
            stride: 8,
            classes: 2,
            unfreeze: false,
        };
        let frame = ImageSize {
            height: 64,
            width: 96,
        };
        let views = (0..8u32).map(|i| {
            let (width, height) = (40 + 9 * i, 64);
            let pixel = |at: u32| (at.wrapping_mul(2_654_435_761 + i) >> 23) as u8;
            let pixels = (0..3 * width * height).map(pixel).collect();
            let picture = Picture {
                width,
                height,
                channels: 3,
                pixels,
            };
            (i as usize, View::whole(&picture, &[], frame))
        });
        let batch = DetectionBatch::of(views.collect());
        let detector = Detector::new(encoder, &shape, &mut init)
            .whitened_for(std::iter::once(Ok(batch.clone())), 8)
            .unwrap()
            .valid();
        let map = detector.features(pixels(&batch, &crate::device()));
        let channels = map.dims()[3];
        let mut rows: Vec<f32> = Vec::new();
        for (i, placement) in batch.placements.iter().enumerate() {
            let [h, w] = placement.shown(8);
            rows.extend(values(map.clone().slice([i..i + 1, 0..h, 0..w])));
        }
        let count = (rows.len() / channels) as f32;
        let mut sums = vec![0.0; channels];
        let mut squares = vec![0.0; channels];
        for row in rows.chunks_exact(channels) {
            for (channel, value) in row.iter().enumerate() {
                sums[channel] += value / count;
                squares[channel] += value * value / count;
            }
        }
        assert!(sums.iter().all(|mean: &f32| mean.abs() < 1e-3), "{sums:?}");
        // Directions of next to no variance are not blown up.
        assert!(squares.iter().all(|variance: &f32| *variance < 1.01));
        assert!(squares.iter().filter(|variance| **variance > 0.99).count() > 4);
    }
}
