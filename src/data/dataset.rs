//! A data set: images, classes, and which of them are held out.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::DataConfig;
use super::decode::{Header, Picture};
use super::index::Index;
use super::pictures::Pictures;
use super::source::Source;
use super::split::{Groups, Role, Split};
use crate::error::{Error, Result};
use crate::observe::Observer;

const LISTED: usize = 10;

/// An image that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct BadImage {
    /// Its path below the data set's root.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What a person wants to know of a data set first.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Images in use.
    pub images: usize,
    /// Readable images of each format.
    pub formats: BTreeMap<&'static str, usize>,
    /// Readable images of each size, width by height.
    pub sizes: BTreeMap<(u32, u32), usize>,
    /// Unreadable images.
    pub unreadable: Vec<BadImage>,
    /// Files that are no images by their extension.
    pub others: usize,
    /// Whether decoded images stay in memory.
    pub cached: bool,
}

/// Images that can be fetched by number.
pub struct Images {
    pictures: Pictures,
    roles: Vec<Role>,
    labels: Vec<Option<u32>>,
}

/// Images with their classes and their split.
pub struct Dataset {
    /// All images, the unreadable ones among them.
    pub images: Arc<Images>,
    /// Class names; a label is an index here. Empty where there are fewer than two.
    pub classes: Vec<String>,
    /// Numbers of the images to train on.
    pub train: Arc<Vec<usize>>,
    /// Numbers of the images held out.
    pub held_out: Arc<Vec<usize>>,
    /// Where the split comes from.
    pub split: Split,
    /// What was found.
    pub summary: Summary,
}

impl Dataset {
    /// Lists, checks and (where they fit into memory) decodes the images of `config.path`.
    pub fn open(config: &DataConfig, seed: u64, observer: &dyn Observer) -> Result<Self> {
        let source = Source::open(&config.path)?;
        Self::build(config, seed, source, None, observer)
    }

    /// As [`Self::open`], for a run that goes on: images keep the numbers and parts they have in `index`, also where
    /// they have become unreadable. Refused where images were added, are gone, or have another size or another
    /// class beside them.
    pub fn reopen(
        config: &DataConfig,
        seed: u64,
        index: &Index,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let source = Source::open(&config.path)?;
        let readable = index
            .compare(&source)
            .map_err(|error| Error::data(source.path(), format!("its index: {error}")))?
            .map_err(|changes| Error::DataChanged {
                path: source.path().to_owned(),
                changes: changes.to_string(),
            })?;
        Self::build(config, seed, source, Some(readable), observer)
    }

    /// Where the images come from.
    pub fn path(&self) -> &Path {
        self.images.source().path()
    }

    /// Numbers of the images to train on and of those held out, without any that a drawn split leaves alone.
    pub fn all(&self) -> Arc<Vec<usize>> {
        let mut all: Vec<usize> = self.train.iter().chain(&*self.held_out).copied().collect();
        all.sort_unstable();
        Arc::new(all)
    }

    /// What to compare with when a run on these images goes on.
    pub fn index(&self) -> Index {
        let readable = self.images.roles.iter().map(|&r| r != Role::Unreadable);
        Index::of(self.images.source(), readable)
    }

    /// Whether these are the images of an index, also where some have become unreadable.
    pub fn is_of(&self, index: &Index) -> bool {
        matches!(index.compare(self.images.source()), Ok(Ok(_)))
    }

    /// `recorded` says which images were readable when the run was started; by default those that are now.
    fn build(
        config: &DataConfig,
        seed: u64,
        source: Source,
        recorded: Option<Vec<bool>>,
        observer: &dyn Observer,
    ) -> Result<Self> {
        if let Some(first) = source.bad_labels.first() {
            observer.note(&format!(
                "labels not understood: {}, the first is {first}",
                source.bad_labels.len()
            ));
        }
        let (pictures, headers) = Pictures::open(source, config, observer);
        let source = pictures.source();
        let in_use =
            recorded.unwrap_or_else(|| headers.iter().map(std::result::Result::is_ok).collect());
        let summary = Summary::of(source, headers, &in_use, pictures.cached());
        let (bad, all) = (summary.unreadable.len(), source.entries.len());
        if bad as f64 > config.max_bad_share * all as f64 || summary.images == 0 {
            return Err(Error::TooManyBad {
                bad,
                all,
                allowed: config.max_bad_share,
                list: summary.list_unreadable(),
            });
        }
        let mut groups = Groups::of(source, &in_use);
        let (roles, split) = groups.split(&in_use, config.split, config.held_out, seed);
        let numbers = |wanted| {
            let roles = roles.iter().enumerate();
            let chosen = roles.filter(|(_, role)| **role == wanted);
            Arc::new(chosen.map(|(index, _)| index).collect())
        };
        let (train, held_out) = (numbers(Role::Train), numbers(Role::HeldOut));
        let images = Images {
            pictures,
            roles,
            labels: groups.labels,
        };
        Ok(Self {
            images: Arc::new(images),
            classes: groups.classes,
            train,
            held_out,
            split,
            summary,
        })
    }
}

impl Summary {
    fn of(
        source: &Source,
        headers: Vec<Result<Header, String>>,
        in_use: &[bool],
        cached: bool,
    ) -> Self {
        let mut summary = Self {
            images: 0,
            formats: BTreeMap::new(),
            sizes: BTreeMap::new(),
            unreadable: Vec::new(),
            others: source.others,
            cached,
        };
        for ((entry, header), in_use) in source.entries.iter().zip(headers).zip(in_use) {
            match header {
                Ok(header) if *in_use => {
                    summary.images += 1;
                    *summary.formats.entry(header.format).or_default() += 1;
                    let size = (header.width, header.height);
                    *summary.sizes.entry(size).or_default() += 1;
                }
                Ok(_) => {}
                Err(reason) => summary.unreadable.push(BadImage {
                    name: entry.name.to_string(),
                    reason,
                }),
            }
        }
        summary
    }

    /// The first few unreadable images, one a line.
    pub fn list_unreadable(&self) -> String {
        let mut lines: Vec<String> = self
            .unreadable
            .iter()
            .take(LISTED)
            .map(|BadImage { name, reason }| format!("  {name}: {reason}"))
            .collect();
        if self.unreadable.len() > LISTED {
            lines.push(format!("  … and {} more", self.unreadable.len() - LISTED));
        }
        lines.join("\n")
    }
}

impl Images {
    /// How many, the unreadable ones among them.
    pub fn len(&self) -> usize {
        self.source().entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.source().entries.is_empty()
    }

    /// Path of an image below the data set's root.
    pub fn name(&self, index: usize) -> &str {
        &self.source().entries[index].name
    }

    /// Class of an image, where it has one.
    pub fn label(&self, index: usize) -> Option<u32> {
        self.labels[index]
    }

    /// An image, and those that were asked for before it and could not be read any more: then the next readable one of
    /// the same class and part of the split stands in, or of the same part where the class has none left.
    pub fn picture(&self, index: usize) -> Result<(Cow<'_, Picture>, Vec<BadImage>)> {
        let following = || {
            let all = (index..self.len()).chain(0..index);
            all.filter(|&other| self.roles[other] == self.roles[index])
        };
        let same_class = |&other: &usize| self.labels[other] == self.labels[index];
        let other_class = |other: &usize| !same_class(other);
        let following = following()
            .filter(same_class)
            .chain(following().filter(other_class));
        let (_, picture, passed_over) = self.pictures.first_readable(following)?;
        Ok((picture, passed_over))
    }

    fn source(&self) -> &Source {
        self.pictures.source()
    }
}
