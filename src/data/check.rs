//! Looks at every image of a data set before hours are spent on it.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use serde::Serialize;

use super::DataConfig;
use super::dataset::BadImage;
use super::decode::{self, Header, Target};
use super::pictures::scan;
use super::source::Source;
use super::split::Groups;
use crate::error::Result;
use crate::observe::Observer;

/// What was found.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Images that decode.
    pub readable: usize,
    /// Images that do not.
    pub unreadable: Vec<BadImage>,
    /// Images that decode and are unusual.
    pub odd: Vec<OddImage>,
    /// Names of images whose files are the same bytes, a list for each such file.
    pub same_bytes: Vec<Vec<String>>,
    /// Names of images that decode to the same pixels from different files.
    pub same_pixels: Vec<Vec<String>>,
    /// Readable images of each format.
    pub formats: BTreeMap<&'static str, usize>,
    /// Readable images of each size, the most frequent first.
    pub sizes: Vec<SizeCount>,
    /// Readable images of each class.
    pub classes: Vec<ClassCount>,
    /// Files that are no images by their extension.
    pub others: usize,
    /// Files with labels that were not understood, and why.
    pub bad_labels: Vec<String>,
}

/// An image that may be meant so or not.
#[derive(Debug, Serialize)]
pub struct OddImage {
    /// Its path below the data set's root.
    pub name: String,
    /// What is unusual.
    pub odd: Vec<&'static str>,
}

/// Images of one size.
#[derive(Debug, Serialize)]
pub struct SizeCount {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// How many images.
    pub images: usize,
}

/// Images of one class.
#[derive(Debug, Serialize)]
pub struct ClassCount {
    /// Its name.
    pub class: String,
    /// How many images.
    pub images: usize,
}

struct Seen {
    header: Header,
    odd: Vec<&'static str>,
    bytes: blake3::Hash,
    pixels: blake3::Hash,
}

/// Reads and decodes every image of `config.path`. Fails only where the data set as a whole cannot be read.
pub fn check(config: &DataConfig, observer: &dyn Observer) -> Result<Check> {
    let source = Source::open(&config.path)?;
    let target = Target::of(config);
    let seen = scan(&source, observer, "checking images", |entry| {
        let bytes = source.read(entry)?;
        let (header, picture, odd) = decode::inspect(&bytes, &target, entry.extension())?;
        let mut pixels = blake3::Hasher::new();
        pixels.update(&picture.width.to_le_bytes());
        pixels.update(&picture.pixels);
        Ok(Seen {
            header,
            odd,
            bytes: blake3::hash(&bytes),
            pixels: pixels.finalize(),
        })
    });
    let readable: Vec<bool> = seen.iter().map(Result::is_ok).collect();
    let groups = Groups::of(&source, &readable);
    let mut class_sizes = vec![0; groups.classes.len()];
    for label in groups.labels.iter().flatten() {
        class_sizes[*label as usize] += 1;
    }
    let mut report = Check {
        readable: readable.iter().filter(|readable| **readable).count(),
        unreadable: Vec::new(),
        odd: Vec::new(),
        same_bytes: Vec::new(),
        same_pixels: Vec::new(),
        formats: BTreeMap::new(),
        sizes: Vec::new(),
        classes: groups
            .classes
            .into_iter()
            .zip(class_sizes)
            .map(|(class, images)| ClassCount { class, images })
            .collect(),
        others: source.others,
        bad_labels: source.bad_labels.clone(),
    };
    let mut sizes: BTreeMap<(u32, u32), usize> = BTreeMap::new();
    let (mut of_bytes, mut of_pixels) = (Vec::new(), Vec::new());
    for (entry, seen) in source.entries.iter().zip(seen) {
        let name = entry.name.to_string();
        match seen {
            Err(reason) => report.unreadable.push(BadImage { name, reason }),
            Ok(Seen {
                header,
                odd,
                bytes,
                pixels,
            }) => {
                *report.formats.entry(header.format).or_default() += 1;
                *sizes.entry((header.width, header.height)).or_default() += 1;
                of_bytes.push((bytes, &*entry.name));
                of_pixels.push((pixels, bytes, &*entry.name));
                if !odd.is_empty() {
                    report.odd.push(OddImage { name, odd });
                }
            }
        }
    }
    report.sizes = sizes
        .into_iter()
        .map(|((width, height), images)| SizeCount {
            width,
            height,
            images,
        })
        .collect();
    report
        .sizes
        .sort_by_key(|size| std::cmp::Reverse(size.images));
    report.same_bytes = repeated(of_bytes.into_iter());
    // Of files with the same bytes the first stands for all.
    let mut known = std::collections::HashSet::new();
    let distinct = of_pixels
        .into_iter()
        .filter(|(_, bytes, _)| known.insert(*bytes));
    report.same_pixels = repeated(distinct.map(|(pixels, _, name)| (pixels, name)));
    Ok(report)
}

/// Names that come with the same key, in the order of their first.
fn repeated<'a, K: Hash + Eq>(keyed: impl Iterator<Item = (K, &'a str)>) -> Vec<Vec<String>> {
    let mut groups: HashMap<K, Vec<&str>> = HashMap::new();
    for (key, name) in keyed {
        groups.entry(key).or_default().push(name);
    }
    let mut repeated: Vec<Vec<String>> = groups
        .into_values()
        .filter(|names| names.len() > 1)
        .map(|names| names.into_iter().map(str::to_owned).collect())
        .collect();
    repeated.sort();
    repeated
}
