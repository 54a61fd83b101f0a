//! Images in patches, and the error of predicted ones.

use rayon::prelude::*;

use crate::array::Array;
use crate::operation::{Forward, Operation};
use crate::simd::{squared_distances, sum, unwritten, vectorised};

/// Images `[N, C, H, W]` in square patches, row by row, `[N, (H/p)·(W/p), p·p·C]` with colours last; each minus its mean
/// and over √(unbiased variance + epsilon), where there is an epsilon (MAE, arXiv 2111.06377). Images get no gradient.
#[derive(Debug)]
pub struct Patches {
    pub side: usize,
    pub epsilon: Option<f32>,
}

impl Operation for Patches {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        Forward::from(patches(&inputs[0], self.side, self.epsilon))
    }

    fn backward(
        &self,
        _inputs: &[Array],
        _saved: &[Array],
        _gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        vec![None]
    }
}

fn patches(images: &Array, side: usize, epsilon: Option<f32>) -> Array {
    let [samples, colours, height, width] = images.dims();
    assert!(height.is_multiple_of(side) && width.is_multiple_of(side));
    let (rows, columns) = (height / side, width / side);
    let values = side * side * colours;
    let mut patches = unwritten(samples * rows * columns * values);
    patches
        .par_chunks_mut((columns * values).max(1))
        .enumerate()
        .for_each(|(i, row)| {
            let (sample, y) = (i / rows, i % rows * side);
            for (x, patch) in row.chunks_exact_mut(values).enumerate() {
                for colour in 0..colours {
                    for inner in 0..side {
                        let line = (sample * colours + colour) * height + y + inner;
                        let line = &images[line * width + x * side..][..side];
                        let target = &mut patch[inner * side * colours + colour..];
                        for (target, value) in target.iter_mut().step_by(colours).zip(line) {
                            *target = *value;
                        }
                    }
                }
                if let Some(epsilon) = epsilon {
                    normalise(patch, epsilon);
                }
            }
        });
    Array::new(patches, &[samples, rows * columns, values])
}

fn normalise(patch: &mut [f32], epsilon: f32) {
    vectorised(
        #[inline(always)]
        || {
            let mean = sum(patch) / patch.len() as f32;
            let variance = squared_distances(patch, mean) / (patch.len() - 1) as f32;
            let inverse = 1.0 / (variance + epsilon).sqrt();
            for value in &mut *patch {
                *value = (*value - mean) * inverse;
            }
        },
    );
}

/// Σ weight·(mean over the last axis of squared differences) / Σ weight, `[1]`; inputs: prediction `[N, T, P]`, target
/// `[N, T, P]`, weight `[N, T]`. Only the prediction gets a gradient.
#[derive(Debug)]
pub struct WeightedSquaredError;

/// Rows of the prediction whose errors are summed at a time.
const ROWS: usize = 64;

fn total(weights: &[f32]) -> f64 {
    weights.iter().map(|&weight| f64::from(weight)).sum()
}

impl Operation for WeightedSquaredError {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let [predicted, target, weights] = inputs else {
            unreachable!("an error has three inputs")
        };
        let [rows, width] = predicted.matrix();
        assert_eq!([target.len(), weights.len()], [rows * width, rows]);
        let parts: Vec<f64> = predicted
            .par_chunks(ROWS * width)
            .zip(target.par_chunks(ROWS * width))
            .zip(weights.par_chunks(ROWS))
            .map(|((predicted, target), weights)| {
                let mut difference = vec![0.0; width];
                let rows = predicted
                    .chunks_exact(width)
                    .zip(target.chunks_exact(width));
                rows.zip(weights)
                    .map(|((predicted, target), &weight)| {
                        let square = vectorised(
                            #[inline(always)]
                            || {
                                for ((difference, predicted), target) in
                                    difference.iter_mut().zip(predicted).zip(target)
                                {
                                    *difference = predicted - target;
                                }
                                squared_distances(&difference, 0.0)
                            },
                        );
                        f64::from(weight) * f64::from(square)
                    })
                    .sum()
            })
            .collect();
        let error = parts.into_iter().sum::<f64>() / width as f64 / total(weights);
        Forward::from(Array::new(vec![error as f32], &[1]))
    }

    fn backward(
        &self,
        inputs: &[Array],
        _saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let [predicted, target, weights] = inputs else {
            unreachable!("an error has three inputs")
        };
        let [_, width] = predicted.matrix();
        let factor = 2.0 * f64::from(gradient[0]) / (width as f64 * total(weights));
        let mut found = unwritten(predicted.len());
        found
            .par_chunks_mut(ROWS * width)
            .zip(predicted.par_chunks(ROWS * width))
            .zip(target.par_chunks(ROWS * width))
            .zip(weights.par_chunks(ROWS))
            .for_each(|(((found, predicted), target), weights)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (((found, predicted), target), &weight) in found
                            .chunks_exact_mut(width)
                            .zip(predicted.chunks_exact(width))
                            .zip(target.chunks_exact(width))
                            .zip(weights)
                        {
                            let slope = (factor * f64::from(weight)) as f32;
                            for ((found, predicted), target) in
                                found.iter_mut().zip(predicted).zip(target)
                            {
                                *found = slope * (predicted - target);
                            }
                        }
                    },
                );
            });
        vec![Some(Array::new(found, &predicted.shape())), None, None]
    }
}
