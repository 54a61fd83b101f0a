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

mod arrange;
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
mod optimizer;
mod patches;
mod plain;
mod rows;
mod simd;
mod transformer;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Device, Tensor};

use array::Array;
use conv::{Chain, Kind};
use operation::{Input, run};

pub use arrange::Table;
pub use memory::KeepingAllocator;
pub use norm::Activation;
pub use optimizer::AdamWStep;

static ENABLED: AtomicBool = AtomicBool::new(true);

/// Turns the fused operations on or off for the whole process; they are on at first.
pub fn set_enabled(enabled: bool) {
    ENABLED.store(enabled, Ordering::Relaxed);
}

/// The vector instructions in use, and how many numbers they take at a time.
pub fn instructions() -> String {
    let name = match simd::arch() {
        pulp::Arch::Scalar => "none",
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V3(_) => "AVX2",
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V4(_) => "AVX-512",
        #[allow(unreachable_patterns, reason = "processors differ in what they have")]
        _ => "NEON",
    };
    format!("{name} ({} lanes)", simd::Vectors::in_use().lanes)
}

/// Billions of floating-point operations a second that products of matrices reach on all threads of rayon's pool: what
/// nothing here can exceed. Takes less than a second with vectors, some without.
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
    let is_empty = x.dims().contains(&0);
    ENABLED.load(Ordering::Relaxed)
        && !is_empty
        && x.dtype() == DType::F32
        && x.device() == Device::flex()
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
        linear::Linear::PLAIN,
        inputs.into_iter().chain(bias.map(Input::from)),
    )
    .0
}

/// `x + factor·x Wᵀ` with a factor for each sample: x `[N, T, C]`, W `[C, C]` to `[N, T, C]`.
pub fn linear_step(x: Tensor<3>, weight: Tensor<2>, factors: Vec<f32>) -> Tensor<3> {
    let [samples, _, channels] = x.dims();
    assert_eq!((factors.len(), weight.dims()), (samples, [channels; 2]));
    if !serves(&x) {
        return plain::linear_step(x, weight, factors);
    }
    run(linear::Linear { factors }, [x.into(), weight.into()]).0
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
    attention_within(q, k, v, heads, Vec::new())
}

/// [`attention`] of rows to each other, L being S, where each sees those of its own segment only: `segments` has a number
/// for each row of each sample, `[N·L]`; empty where they see all.
pub fn attention_within(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    segments: Vec<u32>,
) -> Tensor<3> {
    if !serves(&q) || !serves(&k) {
        return plain::attention_within(q, k, v, heads, &segments);
    }
    run(
        attention::Attention { heads, segments },
        [q.into(), k.into(), v.into()],
    )
    .0
}

/// [`attention`] with q, k and v side by side: `[N, T, 3·C]` to `[N, T, C]`.
pub fn self_attention(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    if serves(&qkv) {
        return run(attention::Attention::new(heads), [qkv.into()]).0;
    }
    plain::self_attention(qkv, heads)
}

/// The parameters of a pre-norm transformer block: x + W_o attention(LN(x)), then that + mlp(LN(that)); each pair is a
/// weight `[outputs, inputs]` or scale, and a bias or shift.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct TransformerBlock {
    pub norms: [(Tensor<1>, Tensor<1>); 2],
    /// C to 3·C.
    pub qkv: (Tensor<2>, Tensor<1>),
    /// C to C.
    pub projection: (Tensor<2>, Tensor<1>),
    pub mlp: [(Tensor<2>, Tensor<1>); 2],
    pub heads: usize,
    pub epsilon: f32,
}

/// A transformer block (ViT, arXiv 2010.11929): `[N, T, C]` to the same shape.
pub fn transformer_block(x: Tensor<3>, block: TransformerBlock) -> Tensor<3> {
    if !serves(&x) {
        return plain::transformer_block(x, block);
    }
    let operation = transformer::Block {
        heads: block.heads,
        epsilon: block.epsilon,
    };
    let [norm1, norm2] = block.norms;
    let [fc1, fc2] = block.mlp;
    let mut inputs: Vec<Input> = vec![x.into(), norm1.0.into(), norm1.1.into()];
    for (weight, bias) in [block.qkv, block.projection] {
        inputs.extend([weight.into(), bias.into()]);
    }
    inputs.extend([norm2.0.into(), norm2.1.into()]);
    for (weight, bias) in [fc1, fc2] {
        inputs.extend([weight.into(), bias.into()]);
    }
    run(operation, inputs).0
}

/// Images `[N, C, H, W]` in square patches, row by row: `[N, (H/p)·(W/p), p·p·C]` with colours last. With an epsilon, each
/// patch minus its mean and over √(unbiased variance + epsilon), as in MAE (arXiv 2111.06377). No gradient flows back to
/// the images.
pub fn patches(images: Tensor<4>, side: usize, epsilon: Option<f32>) -> Tensor<3> {
    let images = images.detach();
    if !serves(&images) {
        return plain::patches(images, side, epsilon);
    }
    run(patches::Patches { side, epsilon }, [images.into()]).0
}

/// Σ weight·(mean over the last axis of squared differences) / Σ weight: prediction and target `[N, T, P]`, weights
/// `[N, T]`, to `[1]`. Only the prediction gets a gradient.
pub fn weighted_squared_error(
    predicted: Tensor<3>,
    target: Tensor<3>,
    weights: Tensor<2>,
) -> Tensor<1> {
    let (target, weights) = (target.detach(), weights.detach());
    if !serves(&predicted) {
        return plain::weighted_squared_error(predicted, target, weights);
    }
    let inputs = [predicted.into(), target.into(), weights.into()];
    run(patches::WeightedSquaredError, inputs).0
}

/// Rows of several sequences `[N, T, C]` in a new order, `[N, rows, C]`: each sample's as the table says that it has the
/// number of. In a table every row of every sequence comes up once; all have as many rows.
pub fn arrange(parts: Vec<Tensor<3>>, tables: Vec<Table>, table_of: Vec<usize>) -> Tensor<3> {
    if !serves(&parts[0]) || parts.len() > operation::MOST_INPUTS {
        return plain::arrange(parts, &tables, &table_of);
    }
    let inputs = parts.into_iter().map(Input::from);
    run(arrange::Arrange { tables, table_of }, inputs).0
}

/// One step of AdamW (arXiv 1711.05101) on flat vectors without gradients of their own: the new weights and moving
/// averages.
pub fn adamw(
    step: AdamWStep,
    weights: Tensor<1>,
    gradient: Tensor<1>,
    moments: [Tensor<1>; 2],
) -> (Tensor<1>, [Tensor<1>; 2]) {
    if !serves(&weights) {
        return plain::adamw(step, weights, gradient, moments);
    }
    let [mut first, mut second] = moments.map(Array::of);
    let (mut weights, gradient) = (Array::of(weights), Array::of(gradient));
    step.apply(
        weights.values_mut(),
        &gradient,
        first.values_mut(),
        second.values_mut(),
    );
    (weights.into_plain(), [first, second].map(Array::into_plain))
}

/// Σ xᵢ² of a tensor without a gradient of its own.
pub fn squared_norm<const D: usize>(x: Tensor<D>) -> f64 {
    if serves(&x) {
        return optimizer::squares(&Array::of(x));
    }
    plain::squared_norm(x)
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
        let [outputs, per_group, side, width] = self.weight.dims();
        if side != width || side.is_multiple_of(2) || per_group * self.groups != inputs {
            return None;
        }
        match (side, self.stride, self.groups) {
            (1, 1, 1) => Some(Kind::Pointwise),
            (3, 1 | 2, groups)
                if groups == inputs && per_group == 1 && outputs.is_multiple_of(inputs) =>
            {
                Some(Kind::Depthwise {
                    stride: self.stride,
                    multiplier: outputs / inputs,
                })
            }
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
    let same_size = stages.iter().all(|stage| stage.stride == 1) && channels == x.dims()[3];
    assert!(same_size || !skip, "the input is as large as the output");
    let fixed = stages.iter().all(|stage| stage.fixed.is_some());
    let alike = stages.iter().all(|stage| {
        stage.fixed.is_some() == fixed
            && stage.slopes.is_some() == (stage.activation == Activation::Dynamic)
    });
    let per_stage = if fixed { 6 } else { 4 };
    let fits = alike && stages.len() * per_stage < operation::MOST_INPUTS;
    let (true, true, Some(kinds)) = (serves(&x), fits, kinds) else {
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
