//! `qbheat report`

use std::path::PathBuf;

use clap::Args;
use qbheat::data::Dataset;
use qbheat::error::Result;
use qbheat::pretrain::resumed_config;
use qbheat::report::write_report;
use qbheat::train::RunFolder;
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common, compute_as};

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
        let config = resumed_config(&run, None)?;
        compute_as(&config, &self.common)?;
        let dataset = Dataset::open(&config.data, config.seed, progress)?;
        let path = write_report(&run, &config, &dataset)?;
        let text = path.display().to_string();
        Ok(Answer::done(json!({"run": self.run, "report": path}), text))
    }
}
