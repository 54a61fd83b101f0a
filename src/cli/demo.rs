//! `qbheat demo`: the main job from end to end, on the built-in images.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use qbheat::data::{BUILTIN, Dataset};
use qbheat::error::{Error, Result};
use qbheat::observe::Observer;
use qbheat::pretrain;
use qbheat::probe::{
    ProbeConfig, ProbeRecord, Protocol, SHIPPED_ROW, mean_gain, probe, probe_data, whole_tasks,
};
use qbheat::report::write_report;
use qbheat::train::{RunFolder, Surroundings};
use qbheat::weights::{SHIPPED, SHIPPED_TRAINING, Weights};
use serde_json::json;

use super::probe::label;
use super::progress::Progress;
use super::{
    Answer, Common, Settings, answer_of_run, compute_as, describe_data, free_folder, signals,
};

const ENCODER: &str = "mobilenet-tiny";
const PROTOCOLS: [Protocol; 3] = [Protocol::Knn, Protocol::Linear, Protocol::Tran1];
/// Images the tran-1 probe sees are few, so that everything fits into minutes.
const TRAN1_EPOCHS: usize = 6;

#[derive(Args)]
pub struct Demo {
    /// The run folder to make [default: runs/demo, or runs/demo-2, … where that exists].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Epochs of pre-training.
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    /// Images the probes are trained on.
    #[arg(long, default_value_t = 2000)]
    probe_images: usize,
    #[command(flatten)]
    pub common: Common,
}

impl Demo {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let start = Instant::now();
        let out = self.out.clone().unwrap_or_else(|| free_folder("runs/demo"));
        let config = Settings::default()
            .common(&self.common)
            .add("data.path", Some(BUILTIN))
            .add("encoder.name", Some(ENCODER))
            .add("image_size", Some(32))
            .add("optim.epochs", Some(self.epochs))
            .add("run.watch_every", Some(0))
            .load(None)?;
        if self.probe_images < 100 {
            return Err(Error::Refused(format!(
                "--probe-images {}: at least 100 are needed for ten classes",
                self.probe_images
            )));
        }
        compute_as(&config, &self.common)?;
        RunFolder::check_free(&out)?;
        let dataset = Dataset::open(&config.data, config.seed, progress)?;
        progress.note(&describe_data(&dataset));
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        progress.note(&format!(
            "1 of 3: pre-training {ENCODER} for {} epochs",
            self.epochs
        ));
        let outcome = pretrain::start(&config, &dataset, &out, &around)?;
        if outcome.course.stopped() {
            return Ok(answer_of_run(&outcome));
        }
        let run = RunFolder::open(&out)?;
        let mut data = probe_data(&dataset, None)?;
        data.train = data.train.limit(self.probe_images, config.seed);
        let probing = ProbeConfig {
            epochs: TRAN1_EPOCHS,
            ..ProbeConfig::new(config.image_size, config.seed)
        };
        let mut records = Vec::new();
        for name in [
            format!("untrained:{ENCODER}"),
            out.display().to_string(),
            SHIPPED.to_owned(),
        ] {
            progress.note(&format!("2 of 3: probing {name}"));
            let weights = Weights::open(&name, config.seed, config.images())?;
            let tasks = whole_tasks(&PROTOCOLS);
            probe(
                &weights.encoder,
                &data,
                &tasks,
                &probing,
                progress,
                |result| {
                    let record = ProbeRecord {
                        weights: label(&weights),
                        data: BUILTIN.to_owned(),
                        val: None,
                        seed: config.seed,
                        has_seen_scored: false,
                        result,
                    };
                    record.save(&run)?;
                    records.push(record);
                    Ok(())
                },
            )?;
            // The features' memory is only freed between weights, so this is the place to leave early.
            if let Some(signal) = signals::received() {
                return Ok(Answer {
                    exit_code: 128 + signal as u8,
                    json: json!({"run": out}),
                    text: format!("stopped; the pre-trained run is in {}", out.display()),
                });
            }
        }
        progress.note("3 of 3: writing the report");
        let report = write_report(&run, &config, &dataset, progress)?;
        let table: Vec<_> = records
            .iter()
            .map(|record| {
                json!({
                    "weights": record.weights,
                    "protocol": record.result.protocol.name(),
                    "top1": record.result.top1,
                })
            })
            .collect();
        let (first, last) = outcome.course.losses.unzip();
        let json = json!({
            "run": out,
            "report": report,
            "first_loss": first,
            "last_loss": last,
            "seconds": start.elapsed().as_secs_f64(),
            "table": table,
        });
        let gain = |weights: &str| {
            mean_gain(&records, weights).map_or("–".into(), |gain| format!("{gain:+.1}"))
        };
        let text = format!(
            "{}\nTop-1 accuracy in % on {} held-out images, probes trained on {}; {:.0} s in all. The untrained network is \
             the floor to clear:\nthese few epochs stand {} points from it on average, the shipped weights, \
             {SHIPPED_TRAINING}, {}.\n\n\
             run:    {}\nreport: {}",
            table_text(&records),
            data.held_out.indices.len(),
            data.train.indices.len(),
            start.elapsed().as_secs_f64(),
            gain("qb-heat"),
            gain(SHIPPED_ROW),
            out.display(),
            report.display()
        );
        Ok(Answer::done(json, text))
    }
}

fn table_text(records: &[ProbeRecord]) -> String {
    let mut lines = vec![format!(
        "{:<12}{}",
        "weights",
        PROTOCOLS
            .map(|protocol| format!("{:>8}", protocol.name()))
            .concat()
    )];
    for row in records.chunks(PROTOCOLS.len()) {
        let figures: Vec<String> = row
            .iter()
            .map(|record| format!("{:>8.1}", record.result.top1))
            .collect();
        lines.push(format!("{:<12}{}", row[0].weights, figures.concat()));
    }
    lines.join("\n")
}
