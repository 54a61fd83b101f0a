//! Layers over the last axis, with PyTorch's names and layouts: a file of their weights is one of PyTorch's too.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::cost::spend;

pub(super) const EPSILON: f32 = 1e-5;

/// `x Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: Param<Tensor<2>>,
    /// `[outputs]`.
    pub bias: Param<Tensor<1>>,
}

impl Linear {
    /// `[…, inputs]` to `[…, outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.count(x.shape().num_elements());
        qbheat_kernels::linear(x, self.weight.val(), Some(self.bias.val()))
    }

    /// Counts the products with an input of so many entries.
    fn count(&self, entries: usize) {
        spend(entries * self.weight.dims()[0]);
    }
}

/// `second(gelu(first(x)))`, GELU by the error function: `[…, inputs]` to `[…, outputs]`.
pub fn perceptron<const D: usize>(first: &Linear, second: &Linear, x: Tensor<D>) -> Tensor<D> {
    let entries = x.shape().num_elements();
    first.count(entries);
    let [inside, inputs] = first.weight.dims();
    second.count(entries / inputs * inside);
    let layers = [first, second];
    qbheat_kernels::mlp(
        x,
        layers.map(|layer| layer.weight.val()),
        layers.map(|layer| layer.bias.val()),
    )
}

/// Normalises over the last axis (Ba et al., arXiv 1607.06450); epsilon 1e-5.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// Scale, `[width]`.
    pub weight: Param<Tensor<1>>,
    /// Shift, `[width]`.
    pub bias: Param<Tensor<1>>,
}

impl LayerNorm {
    /// `[…, width]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        qbheat_kernels::layer_norm(x, self.weight.val(), self.bias.val(), EPSILON)
    }
}
