//! `qbheat resume`

use std::path::PathBuf;

use clap::Args;
use qbheat::config::{Base, DetectorConfig, is_detector};
use qbheat::detect::{self, Sets};
use qbheat::error::{Error, Result};
use qbheat::observe::Observer;
use qbheat::pretrain;
use qbheat::train::{RunFolder, Surroundings};

use super::detect::answer_of_detector;
use super::progress::Progress;
use super::{Answer, Common, OF_RUN, answer_of_run, compute_as, describe_data, signals};

#[derive(Args)]
pub struct Resume {
    /// The run folder.
    run: PathBuf,
    /// A larger number of epochs, for runs whose schedule says how to go on.
    #[arg(long)]
    epochs: Option<usize>,
    /// Go on also where images were added, are gone or have another size or class, with the images that are there now.
    #[arg(long)]
    accept_changed_data: bool,
    #[command(flatten)]
    pub common: Common,
}

impl Resume {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let run = RunFolder::open(&self.run)?;
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        if is_detector(&run)? {
            return self.detector(run, &around);
        }
        let config = pretrain::resumed_config(&run, self.epochs)?;
        self.compute_as(&config, progress)?;
        let dataset = pretrain::reopen_data(&run, &config, self.accept_changed_data, progress)
            .map_err(|error| error.called(OF_RUN))?;
        progress.note(&describe_data(&dataset));
        let outcome = pretrain::resume(run, &config, &dataset, &around)?;
        Ok(answer_of_run(&outcome))
    }

    fn detector(&self, run: RunFolder, around: &Surroundings) -> Result<Answer> {
        if self.epochs.is_some() || self.accept_changed_data {
            return Err(Error::Refused(
                "--epochs and --accept-changed-data: a detector goes on with the images and to the end that it was \
                 started with"
                    .into(),
            ));
        }
        let config = DetectorConfig::of_run(&run)?;
        self.compute_as(&config, around.observer)?;
        let sets = Sets::open(&config, around.observer).map_err(|error| error.called(OF_RUN))?;
        around.observer.note(&sets.describe());
        let outcome = detect::resume(run, &config, &sets, around)?;
        Ok(answer_of_detector(&outcome, &config))
    }

    fn compute_as(&self, config: &Base, observer: &dyn Observer) -> Result<()> {
        if let Some(seed) = self.common.seed.filter(|&seed| seed != config.seed) {
            return Err(Error::Refused(format!(
                "--seed {seed}: this run has seed {} and goes on with it",
                config.seed
            )));
        }
        let threads = self.common.threads.unwrap_or(config.threads);
        // The fused operations give the same on any number of threads.
        if threads != config.threads && !config.kernels {
            observer.note(&format!(
                "the run was started with {} threads; with {threads} its numbers may differ in the last digits from \
                 those of an uninterrupted run",
                config.threads
            ));
        }
        compute_as(config, &self.common)
    }
}
