//! Each fused operation against the same made of Burn's own, forward and backward, in turn:
//! `cargo bench --workspace --bench fused`; `-- NAME…` for those whose names have one of these in them.

use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use qbheat_kernels::{Activation, AdamWStep, Stage, TransformerBlock, set_enabled};

#[global_allocator]
static MEMORY: qbheat_kernels::KeepingAllocator = qbheat_kernels::KeepingAllocator::new();

const IMAGES: usize = 64;
/// Runs that are timed, after those that are not.
const RUNS: usize = 21;
const WARM: usize = 2;

fn waves<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let values = (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.7123).sin());
    let values: Vec<f32> = values.collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn input<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    waves(shape, &Device::flex().autodiff()).require_grad()
}

/// Prints the median milliseconds of both, and their ratio; nothing where only others are wanted.
fn compare(wanted: &[String], name: &str, mut run: impl FnMut()) {
    if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part)) {
        return;
    }
    let mut times = [true, false].map(|enabled| (enabled, Vec::with_capacity(RUNS)));
    for _ in 0..WARM + RUNS {
        for (enabled, times) in &mut times {
            set_enabled(*enabled);
            let start = Instant::now();
            run();
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    set_enabled(true);
    let [fused, plain] = times.map(|(_, mut times)| {
        times.drain(..WARM);
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    });
    println!(
        "| {name} | {fused:.2} | {plain:.2} | {:.1} |",
        plain / fused
    );
}

fn forward_and_backward<const D: usize>(
    wanted: &[String],
    name: &str,
    run: impl Fn() -> Tensor<D>,
) {
    compare(wanted, name, || drop(run().sum().backward()));
}

fn stage(side: usize, stride: usize, groups: usize, [inputs, outputs]: [usize; 2]) -> Stage {
    Stage {
        weight: input([outputs, inputs / groups, side, side]),
        stride,
        groups,
        scale: input([outputs]),
        shift: input([outputs]),
        fixed: None,
        activation: Activation::Relu,
        slopes: None,
    }
}

fn convolutions(wanted: &[String]) {
    let cases = [
        ("pointwise 24 to 96, 32x32", 32, stage(1, 1, 1, [24, 96])),
        ("pointwise 384 to 96, 8x8", 8, stage(1, 1, 1, [384, 96])),
        ("depthwise 96, 32x32", 32, stage(3, 1, 96, [96, 96])),
        (
            "depthwise 96, 32x32, stride 2",
            32,
            stage(3, 2, 96, [96, 96]),
        ),
        (
            "dense 3 to 24, 64x64, stride 2",
            64,
            stage(3, 2, 1, [3, 24]),
        ),
    ];
    for (name, side, stage) in cases {
        let inputs = stage.weight.dims()[1] * stage.groups;
        let x = input([IMAGES, side, side, inputs]);
        forward_and_backward(wanted, name, || {
            qbheat_kernels::chain(x.clone(), vec![stage.clone()], false, 1e-5).0
        });
    }
    let x = input([IMAGES, 8, 8, 64]);
    let stages = vec![
        stage(1, 1, 1, [64, 256]),
        stage(3, 1, 256, [256, 256]),
        stage(1, 1, 1, [256, 64]),
    ];
    forward_and_backward(wanted, "inverted residual 64, 8x8", || {
        qbheat_kernels::chain(x.clone(), stages.clone(), true, 1e-5).0
    });
}

fn sequences(wanted: &[String]) {
    let (t, c) = (64, 128);
    let x = input([IMAGES, t, c]);
    let pair = |outputs: usize, inputs: usize| (input([outputs, inputs]), input([outputs]));
    let (weight, bias) = pair(3 * c, c);
    forward_and_backward(wanted, "linear", || {
        qbheat_kernels::linear(x.clone(), weight.clone(), Some(bias.clone()))
    });
    let square = input([c, c]);
    forward_and_backward(wanted, "linear step", || {
        qbheat_kernels::linear_step(x.clone(), square.clone(), vec![1.0; IMAGES])
    });
    let [(w1, b1), (w2, b2)] = [pair(4 * c, c), pair(c, 4 * c)];
    forward_and_backward(wanted, "mlp", || {
        let (weights, biases) = ([w1.clone(), w2.clone()], [b1.clone(), b2.clone()]);
        qbheat_kernels::mlp(x.clone(), weights, biases)
    });
    let (scale, shift) = (input([c]), input([c]));
    forward_and_backward(wanted, "layer norm", || {
        qbheat_kernels::layer_norm(x.clone(), scale.clone(), shift.clone(), 1e-5)
    });
    let qkv = input([IMAGES, t, 3 * c]);
    forward_and_backward(wanted, "attention", || {
        qbheat_kernels::self_attention(qkv.clone(), 4)
    });
    let block = TransformerBlock {
        norms: [0, 1].map(|_| (input([c]), input([c]))),
        qkv: pair(3 * c, c),
        projection: pair(c, c),
        mlp: [pair(4 * c, c), pair(c, 4 * c)],
        heads: 4,
        epsilon: 1e-5,
    };
    forward_and_backward(wanted, "transformer block", || {
        qbheat_kernels::transformer_block(x.clone(), block.clone())
    });
    let parts = [0, 1].map(|_| input([IMAGES, t, c]));
    let table: Vec<(usize, usize)> = (0..2 * t).map(|i| (i % 2, i / 2)).collect();
    forward_and_backward(wanted, "arrange", || {
        let tables = vec![table.clone()];
        qbheat_kernels::arrange(parts.to_vec(), tables, vec![0; IMAGES])
    });
}

fn objective_and_optimiser(wanted: &[String]) {
    let device = Device::flex();
    let images = waves([IMAGES, 3, 64, 64], &device);
    compare(wanted, "patches", || {
        drop(qbheat_kernels::patches(images.clone(), 8, Some(1e-6)));
    });
    let predicted = input([IMAGES, 64, 192]);
    let target = waves([IMAGES, 64, 192], &Device::flex().autodiff());
    let weights = Tensor::ones([IMAGES, 64], &target.device());
    forward_and_backward(wanted, "weighted squared error", || {
        qbheat_kernels::weighted_squared_error(predicted.clone(), target.clone(), weights.clone())
    });
    let step = AdamWStep {
        gradient_scale: 1.0,
        betas: [0.9, 0.95],
        keep: 0.999,
        rate: 1e-3,
        correction: 0.5,
        epsilon: 1e-8,
    };
    let [gradient, first] = [0, 1].map(|_| waves([1_000_000], &device));
    let second = gradient.clone() * gradient.clone();
    let mut state = Some((first.clone(), [first, second]));
    compare(wanted, "AdamW", || {
        let (weights, moments) = state.take().expect("it was put back");
        state = Some(qbheat_kernels::adamw(
            step,
            weights,
            gradient.clone(),
            moments,
        ));
    });
}

fn main() {
    // Cargo adds options of its own.
    let names = std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    let wanted: Vec<String> = names.collect();
    println!("| forward and backward | fused, ms | Burn's own, ms | ratio |\n|---|---|---|---|");
    convolutions(&wanted);
    sequences(&wanted);
    objective_and_optimiser(&wanted);
}
