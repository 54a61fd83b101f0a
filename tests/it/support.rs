//! What several tests need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor, TensorData};
use qbheat::nn::{Init, Named, StateDict};
use serde_json::Value;

/// The program, with these arguments, run to its end.
pub fn qbheat(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// The program, with these arguments.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qbheat"));
    command.args(arguments);
    command
}

/// What it wrote on stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Its stdout as one JSON object; fails where there is anything else.
pub fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("stdout is one JSON object")
}

/// A folder of small PNG images of random noise around a colour of their class.
pub fn write_images(folder: &Path, classes: &[&str], each: usize, side: u32) {
    for (c, class) in classes.iter().enumerate() {
        let folder = folder.join(class);
        std::fs::create_dir_all(&folder).unwrap();
        for i in 0..each {
            image::RgbImage::from_fn(side, side, |x, y| {
                let noise = (x * 31 + y * 17 + i as u32 * 7 + c as u32 * 101)
                    .wrapping_mul(2_654_435_761)
                    >> 24;
                image::Rgb([noise as u8, (60 * c) as u8, (noise / 2 + 4 * y) as u8])
            })
            .save(folder.join(format!("{i:03}.png")))
            .unwrap();
        }
    }
}

/// Images of every kind, made by `tools/make_images.py`.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images")
}

/// scale·sin(0.7123·i + phase): what `tools/make_fixtures.py` calls `wave`.
pub fn wave(shape: &[usize], phase: f64, scale: f64) -> Named {
    let values = (0..shape.iter().product::<usize>())
        .map(|i| (scale * (0.7123 * i as f64 + phase).sin()) as f32)
        .collect();
    Named {
        shape: shape.to_vec(),
        values,
    }
}

/// As a tensor on the training device.
pub fn tensor<const D: usize>(named: &Named) -> Tensor<D> {
    let data = TensorData::new(named.values.clone(), named.shape.clone());
    Tensor::from_data(data, &qbheat::device().autodiff())
}

/// Its entries.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

/// Gradients of all parameters by path.
pub fn gradients(module: &impl Module, gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
    struct Visitor<'a> {
        path: Vec<Option<String>>,
        gradients: &'a Gradients,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Visitor<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            let named = !container.starts_with("Enum:");
            self.path.push(named.then(|| name.to_owned()));
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = param.val().grad(self.gradients) {
                let path: Vec<&str> = self.path.iter().flatten().map(String::as_str).collect();
                self.found.insert(path.join("."), values(gradient));
            }
        }
    }
    let mut visitor = Visitor {
        path: Vec::new(),
        gradients,
        found: BTreeMap::new(),
    };
    module.visit(&mut visitor);
    visitor.found
}

/// The largest difference relative to the largest entry of `expected`.
pub fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let difference = found
        .iter()
        .zip(expected)
        .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    difference / largest.max(1e-12)
}

/// Largest relative differences from PyTorch's answers that single precision explains: of values and of gradients.
pub const FORWARD: f32 = 1e-4;
pub const BACKWARD: f32 = 1e-3;

/// Fails where `found` differs from the answer of that name by more than `tolerance` of its largest entry.
pub fn assert_close(fixtures: &StateDict, name: &str, found: &[f32], tolerance: f32) {
    let error = difference(found, &fixtures.0[name].values);
    assert!(error <= tolerance, "{name}: relative error {error:e}");
}

/// Where new layers get their weights from, on the training device.
pub fn init() -> Init {
    Init::new(0, &qbheat::device().autodiff())
}

/// The tensors of a file of `tests/fixtures`.
pub fn fixture(file: &str) -> StateDict {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    read_tensors(&folder.join(file))
}

/// Loads the tensors of a file.
pub fn read_tensors(path: &Path) -> StateDict {
    StateDict::from_bytes(&std::fs::read(path).unwrap())
        .unwrap()
        .0
}

/// The arguments of a quick run on 16 px images: one epoch of batches of 4.
pub fn quick_run<'a>(data: &'a str, out: &'a str) -> Vec<&'a str> {
    vec![
        "pretrain",
        "--data",
        data,
        "--out",
        out,
        "--image-size",
        "16",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--set",
        "encoder.stride=4",
    ]
}

/// The log of a run, or those of its events that are of one kind.
pub fn events(run: &Path, kind: Option<&str>) -> Vec<Value> {
    std::fs::read_to_string(run.join("events.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|event: &Value| kind.is_none_or(|kind| event["kind"] == kind))
        .collect()
}

/// All step events of a run: step and loss.
pub fn losses(run: &Path) -> Vec<(u64, f64)> {
    events(run, Some("step"))
        .iter()
        .map(|event| {
            (
                event["step"].as_u64().unwrap(),
                event["loss"].as_f64().unwrap(),
            )
        })
        .collect()
}
