//! A data set of images with boxes: pictures on demand, classes made those of another set, and what a person wants to
//! know of it first.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::coco::{
    AnnotatedImage, Class, Document, Fault, Finding, Found, Kind, Resolved, TrueBox, describe,
    left_out,
};
use super::origin::Origin;
use crate::data::{BadImage, DataConfig, Picture, Pictures};
use crate::error::{Error, Result};
use crate::observe::Observer;

/// What class-agnostic boxes are called.
const ANY_CLASS: &str = "object";

/// Images with boxes.
pub struct DetectionSet {
    /// Those in use, in the order of the file.
    pub images: Vec<AnnotatedImage>,
    /// Kinds of objects, in the order of their ids; [`TrueBox::class`] is an index here.
    pub classes: Vec<Class>,
    /// What was wrong.
    pub findings: Vec<Finding>,
    /// Those of images that are left out; a part knows of its own only.
    bad: Vec<Finding>,
    path: PathBuf,
    pictures: Arc<Pictures>,
    fingerprint: String,
    /// Fingerprint of all images of the annotation file.
    fingerprint_of_all: String,
}

/// How the images to score came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scored {
    /// Given beside those to train on.
    Given,
    /// Held out of the same file.
    HeldOut,
    /// Those to train on themselves, or a file that has them.
    Trained,
}

impl Scored {
    /// What such images are called.
    pub(crate) fn adjective(self) -> &'static str {
        match self {
            Self::Given => "validation",
            Self::HeldOut => "held-out",
            Self::Trained => "training",
        }
    }
}

impl DetectionSet {
    /// Reads the annotations and looks at every image they name; beyond `config.memory_mib` at no more than its header.
    /// `config` says what pictures are decoded to, how many may be bad and how much memory they may take; its path is
    /// not used.
    pub fn open(origin: &Origin, config: &DataConfig, observer: &dyn Observer) -> Result<Self> {
        let mut loaded = origin.load()?;
        let path = loaded.path.clone();
        let document =
            Document::parse(&loaded.bytes).map_err(|message| Error::data(&path, message))?;
        let entries = loaded.keep_only(document.file_names());
        let mut fingerprint = blake3::Hasher::new();
        fingerprint.update(&loaded.bytes);
        for entry in &loaded.source.entries {
            fingerprint.update(entry.name.as_bytes());
            fingerprint.update(&entry.bytes.to_le_bytes());
        }
        let (pictures, headers) = Pictures::open(loaded.source, config, observer);
        let found = entries.into_iter().map(|entry| -> Result<Found, Fault> {
            let entry = entry.map_err(|reason| (Kind::ImageMissing, reason))?;
            match &headers[entry] {
                Ok(header) => Ok(Found {
                    entry,
                    width: header.width,
                    height: header.height,
                }),
                Err(reason) => Err((Kind::ImageUnreadable, reason.clone())),
            }
        });
        let Resolved {
            images,
            classes,
            findings,
        } = document
            .resolve(found.collect())
            .map_err(|message| Error::data(&path, message))?;
        let bad = findings
            .iter()
            .filter(|finding| finding.kind.is_bad_image());
        let fingerprint = fingerprint.finalize().to_hex().to_string();
        let set = Self {
            images,
            classes,
            bad: bad.cloned().collect(),
            findings,
            path,
            pictures: Arc::new(pictures),
            fingerprint_of_all: fingerprint.clone(),
            fingerprint,
        };
        set.check_bad(config.max_bad_share)?;
        set.with_boxes()
    }

    /// Without the images that cannot be decoded, as not every header that is sound has a sound picture behind it. They
    /// are told, and counted with those that were left out before. The fingerprint stays: it is that of what was given.
    pub(super) fn decoded(mut self, config: &DataConfig, observer: &dyn Observer) -> Result<Self> {
        if self.pictures.cached() {
            return Ok(self);
        }
        observer.begin("decoding images to score", self.images.len() as u64);
        let done = AtomicU64::new(0);
        let reasons: Vec<Option<String>> = self
            .images
            .par_iter()
            .map(|image| {
                let reason = self.pictures.read(image.entry).err();
                observer.progress(done.fetch_add(1, Ordering::Relaxed) + 1, "");
                reason
            })
            .collect();
        observer.end();
        let mut unreadable = Vec::new();
        let mut reasons = reasons.into_iter();
        self.images.retain(|image| match reasons.next().flatten() {
            None => true,
            Some(reason) => {
                let fault = (Kind::ImageUnreadable, reason);
                let name = image.name.clone();
                unreadable.push(left_out(image.id, name, fault, image.boxes.len()));
                false
            }
        });
        if unreadable.is_empty() {
            return Ok(self);
        }
        observer.note(&format!(
            "left out of the scoring:\n{}",
            describe(&unreadable)
        ));
        for list in [&mut self.findings, &mut self.bad] {
            list.extend(unreadable.iter().cloned());
            list.sort_by_key(|finding| finding.kind);
        }
        self.check_bad(config.max_bad_share)?;
        if self.has_boxes() {
            return Ok(self);
        }
        let message = format!("there is no box left to score:\n{}", describe(&self.bad));
        Err(Error::data(&self.path, message))
    }

    /// An error where more images are left out than may be.
    fn check_bad(&self, allowed: f64) -> Result<()> {
        let bad = self.bad.len();
        let all = self.images.len() + bad;
        if bad as f64 <= allowed * all as f64 {
            return Ok(());
        }
        Err(Error::TooManyBad {
            bad,
            all,
            allowed,
            list: describe(&self.bad),
        })
    }

    fn has_boxes(&self) -> bool {
        let mut images = self.images.iter();
        images.any(|image| image.objects().next().is_some())
    }

    /// An error where there is nothing to learn from or to score.
    fn with_boxes(self) -> Result<Self> {
        if self.has_boxes() {
            return Ok(self);
        }
        let mut message = "there is no box in it that can be used".to_owned();
        if !self.findings.is_empty() {
            message = format!("{message}:\n{}", describe(&self.findings));
        }
        Err(Error::data(&self.path, message))
    }

    /// The annotation file; of a `.tar` or folder, with the name it has in there.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes with the annotations, and with names and sizes of the images' files.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// How these came to be the images to score of a training on `train`.
    pub(crate) fn scored_beside(&self, train: &Self) -> Scored {
        if self.fingerprint_of_all != train.fingerprint_of_all {
            return Scored::Given;
        }
        let trained = [&train.fingerprint, &self.fingerprint_of_all];
        match trained.contains(&&self.fingerprint) {
            true => Scored::Trained,
            false => Scored::HeldOut,
        }
    }

    /// What is on each image.
    pub fn boxes(&self) -> Vec<&[TrueBox]> {
        self.images.iter().map(|image| &image.boxes[..]).collect()
    }

    /// The picture of an image.
    pub fn picture(&self, index: usize) -> Result<Cow<'_, Picture>> {
        let image = &self.images[index];
        self.pictures.read(image.entry).map_err(|reason| {
            let message = format!(
                "image {} ({}) cannot be read: {reason}; restore it",
                image.id, image.name
            );
            Error::data(&self.path, message)
        })
    }

    /// The picture of an image, or of the next one that can be read; its number, and those passed over.
    pub(super) fn picture_or_next(
        &self,
        index: usize,
    ) -> Result<(usize, Cow<'_, Picture>, Vec<BadImage>)> {
        let following = || (index..self.images.len()).chain(0..index);
        let entry_of = |index: usize| self.images[index].entry;
        let (entry, picture, passed_over) =
            self.pictures.first_readable(following().map(entry_of))?;
        let index = following()
            .find(|&index| entry_of(index) == entry)
            .expect("it came from there");
        Ok((index, picture, passed_over))
    }

    /// The images numbered in `indices` as a set of their own, with all findings of the annotation file; an error where
    /// there is no box on them.
    pub fn part(&self, indices: &[usize]) -> Result<Self> {
        let mut fingerprint = blake3::Hasher::new();
        fingerprint.update(self.fingerprint.as_bytes());
        for index in indices {
            fingerprint.update(&(*index as u64).to_le_bytes());
        }
        let part = Self {
            images: indices.iter().map(|&i| self.images[i].clone()).collect(),
            classes: self.classes.clone(),
            findings: self.findings.clone(),
            bad: Vec::new(),
            path: self.path.clone(),
            pictures: self.pictures.clone(),
            fingerprint: fingerprint.finalize().to_hex().to_string(),
            fingerprint_of_all: self.fingerprint_of_all.clone(),
        };
        if part.has_boxes() {
            return Ok(part);
        }
        let message = format!(
            "there is no box on the {} of its {} images that were drawn; draw more (detect.limit, data.held_out), or \
             others with another seed",
            indices.len(),
            self.images.len()
        );
        Err(Error::data(&self.path, message))
    }

    /// All boxes as one class.
    pub fn class_agnostic(mut self) -> Self {
        for image in &mut self.images {
            for object in &mut image.boxes {
                object.class = 0;
            }
        }
        self.classes = vec![Class {
            id: 1,
            name: ANY_CLASS.to_owned(),
        }];
        self
    }

    /// With the classes of another set, that a head was trained on: classes are the same where their names are. Boxes
    /// of classes that are not known there are left out and told; refused where a known id has a name that is not
    /// known, as it may or may not mean the same, and where no box remains.
    pub fn with_classes(mut self, classes: &[Class]) -> Result<Self> {
        let mut sizes = vec![0usize; self.classes.len()];
        for object in self.images.iter().flat_map(|image| &image.boxes) {
            sizes[object.class] += 1;
        }
        let mut numbers = Vec::with_capacity(self.classes.len());
        for (class, &size) in self.classes.iter().zip(&sizes) {
            let Class { id, name } = class;
            let number = classes.iter().position(|known| known.name == *name);
            numbers.push(number);
            let mut tell = |kind: Kind, message: String| {
                self.findings.push(Finding {
                    kind,
                    record: format!("category {id}"),
                    file: String::new(),
                    message,
                });
            };
            match number {
                Some(number) if classes[number].id == *id => {}
                Some(number) => {
                    let message = format!("`{name}` had the id {} in training", classes[number].id);
                    tell(Kind::CategoryMoved, message);
                }
                None if size == 0 => {}
                None => {
                    if let Some(known) = classes.iter().find(|known| known.id == *id) {
                        let message = format!(
                            "category {id} is `{name}`, in training it was `{}`; give them the same name where they \
                             mean the same, else another id",
                            known.name
                        );
                        return Err(Error::data(&self.path, message));
                    }
                    let message = format!(
                        "`{name}` was not there in training; its {size} boxes are left out"
                    );
                    tell(Kind::CategoryUnknown, message);
                }
            }
        }
        for image in &mut self.images {
            image.boxes.retain_mut(|object| {
                let number = numbers[object.class];
                object.class = number.unwrap_or_default();
                number.is_some()
            });
        }
        self.classes = classes.to_vec();
        self.findings.sort_by_key(|finding| finding.kind);
        self.with_boxes()
    }

    /// Where it is, what a person wants to know of it first, and what was wrong, as text.
    pub fn describe(&self) -> String {
        let mut text = format!("{}: {}", self.path.display(), self.summary());
        if !self.findings.is_empty() {
            text += &format!("\n{}", describe(&self.findings));
        }
        text
    }

    /// What a person wants to know of it first.
    pub fn summary(&self) -> Summary {
        let mut classes: Vec<ClassSize> = self
            .classes
            .iter()
            .map(|class| ClassSize {
                class: class.name.clone(),
                boxes: 0,
                images: 0,
            })
            .collect();
        let (mut sides, mut shares) = (Vec::new(), Vec::new());
        let mut crowds = 0;
        for image in &self.images {
            let pixels = f64::from(image.width) * f64::from(image.height);
            let mut here: HashSet<usize> = HashSet::new();
            for object in image.objects() {
                let area = object.bbox[2] * object.bbox[3];
                sides.push(area.sqrt());
                shares.push(area / pixels);
                classes[object.class].boxes += 1;
                here.insert(object.class);
            }
            for class in here {
                classes[class].images += 1;
            }
            crowds += image.boxes.iter().filter(|object| object.crowd).count();
        }
        let fullest = self
            .images
            .iter()
            .max_by_key(|image| image.objects().count());
        let mut findings: BTreeMap<Kind, usize> = BTreeMap::new();
        for finding in &self.findings {
            *findings.entry(finding.kind).or_default() += 1;
        }
        Summary {
            images: self.images.len(),
            without_boxes: self
                .images
                .iter()
                .filter(|image| image.objects().next().is_none())
                .count(),
            boxes: sides.len(),
            crowds,
            classes,
            sides: Spread::of(sides),
            shares: Spread::of(shares),
            most_boxes: fullest.map_or(0, |image| image.objects().count()),
            fullest: fullest.map_or_else(String::new, |image| image.name.clone()),
            findings,
        }
    }
}

/// What a person wants to know of images with boxes first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Images in use.
    pub images: usize,
    /// Those of them on which nothing is to be found.
    pub without_boxes: usize,
    /// Boxes in use, without crowds.
    pub boxes: usize,
    /// Crowds.
    pub crowds: usize,
    /// Boxes of each class.
    pub classes: Vec<ClassSize>,
    /// √(width·height) of the boxes in pixels of their pictures.
    pub sides: Spread,
    /// Share that a box has of its picture's area, from 0 to 1.
    pub shares: Spread,
    /// Boxes of the image that has most.
    pub most_boxes: usize,
    /// Its name.
    pub fullest: String,
    /// How often something was wrong.
    pub findings: BTreeMap<Kind, usize>,
}

/// Boxes of one class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassSize {
    /// Its name.
    pub class: String,
    /// How many boxes.
    pub boxes: usize,
    /// How many images have one of them.
    pub images: usize,
}

/// How values are spread; all 0 where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// A tenth is below.
    pub tenth: f64,
    /// Half is below.
    pub median: f64,
    /// Nine tenths are below.
    pub nine_tenths: f64,
    /// The largest.
    pub largest: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        let Some(last) = values.len().checked_sub(1) else {
            return Self::default();
        };
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[(share * last as f64).round() as usize];
        Self {
            least: at(0.0),
            tenth: at(0.1),
            median: at(0.5),
            nine_tenths: at(0.9),
            largest: at(1.0),
        }
    }
}

impl Summary {
    /// Names of the classes of which there is no box.
    pub fn missing_classes(&self) -> Vec<&str> {
        let missing = self.classes.iter().filter(|class| class.boxes == 0);
        missing.map(|class| class.class.as_str()).collect()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} images, {} of them without boxes; {} boxes of {} classes",
            self.images,
            self.without_boxes,
            self.boxes,
            self.classes.len()
        )?;
        if self.crowds > 0 {
            write!(f, ", {} crowds", self.crowds)?;
        }
        for ClassSize {
            class,
            boxes,
            images,
        } in &self.classes
        {
            write!(f, "\n  {class}: {boxes} in {images} images")?;
        }
        let Spread {
            least,
            tenth,
            median,
            nine_tenths,
            largest,
        } = self.sides;
        write!(
            f,
            "\nbox sides √(w·h): {least:.0} to {largest:.0} px, median {median:.0}, four fifths from {tenth:.0} to \
             {nine_tenths:.0}"
        )?;
        write!(
            f,
            "\na box covers {:.2} to {:.2} % of its image, median {:.2} %; most in one image: {} ({})",
            100.0 * self.shares.least,
            100.0 * self.shares.largest,
            100.0 * self.shares.median,
            self.most_boxes,
            self.fullest
        )
    }
}
