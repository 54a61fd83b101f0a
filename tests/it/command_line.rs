//! What scripts rely on.

use std::fs;

use base64::Engine;

use crate::support::{events, json, qbheat, quick_run, read_tensors, stderr, write_images};

#[test]
fn a_run_can_be_probed_reported_and_its_encoder_used_on() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let data = at("set");
    write_images(home.path().join("set").as_path(), &["a", "b", "c"], 30, 16);
    let run = at("run");
    let common = [
        "--image-size",
        "16",
        "--batch-size",
        "16",
        "--epochs",
        "2",
        "--set",
        "encoder.stride=4",
        "--json",
    ];
    let mut arguments = vec![
        "pretrain",
        "--data",
        &data,
        "--out",
        &run,
        "--set",
        "run.watch_every=1",
        "--seed",
        "3",
    ];
    arguments.extend(common);
    let answer = json(&qbheat(&arguments));
    assert_eq!(answer["run"], run.as_str());
    assert_eq!(answer["steps"], 10);

    let log = home.path().join("run");
    let steps = events(&log, Some("step"));
    assert_eq!(steps.len(), 10);
    for (i, step) in steps.iter().enumerate() {
        assert_eq!(step["step"], i + 1);
        assert_eq!(step["epoch"], i / 5);
        assert!(step["loss"].is_f64() && step["lr"].is_f64());
    }
    let watched = &events(&log, Some("epoch"))[0];
    for figure in ["knn_top1", "effective_rank", "spread", "commutator"] {
        assert!(watched[figure].is_f64(), "{figure}");
    }

    let probe = |weights: &str, more: &[&str]| {
        let mut arguments = vec!["probe", weights, "--data", &data, "--json", "--epochs", "2"];
        arguments.extend(more);
        json(&qbheat(&arguments))
    };
    let all = probe(&run, &["--protocol", "knn,linear,tran-1,finetune"]);
    let protocols: Vec<&str> = all["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| result["protocol"].as_str().unwrap())
        .collect();
    assert_eq!(protocols, ["knn", "linear", "tran-1", "finetune"]);
    assert_eq!(all["results"][0]["confusion"].as_array().unwrap().len(), 3);
    probe(
        "untrained:mobilenet-tiny",
        &["--protocol", "knn", "--into", &run],
    );
    let file = at("run/encoder.safetensors");
    let of_file = probe(&file, &["--protocol", "linear"]);
    assert_eq!(
        of_file["results"][0]["top1"], all["results"][1]["top1"],
        "a file is as good as its run"
    );
    assert_eq!(of_file["results"][0]["seed"], 3);

    let report = json(&qbheat(&["report", &run, "--json"]));
    let html = fs::read_to_string(report["report"].as_str().unwrap()).unwrap();
    assert!(html.contains("untrained") && html.contains("<svg"));
    check_page(&html);

    let second = at("second");
    let mut arguments = vec![
        "pretrain", "--data", &data, "--out", &second, "--init", &file,
    ];
    arguments.extend(common);
    assert_eq!(json(&qbheat(&arguments))["steps"], 10);
}

/// Every opened tag is closed, nothing comes from elsewhere, and every image decodes.
fn check_page(html: &str) {
    const VOID: [&str; 3] = ["meta", "img", "br"];
    let mut open = Vec::new();
    for tag in html.split('<').skip(1) {
        let inside = tag.split('>').next().unwrap();
        let name = inside
            .trim_start_matches('/')
            .split([' ', '\n', '/'])
            .next()
            .unwrap();
        if inside.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "closing tag");
        } else if !inside.starts_with('!') && !inside.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
    assert!(!html.contains("<script") && !html.contains("src=\"http"));
    let images: Vec<&str> = html
        .split("src=\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert!(images.len() > 20);
    for image in images {
        let bytes = image.strip_prefix("data:image/png;base64,").unwrap();
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(bytes)
            .unwrap();
        assert!(image::load_from_memory(&bytes).is_ok());
    }
}

#[test]
fn a_page_is_made_where_one_image_only_is_held_out() {
    let home = tempfile::tempdir().unwrap();
    write_images(&home.path().join("set/train"), &["a"], 8, 16);
    write_images(&home.path().join("set/val"), &["a"], 1, 16);
    let path = |name: &str| home.path().join(name).display().to_string();
    let (data, run) = (path("set"), path("run"));
    for arguments in [quick_run(&data, &run), vec!["report", &run]] {
        let output = qbheat(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

#[test]
fn bench_gives_images_a_second_of_any_work() {
    let home = tempfile::tempdir().unwrap();
    for work in ["pretrain", "supervised", "features", "block"] {
        let kept = home.path().join(work);
        let answer = json(&qbheat(&[
            "bench",
            "--work",
            work,
            "--image-size",
            "16",
            "--stride",
            "4",
            "--batch-size",
            "8",
            "--steps",
            "2",
            "--one-batch",
            "--keep-step",
            kept.to_str().unwrap(),
            "--json",
        ]));
        assert!(answer["images_per_s"].as_f64().unwrap() > 0.0, "{work}");
        assert!(answer["gflops"].as_f64().unwrap() < answer["peak_gflops"].as_f64().unwrap());
        assert_eq!(
            (&answer["work"], &answer["stride"]),
            (&work.into(), &4.into())
        );
        let kept = read_tensors(&kept);
        let parameters: usize = kept
            .0
            .iter()
            .filter(|(name, _)| {
                !name.contains("running_") && !["pixels", "groups"].contains(&&name[..])
            })
            .map(|(_, tensor)| tensor.values.len())
            .sum();
        assert_eq!(answer["parameters"], parameters, "{work}");
    }
}

#[test]
fn images_need_not_be_square() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    write_images(home.path().join("set").as_path(), &["a", "b"], 20, 24);
    let (data, run) = (at("set"), at("run"));
    let answer = json(&qbheat(&[
        "pretrain",
        "--data",
        &data,
        "--out",
        &run,
        "--image-size",
        "16x32",
        "--set",
        "encoder.stride=4",
        "--batch-size",
        "12",
        "--epochs",
        "1",
        "--json",
    ]));
    assert_eq!(answer["steps"], 3);
    let config = fs::read_to_string(home.path().join("run/config.toml")).unwrap();
    assert!(config.contains("image_size = [16, 32]"), "{config}");
    // In evaluation any size will do.
    for size in [&[][..], &["--image-size", "21x30"]] {
        let mut arguments = vec![
            "probe",
            &run,
            "--data",
            &data,
            "--protocol",
            "knn",
            "--json",
        ];
        arguments.extend(size);
        assert!(json(&qbheat(&arguments))["results"][0]["top1"].is_f64());
    }
    let report = json(&qbheat(&["report", &run, "--json"]));
    check_page(&fs::read_to_string(report["report"].as_str().unwrap()).unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_leaves_early_is_no_failure_and_a_full_disk_is_one() {
    let mut command = crate::support::command(&["encoders", "--image-size", "32"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = command.stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("No space left") && !text.contains("panicked"),
        "{text}"
    );
}
