//! A run that dies, is stopped or finds damage goes on as if nothing had happened, bit for bit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use qbheat::random::{Purpose, stream};
use rand::RngExt;

use crate::support::{command, events, json, losses, qbheat, read_tensors, stderr, write_images};

const STEPS: u64 = 24;

/// A data set of 32 images and the arguments of a run of 24 steps on it.
struct Setup {
    home: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        write_images(&home.path().join("set"), &["a", "b"], 18, 16);
        Self { home }
    }

    fn run(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn pretrain(&self, name: &str, more: &[&str]) -> Vec<String> {
        let data = self.home.path().join("set");
        let out = self.run(name);
        let mut arguments: Vec<String> = [
            "pretrain",
            "--data",
            data.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--image-size",
            "16",
            "--batch-size",
            "8",
            "--epochs",
            "6",
            "--threads",
            "2",
            "--seed",
            "3",
            "--set",
            "encoder.stride=4",
            "--set",
            "run.checkpoint_every=3",
            "--set",
            "qb_heat.decoder.depth=1",
        ]
        .map(str::to_owned)
        .to_vec();
        arguments.extend(more.iter().map(|&text| text.to_owned()));
        arguments
    }

    /// Trains without a stop and returns the run.
    fn uninterrupted(&self, name: &str, more: &[&str]) -> PathBuf {
        let arguments = self.pretrain(name, more);
        let output = qbheat(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(output.status.success(), "{}", stderr(&output));
        self.run(name)
    }
}

#[test]
fn a_run_is_the_same_on_any_number_of_threads() {
    let setup = Setup::new();
    for encoder in ["mobilenet-tiny", "mf-tiny"] {
        let runs = ["1", "2", "3"].map(|threads| {
            let name = format!("{encoder}-{threads}");
            let data = setup.home.path().join("set");
            let out = setup.run(&name);
            let (data, out) = (data.to_str().unwrap(), out.to_str().unwrap());
            let output = qbheat(&[
                "pretrain",
                "--data",
                data,
                "--out",
                out,
                "--image-size",
                "32",
                "--batch-size",
                "16",
                "--epochs",
                "2",
                "--threads",
                threads,
                "--encoder",
                encoder,
            ]);
            assert!(output.status.success(), "{}", stderr(&output));
            fs::read(setup.run(&name).join("encoder.safetensors")).unwrap()
        });
        assert!(runs[0] == runs[1] && runs[0] == runs[2], "{encoder}");
    }
}

fn resume(run: &Path) -> std::process::Output {
    qbheat(&["resume", run.to_str().unwrap()])
}

fn assert_same(run: &Path, reference: &Path) {
    assert_eq!(
        losses(run),
        losses(reference),
        "each step stands once, with the same loss"
    );
    let encoder = |run: &Path| fs::read(run.join("encoder.safetensors")).unwrap();
    assert!(
        encoder(run) == encoder(reference),
        "the encoders are the same bytes"
    );
    let last = format!("checkpoints/step-{STEPS:09}");
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let tensors = |run: &Path| read_tensors(&run.join(&last).join(file));
        assert!(tensors(run) == tensors(reference), "{file}");
    }
}

#[test]
fn a_run_that_is_killed_at_random_points_equals_one_that_was_not() {
    kill_and_compare(12);
}

/// The long form: `cargo test --release -- --ignored --nocapture survives_200_kills`
#[test]
#[ignore = "takes minutes"]
fn training_survives_200_kills() {
    kill_and_compare(200);
}

/// Kills runs of both kinds of encoder until `enough` kills have met a living process, and lets each come to its end.
fn kill_and_compare(enough: usize) {
    let setup = Setup::new();
    let encoders = ["mobilenet-tiny", "mf-tiny"];
    let references = encoders.map(|encoder| setup.uninterrupted(encoder, &["--encoder", encoder]));
    let (mut kills, mut runs) = (0, 0);
    while kills < enough || runs < 6 {
        let name = format!("killed-{runs}");
        let run = setup.run(&name);
        let mut random = stream(runs, Purpose::Sample, 0, 0);
        let kind = runs as usize % 2;
        let mut arguments = setup.pretrain(&name, &["--encoder", encoders[kind]]);
        let mut kills_of_run = 0;
        loop {
            let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // One kill in four comes anywhere in the first moments, the others after some progress; the delay then
            // decides whether it meets a step or a checkpoint half written.
            let delay = if random.random_bool(0.25) {
                random.random_range(0..200)
            } else {
                // More than there are lets it run to its end.
                let steps = logged_steps(&run) + random.random_range(1..6);
                wait_for_steps(&run, steps, &mut child);
                random.random_range(0..30)
            };
            sleep(Duration::from_millis(delay));
            let finished = child.try_wait().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            if let Some(status) = finished {
                assert!(status.success());
                break;
            }
            kills_of_run += 1;
            assert!(kills_of_run < 100, "no progress");
            // Killed before it had a configuration, a run has not begun.
            if run.join("config.toml").exists() {
                arguments = vec!["resume".into(), run.to_str().unwrap().into()];
            }
        }
        assert_same(&run, &references[kind]);
        fs::remove_dir_all(&run).unwrap();
        kills += kills_of_run;
        runs += 1;
    }
    println!("{kills} kills over {runs} runs: all losses and final weights equal");
}

/// The long form of a run's life: `cargo test --release -- --ignored --nocapture flat_over_200_epochs`
#[cfg(target_os = "linux")]
#[test]
#[ignore = "takes minutes"]
fn memory_file_handles_and_speed_stay_flat_over_200_epochs() {
    let setup = Setup::new();
    let more = ["--set", "optim.epochs=200", "--set", "run.watch_every=5"];
    let arguments = setup.pretrain("soak", &more);
    let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let run = setup.run("soak");
    let process = PathBuf::from(format!("/proc/{}", child.id()));
    let memory_kib = || -> u64 {
        let status = fs::read_to_string(process.join("status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let handles = || fs::read_dir(process.join("fd")).unwrap().count();
    // In the kernel's ticks; unlike time on the clock it does not depend on what else the machine does.
    let processor_time = || -> f64 {
        let stat = fs::read_to_string(process.join("stat")).unwrap();
        let after_name = stat.rsplit(')').next().unwrap();
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()
    };
    let mut seen = Vec::new();
    for epoch in [50, 100, 150, 195] {
        wait_for_steps(&run, 4 * epoch, &mut child);
        seen.push((epoch, memory_kib(), handles(), processor_time()));
    }
    assert!(child.wait().unwrap().success());
    let per_epoch = |a: usize, b: usize| (seen[b].3 - seen[a].3) / (seen[b].0 - seen[a].0) as f64;
    let (early, late) = (per_epoch(0, 1), per_epoch(2, 3));
    println!(
        "epoch, resident KiB, file handles, ticks: {seen:?}; ticks an epoch {early:.1}, then {late:.1}"
    );
    assert!(seen[3].1 as f64 <= 1.1 * seen[0].1 as f64);
    assert_eq!(seen[3].2, seen[0].2);
    assert!(late <= 1.2 * early);
}

#[cfg(unix)]
#[test]
fn term_and_int_finish_the_step_save_and_say_how_to_go_on() {
    let setup = Setup::new();
    let reference = setup.uninterrupted("reference", &[]);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let run = setup.run(signal);
        let arguments = setup.pretrain(signal, &[]);
        let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for_steps(&run, 2, &mut child);
        send(signal, child.id());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(code));
        let mut text = String::new();
        std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut text).unwrap();
        assert!(text.contains("qbheat resume"), "{text}");
        assert!(!run.join("encoder.safetensors").exists());
        let done = losses(&run).len() as u64;
        assert!((2..STEPS).contains(&done), "{done} steps");
        assert!(run.join(format!("checkpoints/step-{done:09}")).is_dir());
        assert!(resume(&run).status.success());
        assert_same(&run, &reference);
    }
}

#[cfg(unix)]
#[test]
fn a_second_signal_leaves_at_once() {
    let setup = Setup::new();
    let arguments = setup.pretrain("twice", &["--set", "optim.epochs=5000"]);
    let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for_steps(&setup.run("twice"), 1, &mut child);
    send("INT", child.id());
    send("INT", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[cfg(unix)]
fn send(signal: &str, process: u32) {
    let status = std::process::Command::new("kill")
        .args([format!("-{signal}"), process.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

fn logged_steps(run: &Path) -> usize {
    let text = fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
    text.lines()
        .filter(|line| line.contains("\"kind\":\"step\""))
        .count()
}

/// Waits until the run has logged so many steps, or its process has ended.
fn wait_for_steps(run: &Path, steps: usize, process: &mut Child) {
    let start = Instant::now();
    while logged_steps(run) < steps && process.try_wait().unwrap().is_none() {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "no step was taken"
        );
        sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_next_older_one() {
    let setup = Setup::new();
    let reference = setup.uninterrupted("reference", &[]);
    let newest = format!("checkpoints/step-{STEPS:09}");
    for file in [
        "model.safetensors",
        "optimizer.safetensors",
        "manifest.json",
    ] {
        let whole = fs::read(reference.join(&newest).join(file)).unwrap();
        let damages: [(&str, Vec<u8>); 4] = [
            ("empty", Vec::new()),
            ("cut", whole[..whole.len() - 1].to_vec()),
            ("flipped early", flip(&whole, 9)),
            ("flipped in the middle", flip(&whole, whole.len() * 8 / 2)),
        ];
        for (damage, bytes) in damages {
            let run = copy(&reference, &setup.run("damaged"));
            fs::write(run.join(&newest).join(file), bytes).unwrap();
            fs::remove_file(run.join("encoder.safetensors")).unwrap();
            let output = resume(&run);
            let text = stderr(&output);
            assert!(output.status.success(), "{file} {damage}: {text}");
            assert!(
                text.contains("passed over") && text.contains(file),
                "{file} {damage}: {text}"
            );
            assert!(!text.contains("panicked"));
            assert_same(&run, &reference);
        }
    }
    let run = copy(&reference, &setup.run("damaged"));
    for entry in fs::read_dir(run.join("checkpoints")).unwrap().flatten() {
        fs::write(entry.path().join("manifest.json"), "{}").unwrap();
    }
    let output = resume(&run);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no checkpoint verifies"));
}

fn flip(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes
}

fn copy(from: &Path, to: &Path) -> PathBuf {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
    to.to_owned()
}

#[test]
fn more_epochs_are_refused_under_a_cosine_and_taken_under_a_constant_rate() {
    let setup = Setup::new();
    let cosine = setup.uninterrupted("cosine", &[]);
    let output = qbheat(&["resume", cosine.to_str().unwrap(), "--epochs", "9"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("cosine"), "{}", stderr(&output));
    let constant = setup.uninterrupted("constant", &["--set", "optim.schedule=constant"]);
    // Of one that died before its first checkpoint there is only this.
    let died = setup.run("died");
    fs::create_dir(&died).unwrap();
    fs::copy(constant.join("config.toml"), died.join("config.toml")).unwrap();
    for run in [constant, died] {
        let output = qbheat(&["resume", run.to_str().unwrap(), "--epochs", "7"]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(losses(&run).len() as u64, STEPS + 4);
        let config = fs::read_to_string(run.join("config.toml")).unwrap();
        assert!(config.contains("\nepochs = 7\n"), "{config}");
    }
}

#[test]
fn a_run_that_exists_is_never_overwritten() {
    let setup = Setup::new();
    let run = setup.uninterrupted("run", &[]);
    let before = fs::read(run.join("events.jsonl")).unwrap();
    let arguments = setup.pretrain("run", &[]);
    let output = qbheat(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("qbheat resume"));
    assert_eq!(fs::read(run.join("events.jsonl")).unwrap(), before);
    let kept = fs::read_dir(run.join("checkpoints")).unwrap().count();
    assert_eq!(kept, 3, "the newest three checkpoints are kept");
}

#[test]
fn a_run_needs_neither_the_weights_it_began_with_nor_the_folder_it_was_started_in() {
    let setup = Setup::new();
    let first = setup.uninterrupted("first", &[]);
    let start = setup.home.path().join("start.safetensors");
    fs::copy(first.join("encoder.safetensors"), &start).unwrap();
    let reference = setup.uninterrupted("reference", &["--init", start.to_str().unwrap()]);

    let mut arguments = setup.pretrain("run", &["--init", "start.safetensors"]);
    let data = arguments.iter().position(|a| a == "--data").unwrap() + 1;
    arguments[data] = "set".into();
    let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        .current_dir(setup.home.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let run = setup.run("run");
    wait_for_steps(&run, 5, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_file(&start).unwrap();
    let output = resume(&run);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(&run, &reference);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_can_be_played_again() {
    let setup = Setup::new();
    for allowed in [0, 2] {
        let name = format!("skips-{allowed}");
        let skip = format!("run.skip_non_finite={allowed}");
        let more = ["--set", "optim.learning_rate=1e30", "--set", &skip];
        let output = qbheat(
            &setup
                .pretrain(&name, &more)
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        );
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        assert!(
            text.contains("NaN") && text.contains("learning_rate"),
            "{text}"
        );
        let run = setup.run(&name);
        let bad = events(&run, Some("non-finite"));
        let skipped: Vec<bool> = bad
            .iter()
            .map(|event| event["skipped"].as_bool().unwrap())
            .collect();
        let expected: Vec<bool> = (0..=allowed).map(|k| k < allowed).collect();
        assert_eq!(skipped, expected);

        let answer = json(&qbheat(&["replay", run.to_str().unwrap(), "--json"]));
        assert_eq!(answer["same"], true, "{answer}");
        assert_eq!(answer["replay"]["step"], bad.last().unwrap()["step"]);
        assert_eq!(answer["replay"]["files"].as_array().unwrap().len(), 8);
        assert!(
            !answer["replay"]["bad_gradients"]
                .as_array()
                .unwrap()
                .is_empty()
        );
        // The network of another step, as a kill before the batch is written leaves it.
        let network = bad.last().unwrap()["step"].as_u64().unwrap() - 1;
        let (kept, other) = (run.join("bad-step"), "step-000000000");
        fs::remove_dir_all(kept.join(format!("step-{network:09}"))).unwrap();
        copy(&run.join("checkpoints").join(other), &kept.join(other));
        let output = qbheat(&["replay", run.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains("the network is that of step 1,"),
            "{}",
            stderr(&output)
        );
    }
    let fine = setup.uninterrupted("fine", &[]);
    let output = qbheat(&["replay", fine.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no bad step"));
}

#[test]
fn a_second_process_is_kept_out_of_a_run_until_the_first_is_gone() {
    let setup = Setup::new();
    let reference = setup.uninterrupted("reference", &[]);
    let arguments = setup.pretrain("run", &[]);
    let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let run = setup.run("run");
    wait_for_steps(&run, 1, &mut child);
    let output = resume(&run);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("another process"),
        "{}",
        stderr(&output)
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let output = resume(&run);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(&run, &reference);
}

#[test]
fn a_checkpoint_of_another_network_or_version_is_named() {
    let setup = Setup::new();
    let reference = setup.uninterrupted("reference", &[]);
    let other = setup.uninterrupted("other", &["--encoder", "mf-tiny"]);
    let newest = format!("checkpoints/step-{STEPS:09}");
    let run = copy(&reference, &setup.run("foreign"));
    fs::remove_dir_all(run.join("checkpoints")).unwrap();
    let log = fs::read(run.join("events.jsonl")).unwrap();
    let output = resume(&run);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("there is none"),
        "{}",
        stderr(&output)
    );
    fs::write(run.join("checkpoints"), "what cannot be listed").unwrap();
    let output = resume(&run);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read(run.join("events.jsonl")).unwrap(), log);
    fs::remove_file(run.join("checkpoints")).unwrap();
    copy(&other.join("checkpoints"), &run.join("checkpoints"));
    let output = resume(&run);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains(&newest) && text.contains("tensor `encoder."),
        "{text}"
    );

    let run = copy(&reference, &setup.run("newer"));
    let manifest = run.join(&newest).join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(
        &manifest,
        text.replacen("\"format\": 1", "\"format\": 2", 1),
    )
    .unwrap();
    fs::remove_file(
        run.join(format!("checkpoints/step-{:09}", STEPS - 3))
            .join("model.safetensors"),
    )
    .unwrap();
    fs::remove_file(run.join("encoder.safetensors")).unwrap();
    let output = resume(&run);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("format 2") && text.contains("model.safetensors cannot be read"),
        "{text}"
    );
    assert_same(&run, &reference);
}

/// Runs a command with a fresh file system of `bytes` at `folder`, where the system lets us make one; the answer is
/// none where it does not.
#[cfg(target_os = "linux")]
fn with_small_disk(folder: &Path, bytes: u64, script: &str) -> Option<std::process::Output> {
    let mount = format!("mount -t tmpfs -o size={bytes} none '{}'", folder.display());
    let inside = |script: &str| {
        std::process::Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
            .output()
    };
    let possible = inside(&mount).is_ok_and(|output| output.status.success());
    possible.then(|| inside(&format!("{mount} && {script}")).unwrap())
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_the_run_goes_on_once_there_is_room() {
    let setup = Setup::new();
    let reference = setup.uninterrupted("reference", &[]);
    let checkpoint: u64 = fs::read_dir(reference.join(format!("checkpoints/step-{STEPS:09}")))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    let disk = setup.home.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mut arguments = setup.pretrain("run", &[]);
    let out = arguments.iter().position(|a| a == "--out").unwrap() + 1;
    arguments[out] = disk.join("run").to_str().unwrap().into();
    // Room for two checkpoints and a half: the third fails.
    let script = format!(
        "'{program}' {arguments}; echo code $?; df --output=avail '{disk}'; mount -o remount,size={more} '{disk}' && \
         '{program}' resume '{disk}/run' && cp -r '{disk}/run' '{copy}'",
        program = env!("CARGO_BIN_EXE_qbheat"),
        arguments = arguments
            .iter()
            .map(|a| format!("'{a}'"))
            .collect::<Vec<_>>()
            .join(" "),
        disk = disk.display(),
        more = 20 * checkpoint,
        copy = setup.run("survivor").display(),
    );
    let Some(output) = with_small_disk(&disk, checkpoint * 5 / 2, &script) else {
        eprintln!("no file system can be mounted here; not tested");
        return;
    };
    let (text, said) = (stderr(&output), String::from_utf8_lossy(&output.stdout));
    assert!(said.contains("code 1"), "{said}{text}");
    assert!(text.contains("No space left on device"), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(output.status.success(), "{text}");
    assert_same(&setup.run("survivor"), &reference);
}
