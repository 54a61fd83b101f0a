//! `qbheat invariance` from end to end; its maths is tested in `closed_forms`.

use std::fs;

use serde_json::Value;

use crate::support::{json, qbheat, quick_run, stderr, write_images};

/// Of three classes, a tenth of which is held out. On a 4×4 map the 192 channels of `mobilenet-tiny` need 192 images to
/// fit on: 4 samples a channel, 4 of them an image.
const EACH: usize = 80;

#[test]
fn a_run_is_tested_beside_its_untrained_network_and_shown_on_a_page() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let (data, run) = (at("set"), at("run"));
    write_images(&home.path().join("set"), &["a", "b", "c"], EACH, 16);
    let pretrained = qbheat(&quick_run(&data, &run));
    assert!(pretrained.status.success(), "{}", stderr(&pretrained));

    let test = |more: &[&str]| {
        let mut arguments = vec!["invariance", &run, "--data", &data, "--json"];
        arguments.extend(more);
        qbheat(&arguments)
    };
    let found = json(&test(&[]));
    assert_eq!(found["fitted_images"], 3 * EACH * 9 / 10);
    assert_eq!(found["scored_images"], 3 * EACH / 10);
    let encoders = found["encoders"].as_array().unwrap();
    let names: Vec<&str> = encoders
        .iter()
        .map(|encoder| encoder["weights"].as_str().unwrap())
        .collect();
    assert_eq!(names, [run.as_str(), "untrained:mobilenet-tiny"]);
    for encoder in encoders {
        let laws: Vec<&str> = encoder["laws"]
            .as_array()
            .unwrap()
            .iter()
            .map(|law| law["name"].as_str().unwrap())
            .collect();
        let expected = [
            "T, lag 1",
            "T, lag 2",
            "T, lag 1, no shared position",
            "S, lag 1",
        ];
        assert_eq!(laws, expected);
        for law in encoder["laws"].as_array().unwrap() {
            assert_finite(law, &["r2", "shuffled"]);
            assert!(law["r2_of_scalar"].is_f64());
            let full = law["by_rank"].as_array().unwrap().last().unwrap();
            assert_eq!(full["rank"], 192);
            let whole = law["r2"]["position_means_removed"].as_f64().unwrap();
            let error = full["r2"].as_f64().unwrap() - whole;
            assert!(error.abs() < 1e-6 * whole.abs().max(1.0), "{law}");
        }
        assert_eq!(encoder["t_eigenvalues"].as_array().unwrap().len(), 192);
    }
    let learned = &encoders[0]["learned"];
    assert!(learned["commutator"].is_f64() && learned["rank_of_b"].is_u64());
    assert_finite(&encoders[0]["laws"][1]["learned"], &["r2"]);
    assert!(encoders[1]["learned"].is_null());

    let page = home.path().join("run/invariance.html");
    assert_eq!(found["page"], page.to_str().unwrap());
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>") && html.trim_end().ends_with("</html>"));
    assert!(html.contains("<svg") && html.contains("no shared position"));
    assert!(!html.contains("<script") && !html.contains("src=\"http"));
    let verdicts = html.matches("with positions shuffled: ").count();
    assert_eq!(
        verdicts, 2,
        "over half the map, and without a shared position"
    );

    let again = json(&test(&["--out", &at("elsewhere.html"), "--threads", "1"]));
    assert_eq!(
        again["encoders"], found["encoders"],
        "on any number of threads"
    );
    let sobel = json(&test(&[
        "--difference",
        "sobel",
        "--out",
        &at("sobel.html"),
    ]));
    assert_finite(&sobel["encoders"][0]["laws"][0], &["r2"]);

    assert_eq!(encoders[0]["may_have_seen_scored"], false);
    let held_out_otherwise = test(&["--seed", "1", "--out", &at("seed.html")]);
    assert!(stderr(&held_out_otherwise).contains("--seed 0 holds out the same"));
    let otherwise = json(&held_out_otherwise);
    assert_eq!(otherwise["encoders"][0]["may_have_seen_scored"], true);
    assert_eq!(otherwise["encoders"][1]["may_have_seen_scored"], false);

    let few = test(&["--images", "191"]);
    assert_eq!(few.status.code(), Some(2));
    assert!(stderr(&few).contains("--images: 191 images are too few"));
    assert!(stderr(&few).contains("at least 192 images"));
    let folder = test(&["--out", home.path().to_str().unwrap()]);
    assert_eq!(folder.status.code(), Some(2));
    assert!(stderr(&folder).contains("is a folder"));
    let nowhere = test(&["--out", &at("no/such/page.html")]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(stderr(&nowhere).contains("--out"));
    let mixed = qbheat(&[
        "invariance",
        &run,
        "builtin:mobilenet-tiny-cifar10",
        "--data",
        &data,
    ]);
    assert_eq!(mixed.status.code(), Some(2));
    let text = stderr(&mixed);
    assert!(text.contains("16 px") && text.contains("32 px"), "{text}");
}

fn assert_finite(result: &Value, names: &[&str]) {
    for name in names {
        for removed in ["position_means_removed", "channel_means_removed", "raw"] {
            assert!(result[name][removed].is_f64(), "{name}.{removed}: {result}");
        }
    }
}

#[test]
fn data_without_enough_images_is_refused_with_what_it_would_take() {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["only"], 20, 16);
    let data = home.path().to_str().unwrap();
    let out = home.path().join("page.html");
    let output = qbheat(&[
        "invariance",
        "untrained:mobilenet-tiny",
        "--data",
        data,
        "--out",
        out.to_str().unwrap(),
    ]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    // Without classes none are held out, and a fifth is kept to be scored.
    assert!(text.contains("16 images are too few"), "{text}");
    assert!(
        text.contains("at least") && text.contains("--data"),
        "{text}"
    );
    assert!(!out.exists());
}
