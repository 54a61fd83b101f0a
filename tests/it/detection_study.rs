//! `qbheat study` with detectors, on 16 images of BCCD.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::SystemTime;

use serde_json::Value;

use crate::coco::bccd;
use crate::support::{json, qbheat, stderr};

const STUDY: &str = r#"
image_size = 64
batch_size = 4
epochs = 1
test_part = "val"
[weights]
shipped = "builtin:mobilenet-tiny-cifar10"
untrained = "untrained:mobilenet-tiny"
[set.all]
head.width = 32
head.decoder_layers = 1
head.encoder_layers = 0
head.queries = 20
"#;

fn write_study(home: &Path, text: &str) -> String {
    let path = home.join("study.toml");
    let data = bccd().display().to_string();
    fs::write(&path, format!("data = {data:?}\n{text}")).unwrap();
    path.display().to_string()
}

fn study(file: &str, out: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["study", file, "--out", out.to_str().unwrap(), "--json"];
    arguments.extend(more);
    qbheat(&arguments)
}

fn refused(output: &Output, expected: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    for part in expected {
        assert!(text.contains(part), "no {part}: {text}");
    }
}

/// What is in a file, and since when.
fn state(path: &Path) -> (Vec<u8>, SystemTime) {
    let when = path.metadata().unwrap().modified().unwrap();
    (fs::read(path).unwrap(), when)
}

#[test]
fn detectors_are_trained_once_and_what_no_longer_fits_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let (file, out) = (write_study(home.path(), STUDY), home.path().join("out"));
    let first = json(&study(&file, &out, &[]));
    let cells = first["cells"].as_array().unwrap();
    let methods: Vec<&str> = cells
        .iter()
        .map(|c| c["method"].as_str().unwrap())
        .collect();
    assert_eq!(methods, ["shipped", "untrained"]);
    for cell in cells {
        assert_eq!(cell["protocol"], "detection");
        assert_eq!(cell["encoder"], "mobilenet-tiny");
        let ap50 = cell["ap50"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&ap50), "{cell}");
        // The test part of this study is what is scored anyway.
        assert_eq!(cell["test"]["ap50"], cell["ap50"]);
    }
    let kept = out.join("cells/shipped.seed0.json");
    let cell: Value = serde_json::from_slice(&fs::read(&kept).unwrap()).unwrap();
    assert_eq!(cell["images"], serde_json::json!([12, 4]));
    assert_eq!(cell["classes"].as_array().unwrap().len(), 3);
    assert_eq!(cell["curve"].as_array().unwrap().len(), 1);
    assert!(cell["mean_boxes"]["ap50"].as_f64().unwrap() > 0.0);
    assert!(!cell["config"].as_str().unwrap().contains("init ="));
    let table = fs::read_to_string(out.join("table.md")).unwrap();
    for row in ["| mobilenet-tiny | shipped |", "| mean boxes |", "test AP"] {
        assert!(table.contains(row), "{table}");
    }
    let lines = fs::read_to_string(out.join("table.csv")).unwrap();
    let commas = |line: &str| line.matches(',').count();
    assert!(lines.lines().all(|line| commas(line) == 17), "{lines}");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("chance") && !page.contains("src=\"http"));

    // A lost cell is scored again, not trained again; the other is left alone.
    let other = out.join("cells/untrained.seed0.json");
    let log = out.join("runs/shipped.seed0/events.jsonl");
    let (before, trained) = (state(&other), fs::read(&log).unwrap());
    fs::remove_file(&kept).unwrap();
    assert_eq!(json(&study(&file, &out, &[]))["cells"], first["cells"]);
    assert_eq!(fs::read(&log).unwrap(), trained);
    assert_eq!(state(&other), before);

    for (from, to, expected) in [
        (
            "head.queries = 20",
            "head.queries = 21",
            ["head.queries = 20", "says 21"],
        ),
        (
            "shipped = \"builtin:mobilenet-tiny-cifar10\"",
            "shipped = \"untrained:mobilenet-tiny\"",
            ["shipped.seed0", "weights"],
        ),
        ("test_part = \"val\"", "", ["shipped.seed0", "test_part"]),
    ] {
        write_study(home.path(), &STUDY.replace(from, to));
        refused(&study(&file, &out, &[]), &expected);
    }
}

#[test]
fn a_row_without_weights_does_not_keep_the_others_from_being_run() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY.replace(
        "builtin:mobilenet-tiny-cifar10",
        "nowhere/encoder.safetensors",
    );
    let (file, out) = (write_study(home.path(), &text), home.path().join("out"));
    let output = study(&file, &out, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["cells"].as_array().unwrap().len(), 1);
    assert_eq!(found["failed"][0]["cell"], "shipped.seed0");
    let reason = found["failed"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("[weights] shipped = \"nowhere"), "{reason}");
    for name in ["report.html", "table.md", "table.csv"] {
        let text = fs::read_to_string(out.join(name)).unwrap();
        assert!(text.contains("no such file"), "{name}");
    }
    let plan = study(&file, &out, &["--plan"]);
    assert_eq!(plan.status.code(), Some(1), "{}", stderr(&plan));
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    for cell in plan["cells"].as_array().unwrap() {
        let ready = cell["cell"] != "shipped.seed0";
        assert_eq!(cell["epochs"].is_u64(), ready);
        assert_eq!(cell["reason"].is_string(), !ready);
    }
}

#[test]
fn minutes_become_epochs_that_rows_of_one_configuration_share() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY.replace(
        "epochs = 1",
        "minutes = 0.01\nrows = [\"untrained\", \"my row\", \"shipped\"]",
    ) + "[set.\"my row\"]\nweights = \"shipped\"\ndetect.unfreeze = true\n";
    let (file, out) = (write_study(home.path(), &text), home.path().join("out"));
    let plan = json(&study(&file, &out, &["--plan"]));
    let pace: Value = serde_json::from_slice(&fs::read(out.join("pace.json")).unwrap()).unwrap();
    // One for the frozen encoders, one for the other.
    let mut expected: Vec<f64> = pace
        .as_object()
        .unwrap()
        .values()
        .map(|pace| (0.6 * pace.as_f64().unwrap() / 12.0).round().max(1.0))
        .collect();
    assert_eq!(expected.len(), 2);
    let cells = plan["cells"].as_array().unwrap();
    let names: Vec<&str> = cells.iter().map(|c| c["cell"].as_str().unwrap()).collect();
    assert_eq!(names, ["untrained.seed0", "my_row.seed0", "shipped.seed0"]);
    let epochs = |i: usize| cells[i]["epochs"].as_f64().unwrap();
    assert_eq!(epochs(0), epochs(2));
    let mut found = vec![epochs(0), epochs(1)];
    for values in [&mut found, &mut expected] {
        values.sort_by(f64::total_cmp);
    }
    assert_eq!(found, expected);
    assert!(!out.join("runs").exists() && !out.join("pace").exists());
}

#[test]
fn a_wrong_study_of_detectors_is_refused_with_its_key() {
    let home = tempfile::tempdir().unwrap();
    let data = bccd().display().to_string();
    let after = "head.queries = 20";
    let with = |more: &str| format!("{after}\n{more}");
    for (from, to, expected) in [
        ("epochs = 1", String::new(), "`epochs` or `minutes`"),
        (
            "epochs = 1",
            "epochs = 1\nminutes = 2".to_owned(),
            "give one",
        ),
        ("batch_size = 4", "batchsize = 4".to_owned(), "batchsize"),
        ("epochs = 1", "epochs = 1\nseeds = []".to_owned(), "seeds"),
        (after, "head.querys = 20".to_owned(), "`head.queries`"),
        (after, with("seed = 3"), "[set.all] seed"),
        (after, with("detect.val.part = \"x\""), "detect.val.part"),
        (after, with("[set.shiped]\nhead.width = 8"), "[set.shiped]"),
        (after, with("[set.mine]\nweights = \"shiped\""), "`shipped`"),
        (
            after,
            with("[set.shipped]\nweights = \"untrained\""),
            "[set.shipped] weights",
        ),
        (
            after,
            with("[set.shipped]\nthreads = 1"),
            "[set.shipped] threads",
        ),
        (
            after,
            with("[set.shipped]\ndetect.class_agnostic = true"),
            "detect.class_agnostic",
        ),
        (
            after,
            with("[set.shipped]\nseeds = [7]"),
            "set.shipped.seeds",
        ),
        (
            "epochs = 1",
            "epochs = 1\nrows = [\"shiped\"]".to_owned(),
            "`shipped`",
        ),
        (
            "test_part = \"val\"",
            "test_part = \"x\"".to_owned(),
            "test_part",
        ),
        (
            "test_part = \"val\"",
            "test_part = \"train\"".to_owned(),
            "test_part",
        ),
        (
            "epochs = 1",
            "epochs = 1\nval = \"gone\"".to_owned(),
            "`val`",
        ),
        (data.as_str(), "gone.tar".to_owned(), "`data`"),
    ] {
        let file = write_study(home.path(), STUDY);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(&file, text.replacen(from, &to, 1)).unwrap();
        let out = home.path().join("out");
        refused(&study(&file, &out, &[]), &[expected]);
        assert!(!out.exists(), "{to}");
    }
}
