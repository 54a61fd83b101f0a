//! Encoder weights: where a command gets them from, and the file they are kept in.

use std::io::ErrorKind;
use std::path::Path;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::config::{Base, Config, EncoderConfig, refuse_detector};
use crate::data::{ImageSize, colour_statistics};
use crate::encoder::{self, Build, Encoder};
use crate::error::{Error, Result};
use crate::nn::{Init, StateDict};
use crate::train::{ENCODER_FILE, RunFolder, write_durably};

const FORMAT: u32 = 1;
const UNTRAINED: &str = "untrained:";

/// The encoder that comes with the program, as `tools/shipped.toml` makes it.
pub const SHIPPED: &str = "builtin:mobilenet-tiny-cifar10";

/// How it was trained, for readers.
pub const SHIPPED_TRAINING: &str = "pre-trained for 90 epochs of 50,000 images";

static SHIPPED_FILE: &[u8] = include_bytes!("../assets/mobilenet-tiny-cifar10.safetensors");

/// What `encoder.safetensors` says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    /// Version of this description.
    pub format: u32,
    /// Name of the architecture.
    pub encoder: String,
    /// Image pixels a position of the feature map.
    pub stride: usize,
    /// Channels of the feature map.
    pub channels: usize,
    /// Size of the images it was trained with: a side, or `[height, width]`.
    pub image_size: ImageSize,
    /// Mean of each channel of the image, to be subtracted from values between 0 and 1.
    pub mean: Vec<f32>,
    /// Deviation of each channel, to divide by.
    pub std: Vec<f32>,
    /// Pre-training method.
    pub method: String,
    /// Epochs it was trained for.
    pub epochs: usize,
    /// Seed of the run.
    pub seed: u64,
}

/// The images that a network is given, and what it makes of them.
#[derive(Clone, Copy, Debug)]
pub struct ImageForm {
    /// Height and width.
    pub size: ImageSize,
    /// 1 or 3.
    pub channels: usize,
    /// Image pixels a position of the feature map; 0 chooses the one that fits the size.
    pub stride: usize,
}

impl Metadata {
    /// The images that the encoder takes, of the size it was trained with.
    pub fn images(&self) -> ImageForm {
        ImageForm {
            size: self.image_size,
            channels: self.mean.len(),
            stride: self.stride,
        }
    }
}

/// An encoder and what is known of it.
pub struct Weights {
    /// The network, on an autodiff device.
    pub encoder: Encoder,
    /// Its description.
    pub metadata: Metadata,
    /// What the user called it.
    pub name: String,
    /// The run it belongs to, where it was given as one.
    pub run: Option<RunFolder>,
}

impl Weights {
    /// From a run folder, an `encoder.safetensors`, `untrained:ENCODER` or [`SHIPPED`]. Untrained weights follow from
    /// `seed`, for images as `images` has them.
    pub fn open(name: &str, seed: u64, images: ImageForm) -> Result<Self> {
        if let Some(encoder) = name.strip_prefix(UNTRAINED) {
            return Self::untrained(encoder, seed, images);
        }
        if name == SHIPPED {
            return Self::from_bytes(SHIPPED_FILE, Path::new(name));
        }
        if name.starts_with("builtin:") {
            return Err(Error::unknown("built-in weights", name, [SHIPPED]));
        }
        let path = Path::new(name);
        if path.is_file() {
            let bytes = std::fs::read(path).map_err(Error::io(path))?;
            return Self::from_bytes(&bytes, path);
        }
        let run = RunFolder::open(path)?;
        refuse_detector(&run)?;
        let file = run.file(ENCODER_FILE);
        let bytes = std::fs::read(&file).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::Foreign {
                path: path.to_owned(),
                message: format!(
                    "the run has no {ENCODER_FILE} yet; finish it with `qbheat resume {}`",
                    path.display()
                ),
            },
            _ => Error::io(&file)(error),
        })?;
        let mut weights = Self::from_bytes(&bytes, &file)?;
        weights.name = name.to_owned();
        weights.run = Some(run);
        Ok(weights)
    }

    fn untrained(name: &str, seed: u64, images: ImageForm) -> Result<Self> {
        let device = crate::device().autodiff();
        let spec = encoder::find(name)?;
        let stride = match images.stride {
            0 => spec.default_stride(images.size.shorter()),
            stride => stride,
        };
        let build = Build {
            stride,
            inputs: images.channels,
        };
        let encoder = spec.build(build, &mut Init::new(seed, &device))?;
        let (mean, std) = colour_statistics(images.channels);
        Ok(Self {
            metadata: Metadata {
                format: FORMAT,
                encoder: name.to_owned(),
                stride,
                channels: encoder.channels(),
                image_size: images.size,
                mean,
                std,
                method: "none".into(),
                epochs: 0,
                seed,
            },
            encoder,
            name: format!("{UNTRAINED}{name}"),
            run: None,
        })
    }

    fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let foreign = |message: String| Error::Foreign {
            path: path.to_owned(),
            message,
        };
        let weights = |source| Error::Weights {
            path: path.to_owned(),
            source,
        };
        let (tensors, text) = StateDict::from_bytes(bytes).map_err(weights)?;
        let text = text.ok_or_else(|| {
            foreign("holds tensors but no description of a qbheat encoder; give an encoder.safetensors that qbheat wrote".into())
        })?;
        let metadata: Metadata = serde_json::from_str(&text)
            .map_err(|error| foreign(format!("its description is damaged ({error})")))?;
        if ![1, 3].contains(&metadata.mean.len()) || metadata.mean.len() != metadata.std.len() {
            return Err(foreign(
                "its description is damaged (mean and std are not of one or three channels)".into(),
            ));
        }
        if metadata.format != FORMAT {
            return Err(foreign(format!(
                "has format {}, this program reads {FORMAT}",
                metadata.format
            )));
        }
        let name = path.display().to_string();
        let damaged = |what: String| foreign(format!("its description is damaged ({what})"));
        encoder::find(&metadata.encoder)?
            .check_stride(metadata.stride)
            .map_err(|error| damaged(error.to_string()))?;
        let blank = Self::untrained(&metadata.encoder, 0, metadata.images())?;
        if metadata.channels != blank.metadata.channels {
            return Err(damaged(format!(
                "channels {}, where {} has {}",
                metadata.channels, metadata.encoder, blank.metadata.channels
            )));
        }
        let colours = |of: &Metadata| [of.mean.clone(), of.std.clone()];
        if colours(&metadata) != colours(&blank.metadata) {
            return Err(foreign(format!(
                "was trained on pixels of mean {:?} and deviation {:?}, this program makes them {:?} and {:?}",
                metadata.mean, metadata.std, blank.metadata.mean, blank.metadata.std
            )));
        }
        Ok(Self {
            encoder: tensors.load_into(blank.encoder).map_err(weights)?,
            metadata,
            name,
            run: None,
        })
    }
}

/// Writes the encoder of a finished run.
pub fn save_encoder(encoder: &Encoder, config: &Config, path: &Path) -> Result<()> {
    let (mean, std) = colour_statistics(config.data.channels);
    let metadata = Metadata {
        format: FORMAT,
        encoder: config.encoder.name.clone(),
        stride: config.encoder.stride,
        channels: encoder.channels(),
        image_size: config.image_size,
        mean,
        std,
        method: config.method_name().into(),
        epochs: config.optim.epochs,
        seed: config.seed,
    };
    let text = serde_json::to_string(&metadata).expect("a description is valid JSON");
    let bytes = StateDict::of(encoder)
        .to_bytes(&text)
        .map_err(|source| Error::Weights {
            path: path.to_owned(),
            source,
        })?;
    write_durably(path, &bytes)
}

/// The encoder that a configuration starts from, where it names one.
pub fn given_encoder(config: &Base, device: &Device) -> Result<Option<Encoder>> {
    let EncoderConfig { name, stride, init } = &config.encoder;
    if init.as_os_str().is_empty() {
        return Ok(None);
    }
    let given = Weights::open(&init.display().to_string(), config.seed, config.images()).map_err(
        |error| match error {
            Error::Missing { path, .. } => Error::Missing {
                path,
                flag: "--init",
            },
            other => other,
        },
    )?;
    if given.metadata.encoder != *name {
        return Err(Error::Foreign {
            path: init.clone(),
            message: format!(
                "holds a {}, the run's encoder is {name}",
                given.metadata.encoder
            ),
        });
    }
    // Built anew, because the stride may be another.
    let fresh = encoder::find(name)?.build(
        Build {
            stride: *stride,
            inputs: config.data.channels,
        },
        &mut Init::new(config.seed, device),
    )?;
    StateDict::of(&given.encoder)
        .load_into(fresh)
        .map(Some)
        .map_err(|source| Error::Weights {
            path: init.clone(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_weights_were_trained_as_readers_are_told() {
        let shipped = Weights::from_bytes(SHIPPED_FILE, Path::new(SHIPPED)).unwrap();
        let told = format!("{} epochs", shipped.metadata.epochs);
        assert!(SHIPPED_TRAINING.contains(&told), "{told}");
    }
}
