//! The images that a detector is trained on and those that it is scored on.

use std::path::Path;
use std::sync::Arc;

use super::coco::Class;
use super::origin::Origin;
use super::set::{DetectionSet, Scored};
use crate::config::{DetectConfig, DetectorConfig, require};
use crate::data::DataConfig;
use crate::error::{Error, Result};
use crate::observe::Observer;
use crate::random::{self, Purpose};

/// Pieces of annotation files' names by which the two parts of a data set are known.
const TRAIN: &str = "train";
const VAL: &str = "val";

/// Images with boxes, with the same classes in both.
#[derive(Clone)]
pub struct Sets {
    /// To train on.
    pub train: Arc<DetectionSet>,
    /// To score.
    pub val: Arc<DetectionSet>,
}

/// Finds the annotation files of a `.tar` or folder that has one for training and one for validation, where the
/// configuration does not say which to take. What is kept of a run is the configuration after that: files that are added
/// later do not change what it was trained on.
pub fn find_parts(config: &mut DetectConfig) -> Result<()> {
    let DetectConfig {
        train,
        val,
        overfit,
        ..
    } = config;
    // Else it is scored on what it is trained on.
    if *overfit == 0 && val.path.as_os_str().is_empty() {
        require(
            val.images.as_os_str().is_empty() || !val.part.is_empty(),
            "detect.val.images",
            val.images.display(),
            "detect.val.path or detect.val.part beside it, which say what is on these images",
        )?;
        *val = train.to_score(Path::new(""), &val.images, &val.part);
    }
    train.check_part()?;
    val.check_part()?;
    let files = train.annotation_files()?;
    if files.len() < 2 {
        return Ok(());
    }
    if train.part.is_empty() && only_with(&files, TRAIN).is_some() {
        train.part = TRAIN.into();
    }
    if !val.path.as_os_str().is_empty() {
        return Ok(());
    }
    let trained = only_with(&files, &train.part);
    let another = |piece: &String| {
        let file = only_with(&files, piece);
        file.is_some() && file != trained
    };
    let pieces = [train.part.replace(TRAIN, VAL), VAL.to_owned()];
    if let Some(part) = pieces.into_iter().find(another) {
        *val = Origin {
            part,
            ..train.clone()
        };
    }
    Ok(())
}

/// The only name with `piece` in it.
pub(crate) fn only_with<'a>(names: &'a [String], piece: &str) -> Option<&'a str> {
    let mut fitting = names.iter().filter(|name| name.contains(piece));
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first.as_str())
}

impl Sets {
    /// Opens what `config` names.
    pub fn open(config: &DetectorConfig, observer: &dyn Observer) -> Result<Self> {
        let train = config
            .detect
            .open(&config.detect.train, &config.data, observer)?;
        if config.detect.overfit > 0 {
            let with_boxes = train.images.iter().enumerate();
            let with_boxes = with_boxes.filter(|(_, image)| image.objects().next().is_some());
            // They are scored too, without any that cannot be decoded.
            let chosen: Vec<usize> = with_boxes
                .map(|(i, _)| i)
                .filter(|&i| train.picture(i).is_ok())
                .take(config.detect.overfit)
                .collect();
            let part = Arc::new(train.part(&chosen)?);
            return Ok(Self {
                train: part.clone(),
                val: part,
            });
        }
        let DetectConfig { val, .. } = &config.detect;
        let given = !val.path.as_os_str().is_empty();
        let open = || {
            config
                .detect
                .open_for(val, &train.classes, &config.data, observer)
                .map_err(|error| with_hint(error, &config.detect))
        };
        let val = given.then(open).transpose()?;
        let order = random::permutation(config.seed, Purpose::Split, 0, train.images.len());
        let held_out = match val {
            Some(_) => 0,
            None => (config.data.held_out * order.len() as f64).ceil() as usize,
        };
        let (held_out, rest) = order.split_at(held_out.min(order.len()));
        let val = match val {
            Some(val) => val,
            None if held_out.is_empty() || rest.is_empty() => {
                return Err(Error::data(
                    train.path(),
                    "has too few images to hold some out for scoring; give --val, or another data.held_out",
                ));
            }
            None => train
                .part(&sorted(held_out))?
                .decoded(&config.data, observer)?,
        };
        let limit = match config.detect.limit {
            0 => rest.len(),
            limit => limit.min(rest.len()),
        };
        let train = match limit == train.images.len() {
            true => train,
            false => train.part(&sorted(&rest[..limit]))?,
        };
        let (batch_size, images) = (config.optim.batch_size, train.images.len());
        if batch_size > images {
            return Err(Error::BatchTooLarge { batch_size, images });
        }
        Ok(Self {
            train: Arc::new(train),
            val: Arc::new(val),
        })
    }

    /// Classes in the order of their numbers.
    pub fn classes(&self) -> &[Class] {
        &self.train.classes
    }

    /// What is to be known before a training begins.
    pub fn describe(&self) -> String {
        let Self { train, val } = self;
        let scored = val.scored_beside(train);
        let mut text = format!("training on {}\n", train.describe());
        if scored == Scored::Trained {
            return text
                + "and scored on images that it is trained on: this only shows whether it can learn";
        }
        let summary = val.summary();
        text += &match scored {
            // It has the findings of the same file.
            Scored::HeldOut => format!("scored on images held out of it: {summary}"),
            _ => format!("scored on {}", val.describe()),
        };
        let missing = summary.missing_classes();
        if !missing.is_empty() {
            text += &format!(
                "\nof these classes there is no box to score: {}",
                missing.join(", ")
            );
        }
        text
    }

    /// Changes with images and boxes of either.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for set in [&self.train, &self.val] {
            hasher.update(set.fingerprint().as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

impl DetectConfig {
    /// The images to score at `origin` with these classes, as a detector that knows them has them. All are decoded once:
    /// one that cannot be is left out and told, or there are more of them than `data.max_bad_share` allows.
    pub fn open_for(
        &self,
        origin: &Origin,
        classes: &[Class],
        data: &DataConfig,
        observer: &dyn Observer,
    ) -> Result<DetectionSet> {
        self.open(origin, data, observer)?
            .with_classes(classes)?
            .decoded(data, observer)
    }

    fn open(
        &self,
        origin: &Origin,
        data: &DataConfig,
        observer: &dyn Observer,
    ) -> Result<DetectionSet> {
        let set = DetectionSet::open(origin, data, observer)?;
        Ok(match self.class_agnostic {
            true => set.class_agnostic(),
            false => set,
        })
    }
}

/// Where pictures to score are looked for among those to train on, they may only be elsewhere.
fn with_hint(error: Error, DetectConfig { train, val, .. }: &DetectConfig) -> Error {
    match error {
        Error::TooManyBad {
            bad,
            all,
            allowed,
            list,
        } if val.images == train.images && !val.images.as_os_str().is_empty() => {
            let list = format!(
                "{list}\nthey are images to score, looked for in {} as those to train on are; where they lie elsewhere \
                 give --val and --val-images",
                val.images.display()
            );
            Error::TooManyBad {
                bad,
                all,
                allowed,
                list,
            }
        }
        other => other,
    }
}

fn sorted(indices: &[usize]) -> Vec<usize> {
    let mut sorted = indices.to_vec();
    sorted.sort_unstable();
    sorted
}
