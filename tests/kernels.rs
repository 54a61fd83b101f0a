//! The fused operations in a whole network, against Burn's own and against double precision. A program of its own: it
//! switches the operations off and the type of numbers over for the whole process.

use std::collections::BTreeMap;
use std::process::Command;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, DeviceConfig, FloatDType, Gradients, Tensor, TensorData};
use qbheat::config::Config;
use qbheat::heat::{Quadrant, Visible};
use qbheat::pretrain::qb_heat;

const ENCODERS: [&str; 2] = ["mobilenet-tiny", "mf-tiny"];
const BATCHES: usize = 7;
/// Where the run in double precision leaves its gradients.
const ANSWERS: &str = "QBHEAT_TEST_ANSWERS";

/// The gradient of each parameter by its number, for each batch.
type Answers = Vec<BTreeMap<usize, Vec<f64>>>;

struct Reader<'a> {
    gradients: &'a Gradients,
    next: usize,
    found: BTreeMap<usize, Vec<f64>>,
}

impl ModuleVisitor for Reader<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            let data = gradient.into_data().convert::<f64>();
            self.found.insert(self.next, data.try_into_vec().unwrap());
        }
        self.next += 1;
    }
}

fn step(encoder: &str) -> Answers {
    let device = Device::flex().autodiff();
    let settings = [
        ("encoder.name", encoder),
        ("encoder.stride", "4"),
        ("image_size", "32"),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let network = qb_heat(&Config::load(None, &settings).unwrap(), &device).unwrap();
    let visible = Visible::Quadrants((0..8).map(|i| Quadrant::ALL[i % 4]).collect());
    (0..BATCHES)
        .map(|batch| {
            let pixels = (0..8 * 3 * 32 * 32).map(|i| ((i * (batch + 3)) as f32 * 0.7123).sin());
            let pixels: Vec<f32> = pixels.collect();
            let images = Tensor::from_data(TensorData::new(pixels, [8, 3, 32, 32]), &device);
            let gradients = network.loss(images, &visible).backward();
            let mut reader = Reader {
                gradients: &gradients,
                next: 0,
                found: BTreeMap::new(),
            };
            network.visit(&mut reader);
            reader.found
        })
        .collect()
}

/// Mean over parameters of the gradient's distance from the exact one over that one's length; of the batches the
/// best, because in most of them rounding carries some activation over its kink, one way or the other.
fn error(found: &Answers, exact: &Answers) -> f64 {
    let length = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
    let errors = found.iter().zip(exact).map(|(found, exact)| {
        assert!(found.keys().eq(exact.keys()));
        let largest = exact.values().map(|g| length(g)).fold(0.0, f64::max);
        let wrong = found.values().zip(exact.values()).map(|(found, exact)| {
            let distance: Vec<f64> = found.iter().zip(exact).map(|(a, b)| a - b).collect();
            // What cancels to nothing has no direction to be wrong in.
            length(&distance) / length(exact).max(1e-3 * largest)
        });
        wrong.sum::<f64>() / exact.len() as f64
    });
    errors.fold(f64::INFINITY, f64::min)
}

#[test]
fn whole_networks_are_no_further_from_double_precision_than_burns_own_operations() {
    let answers = |path: &str, encoder: &str| format!("{path}.{encoder}");
    if let Ok(path) = std::env::var(ANSWERS) {
        let doubles = DeviceConfig::default().float_dtype(FloatDType::F64);
        Device::flex().configure(doubles).unwrap();
        for encoder in ENCODERS {
            let bytes = serde_json::to_vec(&step(encoder)).unwrap();
            std::fs::write(answers(&path, encoder), bytes).unwrap();
        }
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("answers").to_str().unwrap().to_owned();
    let name = std::thread::current().name().unwrap().to_owned();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name])
        .env(ANSWERS, &path)
        .status();
    assert!(status.unwrap().success());
    for encoder in ENCODERS {
        let bytes = std::fs::read(answers(&path, encoder)).unwrap();
        let exact: Answers = serde_json::from_slice(&bytes).unwrap();
        qbheat_kernels::set_enabled(true);
        let fused = step(encoder);
        qbheat_kernels::set_enabled(false);
        let plain = step(encoder);
        assert!(fused != plain, "the operations were not switched off");
        let (fused, plain) = (error(&fused, &exact), error(&plain, &exact));
        println!("{encoder}: fused {fused:.1e}, plain {plain:.1e}");
        assert!(fused < 1e-4, "{encoder}: {fused}");
        assert!(
            fused <= 1.5 * plain,
            "{encoder}: fused {fused}, plain {plain}"
        );
    }
}
