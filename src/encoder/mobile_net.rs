//! Stacks of inverted residuals (Sandler et al., "MobileNetV2", arXiv 1801.04381).

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Build, Encoder, EncoderSpec, halvings};
use crate::nn::{Activation, BatchNorm, Convolution, Fan, Init, Layer, chain};

pub(super) const ENCODERS: &[EncoderSpec] = &[
    EncoderSpec {
        name: "mobilenet-tiny",
        source: "inverted residuals of MobileNetV2, arXiv 1801.04381, sized for 32 and 64 px images",
        strides: &[8, 4],
        image_size: 64,
        tokens: 0,
        build: |build, init| Encoder::MobileNet(MobileNet::new(&TINY, build, init)),
    },
    EncoderSpec {
        name: "mobilenet-v2",
        source: "MobileNetV2 1.0, arXiv 1801.04381; the map behind the last 1×1 convolution and its norm",
        strides: &[32, 16, 8],
        image_size: 224,
        tokens: 0,
        build: |build, init| Encoder::MobileNet(MobileNet::new(&V2, build, init)),
    },
    EncoderSpec {
        name: "mobilenet-v2-320",
        source: "MobileNetV2 1.0, arXiv 1801.04381; the map in front of the last 1×1 convolution",
        strides: &[32, 16, 8],
        image_size: 224,
        tokens: 0,
        build: |build, init| Encoder::MobileNet(MobileNet::new(&V2_320, build, init)),
    },
];

/// The sizes of a network.
struct Table {
    stem: usize,
    /// Channels inside, channels out, stride: one row a block. As many inside as come in: no first 1×1 convolution.
    blocks: &'static [(usize, usize, usize)],
    /// Channels of a last 1×1 convolution.
    head: Option<usize>,
    activation: Activation,
    fan: Fan,
}

const TINY: Table = Table {
    stem: 24,
    blocks: &[
        (48, 24, 1),
        (96, 32, 2),
        (128, 32, 1),
        (128, 32, 1),
        (160, 64, 2),
        (256, 64, 1),
        (256, 64, 1),
        (320, 96, 1),
        (384, 96, 1),
        (384, 96, 1),
    ],
    head: Some(192),
    activation: Activation::Relu,
    fan: Fan::In,
};

const V2: Table = Table {
    head: Some(1280),
    ..V2_320
};

/// The paper's table 2.
const V2_320: Table = Table {
    stem: 32,
    blocks: &[
        (32, 16, 1),
        (96, 24, 2),
        (144, 24, 1),
        (144, 32, 2),
        (192, 32, 1),
        (192, 32, 1),
        (192, 64, 2),
        (384, 64, 1),
        (384, 64, 1),
        (384, 64, 1),
        (384, 96, 1),
        (576, 96, 1),
        (576, 96, 1),
        (576, 160, 2),
        (960, 160, 1),
        (960, 160, 1),
        (960, 320, 1),
    ],
    head: None,
    activation: Activation::Relu6,
    fan: Fan::Out,
};

/// Stem, inverted residuals, and perhaps a last 1×1 convolution to the width of the feature map. The map is linear in
/// its last convolution: what an activation cuts off could not be predicted linearly.
#[derive(Module, Debug)]
pub struct MobileNet {
    stem: Convolution,
    stem_norm: BatchNorm,
    blocks: Vec<InvertedResidual>,
    head: Option<Convolution>,
    head_norm: Option<BatchNorm>,
    #[module(skip)]
    activation: Activation,
    channels: usize,
}

impl MobileNet {
    fn new(table: &Table, build: Build, init: &mut Init) -> Self {
        let own = std::iter::once(2).chain(table.blocks.iter().map(|row| row.2));
        let mut strides = halvings(own, build.stride).into_iter();
        let mut next_stride = || strides.next().expect("one for the stem and one a block");
        let mut width = table.stem;
        let stem = Convolution::new(
            [build.inputs, table.stem],
            3,
            next_stride(),
            1,
            table.fan,
            init,
        );
        let stem_norm = BatchNorm::new(table.stem, init);
        let blocks = table
            .blocks
            .iter()
            .map(|&(inside, outputs, _)| {
                let inputs = std::mem::replace(&mut width, outputs);
                let residual = Residual {
                    channels: [inputs, inside, outputs],
                    stride: next_stride(),
                    activation: table.activation,
                    fan: table.fan,
                };
                InvertedResidual::new(residual, init)
            })
            .collect();
        let head = table
            .head
            .map(|head| Convolution::new([width, head], 1, 1, 1, table.fan, init));
        let channels = table.head.unwrap_or(width);
        Self {
            stem,
            stem_norm,
            blocks,
            head_norm: head.is_some().then(|| BatchNorm::new(channels, init)),
            head,
            activation: table.activation,
            channels,
        }
    }

    /// `[N, H, W, inputs]` to `[N, ⌈H/stride⌉, ⌈W/stride⌉, C]`; `look` is shown every block's input
    /// and that of the last convolution.
    pub fn forward(&self, image: Tensor<4>, mut look: impl FnMut(&Tensor<4>)) -> Tensor<4> {
        let stem = Layer::new(&self.stem, &self.stem_norm, self.activation);
        let features = self
            .blocks
            .iter()
            .fold(chain(image, [stem], false), |features, block| {
                look(&features);
                block.forward(features)
            });
        match (&self.head, &self.head_norm) {
            (Some(head), Some(norm)) => {
                look(&features);
                let head = Layer::new(head, norm, Activation::Identity);
                chain(features, [head], false)
            }
            _ => features,
        }
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }
}

/// The sizes of an [`InvertedResidual`].
#[derive(Clone, Copy)]
pub struct Residual {
    /// Channels that come in, between the two 1×1 convolutions, and out.
    pub channels: [usize; 3],
    /// Stride of the depthwise convolution.
    pub stride: usize,
    /// Behind the first two convolutions.
    pub activation: Activation,
    /// How kernels are drawn.
    pub fan: Fan,
}

/// 1×1 convolution to more channels (left out where there are not more), depthwise 3×3, 1×1 back to fewer; with a skip
/// where the shapes allow it.
#[derive(Module, Debug)]
pub struct InvertedResidual {
    expand: Option<Convolution>,
    expand_norm: Option<BatchNorm>,
    depthwise: Convolution,
    depthwise_norm: BatchNorm,
    project: Convolution,
    project_norm: BatchNorm,
    #[module(skip)]
    activation: Activation,
    skip: bool,
}

impl InvertedResidual {
    /// Fresh weights.
    pub fn new(residual: Residual, init: &mut Init) -> Self {
        let Residual {
            channels: [inputs, inside, outputs],
            stride,
            activation,
            fan,
        } = residual;
        let expand =
            (inside > inputs).then(|| Convolution::new([inputs, inside], 1, 1, 1, fan, init));
        Self {
            expand_norm: expand.is_some().then(|| BatchNorm::new(inside, init)),
            expand,
            depthwise: Convolution::new([inside, inside], 3, stride, inside, fan, init),
            depthwise_norm: BatchNorm::new(inside, init),
            project: Convolution::new([inside, outputs], 1, 1, 1, fan, init),
            project_norm: BatchNorm::new(outputs, init),
            activation,
            skip: stride == 1 && inputs == outputs,
        }
    }

    /// `[N, H, W, inputs]` to `[N, ⌈H/stride⌉, ⌈W/stride⌉, outputs]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let depthwise = Layer::new(&self.depthwise, &self.depthwise_norm, self.activation);
        let project = Layer::new(&self.project, &self.project_norm, Activation::Identity);
        match (&self.expand, &self.expand_norm) {
            (Some(expand), Some(norm)) => {
                let expand = Layer::new(expand, norm, self.activation);
                chain(x, [expand, depthwise, project], self.skip)
            }
            _ => chain(x, [depthwise, project], self.skip),
        }
    }
}
