//! `qbheat pretrain`

use std::path::PathBuf;

use clap::Args;
use qbheat::data::{Dataset, ImageSize};
use qbheat::error::Result;
use qbheat::observe::Observer;
use qbheat::pretrain;
use qbheat::train::{RunFolder, Surroundings};

use super::progress::Progress;
use super::{Answer, Common, Settings, answer_of_run, compute_as, describe_data, signals};

#[derive(Args)]
pub struct Pretrain {
    /// A folder of images, a .tar of them, shards as in 'shard-{000..009}.tar', or builtin:cifar10.
    #[arg(long)]
    data: PathBuf,
    /// The run folder to make.
    #[arg(long)]
    out: PathBuf,
    /// How to pre-train: qb-heat, moco-v2, or supervised, which needs labels [default: qb-heat].
    #[arg(long)]
    method: Option<String>,
    /// The network to pre-train; `qbheat encoders` lists them [default: mobilenet-tiny].
    #[arg(long)]
    encoder: Option<String>,
    /// A run or an encoder.safetensors to start from.
    #[arg(long)]
    init: Option<String>,
    /// Size of the images: a side in pixels, or HEIGHTxWIDTH [default: 64].
    #[arg(long)]
    image_size: Option<ImageSize>,
    /// 1 to see luma only, 3 for colour [default: 3].
    #[arg(long)]
    channels: Option<usize>,
    /// Passes over the images [default: 100].
    #[arg(long)]
    epochs: Option<usize>,
    /// Images a step [default: 128].
    #[arg(long)]
    batch_size: Option<usize>,
    /// A TOML file of settings; flags and --set win over it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A setting, such as optim.learning_rate=3e-3; may be given often.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    #[command(flatten)]
    pub common: Common,
}

impl Pretrain {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let config = Settings::default()
            .common(&self.common)
            .add("data.path", Some(self.data.display()))
            .add("method", self.method.as_ref())
            .add("encoder.name", self.encoder.as_ref())
            .add("encoder.init", self.init.as_ref())
            .add("image_size", self.image_size.map(ImageSize::to_toml))
            .add("data.channels", self.channels)
            .add("optim.epochs", self.epochs)
            .add("optim.batch_size", self.batch_size)
            .parsed(&self.settings)?
            .load(self.config.as_deref())?;
        compute_as(&config, &self.common)?;
        RunFolder::check_free(&self.out)?;
        let dataset = Dataset::open(&config.data, config.seed, progress)?;
        progress.note(&describe_data(&dataset));
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        let outcome = pretrain::start(&config, &dataset, &self.out, &around)?;
        Ok(answer_of_run(&outcome))
    }
}
