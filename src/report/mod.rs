//! `report.html`: one self-contained page that opens offline.

mod detection;
mod detection_study;
mod invariance;
mod pictures;
mod plots;
mod study;

use askama::Template;
use burn::tensor::Tensor;

use crate::config::{Config, Method};
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::heat::Visible;
use crate::observe::{Observer, Silent};
use crate::pretrain::{Images, PretrainModel, WithModel, traits, with_model};
use crate::probe::{
    Features, Matrix, Part, ProbeConfig, ProbeRecord, SHIPPED_ROW, UNTRAINED, extract, mean_gain,
    nearest_neighbours, whole_images,
};
use crate::random::{self, Purpose};
use crate::train::{RunFolder, write_durably};
use crate::weights::SHIPPED_TRAINING;

pub use detection::{DetectionReport, write_detection_report};
pub use detection_study::write_detection_comparison;
pub use invariance::write_invariance;
use pictures::{Block, Pictures};
pub use study::write_comparison;

const REPORT_FILE: &str = "report.html";
/// Images shown.
const SHOWN: usize = 8;
/// Images among which neighbours are looked for.
const GALLERY: usize = 1000;
const NEIGHBOURS: usize = 5;
/// Feature maps that fit here are kept for the pictures of principal components.
const MEMORY_MIB: u64 = 1024;

#[derive(Template)]
#[template(path = "report.html")]
struct Page {
    title: String,
    facts: Vec<(&'static str, String)>,
    /// What has the level in the plot of the loss.
    trivial: &'static str,
    loss_plot: String,
    rate_plot: String,
    watch_plot: Option<String>,
    sentence: String,
    table: Vec<Row>,
    shown_from: String,
    borrowed: String,
    pictures: Vec<Pictures>,
    config: String,
}

struct Row {
    protocol: &'static str,
    weights: String,
    top1: String,
    above_untrained: String,
    top5: String,
    images: String,
}

/// Writes `report.html` into a run from its newest checkpoint, its log, its probe results and its images; the path.
pub fn write_report(
    run: &RunFolder,
    config: &Config,
    dataset: &Dataset,
    observer: &dyn Observer,
) -> Result<std::path::PathBuf> {
    let events = run.read_events()?;
    let records = ProbeRecord::all(run)?;
    let checkpoint = run
        .checkpoints(config.run.keep_checkpoints)
        .newest_valid(observer)?;
    let trained_on = &checkpoint.position.data;
    let changed = !trained_on.is_empty() && *trained_on != dataset.index().fingerprint();
    let trivial = events
        .iter()
        .find_map(|event| event["trivial_loss"].as_f64());
    let series = |kind: &str, key: &str| -> Vec<(f64, f64)> {
        events
            .iter()
            .filter(|event| event["kind"] == kind)
            .filter_map(|event| Some((event["step"].as_f64()?, event[key].as_f64()?)))
            .collect()
    };
    let losses = series("step", "loss");
    let knn = series("epoch", "knn_top1");
    let page = Page {
        title: run
            .path()
            .file_name()
            .map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned()),
        facts: facts(config, dataset, &losses, trivial, checkpoint.position.step),
        trivial: traits(config.method, config.objective.target).trivial,
        loss_plot: plots::loss(&losses, trivial)?,
        rate_plot: plots::line(&series("step", "lr"), "learning rate")?,
        watch_plot: (knn.len() > 1)
            .then(|| plots::line(&knn, "k-NN top-1, %"))
            .transpose()?,
        sentence: sentence(&records, config.method_name()),
        table: records.iter().map(|record| row(record, &records)).collect(),
        shown_from: if dataset.held_out.is_empty() {
            "Images the network was trained on: this data has no held-out part.".into()
        } else if changed {
            "Images held out of those that are there now. The network was trained when others were, and may have been on \
             these."
                .into()
        } else {
            "Held-out images: the network never saw them.".into()
        },
        borrowed: if config.method_name() != Method::QbHeat.name() {
            String::new()
        } else if config.qb_heat.normalise_patches {
            "The network predicts each patch up to its mean and contrast; for the picture, both are borrowed from the \
             true patch."
                .into()
        } else {
            "The network predicts pixels; nothing is borrowed from the true image.".into()
        },
        pictures: picture_rows(config, dataset, &checkpoint.model)?,
        config: run.config()?,
    };
    let html = page.render().map_err(plots::failed)?;
    let path = run.file(REPORT_FILE);
    write_durably(&path, html.as_bytes())?;
    Ok(path)
}

fn facts(
    config: &Config,
    dataset: &Dataset,
    losses: &[(f64, f64)],
    trivial: Option<f64>,
    steps: u64,
) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("method", config.method_name().to_owned()),
        (
            "encoder",
            format!(
                "{}, stride {}, {} px images",
                config.encoder.name, config.encoder.stride, config.image_size
            ),
        ),
        (
            "data",
            format!(
                "{}, {} training images",
                dataset.path().display(),
                dataset.train.len()
            ),
        ),
        (
            "training",
            format!(
                "{steps} steps of {} images, seed {}",
                config.optim.batch_size, config.seed
            ),
        ),
    ];
    if let (Some((_, first)), Some((_, last))) = (losses.first(), losses.last()) {
        let trivial = trivial.map_or(String::new(), |trivial| {
            let what = traits(config.method, config.objective.target).trivial;
            format!("; {what} has {trivial:.4}")
        });
        facts.push((
            "loss",
            format!("{first:.4} at the start, {last:.4} at the end{trivial}"),
        ));
    }
    facts
}

fn sentence(records: &[ProbeRecord], method: &str) -> String {
    if records.is_empty() {
        return "No probe results yet: `qbheat probe RUN --data …` adds them.".into();
    }
    let gain = |weights: &str| mean_gain(records, weights);
    match (gain(method), gain(SHIPPED_ROW)) {
        (Some(run), Some(shipped)) => format!(
            "The untrained network is the floor that pre-training has to clear, and a strong one: colour alone tells many \
             classes apart. This run stands {run:+.1} points from it, averaged over the protocols; the shipped weights, \
             {SHIPPED_TRAINING}, stand {shipped:+.1} points from it."
        ),
        (Some(run), None) => format!(
            "The untrained network is the floor that pre-training has to clear; this run stands {run:+.1} points from it, \
             averaged over the protocols."
        ),
        (None, _) => "Only beside an untrained network do these figures mean anything: \
                      `qbheat probe untrained:ENCODER --data … --into RUN` adds its row."
            .into(),
    }
}

fn row(record: &ProbeRecord, all: &[ProbeRecord]) -> Row {
    let result = &record.result;
    let above_untrained = record
        .floor(all)
        .filter(|_| record.weights != UNTRAINED)
        .map_or("–".into(), |floor| {
            format!("{:+.1}", result.top1 - floor.result.top1)
        });
    Row {
        protocol: result.protocol.name(),
        weights: record.weights.clone(),
        top1: format!("{:.1}", result.top1),
        above_untrained,
        top5: result.top5.map_or("–".into(), |top5| format!("{top5:.1}")),
        images: format!("{} / {}", result.train_images, result.held_out_images),
    }
}

fn picture_rows(
    config: &Config,
    dataset: &Dataset,
    weights: &crate::nn::StateDict,
) -> Result<Vec<Pictures>> {
    let looking = Looking {
        config,
        dataset,
        weights,
    };
    with_model(config, &crate::device().autodiff(), looking)
}

/// A network that looks at images.
struct Looking<'a> {
    config: &'a Config,
    dataset: &'a Dataset,
    weights: &'a crate::nn::StateDict,
}

impl WithModel for Looking<'_> {
    type Output = Vec<Pictures>;

    fn with<M: PretrainModel>(self, model: M) -> Result<Vec<Pictures>> {
        let model = self
            .weights
            .load_into(model)
            .map_err(|source| Error::Weights {
                path: self.dataset.path().to_owned(),
                source,
            })?
            .valid();
        pictures_of(&model, self.config, self.dataset)
    }
}

fn pictures_of<M: PretrainModel>(
    model: &M,
    config: &Config,
    dataset: &Dataset,
) -> Result<Vec<Pictures>> {
    let pool = if dataset.held_out.is_empty() {
        &dataset.train
    } else {
        &dataset.held_out
    };
    let gallery: Vec<usize> = random::permutation(config.seed, Purpose::Sample, 1, pool.len())
        .into_iter()
        .take(GALLERY)
        .map(|place| pool[place])
        .collect();
    let shown = &gallery[..SHOWN.min(gallery.len())];
    let images = whole_images(dataset, shown, config.image_size)?;
    let shown_images = Images {
        pixels: images.clone(),
        indices: shown.to_vec(),
        labels: Vec::new(),
        epoch: 0,
    };
    let made = model
        .reconstruct(&shown_images, config.seed)
        .map(|(visible, made)| (blocks(&visible, config), made));
    let part = Part {
        dataset,
        indices: gallery.clone(),
        labels: Vec::new(),
    };
    let probe = ProbeConfig {
        memory_mib: MEMORY_MIB,
        ..ProbeConfig::new(config.image_size, config.seed)
    };
    let features = extract(model.encoder(), &part, &probe, true, &Silent)?;
    let components = principal_components(&features, shown.len())?;
    let pooled = features.whitening().apply_pooled(&features);
    let queries = Matrix {
        values: pooled.values[..shown.len() * pooled.columns].to_vec(),
        columns: pooled.columns,
    };
    let neighbours = nearest_neighbours(&pooled, &queries, NEIGHBOURS + 1);
    let near: Vec<usize> = neighbours
        .iter()
        .enumerate()
        .flat_map(|(own, found)| {
            let others = found.iter().filter(move |(i, _)| *i != own);
            others.take(NEIGHBOURS).map(|(i, _)| gallery[*i])
        })
        .collect();
    let per_row = near.len() / shown.len().max(1);
    (0..shown.len())
        .map(|i| {
            let one = |images: &Tensor<4>, at: usize| images.clone().slice_dim(0, at..at + 1);
            Ok(Pictures {
                name: dataset.images.name(shown[i]).to_owned(),
                original: pictures::image(one(&images, i))?,
                made: made
                    .as_ref()
                    .map(|(blocks, made)| {
                        let (visible, predicted) = (&made.visible, &made.predicted);
                        let original = one(&images, i);
                        Ok::<_, Error>([
                            pictures::visible(one(visible, i), blocks[i])?,
                            pictures::completed(original, one(predicted, i), blocks[i])?,
                        ])
                    })
                    .transpose()?,
                components: pictures::colours(&components[i], features.grid)?,
                neighbours: near[i * per_row..(i + 1) * per_row]
                    .iter()
                    .map(|&near| {
                        pictures::image(whole_images(dataset, &[near], config.image_size)?)
                    })
                    .collect::<Result<_>>()?,
            })
        })
        .collect()
}

/// The visible block of each image in pixels.
fn blocks(visible: &Visible, config: &Config) -> Vec<Block> {
    let (stride, size) = (config.encoder.stride, config.image_size);
    visible
        .corners([size.height / stride, size.width / stride])
        .into_iter()
        .map(|corner| Block {
            top: corner.row * stride,
            left: corner.column * stride,
            height: size.height / 2,
            width: size.width / 2,
        })
        .collect()
}

/// The first three principal components of each position of the first `count` maps, each scaled to 0…1 over all of
/// them.
fn principal_components(features: &Features, count: usize) -> Result<Vec<Vec<[f64; 3]>>> {
    let (mean, directions) = features.principal_directions(3);
    let places: Vec<usize> = (0..count).collect();
    let maps = features.maps(&places)?;
    let [n, t, c] = maps.dims();
    let values = crate::nn::values(maps);
    let mut projected: Vec<[f64; 3]> = values
        .chunks_exact(c)
        .map(|z| {
            std::array::from_fn(|k| {
                let centred = z.iter().zip(&mean).map(|(&v, mean)| f64::from(v) - mean);
                centred.zip(&directions[k]).map(|(v, d)| v * d).sum()
            })
        })
        .collect();
    for k in 0..3 {
        let extreme = |pick: fn(f64, f64) -> f64, start: f64| {
            projected
                .iter()
                .fold(start, |found, position| pick(found, position[k]))
        };
        let (least, largest) = (
            extreme(f64::min, f64::INFINITY),
            extreme(f64::max, f64::NEG_INFINITY),
        );
        for position in &mut projected {
            position[k] = (position[k] - least) / (largest - least).max(1e-12);
        }
    }
    Ok((0..n)
        .map(|i| projected[i * t..(i + 1) * t].to_vec())
        .collect())
}
