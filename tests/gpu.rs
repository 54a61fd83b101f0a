//! One step on a GPU against the processor's; see CONTRIBUTING.md for the commands. Ignored, because it needs a GPU or a
//! driver that stands in for one.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use qbheat::config::Config;
use qbheat::heat::{Quadrant, Visible};
use qbheat::nn::{Named, StateDict};
use qbheat::pretrain::qb_heat;
use qbheat::train::{AdamW, AdamWConfig};

/// The loss and the weights after one step.
fn step(encoder: &str, device: Device) -> (f32, StateDict) {
    let device = device.autodiff();
    let settings = [
        ("encoder.name", encoder),
        ("encoder.stride", "4"),
        ("image_size", "16"),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = Config::load(None, &settings).unwrap();
    let network = qb_heat(&config, &device).unwrap();
    let pixels = (0..8 * 3 * 16 * 16).map(|i| (i as f32 * 0.7123).sin());
    let pixels: Vec<f32> = pixels.collect();
    let images = Tensor::from_data(TensorData::new(pixels, [8, 3, 16, 16]), &device);
    let visible = Visible::Quadrants((0..8).map(|i| Quadrant::ALL[i % 4]).collect());
    let loss = network.loss(images, &visible);
    let gradients = loss.backward();
    let norm = AdamW::gradient_norm(&network, &gradients);
    let mut optimizer = AdamW::new(AdamWConfig::from(&config.optim));
    let network = optimizer.step(network, gradients, norm, 1e-3);
    (loss.into_scalar(), StateDict::of(&network.valid()))
}

fn gpu() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(not(feature = "cuda"))]
    Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)
}

#[test]
#[ignore = "needs a GPU"]
fn one_step_equals_the_processors() {
    for encoder in ["mobilenet-tiny", "mf-tiny"] {
        let (expected_loss, expected) = step(encoder, Device::flex());
        let (loss, found) = step(encoder, gpu());
        assert!(
            (loss - expected_loss).abs() < 1e-3,
            "{encoder}: {loss} for {expected_loss}"
        );
        for (name, Named { values, .. }) in &expected.0 {
            // AdamW's first step goes by a gradient's sign, so that a weight of a tiny gradient may move either way.
            let off = |a: &f32, b: &f32| (a - b).abs() > 1e-3;
            let differing = values
                .iter()
                .zip(&found.0[name].values)
                .filter(|(a, b)| off(a, b))
                .count();
            assert!(
                differing * 100 <= values.len(),
                "{encoder}: {differing} of {} in {name}",
                values.len()
            );
        }
    }
}
