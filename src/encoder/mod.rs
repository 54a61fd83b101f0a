//! Encoders: image `[N, 1 or 3, H, W]` to feature map `[N, C, ⌈H/stride⌉, ⌈W/stride⌉]`.
//!
//! To add one: its own file, with its names in a slice `ENCODERS`, and a line in [`families!`].

mod mobile_former;
mod mobile_net;
mod resnet;

use std::collections::VecDeque;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::data::ImageSize;
use crate::error::{Error, Result};
use crate::nn::{Init, StateDict, multiply_adds};

pub use mobile_former::{
    DynamicRelu, Former, FormerToMobile, MobileFormer, MobileToFormer, Row, Table,
};
pub use mobile_net::{InvertedResidual, MobileNet, Residual};
pub use resnet::{ResNet, ResNetTable};

/// What is known of an encoder before it is built.
pub struct EncoderSpec {
    /// The name it is picked by.
    pub name: &'static str,
    /// Where the architecture comes from.
    pub source: &'static str,
    /// The strides between image and feature map that it can be built with; the first is its own, smaller ones leave
    /// out the first of its halvings.
    pub strides: &'static [usize],
    /// Side of the images it was made for.
    pub image_size: usize,
    /// Width of its tokens; 0 where it has none.
    pub tokens: usize,
    build: fn(build: Build, init: &mut Init) -> Encoder,
}

/// What is open of an encoder once its name is given.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// Image pixels a position of the feature map.
    pub stride: usize,
    /// Channels of the image.
    pub inputs: usize,
}

macro_rules! families {
    ($($variant:ident: $module:ident,)*) => {
        /// A built encoder.
        #[derive(Module, Debug)]
        #[allow(clippy::large_enum_variant, missing_docs)]
        pub enum Encoder {
            $($variant($variant),)*
        }

        impl Encoder {
            /// `[N, inputs, H, W]`, normalised, to `[N, C, ⌈H/stride⌉, ⌈W/stride⌉]`.
            pub fn forward(&self, image: Tensor<4>) -> Tensor<4> {
                self.channels_last(image).permute([0, 3, 1, 2])
            }

            /// As [`Self::forward`], with channels last as they are computed: `[N, ⌈H/stride⌉, ⌈W/stride⌉, C]`.
            pub fn channels_last(&self, image: Tensor<4>) -> Tensor<4> {
                self.forward_past(image, |_| {})
            }

            fn forward_past(&self, image: Tensor<4>, look: impl FnMut(&Tensor<4>)) -> Tensor<4> {
                let image = image.permute([0, 2, 3, 1]);
                match self {
                    $(Self::$variant(encoder) => encoder.forward(image, look),)*
                }
            }

            /// The means of the feature map over its positions, `[N, C]`.
            pub fn pooled(&self, image: Tensor<4>) -> Tensor<2> {
                let map = self.channels_last(image);
                let [n, h, w, c] = map.dims();
                map.reshape([n, h * w, c]).mean_dim(1).squeeze_dim::<2>(1)
            }

            /// Channels of the feature map.
            pub fn channels(&self) -> usize {
                match self {
                    $(Self::$variant(encoder) => encoder.channels(),)*
                }
            }
        }

        const FAMILIES: &[&[EncoderSpec]] = &[$($module::ENCODERS),*];
    };
}

families! {
    MobileNet: mobile_net,
    MobileFormer: mobile_former,
    ResNet: resnet,
}

impl Encoder {
    /// Maps of several strides, channels last as they are computed, `[N, ⌈H/stride⌉, ⌈W/stride⌉, C]`: for each of
    /// `finer`, in ascending order, what goes into the block that halves the map of that stride; then the feature map.
    /// The sides of `image` are longer than any of these strides.
    pub fn maps(&self, image: Tensor<4>, finer: &[usize]) -> Vec<Tensor<4>> {
        let height = image.dims()[2];
        let mut found: Vec<Option<Tensor<4>>> = vec![None; finer.len()];
        let last = self.forward_past(image, |map| {
            // Rounded up, as sides are: ⌈H/⌈H/s⌉⌉ lies above s/2.
            let stride = height.div_ceil(map.dims()[1]).next_power_of_two();
            if let Some(i) = finer.iter().position(|&wanted| wanted == stride) {
                found[i] = Some(map.clone());
            }
        });
        found.into_iter().flatten().chain([last]).collect()
    }

    /// What goes into the block so many before the end, `[N, C, h, w]`, a last 1×1 convolution counting as one; for 0
    /// the feature map. An error where there are not so many.
    pub fn layer(&self, image: Tensor<4>, before_end: usize) -> Result<Tensor<4>> {
        let mut last = VecDeque::new();
        let map = self.forward_past(image, |map| {
            if last.len() == before_end {
                last.pop_front();
            }
            if before_end > 0 {
                last.push_back(map.clone());
            }
        });
        let found = match before_end {
            0 => map,
            _ if last.len() < before_end => {
                return Err(Error::Refused(format!(
                    "--layers-before-end {before_end}: the encoder has {} blocks",
                    last.len()
                )));
            }
            _ => last.pop_front().expect("at least one"),
        };
        Ok(found.permute([0, 3, 1, 2]))
    }

    /// Channels of each of [`Self::maps`], for an encoder of images with `inputs` channels.
    pub fn map_channels(&self, inputs: usize, finer: &[usize]) -> Vec<usize> {
        let side = 2 * finer.last().unwrap_or(&1);
        let image = Tensor::zeros([1, inputs, side, side], &crate::device());
        let maps = self.valid().maps(image, finer);
        maps.iter().map(|map| map.dims()[3]).collect()
    }
}

/// All encoders.
pub fn all() -> impl Iterator<Item = &'static EncoderSpec> {
    FAMILIES.iter().copied().flatten()
}

/// The encoder called `name`.
pub fn find(name: &str) -> Result<&'static EncoderSpec> {
    all()
        .find(|spec| spec.name == name)
        .ok_or_else(|| Error::unknown("encoder", name, all().map(|spec| spec.name)))
}

/// An encoder's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Learned numbers, without a classifier.
    pub parameters: usize,
    /// Products in convolutions, linear layers and attentions for one image.
    pub multiply_adds: u64,
    /// Channels of the feature map.
    pub channels: usize,
}

impl EncoderSpec {
    /// Builds the encoder with fresh weights.
    pub fn build(&self, build: Build, init: &mut Init) -> Result<Encoder> {
        self.check_stride(build.stride)?;
        Ok((self.build)(build, init))
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
    /// encoder has it, else its own.
    pub fn default_stride(&self, image_size: usize) -> usize {
        let wanted = image_size / 8;
        if self.strides.contains(&wanted) {
            wanted
        } else {
            self.strides[0]
        }
    }

    /// Counts parameters, and multiply-adds for an image of three channels by running one.
    pub fn counts(&self, stride: usize, image_size: ImageSize) -> Result<Counts> {
        let device = crate::device();
        let build = Build { stride, inputs: 3 };
        let encoder = self.build(build, &mut Init::new(0, &device))?.valid();
        let image = Tensor::zeros([1, 3, image_size.height, image_size.width], &device);
        Ok(Counts {
            parameters: StateDict::of(&encoder).parameters(),
            multiply_adds: multiply_adds(|| {
                encoder.forward(image);
            }),
            channels: encoder.channels(),
        })
    }
}

/// The strides of a network's layers for a smaller stride in all: of its own ones, the first that halve are left out.
fn halvings(own: impl Iterator<Item = usize>, stride: usize) -> Vec<usize> {
    let mut strides: Vec<usize> = own.collect();
    for i in 0..strides.len() {
        if strides.iter().product::<usize>() == stride {
            break;
        }
        strides[i] = 1;
    }
    strides
}
