//! Convolutions without bias and the batch normalisation that follows them in light networks. Maps have their channels
//! last, `[N, H, W, C]`.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use qbheat_kernels::{Activation, Stage};

use super::batch_norm::EPSILON;
use super::cost::spend;
use super::{BatchNorm, Fan, Init};

/// A square convolution of odd side, padded so that stride 1 keeps the size and stride 2 gives half of it, rounded up.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[outputs, inputs/groups, kernel, kernel]`.
    pub weight: Param<Tensor<4>>,
    stride: usize,
    groups: usize,
}

impl Convolution {
    /// `inputs` channels to `outputs` channels.
    pub fn new(
        [inputs, outputs]: [usize; 2],
        kernel: usize,
        stride: usize,
        groups: usize,
        fan: Fan,
        init: &mut Init,
    ) -> Self {
        let shape = [outputs, inputs / groups, kernel, kernel];
        Self {
            weight: init.kernel(shape, fan),
            stride,
            groups,
        }
    }
}

/// A convolution, the batch normalisation and the activation that follow it, borrowed for one pass.
pub struct Layer<'a> {
    /// Comes first.
    pub conv: &'a Convolution,
    /// Over the convolution's outputs.
    pub norm: &'a BatchNorm,
    /// Comes last.
    pub activation: Activation,
    /// For [`Activation::Dynamic`], `[N, 2·outputs]`.
    pub slopes: Option<Tensor<2>>,
}

impl<'a> Layer<'a> {
    /// With an activation that needs no slopes.
    pub fn new(conv: &'a Convolution, norm: &'a BatchNorm, activation: Activation) -> Self {
        Self {
            conv,
            norm,
            activation,
            slopes: None,
        }
    }
}

/// Layers one after another, and the input added to the output where `skip`: `[N, H, W, C]` to `[N, ⌈H/s⌉, ⌈W/s⌉, outputs]`
/// with s the product of the strides.
pub fn chain<const N: usize>(x: Tensor<4>, layers: [Layer; N], skip: bool) -> Tensor<4> {
    let [images, mut height, mut width, _] = x.dims();
    let mut positions = [0; N];
    for (Layer { conv, .. }, positions) in layers.iter().zip(&mut positions) {
        height = height.div_ceil(conv.stride);
        width = width.div_ceil(conv.stride);
        *positions = images * height * width;
        spend(*positions * conv.weight.val().shape().num_elements());
    }
    let norms = layers.each_ref().map(|layer| layer.norm);
    let stages = layers.map(|layer| Stage {
        weight: layer.conv.weight.val(),
        stride: layer.conv.stride,
        groups: layer.conv.groups,
        scale: layer.norm.weight.val(),
        shift: layer.norm.bias.val(),
        fixed: layer.norm.fixed(),
        activation: layer.activation,
        slopes: layer.slopes,
    });
    let (y, statistics) = qbheat_kernels::chain(x, stages.into(), skip, EPSILON);
    for ((norm, [mean, variance]), positions) in norms.into_iter().zip(statistics).zip(positions) {
        norm.update(mean, variance, positions);
    }
    y
}

/// A convolution and the batch normalisation that follows it.
#[derive(Module, Debug)]
pub struct ConvNorm {
    /// Without bias: the norm has one.
    pub conv: Convolution,
    /// Over the outputs.
    pub bn: BatchNorm,
}

impl ConvNorm {
    /// Weights of the convolution drawn by [`Fan::Out`].
    pub fn new(
        [inputs, outputs]: [usize; 2],
        kernel: usize,
        stride: usize,
        groups: usize,
        init: &mut Init,
    ) -> Self {
        Self {
            conv: Convolution::new([inputs, outputs], kernel, stride, groups, Fan::Out, init),
            bn: BatchNorm::new(outputs, init),
        }
    }

    /// Both with what follows them.
    pub fn layer(&self, activation: Activation) -> Layer<'_> {
        Layer::new(&self.conv, &self.bn, activation)
    }

    /// Both with a dynamic activation behind them, of slopes `[N, 2·outputs]`.
    pub fn dynamic(&self, slopes: Tensor<2>) -> Layer<'_> {
        Layer {
            slopes: Some(slopes),
            ..self.layer(Activation::Dynamic)
        }
    }
}
