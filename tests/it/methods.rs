//! The rivals and latent targets: what a fixture of one step cannot show.

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use qbheat::baseline::{MoCo, MoCoConfig};
use qbheat::encoder::{Build, find};
use qbheat::nn::Init;
use qbheat::pretrain::PretrainModel;

use crate::support::{
    command, difference, events, losses, qbheat, quick_run, stderr, values, wave, write_images,
};

const METHODS: [&str; 3] = [
    "objective.target=latent",
    "method=moco-v2",
    "method=supervised",
];

fn moco(queue: usize, sub_batches: usize) -> MoCo {
    let mut init = Init::new(3, &qbheat::device().autodiff());
    let build = Build {
        stride: 4,
        inputs: 3,
    };
    let encoder = find("mobilenet-tiny")
        .unwrap()
        .build(build, &mut init)
        .unwrap();
    let config = MoCoConfig {
        queue,
        dim: 8,
        sub_batches,
        ..MoCoConfig::default()
    };
    MoCo::new(&config, encoder, &mut init)
}

fn images(count: usize, phase: f64) -> Tensor<4> {
    crate::support::tensor(&wave(&[count, 3, 16, 16], phase, 1.0))
}

fn rows(tensor: Tensor<2>) -> Vec<Vec<f32>> {
    let columns = tensor.dims()[1];
    values(tensor)
        .chunks(columns)
        .map(<[f32]>::to_vec)
        .collect()
}

#[test]
fn the_queue_holds_the_newest_keys_and_forgets_the_oldest() {
    let model = moco(6, 1);
    let first = rows(model.queue());
    let order = [0, 1, 2, 3];
    let keys: Vec<Vec<Vec<f32>>> = [0.1, 0.7]
        .map(|phase| {
            let views = Tensor::cat(vec![images(4, phase), images(4, phase + 0.2)], 0);
            let keys = rows(model.keys(views.clone().slice_dim(0, 4..8), &order));
            model.info_nce(views, &order);
            keys
        })
        .into();
    let queue = rows(model.queue());
    assert_eq!(queue[..4], keys[1][..]);
    assert_eq!(queue[4..], keys[0][..2]);
    assert!(first.iter().all(|row| !queue.contains(row)));
    for key in &queue {
        let length: f32 = key.iter().map(|v| v * v).sum();
        assert!((length - 1.0).abs() < 1e-5);
    }
}

/// A key may tell by its batch's statistics which images it was computed with. Where the parts are cut in the images'
/// own order, a query's neighbours in the batch are always its key's; shuffled, they are not.
#[test]
fn shuffling_decides_whose_statistics_a_key_is_normalised_by() {
    let batch = images(8, 0.3);
    let keys = |model: &MoCo, order: &[usize; 8]| values(model.keys(batch.clone(), order));
    let (own, shuffled) = ([0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6, 1, 3, 5, 7]);
    let cut = moco(6, 2);
    assert!(difference(&keys(&cut, &shuffled), &keys(&cut, &own)) > 1e-2);
    // Order within the parts, and which part comes first, is of no account.
    let same_parts = [7, 5, 1, 3, 6, 0, 4, 2];
    assert!(difference(&keys(&cut, &shuffled), &keys(&cut, &same_parts)) < 1e-4);
    let whole = moco(6, 1);
    assert!(difference(&keys(&whole, &shuffled), &keys(&whole, &own)) < 1e-4);
}

#[test]
fn alike_keys_cost_what_the_trivial_loss_says() {
    let model = moco(7, 1);
    let same: Vec<f32> = [1.0f32, 0., 0., 0., 0., 0., 0., 0.].repeat(7);
    let queue = Tensor::<2>::from_data(TensorData::new(same, [7, 8]), &qbheat::device());
    let query = queue.clone().slice_dim(0, 0..1);
    let logits = Tensor::cat(
        vec![
            (query.clone() * query.clone()).sum_dim(1),
            query.matmul(queue.transpose()),
        ],
        1,
    );
    let loss = burn::tensor::activation::log_softmax(logits / 0.2, 1)
        .slice_dim(1, 0..1)
        .neg();
    assert!((f64::from(values(loss)[0]) - model.trivial_loss(&[], 0)).abs() < 1e-6);
}

fn run(data: &Path, out: &Path, settings: &[&str]) -> std::process::Output {
    let (data, out) = (data.display().to_string(), out.display().to_string());
    let mut arguments = quick_run(&data, &out);
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    qbheat(&arguments)
}

#[test]
fn every_method_resumes_to_the_same_bytes() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("set");
    write_images(&data, &["a", "b"], 10, 16);
    for method in METHODS {
        let settings = [
            method,
            "moco.queue=16",
            "moco.sub_batches=2",
            "run.checkpoint_every=1",
            "run.keep_checkpoints=9",
            "run.watch_every=0",
            "optim.epochs=2",
        ];
        let whole = home.path().join("whole");
        let output = run(&data, &whole, &settings);
        assert!(output.status.success(), "{method}: {}", stderr(&output));
        let part = home.path().join("part");
        assert!(run(&data, &part, &settings).status.success());
        // As after a kill behind the third step.
        std::fs::remove_file(part.join("encoder.safetensors")).unwrap();
        for entry in std::fs::read_dir(part.join("checkpoints")).unwrap() {
            let path = entry.unwrap().path();
            let step: u64 = path.display().to_string()[path.display().to_string().len() - 9..]
                .parse()
                .unwrap();
            if step > 3 {
                std::fs::remove_dir_all(path).unwrap();
            }
        }
        let output = command(&["resume", part.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{method}: {}", stderr(&output));
        assert_eq!(losses(&part), losses(&whole), "{method}");
        let encoder = |run: &Path| std::fs::read(run.join("encoder.safetensors")).unwrap();
        assert!(encoder(&part) == encoder(&whole), "{method}");
        let report = qbheat(&["report", whole.to_str().unwrap()]);
        assert!(report.status.success(), "{method}: {}", stderr(&report));
        for run in [whole, part] {
            std::fs::remove_dir_all(run).unwrap();
        }
    }
}

#[test]
fn a_collapse_stops_the_run_and_says_why() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("set");
    write_images(&data, &["a", "b"], 10, 16);
    let settings = [
        "objective.target=latent",
        "run.rank_floor=1e6",
        "run.watch_every=1",
    ];
    let out = home.path().join("run");
    let output = run(&data, &out, &settings);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("collapsed") && text.contains("run.rank_floor"),
        "{text}"
    );
    assert!(!out.join("encoder.safetensors").exists());
    // What was seen is in the log.
    assert_eq!(events(&out, Some("epoch")).len(), 1);
}

#[test]
fn supervised_pre_training_wants_a_class_for_every_image() {
    let home = tempfile::tempdir().unwrap();
    let flat = home.path().join("flat");
    write_images(&flat, &["only"], 12, 16);
    let out = home.path().join("run");
    let output = run(&flat, &out, &["method=supervised"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("no classes") && text.contains("one folder a class"),
        "{text}"
    );
    assert!(!out.exists());
    let mixed = home.path().join("mixed");
    write_images(&mixed, &["a", "b"], 10, 16);
    std::fs::copy(mixed.join("a/000.png"), mixed.join("loose.png")).unwrap();
    let output = run(&mixed, &out, &["method=supervised"]);
    let text = stderr(&output);
    assert!(
        text.contains("1 of its") && text.contains("have no class"),
        "{text}"
    );
}
