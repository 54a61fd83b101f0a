//! The rivals and latent targets: what a fixture of one step cannot show.

use std::path::Path;

use burn::tensor::Tensor;
use qbheat::baseline::{MoCo, MoCoConfig};
use qbheat::data::{DataConfig, Dataset, ImageSize, Loader, LoaderConfig};
use qbheat::encoder::{Build, find};
use qbheat::nn::{Init, StateDict};
use qbheat::observe::Silent;
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

/// Which queries and which keys move where another image takes the place of image 0 in both views.
fn moved_by_image_0(model: &MoCo, order: &[usize; 8]) -> [Vec<bool>; 2] {
    let changed = |phase: f64| {
        let others = images(8, phase).slice_dim(0, 1..8);
        Tensor::cat(vec![images(1, phase + 1.0), others], 0)
    };
    let pairs = [
        (model.queries(images(8, 0.3)), model.queries(changed(0.3))),
        (
            model.keys(images(8, 0.7), order),
            model.keys(changed(0.7), order),
        ),
    ];
    pairs.map(|(before, after)| {
        let both = rows(before).into_iter().zip(rows(after));
        both.map(|(a, b)| difference(&a, &b) > 1e-5).collect()
    })
}

/// Where queries and keys are cut alike, a query and its key always share their statistics, and may tell each other by
/// them. Shuffled, they do so for one image in two of two parts, by chance.
#[test]
fn shuffling_parts_the_statistics_of_queries_from_those_of_keys() {
    let cut = moco(6, 2);
    let (own, shuffled) = ([0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6, 1, 3, 5, 7]);
    let [queries, keys] = moved_by_image_0(&cut, &own);
    let first_half: Vec<bool> = (0..8).map(|i| i < 4).collect();
    assert_eq!(queries, first_half);
    assert_eq!(keys, first_half);
    let [queries, keys] = moved_by_image_0(&cut, &shuffled);
    assert_eq!(queries, first_half);
    assert_eq!(keys, (0..8).map(|i| i % 2 == 0).collect::<Vec<_>>());
    let [queries, keys] = moved_by_image_0(&moco(6, 1), &shuffled);
    assert!(queries.into_iter().chain(keys).all(|moved| moved));
}

#[test]
fn alike_keys_cost_what_the_trivial_loss_says() {
    let model = moco(7, 1);
    // A projection of weights 0 makes every query and key the same.
    let mut state = StateDict::of(&model);
    for (name, tensor) in &mut state.0 {
        if name.ends_with("projection.weight") {
            tensor.values.fill(0.0);
        } else if name.ends_with("projection.bias") {
            tensor.values.fill(1.0);
        } else if name == "running_queue" {
            tensor.values.fill(1.0 / 8f32.sqrt());
        }
    }
    let model = state.load_into(model).unwrap();
    let loss = values(model.info_nce(images(8, 0.2), &[3, 1, 0, 2]))[0];
    assert!((f64::from(loss) - model.trivial_loss(&[], 0)).abs() < 1e-5);
}

#[test]
fn both_views_of_a_batch_are_of_the_same_images_in_the_same_order() {
    let home = tempfile::tempdir().unwrap();
    // One colour each: whatever the crop, the pixels tell which image it is.
    let colours: Vec<u8> = (0..8).map(|i| i * 30).collect();
    for colour in &colours {
        image::RgbImage::from_pixel(20, 20, image::Rgb([*colour; 3]))
            .save(home.path().join(format!("{colour:03}.png")))
            .unwrap();
    }
    let data = DataConfig {
        path: home.path().to_owned(),
        ..DataConfig::default()
    };
    let dataset = Dataset::open(&data, 0, &Silent).unwrap();
    let loading = LoaderConfig {
        seed: 0,
        image_size: ImageSize::square(8),
        batch_size: 8,
        views: 2,
        data,
    };
    let batch = Loader::new(&dataset.images, &dataset.train, &loading, 0)
        .next_batch()
        .unwrap();
    assert_eq!(batch.shape, [16, 3, 8, 8]);
    let red: Vec<u8> = batch
        .pixels
        .chunks(3 * 64)
        .map(|view| ((view[0] * 0.229 + 0.485) * 255.0).round() as u8)
        .collect();
    let expected: Vec<u8> = batch.indices.iter().map(|&image| colours[image]).collect();
    assert_eq!(red[..8], expected);
    assert_eq!(red[8..], expected);
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
            "run.rank_floor=0",
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
        text.contains("error") && text.contains("only one class") && text.contains("a folder each"),
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
