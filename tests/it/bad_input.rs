//! Bad input gets a message that names what is wrong and what to do; never a panic or half a run.

use std::fs;
use std::path::Path;

use crate::support::{qbheat, stderr, write_images};

/// Runs the program, expects this exit code and these words on stderr, no panic, and nothing at `out`.
fn refused(arguments: &[&str], exit_code: i32, words: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("run");
    let out = out.to_str().unwrap();
    let arguments: Vec<&str> = arguments
        .iter()
        .map(|&a| if a == "OUT" { out } else { a })
        .collect();
    let output = qbheat(&arguments);
    let text = stderr(&output);
    assert_eq!(
        output.status.code(),
        Some(exit_code),
        "{arguments:?}: {text}"
    );
    assert!(!text.contains("panicked"), "{text}");
    for word in words {
        assert!(
            text.contains(word),
            "{arguments:?} should mention `{word}`: {text}"
        );
    }
    assert!(
        !Path::new(out).exists(),
        "{arguments:?} left something behind"
    );
    assert!(output.stdout.is_empty());
}

fn pretrain_refused(data: &Path, more: &[&str], exit_code: i32, words: &[&str]) {
    let mut arguments = vec!["pretrain", "--data", data.to_str().unwrap(), "--out", "OUT"];
    arguments.extend(more);
    refused(&arguments, exit_code, words);
}

#[test]
fn folders_without_images() {
    let home = tempfile::tempdir().unwrap();
    pretrain_refused(home.path(), &[], 1, &["holds no files"]);
    fs::write(home.path().join("notes.txt"), "hello").unwrap();
    pretrain_refused(home.path(), &[], 1, &["no image", "jpg"]);
    pretrain_refused(
        &home.path().join("nowhere"),
        &[],
        2,
        &["nowhere", "no such file", "--data"],
    );
    pretrain_refused(
        &home.path().join("notes.txt"),
        &[],
        1,
        &["notes.txt", "single file"],
    );
}

#[test]
fn images_without_sides_whatever_the_method() {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["a", "b"], 4, 16);
    for method in ["moco-v2", "supervised"] {
        for size in [
            "image_size=0",
            "image_size=[0, 64]",
            "image_size=5000000000",
        ] {
            let arguments = ["--method", method, "--set", size];
            pretrain_refused(home.path(), &arguments, 2, &["image_size", "from 1 to"]);
        }
    }
}

#[test]
fn a_probe_that_would_be_scored_on_what_it_is_trained_on() {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["a", "b"], 4, 16);
    let data = home.path().to_str().unwrap();
    let weights = "untrained:mobilenet-tiny";
    refused(
        &["probe", weights, "--data", data, "--val", data],
        2,
        &["scored on what it was trained on", "leave val out"],
    );
}

#[test]
fn text_files_named_jpg_are_counted_and_too_many_stop_the_run() {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["a", "b"], 4, 16);
    for i in 0..3 {
        fs::write(home.path().join(format!("a/text{i}.jpg")), "not an image").unwrap();
    }
    pretrain_refused(
        home.path(),
        &[],
        1,
        &["3 of 11", "max_bad_share", "text0.jpg"],
    );
    let home_text = home.path().to_str().unwrap();
    let out = tempfile::tempdir().unwrap();
    let output = qbheat(&[
        "pretrain",
        "--data",
        home_text,
        "--out",
        out.path().to_str().unwrap(),
        "--set",
        "data.max_bad_share=0.5",
        "--image-size",
        "16",
        "--set",
        "encoder.stride=4",
        "--batch-size",
        "4",
        "--epochs",
        "1",
    ]);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("8 images") && text.contains("3 unreadable") && text.contains("text2.jpg"),
        "{text}"
    );
}

#[test]
fn tars_that_are_truncated_or_point_outside() {
    let home = tempfile::tempdir().unwrap();
    write_images(&home.path().join("set"), &["a", "b"], 4, 16);
    let tar = home.path().join("set.tar");
    let mut builder = tar::Builder::new(fs::File::create(&tar).unwrap());
    builder
        .append_dir_all("set", home.path().join("set"))
        .unwrap();
    builder.finish().unwrap();
    drop(builder);
    let bytes = fs::read(&tar).unwrap();
    let cut = home.path().join("cut.tar");
    fs::write(&cut, &bytes[..bytes.len() / 2 + 100]).unwrap();
    pretrain_refused(&cut, &[], 1, &["cut.tar", "truncated"]);

    let mut header = tar::Header::new_ustar();
    header.set_size(4);
    header.as_mut_bytes()[..12].copy_from_slice(b"../evil.jpg\0");
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    let outside = home.path().join("outside.tar");
    let mut archive = header.as_bytes().to_vec();
    archive.extend([0; 512 + 1024]);
    fs::write(&outside, archive).unwrap();
    pretrain_refused(&outside, &[], 1, &["outside.tar", "../evil.jpg"]);
}

#[test]
fn settings_that_are_wrong() {
    let builtin = Path::new("builtin:cifar10");
    let check = |more: &[&str], words: &[&str]| pretrain_refused(builtin, more, 2, words);
    check(&["--image-size", "60"], &["image_size", "twice the stride"]);
    check(
        &["--encoder", "mobilenet-tin"],
        &["mobilenet-tin", "did you mean `mobilenet-tiny`"],
    );
    check(
        &["--encoder", "foo"],
        &["`foo`", "one of mobilenet-tiny, ", "mf-tiny"],
    );
    check(
        &["--set", "optim.lr=1"],
        &["optim.lr", "did you mean `optim.learning_rate`"],
    );
    check(
        &["--set", "qb_heat.propagator=exponent"],
        &["qb_heat.propagator", "did you mean `exponential`"],
    );
    check(
        &["--set", "optim.epochs=ten"],
        &["optim.epochs", "whole number"],
    );
    check(&["--set", "epochs"], &["epochs", "key=value"]);
    check(&["--batch-size", "0"], &["optim.batch_size", "at least 1"]);
    check(&["--batch-size", "1"], &["optim.batch_size", "at least 2"]);
    check(&["--set", "device=gpu"], &["cpu, wgpu and cuda"]);
    check(
        &["--batch-size", "6000"],
        &["optim.batch_size = 6000", "5000 images"],
    );
    for work in ["pretrain", "supervised", "features"] {
        let output = qbheat(&["bench", "--work", work, "--batch-size", "6000"]);
        assert_eq!(output.status.code(), Some(2), "{work}");
        let text = stderr(&output);
        assert!(text.contains("5000 images"), "{work}: {text}");
    }
    check(
        &["--init", "/nowhere"],
        &["/nowhere", "no such file", "--init"],
    );
    pretrain_refused(
        builtin,
        &[
            "--init",
            "builtin:mobilenet-tiny-cifar10",
            "--encoder",
            "mf-tiny",
        ],
        1,
        &["mobilenet-tiny-cifar10", "the run's encoder is mf-tiny"],
    );
    check(
        &["--config", "/nowhere.toml"],
        &["/nowhere.toml", "no such file"],
    );
    pretrain_refused(
        Path::new("builtin:cifar"),
        &[],
        2,
        &["builtin:cifar", "expected builtin:cifar10"],
    );
}

#[test]
fn a_configuration_file_with_a_misspelt_key_is_named_with_it() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("my.toml");
    fs::write(&file, "[optim]\nepoch = 3\n").unwrap();
    let path = file.to_str().unwrap();
    pretrain_refused(
        Path::new("builtin:cifar10"),
        &["--config", path],
        2,
        &["my.toml", "optim.epochs"],
    );
    fs::write(&file, "[optim\n").unwrap();
    pretrain_refused(
        Path::new("builtin:cifar10"),
        &["--config", path],
        2,
        &["my.toml", "line 1"],
    );
}

#[test]
fn folders_that_are_no_run() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().to_str().unwrap();
    for arguments in [
        vec!["resume", path],
        vec!["report", path],
        vec!["probe", path, "--data", "builtin:cifar10"],
        vec!["detect", "eval", path, "--data", "boxes.json"],
    ] {
        refused(
            &arguments,
            2,
            &[path, "not a run folder", "`qbheat detect train`"],
        );
    }
    refused(
        &["resume", "/nowhere/at/all"],
        2,
        &["/nowhere/at/all", "no such file"],
    );
    fs::write(home.path().join("mine.txt"), "precious").unwrap();
    let output = qbheat(&["pretrain", "--data", "builtin:cifar10", "--out", path]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("not empty"));
}

#[test]
fn weights_that_are_none() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("encoder.safetensors");
    fs::write(&file, "nonsense").unwrap();
    let path = file.to_str().unwrap();
    refused(
        &["probe", path, "--data", "builtin:cifar10"],
        1,
        &["encoder.safetensors", "safetensors"],
    );
    refused(
        &[
            "probe",
            "untrained:mobilenet-tin",
            "--data",
            "builtin:cifar10",
        ],
        2,
        &["unknown encoder", "mobilenet-tiny"],
    );
    refused(
        &[
            "probe",
            "untrained:mobilenet-tiny",
            "--data",
            "builtin:cifar10",
            "--protocol",
            "lineal",
        ],
        2,
        &["did you mean `linear`"],
    );
}

#[test]
fn a_detector_needs_weights_and_learns_one_batch_by_heart_whole() {
    let train = |weights: &str, more: &[&str], words: &[&str]| {
        let mut arguments = vec!["detect", "train", weights];
        arguments.extend(["--data", "boxes.json", "--out", "OUT"]);
        arguments.extend(more);
        refused(&arguments, 2, words);
    };
    train("/nowhere", &[], &["/nowhere", "no such file", "WEIGHTS"]);
    for flag in ["--val", "--val-part", "--limit", "--batch-size"] {
        train(
            "untrained:mobilenet-tiny",
            &["--overfit-one-batch", flag, "4"],
            &["--overfit-one-batch", flag],
        );
    }
}

#[test]
fn the_part_to_score_is_not_looked_for_in_a_json() {
    let weights = "untrained:mobilenet-tiny";
    let mut arguments = vec!["detect", "train", weights, "--data", "train.json"];
    arguments.extend(["--val-part", "val", "--out", "OUT"]);
    let words = ["train.json", "no `val` in its name", "--val"];
    refused(&arguments, 1, &words);
}

#[test]
fn a_probe_needs_an_image_of_each_class() {
    let probe = [
        "probe",
        "untrained:mobilenet-tiny",
        "--data",
        "builtin:cifar10",
    ];
    for limit in ["0", "9"] {
        let mut arguments = probe.to_vec();
        arguments.extend(["--limit", limit]);
        refused(&arguments, 2, &["--limit", "at least 10"]);
    }
    let layers = ["--layers-before-end", "12", "--limit", "10"];
    let words = ["--layers-before-end 12", "11 blocks"];
    refused(&[&probe[..], &layers].concat(), 2, &words);
}

#[test]
fn data_without_classes_cannot_be_probed() {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["."], 4, 16);
    let path = home.path().to_str().unwrap();
    refused(
        &["probe", "untrained:mobilenet-tiny", "--data", path],
        1,
        &["no classes"],
    );
}

#[test]
fn one_class_among_the_training_images_is_too_few() {
    let home = tempfile::tempdir().unwrap();
    write_images(&home.path().join("train"), &["a"], 4, 16);
    write_images(&home.path().join("val"), &["a", "b"], 4, 16);
    let words = ["one class only among its training images"];
    let path = home.path().to_str().unwrap();
    let probe = ["probe", "untrained:mobilenet-tiny", "--data", path];
    refused(&probe, 1, &words);
    let supervised = ["--method", "supervised", "--batch-size", "4"];
    pretrain_refused(home.path(), &supervised, 1, &words);
}
