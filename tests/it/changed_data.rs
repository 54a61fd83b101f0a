//! A run goes on with the images that it was started on, or is told otherwise.

use std::fs;
use std::path::PathBuf;

use crate::support::{losses, qbheat, quick_run, stderr, write_images};

struct Setup {
    home: tempfile::TempDir,
}

impl Setup {
    /// A run of four steps on 18 images, of which two are held out.
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let setup = Self { home };
        write_images(&setup.at("set"), &["a", "b"], 9, 16);
        let (set, run) = (setup.at("set"), setup.at("run"));
        let mut arguments = quick_run(set.to_str().unwrap(), run.to_str().unwrap());
        arguments.extend(["--set", "optim.schedule=constant"]);
        let output = qbheat(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        setup
    }

    fn at(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn resume(&self, more: &[&str]) -> std::process::Output {
        let run = self.at("run");
        let mut arguments = vec!["resume", run.to_str().unwrap()];
        arguments.extend(more);
        qbheat(&arguments)
    }

    /// Refused with exit code 1 and these words, and nothing in the run has changed.
    fn refused(&self, words: &[&str]) {
        let index = fs::read(self.at("run/index.jsonl")).unwrap();
        let output = self.resume(&["--epochs", "3"]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(fs::read(self.at("run/index.jsonl")).unwrap(), index);
    }
}

#[test]
fn what_was_added_is_gone_or_has_another_size_is_named_and_refused_until_accepted() {
    let setup = Setup::new();
    let image = fs::read(setup.at("set/a/000.png")).unwrap();
    for number in 0..7 {
        fs::write(setup.at(&format!("set/b/new{number}.png")), &image).unwrap();
    }
    fs::remove_file(setup.at("set/b/003.png")).unwrap();
    let mut longer = image.clone();
    longer.push(0);
    fs::write(setup.at("set/a/000.png"), longer).unwrap();
    setup.refused(&[
        "7 added (b/new0.png, b/new1.png, b/new2.png, b/new3.png, b/new4.png, …)",
        "1 gone (b/003.png)",
        "1 of another size (a/000.png)",
        "--accept-changed-data",
    ]);
    // 24 images, of which two are held out: five steps an epoch now.
    let output = setup.resume(&["--epochs", "3", "--accept-changed-data"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("7 added"), "{}", stderr(&output));
    assert_eq!(losses(&setup.at("run")).len(), 15);
    let output = setup.resume(&["--epochs", "4"]);
    assert!(
        output.status.success(),
        "accepted once, they are the run's images: {}",
        stderr(&output)
    );
    assert_eq!(losses(&setup.at("run")).len(), 20);
}

#[test]
fn images_that_are_gone_are_named_with_where_they_were_given() {
    let setup = Setup::new();
    fs::rename(setup.at("set"), setup.at("elsewhere")).unwrap();
    let run = setup.at("run").display().to_string();
    for command in ["resume", "report"] {
        let output = qbheat(&[command, &run]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{command}: {text}");
        for words in ["set: no such file or folder", "the run (its config.toml)"] {
            assert!(text.contains(words), "{command}: {text}");
        }
    }
}

#[test]
fn a_checkpoint_names_the_images_by_the_hash_of_their_index() {
    let setup = Setup::new();
    let index = fs::read_to_string(setup.at("run/index.jsonl")).unwrap();
    let (_, records) = index.split_once('\n').unwrap();
    assert_eq!(records.lines().count(), 18);
    assert!(records.starts_with("[\"a/000.png\","), "{records}");
    let manifest = fs::read(setup.at("run/checkpoints/step-000000004/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let hash = blake3::hash(records.as_bytes()).to_hex().to_string();
    assert_eq!(manifest["position"]["data"], hash);
}

#[test]
fn an_index_that_is_damaged_is_refused_and_a_missing_one_made_anew() {
    let setup = Setup::new();
    let path = setup.at("run/index.jsonl");
    let whole = fs::read(&path).unwrap();
    for bit in [3, whole.len() * 8 / 2] {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, bytes).unwrap();
        setup.refused(&["index.jsonl", "damaged", "remove it"]);
    }
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    setup.refused(&["index.jsonl", "damaged"]);
    fs::write(&path, "").unwrap();
    setup.refused(&["index.jsonl", "damaged"]);
    fs::remove_file(&path).unwrap();
    let output = setup.resume(&["--epochs", "3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(fs::read(&path).unwrap(), whole);
}
