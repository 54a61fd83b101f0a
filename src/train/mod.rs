//! The one training loop: schedule, optimiser, checkpoints, run folder.

mod bad_step;
mod checkpoint;
mod course;
mod durable;
mod optimizer;
mod run_folder;
mod schedule;
mod training_loop;

use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::error::Result;

pub use bad_step::{KeptBatch, Replay, replay_step};
pub use checkpoint::{Checkpoint, Checkpoints, Position};
pub use course::{Course, Outcome, Start, Surroundings, Trainee};
pub(crate) use durable::create_folder;
#[cfg(test)]
pub(crate) use durable::fault;
pub use durable::write_durably;
pub use optimizer::{AdamW, AdamWConfig};
pub use run_folder::{BASELINE, CONFIG_FILE, ENCODER_FILE, Events, INDEX_FILE, RunFolder, RunLock};
pub use schedule::{LearningRate, Schedule};
pub use training_loop::{
    BadStep, StepReport, StepTimes, Stop, TrainState, give_up, settled, train,
};

/// How weights are updated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images a step.
    pub batch_size: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Epochs in which the learning rate rises linearly from 0; at most a tenth of all.
    pub warmup_epochs: f64,
    /// What the learning rate does afterwards.
    pub schedule: Schedule,
    /// Decoupled weight decay; not on norms, biases and tokens.
    pub weight_decay: f64,
    /// Decay rates of AdamW's two moving averages.
    pub betas: [f64; 2],
    /// Gradients longer than this over all parameters together are scaled down to it; 0 turns that off.
    pub clip_norm: f64,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            epochs: 100,
            batch_size: 128,
            learning_rate: 1e-3,
            warmup_epochs: 1.0,
            schedule: Schedule::Cosine,
            weight_decay: 0.05,
            betas: [0.9, 0.95],
            clip_norm: 3.0,
        }
    }
}

impl OptimConfig {
    /// The learning rate of each step.
    pub fn learning_rates(&self, steps_per_epoch: u64) -> LearningRate {
        LearningRate {
            peak: self.learning_rate,
            warmup_steps: (self.warmup_epochs * steps_per_epoch as f64).round() as u64,
            total_steps: self.epochs as u64 * steps_per_epoch,
            schedule: self.schedule,
        }
    }

    /// Whether every value is usable.
    pub(crate) fn check(&self) -> Result<()> {
        let share = |value: f64| (0.0..1.0).contains(&value);
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        require(self.epochs > 0, "optim.epochs", self.epochs, "at least 1")?;
        require(
            self.batch_size > 0,
            "optim.batch_size",
            self.batch_size,
            "at least 1",
        )?;
        require(
            not_negative(self.learning_rate) && self.learning_rate > 0.0,
            "optim.learning_rate",
            self.learning_rate,
            "a number above 0",
        )?;
        require(
            not_negative(self.warmup_epochs),
            "optim.warmup_epochs",
            self.warmup_epochs,
            "a number from 0 up",
        )?;
        require(
            not_negative(self.weight_decay),
            "optim.weight_decay",
            self.weight_decay,
            "a number from 0 up",
        )?;
        require(
            // The step computes with 32 bits, where what is next to 1 would be 1.
            self.betas
                .iter()
                .all(|&beta| share(beta) && (beta as f32) < 1.0),
            "optim.betas",
            format!("{:?}", self.betas),
            "two numbers from 0 to below 1",
        )?;
        require(
            not_negative(self.clip_norm),
            "optim.clip_norm",
            self.clip_norm,
            "a number from 0 up",
        )
    }
}

/// What is kept and watched during a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Steps between checkpoints; there is one at the end of each epoch as well.
    pub checkpoint_every: u64,
    /// How many of the newest checkpoints stay.
    pub keep_checkpoints: usize,
    /// How many steps with a loss or gradient that is not finite are passed over before the run stops.
    pub skip_non_finite: u64,
    /// Epochs between looks at the features (k-NN accuracy where there are labels, rank, spread); 0 for never.
    pub watch_every: usize,
    /// Images that such a look uses, for training and for scoring each.
    pub watch_images: usize,
    /// The run stops where such a look finds a smaller effective rank.
    pub rank_floor: f64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            checkpoint_every: 500,
            keep_checkpoints: 3,
            skip_non_finite: 0,
            watch_every: 5,
            watch_images: 2000,
            rank_floor: 0.0,
        }
    }
}

impl RunConfig {
    /// Whether every value is usable.
    pub(crate) fn check(&self) -> Result<()> {
        require(
            self.checkpoint_every > 0,
            "run.checkpoint_every",
            self.checkpoint_every,
            "at least 1",
        )?;
        require(
            self.keep_checkpoints > 0,
            "run.keep_checkpoints",
            self.keep_checkpoints,
            "at least 1",
        )?;
        require(
            self.watch_images >= 100,
            "run.watch_images",
            self.watch_images,
            "at least 100",
        )?;
        require(
            self.rank_floor.is_finite() && self.rank_floor >= 0.0,
            "run.rank_floor",
            self.rank_floor,
            "a number from 0 up",
        )?;
        require(
            self.rank_floor == 0.0 || self.watch_every > 0,
            "run.watch_every",
            self.watch_every,
            "at least 1 where run.rank_floor is above 0: nothing else looks at the rank",
        )
    }
}
