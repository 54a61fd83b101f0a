//! Convolutions without bias, as light networks use them in front of batch normalisation.

use burn::module::{Module, Param};
use burn::nn::PaddingConfig2d;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::Tensor;

use super::Init;

/// A square convolution of odd side `kernel`, padded so that stride 1 keeps the size.
pub fn convolution(
    [inputs, outputs]: [usize; 2],
    kernel: usize,
    stride: usize,
    groups: usize,
    init: &mut Init,
) -> Conv2d {
    let pad = kernel / 2;
    let mut layer = Conv2dConfig::new([inputs, outputs], [kernel, kernel])
        .with_stride([stride, stride])
        .with_padding(PaddingConfig2d::Explicit(pad, pad, pad, pad))
        .with_groups(groups)
        .with_bias(false)
        .init(init.device());
    let per_group = inputs / groups;
    layer.weight = init.fan_in(
        [outputs, per_group, kernel, kernel],
        per_group * kernel * kernel,
    );
    layer
}

/// A 1×1 convolution, as a product of matrices.
///
/// Burn's general convolution computes the gradient of a 1×1 weight about three times slower on the CPU.
#[derive(Module, Debug)]
pub struct Pointwise {
    /// `[outputs, inputs, 1, 1]`, the layout of any convolution.
    pub weight: Param<Tensor<4>>,
}

impl Pointwise {
    /// `inputs` channels to `outputs` channels.
    pub fn new(inputs: usize, outputs: usize, init: &mut Init) -> Self {
        Self {
            weight: init.fan_in([outputs, inputs, 1, 1], inputs),
        }
    }

    /// `[N, inputs, H, W]` to `[N, outputs, H, W]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [n, inputs, h, w] = x.dims();
        let weight = self.weight.val();
        let [outputs, ..] = weight.dims();
        weight
            .reshape([1, outputs, inputs])
            .matmul(x.reshape([n, inputs, h * w]))
            .reshape([n, outputs, h, w])
    }
}
