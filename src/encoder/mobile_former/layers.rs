//! What a Mobile-Former block is made of. Maps X are `[N, H, W, C]`, tokens Z `[N, M, d]`.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;

use super::{shuffle, unshuffle};
use crate::nn::{Activation, ConvNorm, Init, LayerNorm, Linear, attend, chain, perceptron};

const MAP_HEADS: usize = 2;
const TOKEN_HEADS: usize = 4;
const DEVIATION: f32 = 0.01;

/// min(max(t + 3, 0), 6)/6
fn hard_sigmoid<const D: usize>(t: Tensor<D>) -> Tensor<D> {
    ((t + 3.0) / 6.0).clamp(0.0, 1.0)
}

fn linear(inputs: usize, outputs: usize, init: &mut Init) -> Linear {
    init.normal_linear(inputs, outputs, DEVIATION)
}

/// A map as a sequence, row by row: `[N, H, W, C]` to `[N, H·W, C]`.
fn sequence(x: &Tensor<4>) -> Tensor<3> {
    let [n, h, w, c] = x.dims();
    x.clone().reshape([n, h * w, c])
}

/// The slopes of max(a₁·x, a₂·x) channel by channel, a₁ from 0 to 2 and a₂ from −1 to 1 told by the first token (Chen et
/// al., "Dynamic ReLU", arXiv 2003.10027, without intercepts).
#[derive(Module, Debug)]
pub struct DynamicRelu {
    fc1: Linear,
    fc2: Linear,
}

impl DynamicRelu {
    /// For maps of `channels` and tokens of width `d`.
    pub fn new(channels: usize, d: usize, init: &mut Init) -> Self {
        Self {
            fc1: linear(d, d / 4, init),
            fc2: linear(d / 4, 2 * channels, init),
        }
    }

    /// The first token, `[N, d]`, to a₁ and a₂ of each channel, `[N, 2·C]`.
    pub fn slopes(&self, token: Tensor<2>) -> Tensor<2> {
        let theta = hard_sigmoid(self.fc2.forward(relu(self.fc1.forward(token))));
        let channels = theta.dims()[1] / 2;
        let half = |i: usize| theta.clone().slice_dim(1, i * channels..(i + 1) * channels) * 2.0;
        Tensor::cat(vec![half(0), half(1) - 1.0], 1)
    }
}

/// Map to tokens: the tokens look at the map, whose own features are keys and values.
#[derive(Module, Debug)]
pub struct MobileToFormer {
    q: Linear,
    gate: Linear,
    out: Linear,
    norm: LayerNorm,
}

impl MobileToFormer {
    /// For maps of `channels` and tokens of width `d`.
    pub fn new(channels: usize, d: usize, init: &mut Init) -> Self {
        Self {
            q: linear(d, channels, init),
            gate: linear(d, channels, init),
            out: linear(channels, d, init),
            norm: init.layer_norm(d),
        }
    }

    /// `[N, H, W, C]` and `[N, M, d]` to `[N, M, d]`.
    pub fn forward(&self, x: &Tensor<4>, z: Tensor<3>) -> Tensor<3> {
        let map = sequence(x);
        let seen = attend(self.q.forward(z.clone()), map.clone(), map, MAP_HEADS);
        let gated = seen * hard_sigmoid(self.gate.forward(z.clone())) * 2.0;
        self.norm.forward(z + self.out.forward(gated))
    }
}

/// The tokens look at each other, then a perceptron; norms behind the sums.
#[derive(Module, Debug)]
pub struct Former {
    q: Linear,
    out: Linear,
    norm1: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    norm2: LayerNorm,
}

impl Former {
    /// For tokens of width `d`.
    pub fn new(d: usize, init: &mut Init) -> Self {
        Self {
            q: linear(d, d, init),
            out: linear(d, d, init),
            norm1: init.layer_norm(d),
            fc1: linear(d, 2 * d, init),
            fc2: linear(2 * d, d, init),
            norm2: init.layer_norm(d),
        }
    }

    /// `[N, M, d]` to the same shape.
    pub fn forward(&self, z: Tensor<3>) -> Tensor<3> {
        let seen = attend(self.q.forward(z.clone()), z.clone(), z.clone(), TOKEN_HEADS);
        let z = self.norm1.forward(z + self.out.forward(seen));
        self.norm2
            .forward(z.clone() + perceptron(&self.fc1, &self.fc2, z))
    }
}

/// Tokens to map: each position of the map, itself the query, looks at the tokens.
#[derive(Module, Debug)]
pub struct FormerToMobile {
    k: Linear,
    v: Linear,
}

impl FormerToMobile {
    /// For maps of `channels` and tokens of width `d`.
    pub fn new(channels: usize, d: usize, init: &mut Init) -> Self {
        Self {
            k: linear(d, channels, init),
            v: linear(d, channels, init),
        }
    }

    /// `[N, H, W, C]` and `[N, M, d]` to `[N, H, W, C]`.
    pub fn forward(&self, x: Tensor<4>, z: Tensor<3>) -> Tensor<4> {
        let shape = x.dims();
        let (k, v) = (self.k.forward(z.clone()), self.v.forward(z));
        let seen = attend(sequence(&x), k, v, MAP_HEADS);
        x + seen.reshape(shape)
    }
}

/// The convolutions of a block at stride 1: expand, depthwise, project; with a skip where the widths are the same.
#[derive(Module, Debug)]
pub struct Bottleneck {
    pw1: ConvNorm,
    act1: DynamicRelu,
    dw: ConvNorm,
    act2: DynamicRelu,
    pw2: ConvNorm,
    groups: usize,
    skip: bool,
}

impl Bottleneck {
    pub(super) fn new(
        [inputs, inside, outputs]: [usize; 3],
        d: usize,
        groups: usize,
        init: &mut Init,
    ) -> Self {
        Self {
            pw1: ConvNorm::new([inputs, inside], 1, 1, groups, init),
            act1: DynamicRelu::new(inside, d, init),
            dw: ConvNorm::new([inside, inside], 3, 1, inside, init),
            act2: DynamicRelu::new(inside, d, init),
            pw2: ConvNorm::new([inside, outputs], 1, 1, groups, init),
            groups,
            skip: inputs == outputs,
        }
    }

    fn forward(&self, x: Tensor<4>, token: Tensor<2>) -> Tensor<4> {
        let slopes1 = self.act1.slopes(token.clone());
        let dw = self.dw.dynamic(self.act2.slopes(token));
        let pw2 = self.pw2.layer(Activation::Identity);
        if self.groups == 1 {
            return chain(x, [self.pw1.dynamic(slopes1), dw, pw2], self.skip);
        }
        // An activation of each channel by itself may as well come before the channels are shuffled.
        let pw1 = self.pw1.dynamic(unshuffle(slopes1, self.groups));
        let y = shuffle(chain(x.clone(), [pw1], false), self.groups);
        let y = shuffle(chain(y, [dw, pw2], false), self.groups);
        if self.skip { x + y } else { y }
    }
}

/// The convolutions of a block at stride 2: two lite bottlenecks, the second with a skip around it.
#[derive(Module, Debug)]
pub struct DownSampling {
    dw1: ConvNorm,
    act1: DynamicRelu,
    pw1: ConvNorm,
    dw2: ConvNorm,
    act2: DynamicRelu,
    pw2: ConvNorm,
    shuffles: [usize; 2],
}

impl DownSampling {
    pub(super) fn new(
        [inputs, inside, outputs, inside2]: [usize; 4],
        stride: usize,
        d: usize,
        groups: usize,
        init: &mut Init,
    ) -> Self {
        Self {
            dw1: ConvNorm::new([inputs, inside], 3, stride, inputs, init),
            act1: DynamicRelu::new(inside, d, init),
            pw1: ConvNorm::new([inside, outputs], 1, 1, groups, init),
            dw2: ConvNorm::new([outputs, inside2], 3, 1, outputs, init),
            act2: DynamicRelu::new(inside2, d, init),
            pw2: ConvNorm::new([inside2, outputs], 1, 1, groups, init),
            shuffles: if groups > 1 {
                [inputs, outputs]
            } else {
                [1, 1]
            },
        }
    }

    fn forward(&self, x: Tensor<4>, token: Tensor<2>) -> Tensor<4> {
        let [first, second] = self.shuffles;
        let dw1 = self
            .dw1
            .dynamic(unshuffle(self.act1.slopes(token.clone()), first));
        let dw2 = self.dw2.dynamic(unshuffle(self.act2.slopes(token), second));
        let [pw1, pw2] = [&self.pw1, &self.pw2].map(|pw| pw.layer(Activation::Identity));
        if first == 1 {
            let y = chain(x, [dw1, pw1], false);
            return y.clone() + chain(y, [dw2, pw2], false);
        }
        let y = chain(shuffle(chain(x, [dw1], false), first), [pw1], false);
        let inner = shuffle(chain(y.clone(), [dw2], false), second);
        y + chain(inner, [pw2], false)
    }
}

/// The half of a block that works on the map.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Mobile {
    /// Stride 1.
    Bottleneck(Bottleneck),
    /// Stride 2.
    DownSampling(DownSampling),
}

impl Mobile {
    /// `[N, H, W, C]` and the first token `[N, d]` to the block's output map.
    pub fn forward(&self, x: Tensor<4>, token: Tensor<2>) -> Tensor<4> {
        match self {
            Self::Bottleneck(mobile) => mobile.forward(x, token),
            Self::DownSampling(mobile) => mobile.forward(x, token),
        }
    }
}
