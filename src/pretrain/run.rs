//! A pre-training run: what its course needs to know.

use burn::tensor::{Device, Tensor};
use serde_json::{Value, json};

use super::{Images, Outcome, PretrainModel, WithModel, with_model};
use crate::config::Config;
use crate::data::{BadImage, Dataset, Loader};
use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::nn::Named;
use crate::observe::{Observer, Silent};
use crate::probe::{self, Part, ProbeConfig};
use crate::random::{self, Purpose};
use crate::train::{
    AdamWConfig, BASELINE, Checkpoint, Course, ENCODER_FILE, KeptBatch, Replay, RunFolder, Start,
    Trainee, replay_step,
};
use crate::weights::save_encoder;

/// Batches from which the trivial predictor's loss is estimated.
const BASELINE_BATCHES: u64 = 8;

/// Where a run begins or goes on.
#[allow(clippy::large_enum_variant, reason = "there is one a run")]
pub(super) enum From {
    /// At its first step, with the encoder that the configuration names, if any.
    Start(Option<Encoder>),
    /// Where a checkpoint was written.
    Checkpoint(Checkpoint),
}

/// A run from its start or from a checkpoint to its end.
pub(super) struct Run<'a> {
    pub course: &'a Course<'a>,
    pub config: &'a Config,
    pub dataset: &'a Dataset,
    pub observer: &'a dyn Observer,
}

impl Run<'_> {
    pub fn go(&self, from: From) -> Result<Outcome> {
        let device = crate::device().autodiff();
        with_model(self.config, &device, Going { run: self, from })
    }

    fn train<M: PretrainModel>(&self, model: M, from: From) -> Result<Outcome> {
        let trivial_loss = match &from {
            From::Start(_) => self.trivial_loss(&model)?,
            // Of the images that the run began with.
            From::Checkpoint(_) => {
                let logged = self.course.folder().baseline()?;
                match logged.and_then(|event| event["trivial_loss"].as_f64()) {
                    Some(logged) => logged,
                    None => self.trivial_loss(&model)?,
                }
            }
        };
        let device = crate::device().autodiff();
        let (from, first_step) = match from {
            From::Start(given) => {
                let model = match given {
                    Some(encoder) => model.with_encoder(encoder),
                    None => model,
                };
                let baseline = json!({"kind": BASELINE, "trivial_loss": trivial_loss});
                (Start::Anew(model, baseline), 0)
            }
            From::Checkpoint(checkpoint) => {
                let step = checkpoint.position.step;
                (Start::After(model, checkpoint), step)
            }
        };
        let mut training = Training {
            run: self,
            loader: self.loader(first_step),
            device: device.clone(),
            trivial_loss,
            model: std::marker::PhantomData,
        };
        let optimizer = AdamWConfig::from(&self.config.optim);
        let (model, outcome) = self.course.go(&mut training, optimizer, &device, from)?;
        if !outcome.stopped() {
            let file = self.course.folder().file(ENCODER_FILE);
            save_encoder(model.encoder(), self.config, &file)?;
        }
        Ok(Outcome {
            course: outcome,
            trivial_loss,
        })
    }

    fn trivial_loss<M: PretrainModel>(&self, model: &M) -> Result<f64> {
        let mut loader = self.loader(0);
        let steps_per_epoch = super::steps_per_epoch(self.config, self.dataset);
        let batches = (0..BASELINE_BATCHES.min(steps_per_epoch))
            .map(|_| {
                let batch = loader.next_batch()?;
                Ok(Images::new(batch, &crate::device()))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(model.valid().trivial_loss(&batches, self.config.seed))
    }

    /// Batches from that of step `first_step` on, counted from 0.
    fn loader(&self, first_step: u64) -> Loader {
        let Dataset { images, train, .. } = self.dataset;
        Loader::new(images, train, &self.config.loading(), first_step)
    }

    /// Adds rank, spread and, where there are labels, k-NN accuracy of the features as they are now.
    fn watch(&self, encoder: &Encoder, event: &mut Value) -> Result<()> {
        let config = ProbeConfig::new(self.config.image_size, self.config.seed);
        let classes = &self.dataset.classes;
        // At least one of each class, or those without could never be recognised.
        let limit = self.config.run.watch_images.max(classes.len());
        let part = |indices: &[usize]| -> Result<Part> {
            let labelled = Part::labelled(self.dataset, indices, classes)?;
            Ok(labelled.limit(limit, self.config.seed))
        };
        let (train, held_out) = (part(&self.dataset.train)?, part(&self.dataset.held_out)?);
        if train.indices.is_empty() || held_out.indices.is_empty() {
            // Drawn, since images are numbered by name and the first may all be of one folder.
            let (seed, all) = (self.config.seed, &self.dataset.train);
            let mut places = random::permutation(seed, Purpose::Sample, 2, all.len());
            places.truncate(limit);
            places.sort_unstable();
            let unlabelled = Part {
                dataset: self.dataset,
                indices: places.into_iter().map(|place| all[place]).collect(),
                labels: Vec::new(),
            };
            let features = probe::extract(encoder, &unlabelled, &config, false, &Silent)?;
            add_statistics(event, &features);
            return Ok(());
        }
        let features = probe::extract(encoder, &train, &config, false, &Silent)?;
        add_statistics(event, &features);
        let scored = probe::extract(encoder, &held_out, &config, false, &Silent)?;
        let whitening = features.whitening();
        let scores = probe::knn_scores(
            &whitening.apply_pooled(&features),
            (&train.labels, classes.len()),
            &whitening.apply_pooled(&scored),
        );
        event["knn_top1"] = scores.top(1, &held_out.labels).into();
        Ok(())
    }
}

struct Going<'a> {
    run: &'a Run<'a>,
    from: From,
}

impl WithModel for Going<'_> {
    type Output = Outcome;

    fn with<M: PretrainModel>(self, model: M) -> Result<Outcome> {
        self.run.train(model, self.from)
    }
}

/// A run under way.
struct Training<'a, M> {
    run: &'a Run<'a>,
    loader: Loader,
    device: Device,
    trivial_loss: f64,
    model: std::marker::PhantomData<M>,
}

impl<M: PretrainModel> Trainee for Training<'_, M> {
    type Model = M;
    type Batch = Images;
    const STAGE: &'static str = "pre-training";

    fn next_batch(&mut self) -> Result<(Images, Vec<BadImage>)> {
        let mut batch = self.loader.next_batch()?;
        let passed_over = std::mem::take(&mut batch.passed_over);
        Ok((Images::new(batch, &self.device), passed_over))
    }

    fn loss(&mut self, model: &M, batch: &Images) -> Tensor<1> {
        model.loss(batch, self.run.config.seed)
    }

    fn settle(&self, model: M) -> M {
        model.follow()
    }

    fn remark(&self) -> String {
        format!(" (trivial {:.4})", self.trivial_loss)
    }

    fn end_of_epoch(&mut self, epoch: u64, model: &M, event: &mut Value) -> Result<()> {
        for (name, value) in model.metrics() {
            event[name] = value.into();
        }
        let Config { base, .. } = self.run.config;
        let every = base.run.watch_every as u64;
        let last = epoch == base.optim.epochs as u64;
        if every > 0 && (epoch.is_multiple_of(every) || last) {
            self.run.watch(model.encoder(), event)?;
            self.run.observer.note(&describe_watch(epoch, event));
        }
        match event["effective_rank"].as_f64() {
            Some(rank) if rank < base.run.rank_floor => Err(Error::Collapsed {
                epoch,
                rank,
                floor: base.run.rank_floor,
            }),
            _ => Ok(()),
        }
    }

    fn keep_batch(&self, step: u64) -> Result<KeptBatch> {
        let batch = self.run.loader(step).next_batch()?;
        let name = |&index: &usize| self.run.dataset.images.name(index).to_owned();
        let labels: Option<Vec<u32>> = batch.labels.into_iter().collect();
        Ok(KeptBatch {
            epoch: batch.epoch,
            files: batch.indices.iter().map(name).collect(),
            indices: batch.indices,
            pixels: Named {
                shape: batch.shape.to_vec(),
                values: batch.pixels,
            },
            rest: json!(labels.unwrap_or_default()),
        })
    }
}

/// Takes the bad step that a run has kept once more.
pub fn replay(run: &RunFolder, config: &Config) -> Result<Replay> {
    let device = crate::device().autodiff();
    with_model(config, &device, KeptStep { run, config })
}

struct KeptStep<'a> {
    run: &'a RunFolder,
    config: &'a Config,
}

impl WithModel for KeptStep<'_> {
    type Output = Replay;

    fn with<M: PretrainModel>(self, model: M) -> Result<Replay> {
        let device = crate::device().autodiff();
        let optimizer = AdamWConfig::from(&self.config.optim);
        let loss = |model: &M, kept: &KeptBatch| {
            let pixels = kept.pixels.tensor(&device);
            let batch = Images {
                pixels: pixels.ok_or("its pixels are no batch of images")?,
                indices: kept.indices.clone(),
                labels: serde_json::from_value(kept.rest.clone())
                    .map_err(|error| format!("its labels are damaged ({error})"))?,
                epoch: kept.epoch,
            };
            Ok(model.loss(&batch, self.config.seed))
        };
        replay_step(self.run, model, optimizer, &device, loss)
    }
}

fn add_statistics(event: &mut Value, features: &probe::Features) {
    let statistics = probe::feature_statistics(features);
    event["effective_rank"] = statistics.effective_rank.into();
    event["spread"] = statistics.spread.into();
}

fn describe_watch(epoch: u64, event: &Value) -> String {
    let figure = |name: &str| event[name].as_f64();
    let mut text = format!("after epoch {epoch}:");
    if let Some(knn) = figure("knn_top1") {
        text += &format!(" k-NN {knn:.1} %,");
    }
    if let (Some(rank), Some(spread)) = (figure("effective_rank"), figure("spread")) {
        text += &format!(" effective rank {rank:.1}, spread {spread:.2}");
    }
    if let Some(commutator) = figure("commutator") {
        text += &format!(", ‖AB−BA‖/(‖A‖‖B‖) {commutator:.3}");
    }
    text
}
