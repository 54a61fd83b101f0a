//! What all runs that train something have in common.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::layers::{Choice, names};
use crate::data::{DataConfig, ImageSize, SplitChoice};
use crate::device::Compute;
use crate::encoder::{self, EncoderSpec};
use crate::error::{Error, Result};
use crate::train::{OptimConfig, RunConfig, Schedule};
use crate::weights::ImageForm;

/// Seed, machine, images, encoder and course of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Base {
    /// Decides all that is random.
    pub seed: u64,
    /// Threads of the training step; 0 takes all cores.
    pub threads: usize,
    /// What computes: `cpu`, `wgpu` or `cuda[:N]`.
    pub device: Compute,
    /// Computes with the fused operations of `qbheat-kernels`, where the device has them; without, with Burn's own.
    pub kernels: bool,
    /// Size in pixels of the images the network sees: a side, or `[height, width]`.
    pub image_size: ImageSize,
    /// Where images come from and how they are prepared.
    pub data: DataConfig,
    /// The network to pre-train.
    pub encoder: EncoderConfig,
    /// How weights are updated.
    pub optim: OptimConfig,
    /// What is kept and watched along the way.
    pub run: RunConfig,
}

/// Which encoder, at which stride, from which weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncoderConfig {
    /// A name from [`encoder::all`].
    pub name: String,
    /// Image pixels per position of the feature map; 0 chooses the one that gives an 8×8 map.
    pub stride: usize,
    /// A run folder or an `encoder.safetensors` to start from; empty for fresh weights.
    pub init: PathBuf,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            name: "mobilenet-tiny".to_owned(),
            stride: 0,
            init: PathBuf::new(),
        }
    }
}

impl Default for Base {
    fn default() -> Self {
        Self {
            seed: 0,
            threads: 0,
            device: Compute::Cpu,
            kernels: true,
            image_size: ImageSize::square(64),
            data: DataConfig::default(),
            encoder: EncoderConfig::default(),
            optim: OptimConfig::default(),
            run: RunConfig::default(),
        }
    }
}

impl Base {
    pub(super) fn choices() -> Vec<Choice> {
        vec![
            ("data.split", names(&[SplitChoice::Own, SplitChoice::Drawn])),
            (
                "optim.schedule",
                names(&[Schedule::Cosine, Schedule::Constant]),
            ),
        ]
    }

    /// Fills in what depends on the machine or on other keys, a stride of 0 by `default_stride` of the encoder and the
    /// images' shorter side, and checks every value.
    pub(super) fn resolve(
        &mut self,
        default_stride: impl Fn(&EncoderSpec, usize) -> usize,
    ) -> Result<()> {
        if self.threads == 0 {
            self.threads = std::thread::available_parallelism().map_or(1, usize::from);
        }
        // A later command may be given in another folder.
        for path in [&mut self.data.path, &mut self.encoder.init] {
            make_absolute(path)?;
        }
        let encoder = encoder::find(&self.encoder.name)?;
        if self.encoder.stride == 0 {
            self.encoder.stride = default_stride(encoder, self.image_size.shorter());
        }
        encoder.check_stride(self.encoder.stride)?;
        self.data.check()?;
        self.optim.check()?;
        let longest_warmup = self.optim.epochs as f64 / 10.0;
        self.optim.warmup_epochs = self.optim.warmup_epochs.min(longest_warmup);
        self.run.check()
    }

    /// The images that the network sees.
    pub fn images(&self) -> ImageForm {
        ImageForm {
            size: self.image_size,
            channels: self.data.channels,
            stride: self.encoder.stride,
        }
    }
}

/// Names of what is inside the program stay as they are.
pub(super) fn make_absolute(path: &mut PathBuf) -> Result<()> {
    let is_name = path
        .to_str()
        .is_some_and(|text| text.is_empty() || text.starts_with("builtin:"));
    if !is_name {
        *path = std::path::absolute(&*path).map_err(Error::io(path))?;
    }
    Ok(())
}
