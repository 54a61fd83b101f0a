//! A run's course: what surrounds each step of the training loop, whatever is trained.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde_json::{Value, json};

use super::{
    AdamW, AdamWConfig, Checkpoint, Checkpoints, Events, KeptBatch, Position, RunFolder, RunLock,
    StepReport, StepTimes, Stop, TrainState, bad_step, train,
};
use crate::config::Base;
use crate::data::BadImage;
use crate::error::{Error, Result};
use crate::observe::Observer;

/// Kind of the event that an image became unreadable.
const BAD_IMAGE: &str = "bad-image";

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The run folder.
    pub run: PathBuf,
    /// Steps taken in all.
    pub steps: u64,
    /// Steps that were planned.
    pub planned: u64,
    /// Loss of the first step that this process took, and of the last.
    pub losses: Option<(f32, f32)>,
    /// Images a second over the steps that this process took; 0 where it took none.
    pub images_per_s: f64,
    /// Images that became unreadable during the run, so that others stood in for them.
    pub bad_images: usize,
}

impl Outcome {
    /// Whether it was stopped before its end.
    pub fn stopped(&self) -> bool {
        self.steps < self.planned
    }
}

/// What surrounds a run.
pub struct Surroundings<'a> {
    /// Told how it goes.
    pub observer: &'a dyn Observer,
    /// Asked after each step whether to stop.
    pub stop: &'a dyn Fn() -> bool,
}

/// What a run trains and on what: where kinds of runs differ.
pub trait Trainee {
    /// The network.
    type Model: Module;
    /// What a step sees.
    type Batch;
    /// What the run does, for people.
    const STAGE: &'static str;

    /// The batch of the next step, and the images for which others had to stand in.
    fn next_batch(&mut self) -> Result<(Self::Batch, Vec<BadImage>)>;
    /// Its loss, `[1]`.
    fn loss(&mut self, model: &Self::Model, batch: &Self::Batch) -> Tensor<1>;
    /// The network after an update.
    fn settle(&self, model: Self::Model) -> Self::Model {
        model
    }
    /// Adds to the event of a step what there is to know of its loss.
    fn add_figures(&self, _event: &mut Value) {}
    /// How the last step stands, in words; empty for nothing.
    fn remark(&self) -> String;
    /// Adds to the event of an epoch, counted from 1, what the network is worth after it.
    fn end_of_epoch(&mut self, epoch: u64, model: &Self::Model, event: &mut Value) -> Result<()>;
    /// The batch that follows `step` steps, to be kept.
    fn keep_batch(&self, step: u64) -> Result<KeptBatch>;
}

/// Where a run begins or goes on.
#[allow(clippy::large_enum_variant, reason = "there is one a run")]
pub enum Start<M> {
    /// At its first step; the log begins with an event of what needs no learning.
    Anew(M, Value),
    /// Where a checkpoint was written; with a network of the same form.
    After(M, Checkpoint),
}

impl<M> Start<M> {
    /// Steps taken before.
    pub fn steps(&self) -> u64 {
        match self {
            Self::Anew(..) => 0,
            Self::After(_, checkpoint) => checkpoint.position.step,
        }
    }
}

/// One run, from its folder to its last step.
pub struct Course<'a> {
    folder: RunFolder,
    base: &'a Base,
    around: &'a Surroundings<'a>,
    steps_per_epoch: u64,
    data: String,
    checkpoints: Checkpoints,
    _lock: RunLock,
}

impl<'a> Course<'a> {
    /// Locks the run. `data` is the fingerprint of its images.
    pub fn new(
        folder: RunFolder,
        base: &'a Base,
        steps_per_epoch: u64,
        data: String,
        around: &'a Surroundings<'a>,
    ) -> Result<Self> {
        Ok(Self {
            _lock: folder.lock()?,
            checkpoints: folder.checkpoints(base.run.keep_checkpoints),
            folder,
            base,
            around,
            steps_per_epoch,
            data,
        })
    }

    /// The run's folder.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// Who is told how it goes.
    pub fn observer(&self) -> &'a dyn Observer {
        self.around.observer
    }

    /// The newest checkpoint that verifies; nothing where the run died before its first. Refused where it belongs to
    /// another seed or to other images, or where steps were taken and no checkpoint is left.
    pub fn newest(&self) -> Result<Option<Checkpoint>> {
        let observer = self.around.observer;
        if self.checkpoints.is_empty()? {
            let events = self.folder.read_events()?;
            if events.iter().any(|event| event["kind"] == "step") {
                return Err(Error::NoCheckpoint {
                    path: self.folder.path().to_owned(),
                    problems: ": there is none, though steps were taken".into(),
                });
            }
            observer.note("the run died before its first checkpoint; beginning anew");
            return Ok(None);
        }
        let checkpoint = self.checkpoints.newest_valid(observer)?;
        let position = &checkpoint.position;
        let found = (position.seed, position.steps_per_epoch);
        let expected = (self.base.seed, self.steps_per_epoch);
        // Other images, which are only let pass where that was asked for, may make longer or shorter epochs.
        let same_data = [String::new(), self.data.clone()].contains(&position.data);
        if found.0 != expected.0 || found.1 != expected.1 && same_data {
            return Err(Error::Foreign {
                path: self.folder.path().to_owned(),
                message: format!(
                    "its checkpoint belongs to seed {} and {} steps an epoch, configuration and data now give seed {} \
                     and {} steps; restore them as they were",
                    found.0, found.1, expected.0, expected.1
                ),
            });
        }
        observer.note(&format!(
            "going on after step {} of {}",
            position.step,
            self.base.optim.epochs as u64 * expected.1
        ));
        Ok(Some(checkpoint))
    }

    /// Takes steps until all are taken or it is asked to stop; the network as it is then.
    pub fn go<T: Trainee>(
        &self,
        trainee: &mut T,
        optimizer: AdamWConfig,
        device: &Device,
        from: Start<T::Model>,
    ) -> Result<(T::Model, Outcome)> {
        let (state, events) = match from {
            Start::Anew(model, baseline) => {
                let mut events = self.folder.events(0)?;
                events.append(&baseline)?;
                let state = TrainState {
                    model,
                    optimizer: AdamW::new(optimizer),
                    step: 0,
                };
                // A run that dies before its first regular checkpoint can then be resumed too.
                self.save(&state, &mut events)?;
                (state, events)
            }
            Start::After(model, checkpoint) => (
                checkpoint.restore(model, optimizer, device)?,
                self.folder.events(checkpoint.position.events_bytes)?,
            ),
        };
        let rate = self.base.optim.learning_rates(self.steps_per_epoch);
        let mut pace = Pace::default();
        let mut losses: Option<(f32, f32)> = None;
        let logged = self.folder.read_events()?;
        let mut bad_images = logged_bad_images(&logged);
        let mut bad_steps = bad_step::logged(&logged);
        let (events, passed_over) = (RefCell::new(events), RefCell::new(Vec::new()));
        let trainee = RefCell::new(trainee);
        let observer = self.around.observer;
        observer.begin(T::STAGE, rate.total_steps);
        let state = train(
            state,
            &rate,
            || {
                let (batch, mut bad) = trainee.borrow_mut().next_batch()?;
                passed_over.borrow_mut().append(&mut bad);
                Ok(batch)
            },
            |model: &T::Model, batch| trainee.borrow_mut().loss(model, &batch),
            |model| trainee.borrow().settle(model),
            |state, step| {
                bad_steps += 1;
                let events = &mut *events.borrow_mut();
                self.keep_bad_step(&**trainee.borrow(), state, step, bad_steps, events)
            },
            |state, report| {
                let events = &mut *events.borrow_mut();
                let trainee = &mut **trainee.borrow_mut();
                for bad in passed_over.take() {
                    if bad_images.insert(bad.name.clone()) {
                        self.log_bad_image(&bad, events)?;
                    }
                }
                if !report.skipped {
                    losses = Some((losses.map_or(report.loss, |(first, _)| first), report.loss));
                    pace.add(&report.times);
                    let mut event = self.step_event(report);
                    trainee.add_figures(&mut event);
                    events.append(&event)?;
                }
                let remark = trainee.remark();
                observer.progress(report.step, &self.describe(report, &pace, &remark));
                if state.step.is_multiple_of(self.steps_per_epoch) {
                    self.end_of_epoch(trainee, state, events)?;
                }
                let stop = (self.around.stop)();
                let last = state.step == rate.total_steps;
                let due = state.step.is_multiple_of(self.base.run.checkpoint_every)
                    || state.step.is_multiple_of(self.steps_per_epoch);
                if due || stop || last {
                    self.save(state, events)?;
                }
                Ok(if stop { Stop::Now } else { Stop::No })
            },
        );
        observer.end();
        let state = state?;
        let outcome = Outcome {
            run: self.folder.path().to_owned(),
            steps: state.step,
            planned: rate.total_steps,
            losses,
            images_per_s: pace.images_per_s(self.base.optim.batch_size),
            bad_images: bad_images.len(),
        };
        Ok((state.model, outcome))
    }

    fn keep_bad_step<T: Trainee>(
        &self,
        trainee: &T,
        state: &TrainState<T::Model>,
        bad: &super::BadStep,
        count: u64,
        events: &mut Events,
    ) -> Result<()> {
        let allowed = self.base.run.skip_non_finite;
        // The batch is a function of the step: made again rather than kept at every step.
        let batch = trainee.keep_batch(state.step)?;
        let skipped = count <= allowed;
        bad_step::log(bad, skipped, events)?;
        let position = self.position(state.step, events)?;
        bad_step::keep(&self.folder, state, bad, batch, position)?;
        if !skipped {
            return Err(bad.error());
        }
        self.around.observer.note(&format!(
            "step {} passed over: loss {}, gradient norm {} ({count} of {allowed} that run.skip_non_finite allows)",
            bad.step, bad.loss, bad.gradient_norm
        ));
        Ok(())
    }

    fn log_bad_image(&self, bad: &BadImage, events: &mut Events) -> Result<()> {
        let BadImage { name, reason } = bad;
        self.around.observer.note(&format!(
            "became unreadable, another image stands in: {name}: {reason}"
        ));
        events.append(&json!({"kind": BAD_IMAGE, "name": name, "reason": reason}))
    }

    fn save<M: Module>(&self, state: &TrainState<M>, events: &mut Events) -> Result<()> {
        let position = self.position(state.step, events)?;
        self.checkpoints.save(state, position)
    }

    fn position(&self, step: u64, events: &mut Events) -> Result<Position> {
        Ok(Position {
            step,
            steps_per_epoch: self.steps_per_epoch,
            seed: self.base.seed,
            events_bytes: events.sync()?,
            data: self.data.clone(),
        })
    }

    fn step_event(&self, report: &StepReport) -> Value {
        let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
        json!({
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
        })
    }

    fn describe(&self, report: &StepReport, pace: &Pace, remark: &str) -> String {
        let epoch = (report.step - 1) / self.steps_per_epoch + 1;
        let [data, forward, backward, optimizer] = pace.shares();
        format!(
            "epoch {epoch}/{} · loss {:.4}{remark} · lr {:.1e} · {:.0} images/s · data {data:.0} % \
             forward {forward:.0} % backward {backward:.0} % optimiser {optimizer:.0} %",
            self.base.optim.epochs,
            report.loss,
            report.learning_rate,
            pace.images_per_s(self.base.optim.batch_size),
        )
    }

    fn end_of_epoch<T: Trainee>(
        &self,
        trainee: &mut T,
        state: &TrainState<T::Model>,
        events: &mut Events,
    ) -> Result<()> {
        let epoch = state.step / self.steps_per_epoch;
        let mut event = json!({"kind": "epoch", "epoch": epoch - 1, "step": state.step});
        let verdict = trainee.end_of_epoch(epoch, &state.model, &mut event);
        events.append(&event)?;
        verdict
    }
}

/// Names of the images that the run has met as unreadable so far.
fn logged_bad_images(events: &[Value]) -> BTreeSet<String> {
    events
        .iter()
        .filter(|event| event["kind"] == BAD_IMAGE)
        .filter_map(|event| event["name"].as_str().map(str::to_owned))
        .collect()
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
        if self.steps == 0 {
            return 0.0;
        }
        let counted = (self.steps - 1).max(1);
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
