//! Images: where they come from, decoding, augmentation, batches in a fixed order.

mod augment;
mod check;
mod colour;
mod dataset;
mod decode;
mod image_size;
mod index;
mod loader;
mod pictures;
mod source;
mod split;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::error::Result;

pub(crate) use augment::{Crop, resize};
pub use augment::{colour_statistics, normalise, random_view, whole_view};
pub use check::{Check, ClassCount, OddImage, SizeCount, check};
pub(crate) use colour::distort;
pub use dataset::{BadImage, Dataset, Images, Summary};
pub use decode::Picture;
pub use image_size::ImageSize;
pub use index::Index;
pub use loader::{Batch, Loader, LoaderConfig};
pub(crate) use loader::{Lanes, Order};
pub(crate) use pictures::Pictures;
pub use source::{BUILTIN, place};
pub(crate) use source::{Entry, Source};
pub use split::Split;

/// Each keeps some batches ready.
const MAX_LOADER_THREADS: usize = 256;

/// Where images come from and how they are prepared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A folder, a `.tar`, shards such as `shard-{000..009}.tar`, or `builtin:cifar10`.
    pub path: PathBuf,
    /// Channels of the image that the network sees: 1 for luma, 3 for RGB.
    pub channels: usize,
    /// RGB from 0 to 255 that lies below transparent pixels.
    pub background: [u32; 3],
    /// Threads that decode and augment beside the training step.
    pub loader_threads: usize,
    /// The decoded images are kept in memory where they fit into this many MiB.
    pub memory_mib: u64,
    /// More unreadable images than this share stop the run before it starts.
    pub max_bad_share: f64,
    /// Whether the folder that the data set holds out, if any, is the held-out part.
    pub split: SplitChoice,
    /// Share of the training images held out for evaluation where the split is drawn and there are classes.
    pub held_out: f64,
    /// Least and largest share of the image's area in a random crop.
    pub crop_scale: [f64; 2],
    /// Narrowest and widest ratio of width to height of a random crop.
    pub crop_ratio: [f64; 2],
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Strengths of brightness, contrast, saturation and hue in torchvision's sense.
    pub jitter: [f64; 4],
    /// Probability that a view is jittered so.
    pub jitter_share: f64,
    /// Probability that a view loses its colours.
    pub grey: f64,
    /// Probability of a Gaussian blur of deviation 0.1 to 2 pixels, in proportion to a side of 224.
    pub blur: f64,
}

/// Which images are held out of a data set that has folders for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SplitChoice {
    /// Those of its own folder.
    Own,
    /// Some of the training images, drawn with the seed; those of its own folder are left alone.
    Drawn,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            channels: 3,
            background: [255; 3],
            loader_threads: 1,
            memory_mib: 2048,
            max_bad_share: 0.1,
            split: SplitChoice::Own,
            held_out: 0.1,
            crop_scale: [0.3, 1.0],
            crop_ratio: [0.75, 4.0 / 3.0],
            flip: 0.5,
            jitter: [0.0; 4],
            jitter_share: 0.0,
            grey: 0.0,
            blur: 0.0,
        }
    }
}

impl DataConfig {
    /// Whether every value is usable.
    pub(crate) fn check(&self) -> Result<()> {
        let share = |value: f64| (0.0..=1.0).contains(&value);
        require(
            matches!(self.channels, 1 | 3),
            "data.channels",
            self.channels,
            "1 for luma or 3 for RGB",
        )?;
        require(
            self.background.iter().all(|&value| value <= 255),
            "data.background",
            format!("{:?}", self.background),
            "red, green and blue from 0 to 255",
        )?;
        require(
            (1..=MAX_LOADER_THREADS).contains(&self.loader_threads),
            "data.loader_threads",
            self.loader_threads,
            &format!("from 1 to {MAX_LOADER_THREADS}"),
        )?;
        require(
            share(self.max_bad_share),
            "data.max_bad_share",
            self.max_bad_share,
            "a share from 0 to 1",
        )?;
        require(
            (0.0..1.0).contains(&self.held_out),
            "data.held_out",
            self.held_out,
            "a share from 0 to below 1",
        )?;
        let [least, largest] = self.crop_scale;
        require(
            0.0 < least && least <= largest && largest <= 1.0,
            "data.crop_scale",
            format!("{:?}", self.crop_scale),
            "two shares of the area, the smaller first, above 0 and up to 1",
        )?;
        let [narrow, wide] = self.crop_ratio;
        require(
            0.0 < narrow && narrow <= wide && wide.is_finite(),
            "data.crop_ratio",
            format!("{:?}", self.crop_ratio),
            "two numbers above 0, the smaller first",
        )?;
        let [brightness, contrast, saturation, hue] = self.jitter;
        require(
            [brightness, contrast, saturation].into_iter().all(share) && (0.0..=0.5).contains(&hue),
            "data.jitter",
            format!("{:?}", self.jitter),
            "brightness, contrast and saturation from 0 to 1, hue from 0 to 0.5",
        )?;
        for (key, value) in [
            ("data.flip", self.flip),
            ("data.jitter_share", self.jitter_share),
            ("data.grey", self.grey),
            ("data.blur", self.blur),
        ] {
            require(share(value), key, value, "a probability from 0 to 1")?;
        }
        Ok(())
    }
}
