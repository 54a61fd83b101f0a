//! Against PyTorch and scikit-learn; the answers come from `tools/make_fixtures.py`.

use burn::module::Module;
use burn::tensor::Tensor;
use qbheat::baseline::{MoCo, MoCoConfig};
use qbheat::config::Config;
use qbheat::encoder::{
    Build, DynamicRelu, Encoder, Former, FormerToMobile, InvertedResidual, MobileFormer,
    MobileToFormer, ResNet, ResNetTable, Residual, Row, Table,
};
use qbheat::heat::{
    Parametrisation, Propagator, QbHeatConfig, Quadrant, Visible, all_show, normalised_patches,
};
use qbheat::latent::{Latent, ObjectiveConfig, Target};
use qbheat::nn::{
    Activation, Fan, Linear, Named, StateDict, TransformerBlock, cross_entropy,
    use_batch_statistics,
};
use qbheat::pretrain::{PretrainModel, qb_heat};
use qbheat::probe::{Matrix, fit_logistic};
use qbheat::train::{
    AdamW, AdamWConfig, LearningRate, Schedule, Stop, TrainState, give_up, settled, train,
};

use crate::support::{
    BACKWARD, FORWARD, assert_close, difference, fixture, gradients, init, tensor, values, wave,
};

fn fixtures() -> StateDict {
    fixture("reference.safetensors")
}

/// The weights and running statistics that `fill` in the script gives.
fn fill<M: Module>(module: M) -> M {
    let mut state = StateDict::of(&module);
    for (name, tensor) in &mut state.0 {
        let shape = tensor.shape.clone();
        let phase = name
            .bytes()
            .enumerate()
            .map(|(k, byte)| (k as u64 + 1) * u64::from(byte))
            .sum::<u64>()
            % 1000;
        let last = name.rsplit('.').next().unwrap();
        let (scale, shift) = match (last, &shape[..]) {
            ("running_var", _) => (0.5, 1.0),
            ("weight", [_]) => (0.1, 1.0),
            (_, [_]) => (0.1, 0.0),
            ("matrices", [.., c]) => (0.3 / (*c as f64).sqrt(), 0.0),
            (_, [_, rest @ ..]) => ((3.0 / rest.iter().product::<usize>() as f64).sqrt(), 0.0),
            (_, []) => unreachable!(),
        };
        *tensor = wave(&shape, phase as f64, scale);
        tensor.values.iter_mut().for_each(|v| *v += shift);
    }
    state.load_into(module).unwrap()
}

fn layer_case<M: Module, const D: usize>(
    case: &str,
    module: M,
    shape: [usize; D],
    forward: impl Fn(&M, Tensor<D>) -> Tensor<D>,
) {
    let fixtures = fixtures();
    let module = fill(module);
    let x: Tensor<D> = tensor(&wave(&shape, 0.5, 1.0)).require_grad();
    let y = forward(&module, x.clone());
    assert_close(
        &fixtures,
        &format!("{case}/output"),
        &values(y.clone()),
        FORWARD,
    );
    let weights: Tensor<D> = tensor(&wave(&y.dims(), 1.0, 1.0));
    assert_gradients(&fixtures, case, &module, x, (y * weights).sum(), BACKWARD);
    assert_running_statistics(&fixtures, case, &module);
}

/// A forward pass over maps with channels last, for inputs and answers with channels first.
fn channels_last(forward: impl Fn(Tensor<4>) -> Tensor<4>, x: Tensor<4>) -> Tensor<4> {
    forward(x.permute([0, 2, 3, 1])).permute([0, 3, 1, 2])
}

/// The gradients of `loss` after the input `x` and all parameters, off by at most `tolerance` of the largest one.
fn assert_gradients<M: Module, const D: usize>(
    fixtures: &StateDict,
    case: &str,
    module: &M,
    x: Tensor<D>,
    loss: Tensor<1>,
    tolerance: f32,
) {
    let grads = loss.backward();
    let input = values(x.grad(&grads).unwrap());
    assert_close(
        fixtures,
        &format!("{case}/gradient/input"),
        &input,
        tolerance,
    );
    let found = gradients(module, &grads);
    let expected = fixtures.under(&format!("{case}/gradient/"));
    assert_eq!(found.len() + 1, expected.0.len(), "{case}");
    let largest = found
        .values()
        .flatten()
        .fold(0f32, |largest, v| largest.max(v.abs()));
    for (name, found) in found {
        let off = found
            .iter()
            .zip(&expected.0[&name].values)
            .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(
            off <= tolerance * largest,
            "{case}: gradient of {name} off by {off:e} of {largest}"
        );
    }
}

fn assert_running_statistics(fixtures: &StateDict, case: &str, module: &impl Module) {
    let state = StateDict::of(module);
    for (name, expected) in fixtures.under(&format!("{case}/state/")).0 {
        assert!(
            difference(&state.0[&name].values, &expected.values) < FORWARD,
            "{case}: {name}"
        );
    }
}

#[test]
fn transformer_block_equals_pytorch() {
    let block = TransformerBlock::new(16, 4, &mut init());
    layer_case("block", block, [2, 5, 16], |block, x| block.forward(x));
}

#[test]
fn inverted_residual_equals_pytorch_running_statistics_included() {
    let residual = |channels, stride| {
        let sizes = Residual {
            channels,
            stride,
            activation: Activation::Relu,
            fan: Fan::In,
        };
        InvertedResidual::new(sizes, &mut init())
    };
    let with_skip = residual([6, 10, 6], 1);
    layer_case("residual1", with_skip, [3, 6, 5, 5], |block, x| {
        channels_last(|x| block.forward(x), x)
    });
    let with_stride = residual([6, 10, 8], 2);
    layer_case("residual2", with_stride, [3, 6, 6, 6], |block, x| {
        channels_last(|x| block.forward(x), x)
    });
}

#[test]
fn the_parts_of_a_mobile_former_block_equal_pytorch() {
    let token: Tensor<2> = tensor(&wave(&[3, 8], 0.8, 1.0));
    let tokens: Tensor<3> = tensor(&wave(&[3, 4, 8], 0.8, 1.0));
    let shape = [3, 6, 3, 5];
    let relu = DynamicRelu::new(6, 8, &mut init());
    layer_case("dynamic-relu", relu, shape, |relu, x| {
        let slopes = relu.slopes(token.clone());
        let half = |i: usize| slopes.clone().slice_dim(1, 6 * i..6 * i + 6);
        let [a, b] = [0, 1].map(|i| half(i).reshape([3, 6, 1, 1]));
        (a * x.clone()).max_pair(b * x)
    });
    let former = Former::new(8, &mut init());
    layer_case("tokens", former, [3, 4, 8], |former, z| former.forward(z));
    let to_map = FormerToMobile::new(6, 8, &mut init());
    layer_case("tokens-to-map", to_map, shape, |bridge, x| {
        channels_last(|x| bridge.forward(x, tokens.clone()), x)
    });

    // Map in, tokens out.
    let (case, fixtures) = ("map-to-tokens", fixtures());
    let to_tokens = fill(MobileToFormer::new(6, 8, &mut init()));
    let x: Tensor<4> = tensor(&wave(&shape, 0.5, 1.0)).require_grad();
    let z = to_tokens.forward(&x.clone().permute([0, 2, 3, 1]), tokens);
    assert_close(
        &fixtures,
        &format!("{case}/output"),
        &values(z.clone()),
        FORWARD,
    );
    let weights: Tensor<3> = tensor(&wave(&z.dims(), 1.0, 1.0));
    assert_gradients(
        &fixtures,
        case,
        &to_tokens,
        x,
        (z * weights).sum(),
        BACKWARD,
    );
}

/// All kinds of rows, with skip and without; `ROWS` in `tools/mobile_former.py`.
const MINI: Table = Table {
    stem: 8,
    stem_stride: 1,
    tokens: [3, 32],
    groups: 1,
    rows: &[
        Row::Lite {
            expand: 2,
            out: 8,
            stride: 1,
        },
        Row::Down {
            expand: 3,
            out: 12,
            expand2: 2,
        },
        Row::Flat { expand: 2, out: 12 },
        Row::Down {
            expand: 2,
            out: 16,
            expand2: 2,
        },
        Row::Flat { expand: 2, out: 20 },
    ],
    widen: None,
};

fn mini(groups: usize) -> MobileFormer {
    let table = Table { groups, ..MINI };
    let build = Build {
        stride: 4,
        inputs: 3,
    };
    fill(MobileFormer::new(&table, build, &mut init()))
}

#[test]
fn a_mobile_former_equals_pytorch_on_whole_images_and_quarters_in_both_modes() {
    let fixtures = fixtures();
    let whole: Tensor<4> = tensor(&wave(&[2, 3, 16, 16], 0.5, 1.0));
    let quarter = whole.clone().slice([0..2, 0..3, 0..8, 0..8]);
    for (name, groups) in [("mini", 1), ("mini-groups", 4)] {
        for (pass, x) in [("whole", &whole), ("quarter", &quarter), ("train", &whole)] {
            let case = format!("{name}/{pass}");
            let network = match pass {
                "train" => mini(groups),
                _ => use_batch_statistics(mini(groups), false),
            };
            let x = x.clone().detach().require_grad();
            let image = x.clone().permute([0, 2, 3, 1]);
            let (map, tokens) = network.forward_with_tokens(image, |_| {});
            let map = map.permute([0, 3, 1, 2]);
            assert_close(
                &fixtures,
                &format!("{case}/map"),
                &values(map.clone()),
                1e-4,
            );
            assert_close(
                &fixtures,
                &format!("{case}/tokens"),
                &values(tokens.clone()),
                1e-4,
            );
            let map_weights: Tensor<4> = tensor(&wave(&map.dims(), 1.0, 1.0));
            let token_weights: Tensor<3> = tensor(&wave(&tokens.dims(), 1.0, 1.0));
            let loss = (map * map_weights).mean() + (tokens * token_weights).mean();
            assert_gradients(&fixtures, &case, &network, x, loss, 1e-4);
            assert_running_statistics(&fixtures, &case, &network);
        }
    }
}

#[test]
fn small_resnets_equal_pytorch_in_both_modes() {
    for (case, bottleneck) in [("resnet-mini", false), ("resnet-mini-bottleneck", true)] {
        let table = ResNetTable {
            width: 6,
            blocks: [2, 1, 0, 0],
            bottleneck,
        };
        let network = |stride| ResNet::new(&table, Build { stride, inputs: 3 }, &mut init());
        layer_case(case, network(8), [2, 3, 30, 26], |network, x| {
            channels_last(|x| network.forward(x, |_| {}), x)
        });
        // Stride 2: a stem that does not halve, and no pool.
        let network = fill(network(2)).valid();
        let image: Tensor<4> = tensor(&wave(&[2, 3, 12, 10], 0.5, 1.0));
        let map = channels_last(|x| network.forward(x, |_| {}), image.inner());
        assert_close(
            &fixtures(),
            &format!("{case}/evaluation"),
            &values(map),
            FORWARD,
        );
    }
}

#[test]
fn propagator_equals_pytorch_in_all_parametrisations() {
    use Parametrisation::*;
    let fixtures = fixtures();
    for (kind, name) in [
        (Signed, "signed"),
        (Separate, "separate"),
        (Exponential, "exponential"),
        (NormLinear, "norm-linear"),
    ] {
        for (visible, place) in [
            (Quadrant::TopLeft, "00"),
            (Quadrant::BottomRight, "11"),
            (Quadrant::TopRight, "01"),
        ] {
            let case = format!("propagator-{name}-{place}");
            let propagator = fill(Propagator::new(6, kind, &mut init()));
            let z: Tensor<3> = tensor(&wave(&[2, 3, 6], 0.5, 1.0)).require_grad();
            let q = propagator.propagate(z.clone(), &all_show(visible, 2));
            let (row, column) = visible.cell();
            let mut cells = vec![
                ((row, column), q.visible),
                ((row, 1 - column), q.beside),
                ((1 - row, column), q.above_or_below),
                ((1 - row, 1 - column), q.diagonal),
            ];
            cells.sort_by_key(|(place, _)| *place);
            let whole: Tensor<4> =
                Tensor::stack(cells.into_iter().map(|(_, features)| features).collect(), 0);
            assert_close(
                &fixtures,
                &format!("{case}/output"),
                &values(whole.clone()),
                FORWARD,
            );
            let weights: Tensor<4> = tensor(&wave(&whole.dims(), 1.0, 1.0));
            let grads = (whole * weights).sum().backward();
            let found = gradients(&propagator, &grads);
            assert_close(
                &fixtures,
                &format!("{case}/gradient/matrices"),
                &found["matrices"],
                BACKWARD,
            );
            let input = values(z.grad(&grads).unwrap());
            assert_close(
                &fixtures,
                &format!("{case}/gradient/input"),
                &input,
                BACKWARD,
            );
        }
    }
}

#[test]
fn masked_loss_equals_pytorch() {
    let fixtures = fixtures();
    let images: Tensor<4> = tensor(&wave(&[2, 3, 8, 8], 0.5, 1.0));
    let predicted: Tensor<3> = tensor(&wave(&[2, 16, 12], 0.3, 1.0)).require_grad();
    let weights: Tensor<2> = tensor(&fixtures.0["loss/weights"]);
    let target = normalised_patches(images, 2);
    let loss = qbheat_kernels::weighted_squared_error(predicted.clone(), target, weights);
    assert_close(&fixtures, "loss/output", &values(loss.clone()), FORWARD);
    let gradient = predicted.grad(&loss.backward()).unwrap();
    assert_close(
        &fixtures,
        "loss/gradient/predicted",
        &values(gradient),
        BACKWARD,
    );
}

#[test]
fn whole_model_has_the_loss_of_the_pytorch_model() {
    use Quadrant::*;
    let fixtures = fixtures();
    let visible = Visible::Quadrants(vec![
        TopRight,
        BottomRight,
        TopLeft,
        BottomLeft,
        TopRight,
        TopLeft,
        BottomRight,
        BottomLeft,
    ]);
    for kind in ["signed", "norm-linear"] {
        let settings = [
            ("image_size", "32"),
            ("qb_heat.propagator", kind),
            ("qb_heat.visible_weight", "0"),
            ("qb_heat.decoder.depth", "2"),
            ("qb_heat.decoder.width", "128"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let config = Config::load(None, &settings).unwrap();
        let model = fill(qb_heat(&config, &qbheat::device().autodiff()).unwrap());
        let images: Tensor<4> = tensor(&wave(&[8, 3, 32, 32], 0.5, 1.0));
        let loss = values(model.loss(images, &visible));
        assert_close(&fixtures, &format!("model-{kind}/output"), &loss, FORWARD);
    }
}

/// Loss, gradients, running statistics and what follows of a rival.
fn rival_case<M: PretrainModel>(case: &str, model: M, loss: impl Fn(&M) -> Tensor<1>) {
    let fixtures = fixtures();
    let model = fill(model);
    let loss = loss(&model);
    assert_close(
        &fixtures,
        &format!("{case}/output"),
        &values(loss.clone()),
        FORWARD,
    );
    let found = gradients(&model, &loss.backward());
    let prefix = format!("{case}/gradient/");
    // Nothing else has a gradient: neither keys nor teachers.
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        fixtures.under(&prefix).0.keys().collect::<Vec<_>>()
    );
    for (name, gradient) in &found {
        assert_close(&fixtures, &format!("{prefix}{name}"), gradient, BACKWARD);
    }
    assert_running_statistics(&fixtures, case, &model);
    let followed = fixtures.under(&format!("{case}/followed/"));
    let state = StateDict::of(&model.follow());
    let prefix = if case == "moco" { "key." } else { "teacher." };
    let teacher = state.under(prefix);
    assert!(!followed.0.is_empty());
    for (name, expected) in &followed.0 {
        let error = difference(&teacher.0[name].values, &expected.values);
        assert!(
            error <= FORWARD,
            "{case}: {name} follows with error {error:e}"
        );
    }
}

fn rival_encoder(build: Build) -> Encoder {
    let table = ResNetTable {
        width: 6,
        blocks: [1, 0, 0, 0],
        bottleneck: false,
    };
    Encoder::ResNet(ResNet::new(&table, build, &mut init()))
}

const RIVAL: Build = Build {
    stride: 4,
    inputs: 3,
};

#[test]
fn a_step_of_moco_equals_pytorch() {
    let config = MoCoConfig {
        queue: 6,
        dim: 4,
        sub_batches: 2,
        momentum: 0.75,
        temperature: 0.2,
    };
    let model = MoCo::new(&config, rival_encoder(RIVAL), &mut init());
    let views: Tensor<4> = tensor(&wave(&[16, 3, 16, 16], 0.65, 1.0));
    rival_case("moco", model, |model| {
        model.info_nce(views.clone(), &[2, 5, 0, 7, 3, 1, 6, 4])
    });
}

#[test]
fn a_step_with_latent_targets_equals_pytorch() {
    use Quadrant::*;
    let objective = ObjectiveConfig {
        target: Target::Latent,
        decorrelation: 0.3,
        momentum: 0.75,
        head: 10,
    };
    let config = QbHeatConfig {
        visible_weight: 0.5,
        ..QbHeatConfig::default()
    };
    let model = Latent::new(
        &config,
        &objective,
        rival_encoder(RIVAL),
        RIVAL,
        &mut init(),
    );
    let images: Tensor<4> = tensor(&wave(&[8, 3, 16, 16], 1.85, 1.0));
    let visible = Visible::Quadrants(
        [TopLeft, TopRight, BottomLeft, BottomRight]
            .into_iter()
            .flat_map(|quadrant| [quadrant; 2])
            .collect(),
    );
    rival_case("latent", model, |model| {
        model.loss_of(images.clone(), &visible)
    });
}

#[test]
fn label_smoothing_equals_pytorch() {
    let fixtures = fixtures();
    let scores: Tensor<2> = tensor(&wave(&[5, 4], 0.3, 2.0)).require_grad();
    let loss = cross_entropy(scores.clone(), &[0, 3, 1, 1, 2], 0.1);
    assert_close(&fixtures, "smoothed/output", &values(loss.clone()), FORWARD);
    let gradient = values(scores.grad(&loss.backward()).unwrap());
    assert_close(&fixtures, "smoothed/gradient/scores", &gradient, BACKWARD);
}

#[test]
fn twenty_steps_of_adamw_with_clipping_and_schedule_equal_pytorch() {
    let fixtures = fixtures();
    let x: Tensor<2> = tensor(&wave(&[8, 4], 0.2, 1.0));
    let y: Tensor<2> = tensor(&wave(&[8, 3], 0.9, 4.0));
    let state = TrainState {
        model: fill(init().linear(4, 3)),
        optimizer: AdamW::new(AdamWConfig {
            betas: [0.9, 0.95],
            weight_decay: 0.3,
            clip_norm: 0.7,
            encoder_rate: 1.0,
        }),
        step: 0,
    };
    let rate = LearningRate {
        peak: 0.05,
        warmup_steps: 5,
        total_steps: 20,
        schedule: Schedule::Cosine,
    };
    let mut losses = Vec::new();
    let state = train(
        state,
        &rate,
        || Ok(()),
        |model: &Linear, ()| {
            let error = model.forward(x.clone()) - y.clone();
            (error.clone() * error).mean()
        },
        settled,
        give_up,
        |_, report| {
            losses.push(report.loss);
            Ok(Stop::No)
        },
    )
    .unwrap();
    assert_close(&fixtures, "adamw/losses", &losses, FORWARD);
    let state = StateDict::of(&state.model);
    assert_close(
        &fixtures,
        "adamw/weight",
        &state.0["weight"].values,
        FORWARD,
    );
    assert_close(&fixtures, "adamw/bias", &state.0["bias"].values, FORWARD);
}

#[test]
fn logistic_regression_equals_scikit_learn() {
    let fixtures = fixtures();
    let Named { values, .. } = wave(&[90, 5], 0.4, 1.0);
    let labels: Vec<u32> = (0..90).map(|i| i * 7 % 11 % 3).collect();
    let solved = fit_logistic(&Matrix { values, columns: 5 }, &labels, 3, 1e-2);
    assert!(solved.converged);
    let expected = &fixtures.0["logistic/weights"].values;
    let found: Vec<f32> = solved
        .weights
        .transpose()
        .iter()
        .map(|&v| v as f32)
        .collect();
    assert!(
        difference(&found, expected) < 2e-3,
        "{found:?} {expected:?}"
    );
    let bias: Vec<f32> = solved.bias.iter().map(|&v| v as f32).collect();
    assert!(difference(&bias, &fixtures.0["logistic/bias"].values) < 2e-3);
}
