//! The optimiser's arithmetic on flat vectors.

use rayon::prelude::*;

use crate::simd::{dot, vectorised};

/// Entries that one thread takes at a time.
const PART: usize = 1 << 14;

/// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Multiplies the gradient, for clipping.
    pub gradient_scale: f32,
    /// Decay rates of the two moving averages.
    pub betas: [f32; 2],
    /// Multiplies the weight before its change: 1 − learning rate × weight decay.
    pub keep: f32,
    /// Learning rate over 1 − β₁ᵗ.
    pub rate: f32,
    /// 1 − β₂ᵗ.
    pub correction: f32,
    /// Added to the root of the second moving average.
    pub epsilon: f32,
}

impl AdamWStep {
    /// Updates weights and both moving averages where they stand.
    pub fn apply(
        &self,
        weights: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        let length = weights.len();
        assert!([gradient.len(), first.len(), second.len()] == [length; 3]);
        weights
            .par_chunks_mut(PART)
            .zip(gradient.par_chunks(PART))
            .zip(first.par_chunks_mut(PART))
            .zip(second.par_chunks_mut(PART))
            .for_each(|(((weights, gradient), first), second)| {
                self.part(weights, gradient, first, second);
            });
    }

    fn part(&self, weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let [beta1, beta2] = self.betas;
        let inverse = 1.0 / self.correction;
        vectorised(
            #[inline(always)]
            || {
                for (((weight, gradient), first), second) in
                    weights.iter_mut().zip(gradient).zip(first).zip(second)
                {
                    let gradient = gradient * self.gradient_scale;
                    *first = *first * beta1 + gradient * (1.0 - beta1);
                    *second = *second * beta2 + gradient * gradient * (1.0 - beta2);
                    let deviation = (*second * inverse).sqrt() + self.epsilon;
                    *weight = *weight * self.keep - *first / deviation * self.rate;
                }
            },
        );
    }
}

/// Σ xᵢ², summed in parts of a fixed length in double precision.
pub fn squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x
        .par_chunks(PART)
        .map(|part| {
            vectorised(
                #[inline(always)]
                || f64::from(dot(part, part)),
            )
        })
        .collect();
    parts.into_iter().sum()
}
