//! `qbheat report`

use std::path::PathBuf;

use clap::Args;
use qbheat::config::is_detector;
use qbheat::data::Dataset;
use qbheat::detect::{EvaluationConfig, Sets, baselines, evaluate};
use qbheat::error::Result;
use qbheat::pretrain::resumed_config;
use qbheat::report::{DetectionReport, write_detection_report, write_report};
use qbheat::train::RunFolder;
use serde_json::json;

use super::detect::open_trained;
use super::progress::Progress;
use super::{Answer, Common, OF_RUN, compute_as};

#[derive(Args)]
pub struct Report {
    /// The run folder.
    run: PathBuf,
    #[command(flatten)]
    pub common: Common,
}

impl Report {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let run = RunFolder::open(&self.run)?;
        let path = match is_detector(&run)? {
            true => self.of_detector(&run, progress)?,
            false => self.of_pretraining(&run, progress)?,
        };
        let text = path.display().to_string();
        Ok(Answer::done(json!({"run": self.run, "report": path}), text))
    }

    fn of_pretraining(&self, run: &RunFolder, progress: &Progress) -> Result<PathBuf> {
        let config = resumed_config(run, None)?;
        compute_as(&config, &self.common)?;
        let dataset = Dataset::open(&config.data, config.seed, progress)
            .map_err(|error| error.called(OF_RUN))?;
        write_report(run, &config, &dataset, progress)
    }

    fn of_detector(&self, run: &RunFolder, progress: &Progress) -> Result<PathBuf> {
        let trained = open_trained(run.path(), &self.common, progress)?;
        let sets = Sets::open(&trained.config, progress).map_err(|error| error.called(OF_RUN))?;
        trained.check_images(&sets)?;
        let how = EvaluationConfig::new(trained.config.image_size);
        let found = evaluate(&trained.detector, &sets.val, &how, progress)?;
        write_detection_report(&DetectionReport {
            run,
            facts: trained.facts(&sets),
            train: &sets.train,
            held_out: &sets.val,
            predictions: &found.predictions,
            score: &found.score,
            baselines: &baselines(&sets.train, &sets.val, trained.config.seed)?,
            confidence: how.confidence,
        })
    }
}
