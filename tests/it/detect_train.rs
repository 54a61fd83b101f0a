//! `qbheat detect`: a head trained on 16 images of BCCD, stopped and resumed, scored and put to use.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use qbheat::config::DetectorConfig;
use qbheat::detect::{self, Sets, Trained, find_parts};
use qbheat::nn::StateDict;
use qbheat::observe::Silent;
use qbheat::train::{RunFolder, Surroundings};
use qbheat::weights::{ImageForm, SHIPPED, Weights};
use serde_json::Value;

use crate::coco::bccd;
use crate::support::{events, json, losses, qbheat, stderr};

/// A small head on frames of 64 pixels.
const SMALL: [&str; 6] = [
    "image_size=64",
    "head.width=32",
    "head.decoder_layers=1",
    "head.encoder_layers=0",
    "head.queries=20",
    "optim.batch_size=4",
];

fn config(settings: &[(&str, &str)]) -> DetectorConfig {
    let data = bccd().display().to_string();
    let small = SMALL.iter().map(|setting| setting.split_once('=').unwrap());
    let given = [
        ("detect.train.path", data.as_str()),
        ("encoder.init", SHIPPED),
        ("optim.epochs", "2"),
        ("run.checkpoint_every", "1"),
    ];
    let settings: Vec<(String, String)> = small
        .chain(given)
        .chain(settings.iter().copied())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let mut config = DetectorConfig::load(None, &settings).unwrap();
    find_parts(&mut config.detect).unwrap();
    config
}

/// Trains until the given number of steps is taken, or to the end.
fn train(config: &DetectorConfig, out: &Path, steps: u64) {
    let sets = Sets::open(config, &Silent).unwrap();
    let taken = Cell::new(0);
    let stop = || {
        taken.set(taken.get() + 1);
        taken.get() == steps
    };
    let around = Surroundings {
        observer: &Silent,
        stop: &stop,
    };
    let outcome = match RunFolder::open(out) {
        Ok(run) => detect::resume(run, config, &sets, &around),
        Err(_) => detect::start(config, &sets, out, &around),
    };
    outcome.unwrap();
}

/// Everything that a run has learnt.
fn state(run: &Path) -> StateDict {
    StateDict::of(
        &Trained::open(&RunFolder::open(run).unwrap(), &Silent)
            .unwrap()
            .detector,
    )
}

#[test]
fn a_training_that_was_stopped_ends_as_one_that_was_not() {
    let home = tempfile::tempdir().unwrap();
    let (whole, broken) = (home.path().join("whole"), home.path().join("broken"));
    let levels = [
        ("encoder.name", "resnet-18"),
        ("encoder.init", ""),
        ("encoder.stride", "32"),
    ];
    for (unfreeze, encoder) in [("false", &[][..]), ("true", &[]), ("true", &levels)] {
        let config = config(&[&[("detect.unfreeze", unfreeze)], encoder].concat());
        let maps = if encoder.is_empty() { 1 } else { 3 };
        assert_eq!(config.detect.strides.len(), maps);
        train(&config, &whole, u64::MAX);
        train(&config, &broken, 3);
        assert_eq!(losses(&broken).len(), 3);
        train(&config, &broken, u64::MAX);
        assert_eq!(losses(&whole).len(), 6);
        assert_eq!(losses(&whole), losses(&broken));
        assert!(state(&whole) == state(&broken), "unfreeze = {unfreeze}");
        for run in [&whole, &broken] {
            fs::remove_dir_all(run).unwrap();
        }
    }
}

#[test]
fn a_frozen_encoder_stays_bitwise_as_it_was_and_of_another_the_statistics_do() {
    let home = tempfile::tempdir().unwrap();
    let form = ImageForm {
        size: qbheat::data::ImageSize::square(64),
        channels: 3,
        stride: 0,
    };
    let given = StateDict::of(&Weights::open(SHIPPED, 0, form).unwrap().encoder);
    for unfreeze in ["false", "true"] {
        let run = home.path().join(unfreeze);
        train(&config(&[("detect.unfreeze", unfreeze)]), &run, u64::MAX);
        let found = state(&run).under("encoder.");
        assert!(found.0.keys().eq(given.0.keys()));
        for (name, tensor) in &found.0 {
            let is_statistic = name.contains("running_");
            if unfreeze == "false" || is_statistic {
                assert!(tensor == &given.0[name], "{name} has changed");
            }
        }
        assert_eq!(found == given, unfreeze == "false");
    }
}

#[test]
fn maps_are_whitened_where_that_is_asked_for_and_as_they_are_elsewhere() {
    let home = tempfile::tempdir().unwrap();
    for whiten in ["true", "false"] {
        let run = home.path().join(whiten);
        train(&config(&[("detect.whiten", whiten)]), &run, 1);
        let whitening = state(&run).under("whitening.0.");
        let mean = &whitening.0["mean"].values;
        assert_eq!(mean.iter().all(|&mean| mean == 0.0), whiten == "false");
        let matrix = &whitening.0["matrix"];
        let side = matrix.shape[0];
        let is_identity = matrix.values.iter().enumerate().all(|(at, &value)| {
            let on_diagonal = at / side == at % side;
            value == f32::from(u8::from(on_diagonal))
        });
        assert_eq!(is_identity, whiten == "false");
    }
}

#[test]
fn a_step_that_is_not_finite_is_kept_and_comes_out_the_same_again() {
    let home = tempfile::tempdir().unwrap();
    let run = home.path().join("run");
    let config = config(&[
        ("optim.learning_rate", "1e30"),
        ("optim.warmup_epochs", "0"),
    ]);
    let sets = Sets::open(&config, &Silent).unwrap();
    let around = Surroundings {
        observer: &Silent,
        stop: &|| false,
    };
    let error = detect::start(&config, &sets, &run, &around).err().unwrap();
    assert!(error.to_string().contains("step 2"), "{error}");
    let run = RunFolder::open(&run).unwrap();
    let replay = detect::replay(&run, &config).unwrap();
    assert!(replay.is_same(), "{replay:?}");
    assert_eq!(replay.files.len(), 4);
    assert!(replay.bad_pixels.is_empty());
}

/// The arguments of a short training at the command line.
fn arguments<'a>(data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec![
        "detect", "train", SHIPPED, "--data", data, "--out", out, "--json",
    ];
    for setting in SMALL {
        arguments.extend(["--set", setting]);
    }
    arguments.extend(more);
    arguments
}

#[test]
fn it_is_trained_scored_resumed_shown_and_put_to_use() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (data, run) = (bccd().display().to_string(), path("run"));
    let trained = json(&qbheat(&arguments(&data, &run, &["--epochs", "2"])));
    for key in ["ap", "ap50", "ap75"] {
        let figure = trained[key].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&figure), "{key} {figure}");
    }
    assert!(trained["mean_boxes"]["ap50"].as_f64().unwrap() > 0.0);
    let steps = events(Path::new(&run), Some("step"));
    assert!(steps[0]["terms"]["giou"].as_f64().unwrap() > 0.0);
    assert!(steps[0]["matched"].as_u64().unwrap() > 0);
    assert_eq!(
        events(Path::new(&run), Some("epoch"))[1]["ap"],
        trained["ap"]
    );

    let scored = json(&qbheat(&[
        "detect", "eval", &run, "--data", &data, "--part", "val", "--json",
    ]));
    assert_eq!(scored["ap"], trained["ap"]);
    assert_eq!(scored["score"]["classes"].as_array().unwrap().len(), 3);
    let again = json(&qbheat(&["resume", &run, "--json"]));
    assert_eq!(again["ap"], trained["ap"]);
    assert_eq!(again["images_per_s"], 0.0);
    let report = json(&qbheat(&["report", &run, "--json"]));
    let page = fs::read_to_string(report["report"].as_str().unwrap()).unwrap();
    assert!(
        page.contains("Platelets") && page.contains("<svg"),
        "{page}"
    );

    let picture = bccd().join("images/BloodImage_00001.jpg");
    let found = path("found");
    let answer = json(&qbheat(&[
        "detect",
        "predict",
        &run,
        picture.to_str().unwrap(),
        "--out",
        &found,
        "--least-score",
        "0",
        "--json",
    ]));
    assert_eq!(answer["pictures"], 1);
    let results = fs::read(Path::new(&found).join("results.json")).unwrap();
    let results: Vec<Value> = serde_json::from_slice(&results).unwrap();
    assert_eq!(results.len() as u64, answer["boxes"].as_u64().unwrap());
    assert!(Path::new(&found).join("BloodImage_00001.jpg").is_file());

    let newest = Path::new(&run).join("checkpoints/step-000000006/model.safetensors");
    fs::write(newest, "damaged").unwrap();
    let older = qbheat(&["detect", "eval", &run, "--data", &data, "--part", "val"]);
    assert!(stderr(&older).contains("passed over a checkpoint"));
    let text = String::from_utf8_lossy(&older.stdout).into_owned();
    assert!(text.starts_with("after 3 of 6 steps: AP"), "{text}");
}

#[test]
fn without_images_to_score_some_are_held_out_and_all_boxes_may_be_one_class() {
    let home = tempfile::tempdir().unwrap();
    let run = home.path().join("run");
    let data = home.path().join("boxes.json");
    fs::copy(bccd().join("annotations/instances_train.json"), &data).unwrap();
    let images = bccd().display().to_string();
    let mut more = vec!["--epochs", "1", "--class-agnostic", "--seed", "3"];
    more.extend(["--images", &images]);
    let trained = json(&qbheat(&arguments(
        data.to_str().unwrap(),
        run.to_str().unwrap(),
        &more,
    )));
    let classes = trained["score"]["classes"].as_array().unwrap();
    assert_eq!(classes.len(), 1);
    let [train, val] = {
        let folder = RunFolder::open(&run).unwrap();
        let config = DetectorConfig::of_run(&folder).unwrap();
        let sets = Sets::open(&config, &Silent).unwrap();
        [sets.train, sets.val].map(|set| {
            let names = set.images.iter().map(|image| image.name.clone());
            names.collect::<Vec<_>>()
        })
    };
    assert!(!val.is_empty() && val.iter().all(|name| !train.contains(name)));

    // With one image less, others are held out.
    let mut boxes: Value = serde_json::from_slice(&fs::read(&data).unwrap()).unwrap();
    boxes["images"].as_array_mut().unwrap().remove(0);
    fs::write(&data, boxes.to_string()).unwrap();
    for command in ["report", "resume"] {
        let refused = qbheat(&[command, run.to_str().unwrap()]);
        let text = stderr(&refused);
        assert_eq!(refused.status.code(), Some(1), "{command}: {text}");
        assert!(text.contains("other images or boxes"), "{command}: {text}");
    }
}

#[test]
fn four_images_are_learnt_by_heart() {
    let home = tempfile::tempdir().unwrap();
    let (data, run) = (bccd().display().to_string(), home.path().join("run"));
    let learnt = json(&qbheat(&[
        "detect",
        "train",
        SHIPPED,
        "--data",
        &data,
        "--overfit-one-batch",
        "--unfreeze",
        "--image-size",
        "128",
        "--epochs",
        "8",
        "--set",
        "detect.overfit=4",
        "--out",
        run.to_str().unwrap(),
        "--json",
    ]));
    assert!(learnt["ap"].as_f64().unwrap() > 0.9, "{learnt}");
}

#[test]
fn what_it_cannot_learn_by_heart_is_told_and_a_detector_is_no_pre_training() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (data, run) = (bccd().display().to_string(), path("run"));
    let more = [
        "--overfit-one-batch",
        "--epochs",
        "1",
        "--set",
        "run.watch_every=0",
    ];
    let mut short = arguments(&data, &run, &more);
    short.retain(|&argument| argument != "--json");
    let failed = qbheat(&short);
    assert_eq!(failed.status.code(), Some(1));
    let text = String::from_utf8_lossy(&failed.stdout).into_owned();
    assert!(text.contains("SOMETHING IS WRONG"), "{text}");
    // 8 images, 25 steps.
    assert_eq!(losses(Path::new(&run)).len(), 25);

    for (arguments, code, expected) in [
        (
            vec!["probe", &run, "--data", "builtin:cifar10"],
            1,
            "is a detector",
        ),
        (vec!["resume", &run, "--epochs", "9"], 2, "detector"),
        (
            arguments(&data, &path("a"), &["--set", "head.width=30"]),
            2,
            "head.width",
        ),
        (
            arguments(&data, &path("b"), &["--set", "head.widht=32"]),
            2,
            "`head.width`",
        ),
        (
            arguments(&data, &path("c"), &["--set", "optim.batch_size=99"]),
            2,
            "images",
        ),
        (
            arguments(&data, &path("d"), &["--part", "nothing"]),
            1,
            "`nothing`",
        ),
        (arguments(&path("none.json"), &path("e"), &[]), 2, "--data"),
        (
            arguments(&data, &path("f"), &["--val", &path("none.json")]),
            2,
            "given to --val",
        ),
        (
            arguments(&data, &path("g"), &["--set", "detect.strides=[1,8]"]),
            2,
            "detect.strides",
        ),
    ] {
        let refused = qbheat(&arguments);
        let text = stderr(&refused);
        assert_eq!(refused.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        assert!(!home.path().join(name).exists(), "{name} was made");
    }
}
