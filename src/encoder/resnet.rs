//! Residual networks (He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385).
//!
//! As in torchvision: a bottleneck's stride is in its 3×3 convolution and not, as in the paper, in its first 1×1 one, and
//! tensors have torchvision's names, so that its weights fit once `fc.*` and `*.num_batches_tracked` are taken out.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use burn::tensor::module::max_pool2d;
use burn::tensor::ops::MaxPoolOptions;

use super::{Build, Encoder, EncoderSpec, halvings};
use crate::nn::{Activation, BatchNorm, Convolution, Fan, Init, Layer, chain};

pub(super) const ENCODERS: &[EncoderSpec] = &[
    EncoderSpec {
        name: "resnet-18",
        source: "ResNet-18, arXiv 1512.03385, without its classification head",
        strides: &[32, 16, 8, 4],
        image_size: 224,
        tokens: 0,
        build: |build, init| Encoder::ResNet(ResNet::new(&RESNET_18, build, init)),
    },
    EncoderSpec {
        name: "resnet-50",
        source: "ResNet-50, arXiv 1512.03385, without its classification head; strides as in torchvision",
        strides: &[32, 16, 8, 4],
        image_size: 224,
        tokens: 0,
        build: |build, init| Encoder::ResNet(ResNet::new(&RESNET_50, build, init)),
    },
];

/// The sizes of a residual network.
pub struct ResNetTable {
    /// Channels of the stem, and inside the blocks of the first stage; each stage has twice those of the one before.
    pub width: usize,
    /// Blocks of each stage; a stage of none is left out, its halving with it.
    pub blocks: [usize; 4],
    /// Whether a block is 1×1, 3×3 and 1×1 convolutions with four times the channels outside, or two of 3×3.
    pub bottleneck: bool,
}

const RESNET_18: ResNetTable = ResNetTable {
    width: 64,
    blocks: [2, 2, 2, 2],
    bottleneck: false,
};

const RESNET_50: ResNetTable = ResNetTable {
    width: 64,
    blocks: [3, 4, 6, 3],
    bottleneck: true,
};

/// Stem, max-pool and four stages of residual blocks. The map ends in a ReLU, as published, though QB-Heat predicts
/// linearly and what a ReLU cuts off cannot be predicted so.
#[derive(Module, Debug)]
pub struct ResNet {
    conv1: Convolution,
    bn1: BatchNorm,
    layer1: Vec<Block>,
    layer2: Vec<Block>,
    layer3: Vec<Block>,
    layer4: Vec<Block>,
    pools: bool,
    channels: usize,
}

impl ResNet {
    /// Fresh weights.
    pub fn new(table: &ResNetTable, build: Build, init: &mut Init) -> Self {
        let of_blocks = table
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(stage, &blocks)| {
                (0..blocks).map(move |block| if stage > 0 && block == 0 { 2 } else { 1 })
            });
        let mut strides = halvings([2, 2].into_iter().chain(of_blocks), build.stride).into_iter();
        let mut next_stride = || {
            strides
                .next()
                .expect("one for the stem, one for the pool, one a block")
        };
        let (conv1, bn1) = conv_norm([build.inputs, table.width], 7, next_stride(), init);
        let pools = next_stride() == 2;
        let mut channels = table.width;
        let [layer1, layer2, layer3, layer4]: [Vec<Block>; 4] = std::array::from_fn(|stage| {
            let inside = table.width << stage;
            let outputs = if table.bottleneck { 4 * inside } else { inside };
            (0..table.blocks[stage])
                .map(|_| {
                    let inputs = std::mem::replace(&mut channels, outputs);
                    Block::new([inputs, inside, outputs], next_stride(), init)
                })
                .collect()
        });
        Self {
            conv1,
            bn1,
            layer1,
            layer2,
            layer3,
            layer4,
            pools,
            channels,
        }
    }

    /// `[N, H, W, inputs]` to `[N, ⌈H/stride⌉, ⌈W/stride⌉, C]`; `look` is shown every block's input.
    pub fn forward(&self, image: Tensor<4>, mut look: impl FnMut(&Tensor<4>)) -> Tensor<4> {
        let stem = Layer::new(&self.conv1, &self.bn1, Activation::Relu);
        let x = chain(image, [stem], false);
        let x = if self.pools { max_pool(x) } else { x };
        [&self.layer1, &self.layer2, &self.layer3, &self.layer4]
            .into_iter()
            .flatten()
            .fold(x, |x, block| {
                look(&x);
                block.forward(x)
            })
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }
}

fn conv_norm(
    [inputs, outputs]: [usize; 2],
    kernel: usize,
    stride: usize,
    init: &mut Init,
) -> (Convolution, BatchNorm) {
    let conv = Convolution::new([inputs, outputs], kernel, stride, 1, Fan::Out, init);
    (conv, BatchNorm::new(outputs, init))
}

/// The largest value of 3×3 positions around every second one: `[N, H, W, C]` to `[N, ⌈H/2⌉, ⌈W/2⌉, C]`. Of equals, the
/// first has the gradient, as in PyTorch; equals behind a ReLU are mostly zeros, which pass none on.
fn max_pool(x: Tensor<4>) -> Tensor<4> {
    let options = MaxPoolOptions::new([3, 3])
        .with_stride([2, 2])
        .with_padding([1, 1]);
    max_pool2d(x.permute([0, 3, 1, 2]), options).permute([0, 2, 3, 1])
}

/// relu(x + f(x)) with f two 3×3 convolutions, or three of 1×1, 3×3 and 1×1 where there are more channels out than
/// inside; x passes a 1×1 convolution where the shapes differ.
#[derive(Module, Debug)]
struct Block {
    conv1: Convolution,
    bn1: BatchNorm,
    conv2: Convolution,
    bn2: BatchNorm,
    conv3: Option<Convolution>,
    bn3: Option<BatchNorm>,
    downsample: Option<(Convolution, BatchNorm)>,
}

impl Block {
    fn new([inputs, inside, outputs]: [usize; 3], stride: usize, init: &mut Init) -> Self {
        let is_bottleneck = outputs > inside;
        let (first, strides) = if is_bottleneck {
            (1, [1, stride])
        } else {
            (3, [stride, 1])
        };
        let (conv1, bn1) = conv_norm([inputs, inside], first, strides[0], init);
        let (conv2, bn2) = conv_norm([inside, inside], 3, strides[1], init);
        let (conv3, bn3) = is_bottleneck
            .then(|| conv_norm([inside, outputs], 1, 1, init))
            .unzip();
        let downsample = (stride > 1 || inputs != outputs)
            .then(|| conv_norm([inputs, outputs], 1, stride, init));
        Self {
            conv1,
            bn1,
            conv2,
            bn2,
            conv3,
            bn3,
            downsample,
        }
    }

    /// `[N, H, W, inputs]` to `[N, ⌈H/stride⌉, ⌈W/stride⌉, outputs]`.
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let shortcut = self.downsample.as_ref().map(|(conv, norm)| {
            let layer = Layer::new(conv, norm, Activation::Identity);
            chain(x.clone(), [layer], false)
        });
        let skip = shortcut.is_none();
        let first = Layer::new(&self.conv1, &self.bn1, Activation::Relu);
        let second = |activation| Layer::new(&self.conv2, &self.bn2, activation);
        let y = match (&self.conv3, &self.bn3) {
            (Some(conv), Some(norm)) => {
                let third = Layer::new(conv, norm, Activation::Identity);
                chain(x, [first, second(Activation::Relu), third], skip)
            }
            _ => chain(x, [first, second(Activation::Identity)], skip),
        };
        relu(match shortcut {
            Some(shortcut) => shortcut + y,
            None => y,
        })
    }
}
