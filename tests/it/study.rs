//! `qbheat study` and `qbheat compare` on small images.

use std::path::Path;

use serde_json::Value;

use crate::support::{command, json, qbheat, quick_run, stderr, write_images};

const STUDY: &str = r#"
image_size = 16
stride = 4
epochs = 1
batch_size = 4
encoders = ["mobilenet-tiny"]
methods = ["qb-heat", "moco-v2", "untrained"]
seeds = [0, 1]
protocols = ["knn", "linear"]
labels = [1.0, 0.5]
[set.moco-v2.moco]
queue = 16
sub_batches = 2
"#;

fn write_study(home: &Path, text: &str) -> String {
    let data = home.join("set");
    write_images(&data.join("train"), &["a", "b"], 10, 16);
    write_images(&data.join("val"), &["a", "b"], 5, 16);
    let path = home.join("study.toml");
    std::fs::write(
        &path,
        format!("data = {:?}\n{text}", data.display().to_string()),
    )
    .unwrap();
    path.display().to_string()
}

fn modified(path: &Path) -> std::time::SystemTime {
    path.metadata().unwrap().modified().unwrap()
}

#[test]
fn a_study_runs_what_is_missing_and_nothing_twice() {
    let home = tempfile::tempdir().unwrap();
    let study = write_study(home.path(), STUDY);
    let out = home.path().join("out");
    let run = || {
        json(&qbheat(&[
            "study",
            &study,
            "--out",
            out.to_str().unwrap(),
            "--json",
        ]))
    };
    let first = run();
    let cells = first["cells"].as_array().unwrap();
    // Two seeds, three methods, k-NN once and linear with two shares of the labels.
    assert_eq!(cells.len(), 2 * 3 * 3);
    for cell in cells {
        for key in ["method", "encoder", "protocol"] {
            assert!(cell[key].is_string(), "{cell}");
        }
        assert!(cell["top1"].as_f64().unwrap() <= 100.0);
        assert!([0.5, 1.0].contains(&cell["labels"].as_f64().unwrap()));
    }
    let table = std::fs::read_to_string(out.join("table.md")).unwrap();
    assert!(table.contains("| 50 % (10) |"), "{table}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("QB-Heat") && !page.contains("src=\"http"));
    assert!(out.join("table.csv").is_file());

    let encoder = out.join("runs/qb-heat.mobilenet-tiny.seed0/encoder.safetensors");
    let before = modified(&encoder);
    // A cell whose scores were lost is scored again, not trained again; one that is gone is made again.
    let lost = out.join("cells/qb-heat.mobilenet-tiny.seed0.json");
    std::fs::remove_file(&lost).unwrap();
    let gone = "moco-v2.mobilenet-tiny.seed1";
    std::fs::remove_file(out.join("cells").join(format!("{gone}.json"))).unwrap();
    std::fs::remove_dir_all(out.join("runs").join(gone)).unwrap();
    let untouched = out.join("cells/untrained.mobilenet-tiny.seed0.json");
    let when = modified(&untouched);
    let again = run();
    assert_eq!(again["cells"], first["cells"]);
    assert_eq!(modified(&encoder), before);
    assert_eq!(modified(&untouched), when);
}

#[test]
fn a_cell_that_fails_does_not_keep_the_others_from_being_run() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY.replace("seeds = [0, 1]", "seeds = [0]")
        + "\n[set.qb-heat]\noptim.learning_rate = 1e30\n";
    let study = write_study(home.path(), &text);
    let out = home.path().join("out");
    let output = qbheat(&["study", &study, "--out", out.to_str().unwrap(), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["cells"].as_array().unwrap().len(), 2 * 3);
    assert!(
        found["failed"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("infinite or NaN")
    );
    for file in ["report.html", "table.md", "table.csv"] {
        let text = std::fs::read_to_string(out.join(file)).unwrap();
        assert!(text.contains("infinite or NaN"), "{file}");
    }
    let lines = std::fs::read_to_string(out.join("table.csv")).unwrap();
    // A reason may have commas of its own, in quotes.
    let unquoted = |line: &str| line.split('"').step_by(2).collect::<String>();
    let commas = |line: &str| unquoted(line).matches(',').count();
    assert!(lines.lines().all(|line| commas(line) == 14), "{lines}");
}

#[test]
fn a_study_that_no_longer_fits_its_folder_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY.replace(
        "methods = [\"qb-heat\", \"moco-v2\", \"untrained\"]",
        "methods = [\"qb-heat\"]",
    );
    let text = text.split("[set").next().unwrap().replace("[0, 1]", "[0]");
    let study = write_study(home.path(), &text);
    let out = home.path().join("out").display().to_string();
    assert!(qbheat(&["study", &study, "--out", &out]).status.success());
    let changed = std::fs::read_to_string(&study)
        .unwrap()
        .replace("batch_size = 4", "batch_size = 5");
    std::fs::write(&study, changed).unwrap();
    let output = qbheat(&["study", &study, "--out", &out]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(
        text.contains("optim.batch_size = 4") && text.contains("says 5"),
        "{text}"
    );
    let output = qbheat(&["study", &study, "--out", &out, "--plan"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("optim.batch_size = 4"));
    // A run has a report of its own.
    let run = format!("{out}/runs/qb-heat.mobilenet-tiny.seed0");
    let output = qbheat(&["study", &study, "--out", &run]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("this run exists already"));
}

#[test]
fn what_was_trained_does_not_stand_for_an_untrained_network() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY
        .replace("\"qb-heat\", \"moco-v2\", \"untrained\"", "\"x\"")
        .replace("[0, 1]", "[0]")
        .replace(
            "moco-v2.moco]\nqueue = 16\nsub_batches = 2",
            "x]\nmethod = \"qb-heat\"",
        );
    let study = write_study(home.path(), &text);
    let out = home.path().join("out").display().to_string();
    let run = || qbheat(&["study", &study, "--out", &out]);
    assert!(run().status.success());
    let text = std::fs::read_to_string(&study).unwrap();
    std::fs::write(&study, text.replace("= \"qb-heat\"", "= \"untrained\"")).unwrap();
    let output = run();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("untrained false, the study now has true"));
}

#[test]
fn minutes_become_epochs_by_the_pace_of_each_method() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY
        .replace("epochs = 1", "minutes = 0.01")
        .replace("batch_size = 4", "batch_size = 8");
    let study = write_study(home.path(), &text);
    let out = home.path().join("out");
    let plan = json(&qbheat(&[
        "study",
        &study,
        "--out",
        out.to_str().unwrap(),
        "--plan",
        "--json",
    ]));
    let pace: Value =
        serde_json::from_slice(&std::fs::read(out.join("pace.json")).unwrap()).unwrap();
    assert_eq!(pace.as_object().unwrap().len(), 2);
    for (key, images_per_s) in pace.as_object().unwrap() {
        let kind = key.split(' ').next().unwrap();
        let cells = plan["cells"].as_array().unwrap().iter();
        let of_kind: Vec<&Value> = cells
            .filter(|cell| cell["cell"].as_str().unwrap().starts_with(kind))
            .collect();
        // Both seeds have the same pace.
        assert_eq!(of_kind.len(), 2);
        assert_eq!(of_kind[0]["epochs"], of_kind[1]["epochs"]);
        let planned = of_kind[0];
        // 0.6 seconds on 20 training images, of which an epoch of whole batches has 16.
        let expected = (0.6 * images_per_s.as_f64().unwrap() / 16.0)
            .round()
            .max(1.0);
        assert_eq!(planned["epochs"].as_f64(), Some(expected));
    }
    assert!(!out.join("runs").exists());
}

#[test]
fn a_wrong_study_is_refused_with_its_key() {
    let home = tempfile::tempdir().unwrap();
    for (from, to, expected) in [
        ("epochs = 1", "", "`epochs` or `minutes`"),
        ("epochs = 1", "epochs = 1\nminutes = 2.0", "give one"),
        ("[set.moco-v2.moco]", "[set.mocco.moco]", "[set.mocco]"),
        ("queue = 16", "quue = 16", "`moco.queue`"),
        ("\"moco-v2\",", "\"mooco\",", "method"),
        ("labels = [1.0, 0.5]", "labels = [2.0]", "labels"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds has 0 twice"),
        ("queue = 16", "queue = 16\n[set.qb-heat]\nseed = 7", "seed"),
        (
            "queue = 16",
            "queue = 16\n[set.qb-heat]\nseeds = [7]",
            "set.qb-heat.seeds",
        ),
        (
            "queue = 16",
            "queue = 16\n[set.qb-heat]\nmethod = \"moco-v2\"",
            "[set.qb-heat] method",
        ),
        (
            "queue = 16",
            "queue = 16\n[set.qb-heat]\nkernels = false",
            "[set.qb-heat] kernels",
        ),
        ("batch_size = 4", "batchsize = 4", "batchsize"),
        (
            "sub_batches = 2",
            "sub_batches = 2\n[set.qb-heat]\ndata.held_out = 0.5",
            "[set.qb-heat] data.held_out",
        ),
        (
            "sub_batches = 2",
            "sub_batches = 2\n[set.untrained]\nlabels = [0.1]",
            "set.untrained.labels",
        ),
        (
            "[set.moco-v2.moco]",
            "[set]\nuntrained = 3\n[set.moco-v2.moco]",
            "set.untrained",
        ),
    ] {
        let study = write_study(home.path(), &STUDY.replace(from, to));
        let output = qbheat(&[
            "study",
            &study,
            "--out",
            home.path().join("o").to_str().unwrap(),
        ]);
        assert_eq!(output.status.code(), Some(2), "{to}");
        let text = stderr(&output);
        assert!(text.contains(expected), "{to}: {text}");
    }
}

#[test]
fn runs_are_compared_where_they_can_be() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("set");
    write_images(&data, &["a", "b"], 12, 16);
    let data = data.display().to_string();
    let run = |name: &str, more: &[&str]| {
        let out = home.path().join(name).display().to_string();
        let mut arguments = quick_run(&data, &out);
        arguments.extend(more);
        let output = command(&arguments).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let probe = qbheat(&["probe", &out, "--data", &data, "--protocol", "knn"]);
        assert!(probe.status.success(), "{}", stderr(&probe));
        out
    };
    let methods = |runs: &[&String]| -> Vec<String> {
        let out = home.path().join("page").display().to_string();
        let mut arguments = vec!["compare", "--out", &out, "--json"];
        arguments.extend(runs.iter().map(|run| run.as_str()));
        let found = json(&qbheat(&arguments));
        let cells = found["cells"].as_array().unwrap().iter();
        cells
            .map(|cell| cell["method"].as_str().unwrap().to_owned())
            .collect()
    };
    let ours = run("ours", &[]);
    let supervised = run("supervised", &["--method", "supervised"]);
    assert_eq!(methods(&[&ours, &supervised]), ["qb-heat", "supervised"]);
    // Another seed is one more of the same row, another recipe is a row of its own.
    let seed = run("seed", &["--seed", "1"]);
    assert_eq!(methods(&[&ours, &seed]), ["qb-heat", "qb-heat"]);
    let longer = run("longer", &["--seed", "2", "--set", "optim.epochs=2"]);
    assert_eq!(methods(&[&ours, &longer]), ["qb-heat", &longer]);
    // So that two recipes of two seeds each are two rows.
    let more = run(
        "more",
        &[
            "--seed",
            "3",
            "--set",
            "optim.epochs=2",
            "--set",
            "moco.queue=512",
        ],
    );
    assert_eq!(
        methods(&[&ours, &longer, &seed, &more]),
        ["qb-heat", &longer, "qb-heat", &longer]
    );

    // One set of weights is one cell, into however many runs it is scored.
    for into in [&ours, &seed] {
        let weights = "builtin:mobilenet-tiny-cifar10";
        let output = qbheat(&[
            "probe",
            weights,
            "--data",
            &data,
            "--protocol",
            "knn",
            "--into",
            into,
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        std::fs::read(Path::new(into).join("probes/shipped.knn.json")).unwrap();
    }
    assert_eq!(methods(&[&ours, &seed]), ["qb-heat", "qb-heat", "shipped"]);
    for into in [&ours, &seed] {
        std::fs::remove_file(Path::new(into).join("probes/shipped.knn.json")).unwrap();
    }

    let refused = |arguments: &[&str], words: &str| {
        let out = home.path().join("page").display().to_string();
        let output = qbheat(&[arguments, &["--out", &out]].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{words}: {text}");
    };
    let larger = run("larger", &["--set", "image_size=32"]);
    refused(
        &["compare", &ours, &larger],
        "image_size is 32 here and 16 there",
    );
    let probe = |run: &str, more: &[&str]| {
        let arguments = ["probe", run, "--data", &data, "--protocol", "knn"];
        qbheat(&[&arguments[..], more].concat())
    };
    probe(&seed, &["--image-size", "32"]);
    refused(
        &["compare", &ours, &seed],
        "image size of probes (knn, 1 of the labels) is 32 here and 16 there",
    );
    // What is scored into another run takes the place of neither's own result.
    let output = probe(&supervised, &["--into", &ours]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(methods(&[&ours]), ["qb-heat", &supervised]);
    assert_eq!(methods(&[&ours, &supervised]), ["qb-heat", "supervised"]);
    // Held out with another seed, most of what is scored was trained on.
    let output = probe(&supervised, &["--seed", "5"]);
    assert!(stderr(&output).contains("--seed 0 holds out the same as then"));
    refused(
        &["compare", &supervised],
        "supervised (supervised): pre-training saw some of the images that its result of knn is of",
    );
    // Of other images nothing is known.
    let other = home.path().join("other");
    write_images(&other, &["a", "b"], 12, 16);
    let other = other.display().to_string();
    let output = qbheat(&[
        "probe",
        &supervised,
        "--data",
        &other,
        "--seed",
        "5",
        "--protocol",
        "knn",
    ]);
    assert!(stderr(&output).contains("if that was on these images"));
    assert_eq!(methods(&[&supervised]), ["supervised"]);
    // A run whose folder is called like a method is not taken for that method's row.
    let at_home = |arguments: &[&str]| {
        let output = command(arguments)
            .current_dir(home.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        output
    };
    run("qb-heat", &["--set", "optim.epochs=3"]);
    let found = json(&at_home(&[
        "compare", "ours", "qb-heat", "--out", "page", "--json",
    ]));
    assert_eq!(found["cells"][0]["method"], "qb-heat");
    assert_eq!(found["cells"][1]["method"], "qb-heat/");
    at_home(&[
        "probe",
        "qb-heat",
        "--data",
        "set",
        "--protocol",
        "knn",
        "--into",
        "ours",
    ]);
    assert!(home.path().join("ours/probes/qb-heat_.knn.json").is_file());
    at_home(&["compare", "ours", "qb-heat", "--out", "page"]);
    let output = probe("untrained:resnet-18", &["--into", &ours]);
    assert!(
        stderr(&output).contains("a run of mobilenet-tiny, the weights are those of a resnet-18")
    );
}

#[test]
fn a_study_notices_other_images_and_other_minutes() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY
        .replace("epochs = 1", "minutes = 0.001")
        .replace("[0, 1]", "[0]")
        .replace("[1.0, 0.5]", "[1.0]");
    let study = write_study(home.path(), &text);
    let out = home.path().join("out").display().to_string();
    let output = qbheat(&["study", &study, "--out", &out]);
    assert!(output.status.success(), "{}", stderr(&output));
    let refused = |expected: &str| {
        let output = qbheat(&["study", &study, "--out", &out]);
        assert_eq!(output.status.code(), Some(2));
        let text = stderr(&output);
        assert!(text.contains(expected), "{text}");
    };
    let original = std::fs::read_to_string(&study).unwrap();
    std::fs::write(&study, original.replace("0.001", "0.002")).unwrap();
    refused("minutes 0.001");
    // The run that is left says what it was made of where the cell is gone.
    let cell = Path::new(&out).join("cells/qb-heat.mobilenet-tiny.seed0.json");
    std::fs::remove_file(&cell).unwrap();
    refused("qb-heat.mobilenet-tiny.seed0: it was made with minutes 0.001");
    std::fs::write(&study, original).unwrap();
    write_images(&home.path().join("set/train"), &["c"], 10, 16);
    refused("qb-heat.mobilenet-tiny.seed0: its run was begun on other images");
}

#[test]
fn scores_that_a_study_no_longer_asks_for_stay_with_their_cell() {
    let home = tempfile::tempdir().unwrap();
    let study = write_study(
        home.path(),
        &STUDY
            .replace("\"qb-heat\", \"moco-v2\", \"untrained\"", "\"untrained\"")
            .replace("[0, 1]", "[0]")
            .replace("[set.moco-v2.moco]\nqueue = 16\nsub_batches = 2\n", ""),
    );
    let original = std::fs::read_to_string(&study).unwrap();
    let out = home.path().join("out");
    for protocols in ["[\"knn\"]", "[\"linear\"]"] {
        let text = original.replace("[\"knn\", \"linear\"]", protocols);
        std::fs::write(&study, text).unwrap();
        let found = json(&qbheat(&[
            "study",
            &study,
            "--out",
            out.to_str().unwrap(),
            "--json",
        ]));
        let asked = found["cells"].as_array().unwrap();
        assert!(
            asked
                .iter()
                .all(|cell| protocols.contains(cell["protocol"].as_str().unwrap()))
        );
    }
    let cell = std::fs::read(out.join("cells/untrained.mobilenet-tiny.seed0.json")).unwrap();
    let cell: Value = serde_json::from_slice(&cell).unwrap();
    let scores = cell["scores"].as_array().unwrap().iter();
    let kept: Vec<&str> = scores.map(|s| s["protocol"].as_str().unwrap()).collect();
    assert_eq!(kept, ["knn", "linear", "linear"]);
}

#[test]
fn a_study_goes_on_after_being_killed() {
    let home = tempfile::tempdir().unwrap();
    let text = STUDY
        .replace("[0, 1]", "[0]")
        .replace("epochs = 1", "epochs = 3");
    let study = write_study(home.path(), &text);
    let run = |out: &Path| qbheat(&["study", &study, "--out", out.to_str().unwrap(), "--json"]);
    let whole = json(&run(&home.path().join("whole")));
    let out = home.path().join("out");
    for delay in [150, 400, 700] {
        let mut child = command(&["study", &study, "--out", out.to_str().unwrap()])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(json(&run(&out))["cells"], whole["cells"]);
}
