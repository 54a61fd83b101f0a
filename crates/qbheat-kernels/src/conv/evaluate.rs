//! Chains in evaluation mode: normalisations are folded into the weights, activations into the loops that make their
//! inputs, and an inverted residual runs a band of rows at a time, so that its wide maps never leave the cache.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::forward::bands;
use super::{Chain, Kind, Stage};
use crate::array::Array;
use crate::depthwise::{self, Padded};
use crate::gemm::{Packed, multiply_within};
use crate::norm::Activation;
use crate::rows::{CHUNK, parallel_chunk};
use crate::simd::{add, unwritten};

/// A stage with its normalisation inside.
struct Folded {
    /// Of a matrix.
    packed: Packed,
    /// Of a depthwise kernel.
    taps: Vec<f32>,
    bias: Vec<f32>,
    bounds: Option<[f32; 2]>,
}

impl Folded {
    fn new(stage: &Stage, epsilon: f32) -> Self {
        let [mean, variance] = stage.fixed.expect("statistics are given");
        let [gamma, beta] = stage.parameters;
        let scale: Vec<f32> = gamma
            .iter()
            .zip(variance.iter())
            .map(|(gamma, variance)| gamma / (variance + epsilon).sqrt())
            .collect();
        let bias = (0..scale.len())
            .map(|i| beta[i] - mean[i] * scale[i])
            .collect();
        let per_output = stage.weight.len() / scale.len();
        let scaled: Vec<f32> = stage
            .weight
            .chunks_exact(per_output)
            .zip(&scale)
            .flat_map(|(kernel, scale)| kernel.iter().map(move |weight| weight * scale))
            .collect();
        let (mut packed, mut taps) = (Packed::default(), Vec::new());
        match stage.kind {
            Kind::Pointwise => {
                packed.fill([per_output, scale.len()], &scaled, [1, per_output]);
            }
            Kind::Depthwise { .. } => taps = depthwise::by_tap(&scaled, false),
            Kind::Dense { .. } => packed = stage.window().packed(&scaled),
        }
        Self {
            packed,
            taps,
            bias,
            bounds: match stage.activation {
                Activation::Relu => Some([0.0, f32::INFINITY]),
                Activation::Relu6 => Some([0.0, 6.0]),
                Activation::Identity | Activation::Dynamic => None,
            },
        }
    }

    fn multiply(&self, rows: usize, x: &[f32], y: &mut [f32]) {
        multiply_within(rows, x, &self.packed, &self.bias, self.bounds, y);
    }
}

/// A chain's folded weights and what they were made of.
struct Plan {
    /// Held, so that no other array can come to stand where one of them stands.
    parameters: Vec<Array>,
    forms: Vec<(Kind, Activation)>,
    epsilon: f32,
    stages: Vec<Folded>,
}

/// Plans that are kept, and how many numbers in all; folding and packing take longer than a pass of one image.
const KEPT: usize = 128;
const KEPT_NUMBERS: usize = 32 << 20;

static PLANS: Mutex<VecDeque<Arc<Plan>>> = Mutex::new(VecDeque::new());

fn plan(chain: &Chain, stages: &[Stage], inputs: &[Array]) -> Arc<Plan> {
    let parameters = &inputs[1..];
    let is_same = |plan: &Arc<Plan>| {
        let alike = |(kept, given): (&Array, &Array)| {
            kept.as_ptr() == given.as_ptr() && kept.shape() == given.shape()
        };
        plan.epsilon == chain.epsilon
            && plan.forms == chain.stages
            && plan.parameters.len() == parameters.len()
            && plan.parameters.iter().zip(parameters).all(alike)
    };
    let plans = || PLANS.lock().unwrap_or_else(PoisonError::into_inner);
    // What was used last goes last.
    let known = |plans: &mut VecDeque<Arc<Plan>>| {
        let found = plans.remove(plans.iter().position(is_same)?)?;
        plans.push_front(found.clone());
        Some(found)
    };
    let found = known(&mut plans());
    if let Some(found) = found {
        return found;
    }
    let made = Arc::new(Plan {
        parameters: parameters.to_vec(),
        forms: chain.stages.clone(),
        epsilon: chain.epsilon,
        stages: stages
            .iter()
            .map(|stage| Folded::new(stage, chain.epsilon))
            .collect(),
    });
    let mut plans = plans();
    // Another thread may have made it meanwhile.
    if let Some(found) = known(&mut plans) {
        return found;
    }
    plans.push_front(made.clone());
    let mut numbers = 0;
    let fitting = plans.iter().take_while(|plan| {
        let weights = plan.parameters.iter().map(|array| array.len());
        numbers += weights.sum::<usize>();
        numbers <= KEPT_NUMBERS
    });
    let kept = fitting.count().clamp(1, KEPT);
    plans.truncate(kept);
    made
}

/// The chain's output, where its statistics are fixed and its stages are of forms that fold.
pub(super) fn evaluate(chain: &Chain, stages: &[Stage], inputs: &[Array]) -> Option<Array> {
    let folds = |stage: &Stage| {
        let once = !matches!(stage.kind, Kind::Depthwise { multiplier, .. } if multiplier > 1);
        once && stage.fixed.is_some() && stage.activation != Activation::Dynamic
    };
    if !stages.iter().all(folds) || !is_known(stages) {
        return None;
    }
    let plan = plan(chain, stages, inputs);
    let skip = chain.skip.then_some(&inputs[0]);
    let kinds: Vec<Kind> = stages.iter().map(|stage| stage.kind).collect();
    match kinds[..] {
        [Kind::Pointwise, Kind::Depthwise { .. }, Kind::Pointwise] => {
            let [expand, depthwise, project] = &plan.stages[..] else {
                unreachable!("as many as stages")
            };
            let parts = (Some(expand), depthwise, project);
            Some(inverted_residual(stages, parts, &inputs[0], skip))
        }
        [Kind::Depthwise { .. }, Kind::Pointwise] => {
            let [depthwise, project] = &plan.stages[..] else {
                unreachable!("as many as stages")
            };
            let parts = (None, depthwise, project);
            Some(inverted_residual(stages, parts, &inputs[0], skip))
        }
        _ => {
            let last = stages.len() - 1;
            let pairs = stages.iter().zip(&plan.stages).enumerate();
            Some(pairs.fold(inputs[0].clone(), |x, (i, (stage, folded))| {
                let skip = skip.filter(|_| i == last);
                match stage.kind {
                    Kind::Pointwise => pointwise(stage, folded, &x, skip),
                    _ => dense(stage, folded, &x, skip),
                }
            }))
        }
    }
}

/// An inverted residual, or anything without depthwise convolutions.
fn is_known(stages: &[Stage]) -> bool {
    let is_depthwise = |stage: &Stage| matches!(stage.kind, Kind::Depthwise { .. });
    let is_pointwise = |stage: &Stage| stage.kind == Kind::Pointwise;
    match stages {
        [expand, middle, project] if is_depthwise(middle) => {
            is_pointwise(expand) && is_pointwise(project)
        }
        [middle, project] if is_depthwise(middle) => is_pointwise(project),
        _ => !stages.iter().any(is_depthwise),
    }
}

fn pointwise(stage: &Stage, folded: &Folded, x: &Array, skip: Option<&Array>) -> Array {
    let (depth, columns) = (stage.from[2], stage.to[2]);
    let rows = stage.samples * stage.rows_to();
    let chunk = parallel_chunk(rows);
    let mut y = unwritten(rows * columns);
    y.par_chunks_mut(chunk * columns)
        .zip(x.par_chunks(chunk * depth))
        .enumerate()
        .for_each(|(i, (y, x))| {
            folded.multiply(y.len() / columns, x, y);
            if let Some(skip) = skip {
                add(y, &skip[i * chunk * columns..]);
            }
        });
    Array::new(y, &stage.shape())
}

fn dense(stage: &Stage, folded: &Folded, x: &Array, skip: Option<&Array>) -> Array {
    let window = stage.window();
    let (width, columns) = (stage.to[1], stage.to[2]);
    let per_sample = stage.rows_from() * stage.from[2];
    let band = (CHUNK / width).clamp(1, stage.to[0]);
    let mut y = unwritten(stage.shape().iter().product());
    bands(&mut y, stage, band).into_par_iter().for_each_init(
        || unwritten(band * width * window.depth()),
        |scratch, (sample, first, y)| {
            let (start, count) = (first * width, y.len() / columns);
            let image = &x[sample * per_sample..][..per_sample];
            folded.multiply(count, window.gather(image, start, count, scratch), y);
            if let Some(skip) = skip {
                let row = sample * stage.rows_to() + start;
                add(y, &skip[row * columns..]);
            }
        },
    );
    Array::new(y, &stage.shape())
}

/// What one thread needs for a band.
struct Scratch {
    /// The widened rows, where they do not fit the padded image as they are made.
    wide: Vec<f32>,
    image: Padded,
    inside: Vec<f32>,
}

/// Floats of a band's padded image: with what is made of it, they stay in a core's second cache.
const BAND: usize = 60_000;

fn inverted_residual(
    stages: &[Stage],
    (expand, depthwise, project): (Option<&Folded>, &Folded, &Folded),
    x: &Array,
    skip: Option<&Array>,
) -> Array {
    let [.., middle, last] = stages else {
        unreachable!("there are a depthwise and a pointwise stage")
    };
    let x: &[f32] = x;
    let geometry = middle.geometry();
    let (stride, width, height) = (geometry.stride, geometry.width, geometry.height);
    let (inputs, inside) = (stages[0].from[2], geometry.channels);
    let (rows, columns, outputs) = (geometry.rows(), geometry.columns(), last.to[2]);
    // At least two bands of a map where there are few maps, one for each of two threads.
    let most = if last.samples < 4 {
        rows.div_ceil(2)
    } else {
        rows
    };
    let band = geometry.band_within(BAND).min(most.max(1));
    let seen = band * stride + 2;
    let mut y = unwritten(last.shape().iter().product());
    bands(&mut y, last, band).into_par_iter().for_each_init(
        || Scratch {
            wide: unwritten(if expand.is_some() {
                seen * width * inside
            } else {
                0
            }),
            image: Padded::new(seen, width, inside),
            inside: unwritten(band * columns * inside),
        },
        |scratch, (sample, first, y)| {
            let count = y.len() / (columns * outputs);
            let top = (first * stride) as isize - 1;
            let seen = (count - 1) * stride + 3;
            // The image's own rows among those that are seen.
            let start = top.max(0) as usize;
            let end = height.min((top + seen as isize) as usize);
            let from = &x[(sample * height + start) * width * inputs..];
            let from = &from[..(end - start) * width * inputs];
            let wide = match expand {
                Some(expand) => {
                    let wide = &mut scratch.wide[..(end - start) * width * inside];
                    expand.multiply((end - start) * width, from, wide);
                    &*wide
                }
                None => from,
            };
            scratch.image.fill(top, seen, height, |y, row| {
                row.copy_from_slice(&wide[(y - start) * width * inside..][..width * inside]);
            });
            let made = &mut scratch.inside[..count * columns * inside];
            let finish = (&depthwise.bias[..], depthwise.bounds);
            let size = [count, columns];
            depthwise::convolve_within(&scratch.image, &depthwise.taps, stride, size, finish, made);
            project.multiply(count * columns, made, y);
            if let Some(skip) = skip {
                let row = (sample * rows + first) * columns;
                add(y, &skip[row * outputs..]);
            }
        },
    );
    Array::new(y, &last.shape())
}
