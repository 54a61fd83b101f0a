//! The images that a detector is trained on and those that it is scored on.

use std::sync::Arc;

use super::coco::Class;
use super::origin::Origin;
use super::set::DetectionSet;
use crate::config::{DetectConfig, DetectorConfig};
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
/// configuration does not say which to take.
pub fn find_parts(config: &mut DetectConfig) -> Result<()> {
    let files = config.train.annotation_files()?;
    if files.len() < 2 || !config.train.part.is_empty() {
        return Ok(());
    }
    let only = |piece: &str| files.iter().filter(|name| name.contains(piece)).count() == 1;
    if only(TRAIN) {
        config.train.part = TRAIN.into();
        if config.val.path.as_os_str().is_empty() && only(VAL) {
            config.val = Origin {
                part: VAL.into(),
                ..config.train.clone()
            };
        }
    }
    Ok(())
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
            let chosen: Vec<usize> = with_boxes
                .map(|(i, _)| i)
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
            None => train.part(&sorted(held_out))?,
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
    /// The images at `origin` with these classes, as a detector that knows them has them.
    pub fn open_for(
        &self,
        origin: &Origin,
        classes: &[Class],
        data: &DataConfig,
        observer: &dyn Observer,
    ) -> Result<DetectionSet> {
        self.open(origin, data, observer)?.with_classes(classes)
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

fn sorted(indices: &[usize]) -> Vec<usize> {
    let mut sorted = indices.to_vec();
    sorted.sort_unstable();
    sorted
}
