//! `mobilenet-tiny`: inverted residuals (Sandler et al., arXiv 1801.04381) at a size that trains on a laptop.

use burn::module::Module;
use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;

use super::{Encoder, EncoderSpec};
use crate::nn::{BatchNorm, Init, Pointwise, convolution};

/// 0.35 M parameters, a map of 192 channels; at stride 4 the stem keeps the image's size.
pub(super) const MOBILENET_TINY: EncoderSpec = EncoderSpec {
    name: "mobilenet-tiny",
    source: "inverted residuals of MobileNetV2, arXiv 1801.04381, sized for 32 and 64 pixel images",
    strides: &[8, 4],
    build: |stride, init| Encoder::MobileNet(MobileNet::tiny(stride, init)),
};

const STEM: usize = 24;
/// Channels inside, channels out, stride: one row a block.
const BLOCKS: [(usize, usize, usize); 10] = [
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
];
const CHANNELS: usize = 192;

/// Stem, inverted residuals, and a last 1×1 convolution to the width of the feature map.
#[derive(Module, Debug)]
pub struct MobileNet {
    stem: Conv2d,
    stem_norm: BatchNorm,
    blocks: Vec<InvertedResidual>,
    head: Pointwise,
    head_norm: BatchNorm,
}

impl MobileNet {
    fn tiny(stride: usize, init: &mut Init) -> Self {
        let mut width = STEM;
        Self {
            stem: convolution([3, STEM], 3, stride / 4, 1, init),
            stem_norm: BatchNorm::new(STEM, init),
            blocks: BLOCKS
                .iter()
                .map(|&(inside, out, stride)| {
                    let inputs = std::mem::replace(&mut width, out);
                    InvertedResidual::new(inputs, inside, out, stride, init)
                })
                .collect(),
            head: Pointwise::new(width, CHANNELS, init),
            head_norm: BatchNorm::new(CHANNELS, init),
        }
    }

    /// `[N, 3, H, W]` to `[N, 192, H/stride, W/stride]`.
    pub fn forward(&self, image: Tensor<4>) -> Tensor<4> {
        let stem = relu(self.stem_norm.forward(self.stem.forward(image)));
        let features = self
            .blocks
            .iter()
            .fold(stem, |features, block| block.forward(features));
        self.head_norm.forward(self.head.forward(features))
    }

    pub(super) fn channels(&self) -> usize {
        self.head.weight.dims()[0]
    }
}

/// 1×1 convolution to more channels, depthwise 3×3, 1×1 back to fewer; with a skip where the shapes allow it.
#[derive(Module, Debug)]
pub struct InvertedResidual {
    expand: Pointwise,
    expand_norm: BatchNorm,
    depthwise: Conv2d,
    depthwise_norm: BatchNorm,
    project: Pointwise,
    project_norm: BatchNorm,
    skip: bool,
}

impl InvertedResidual {
    /// `inputs` channels, `inside` between the two 1×1 convolutions, `outputs` channels.
    pub fn new(
        inputs: usize,
        inside: usize,
        outputs: usize,
        stride: usize,
        init: &mut Init,
    ) -> Self {
        Self {
            expand: Pointwise::new(inputs, inside, init),
            expand_norm: BatchNorm::new(inside, init),
            depthwise: convolution([inside, inside], 3, stride, inside, init),
            depthwise_norm: BatchNorm::new(inside, init),
            project: Pointwise::new(inside, outputs, init),
            project_norm: BatchNorm::new(outputs, init),
            skip: stride == 1 && inputs == outputs,
        }
    }

    /// `[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = relu(self.expand_norm.forward(self.expand.forward(x.clone())));
        let y = relu(self.depthwise_norm.forward(self.depthwise.forward(y)));
        let y = self.project_norm.forward(self.project.forward(y));
        if self.skip { x + y } else { y }
    }
}
