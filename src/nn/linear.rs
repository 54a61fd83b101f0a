//! Layers over the last axis, with PyTorch's names and layouts: a file of their weights is one of PyTorch's too.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, module};

use super::cost::spend;

const EPSILON: f64 = 1e-5;

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
        let weight = self.weight.val();
        let [outputs, inputs] = weight.dims();
        spend(x.shape().num_elements() / inputs * inputs * outputs);
        module::linear(x, weight.transpose(), Some(self.bias.val()))
    }
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
        module::layer_norm(x, self.weight.val(), Some(self.bias.val()), EPSILON)
    }
}
