//! `qbheat invariance`

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use qbheat::data::{DataConfig, Dataset};
use qbheat::error::{Error, Result};
use qbheat::heat::Difference;
use qbheat::invariance::{self, Measured, Parts, measure, open_weights};
use qbheat::observe::Observer;
use qbheat::pretrain::resumed_config;
use qbheat::report::write_invariance;
use qbheat::train::RunFolder;
use serde_json::to_value;

use super::progress::Progress;
use super::{Answer, Common, compute_as_run, describe_data};

/// How derivatives are taken.
#[derive(Clone, Copy, ValueEnum)]
enum DifferenceName {
    /// From one position to a later one.
    Forward,
    /// Central differences, smoothed along the other axis.
    Sobel,
}

impl From<DifferenceName> for Difference {
    fn from(name: DifferenceName) -> Self {
        match name {
            DifferenceName::Forward => Self::Forward,
            DifferenceName::Sobel => Self::Sobel,
        }
    }
}

#[derive(Args)]
pub struct Invariance {
    /// Runs, encoder.safetensors files, untrained:ENCODER, or builtin:mobilenet-tiny-cifar10. The untrained network of
    /// each encoder is added by itself.
    #[arg(value_name = "RUN", required = true)]
    weights: Vec<String>,
    /// Images, labelled or not: a folder, a .tar, shards, or builtin:cifar10.
    #[arg(long)]
    data: PathBuf,
    /// Fit on at most this many training images.
    #[arg(long, default_value_t = 5000)]
    images: usize,
    /// How derivatives are taken.
    #[arg(long, value_enum, default_value = "forward")]
    difference: DifferenceName,
    /// The page to write [default: invariance.html in the first run, or else here].
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

impl Invariance {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        let run = self
            .weights
            .iter()
            .find_map(|name| RunFolder::open(Path::new(name)).ok());
        let out = match (&self.out, &run) {
            (Some(path), _) => path.clone(),
            (None, Some(run)) => run.file(PAGE),
            (None, None) => PathBuf::from(PAGE),
        };
        let folder = out.parent().filter(|folder| *folder != Path::new(""));
        if let Some(missing) = folder.filter(|folder| !folder.is_dir()) {
            return Err(Error::Missing {
                path: missing.to_owned(),
                flag: "--out",
            });
        }
        if out.is_dir() {
            return Err(Error::Refused(format!(
                "--out {}: is a folder; name the page to write, such as {}",
                out.display(),
                out.join(PAGE).display()
            )));
        }
        let config = run.map(|run| resumed_config(&run, None)).transpose()?;
        // The run's own seed holds the same images out as its training did.
        let own_seed = config.as_ref().map(|config| config.seed);
        let seed = self.common.seed.or(own_seed).unwrap_or(0);
        compute_as_run(config.as_ref().map(|config| &config.base), &self.common)?;
        let weights = open_weights(&self.weights, seed)?;
        let data = DataConfig {
            path: self.data.clone(),
            channels: weights[0].metadata.images().channels,
            // As the run's own images were prepared.
            ..config.map_or_else(DataConfig::default, |config| config.base.data)
        };
        let dataset = Dataset::open(&data, seed, progress)?;
        progress.note(&describe_data(&dataset));
        let parts = Parts::of(&dataset, self.images, seed)?;
        if parts.drawn {
            progress.note(
                "no images are held out: a fifth, drawn with the seed, is scored and the rest fitted on",
            );
        }
        let found = measure(&weights, &parts, self.difference.into(), seed, progress)?;
        write_invariance(&out, &found, &weights, &parts)?;
        let text = format!("{}\npage: {}", describe(&found), out.display());
        let mut json = to_value(&found).expect("results are valid JSON");
        json["page"] = out.display().to_string().into();
        Ok(Answer::done(json, text))
    }
}

const PAGE: &str = "invariance.html";

fn describe(found: &invariance::Invariance) -> String {
    let mut lines = vec![format!(
        "R² on {} images of matrices fitted on {}; each position's mean over images removed",
        found.scored_images, found.fitted_images
    )];
    lines.extend(found.encoders.iter().map(describe_encoder));
    lines.join("\n")
}

fn describe_encoder(encoder: &Measured) -> String {
    let mut text = format!(
        "{}\n  {:<30}{:>8}{:>10}{:>8}{:>10}",
        encoder.weights, "law", "R²", "shuffled", "c·I", "A B⁻¹"
    );
    for law in &encoder.laws {
        let learned = law.learned.map_or("–".into(), |learned| {
            format!("{:.3}", learned.r2.position_means_removed)
        });
        text += &format!(
            "\n  {:<30}{:>8.3}{:>10.3}{:>8.3}{learned:>10}",
            law.name,
            law.r2.position_means_removed,
            law.shuffled.position_means_removed,
            law.r2_of_scalar
        );
    }
    let rank = encoder.learned.as_ref().map(|learned| learned.rank_of_b);
    if let Some(rank) = rank.filter(|&rank| rank < encoder.channels) {
        text += &format!(
            "\n  B is singular (rank {rank} of {}): its pseudo-inverse stands for B⁻¹",
            encoder.channels
        );
    }
    text
}
