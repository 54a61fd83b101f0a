//! A detector: an encoder, frozen unless it is asked to learn too, the whitening of its features, and the head.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

use super::average_precision::Prediction;
use super::denoising::Noised;
use super::detections::{Detection, detections, suppress};
use super::head::{Alike, DetectionHead, Group, HeadConfig, Level};
use super::loader::DetectionBatch;
use super::view::Placement;
use crate::encoder::Encoder;
use crate::error::Result;
use crate::nn::{Init, rows_at, side_by_side, use_batch_statistics};
use crate::probe::{Moments, Whitening};

/// Encoder, whitening and head.
#[derive(Module, Debug)]
pub struct Detector {
    /// Turns pictures into maps; its batch normalisations use their running statistics.
    encoder: Encoder,
    /// One for each map.
    whitening: Vec<FixedWhitening>,
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
    /// The maps that it reads, finest first; the last is the encoder's feature map.
    pub levels: Vec<Level>,
    /// Kinds of objects.
    pub classes: usize,
    /// Whether the encoder learns.
    pub unfreeze: bool,
}

impl Detector {
    /// With a fresh head, on the autodiff device of `init`; the whitening does nothing yet.
    pub fn new(encoder: Encoder, shape: &Shape, init: &mut Init) -> Self {
        let head = DetectionHead::new(&shape.head, &shape.levels, shape.classes, init);
        let device = init.device().clone().inner();
        Self {
            encoder: match shape.unfreeze {
                true => use_batch_statistics(encoder, false),
                false => encoder.valid().no_grad(),
            },
            whitening: shape
                .levels
                .iter()
                .map(|level| {
                    FixedWhitening::of([
                        Tensor::zeros([1, level.channels], &device),
                        Tensor::eye(level.channels, &device),
                    ])
                })
                .collect(),
            head,
        }
    }

    /// With the whitening that the features of these batches ask for; padding has no part in it.
    pub fn whitened_for(
        mut self,
        batches: impl Iterator<Item = Result<DetectionBatch>>,
    ) -> Result<Self> {
        let encoder = self.encoder.valid();
        let device = crate::device();
        let mut moments: Vec<Option<Moments>> = self.whitening.iter().map(|_| None).collect();
        for batch in batches {
            let batch = batch?;
            let all = pixels(&batch, &device);
            for Alike { shown, images } in self.head.alike(&batch.placements) {
                let content = self.content(&all, &batch.placements, &images);
                let maps = encoder.maps(content, &self.finer()).into_iter();
                for ((map, [rows, columns]), moments) in maps.zip(shown).zip(&mut moments) {
                    let [n, _, _, channels] = map.dims();
                    let features = map
                        .slice([0..n, 0..rows, 0..columns])
                        .reshape([n * rows * columns, channels]);
                    moments
                        .get_or_insert_with(|| Moments::shifted_by_mean_of(&features))
                        .add(features);
                }
            }
        }
        for (fixed, moments) in self.whitening.iter_mut().zip(moments) {
            if let Some(moments) = moments {
                let whitening: Whitening = moments.whitening();
                *fixed = FixedWhitening::of(whitening.tensors(&device));
            }
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

    /// The head's answers for some of the pictures `[N, channels, H, W]` of a batch, normalised and on the plain device,
    /// in training: where the encoder is frozen nothing of it is recorded.
    pub(super) fn train_forward(
        &self,
        pixels: &Tensor<4>,
        alike: Alike,
        placements: &[Placement],
        noised: &[Vec<Noised>],
        unfreeze: bool,
    ) -> Group {
        let content = self.content(pixels, placements, &alike.images);
        let maps: Vec<_> = match unfreeze {
            true => self.features(Tensor::from_inner(content)),
            false => {
                let maps = self.features(content).into_iter();
                maps.map(Tensor::from_inner).collect()
            }
        };
        self.head.group(&maps, alike, placements, Some(noised))
    }

    /// What is found in pictures `[N, channels, H, W]`, by a network that [`Module::valid`] gave: the `limit` most
    /// certain of each, most certain first.
    pub fn detect(
        &self,
        pixels: Tensor<4>,
        placements: &[Placement],
        limit: usize,
    ) -> Vec<Vec<Detection>> {
        let groups = side_by_side(self.head.alike(placements), |alike| {
            let maps = self.features(self.content(&pixels, placements, &alike.images));
            self.head.group(&maps, alike, placements, None)
        });
        detections(&groups, limit)
    }

    /// Of a batch's pictures `[N, channels, H, W]` these, which show equally much: as much of their frames as the
    /// coarsest map needs.
    fn content(&self, pixels: &Tensor<4>, placements: &[Placement], images: &[usize]) -> Tensor<4> {
        let [all, channels, height, width] = pixels.dims();
        let strides = self.head.strides();
        let own = strides.last().expect("a head reads a map");
        let [rows, columns] = placements[images[0]].shown(*own);
        let chosen = match images.len() == all {
            true => pixels.clone(),
            false => rows_at(pixels.clone(), images),
        };
        chosen.slice([
            0..images.len(),
            0..channels,
            0..(rows * own).min(height),
            0..(columns * own).min(width),
        ])
    }

    fn features(&self, pixels: Tensor<4>) -> Vec<Tensor<4>> {
        let maps = self.encoder.maps(pixels, &self.finer());
        maps.into_iter()
            .zip(&self.whitening)
            .map(|(map, whitening)| whitening.forward(map))
            .collect()
    }

    /// The strides of all maps but the encoder's feature map.
    fn finer(&self) -> Vec<usize> {
        let mut strides = self.head.strides();
        strides.pop();
        strides
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

    /// With maps of strides 4 and 8.
    fn fresh(name: &str) -> Detector {
        let device = crate::device().autodiff();
        let mut init = Init::new(1, &device);
        let build = Build {
            stride: 8,
            inputs: 3,
        };
        let encoder = encoder::find(name).unwrap();
        let encoder = encoder.build(build, &mut init).unwrap();
        let channels = encoder.map_channels(3, &[4]);
        let levels = channels.into_iter().zip([4, 8]);
        let shape = Shape {
            head: HeadConfig::default(),
            levels: levels
                .map(|(channels, stride)| Level { channels, stride })
                .collect(),
            classes: 2,
            unfreeze: false,
        };
        Detector::new(encoder, &shape, &mut init)
    }

    #[test]
    fn what_is_found_does_not_depend_on_the_padding_even_where_tokens_see_the_whole_map() {
        let device = crate::device();
        let (width, height) = (64, 40);
        let picture = Picture {
            width,
            height,
            channels: 3,
            pixels: (0..3 * width * height)
                .map(|i| (i * 37 % 251) as u8)
                .collect(),
        };
        let frame = ImageSize::square(64);
        let batch = DetectionBatch::of(vec![(0, View::whole(&picture, &[], frame))]);
        let detector = fresh("mf-tiny").valid();
        let as_is = pixels(&batch, &device);
        let spoilt = as_is.clone().slice_fill([0..1, 0..3, 40..64, 0..64], 5.0);
        let found = |pixels| detector.detect(pixels, &batch.placements, 10);
        assert_eq!(found(as_is), found(spoilt));
    }

    #[test]
    fn features_that_show_the_pictures_are_whitened_whatever_the_padding() {
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
        let detector = fresh("mobilenet-tiny")
            .whitened_for(std::iter::once(Ok(batch.clone())))
            .unwrap()
            .valid();
        let (mut sums, mut squares, mut counts) = (
            [const { Vec::new() }; 2],
            [const { Vec::new() }; 2],
            [0.0; 2],
        );
        for Alike { shown, images } in detector.head.alike(&batch.placements) {
            let all = pixels(&batch, &crate::device());
            let maps = detector.features(detector.content(&all, &batch.placements, &images));
            for (level, (map, [h, w])) in maps.into_iter().zip(shown).enumerate() {
                let [n, _, _, channels] = map.dims();
                counts[level] += (n * h * w) as f32;
                sums[level].resize(channels, 0.0);
                squares[level].resize(channels, 0.0);
                for row in values(map.slice([0..n, 0..h, 0..w])).chunks_exact(channels) {
                    for (channel, value) in row.iter().enumerate() {
                        sums[level][channel] += value;
                        squares[level][channel] += value * value;
                    }
                }
            }
        }
        for ((sums, squares), count) in sums.iter().zip(&squares).zip(counts) {
            assert!(
                sums.iter().all(|sum: &f32| (sum / count).abs() < 1e-3),
                "{sums:?}"
            );
            // Directions of next to no variance are not blown up.
            assert!(squares.iter().all(|sum: &f32| sum / count < 1.01));
            assert!(squares.iter().filter(|&sum| sum / count > 0.99).count() > 4);
        }
    }
}
