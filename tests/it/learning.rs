//! One network, one batch: what must be learnt, and what must not be seen.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use qbheat::config::Config;
use qbheat::data::{BUILTIN, DataConfig, Dataset, ImageSize, normalise, whole_view};
use qbheat::error::Error;
use qbheat::heat::{Corner, Quadrant, Visible, sort_by_quadrant, visible_quarters};
use qbheat::nn::StateDict;
use qbheat::observe::Silent;
use qbheat::pretrain::qb_heat;
use qbheat::train::{
    AdamW, AdamWConfig, LearningRate, Schedule, Stop, TrainState, give_up, settled, train,
};

use crate::support::values;

const BATCH: usize = 16;

const ENCODERS: [&str; 2] = ["mobilenet-tiny", "mf-tiny"];

fn config(encoder: &str) -> Config {
    let settings = [("image_size", "32"), ("encoder.name", encoder)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    Config::load(None, &settings).unwrap()
}

/// Sixteen images of the built-in data.
fn real_images(device: &Device) -> Tensor<4> {
    let data = DataConfig {
        path: BUILTIN.into(),
        ..DataConfig::default()
    };
    let dataset = Dataset::open(&data, 0, &Silent).unwrap();
    let size = ImageSize::square(32);
    let mut pixels = Vec::new();
    for i in 0..BATCH {
        let (picture, _) = dataset.images.picture(i * 350).unwrap();
        normalise(&whole_view(&picture, size), size, &mut pixels);
    }
    Tensor::from_data(TensorData::new(pixels, [BATCH, 3, 32, 32]), device)
}

fn quadrants() -> Vec<Quadrant> {
    (0..BATCH).map(|i| Quadrant::ALL[i % 4]).collect()
}

fn state(encoder: &str, device: &Device) -> TrainState<qbheat::heat::QbHeat> {
    TrainState {
        model: qb_heat(&config(encoder), device).unwrap(),
        optimizer: AdamW::new(AdamWConfig {
            betas: [0.9, 0.95],
            weight_decay: 0.0,
            clip_norm: 3.0,
            encoder_rate: 1.0,
        }),
        step: 0,
    }
}

fn rate(total_steps: u64) -> LearningRate {
    LearningRate {
        peak: 3e-3,
        warmup_steps: 5,
        total_steps,
        schedule: Schedule::Cosine,
    }
}

#[test]
fn each_small_encoder_overfits_one_batch_of_real_images_to_a_loss_below_a_quarter() {
    let device = qbheat::device().autodiff();
    let images = real_images(&device);
    for encoder in ENCODERS {
        let mut last = f32::INFINITY;
        train(
            state(encoder, &device),
            &rate(150),
            || Ok(images.clone()),
            |model: &qbheat::heat::QbHeat, images| {
                model.loss(images, &Visible::Quadrants(quadrants()))
            },
            settled,
            give_up,
            |_, report| {
                last = report.loss;
                Ok(Stop::No)
            },
        )
        .unwrap();
        assert!(
            last < 0.25,
            "{encoder}: loss {last}; the trivial predictor has about 0.96"
        );
    }
}

#[test]
fn nothing_of_the_masked_pixels_reaches_the_encoder() {
    let device = qbheat::device();
    let images = real_images(&device);
    let quadrants = quadrants();
    let mut pixels = values(images.clone());
    for (i, value) in pixels.iter_mut().enumerate() {
        let (image, y, x) = (i / 3072, i / 32 % 32, i % 32);
        if (y / 16, x / 16) != quadrants[image].cell() {
            *value = f32::NAN;
        }
    }
    let masked = Tensor::from_data(TensorData::new(pixels, [BATCH, 3, 32, 32]), &device);
    for name in ENCODERS {
        let encoder = qb_heat(&config(name), &device).unwrap().encoder.valid();
        let features = |images: &Tensor<4>| {
            let (sorted, sizes, _) = sort_by_quadrant(images.clone(), &quadrants);
            values(encoder.forward(visible_quarters(&sorted, &sizes)))
        };
        let (before, after) = (features(&images), features(&masked));
        assert!(
            before
                .iter()
                .zip(&after)
                .all(|(a, b)| a.to_bits() == b.to_bits()),
            "{name}"
        );
    }
}

/// The same batch at every step, but of no numbers at the third.
fn third_is_bad(images: Tensor<4>) -> impl FnMut() -> Result<Tensor<4>, Error> {
    let mut batches = 0;
    move || {
        batches += 1;
        Ok(if batches == 3 {
            images.clone() * f32::NAN
        } else {
            images.clone()
        })
    }
}

#[test]
fn a_loss_that_is_no_number_stops_training_before_the_weights_change() {
    let device = qbheat::device().autodiff();
    let images = real_images(&device);
    let mut updates = 0;
    let result = train(
        state(ENCODERS[0], &device),
        &rate(5),
        third_is_bad(images),
        |model: &qbheat::heat::QbHeat, images| model.loss(images, &Visible::Quadrants(quadrants())),
        settled,
        give_up,
        |state, report| {
            updates += 1;
            let weights = StateDict::of(&state.model);
            assert!(report.gradient_norm.is_finite());
            assert!(
                weights
                    .0
                    .values()
                    .flat_map(|t| &t.values)
                    .all(|v| v.is_finite())
            );
            Ok(Stop::No)
        },
    );
    assert!(matches!(result, Err(Error::NonFinite { step: 3, .. })));
    assert_eq!(updates, 2);
}

#[test]
fn a_bad_step_that_is_passed_over_leaves_weights_and_running_statistics_as_they_were() {
    let device = qbheat::device().autodiff();
    let images = real_images(&device);
    let mut kept = Vec::new();
    let mut skipped = Vec::new();
    train(
        state(ENCODERS[0], &device),
        &rate(5),
        third_is_bad(images),
        |model: &qbheat::heat::QbHeat, images| model.loss(images, &Visible::Quadrants(quadrants())),
        settled,
        |_, bad| {
            assert_eq!(bad.step, 3);
            Ok(())
        },
        |state, report| {
            kept.push(StateDict::of(&state.model));
            skipped.push(report.skipped);
            Ok(Stop::No)
        },
    )
    .unwrap();
    assert_eq!(skipped, [false, false, true, false, false]);
    assert!(kept[2] == kept[1], "after the bad step as before it");
    assert!(kept[3] != kept[2]);
    let finite = |state: &StateDict| {
        state
            .0
            .values()
            .flat_map(|t| &t.values)
            .all(|v| v.is_finite())
    };
    assert!(kept.iter().all(finite));
}

#[test]
fn nothing_outside_a_block_anywhere_reaches_the_prediction() {
    let device = qbheat::device();
    let images = real_images(&device);
    let corners: Vec<Corner> = (0..BATCH)
        .map(|i| Corner {
            row: i % 5,
            column: (i / 3) % 5,
        })
        .collect();
    let mut plain = config(ENCODERS[0]);
    plain.qb_heat.normalise_patches = false;
    let model = qb_heat(&plain, &device).unwrap().valid();
    let visible = Visible::Blocks(corners.clone());
    let predicted =
        |images: &Tensor<4>| values(model.reconstruct(images.clone(), &visible).predicted);
    let before = predicted(&images);
    let mut pixels = values(images);
    for (i, value) in pixels.iter_mut().enumerate() {
        let (image, y, x) = (i / 3072, i / 32 % 32, i % 32);
        let (top, left) = (4 * corners[image].row, 4 * corners[image].column);
        if !(top..top + 16).contains(&y) || !(left..left + 16).contains(&x) {
            *value = f32::NAN;
        }
    }
    let masked = Tensor::from_data(TensorData::new(pixels, [BATCH, 3, 32, 32]), &device);
    assert!(predicted(&masked) == before);
}

#[test]
fn blocks_anywhere_are_learnt_from_as_corners_are() {
    let device = qbheat::device().autodiff();
    let images = real_images(&device);
    let corners = (0..BATCH)
        .map(|i| Corner {
            row: i % 5,
            column: (i / 3) % 5,
        })
        .collect();
    let visible = Visible::Blocks(corners);
    let mut losses = Vec::new();
    train(
        state(ENCODERS[0], &device),
        &rate(40),
        || Ok(images.clone()),
        |model: &qbheat::heat::QbHeat, images| model.loss(images, &visible),
        settled,
        give_up,
        |_, report| {
            losses.push(report.loss);
            Ok(Stop::No)
        },
    )
    .unwrap();
    assert!(losses[39] < 0.75, "from {} to {}", losses[0], losses[39]);
}
