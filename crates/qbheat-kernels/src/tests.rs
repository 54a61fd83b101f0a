//! Each fused operation against the same made of Burn's own, and against finite differences.

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::{Activation, Stage, TransformerBlock, plain};

const FORWARD: f32 = 1e-5;
const BACKWARD: f32 = 1e-4;

type Ask = Box<dyn Fn(&Gradients) -> Option<Vec<f32>>>;

/// Numbers for an operation's inputs, and what asks for their gradients later.
struct Inputs {
    random: StdRng,
    device: Device,
    values: Vec<Vec<f32>>,
    next: usize,
    gradients: Vec<Ask>,
}

impl Inputs {
    fn new(seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            device: Device::flex().autodiff(),
            values: Vec::new(),
            next: 0,
            gradients: Vec::new(),
        }
    }

    /// From the first input again, on the same numbers.
    fn again(&mut self, device: Device) {
        self.next = 0;
        self.gradients.clear();
        self.device = device;
    }

    /// The next input, around `centre`.
    fn around<const D: usize>(&mut self, centre: f32, shape: [usize; D]) -> Tensor<D> {
        let length = shape.iter().product();
        if self.values.len() == self.next {
            let values = (0..length).map(|_| centre + self.random.random_range(-1.0..1.0));
            self.values.push(values.collect());
        }
        let data = TensorData::new(self.values[self.next].clone(), shape);
        self.next += 1;
        let tensor = Tensor::<D>::from_data(data, &self.device);
        if !self.device.is_autodiff() {
            return tensor;
        }
        let tensor = tensor.require_grad();
        let kept = tensor.clone();
        self.gradients
            .push(Box::new(move |gradients| kept.grad(gradients).map(values)));
        tensor
    }

    fn take<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        self.around(0.0, shape)
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

fn assert_close(name: &str, found: &[f32], expected: &[f32], tolerance: f32, scale: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let wrong = (a - b).abs();
        assert!(
            wrong <= tolerance * scale,
            "{name}[{i}]: {a} for {b}, largest {scale}"
        );
    }
}

/// Σ outputᵢ·cos(i), so that every output has a gradient of its own.
fn loss<const D: usize>(output: Tensor<D>) -> Tensor<1> {
    let shape = output.dims();
    let weights = (0..shape.iter().product()).map(|i: usize| (i as f32).cos());
    let weights: Vec<f32> = weights.collect();
    let weights = Tensor::<D>::from_data(TensorData::new(weights, shape), &output.device());
    (output * weights).sum()
}

/// The output and the gradient of each input.
fn run<const D: usize>(
    inputs: &mut Inputs,
    operation: &impl Fn(&mut Inputs, bool) -> Tensor<D>,
    fused: bool,
) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    inputs.again(Device::flex().autodiff());
    let output = operation(inputs, fused);
    let gradients = loss(output.clone()).backward();
    let found = inputs.gradients.iter().map(|ask| ask(&gradients)).collect();
    (values(output), found)
}

/// Holds the fused operation against the plain one and against central differences.
fn check<const D: usize>(
    name: &str,
    seed: u64,
    operation: impl Fn(&mut Inputs, bool) -> Tensor<D>,
) {
    let inputs = &mut Inputs::new(seed);
    let (expected, expected_gradients) = run(inputs, &operation, false);
    let (found, gradients) = run(inputs, &operation, true);
    assert_close(name, &found, &expected, FORWARD, largest(&expected));
    // Of all inputs: what cancels to nothing in one is as wrong as the sums that it comes from.
    let scale = expected_gradients
        .iter()
        .flatten()
        .fold(0.0f32, |most, gradient| most.max(largest(gradient)));
    for (i, (found, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
        let name = format!("{name}: gradient of input {i}");
        assert_eq!(found.is_some(), expected.is_some(), "{name}");
        if let (Some(found), Some(expected)) = (found, expected) {
            assert_close(&name, found, expected, BACKWARD, scale);
        }
    }
    // Without gradients, the same output.
    inputs.again(Device::flex());
    let output = values(operation(inputs, true));
    assert_close(name, &output, &expected, FORWARD, largest(&expected));
    for (i, gradient) in gradients.iter().enumerate() {
        if let Some(gradient) = gradient {
            check_difference(name, inputs, &operation, i, gradient);
        }
    }
}

/// The derivative along one direction in one input.
fn check_difference<const D: usize>(
    name: &str,
    inputs: &mut Inputs,
    operation: &impl Fn(&mut Inputs, bool) -> Tensor<D>,
    input: usize,
    gradient: &[f32],
) {
    const STEP: f32 = 4e-3;
    let centre = inputs.values[input].clone();
    let direction: Vec<f32> = (0..centre.len())
        .map(|i| if i % 3 == 0 { -1.0 } else { 1.0 })
        .collect();
    let mut at = |sign: f32| -> f64 {
        inputs.values[input] = centre
            .iter()
            .zip(&direction)
            .map(|(x, d)| x + sign * STEP * d)
            .collect();
        inputs.again(Device::flex());
        let output = values(operation(inputs, true));
        let weighted = output
            .iter()
            .enumerate()
            .map(|(i, y)| f64::from(*y) * f64::from((i as f32).cos()));
        weighted.sum()
    };
    let difference = (at(1.0) - at(-1.0)) / f64::from(2.0 * STEP);
    inputs.values[input] = centre;
    let along: f64 = gradient
        .iter()
        .zip(&direction)
        .map(|(g, d)| f64::from(g * d))
        .sum();
    let size: f64 = gradient.iter().map(|g| f64::from(g.abs())).sum();
    assert!(
        (difference - along).abs() <= 0.02 * size + 0.02,
        "{name}: input {input} changes the loss by {difference}, its gradient says {along} (size {size})"
    );
}

#[test]
fn linear_layers() {
    for (seed, [rows, inputs, outputs]) in [
        [1, 1, 1],
        [3, 5, 7],
        [70, 17, 33],
        [300, 24, 50],
        [130, 300, 260],
    ]
    .into_iter()
    .enumerate()
    {
        check("linear", seed as u64, |x, fused| {
            let (a, w, b) = (
                x.take([rows, inputs]),
                x.take([outputs, inputs]),
                x.take([outputs]),
            );
            if fused {
                crate::linear(a, w, Some(b))
            } else {
                plain::linear(a, w, Some(b))
            }
        });
        check("linear without bias", seed as u64, |x, fused| {
            let (a, w) = (x.take([rows, inputs]), x.take([outputs, inputs]));
            if fused {
                crate::linear(a, w, None)
            } else {
                plain::linear(a, w, None)
            }
        });
    }
}

#[test]
fn linear_steps() {
    for (n, t, c) in [(1, 1, 3), (3, 5, 17), (4, 16, 260)] {
        check("step", 0, |x, fused| {
            let (a, w) = (x.take([n, t, c]), x.take([c, c]));
            let factors: Vec<f32> = (0..n)
                .map(|i| if i % 2 == 0 { 1.0 } else { -0.5 })
                .collect();
            if fused {
                crate::linear_step(a, w, factors)
            } else {
                plain::linear_step(a, w, factors)
            }
        });
    }
}

/// What `cat` hands back are views of one gradient.
#[test]
fn linear_steps_side_by_side() {
    check("steps", 1, |x, fused| {
        let (a, b, w) = (x.take([2, 3, 6]), x.take([1, 3, 6]), x.take([6, 6]));
        let parts = [(a, vec![1.0, -1.0]), (b, vec![0.5])].map(|(part, factors)| {
            if fused {
                crate::linear_step(part, w.clone(), factors)
            } else {
                plain::linear_step(part, w.clone(), factors)
            }
        });
        Tensor::cat(parts.to_vec(), 0)
    });
}

#[test]
fn perceptrons() {
    for [rows, inputs, inside, outputs] in [[1, 3, 5, 2], [70, 16, 33, 16], [200, 20, 80, 20]] {
        check("mlp", 1, |x, fused| {
            let a = x.take([rows, inputs]);
            let (w1, b1) = (x.take([inside, inputs]), x.take([inside]));
            let (w2, b2) = (x.take([outputs, inside]), x.take([outputs]));
            let (weights, biases) = ([w1, w2], [b1, b2]);
            if fused {
                crate::mlp(a, weights, biases)
            } else {
                plain::mlp(a, weights, biases)
            }
        });
    }
}

#[test]
fn layer_norms() {
    for [rows, width] in [[1, 2], [5, 7], [200, 48], [130, 192]] {
        check("layer norm", 2, |x, fused| {
            let (a, scale, shift) = (x.take([rows, width]), x.take([width]), x.take([width]));
            if fused {
                crate::layer_norm(a, scale, shift, 1e-5)
            } else {
                plain::layer_norm(a, scale, shift, 1e-5)
            }
        });
    }
}

#[test]
fn attention() {
    for ([n, l, s, c], heads) in [
        ([1, 1, 1, 4], 1),
        ([2, 5, 3, 12], 2),
        ([3, 17, 6, 40], 4),
        ([1, 3, 65, 16], 2),
        ([2, 150, 70, 24], 2),
    ] {
        check("attention within segments", 6, |x, fused| {
            let (q, k, v) = (x.take([n, l, c]), x.take([n, l, c]), x.take([n, l, c]));
            let segments: Vec<u32> = (0..n * l).map(|row| row as u32 % 7 / 3).collect();
            if fused {
                crate::attention_within(q, k, v, heads, segments)
            } else {
                plain::attention_within(q, k, v, heads, &segments)
            }
        });
        check("attention", 3, |x, fused| {
            let (q, k, v) = (x.take([n, l, c]), x.take([n, s, c]), x.take([n, s, c]));
            if fused {
                crate::attention(q, k, v, heads)
            } else {
                plain::attention(q, k, v, heads)
            }
        });
        check("attention to itself", 4, |x, fused| {
            let qkv = x.take([n, l, 3 * c]);
            if fused {
                crate::self_attention(qkv, heads)
            } else {
                plain::self_attention(qkv, heads)
            }
        });
        check("attention whose keys are its values", 5, |x, fused| {
            let (q, k) = (x.take([n, l, c]), x.take([n, s, c]));
            if fused {
                crate::attention(q, k.clone(), k, heads)
            } else {
                plain::attention(q, k.clone(), k, heads)
            }
        });
    }
}

#[test]
fn transformer_blocks() {
    for ([n, t, c], heads) in [([1, 1, 4], 1), ([2, 7, 20], 4), ([5, 33, 24], 2)] {
        check("block", 6, |x, fused| {
            let a = x.take([n, t, c]);
            let mut norm = || (x.around(1.0, [c]), x.take([c]));
            let norms = [norm(), norm()];
            let mut linear = |outputs: usize, inputs: usize| {
                let small = 1.0 / (inputs as f32).sqrt();
                (x.take([outputs, inputs]) * small, x.take([outputs]))
            };
            let block = TransformerBlock {
                norms,
                qkv: linear(3 * c, c),
                projection: linear(c, c),
                mlp: [linear(4 * c, c), linear(c, 4 * c)],
                heads,
                epsilon: 1e-5,
            };
            if fused {
                crate::transformer_block(a, block)
            } else {
                plain::transformer_block(a, block)
            }
        });
    }
}

#[test]
fn patches_and_their_error() {
    for ([n, c, rows, columns], side) in [([1, 1, 1, 1], 2), ([2, 3, 2, 3], 4), ([3, 3, 4, 4], 8)] {
        let shape = [n, c, rows * side, columns * side];
        for epsilon in [None, Some(1e-6)] {
            check("patches", 7, |x, fused| {
                // No leaf, so that backward goes on behind it.
                let images = x.take(shape) * 1.0;
                let rest = x.take([n, rows * columns, side * side * c]);
                if fused {
                    crate::patches(images, side, epsilon) + rest
                } else {
                    plain::patches(images.detach(), side, epsilon) + rest
                }
            });
        }
        let (t, p) = (rows * columns, side * side * c);
        check("error", 8, |x, fused| {
            let (predicted, target) = (x.take([n, t, p]), x.take([n, t, p]).detach());
            let weights = x.around(2.0, [n, t]).detach();
            if fused {
                crate::weighted_squared_error(predicted, target, weights)
            } else {
                plain::weighted_squared_error(predicted, target, weights)
            }
        });
    }
}

#[test]
fn rows_in_a_new_order() {
    let tables = vec![
        vec![(0, 0), (1, 1), (2, 0), (0, 1), (1, 0), (2, 1)],
        vec![(2, 1), (2, 0), (1, 1), (1, 0), (0, 1), (0, 0)],
    ];
    check("arrange", 9, |x, fused| {
        let parts = vec![x.take([3, 2, 5]), x.take([3, 2, 5]), x.take([3, 2, 5])];
        let table_of = vec![0, 1, 0];
        if fused {
            crate::arrange(parts, tables.clone(), table_of)
        } else {
            plain::arrange(parts, &tables, &table_of)
        }
    });
}

/// A chain's shape: images, height, width, channels; then for each stage side, stride, groups, outputs, activation.
type Shape<'a> = ([usize; 4], &'a [(usize, usize, usize, usize, Activation)]);

fn check_chain((shape, stages): Shape, skip: bool, fixed: bool, seed: u64) {
    let name = format!("chain {shape:?} {stages:?} skip {skip} fixed {fixed}");
    check(&name, seed, |x, fused| {
        let image = x.take(shape);
        let mut channels = shape[3];
        let stages = stages
            .iter()
            .map(|&(side, stride, groups, outputs, activation)| {
                let inputs = std::mem::replace(&mut channels, outputs) / groups;
                Stage {
                    weight: x.take([outputs, inputs, side, side]),
                    stride,
                    groups,
                    scale: x.around(1.5, [outputs]),
                    // Far from the kinks, so that no two ways of rounding differ there: nearly all is let through.
                    shift: x.around(
                        if activation == Activation::Relu {
                            8.0
                        } else {
                            0.0
                        },
                        [outputs],
                    ),
                    fixed: fixed.then(|| {
                        let spread = if activation == Activation::Relu {
                            60.0
                        } else {
                            2.0
                        };
                        [x.take([outputs]), x.around(spread, [outputs])].map(Tensor::detach)
                    }),
                    activation,
                    slopes: (activation == Activation::Dynamic)
                        .then(|| x.take([shape[0], 2 * outputs])),
                }
            })
            .collect();
        if fused {
            crate::chain(image, stages, skip, 1e-5).0
        } else {
            plain::chain(image, stages, skip, 1e-5).0
        }
    });
}

#[test]
fn chains_of_smooth_stages() {
    use Activation::Identity;
    let one = |side, stride, groups, outputs| [(side, stride, groups, outputs, Identity)];
    for fixed in [false, true] {
        // Odd sizes, one image, both strides, channels that fill no vector, and one that fills several.
        for (i, shape) in [[2, 1, 1, 3], [1, 5, 7, 3], [3, 6, 4, 19], [2, 9, 9, 70]]
            .into_iter()
            .enumerate()
        {
            let [.., c] = shape;
            let seed = i as u64;
            check_chain((shape, &one(1, 1, 1, 5)), false, fixed, seed);
            check_chain((shape, &one(1, 1, 1, c)), true, fixed, seed);
            for stride in [1, 2] {
                check_chain((shape, &one(3, stride, c, c)), false, fixed, seed);
                check_chain((shape, &one(3, stride, c, 2 * c)), false, fixed, seed);
                check_chain((shape, &one(3, stride, 1, 4)), false, fixed, seed);
            }
            check_chain((shape, &one(5, 1, 1, 3)), false, fixed, seed);
            check_chain((shape, &one(3, 1, c, c)), true, fixed, seed);
        }
    }
    // Bands of a map too large for one.
    check_chain(([1, 40, 33, 50], &one(3, 1, 50, 50)), false, false, 0);
    check_chain(([1, 41, 33, 50], &one(3, 2, 50, 50)), false, false, 0);
}

#[test]
fn chains_of_several_stages() {
    use Activation::{Identity, Relu};
    for fixed in [false, true] {
        let [wide, deep] = [(1, 1, 1, 20, Relu), (3, 1, 20, 20, Relu)];
        let last = (1, 1, 1, 6, Identity);
        check_chain(([2, 5, 5, 6], &[wide, deep, last]), true, fixed, 0);
        check_chain(
            ([3, 7, 4, 6], &[wide, (3, 2, 20, 20, Relu), last]),
            false,
            fixed,
            1,
        );
        check_chain(([2, 5, 5, 6], &[(3, 1, 6, 6, Relu), last]), true, fixed, 2);
        // As in ResNets: two of 3×3, and one of them between two of 1×1.
        let dense = (3, 1, 1, 6, Identity);
        check_chain(([2, 5, 7, 6], &[(3, 1, 1, 6, Relu), dense]), true, fixed, 3);
        check_chain(
            ([2, 5, 7, 6], &[wide, (3, 2, 1, 9, Relu), last]),
            false,
            fixed,
            4,
        );
        check_chain(
            (
                [2, 6, 6, 5],
                &[
                    (1, 1, 1, 7, Relu),
                    (3, 2, 1, 9, Relu),
                    (1, 1, 1, 4, Identity),
                ],
            ),
            false,
            fixed,
            3,
        );
    }
}

/// An activation with kinks, away from them: normalised values are given, not drawn.
#[test]
fn kinked_activations() {
    for activation in [Activation::Relu, Activation::Relu6, Activation::Dynamic] {
        let (samples, positions, channels) = (3, 2, 5);
        check(&format!("{activation:?}"), 0, |x, fused| {
            // Fixed statistics of mean 0 and variance 1 leave v = z/√(1 + ε), at least 0.2 from every kink.
            let places = [-3.3f32, -0.7, 0.4, 2.1, 5.2, 7.5, -0.3, 0.9];
            let count = samples * positions * channels;
            let given: Vec<f32> = (0..count).map(|i| places[(i * 5) % places.len()]).collect();
            if x.values.is_empty() {
                x.values.push(given);
            }
            let z = x.take([samples, positions, 1, channels]);
            let device = z.device();
            let eye = Tensor::<2>::eye(channels, &device).reshape([channels, channels, 1, 1]);
            let stage = Stage {
                weight: eye,
                stride: 1,
                groups: 1,
                scale: Tensor::ones([channels], &device),
                shift: Tensor::zeros([channels], &device),
                fixed: Some([
                    Tensor::zeros([channels], &device),
                    Tensor::ones([channels], &device),
                ]),
                activation,
                slopes: (activation == Activation::Dynamic).then(|| {
                    let [first, second] = [1.5, -1.5].map(|c| x.around(c, [samples, channels]));
                    Tensor::cat(vec![first, second], 1)
                }),
            };
            if fused {
                crate::chain(z, vec![stage], false, 1e-5).0
            } else {
                plain::chain(z, vec![stage], false, 1e-5).0
            }
        });
    }
}

#[test]
fn batch_statistics_are_those_of_the_batch() {
    let mut inputs = Inputs::new(0);
    let (x, weight) = (inputs.around(3.0, [3, 4, 5, 7]), inputs.take([9, 7, 1, 1]));
    let stage = Stage {
        weight,
        stride: 1,
        groups: 1,
        scale: inputs.take([9]),
        shift: inputs.take([9]),
        fixed: None,
        activation: Activation::Relu,
        slopes: None,
    };
    let (_, fused) = crate::chain(x.clone(), vec![stage.clone()], false, 1e-5);
    let (_, plain) = plain::chain(x, vec![stage], false, 1e-5);
    assert_eq!(fused.len(), 1);
    for (fused, plain) in fused[0].clone().into_iter().zip(plain[0].clone()) {
        let (fused, plain) = (values(fused), values(plain));
        assert_close("statistics", &fused, &plain, FORWARD, largest(&plain));
    }
}

#[test]
fn adamw_and_norms() {
    for length in [1, 17, 40_000] {
        let step = crate::AdamWStep {
            gradient_scale: 0.7,
            betas: [0.9, 0.95],
            keep: 0.99,
            rate: 0.01,
            correction: 0.3,
            epsilon: 1e-8,
        };
        let mut inputs = Inputs::new(1);
        inputs.again(Device::flex());
        let [weights, gradient, first] = [0.0, 0.0, 0.0].map(|c| inputs.around(c, [length]));
        let second = inputs.around(1.5, [length]);
        let moments = [first, second];
        let (fused, found) = crate::adamw(step, weights.clone(), gradient.clone(), moments.clone());
        let (plain, expected) = plain::adamw(step, weights, gradient.clone(), moments);
        let [a, b] = found;
        let [c, d] = expected;
        for (found, expected) in [(fused, plain), (a, c), (b, d)] {
            let (found, expected) = (values(found), values(expected));
            assert_close("adamw", &found, &expected, FORWARD, largest(&expected));
        }
        let (found, expected) = (
            crate::squared_norm(gradient.clone()),
            plain::squared_norm(gradient),
        );
        assert!((found - expected).abs() <= 1e-5 * expected);
    }
}

/// In evaluation mode folded weights are kept, but not mistaken for those of another chain.
#[test]
fn the_same_weights_with_another_activation_or_skip_give_another_answer() {
    let mut inputs = Inputs::new(0);
    inputs.again(Device::flex());
    let x = inputs.take([2, 3, 3, 5]) * 9.0;
    let stage = Stage {
        weight: inputs.take([5, 5, 1, 1]),
        stride: 1,
        groups: 1,
        scale: inputs.take([5]),
        shift: inputs.take([5]),
        fixed: Some([inputs.take([5]), inputs.around(2.0, [5])]),
        activation: Activation::Identity,
        slopes: None,
    };
    for activation in [Activation::Identity, Activation::Relu, Activation::Relu6] {
        for skip in [false, true, false] {
            let stages = vec![Stage {
                activation,
                ..stage.clone()
            }];
            let found = values(crate::chain(x.clone(), stages.clone(), skip, 1e-5).0);
            let expected = values(plain::chain(x.clone(), stages, skip, 1e-5).0);
            assert_close("chain", &found, &expected, FORWARD, largest(&expected));
        }
    }
}

/// A NaN is not lost in an activation or a softmax, so that a bad step is noticed.
#[test]
fn a_nan_stays_one() {
    let has_nan = |values: Vec<f32>| values.iter().any(|value| value.is_nan());
    for activation in [Activation::Relu, Activation::Relu6, Activation::Dynamic] {
        let mut inputs = Inputs::new(0);
        inputs.values.push(vec![f32::NAN; 2 * 3 * 3 * 4]);
        let x = inputs.take([2, 3, 3, 4]);
        let stage = Stage {
            weight: inputs.take([5, 4, 1, 1]),
            stride: 1,
            groups: 1,
            scale: inputs.take([5]),
            shift: inputs.take([5]),
            fixed: None,
            activation,
            slopes: (activation == Activation::Dynamic).then(|| inputs.take([2, 10])),
        };
        assert!(has_nan(values(crate::chain(x, vec![stage], false, 1e-5).0)));
    }
    let mut inputs = Inputs::new(0);
    inputs.values.push(vec![f32::NAN; 2 * 3 * 12]);
    let qkv = inputs.take([2, 3, 12]);
    assert!(has_nan(values(crate::self_attention(qkv.clone(), 2))));
    let (scale, shift) = (inputs.take([12]), inputs.take([12]));
    assert!(has_nan(values(crate::layer_norm(
        qkv.clone(),
        scale,
        shift,
        1e-5
    ))));
    let (weights, biases) = (
        [inputs.take([8, 12]), inputs.take([12, 8])],
        [inputs.take([8]), inputs.take([12])],
    );
    assert!(has_nan(values(crate::mlp(qkv, weights, biases))));
}

/// The same bits on one thread and on many.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let step = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let inputs = &mut Inputs::new(5);
            run(
                inputs,
                &|x: &mut Inputs, _| {
                    let image = x.take([7, 16, 16, 24]);
                    let mut stage = |side, groups, outputs, inputs| Stage {
                        weight: x.take([outputs, inputs, side, side]),
                        stride: 1,
                        groups,
                        scale: x.take([outputs]),
                        shift: x.take([outputs]),
                        fixed: None,
                        activation: Activation::Relu,
                        slopes: None,
                    };
                    let stages = vec![
                        stage(1, 1, 48, 24),
                        stage(3, 48, 48, 1),
                        stage(1, 1, 24, 48),
                    ];
                    let map = crate::chain(image, stages, true, 1e-5)
                        .0
                        .reshape([7, 256, 24]);
                    let mut pair = |outputs: usize, inputs: usize| {
                        (x.take([outputs, inputs]), x.take([outputs]))
                    };
                    let (qkv, projection) = (pair(72, 24), pair(24, 24));
                    let mlp = [pair(96, 24), pair(24, 96)];
                    let block = TransformerBlock {
                        norms: [0, 1].map(|_| (x.take([24]), x.take([24]))),
                        qkv,
                        projection,
                        mlp,
                        heads: 4,
                        epsilon: 1e-5,
                    };
                    crate::transformer_block(map, block)
                },
                true,
            )
        })
    };
    assert!(step(1) == step(3));
}

/// The same calls on a back end without kernels give the same, by Burn's own operations.
#[cfg(feature = "ndarray")]
#[test]
fn another_back_end_gives_the_same() {
    #[allow(deprecated)]
    let other = Device::ndarray().autodiff();
    let mut inputs = Inputs::new(3);
    let mut answers = [Device::flex().autodiff(), other].map(|device| {
        inputs.again(device);
        let stage = |x: &mut Inputs, side, stride, groups, outputs, inputs| Stage {
            weight: x.take([outputs, inputs, side, side]),
            stride,
            groups,
            scale: x.take([outputs]),
            shift: x.around(8.0, [outputs]),
            fixed: None,
            activation: Activation::Relu,
            slopes: None,
        };
        let image = inputs.take([3, 6, 6, 8]);
        let stages = vec![
            stage(&mut inputs, 1, 1, 1, 16, 8),
            stage(&mut inputs, 3, 2, 16, 16, 1),
        ];
        let map = crate::chain(image, stages, false, 1e-5)
            .0
            .reshape([3, 9, 16]);
        let qkv = crate::linear(map, inputs.take([48, 16]) * 0.02, Some(inputs.take([48])));
        let gradients = loss(crate::self_attention(qkv.clone(), 2)).backward();
        let found: Vec<Option<Vec<f32>>> =
            inputs.gradients.iter().map(|ask| ask(&gradients)).collect();
        (values(qkv), found)
    });
    let (expected, expected_gradients) = answers[1].clone();
    assert_close(
        "output",
        &answers[0].0,
        &expected,
        FORWARD,
        largest(&expected),
    );
    let scale = expected_gradients
        .iter()
        .flatten()
        .fold(0.0f32, |most, gradient| most.max(largest(gradient)));
    for (found, expected) in answers[0].1.drain(..).zip(expected_gradients) {
        let (found, expected) = (found.unwrap(), expected.unwrap());
        assert_close("gradient", &found, &expected, BACKWARD, scale);
    }
}
