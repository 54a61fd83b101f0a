//! Steps, one after another.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Gradients, Tensor};

use super::{AdamW, LearningRate};
use crate::error::{Error, Result};
use crate::nn::RunningStatistics;

/// What a training run is made of, apart from its data.
pub struct TrainState<M> {
    /// The network that is trained, on an autodiff device.
    pub model: M,
    /// Its optimiser.
    pub optimizer: AdamW,
    /// Steps taken so far.
    pub step: u64,
}

/// Where the time of a step went.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepTimes {
    /// Waiting for the batch.
    pub data: Duration,
    /// From batch to loss; with the backward passes of a batch's parts where each has a graph of its own.
    pub forward: Duration,
    /// From loss to gradients.
    pub backward: Duration,
    /// From gradients to new weights.
    pub optimizer: Duration,
}

impl StepTimes {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.data + self.forward + self.backward + self.optimizer
    }
}

/// What happened in a step.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Counted from 1.
    pub step: u64,
    /// Loss of the batch, before the update.
    pub loss: f32,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Whether there was no update, because loss or gradients were not finite.
    pub skipped: bool,
    /// Where the time went.
    pub times: StepTimes,
}

/// Whether to go on after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Take the next step.
    No,
    /// Return to the caller now.
    Now,
}

/// A step whose loss or whose gradients are not all finite.
pub struct BadStep<'a> {
    /// Counted from 1.
    pub step: u64,
    /// Loss of the batch.
    pub loss: f32,
    /// Norm of all gradients.
    pub gradient_norm: f64,
    /// The gradients.
    pub gradients: &'a Gradients,
}

impl BadStep<'_> {
    /// As the error that ends training.
    pub fn error(&self) -> Error {
        Error::NonFinite {
            step: self.step,
            loss: f64::from(self.loss),
            gradient_norm: self.gradient_norm,
        }
    }
}

/// For [`train`]: an update is all there is.
pub fn settled<M>(model: M) -> M {
    model
}

/// For [`train`]: a bad step ends training.
pub fn give_up<M>(_state: &TrainState<M>, bad: &BadStep) -> Result<()> {
    Err(bad.error())
}

/// Trains until `rate.total_steps` steps are taken or `after` says stop.
///
/// `next` gives the batch of the next step, `loss` its loss, `[1]`; `settle` has the network after each update. Where the loss or a gradient is not finite, the
/// network stays as it was before that step, running statistics included, and `bad` decides: an error ends training,
/// else the step counts as taken and the next one follows.
pub fn train<M: Module, B>(
    mut state: TrainState<M>,
    rate: &LearningRate,
    mut next: impl FnMut() -> Result<B>,
    mut loss: impl FnMut(&M, B) -> Tensor<1>,
    mut settle: impl FnMut(M) -> M,
    mut bad: impl FnMut(&TrainState<M>, &BadStep) -> Result<()>,
    mut after: impl FnMut(&TrainState<M>, &StepReport) -> Result<Stop>,
) -> Result<TrainState<M>> {
    while state.step < rate.total_steps {
        let start = Instant::now();
        let batch = next()?;
        let with_batch = Instant::now();
        let statistics = RunningStatistics::of(&state.model);
        let loss = loss(&state.model, batch);
        let value: f32 = loss.clone().into_scalar();
        let with_loss = Instant::now();
        let gradients = loss.backward();
        let with_gradients = Instant::now();
        let gradient_norm = AdamW::gradient_norm(&state.model, &gradients);
        let learning_rate = rate.at(state.step);
        let skipped = !(value.is_finite() && gradient_norm.is_finite());
        if skipped {
            state.model = statistics.restore(state.model);
            let step = BadStep {
                step: state.step + 1,
                loss: value,
                gradient_norm,
                gradients: &gradients,
            };
            bad(&state, &step)?;
            state.optimizer.skip_step();
        } else {
            let updated =
                state
                    .optimizer
                    .step(state.model, gradients, gradient_norm, learning_rate);
            state.model = settle(updated);
        }
        state.step += 1;
        let report = StepReport {
            step: state.step,
            loss: value,
            learning_rate,
            gradient_norm,
            skipped,
            times: StepTimes {
                data: with_batch - start,
                forward: with_loss - with_batch,
                backward: with_gradients - with_loss,
                optimizer: with_gradients.elapsed(),
            },
        };
        if after(&state, &report)? == Stop::Now {
            break;
        }
    }
    Ok(state)
}
