//! Probe results as kept in a run's folder `probes`.

use std::fs;

use serde::{Deserialize, Serialize};

use super::{Part, ProbeData, ProbeResult};
use crate::config::{LATENT, Method};
use crate::data::{Dataset, Split, place};
use crate::error::{Error, Result};
use crate::train::{RunFolder, write_durably};

const FOLDER: &str = "probes";
/// What records call a network that was not trained.
pub const UNTRAINED: &str = "untrained";
/// What they call the weights that come with the program.
pub const SHIPPED_ROW: &str = "shipped";

/// A result and what it was measured on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProbeRecord {
    /// Whose features: the method's name for the run's own, else `untrained`, `shipped` or what the user called them.
    pub weights: String,
    /// Where the training images are.
    pub data: String,
    /// Where those that were scored are, where that is elsewhere.
    pub val: Option<String>,
    /// Seed of the probe.
    pub seed: u64,
    /// Whether pre-training saw some of the images that are scored.
    #[serde(default)]
    pub has_seen_scored: bool,
    /// The score.
    #[serde(flatten)]
    pub result: ProbeResult,
}

/// What a run's folder is called beside the names that results have otherwise.
pub fn named(folder: &str) -> String {
    if is_row(folder) {
        format!("{folder}/")
    } else {
        folder.to_owned()
    }
}

/// Whether results have this name that are of no folder or file.
pub(crate) fn is_row(name: &str) -> bool {
    let methods = Method::ALL.map(Method::name);
    methods.contains(&name) || [LATENT, UNTRAINED, SHIPPED_ROW].contains(&name)
}

/// A name as part of a file's name.
pub(crate) fn file_name(name: &str) -> String {
    let plain = |c: char| {
        if c.is_alphanumeric() || "-.".contains(c) {
            c
        } else {
            '_'
        }
    };
    name.chars().map(plain).collect()
}

impl ProbeRecord {
    /// Writes it into the run, in place of an older one of the same weights, protocol and share of the labels.
    pub fn save(&self, run: &RunFolder) -> Result<()> {
        let folder = run.file(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let weights = file_name(&self.weights);
        let mut task = self.result.protocol.name().to_owned();
        if self.result.labels < 1.0 {
            task += &format!(".{}", self.result.labels);
        }
        let file = folder.join(format!("{weights}.{task}.json"));
        let text = serde_json::to_vec_pretty(self).expect("a record is valid JSON");
        write_durably(&file, &text)
    }

    /// What two results of a protocol must have alike to be compared, beside the seed, and what this one has.
    pub(crate) fn conditions(&self) -> Vec<(&'static str, String)> {
        let result = &self.result;
        let val = self.val.clone().unwrap_or_else(|| "its own".into());
        let images = format!("{} and {}", result.train_images, result.held_out_images);
        let mut conditions = vec![
            ("data of probes", self.data.clone()),
            ("val of probes", val),
            ("number of images", images),
        ];
        let detail = |key: &str| result.details.get(key).map(ToString::to_string);
        conditions.extend(detail("image_size").map(|size| ("image size of probes", size)));
        let epochs = match detail("searched") {
            Some(_) => detail("epochs").map(|_| "searched".into()),
            None => detail("epochs"),
        };
        conditions.extend(epochs.map(|epochs| ("epochs of probes", epochs)));
        conditions
    }

    /// The untrained network's result by the same probe on the same images.
    pub fn floor<'a>(&self, all: &'a [Self]) -> Option<&'a Self> {
        let probe = |record: &Self| {
            let ProbeResult {
                protocol, labels, ..
            } = record.result;
            (protocol, labels, record.seed, record.conditions())
        };
        all.iter()
            .find(|other| other.weights == UNTRAINED && probe(other) == probe(self))
    }

    /// All results of a run by protocol: the untrained network's, the run's own, others.
    pub fn all(run: &RunFolder) -> Result<Vec<Self>> {
        let folder = run.file(FOLDER);
        let Ok(entries) = fs::read_dir(&folder) else {
            return Ok(Vec::new());
        };
        let mut records = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                let bytes = fs::read(&path).map_err(Error::io(&path))?;
                let record: Self =
                    serde_json::from_slice(&bytes).map_err(|error| Error::Foreign {
                        path: path.clone(),
                        message: format!("is no probe result ({error}); delete it"),
                    })?;
                records.push(record);
            }
        }
        records.sort_by(|a, b| {
            let rank = |record: &Self| match record.weights.as_str() {
                UNTRAINED => 0,
                SHIPPED_ROW => 2,
                _ => 1,
            };
            let key = |r: &Self| (r.result.protocol, rank(r), r.weights.clone());
            let shares = b.result.labels.total_cmp(&a.result.labels);
            key(a).cmp(&key(b)).then(shares)
        });
        Ok(records)
    }
}

/// How much higher the figures of `weights` are than the untrained network's, in points, averaged over the protocols
/// that both were scored by on the same images.
pub fn mean_gain(records: &[ProbeRecord], weights: &str) -> Option<f64> {
    let gains: Vec<f64> = records
        .iter()
        .filter(|record| record.weights == weights)
        .filter_map(|record| Some(record.result.top1 - record.floor(records)?.result.top1))
        .collect();
    (!gains.is_empty()).then(|| gains.iter().sum::<f64>() / gains.len() as f64)
}

/// The images to train a probe on and those to score: of `val` where it is given, else of the data set's own or drawn
/// split. Refused where they would be the same.
pub fn probe_data<'a>(dataset: &'a Dataset, val: Option<&'a Dataset>) -> Result<ProbeData<'a>> {
    if dataset.classes.is_empty() {
        return Err(Error::data(
            dataset.path(),
            "has no classes, or only one class, and nothing to tell apart; sort labelled images into one folder a class",
        ));
    }
    let own = |dataset: &Dataset| matches!(dataset.split, Split::Own { .. });
    if val.is_some_and(|val| place(val.path()) == place(dataset.path()) && !own(val)) {
        return Err(Error::Refused(format!(
            "val: a probe would be scored on what it was trained on, all of {}; leave val out, and a part is held out, or \
             give other images",
            dataset.path().display()
        )));
    }
    let (train, held_out) = match val {
        None => (dataset.train.clone(), (dataset, dataset.held_out.clone())),
        Some(val) => {
            let train = if own(dataset) {
                dataset.train.clone()
            } else {
                dataset.all()
            };
            let held_out = if own(val) {
                val.held_out.clone()
            } else {
                val.all()
            };
            (train, (val, held_out))
        }
    };
    let classes = &dataset.classes;
    let data = ProbeData {
        train: Part::labelled(dataset, &train, classes)?,
        held_out: Part::labelled(held_out.0, &held_out.1, classes)?,
        classes,
    };
    for part in [&data.train, &data.held_out] {
        if part.indices.is_empty() {
            return Err(Error::data(
                part.dataset.path(),
                "has no labelled images for this; give another set with --val",
            ));
        }
    }
    let labels = &data.train.labels;
    if labels.iter().all(|label| *label == labels[0]) {
        return Err(Error::data(
            dataset.path(),
            format!(
                "has one class only among its training images, `{}`; a probe needs two",
                classes[labels[0] as usize]
            ),
        ));
    }
    Ok(data)
}
