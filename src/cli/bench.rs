//! `qbheat bench`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qbheat::bench::{BenchConfig, Work, bench};
use qbheat::data::{Dataset, ImageSize};
use qbheat::error::Result;
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common, Settings, compute_as};

/// What is timed.
#[derive(Clone, Copy, ValueEnum)]
enum WorkName {
    /// A pre-training step.
    Pretrain,
    /// A supervised training step on whole images.
    Supervised,
    /// Feature extraction in evaluation mode.
    Features,
    /// Forward and backward pass of one transformer block on [N, 64, 192].
    Block,
}

impl From<WorkName> for Work {
    fn from(name: WorkName) -> Self {
        match name {
            WorkName::Pretrain => Self::Pretrain,
            WorkName::Supervised => Self::Supervised,
            WorkName::Features => Self::Features,
            WorkName::Block => Self::Block,
        }
    }
}

#[derive(Args)]
pub struct Bench {
    /// What to time.
    #[arg(long, value_enum, default_value = "pretrain")]
    work: WorkName,
    /// The network; `qbheat encoders` lists them [default: mobilenet-tiny].
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
    /// Folder or .tar file that the images come from [default: built-in ones].
    #[arg(long, default_value = qbheat::data::BUILTIN, hide_default_value = true)]
    data: String,
    /// Take the first batch again and again instead of loading new ones.
    #[arg(long)]
    one_batch: bool,
    /// Keep the weights before the first step and its batch here, as safetensors.
    #[arg(long, value_name = "FILE")]
    keep_step: Option<PathBuf>,
    /// A setting, such as qb_heat.decoder.depth=1; may be given often.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    #[command(flatten)]
    pub common: Common,
}

impl Bench {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let work = Work::from(self.work);
        let mut settings = Settings::default();
        settings
            .common(&self.common)
            .add("data.path", Some(&self.data))
            .add("encoder.name", self.encoder.as_ref())
            .add("encoder.stride", self.stride)
            .add("image_size", self.image_size.map(ImageSize::to_toml))
            .add("optim.batch_size", self.batch_size)
            .parsed(&self.settings)?;
        let config = match work {
            Work::Pretrain => settings.load(None)?,
            _ => settings.load_for_any_size()?,
        };
        compute_as(&config, &self.common)?;
        let how = BenchConfig {
            work,
            steps: self.steps.max(1),
            one_batch: self.one_batch,
            keep_step: self.keep_step.as_deref(),
        };
        let dataset = Dataset::open(&config.data, config.seed, progress)?;
        let result = bench(&config, &dataset, &how, progress)?;
        let peak = peak_memory_mib();
        let json = json!({
            "work": work,
            "encoder": config.encoder.name,
            "image_size": config.image_size,
            "stride": config.encoder.stride,
            "batch_size": config.optim.batch_size,
            "threads": config.threads,
            "steps": how.steps,
            "images_per_s": result.best,
            "images_per_s_median": result.median,
            "ms": result.milliseconds,
            "parameters": result.parameters,
            "first_loss": result.first_loss,
            "gflops": result.gflops,
            "peak_gflops": result.peak_gflops,
            "instructions": qbheat_kernels::instructions(),
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
                "{} at {} px, stride {}, batch {}, {} threads: {:.0} images/s at best, {:.0} in the median step ({}){memory}; {:.0} of {:.0} GFLOP/s that matrix products reach",
                config.encoder.name,
                config.image_size,
                config.encoder.stride,
                config.optim.batch_size,
                config.threads,
                result.best,
                result.median,
                parts.join(", "),
                result.gflops,
                result.peak_gflops,
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
