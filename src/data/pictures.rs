//! Images by number: decoded when they are asked for, or kept decoded where they fit into memory.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::DataConfig;
use super::dataset::BadImage;
use super::decode::{self, Header, Picture, Target};
use super::source::{Entry, Source};
use crate::error::{Error, Result};
use crate::observe::Observer;

/// Unreadable images in a row after which a data set counts as broken.
const MAX_REPLACEMENTS: usize = 20;

/// The images of a source, readable or not.
pub(crate) struct Pictures {
    source: Source,
    target: Target,
    cache: Option<Vec<Option<Picture>>>,
}

impl Pictures {
    /// Checks every image of `source`, and decodes them all where they fit into `config.memory_mib`; with what was
    /// found of each.
    pub fn open(
        source: Source,
        config: &DataConfig,
        observer: &dyn Observer,
    ) -> (Self, Vec<Result<Header, String>>) {
        let target = Target::of(config);
        let mut headers = scan(&source, observer, "checking images", |entry| {
            header(&source, entry)
        });
        let decoded_bytes: u64 = headers
            .iter()
            .flatten()
            .map(|h| config.channels as u64 * u64::from(h.width) * u64::from(h.height))
            .sum();
        let cached = decoded_bytes <= config.memory_mib << 20;
        let cache = cached.then(|| {
            let decoded = scan(&source, observer, "decoding images", |entry| {
                decode::decode(&source.read(entry)?, &target)
            });
            let (new_headers, pictures) = decoded
                .into_iter()
                .map(|result| match result {
                    Ok((header, picture)) => (Ok(header), Some(picture)),
                    Err(reason) => (Err(reason), None),
                })
                .unzip();
            headers = new_headers;
            pictures
        });
        let pictures = Self {
            source,
            target,
            cache,
        };
        (pictures, headers)
    }

    /// Where they come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Whether decoded images stay in memory.
    pub fn cached(&self) -> bool {
        self.cache.is_some()
    }

    /// An image, or why it cannot be read.
    pub fn read(&self, index: usize) -> Result<Cow<'_, Picture>, String> {
        let cached = self.cache.as_ref().and_then(|cache| cache[index].as_ref());
        if let Some(picture) = cached {
            return Ok(Cow::Borrowed(picture));
        }
        let bytes = self.source.read(&self.source.entries[index])?;
        let (_, picture) = decode::decode(&bytes, &self.target)?;
        Ok(Cow::Owned(picture))
    }

    /// The first of `candidates` that can be read, its number, and those before it that could not.
    pub fn first_readable(
        &self,
        candidates: impl Iterator<Item = usize>,
    ) -> Result<(usize, Cow<'_, Picture>, Vec<BadImage>)> {
        let mut passed_over = Vec::new();
        for candidate in candidates.take(MAX_REPLACEMENTS) {
            match self.read(candidate) {
                Ok(picture) => return Ok((candidate, picture, passed_over)),
                Err(reason) => passed_over.push(BadImage {
                    name: self.source.entries[candidate].name.to_string(),
                    reason,
                }),
            }
        }
        let BadImage { name, reason } = &passed_over[0];
        Err(Error::data(
            self.source.path(),
            format!(
                "{} images in a row cannot be read, the first is {name} ({reason}); restore them, then go on",
                passed_over.len(),
            ),
        ))
    }
}

/// Reads no more of a file than its header needs.
fn header(source: &Source, entry: &Entry) -> Result<Header, String> {
    // Where metadata stand before the header, a longer piece is tried, and the whole file in the end.
    let mut limit = 4 << 10;
    loop {
        let whole = limit >= entry.bytes;
        match decode::header(&source.read_start(entry, limit)?, whole) {
            Err(_) if !whole => limit *= 16,
            read => return read,
        }
    }
}

/// Runs `work` over every entry, on all cores.
pub(super) fn scan<T: Send>(
    source: &Source,
    observer: &dyn Observer,
    stage: &str,
    work: impl Fn(&Entry) -> T + Sync,
) -> Vec<T> {
    observer.begin(stage, source.entries.len() as u64);
    let done = AtomicU64::new(0);
    let results = source
        .entries
        .par_iter()
        .map(|entry| {
            let result = work(entry);
            observer.progress(done.fetch_add(1, Ordering::Relaxed) + 1, "");
            result
        })
        .collect();
    observer.end();
    results
}
