//! `qbheat replay`

use std::path::PathBuf;

use clap::Args;
use qbheat::config::{DetectorConfig, is_detector};
use qbheat::error::Result;
use qbheat::train::{Replay as Replayed, RunFolder};
use qbheat::{detect, pretrain};
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common, compute_as};

#[derive(Args)]
pub struct Replay {
    /// The run folder.
    run: PathBuf,
    #[command(flatten)]
    pub common: Common,
}

impl Replay {
    pub fn run(&self, _progress: &Progress) -> Result<Answer> {
        let run = RunFolder::open(&self.run)?;
        let replay = if is_detector(&run)? {
            let config = DetectorConfig::of_run(&run)?;
            compute_as(&config, &self.common)?;
            detect::replay(&run, &config)?
        } else {
            let config = pretrain::resumed_config(&run, None)?;
            compute_as(&config, &self.common)?;
            pretrain::replay(&run, &config)?
        };
        let json = json!({"run": self.run, "same": replay.is_same(), "replay": replay});
        Ok(Answer::done(json, describe(&replay)))
    }
}

fn describe(replay: &Replayed) -> String {
    let list = |names: &[String]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let [loss, norm] = &replay.replayed;
    let same = if replay.is_same() {
        "as it had been".to_owned()
    } else {
        let [loss, norm] = &replay.recorded;
        format!("in the run it had been {loss} and {norm}")
    };
    let largest: Vec<String> = replay
        .largest_gradients
        .iter()
        .map(|(name, norm)| format!("  {norm:.3e}  {name}"))
        .collect();
    format!(
        "step {}: loss {loss}, gradient norm {norm}, {same}\nimages: {}\nimages with pixels that are not finite: {}\n\
         parameters that are not finite: {}\nparameters whose gradient is not finite: {}\n\
         largest finite gradients:\n{}",
        replay.step,
        list(&replay.files),
        list(&replay.bad_pixels),
        list(&replay.bad_parameters),
        list(&replay.bad_gradients),
        largest.join("\n")
    )
}
