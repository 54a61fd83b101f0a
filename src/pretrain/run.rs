//! A run's course: what surrounds each step of the training loop.

use std::cell::RefCell;
use std::collections::BTreeSet;

use burn::module::Module;
use burn::tensor::Device;
use serde_json::json;

use super::{
    Images, Outcome, PretrainModel, Surroundings, WithModel, bad_step, steps_per_epoch, with_model,
};
use crate::config::Config;
use crate::data::{BadImage, Dataset, Loader, LoaderConfig};
use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::probe::{self, Part, ProbeConfig};
use crate::train::{
    AdamW, AdamWConfig, Checkpoint, Checkpoints, ENCODER_FILE, Events, Position, RunFolder,
    RunLock, StepReport, StepTimes, Stop, TrainState, train,
};
use crate::weights::save_encoder;

/// Batches from which the trivial predictor's loss is estimated.
const BASELINE_BATCHES: u64 = 8;
/// Kind of the event that an image became unreadable.
const BAD_IMAGE: &str = "bad-image";

/// Where a run begins or goes on.
#[allow(clippy::large_enum_variant, reason = "there is one a run")]
pub(super) enum Start {
    /// At its first step, with the encoder that the configuration names, if any.
    Anew(Option<Encoder>),
    /// Where a checkpoint was written.
    After(Checkpoint),
}

/// One run, from its folder to its last step.
pub(super) struct Run<'a> {
    pub(super) folder: RunFolder,
    checkpoints: Checkpoints,
    pub(super) config: &'a Config,
    pub(super) dataset: &'a Dataset,
    pub(super) around: &'a Surroundings<'a>,
    loading: LoaderConfig,
    steps_per_epoch: u64,
    _lock: RunLock,
    /// Of the images' index.
    pub(super) fingerprint: String,
    device: Device,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        folder: RunFolder,
        config: &'a Config,
        dataset: &'a Dataset,
        around: &'a Surroundings<'a>,
    ) -> Result<Self> {
        Ok(Self {
            _lock: folder.lock()?,
            checkpoints: folder.checkpoints(config.run.keep_checkpoints),
            folder,
            config,
            dataset,
            around,
            loading: config.loading(),
            steps_per_epoch: steps_per_epoch(config, dataset),
            fingerprint: dataset.index().fingerprint(),
            device: crate::device().autodiff(),
        })
    }

    pub(super) fn go(&self, from: Start) -> Result<Outcome> {
        with_model(self.config, &self.device, Course { run: self, from })
    }

    fn train<M: PretrainModel>(&self, model: M, from: Start) -> Result<Outcome> {
        let optimizer = AdamWConfig::from(&self.config.optim);
        let trivial_loss = self.trivial_loss(&model)?;
        let (state, events) = match from {
            Start::Anew(given) => {
                let mut events = self.folder.events(0)?;
                events.append(&json!({"kind": "baseline", "trivial_loss": trivial_loss}))?;
                let model = match given {
                    Some(encoder) => model.with_encoder(encoder),
                    None => model,
                };
                let optimizer = AdamW::new(optimizer);
                let state = TrainState {
                    model,
                    optimizer,
                    step: 0,
                };
                // A run that dies before its first regular checkpoint can then be resumed too.
                self.save(&state, &mut events)?;
                (state, events)
            }
            Start::After(checkpoint) => (
                checkpoint.restore(model, optimizer, &self.device)?,
                self.folder.events(checkpoint.position.events_bytes)?,
            ),
        };
        let rate = self.config.optim.learning_rates(self.steps_per_epoch);
        let first_step = state.step;
        let mut loader = self.loader(first_step);
        let mut pace = Pace::default();
        let mut losses: Option<(f32, f32)> = None;
        let logged = self.folder.read_events()?;
        let mut bad_images = logged_bad_images(&logged);
        let mut bad_steps = bad_step::logged(&logged);
        let (events, passed_over) = (RefCell::new(events), RefCell::new(Vec::new()));
        let observer = self.around.observer;
        observer.begin("pre-training", rate.total_steps);
        let state = train(
            state,
            &rate,
            || {
                let mut batch = loader.next_batch()?;
                passed_over.borrow_mut().append(&mut batch.passed_over);
                Ok(Images::new(batch, &self.device))
            },
            |model: &M, batch| model.loss(&batch, self.config.seed),
            M::follow,
            |state, step| {
                bad_steps += 1;
                self.keep_bad_step(state, step, bad_steps, &mut events.borrow_mut())
            },
            |state, report| {
                let events = &mut *events.borrow_mut();
                for bad in passed_over.take() {
                    if bad_images.insert(bad.name.clone()) {
                        self.log_bad_image(&bad, events)?;
                    }
                }
                if !report.skipped {
                    losses = Some((losses.map_or(report.loss, |(first, _)| first), report.loss));
                    pace.add(&report.times);
                    self.log_step(report, events)?;
                }
                observer.progress(report.step, &self.describe(report, &pace, trivial_loss));
                if state.step.is_multiple_of(self.steps_per_epoch) {
                    self.end_of_epoch(state, events)?;
                }
                let stop = (self.around.stop)();
                let last = state.step == rate.total_steps;
                let due = state.step.is_multiple_of(self.config.run.checkpoint_every)
                    || state.step.is_multiple_of(self.steps_per_epoch);
                if due || stop || last {
                    self.save(state, events)?;
                }
                Ok(if stop { Stop::Now } else { Stop::No })
            },
        );
        observer.end();
        let state = state?;
        if state.step == rate.total_steps {
            let file = self.folder.file(ENCODER_FILE);
            save_encoder(state.model.encoder(), self.config, &file)?;
        }
        Ok(Outcome {
            run: self.folder.path().to_owned(),
            steps: state.step,
            planned: rate.total_steps,
            losses,
            trivial_loss,
            images_per_s: pace.images_per_s(self.config.optim.batch_size),
            bad_images: bad_images.len(),
        })
    }

    fn log_bad_image(&self, bad: &BadImage, events: &mut Events) -> Result<()> {
        let BadImage { name, reason } = bad;
        self.around.observer.note(&format!(
            "became unreadable, another image stands in: {name}: {reason}"
        ));
        events.append(&json!({"kind": BAD_IMAGE, "name": name, "reason": reason}))
    }

    fn trivial_loss<M: PretrainModel>(&self, model: &M) -> Result<f64> {
        let mut loader = self.loader(0);
        let batches = (0..BASELINE_BATCHES.min(self.steps_per_epoch))
            .map(|_| {
                let batch = loader.next_batch()?;
                Ok(Images::new(batch, &crate::device()))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(model.valid().trivial_loss(&batches, self.config.seed))
    }

    /// Batches from that of step `first_step` on, counted from 0.
    pub(super) fn loader(&self, first_step: u64) -> Loader {
        let Dataset { images, train, .. } = self.dataset;
        Loader::new(images, train, &self.loading, first_step)
    }

    fn save<M: Module>(&self, state: &TrainState<M>, events: &mut Events) -> Result<()> {
        let position = self.position(state.step, events)?;
        self.checkpoints.save(state, position)
    }

    pub(super) fn position(&self, step: u64, events: &mut Events) -> Result<Position> {
        Ok(Position {
            step,
            steps_per_epoch: self.steps_per_epoch,
            seed: self.config.seed,
            events_bytes: events.sync()?,
            data: self.fingerprint.clone(),
        })
    }

    fn log_step(&self, report: &StepReport, events: &mut Events) -> Result<()> {
        let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
        events.append(&json!({
            "kind": "step",
            "step": report.step,
            "epoch": (report.step - 1) / self.steps_per_epoch,
            "loss": report.loss,
            "lr": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "ms": {
                "data": ms(report.times.data),
                "forward": ms(report.times.forward),
                "backward": ms(report.times.backward),
                "optimizer": ms(report.times.optimizer),
            },
        }))
    }

    fn describe(&self, report: &StepReport, pace: &Pace, trivial_loss: f64) -> String {
        let epoch = (report.step - 1) / self.steps_per_epoch + 1;
        let [data, forward, backward, optimizer] = pace.shares();
        format!(
            "epoch {epoch}/{} · loss {:.4} (trivial {trivial_loss:.4}) · lr {:.1e} · {:.0} images/s · data {data:.0} % \
             forward {forward:.0} % backward {backward:.0} % optimiser {optimizer:.0} %",
            self.config.optim.epochs,
            report.loss,
            report.learning_rate,
            pace.images_per_s(self.config.optim.batch_size),
        )
    }

    fn end_of_epoch<M: PretrainModel>(
        &self,
        state: &TrainState<M>,
        events: &mut Events,
    ) -> Result<()> {
        let epoch = state.step / self.steps_per_epoch;
        let mut event = json!({"kind": "epoch", "epoch": epoch - 1, "step": state.step});
        for (name, value) in state.model.metrics() {
            event[name] = value.into();
        }
        let every = self.config.run.watch_every as u64;
        let last = epoch == self.config.optim.epochs as u64;
        if every > 0 && (epoch.is_multiple_of(every) || last) {
            self.watch(state.model.encoder(), &mut event)?;
            self.around.observer.note(&describe_watch(epoch, &event));
        }
        events.append(&event)?;
        match event["effective_rank"].as_f64() {
            Some(rank) if rank < self.config.run.rank_floor => Err(Error::Collapsed {
                epoch,
                rank,
                floor: self.config.run.rank_floor,
            }),
            _ => Ok(()),
        }
    }

    /// Adds rank, spread and, where there are labels, k-NN accuracy of the features as they are now.
    fn watch(&self, encoder: &Encoder, event: &mut serde_json::Value) -> Result<()> {
        let config = ProbeConfig {
            image_size: self.config.image_size,
            stride: self.config.encoder.stride,
            seed: self.config.seed,
            epochs: 0,
            search: false,
            memory_mib: 0,
        };
        let silent = crate::observe::Silent;
        let classes = &self.dataset.classes;
        let limit = self.config.run.watch_images;
        let part = |indices: &[usize]| -> Result<Part> {
            let labelled = Part::labelled(self.dataset, indices, classes)?;
            Ok(labelled.limit(limit, self.config.seed))
        };
        let (train, held_out) = (part(&self.dataset.train)?, part(&self.dataset.held_out)?);
        if train.indices.is_empty() || held_out.indices.is_empty() {
            let unlabelled = Part {
                dataset: self.dataset,
                indices: self.dataset.train.iter().copied().take(limit).collect(),
                labels: Vec::new(),
            };
            let features = probe::extract(encoder, &unlabelled, &config, false, &silent)?;
            add_statistics(event, &features);
            return Ok(());
        }
        let features = probe::extract(encoder, &train, &config, false, &silent)?;
        add_statistics(event, &features);
        let scored = probe::extract(encoder, &held_out, &config, false, &silent)?;
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

/// A run from its start or from a checkpoint to its end.
struct Course<'a> {
    run: &'a Run<'a>,
    from: Start,
}

impl WithModel for Course<'_> {
    type Output = Outcome;

    fn with<M: PretrainModel>(self, model: M) -> Result<Outcome> {
        self.run.train(model, self.from)
    }
}

/// Names of the images that the run has met as unreadable so far.
fn logged_bad_images(events: &[serde_json::Value]) -> BTreeSet<String> {
    events
        .iter()
        .filter(|event| event["kind"] == BAD_IMAGE)
        .filter_map(|event| event["name"].as_str().map(str::to_owned))
        .collect()
}

fn add_statistics(event: &mut serde_json::Value, features: &probe::Features) {
    let statistics = probe::feature_statistics(features);
    event["effective_rank"] = statistics.effective_rank.into();
    event["spread"] = statistics.spread.into();
}

fn describe_watch(epoch: u64, event: &serde_json::Value) -> String {
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

/// Time of the steps so far; the first is left out, it warms caches.
#[derive(Default)]
struct Pace {
    steps: u64,
    times: StepTimes,
}

impl Pace {
    fn add(&mut self, times: &StepTimes) {
        if self.steps == 1 {
            self.times = StepTimes::default();
        }
        self.steps += 1;
        self.times.data += times.data;
        self.times.forward += times.forward;
        self.times.backward += times.backward;
        self.times.optimizer += times.optimizer;
    }

    fn images_per_s(&self, batch_size: usize) -> f64 {
        let counted = self.steps.saturating_sub(1).max(1);
        (counted as usize * batch_size) as f64 / self.times.total().as_secs_f64().max(1e-9)
    }

    fn shares(&self) -> [f64; 4] {
        let total = self.times.total().as_secs_f64().max(1e-9);
        [
            self.times.data,
            self.times.forward,
            self.times.backward,
            self.times.optimizer,
        ]
        .map(|part| 100.0 * part.as_secs_f64() / total)
    }
}
