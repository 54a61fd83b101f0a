//! Random numbers as pure functions of (seed, purpose, epoch, index).
//!
//! Nothing keeps a generator between steps, so a resumed run needs no random state beyond its seed and its position.

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a stream is for; two purposes never share numbers.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Initial weights.
    Weights = 1,
    /// The order of the images in an epoch.
    Order = 2,
    /// Crop and flip of one image in one epoch.
    Augmentation = 3,
    /// The visible quadrant of one image in one epoch.
    Quadrant = 4,
    /// Which images a data set holds out where it has no split of its own.
    Split = 5,
    /// Which images a report or a baseline looks at.
    Sample = 6,
    /// The order in which MoCo's keys are cut into sub-batches.
    Shuffle = 7,
    /// How the true boxes of one image in one epoch are spoilt for a detector's denoising queries.
    Denoising = 8,
}

/// The stream that belongs to these four numbers: the same on every platform.
pub fn stream(seed: u64, purpose: Purpose, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    for (slot, word) in key
        .chunks_exact_mut(8)
        .zip([seed, purpose as u64, epoch, index])
    {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// `0..count` in random order.
pub fn permutation(seed: u64, purpose: Purpose, epoch: u64, count: usize) -> Vec<usize> {
    shuffled(count, &mut stream(seed, purpose, epoch, 0))
}

/// `0..count` in random order.
pub fn shuffled(count: usize, random: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(random);
    order
}

/// A standard normal number, by Box and Muller's transformation.
pub fn standard_normal(random: &mut ChaCha8Rng) -> f32 {
    let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * random.random::<f64>()).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_all_four_numbers() {
        let first =
            |seed, purpose, epoch, index| stream(seed, purpose, epoch, index).random::<u64>();
        let reference = first(1, Purpose::Order, 2, 3);
        assert_eq!(reference, first(1, Purpose::Order, 2, 3));
        for other in [
            first(0, Purpose::Order, 2, 3),
            first(1, Purpose::Augmentation, 2, 3),
            first(1, Purpose::Order, 1, 3),
            first(1, Purpose::Order, 2, 2),
        ] {
            assert_ne!(reference, other);
        }
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let mut random = stream(0, Purpose::Weights, 0, 0);
        let values: Vec<f64> = (0..20_000)
            .map(|_| f64::from(standard_normal(&mut random)))
            .collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(
            mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03,
            "{mean} {variance}"
        );
    }
}
