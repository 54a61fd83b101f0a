//! The images of a study of detectors, opened when a cell needs them.

use std::cell::RefCell;
use std::rc::Rc;

use crate::config::{DetectConfig, DetectorConfig};
use crate::data::DataConfig;
use crate::detect::{DetectionSet, Origin, Sets};
use crate::error::Result;
use crate::observe::Observer;
use crate::study::unaugmented;

/// Opens images once for cells that follow each other and have the same.
pub(super) struct Images<'a> {
    test_part: &'a str,
    observer: &'a dyn Observer,
    opened: RefCell<Option<Rc<Opened>>>,
}

/// What decides how images are opened.
type Key = ([Origin; 2], usize, bool, DataConfig, usize, Option<u64>);

/// Images that were opened.
pub(super) struct Opened {
    key: Key,
    pub sets: Sets,
    pub test: Option<DetectionSet>,
}

impl<'a> Images<'a> {
    /// An empty `test_part` is none.
    pub fn new(test_part: &'a str, observer: &'a dyn Observer) -> Self {
        Self {
            test_part,
            observer,
            opened: RefCell::default(),
        }
    }

    /// The images of a cell.
    pub fn of(&self, config: &DetectorConfig) -> Result<Rc<Opened>> {
        let key = key(config);
        let mut opened = self.opened.borrow_mut();
        if let Some(images) = opened.as_ref().filter(|images| images.key == key) {
            return Ok(images.clone());
        }
        // Decoded images are large: those of one cell at a time.
        *opened = None;
        let sets = Sets::open(config, self.observer)?;
        let test = match self.test_part.is_empty() {
            true => None,
            false => {
                let detect = &config.detect;
                let origin = Origin {
                    part: self.test_part.to_owned(),
                    ..detect.train.clone()
                };
                Some(detect.open_for(&origin, sets.classes(), &config.data, self.observer)?)
            }
        };
        for set in [&*sets.train, &*sets.val].into_iter().chain(&test) {
            self.observer.note(&set.describe());
        }
        let images = Rc::new(Opened { key, sets, test });
        *opened = Some(images.clone());
        Ok(images)
    }
}

fn key(config: &DetectorConfig) -> Key {
    let DetectConfig {
        train,
        val,
        limit,
        class_agnostic,
        ..
    } = &config.detect;
    // The seed draws what is held out, and what a limit leaves.
    let is_drawn = val.path.as_os_str().is_empty() || *limit > 0;
    (
        [train.clone(), val.clone()],
        *limit,
        *class_agnostic,
        unaugmented(&config.data),
        config.optim.batch_size,
        is_drawn.then_some(config.seed),
    )
}
