//! `qbheat probe`

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use qbheat::data::{DataConfig, Dataset, ImageSize, place};
use qbheat::error::{Error, Result, one_of};
use qbheat::observe::Observer;
use qbheat::pretrain::{resumed_config, seen_held_out, seen_in_val};
use qbheat::probe::{
    EPOCHS, ProbeConfig, ProbeRecord, Protocol, SHIPPED_ROW, UNTRAINED, named, probe, probe_data,
    reestimate_batch_norm, whole_tasks,
};
use qbheat::train::RunFolder;
use qbheat::weights::{ImageForm, SHIPPED, Weights};
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common, compute_as_run, describe_data};

#[derive(Args)]
pub struct Probe {
    /// A run, an encoder.safetensors, untrained:ENCODER, or builtin:mobilenet-tiny-cifar10.
    weights: String,
    /// Labelled images: a folder with one folder a class, a .tar of such, or builtin:cifar10.
    #[arg(long)]
    data: PathBuf,
    /// Images to score, where they are another set.
    #[arg(long)]
    val: Option<PathBuf>,
    /// knn, linear, tran-1, finetune; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "knn,linear", value_parser = parse_protocol)]
    protocol: Vec<Protocol>,
    /// Epochs of tran-1 and of fine-tuning.
    #[arg(long, default_value_t = EPOCHS)]
    epochs: usize,
    /// Size of the images: a side in pixels, or HEIGHTxWIDTH [default: the one it was trained with].
    #[arg(long)]
    image_size: Option<ImageSize>,
    /// Channels of the images that an untrained encoder is built for: 3, or 1 for grey [default: 3].
    #[arg(long, value_parser = PossibleValuesParser::new(["1", "3"]).try_map(|text| text.parse::<usize>()))]
    channels: Option<usize>,
    /// Score what enters the block so many before the encoder's end instead of its final map (the last 1×1 convolution
    /// counts as a block): the last layers of a masked model may serve its decoder.
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    layers_before_end: usize,
    /// Take batch-norm statistics from whole training images first; those of pre-training come from quarters.
    #[arg(long)]
    reestimate_bn: bool,
    /// Train the probe on at most this many images, the same share of each class.
    #[arg(long)]
    limit: Option<usize>,
    /// A run of the same network whose folder and report the result belongs to [default: the run that is scored].
    #[arg(long)]
    into: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

fn parse_protocol(text: &str) -> Result<Protocol, String> {
    Protocol::ALL
        .into_iter()
        .find(|protocol| protocol.name() == text)
        .ok_or_else(|| {
            format!(
                "expected {}",
                one_of(Protocol::ALL.map(Protocol::name), text)
            )
        })
}

/// What a table calls the weights.
pub fn label(weights: &Weights) -> String {
    match weights.metadata.method.as_str() {
        "none" => UNTRAINED.into(),
        _ if weights.name == SHIPPED => SHIPPED_ROW.into(),
        method if weights.run.is_some() => method.into(),
        _ => weights.name.clone(),
    }
}

impl Probe {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let into = self
            .into
            .as_ref()
            .map(|path| RunFolder::open(path))
            .transpose()?;
        let into_config = into
            .as_ref()
            .map(|run| resumed_config(run, None))
            .transpose()?;
        let given_seed = self
            .common
            .seed
            .or(into_config.as_ref().map(|config| config.seed));
        let mut images = match &into_config {
            Some(config) => config.images(),
            None => ImageForm {
                size: ImageSize::square(64),
                channels: 3,
                stride: 0,
            },
        };
        images.size = self.image_size.unwrap_or(images.size);
        images.channels = self.channels.unwrap_or(images.channels);
        let scored = Path::new(&self.weights);
        let own_config = scored
            .is_dir()
            .then(|| resumed_config(&RunFolder::open(scored)?, None))
            .transpose()?;
        let run_config = into_config.as_ref().or(own_config.as_ref());
        compute_as_run(run_config.map(|config| &config.base), &self.common)?;
        // As the run's own images were prepared.
        let prepared = run_config.map_or_else(DataConfig::default, |config| config.data.clone());
        let weights = Weights::open(&self.weights, given_seed.unwrap_or(0), images)?;
        if let Some(config) = &into_config
            && config.encoder.name != weights.metadata.encoder
        {
            return Err(Error::Refused(format!(
                "--into: that is a run of {}, the weights are those of a {}; leave it out, or name a run of the same network",
                config.encoder.name, weights.metadata.encoder
            )));
        }
        // Where a split is drawn it is drawn with the seed: their own, or they would be scored on images trained on.
        let seed = given_seed.unwrap_or(weights.metadata.seed);
        if into.is_none() && self.image_size.is_none() {
            images.size = weights.metadata.image_size;
        }
        images.channels = weights.metadata.images().channels;
        let config = ProbeConfig {
            epochs: self.epochs,
            layers_before_end: self.layers_before_end,
            ..ProbeConfig::new(images.size, seed)
        };
        if self.epochs == 0 {
            return Err(Error::Refused("--epochs 0: at least 1".into()));
        }
        if self.layers_before_end > 0 && self.protocol.contains(&Protocol::Finetune) {
            return Err(Error::Refused(
                "--layers-before-end: finetune trains the whole encoder; leave it out of --protocol".into(),
            ));
        }
        let open = |path: &PathBuf| {
            let data = DataConfig {
                path: path.clone(),
                channels: images.channels,
                ..prepared.clone()
            };
            let dataset = Dataset::open(&data, seed, progress)?;
            progress.note(&describe_data(&dataset));
            Ok::<_, Error>(dataset)
        };
        let dataset = open(&self.data)?;
        let val = self.val.as_ref().map(open).transpose()?;
        let mut data = probe_data(&dataset, val.as_ref())?;
        let seen = match &val {
            None => seen_held_out(&weights, &dataset, seed)?,
            Some(val) => seen_in_val(&weights, val)?,
        };
        if let Some(seen) = &seen {
            progress.note(&seen.why);
        }
        if let Some(limit) = self.limit {
            if limit < data.classes.len() {
                return Err(Error::Refused(format!(
                    "--limit {limit}: at least {} are needed for as many classes",
                    data.classes.len()
                )));
            }
            data.train = data.train.limit(limit, seed);
        }
        let encoder = if self.reestimate_bn {
            reestimate_batch_norm(&weights.encoder, &data.train, &config, progress)?
        } else {
            weights.encoder.clone()
        };
        let mut name = match (&into, &weights.run) {
            // The name of its method is that of the run's own weights.
            (Some(into), Some(own)) if place(into.path()) != place(own.path()) => {
                named(&weights.name)
            }
            _ => label(&weights),
        };
        match self.layers_before_end {
            0 => {}
            1 => name += ", 1 block before the end",
            blocks => name += &format!(", {blocks} blocks before the end"),
        }
        if self.reestimate_bn {
            name += ", re-estimated batch norm";
        }
        let run = into.or_else(|| weights.run.clone());
        let mut records = Vec::new();
        let tasks = whole_tasks(&self.protocol);
        probe(&encoder, &data, &tasks, &config, progress, |result| {
            let record = ProbeRecord {
                weights: name.clone(),
                data: place(&self.data),
                val: self.val.as_deref().map(place),
                seed,
                has_seen_scored: seen.as_ref().is_some_and(|seen| seen.certain),
                result,
            };
            if let Some(run) = &run {
                record.save(run)?;
            }
            records.push(record);
            Ok(())
        })?;
        let mut text = describe(&records);
        if let Some(run) = &run {
            text += &format!("\nkept in {}", run.file("probes").display());
        }
        let json = json!({
            "weights": self.weights,
            "run": run.as_ref().map(RunFolder::path),
            "results": records,
        });
        Ok(Answer::done(json, text))
    }
}

fn describe(records: &[ProbeRecord]) -> String {
    let mut lines = Vec::new();
    for record in records {
        let result = &record.result;
        let top5 = result
            .top5
            .map_or(String::new(), |top5| format!(", top-5 {top5:.2} %"));
        let details: Vec<String> = result
            .details
            .iter()
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        lines.push(format!(
            "{} · {}: top-1 {:.2} %{top5} on {} images after training on {} ({})",
            record.weights,
            result.protocol.name(),
            result.top1,
            result.held_out_images,
            result.train_images,
            details.join(", ")
        ));
    }
    if let Some(record) = records.last() {
        lines.push(format!("per class ({}):", record.result.protocol.name()));
        lines.extend(record.result.per_class.iter().map(|class| {
            let top1 = class
                .top1
                .map_or("-".into(), |top1| format!("{top1:5.1} %"));
            format!("  {:24} {top1} of {}", class.class, class.images)
        }));
    }
    lines.join("\n")
}
