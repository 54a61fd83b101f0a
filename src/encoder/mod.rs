//! Encoders: image `[N, 3, H, W]` to feature map `[N, C, H/stride, W/stride]`.
//!
//! To add one: its own file, a variant of [`Encoder`], a line in [`ENCODERS`].

mod mobile_net;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::error::{Error, Result, nearest};
use crate::nn::Init;

pub use mobile_net::{InvertedResidual, MobileNet};

/// What is known of an encoder before it is built.
pub struct EncoderSpec {
    /// The name it is picked by.
    pub name: &'static str,
    /// Where the architecture comes from.
    pub source: &'static str,
    /// The strides between image and feature map that it can be built with; the first is the default.
    pub strides: &'static [usize],
    build: fn(stride: usize, init: &mut Init) -> Encoder,
}

/// All encoders, by name.
pub const ENCODERS: &[EncoderSpec] = &[mobile_net::MOBILENET_TINY];

/// A built encoder.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Encoder {
    /// A MobileNetV2-like stack of inverted residuals.
    MobileNet(MobileNet),
}

impl Encoder {
    /// `[N, 3, H, W]`, normalised, to `[N, C, H/stride, W/stride]`.
    pub fn forward(&self, image: Tensor<4>) -> Tensor<4> {
        match self {
            Self::MobileNet(encoder) => encoder.forward(image),
        }
    }

    /// Channels of the feature map.
    pub fn channels(&self) -> usize {
        match self {
            Self::MobileNet(encoder) => encoder.channels(),
        }
    }
}

/// The encoder called `name`.
pub fn find(name: &str) -> Result<&'static EncoderSpec> {
    ENCODERS
        .iter()
        .find(|spec| spec.name == name)
        .ok_or_else(|| Error::Unknown {
            what: "encoder",
            given: name.to_owned(),
            nearest: nearest(name, ENCODERS.iter().map(|spec| spec.name)),
        })
}

impl EncoderSpec {
    /// Builds the encoder with fresh weights.
    pub fn build(&self, stride: usize, init: &mut Init) -> Result<Encoder> {
        self.check_stride(stride)?;
        Ok((self.build)(stride, init))
    }

    /// Whether it can be built with `stride`.
    pub fn check_stride(&self, stride: usize) -> Result<()> {
        if self.strides.contains(&stride) {
            return Ok(());
        }
        Err(Error::Value {
            key: "encoder.stride".into(),
            value: stride.to_string(),
            expected: format!("one of {:?}, the strides of {}", self.strides, self.name),
        })
    }

    /// The stride that turns an image of `image_size` pixels into the 8×8 map the method was studied with, if the
    /// encoder has it, else its default.
    pub fn default_stride(&self, image_size: usize) -> usize {
        let wanted = image_size / 8;
        if self.strides.contains(&wanted) {
            wanted
        } else {
            self.strides[0]
        }
    }
}
