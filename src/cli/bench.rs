//! `qbheat bench`

use clap::Args;
use qbheat::data::ImageSize;
use qbheat::error::Result;
use qbheat::pretrain::bench;
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common, Settings, use_threads};

#[derive(Args)]
pub struct Bench {
    /// The network.
    #[arg(long)]
    encoder: Option<String>,
    /// Size of the images: a side in pixels, or HEIGHTxWIDTH [default: 64].
    #[arg(long)]
    image_size: Option<ImageSize>,
    /// Image pixels a position of the feature map [default: what gives an 8×8 map].
    #[arg(long)]
    stride: Option<usize>,
    /// Images a step [default: 128].
    #[arg(long)]
    batch_size: Option<usize>,
    /// Steps that are timed, after two that are not.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// A setting, such as qb_heat.decoder.depth=1; may be given often.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    #[command(flatten)]
    pub common: Common,
}

impl Bench {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let config = Settings::default()
            .common(&self.common)
            .add("data.path", Some(qbheat::data::BUILTIN))
            .add("encoder.name", self.encoder.as_ref())
            .add("encoder.stride", self.stride)
            .add("image_size", self.image_size.map(ImageSize::to_toml))
            .add("optim.batch_size", self.batch_size)
            .parsed(&self.settings)?
            .load(None)?;
        use_threads(config.threads);
        let result = bench(&config, self.steps.max(1), progress)?;
        let peak = peak_memory_mib();
        let json = json!({
            "encoder": config.encoder.name,
            "image_size": config.image_size,
            "stride": config.encoder.stride,
            "batch_size": config.optim.batch_size,
            "threads": config.threads,
            "steps": self.steps.max(1),
            "images_per_s": result.best,
            "images_per_s_median": result.median,
            "ms": result.milliseconds,
            "peak_memory_mib": peak,
        });
        let parts: Vec<String> = result
            .milliseconds
            .iter()
            .map(|(part, ms)| format!("{part} {ms:.0} ms"))
            .collect();
        let memory = peak.map_or(String::new(), |mib| format!(", peak memory {mib} MiB"));
        Ok(Answer::done(
            json,
            format!(
                "{} at {} px, stride {}, batch {}, {} threads: {:.0} images/s at best, {:.0} in the median step ({}){memory}",
                config.encoder.name,
                config.image_size,
                config.encoder.stride,
                config.optim.batch_size,
                config.threads,
                result.best,
                result.median,
                parts.join(", "),
            ),
        ))
    }
}

/// Highest resident memory of this process, where the system tells.
fn peak_memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}
