//! Fine-tuning: the encoder is the start, everything is trained.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};

use super::features::whole_images;
use super::{ProbeConfig, ProbeData, Scores, begin};
use crate::data::{DataConfig, Loader, LoaderConfig};
use crate::encoder::Encoder;
use crate::error::Result;
use crate::nn::{Init, Linear, cross_entropy};
use crate::observe::Observer;
use crate::train::{Stop, give_up, settled, train};

const BATCH: usize = 64;

/// An encoder with mean pooling and a linear classifier.
#[derive(Module, Debug)]
pub struct Classifier {
    /// Trained with it.
    pub encoder: Encoder,
    classifier: Linear,
}

impl Classifier {
    /// Of an encoder and a layer from its channels to the classes.
    pub fn new(encoder: Encoder, classifier: Linear) -> Self {
        Self {
            encoder,
            classifier,
        }
    }

    /// Cross-entropy of images `[N, colours, H, W]`, averaged, `[1]`.
    pub fn loss(&self, images: Tensor<4>, labels: &[u32]) -> Tensor<1> {
        cross_entropy(self.forward(images), labels, 0.0)
    }

    /// `[N, colours, H, W]` to `[N, classes]`.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        self.classifier.forward(self.encoder.pooled(images))
    }
}

/// Scores of the held-out images by a network trained on the others, with random crops and flips.
pub fn finetune(
    encoder: &Encoder,
    data: &ProbeData,
    config: &ProbeConfig,
    observer: &dyn Observer,
) -> Result<Scores> {
    let device = crate::device().autodiff();
    let part = &data.train;
    let batch = BATCH.min(part.indices.len());
    let per_epoch = part.indices.len() / batch;
    let total_steps = (config.epochs * per_epoch) as u64;
    let mut label_of = vec![0; part.dataset.images.len()];
    for (&index, &label) in part.indices.iter().zip(&part.labels) {
        label_of[index] = label;
    }
    let classifier = Init::new(config.seed, &device).linear(encoder.channels(), data.classes.len());
    let model = Classifier::new(encoder.clone().unfreeze().train(), classifier);
    let (state, rate) = begin(model, per_epoch, total_steps);
    let loading = LoaderConfig {
        seed: config.seed,
        image_size: config.image_size,
        batch_size: batch,
        views: 1,
        data: DataConfig::default(),
    };
    let indices = std::sync::Arc::new(part.indices.clone());
    let mut loader = Loader::new(&part.dataset.images, &indices, &loading, 0);
    let size = config.image_size;
    observer.begin("fine-tuning", total_steps);
    let state = train(
        state,
        &rate,
        || loader.next_batch(),
        |model: &Classifier, batch| {
            let images = Tensor::from_data(TensorData::new(batch.pixels, batch.shape), &device);
            let labels: Vec<u32> = batch.indices.iter().map(|&i| label_of[i]).collect();
            model.loss(images, &labels)
        },
        settled,
        give_up,
        |_, report| {
            observer.progress(report.step, &format!("loss {:.3}", report.loss));
            Ok(Stop::No)
        },
    )?;
    observer.end();
    let model = state.model.valid();
    let mut values = Vec::new();
    for indices in data.held_out.indices.chunks(BATCH) {
        let images = whole_images(data.held_out.dataset, indices, size)?;
        values.extend(crate::nn::values(model.forward(images)));
    }
    Ok(Scores {
        values,
        classes: data.classes.len(),
    })
}
