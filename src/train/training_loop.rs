//! Steps, one after another.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Tensor;

use super::{AdamW, LearningRate};
use crate::error::{Error, Result};

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
    /// From batch to loss.
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

/// Trains until `rate.total_steps` steps are taken or `after` says stop.
///
/// `next` gives the batch of the next step, `loss` its loss, `[1]`. A loss or gradient that is not finite is an error,
/// and the weights stay as they were before that step.
pub fn train<M: Module, B>(
    mut state: TrainState<M>,
    rate: &LearningRate,
    mut next: impl FnMut() -> Result<B>,
    mut loss: impl FnMut(&M, B) -> Tensor<1>,
    mut after: impl FnMut(&TrainState<M>, &StepReport) -> Result<Stop>,
) -> Result<TrainState<M>> {
    while state.step < rate.total_steps {
        let start = Instant::now();
        let batch = next()?;
        let with_batch = Instant::now();
        let loss = loss(&state.model, batch);
        let value: f32 = loss.clone().into_scalar();
        let with_loss = Instant::now();
        let gradients = loss.backward();
        let with_gradients = Instant::now();
        let gradient_norm = AdamW::gradient_norm(&state.model, &gradients);
        if !(value.is_finite() && gradient_norm.is_finite()) {
            return Err(Error::NonFinite {
                step: state.step + 1,
                loss: f64::from(value),
                gradient_norm,
            });
        }
        let learning_rate = rate.at(state.step);
        state.model = state
            .optimizer
            .step(state.model, gradients, gradient_norm, learning_rate);
        state.step += 1;
        let report = StepReport {
            step: state.step,
            loss: value,
            learning_rate,
            gradient_norm,
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
