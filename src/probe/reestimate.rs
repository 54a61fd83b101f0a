//! Batch normalisation after pre-training: its running statistics come from quarters, frozen features from whole images.

use burn::module::Module;

use super::{Part, ProbeConfig, whole_images};
use crate::encoder::Encoder;
use crate::error::Result;
use crate::nn::use_batch_statistics;
use crate::observe::Observer;
use crate::random::{self, Purpose};

/// So many that next to nothing is left of the old statistics: 0.9¹⁰⁰ ≈ 3e-5.
const BATCHES: usize = 100;
const BATCH: usize = 128;

/// The encoder with the running statistics of whole images of `part` in place of those it was pre-trained with.
pub fn reestimate_batch_norm(
    encoder: &Encoder,
    part: &Part,
    config: &ProbeConfig,
    observer: &dyn Observer,
) -> Result<Encoder> {
    let encoder = use_batch_statistics(encoder.valid(), true);
    let count = part.indices.len();
    let batch = BATCH.min(count);
    let per_epoch = count / batch;
    let mut order = Vec::new();
    observer.begin("re-estimating batch statistics", BATCHES as u64);
    for step in 0..BATCHES {
        if step % per_epoch == 0 {
            let epoch = (step / per_epoch) as u64;
            order = random::permutation(config.seed, Purpose::Sample, epoch, count);
        }
        let start = step % per_epoch * batch;
        let indices: Vec<usize> = order[start..start + batch]
            .iter()
            .map(|&place| part.indices[place])
            .collect();
        encoder.forward(whole_images(part.dataset, &indices, config.image_size)?);
        observer.progress(step as u64 + 1, "");
    }
    observer.end();
    Ok(use_batch_statistics(encoder, false))
}
