//! The same operations made of Burn's own, for every device and every type of number.

use burn::tensor::activation::{gelu, relu, softmax};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Int, Tensor, TensorData, module};

use crate::norm::Activation;
use crate::{AdamWStep, Stage, Statistics, Table, TransformerBlock};

pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    module::linear(x, weight.transpose(), bias)
}

pub fn linear_step(x: Tensor<3>, weight: Tensor<2>, factors: Vec<f32>) -> Tensor<3> {
    let shape = [factors.len(), 1, 1];
    let factors = Tensor::from_data(TensorData::new(factors, shape), &x.device());
    x.clone() + linear(x, weight, None) * factors
}

pub fn mlp<const D: usize>(
    x: Tensor<D>,
    [w1, w2]: [Tensor<2>; 2],
    [b1, b2]: [Tensor<1>; 2],
) -> Tensor<D> {
    linear(gelu(linear(x, w1, Some(b1))), w2, Some(b2))
}

pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    scale: Tensor<1>,
    shift: Tensor<1>,
    epsilon: f32,
) -> Tensor<D> {
    module::layer_norm(x, scale, Some(shift), f64::from(epsilon))
}

pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, heads: usize) -> Tensor<3> {
    attention_within(q, k, v, heads, &[])
}

/// Added to a score, leaves nothing of its weight.
const UNSEEN: f32 = -1e9;

pub fn attention_within(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    segments: &[u32],
) -> Tensor<3> {
    let [n, l, c] = q.dims();
    let s = k.dims()[1];
    let split =
        |x: Tensor<3>, length: usize| x.reshape([n, length, heads, c / heads]).swap_dims(1, 2);
    let q = split(q, l) * ((c / heads) as f32).powf(-0.5);
    let mut scores = q.matmul(split(k, s).transpose());
    if !segments.is_empty() {
        let mut apart = Vec::with_capacity(n * l * l);
        for segments in segments.chunks_exact(l) {
            for own in segments {
                let unseen = |other: &u32| if own == other { 0.0 } else { UNSEEN };
                apart.extend(segments.iter().map(unseen));
            }
        }
        let apart = TensorData::new(apart, [n, 1, l, l]);
        let apart = Tensor::from_data(apart, &scores.device());
        scores = scores + apart;
    }
    softmax(scores, 3)
        .matmul(split(v, s))
        .swap_dims(1, 2)
        .reshape([n, l, c])
}

/// The parts of [`crate::TransformerBlock`] in the order they run.
pub fn transformer_block(x: Tensor<3>, block: TransformerBlock) -> Tensor<3> {
    let [norm1, norm2] = block.norms;
    let epsilon = block.epsilon;
    let normed = layer_norm(x.clone(), norm1.0, norm1.1, epsilon);
    let qkv = linear(normed, block.qkv.0, Some(block.qkv.1));
    let seen = self_attention(qkv, block.heads);
    let x = x + linear(seen, block.projection.0, Some(block.projection.1));
    let normed = layer_norm(x.clone(), norm2.0, norm2.1, epsilon);
    let [(w1, b1), (w2, b2)] = block.mlp;
    x + mlp(normed, [w1, w2], [b1, b2])
}

pub fn self_attention(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    let channels = qkv.dims()[2] / 3;
    let part = |i: usize| qkv.clone().slice_dim(2, i * channels..(i + 1) * channels);
    attention(part(0), part(1), part(2), heads)
}

pub fn patches(images: Tensor<4>, side: usize, epsilon: Option<f32>) -> Tensor<3> {
    let [n, colours, height, width] = images.dims();
    let (rows, columns) = (height / side, width / side);
    let values = side * side * colours;
    let patches = images
        .reshape([n, colours, rows, side, columns, side])
        .permute([0, 2, 4, 3, 5, 1])
        .reshape([n, rows * columns, values]);
    let Some(epsilon) = epsilon else {
        return patches;
    };
    let centred = patches.clone() - patches.mean_dim(2);
    let variance = (centred.clone() * centred.clone()).sum_dim(2) / (values - 1) as f32;
    centred / (variance + epsilon).sqrt()
}

pub fn weighted_squared_error(
    predicted: Tensor<3>,
    target: Tensor<3>,
    weights: Tensor<2>,
) -> Tensor<1> {
    let difference = predicted - target;
    // Reduced axis by axis: Burn's whole-tensor sum may split large tensors differently from run to run.
    let error = (difference.clone() * difference)
        .mean_dim(2)
        .squeeze_dim::<2>(2);
    (error * weights.clone()).sum_dim(1).sum() / weights.sum_dim(1).sum()
}

pub fn arrange(parts: Vec<Tensor<3>>, tables: &[Table], table_of: &[usize]) -> Tensor<3> {
    let [n, length, width] = parts[0].dims();
    let all = Tensor::cat(parts, 1);
    let rows: Vec<i32> = table_of
        .iter()
        .flat_map(|&table| &tables[table])
        .map(|&(part, row)| (part * length + row) as i32)
        .collect();
    let shape = [n, rows.len() / n, 1];
    let rows = Tensor::<3, Int>::from_data(TensorData::new(rows, shape), &all.device());
    all.gather(1, rows.repeat_dim(2, width))
}

pub fn chain(
    x: Tensor<4>,
    stages: Vec<Stage>,
    skip: bool,
    epsilon: f32,
) -> (Tensor<4>, Statistics) {
    let mut statistics = Vec::new();
    let y = stages.into_iter().fold(x.clone(), |x, stage| {
        let z = convolve(x, &stage);
        let [n, h, w, c] = z.dims();
        let z = z.reshape([n * h * w, c]);
        let (centred, variance) = match stage.fixed {
            Some([mean, variance]) => (z - mean.reshape([1, c]), variance.reshape([1, c])),
            None => {
                // Reduced in two steps: Burn's sums over very many rows may be cut differently from run to run.
                let mean_of = |x: Tensor<2>| x.reshape([n, h * w, c]).mean_dim(1).mean_dim(0);
                let mean = mean_of(z.clone()).reshape([1, c]);
                let centred = z - mean.clone();
                let variance = mean_of(centred.clone() * centred.clone()).reshape([1, c]);
                statistics.push([mean, variance.clone()].map(|s| s.detach().reshape([c])));
                (centred, variance)
            }
        };
        let scale = stage.scale.reshape([1, c]) * (variance + epsilon).sqrt().recip();
        let v = (centred * scale + stage.shift.reshape([1, c])).reshape([n, h, w, c]);
        match stage.activation {
            Activation::Identity => v,
            Activation::Relu => relu(v),
            Activation::Relu6 => v.clamp(0.0, 6.0),
            Activation::Dynamic => {
                let slopes = stage.slopes.expect("a dynamic activation has slopes");
                let half = |i: usize| {
                    let slopes = slopes.clone().slice_dim(1, i * c..(i + 1) * c);
                    slopes.reshape([n, 1, 1, c])
                };
                (v.clone() * half(0)).max_pair(v * half(1))
            }
        }
    });
    (if skip { x + y } else { y }, statistics)
}

fn convolve(x: Tensor<4>, stage: &Stage) -> Tensor<4> {
    let [n, h, w, inputs] = x.dims();
    let [outputs, per_group, side, _] = stage.weight.dims();
    let groups = stage.groups;
    if side == 1 && stage.stride == 1 {
        // As a product of matrices: Burn's convolution takes three times as long for the gradient of a 1×1 weight.
        let weight = stage
            .weight
            .clone()
            .reshape([groups, outputs / groups, per_group]);
        return x
            .reshape([n * h * w, groups, inputs / groups])
            .swap_dims(0, 1)
            .matmul(weight.transpose())
            .swap_dims(0, 1)
            .reshape([n, h, w, outputs]);
    }
    let options = ConvOptions::new(
        [stage.stride, stage.stride],
        [side / 2, side / 2],
        [1, 1],
        groups,
    );
    let x = x.permute([0, 3, 1, 2]);
    module::conv2d(x, stage.weight.clone(), None, options).permute([0, 2, 3, 1])
}

pub fn adamw(
    step: AdamWStep,
    weights: Tensor<1>,
    gradient: Tensor<1>,
    [first, second]: [Tensor<1>; 2],
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [beta1, beta2] = step.betas;
    let gradient = gradient * step.gradient_scale;
    let square = gradient.clone() * gradient.clone();
    let first = first * beta1 + gradient * (1.0 - beta1);
    let second = second * beta2 + square * (1.0 - beta2);
    let deviation = (second.clone() / step.correction).sqrt() + step.epsilon;
    let weights = weights * step.keep - first.clone() / deviation * step.rate;
    (weights, [first, second])
}

pub fn squared_norm<const D: usize>(x: Tensor<D>) -> f64 {
    let rows = x.dims()[0] as i32;
    let x = x.reshape([rows, -1]);
    let square: f32 = (x.clone() * x).sum_dim(1).sum().into_scalar();
    f64::from(square)
}
