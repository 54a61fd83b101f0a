//! Two predictors that look at no picture. A detector that is not above both has learnt nothing of what it sees.

use std::collections::BTreeMap;

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::average_precision::{Figures, Prediction, Score, score};
use super::coco::{AnnotatedImage, MOST_BOXES};
use super::set::DetectionSet;
use crate::error::Result;
use crate::random::{Purpose, stream};

/// Rows and columns of the places that [`MeanBoxes`] tells apart; an odd number has one in the middle.
const PLACES: usize = 5;

/// What training images have on average: for each class and each of 5×5 places of an image the mean of the boxes whose
/// centre lies there, the more certain the more there are.
pub struct MeanBoxes {
    /// Class, score and `[left, top, width, height]` as shares of the image.
    boxes: Vec<(usize, f64, [f64; 4])>,
}

impl MeanBoxes {
    /// Of these images.
    pub fn of(images: &[AnnotatedImage]) -> Self {
        let mut places: BTreeMap<(usize, usize, usize), (f64, [f64; 4])> = BTreeMap::new();
        let mut all = 0.0;
        for image in images {
            let (width, height) = (f64::from(image.width), f64::from(image.height));
            for object in image.objects() {
                let [left, top, box_width, box_height] = object.bbox;
                let shares = [
                    left / width,
                    top / height,
                    box_width / width,
                    box_height / height,
                ];
                let place = |start: f64, length: f64| {
                    let place = (start + length / 2.0) * PLACES as f64;
                    (place as usize).min(PLACES - 1)
                };
                let key = (
                    object.class,
                    place(shares[1], shares[3]),
                    place(shares[0], shares[2]),
                );
                let (count, sums) = places.entry(key).or_default();
                *count += 1.0;
                for (sum, share) in sums.iter_mut().zip(shares) {
                    *sum += share;
                }
                all += 1.0;
            }
        }
        let boxes = places.into_iter().map(|((class, ..), (count, sums))| {
            let mean = sums.map(|sum| sum / count);
            (class, count / all, mean)
        });
        Self {
            boxes: boxes.collect(),
        }
    }

    /// The same boxes for every image, as large as it is.
    pub fn predict(&self, width: u32, height: u32) -> Vec<Prediction> {
        let (width, height) = (f64::from(width), f64::from(height));
        self.boxes
            .iter()
            .map(
                |&(class, score, [left, top, box_width, box_height])| Prediction {
                    class,
                    score,
                    bbox: [
                        left * width,
                        top * height,
                        box_width * width,
                        box_height * height,
                    ],
                },
            )
            .collect()
    }
}

/// As many boxes as AP looks at, between two random points each, of random classes and scores.
pub fn chance(width: u32, height: u32, classes: usize, seed: u64, image: u64) -> Vec<Prediction> {
    let random = &mut stream(seed, Purpose::Sample, 0, image);
    (0..MOST_BOXES)
        .map(|_| {
            let mut along = |side: u32| {
                let [a, b]: [f64; 2] = random.random();
                (a.min(b) * f64::from(side), (a - b).abs() * f64::from(side))
            };
            let ((left, width), (top, height)) = (along(width), along(height));
            Prediction {
                class: random.random_range(0..classes),
                score: random.random(),
                bbox: [left, top, width, height],
            }
        })
        .collect()
}

/// What the two predictors reach.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Baselines {
    /// Random boxes.
    pub chance: Score,
    /// [`MeanBoxes`] of the training images.
    pub mean_boxes: Score,
}

/// Their figures, as a log has them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floors {
    /// Of random boxes.
    pub chance: Figures,
    /// Of [`MeanBoxes`].
    pub mean_boxes: Figures,
}

impl From<&Baselines> for Floors {
    fn from(baselines: &Baselines) -> Self {
        Self {
            chance: Figures::from(&baselines.chance),
            mean_boxes: Figures::from(&baselines.mean_boxes),
        }
    }
}

/// Scores of both on `held_out`, which has the classes of `train`.
pub fn baselines(train: &DetectionSet, held_out: &DetectionSet, seed: u64) -> Result<Baselines> {
    let mean_boxes = MeanBoxes::of(&train.images);
    let classes = &held_out.classes;
    let scored = |predict: &dyn Fn(usize, &AnnotatedImage) -> Vec<Prediction>| {
        let images = held_out.images.iter().enumerate();
        let predictions: Vec<_> = images.map(|(i, image)| predict(i, image)).collect();
        score(&held_out.boxes(), classes, &predictions, 0.0)
    };
    Ok(Baselines {
        chance: scored(&|i: usize, image: &AnnotatedImage| {
            chance(image.width, image.height, classes.len(), seed, i as u64)
        })?,
        mean_boxes: scored(&|_: usize, image: &AnnotatedImage| {
            mean_boxes.predict(image.width, image.height)
        })?,
    })
}
