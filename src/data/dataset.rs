//! A data set: images, classes, and which of them are held out.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::DataConfig;
use super::decode::{self, Header, Picture};
use super::source::{Entry, Source};
use crate::error::{Error, Result};
use crate::observe::Observer;
use crate::random::{self, Purpose};

const TRAIN_FOLDERS: &[&str] = &["train", "training"];
const HELD_OUT_FOLDERS: &[&str] = &["val", "valid", "validation", "test"];
/// Unreadable images in a row after which a data set counts as broken.
const MAX_REPLACEMENTS: usize = 20;
const LISTED: usize = 10;

/// Which images are held out for evaluation, and why.
#[derive(Clone, Debug, PartialEq)]
pub enum Split {
    /// The data set has folders for both.
    Own {
        /// Name of the held-out folder.
        held_out: String,
    },
    /// A share of each class, drawn with the run's seed.
    Stratified {
        /// The share.
        held_out: f64,
    },
    /// Nothing is held out: there are no classes to score.
    None,
}

/// What a person wants to know of a data set first.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Readable images.
    pub images: usize,
    /// Readable images of each format.
    pub formats: BTreeMap<&'static str, usize>,
    /// Readable images of each size, width by height.
    pub sizes: BTreeMap<(u32, u32), usize>,
    /// Name and reason of each unreadable image.
    pub unreadable: Vec<(String, String)>,
    /// Files that are no images by their extension.
    pub others: usize,
    /// Whether decoded images stay in memory.
    pub cached: bool,
}

/// Images that can be fetched by number.
pub struct Images {
    source: Source,
    entries: Vec<Entry>,
    labels: Vec<Option<u32>>,
    cache: Option<Vec<Picture>>,
}

/// Images with their classes and their split.
pub struct Dataset {
    /// All readable images.
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
        let entries = source.entries.clone();
        let headers = scan(&source, &entries, observer, "checking images", |bytes| {
            decode::header(bytes)
        });
        let decoded_bytes: u64 = headers
            .iter()
            .flatten()
            .map(|h| 3 * u64::from(h.width) * u64::from(h.height))
            .sum();
        let cached = decoded_bytes <= config.memory_mib << 20;
        let (headers, pictures): (Vec<_>, Vec<_>) = if cached {
            scan(&source, &entries, observer, "decoding images", |bytes| {
                decode::decode(bytes)
            })
            .into_iter()
            .map(|result| match result {
                Ok((header, picture)) => (Ok(header), Some(picture)),
                Err(reason) => (Err(reason), None),
            })
            .unzip()
        } else {
            headers.into_iter().map(|header| (header, None)).unzip()
        };
        let mut dataset = Self::assemble(config, source, entries, headers, pictures, cached)?;
        dataset.divide(config, seed);
        Ok(dataset)
    }

    /// Where the images come from.
    pub fn path(&self) -> &Path {
        self.images.source.path()
    }

    /// Numbers of all images.
    pub fn all(&self) -> Arc<Vec<usize>> {
        Arc::new((0..self.images.len()).collect())
    }

    fn assemble(
        config: &DataConfig,
        source: Source,
        entries: Vec<Entry>,
        headers: Vec<Result<Header, String>>,
        pictures: Vec<Option<Picture>>,
        cached: bool,
    ) -> Result<Self> {
        let mut summary = Summary {
            images: 0,
            formats: BTreeMap::new(),
            sizes: BTreeMap::new(),
            unreadable: Vec::new(),
            others: source.others,
            cached,
        };
        let all = entries.len();
        let (mut good, mut cache) = (Vec::with_capacity(all), Vec::new());
        for ((entry, header), picture) in entries.into_iter().zip(headers).zip(pictures) {
            match header {
                Ok(header) => {
                    summary.images += 1;
                    *summary.formats.entry(header.format).or_default() += 1;
                    *summary
                        .sizes
                        .entry((header.width, header.height))
                        .or_default() += 1;
                    good.push(entry);
                    cache.extend(picture);
                }
                Err(reason) => summary.unreadable.push((entry.name, reason)),
            }
        }
        let bad = summary.unreadable.len();
        if bad as f64 > config.max_bad_share * all as f64 || good.is_empty() {
            return Err(Error::TooManyBad {
                bad,
                all,
                allowed: config.max_bad_share,
                list: summary.list_unreadable(),
            });
        }
        let images = Images {
            source,
            labels: vec![None; good.len()],
            entries: good,
            cache: cached.then_some(cache),
        };
        Ok(Self {
            train: Arc::new((0..images.len()).collect()),
            images: Arc::new(images),
            classes: Vec::new(),
            held_out: Arc::default(),
            split: Split::None,
            summary,
        })
    }

    /// Finds split and classes in the names of folders.
    fn divide(&mut self, config: &DataConfig, seed: u64) {
        let images = Arc::get_mut(&mut self.images).expect("nobody else has the images yet");
        let names: Vec<Vec<&str>> = images
            .entries
            .iter()
            .map(|entry| entry.name.split('/').collect())
            .collect();
        let shared = shared_folders(&names);
        let below: Vec<&[&str]> = names.iter().map(|name| &name[shared..]).collect();
        let folder_of = |choices: &[&str]| {
            choices
                .iter()
                .find(|choice| {
                    below
                        .iter()
                        .any(|name| name.len() > 1 && name[0] == **choice)
                })
                .map(|choice| (*choice).to_owned())
        };
        let own = folder_of(TRAIN_FOLDERS).zip(folder_of(HELD_OUT_FOLDERS));
        let class_at = usize::from(own.is_some());
        let class_of =
            |name: &[&str]| (name.len() > class_at + 1).then(|| name[class_at].to_owned());
        let classes: BTreeSet<String> = below.iter().filter_map(|name| class_of(name)).collect();
        let classes: Vec<String> = classes.into_iter().collect();
        let labels: Vec<Option<u32>> = if classes.len() > 1 {
            below
                .iter()
                .map(|name| {
                    let class = class_of(name)?;
                    classes.binary_search(&class).ok().map(|i| i as u32)
                })
                .collect()
        } else {
            vec![None; names.len()]
        };
        let (train, held_out, split) = match own {
            Some((train, held_out)) => (
                (0..names.len()).filter(|&i| below[i][0] == train).collect(),
                (0..names.len())
                    .filter(|&i| below[i][0] == held_out)
                    .collect(),
                Split::Own { held_out },
            ),
            None if classes.len() > 1 && config.held_out > 0.0 => {
                let (train, held_out) = stratified(&labels, config.held_out, seed);
                let share = config.held_out;
                (train, held_out, Split::Stratified { held_out: share })
            }
            None => ((0..names.len()).collect(), Vec::new(), Split::None),
        };
        self.classes = if classes.len() > 1 {
            classes
        } else {
            Vec::new()
        };
        self.train = Arc::new(train);
        self.held_out = Arc::new(held_out);
        self.split = split;
        images.labels = labels;
    }
}

impl Summary {
    /// The first few unreadable images, one a line.
    pub fn list_unreadable(&self) -> String {
        let mut lines: Vec<String> = self
            .unreadable
            .iter()
            .take(LISTED)
            .map(|(name, reason)| format!("  {name}: {reason}"))
            .collect();
        if self.unreadable.len() > LISTED {
            lines.push(format!("  … and {} more", self.unreadable.len() - LISTED));
        }
        lines.join("\n")
    }
}

impl Images {
    /// How many.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Path of an image below the data set's root.
    pub fn name(&self, index: usize) -> &str {
        &self.entries[index].name
    }

    /// Class of an image, where it has one.
    pub fn label(&self, index: usize) -> Option<u32> {
        self.labels[index]
    }

    /// An image; where it cannot be read any more, the next one that can, and the names of those passed over.
    pub fn picture(&self, index: usize) -> Result<(Cow<'_, Picture>, Vec<String>)> {
        if let Some(cache) = &self.cache {
            return Ok((Cow::Borrowed(&cache[index]), Vec::new()));
        }
        let mut passed_over = Vec::new();
        for step in 0..MAX_REPLACEMENTS.min(self.len()) {
            let entry = &self.entries[(index + step) % self.len()];
            let decoded = self
                .source
                .read(entry)
                .map_err(|error| error.to_string())
                .and_then(|bytes| decode::decode(&bytes));
            match decoded {
                Ok((_, picture)) => return Ok((Cow::Owned(picture), passed_over)),
                Err(reason) => passed_over.push(format!("{}: {reason}", entry.name)),
            }
        }
        Err(Error::data(
            self.source.path(),
            format!(
                "{} images in a row cannot be read any more, the first is {}",
                passed_over.len(),
                passed_over[0]
            ),
        ))
    }
}

/// Runs `work` over the bytes of every entry, on all cores.
fn scan<T: Send>(
    source: &Source,
    entries: &[Entry],
    observer: &dyn Observer,
    stage: &str,
    work: impl Fn(&[u8]) -> Result<T, String> + Sync,
) -> Vec<Result<T, String>> {
    observer.begin(stage, entries.len() as u64);
    let done = AtomicU64::new(0);
    let results = entries
        .par_iter()
        .map(|entry| {
            let result = source
                .read(entry)
                .map_err(|error| error.to_string())
                .and_then(|bytes| work(&bytes));
            observer.progress(done.fetch_add(1, Ordering::Relaxed) + 1, "");
            result
        })
        .collect();
    observer.end();
    results
}

/// How many leading folders all images share, as in `cifar10/train/…` and `cifar10/test/…`: one. A folder that holds
/// the images themselves is never shared away.
fn shared_folders(names: &[Vec<&str>]) -> usize {
    let shortest = names.iter().map(Vec::len).min().unwrap_or(1);
    (0..shortest.saturating_sub(1))
        .take_while(|&depth| names.iter().all(|name| name[depth] == names[0][depth]))
        .count()
}

/// Holds out the same share of each class, at least one image where it has two.
fn stratified(labels: &[Option<u32>], share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut of_class: BTreeMap<Option<u32>, Vec<usize>> = BTreeMap::new();
    for index in random::permutation(seed, Purpose::Split, 0, labels.len()) {
        of_class.entry(labels[index]).or_default().push(index);
    }
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for (label, members) in of_class {
        let wanted = (members.len() as f64 * share).round() as usize;
        let count = match label {
            None => 0,
            Some(_) => wanted.clamp(usize::from(members.len() > 1), members.len() - 1),
        };
        held_out.extend(&members[..count]);
        train.extend(&members[count..]);
    }
    train.sort_unstable();
    held_out.sort_unstable();
    (train, held_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stratified_split_takes_the_same_share_of_each_class_and_loses_nothing() {
        let labels: Vec<Option<u32>> = (0..100).map(|i| Some(u32::from(i % 4 == 0))).collect();
        let (train, held_out) = stratified(&labels, 0.2, 7);
        assert_eq!(train.len() + held_out.len(), 100);
        let ones = held_out.iter().filter(|&&i| labels[i] == Some(1)).count();
        assert_eq!((held_out.len(), ones), (20, 5));
        assert_eq!(stratified(&labels, 0.2, 7).1, held_out);
        assert_ne!(stratified(&labels, 0.2, 8).1, held_out);
    }

    #[test]
    fn only_folders_above_all_images_are_shared() {
        let split = |names: &[&str]| {
            let names: Vec<Vec<&str>> = names.iter().map(|n| n.split('/').collect()).collect();
            shared_folders(&names)
        };
        assert_eq!(split(&["c/train/a/1.jpg", "c/test/a/1.jpg"]), 1);
        assert_eq!(split(&["a/1.jpg", "b/1.jpg"]), 0);
        assert_eq!(split(&["1.jpg", "a/1.jpg"]), 0);
    }
}
