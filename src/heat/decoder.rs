//! From the features of all four quarters to pixels.

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::nn::{Init, LayerNorm, Linear, TransformerBlock, sin_cos_2d};

/// The decoder's size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecoderConfig {
    /// Transformer blocks; 0 leaves two linear maps, to `width` and to pixels, with positions and a layer norm between.
    pub depth: usize,
    /// Width of the tokens, a multiple of 4 and of `heads`.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
}

impl Default for DecoderConfig {
    fn default() -> Self {
        Self {
            depth: 0,
            width: 64,
            heads: 4,
        }
    }
}

/// A few transformer blocks over the positions of the map, then a linear map to the pixels of each patch.
#[derive(Module, Debug)]
pub struct Decoder {
    embed: Linear,
    blocks: Vec<TransformerBlock>,
    norm: LayerNorm,
    pixels: Linear,
}

impl Decoder {
    /// For features of `channels` and patches of `values` numbers: pixels times colours.
    pub fn new(config: &DecoderConfig, channels: usize, values: usize, init: &mut Init) -> Self {
        Self {
            embed: init.linear(channels, config.width),
            blocks: (0..config.depth)
                .map(|_| TransformerBlock::new(config.width, config.heads, init))
                .collect(),
            norm: init.layer_norm(config.width),
            pixels: init.linear(config.width, values),
        }
    }

    /// `[N, h·w, C]`, features of a whole `[h, w]` map, to `[N, h·w, values]`.
    pub fn forward(&self, map: Tensor<3>, [h, w]: [usize; 2]) -> Tensor<3> {
        let tokens = self.embed.forward(map);
        let width = tokens.dims()[2];
        let tokens = tokens.clone() + sin_cos_2d(h, w, width, &tokens.device());
        let tokens = self
            .blocks
            .iter()
            .fold(tokens, |tokens, block| block.forward(tokens));
        self.pixels.forward(self.norm.forward(tokens))
    }
}
