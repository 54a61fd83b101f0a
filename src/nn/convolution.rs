//! Convolutions without bias, as light networks use them in front of batch normalisation.

use burn::module::{Module, Param};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Tensor, module};

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

    /// `[N, inputs, H, W]` to `[N, outputs, ⌈H/stride⌉, ⌈W/stride⌉]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let weight = self.weight.val();
        let [outputs, per_group, kernel, _] = weight.dims();
        let [n, _, h, w] = x.dims();
        let positions = n * h.div_ceil(self.stride) * w.div_ceil(self.stride);
        spend(positions * outputs * per_group * kernel * kernel);
        if kernel == 1 && self.stride == 1 {
            return pointwise(x, weight, self.groups);
        }
        let options = ConvOptions::new(
            [self.stride, self.stride],
            [kernel / 2, kernel / 2],
            [1, 1],
            self.groups,
        );
        module::conv2d(x, weight, None, options)
    }
}

/// A 1×1 convolution as a product of matrices: Burn's general convolution computes the gradient of a 1×1 weight about
/// three times slower on the CPU.
fn pointwise(x: Tensor<4>, weight: Tensor<4>, groups: usize) -> Tensor<4> {
    let [n, inputs, h, w] = x.dims();
    let outputs = weight.dims()[0];
    if groups == 1 {
        return weight
            .reshape([1, outputs, inputs])
            .matmul(x.reshape([n, inputs, h * w]))
            .reshape([n, outputs, h, w]);
    }
    weight
        .reshape([1, groups, outputs / groups, inputs / groups])
        .matmul(x.reshape([n, groups, inputs / groups, h * w]))
        .reshape([n, outputs, h, w])
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

    /// `[N, inputs, H, W]` to `[N, outputs, ⌈H/stride⌉, ⌈W/stride⌉]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.bn.forward(self.conv.forward(x))
    }
}
