//! Mobile-Former (Chen et al., "Mobile-Former: Bridging MobileNet and Transformer", arXiv 2108.05895): a MobileNet and
//! a transformer of a few tokens side by side, which look at each other in every block.
//!
//! Details follow the first author's public code. `mf-w720`, `mf-w1440`, `mf-w2880` and `mf-tiny` are tables of this
//! project; the first aims at the size of QB-Heat's encoder (5.8 M parameters, 285 M multiply-adds), whose own table is
//! not public.

mod layers;
mod tables;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::{Build, halvings};
use crate::nn::{Activation, ConvNorm, Init, chain};

use layers::{Bottleneck, DownSampling};

pub use layers::{DynamicRelu, Former, FormerToMobile, Mobile, MobileToFormer};
pub(super) use tables::ENCODERS;
pub use tables::{Row, Table};

/// A Mobile-Former without its classification head.
#[derive(Module, Debug)]
pub struct MobileFormer {
    /// `[M, d]`, what every image's tokens start from.
    tokens: Param<Tensor<2>>,
    stem: ConvNorm,
    blocks: Vec<Block>,
    widen: Option<ConvNorm>,
    channels: usize,
}

impl MobileFormer {
    /// Fresh weights.
    pub fn new(table: &Table, build: Build, init: &mut Init) -> Self {
        let [tokens, d] = table.tokens;
        let own = std::iter::once(table.stem_stride).chain(table.rows.iter().map(Row::stride));
        let strides = halvings(own, build.stride);
        let mut width = table.stem;
        Self {
            tokens: init.normal([tokens, d], 1.0),
            stem: ConvNorm::new([build.inputs, table.stem], 3, strides[0], 1, init),
            blocks: table
                .rows
                .iter()
                .zip(&strides[1..])
                .map(|(row, &stride)| {
                    let inputs = std::mem::replace(&mut width, row.outputs());
                    Block::new(row, inputs, stride, d, table.groups, init)
                })
                .collect(),
            widen: table
                .widen
                .map(|outputs| ConvNorm::new([width, outputs], 1, 1, 1, init)),
            channels: table.widen.unwrap_or(width),
        }
    }

    /// `[N, H, W, inputs]` to `[N, ⌈H/stride⌉, ⌈W/stride⌉, C]`; `look` is shown every block's input
    /// and that of the last convolution.
    pub fn forward(&self, image: Tensor<4>, look: impl FnMut(&Tensor<4>)) -> Tensor<4> {
        self.forward_with_tokens(image, look).0
    }

    /// The feature map, `[N, ⌈H/stride⌉, ⌈W/stride⌉, C]`, and the tokens, `[N, M, d]`.
    pub fn forward_with_tokens(
        &self,
        image: Tensor<4>,
        mut look: impl FnMut(&Tensor<4>),
    ) -> (Tensor<4>, Tensor<3>) {
        let images = image.dims()[0];
        let tokens = self.tokens.val().unsqueeze::<3>().repeat_dim(0, images);
        let stem = chain(image, [self.stem.layer(Activation::Relu6)], false);
        let (x, z) = self.blocks.iter().fold((stem, tokens), |(x, z), block| {
            look(&x);
            block.forward(x, z)
        });
        match &self.widen {
            Some(widen) => {
                look(&x);
                (chain(x, [widen.layer(Activation::Identity)], false), z)
            }
            None => (x, z),
        }
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }
}

/// A row of the table.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
enum Block {
    Lite(Lite),
    MobileFormer(MobileFormerBlock),
}

impl Block {
    fn new(
        row: &Row,
        inputs: usize,
        stride: usize,
        d: usize,
        groups: usize,
        init: &mut Init,
    ) -> Self {
        let mobile = match *row {
            Row::Lite { expand, out, .. } => {
                return Self::Lite(Lite::new(
                    [inputs, expand * inputs, out],
                    stride,
                    groups,
                    init,
                ));
            }
            Row::Flat { expand, out } => Mobile::Bottleneck(Bottleneck::new(
                [inputs, expand * inputs, out],
                d,
                groups,
                init,
            )),
            Row::Down {
                expand,
                out,
                expand2,
            } => Mobile::DownSampling(DownSampling::new(
                [inputs, expand * inputs, out, expand2 * out],
                stride,
                d,
                groups,
                init,
            )),
        };
        Self::MobileFormer(MobileFormerBlock {
            m2f: MobileToFormer::new(inputs, d, init),
            former: Former::new(d, init),
            mobile,
            f2m: FormerToMobile::new(row.outputs(), d, init),
        })
    }

    fn forward(&self, x: Tensor<4>, z: Tensor<3>) -> (Tensor<4>, Tensor<3>) {
        match self {
            Self::Lite(block) => (block.forward(x), z),
            Self::MobileFormer(block) => block.forward(x, z),
        }
    }
}

/// Map to tokens, tokens among themselves, convolutions led by the first token, tokens to map.
#[derive(Module, Debug)]
struct MobileFormerBlock {
    m2f: MobileToFormer,
    former: Former,
    mobile: Mobile,
    f2m: FormerToMobile,
}

impl MobileFormerBlock {
    fn forward(&self, x: Tensor<4>, z: Tensor<3>) -> (Tensor<4>, Tensor<3>) {
        let z = self.former.forward(self.m2f.forward(&x, z));
        let first = z.clone().slice_dim(1, 0..1).squeeze_dim::<2>(1);
        let x = self.mobile.forward(x, first);
        (self.f2m.forward(x, z.clone()), z)
    }
}

/// A depthwise and a 1×1 convolution, without tokens.
#[derive(Module, Debug)]
struct Lite {
    dw: ConvNorm,
    pw: ConvNorm,
    shuffle: usize,
    skip: bool,
}

impl Lite {
    fn new(
        [inputs, inside, outputs]: [usize; 3],
        stride: usize,
        groups: usize,
        init: &mut Init,
    ) -> Self {
        Self {
            dw: ConvNorm::new([inputs, inside], 3, stride, inputs, init),
            pw: ConvNorm::new([inside, outputs], 1, 1, groups, init),
            shuffle: if groups > 1 { inputs } else { 1 },
            skip: stride == 1 && inputs == outputs,
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let dw = self.dw.layer(Activation::Relu6);
        let pw = self.pw.layer(Activation::Identity);
        if self.shuffle == 1 {
            return chain(x, [dw, pw], self.skip);
        }
        let y = shuffle(chain(x.clone(), [dw], false), self.shuffle);
        let y = chain(y, [pw], false);
        if self.skip { x + y } else { y }
    }
}

/// Channels as `[groups, C/groups]`, transposed: what lets grouped 1×1 convolutions exchange what they see.
fn shuffle(x: Tensor<4>, groups: usize) -> Tensor<4> {
    if groups == 1 {
        return x;
    }
    let [n, h, w, c] = x.dims();
    x.reshape([n, h, w, groups, c / groups])
        .swap_dims(3, 4)
        .reshape([n, h, w, c])
}

/// Slopes `[N, 2·C]` of shuffled channels in the order that the channels have before [`shuffle`].
fn unshuffle(slopes: Tensor<2>, groups: usize) -> Tensor<2> {
    if groups == 1 {
        return slopes;
    }
    let [n, both] = slopes.dims();
    slopes
        .reshape([n, 2, both / 2 / groups, groups])
        .swap_dims(2, 3)
        .reshape([n, both])
}
