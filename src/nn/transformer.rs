//! The transformer block of the decoder and of the tran-1 probe.

use burn::module::Module;
use burn::tensor::Tensor;

use super::cost::spend;
use super::linear::EPSILON;
use super::{Init, LayerNorm, Linear};

const MLP_RATIO: usize = 4;

/// A pre-norm transformer block: self-attention, then a two-layer perceptron with GELU, both with a skip
/// (Vaswani et al., arXiv 1706.03762; pre-norm as in ViT, arXiv 2010.11929).
#[derive(Module, Debug)]
pub struct TransformerBlock {
    /// In front of the attention.
    pub norm1: LayerNorm,
    /// Queries, keys and values at once: width to 3·width.
    pub qkv: Linear,
    /// Behind the attention.
    pub projection: Linear,
    /// In front of the perceptron.
    pub norm2: LayerNorm,
    /// width to 4·width.
    pub fc1: Linear,
    /// 4·width to width.
    pub fc2: Linear,
    heads: usize,
}

impl TransformerBlock {
    /// `width` must be a multiple of `heads`.
    pub fn new(width: usize, heads: usize, init: &mut Init) -> Self {
        Self {
            norm1: init.layer_norm(width),
            qkv: init.linear(width, 3 * width),
            projection: init.linear(width, width),
            norm2: init.layer_norm(width),
            fc1: init.linear(width, MLP_RATIO * width),
            fc2: init.linear(MLP_RATIO * width, width),
            heads,
        }
    }

    /// `[N, T, width]` to the same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [n, t, width] = x.dims();
        let linears = [&self.qkv, &self.projection, &self.fc1, &self.fc2];
        let products: usize = linears
            .map(|l| l.weight.val().shape().num_elements())
            .iter()
            .sum();
        spend(n * t * (products + 2 * t * width));
        let norms = [&self.norm1, &self.norm2].map(|norm| (norm.weight.val(), norm.bias.val()));
        let [qkv, projection, fc1, fc2] =
            linears.map(|linear| (linear.weight.val(), linear.bias.val()));
        let block = qbheat_kernels::TransformerBlock {
            norms,
            qkv,
            projection,
            mlp: [fc1, fc2],
            heads: self.heads,
            epsilon: EPSILON,
        };
        qbheat_kernels::transformer_block(x, block)
    }
}
