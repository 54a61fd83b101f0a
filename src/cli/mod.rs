//! The command line: one file a subcommand. Only this module talks to people.

mod bench;
mod check;
mod demo;
mod detect;
mod encoders;
mod invariance;
mod pretrain;
mod probe;
mod progress;
mod replay;
mod report;
mod resume;
mod signals;
mod study;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use qbheat::config::{Base, Config, parse_setting};
use qbheat::data::{Dataset, Split, Summary};
use qbheat::error::{Error, Result};
use qbheat::observe::Observer;
use qbheat::pretrain::Outcome;
use qbheat::train;
use qbheat::{Compute, compute_on};
use serde_json::{Value, json};

use progress::Progress;

/// Self-supervised pre-training of light vision networks with QB-Heat (arXiv 2211.13228).
#[derive(Parser)]
#[command(name = "qbheat", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pre-train on the built-in images, probe the result beside an untrained network, write a report (minutes).
    Demo(demo::Demo),
    /// Pre-train an encoder on your own images.
    Pretrain(pretrain::Pretrain),
    /// Go on with a run that was stopped.
    Resume(resume::Resume),
    /// Repeat the step at which a run stopped because its loss or a gradient was not finite.
    Replay(replay::Replay),
    /// Score an encoder's features.
    Probe(probe::Probe),
    /// Run what is still missing of a study file (methods × encoders × seeds × protocols, or detectors on several
    /// weights) and write one table.
    Study(study::StudyCommand),
    /// Write the same table of runs that exist.
    Compare(study::Compare),
    /// Test the hypothesis: are the derivatives of the features along both axes related linearly?
    Invariance(invariance::Invariance),
    /// Detection: train a head on images with boxes, score it, find objects.
    Detect(detect::Detect),
    /// Write RUN/report.html.
    Report(report::Report),
    /// List the networks with their sizes.
    Encoders(encoders::Encoders),
    /// Time the training step.
    Bench(bench::Bench),
    /// Look at every image of a data set: unreadable, odd, duplicate. Exits with 1 if any is unreadable; odd images and
    /// duplicates are only listed.
    Check(check::Check),
}

/// Where the path of missing images was given, for commands that take no `--data`.
const OF_RUN: &str = "the run (its config.toml)";

/// What every command takes.
#[derive(Args)]
struct Common {
    /// Print one JSON object on stdout and nothing else there.
    #[arg(long)]
    json: bool,
    /// Decides all that the command draws at random [default: that of the run, for probe also of the weights, else 0].
    #[arg(long)]
    seed: Option<u64>,
    /// Threads that compute [default: those of the run, else all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// What computes: cpu, or wgpu or cuda[:N] where the program was built for it [default: that of the run,
    /// else cpu].
    #[arg(long)]
    device: Option<Compute>,
}

/// What a command leaves: an exit code, the JSON object for `--json`, the text for people.
struct Answer {
    exit_code: u8,
    json: Value,
    text: String,
}

impl Answer {
    fn done(json: Value, text: String) -> Self {
        Self {
            exit_code: 0,
            json,
            text,
        }
    }
}

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let progress = Progress::new();
    if let Err(error) = heed_environment() {
        progress.note(&format!("error: {error}"));
        return ExitCode::from(error.exit_code());
    }
    let (json, answer) = match &arguments.command {
        Command::Demo(command) => (command.common.json, command.run(&progress)),
        Command::Pretrain(command) => (command.common.json, command.run(&progress)),
        Command::Resume(command) => (command.common.json, command.run(&progress)),
        Command::Replay(command) => (command.common.json, command.run(&progress)),
        Command::Probe(command) => (command.common.json, command.run(&progress)),
        Command::Study(command) => (command.common.json, command.run(&progress)),
        Command::Compare(command) => (command.json, command.run(&progress)),
        Command::Invariance(command) => (command.common.json, command.run(&progress)),
        Command::Detect(command) => (command.json(), command.run(&progress)),
        Command::Report(command) => (command.common.json, command.run(&progress)),
        Command::Encoders(command) => (command.common.json, command.run(&progress)),
        Command::Bench(command) => (command.common.json, command.run(&progress)),
        Command::Check(command) => (command.json, command.run(&progress)),
    };
    match answer {
        Ok(answer) => {
            let text = if json {
                answer.json.to_string()
            } else {
                answer.text
            };
            match writeln!(std::io::stdout(), "{text}") {
                // Whoever reads has seen enough, as `head` has.
                Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                    progress.note(&format!("error: the answer cannot be written: {error}"));
                    ExitCode::FAILURE
                }
                _ => ExitCode::from(answer.exit_code),
            }
        }
        Err(error) => {
            progress.clear();
            progress.note(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// `QBHEAT_KERNELS=off` has the same effect as the setting `kernels = false`, for every command; `avx2` and `scalar` make
/// the kernels do with less than the processor has.
fn heed_environment() -> Result<()> {
    const KEY: &str = "QBHEAT_KERNELS";
    match std::env::var(KEY).as_deref() {
        Err(_) | Ok("on" | "avx2" | "scalar") => Ok(()),
        Ok("off") => {
            qbheat_kernels::set_enabled(false);
            Ok(())
        }
        Ok(other) => Err(Error::Value {
            key: KEY.into(),
            value: other.to_owned(),
            expected: "on, off, avx2 or scalar".into(),
        }),
    }
}

/// Bytes that the stacks of all computing threads but this one may grow to: one that waits for a part of its work may
/// take up another image of a batch meanwhile, on top of what it is at.
const STACK: usize = 16 << 20;

/// Fixes the number of threads that compute, for the whole process; this one is among them, since handing every operation
/// over to another would take a fifth of a step's time.
fn use_threads(threads: usize) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK)
        .use_current_thread()
        .build_global();
    match pool.as_ref().map_err(std::error::Error::source) {
        Err(Some(reason)) => Err(Error::Refused(format!(
            "{threads} threads cannot be started ({reason}); use fewer (--threads)"
        ))),
        // Without a source: the pool exists already, where a command calls this twice.
        Ok(()) | Err(None) => Ok(()),
    }
}

/// As [`compute_as`], where there may be no run whose configuration says how.
fn compute_as_run(run: Option<&Base>, common: &Common) -> Result<()> {
    if let Some(config) = run {
        return compute_as(config, common);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    use_threads(common.threads.unwrap_or(threads))?;
    compute_on(common.device.unwrap_or_default())
}

/// Fixes how this process computes: as the configuration says, where the command does not say otherwise.
fn compute_as(config: &Base, common: &Common) -> Result<()> {
    use_threads(common.threads.unwrap_or(config.threads))?;
    if !config.kernels {
        qbheat_kernels::set_enabled(false);
    }
    compute_on(common.device.unwrap_or(config.device))
}

/// Flags that are short for `--set`, then the `--set` options themselves.
#[derive(Default)]
struct Settings(Vec<(String, String)>);

impl Settings {
    fn add(&mut self, key: &str, value: Option<impl ToString>) -> &mut Self {
        if let Some(value) = value {
            self.0.push((key.to_owned(), value.to_string()));
        }
        self
    }

    fn common(&mut self, common: &Common) -> &mut Self {
        self.add("seed", common.seed)
            .add("threads", common.threads)
            .add("device", common.device)
    }

    fn parsed(&mut self, settings: &[String]) -> Result<&mut Self> {
        for setting in settings {
            self.0.push(parse_setting(setting)?);
        }
        Ok(self)
    }

    fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    fn load(&self, file: Option<&Path>) -> Result<Config> {
        Config::load(file, &self.0)
    }

    fn load_for_any_size(&self) -> Result<Config> {
        Config::load_for_any_size(None, &self.0)
    }
}

/// What was found in a data set, in words.
fn describe_data(dataset: &Dataset) -> String {
    let Summary {
        images,
        formats,
        sizes,
        unreadable,
        others,
        cached,
    } = &dataset.summary;
    let formats: Vec<String> = formats
        .iter()
        .map(|(format, count)| format!("{count} {format}"))
        .collect();
    let sizes = match (sizes.first_key_value(), sizes.last_key_value()) {
        (Some(((w, h), _)), Some(_)) if sizes.len() == 1 => format!("all {w}×{h}"),
        (Some(((w, h), _)), Some(((w2, h2), _))) => {
            format!("{} sizes from {w}×{h} to {w2}×{h2}", sizes.len())
        }
        _ => String::new(),
    };
    let classes = match dataset.classes.len() {
        0 => "no classes".to_owned(),
        count => format!("{count} classes"),
    };
    let mut text = format!(
        "{}: {images} images ({}), {sizes}, {classes}, {} unreadable",
        dataset.path().display(),
        formats.join(", "),
        unreadable.len()
    );
    if *others > 0 {
        text += &format!(", {others} other files passed over");
    }
    if !unreadable.is_empty() {
        text += &format!("; unreadable:\n{}", dataset.summary.list_unreadable());
    }
    let (train, held_out) = (dataset.train.len(), dataset.held_out.len());
    text += &match &dataset.split {
        Split::Own { held_out: folder } => {
            format!("\ntraining on {train}; the {held_out} of its folder `{folder}` are held out")
        }
        Split::Stratified {
            held_out: share, ..
        } => format!(
            "\ntraining on {train}; {held_out} are held out for evaluation ({:.0} % of each class, drawn with the seed)",
            100.0 * share
        ),
        Split::None => {
            format!("\ntraining on all {train}; nothing is held out, there are no classes to score")
        }
    };
    if !cached {
        text +=
            "\nthe decoded images do not fit into data.memory_mib and are decoded anew each epoch";
    }
    text
}

/// What there is to know of any run, for scripts.
fn json_of_course(outcome: &train::Outcome) -> Value {
    let (first, last) = outcome.losses.unzip();
    json!({
        "run": outcome.run,
        "steps": outcome.steps,
        "planned_steps": outcome.planned,
        "first_loss": first,
        "last_loss": last,
        "images_per_s": outcome.images_per_s,
        "bad_images": outcome.bad_images,
    })
}

/// That a run was stopped before its end.
fn answer_of_stop(outcome: &train::Outcome, json: Value) -> Answer {
    Answer {
        exit_code: signals::exit_code(),
        json,
        text: format!(
            "stopped after step {} of {}; go on with `qbheat resume {}`",
            outcome.steps,
            outcome.planned,
            outcome.run.display()
        ),
    }
}

/// That images were replaced during a run, as a line to be added; nothing where none was.
fn describe_bad_images(outcome: &train::Outcome) -> String {
    match outcome.bad_images {
        0 => String::new(),
        count => {
            format!("\nbecame unreadable and were replaced: {count} (`qbheat check` lists them)")
        }
    }
}

/// How a run ended, for people and for scripts.
fn answer_of_run(outcome: &Outcome) -> Answer {
    let Outcome {
        course: outcome,
        trivial_loss,
    } = outcome;
    let run = outcome.run.display();
    let (first, last) = outcome.losses.unzip();
    let mut json = json_of_course(outcome);
    json["trivial_loss"] = (*trivial_loss).into();
    if outcome.stopped() {
        return answer_of_stop(outcome, json);
    }
    let loss = match (first, last) {
        (Some(first), Some(last)) => format!(
            "loss {first:.4} to {last:.4} (trivial predictor {trivial_loss:.4}), {:.0} images/s",
            outcome.images_per_s
        ),
        _ => "nothing left to do".to_owned(),
    };
    Answer::done(
        json,
        format!(
            "finished after {} steps: {loss}{}\nencoder: {}\nnext: qbheat probe {run} --data …, qbheat report {run}",
            outcome.steps,
            describe_bad_images(outcome),
            outcome.run.join(train::ENCODER_FILE).display()
        ),
    )
}

/// A folder name that is not taken: `base`, `base-2`, `base-3`, ….
fn free_folder(base: &str) -> PathBuf {
    (1..)
        .map(|number| match number {
            1 => PathBuf::from(base),
            _ => PathBuf::from(format!("{base}-{number}")),
        })
        .find(|path| !path.exists())
        .expect("some number is free")
}
