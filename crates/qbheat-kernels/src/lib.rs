//! Fused layers of light vision networks for Burn's CPU back end, each with a hand-written gradient.
//!
//! Every function here has two bodies. On the CPU (Burn's Flex back end, single precision) it is one operation that
//! keeps intermediate results in the processor's cache, runs on all threads of rayon's pool and uses the best vector
//! instructions the processor has. On any other device, and after [`set_enabled`]`(false)`, it is made of Burn's own
//! operations, with the same result up to rounding.
//!
//! The fused results are the same bit for bit on any number of threads.
//!
//! Maps have their channels last, `[N, H, W, C]`: a 1×1 convolution is then a linear layer over positions, and a map is
//! a sequence.
#![warn(missing_docs)]

mod array;
mod attention;
mod conv;
mod depthwise;
mod gemm;
mod layer_norm;
mod linear;
mod memory;
mod norm;
mod operation;
mod plain;
mod rows;
mod simd;

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Device, Tensor};

use conv::{Chain, Kind};
use operation::{Input, run};

pub use memory::KeepingAllocator;
pub use norm::Activation;

static ENABLED: AtomicBool = AtomicBool::new(true);

/// Turns the fused operations on or off for the whole process; they are on at first.
pub fn set_enabled(enabled: bool) {
    ENABLED.store(enabled, Ordering::Relaxed);
}

/// The vector instructions in use.
pub fn instructions() -> String {
    format!("{:?}", simd::arch())
}

/// Billions of floating-point operations a second that products of matrices reach on all threads of rayon's pool: what
/// nothing here can exceed. Takes about a quarter of a second.
pub fn peak_gflops() -> f64 {
    const SIDE: usize = 96;
    const TIMES: usize = 200;
    let matrix = vec![1.0; SIDE * SIDE];
    let packed = gemm::Packed::new([SIDE, SIDE], &matrix, [SIDE, 1]);
    let once = || {
        let start = std::time::Instant::now();
        rayon::broadcast(|_| {
            let mut product = vec![0.0; SIDE * SIDE];
            for _ in 0..TIMES {
                gemm::multiply(SIDE, &matrix, &packed, gemm::Onto::Zero, &mut product);
            }
            std::hint::black_box(product);
        });
        let operations = 2 * SIDE * SIDE * SIDE * TIMES * rayon::current_num_threads();
        operations as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..100).map(|_| once()).fold(0.0, f64::max)
}

/// Whether the fused operations are to compute with such a tensor.
fn serves<const D: usize>(x: &Tensor<D>) -> bool {
    ENABLED.load(Ordering::Relaxed) && x.dtype() == DType::F32 && x.device() == Device::flex()
}

/// `x Wᵀ + b`: x `[…, K]`, W `[N, K]`, b `[N]` to `[…, N]`.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    if !serves(&x) {
        return plain::linear(x, weight, bias);
    }
    let inputs = [x.into(), weight.into()];
    run(
        linear::Linear,
        inputs.into_iter().chain(bias.map(Input::from)),
    )
    .0
}

/// `W₂ gelu(W₁ x + b₁) + b₂`, GELU by the error function: x `[…, K]`, W₁ `[H, K]`, W₂ `[N, H]` to `[…, N]`.
pub fn mlp<const D: usize>(
    x: Tensor<D>,
    weights: [Tensor<2>; 2],
    biases: [Tensor<1>; 2],
) -> Tensor<D> {
    if !serves(&x) {
        return plain::mlp(x, weights, biases);
    }
    let ([w1, w2], [b1, b2]) = (weights, biases);
    let inputs = [x.into(), w1.into(), b1.into(), w2.into(), b2.into()];
    run(linear::Mlp, inputs).0
}

/// Layer normalisation over the last axis (arXiv 1607.06450): x `[…, C]`, scale and shift `[C]`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    scale: Tensor<1>,
    shift: Tensor<1>,
    epsilon: f32,
) -> Tensor<D> {
    if !serves(&x) {
        return plain::layer_norm(x, scale, shift, epsilon);
    }
    let inputs = [x.into(), scale.into(), shift.into()];
    run(layer_norm::LayerNorm { epsilon }, inputs).0
}

/// `softmax(q kᵀ / √(C/heads)) v` in each of `heads` contiguous groups of channels (arXiv 1706.03762): q `[N, L, C]`, k
/// and v `[N, S, C]` to `[N, L, C]`.
pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, heads: usize) -> Tensor<3> {
    if !serves(&q) {
        return plain::attention(q, k, v, heads);
    }
    run(
        attention::Attention { heads },
        [q.into(), k.into(), v.into()],
    )
    .0
}

/// [`attention`] with q, k and v side by side: `[N, T, 3·C]` to `[N, T, C]`.
pub fn self_attention(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    if serves(&qkv) {
        return run(attention::Attention { heads }, [qkv.into()]).0;
    }
    let channels = qkv.dims()[2] / 3;
    let part = |i: usize| qkv.clone().slice_dim(2, i * channels..(i + 1) * channels);
    plain::attention(part(0), part(1), part(2), heads)
}

/// A convolution with the batch normalisation and the activation behind it.
#[derive(Clone, Debug)]
pub struct Stage {
    /// `[outputs, inputs/groups, side, side]`, of odd side; padded so that stride 1 keeps the size.
    pub weight: Tensor<4>,
    /// Between positions.
    pub stride: usize,
    /// Parts that the channels are cut into, each convolved by itself.
    pub groups: usize,
    /// Of the normalisation, `[outputs]`.
    pub scale: Tensor<1>,
    /// Of the normalisation, `[outputs]`.
    pub shift: Tensor<1>,
    /// Mean and variance to normalise by, `[outputs]` each; without them, the batch's own.
    pub fixed: Option<[Tensor<1>; 2]>,
    /// Behind the normalisation.
    pub activation: Activation,
    /// For [`Activation::Dynamic`]: a₁, then a₂ of each sample, `[N, 2·outputs]`.
    pub slopes: Option<Tensor<2>>,
}

impl Stage {
    /// The form it has, if there is a kernel for it.
    fn kind(&self, inputs: usize) -> Option<Kind> {
        let [outputs, per_group, side, _] = self.weight.dims();
        match (side, self.stride, self.groups) {
            (1, 1, 1) => Some(Kind::Pointwise),
            (3, 1 | 2, groups) if groups == inputs && per_group == 1 => Some(Kind::Depthwise {
                stride: self.stride,
                multiplier: outputs / inputs,
            }),
            (_, stride, 1) => Some(Kind::Dense { stride }),
            _ => None,
        }
    }
}

/// Mean and biased variance of a batch, `[C]` each, one pair for each stage.
pub type Statistics = Vec<[Tensor<1>; 2]>;

/// Stages one after another, and the input added to the output where `skip`: `[N, H, W, C]` to `[N, ⌈H/s⌉, ⌈W/s⌉, outputs]`
/// with s the product of the strides. Also the batch's statistics, of all stages or, where they are fixed, of none.
///
/// Fused, a chain keeps only what its convolutions make. Where it has no kernel for one of them, all are Burn's own.
pub fn chain(
    x: Tensor<4>,
    stages: Vec<Stage>,
    skip: bool,
    epsilon: f32,
) -> (Tensor<4>, Statistics) {
    let mut channels = x.dims()[3];
    let kinds: Option<Vec<Kind>> = stages
        .iter()
        .map(|stage| {
            let inputs = std::mem::replace(&mut channels, stage.weight.dims()[0]);
            stage.kind(inputs)
        })
        .collect();
    let fixed = stages.iter().all(|stage| stage.fixed.is_some());
    let (true, Some(kinds)) = (serves(&x), kinds) else {
        return plain::chain(x, stages, skip, epsilon);
    };
    let operation = Chain {
        stages: kinds
            .into_iter()
            .zip(&stages)
            .map(|(kind, stage)| (kind, stage.activation))
            .collect(),
        skip,
        fixed,
        epsilon,
    };
    let inputs = stages.into_iter().flat_map(|stage| {
        let statistics = stage.fixed.map(|statistics| statistics.map(Input::from));
        [stage.weight.into(), stage.scale.into(), stage.shift.into()]
            .into_iter()
            .chain(statistics.into_iter().flatten())
            .chain(stage.slopes.map(Input::from))
            .collect::<Vec<Input>>()
    });
    let (y, statistics) = run(operation, std::iter::once(x.into()).chain(inputs));
    let mut statistics = statistics.into_iter();
    let pairs = std::iter::from_fn(|| Some([statistics.next()?, statistics.next()?]));
    (y, pairs.collect())
}
