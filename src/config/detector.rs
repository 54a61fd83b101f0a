//! The configuration of a detector's training.

use std::ops::{Deref, DerefMut};
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::Table;

use super::Base;
use super::base::make_absolute;
use super::layers::{layered, read_table, read_toml, require};
use crate::data::{DataConfig, ImageSize};
use crate::detect::{DenoisingConfig, HeadConfig, LossConfig, Origin, ViewConfig};
use crate::encoder::{self, EncoderSpec};
use crate::error::{Error, Result};
use crate::train::{CONFIG_FILE, OptimConfig, RunFolder};
use crate::weights::{ImageForm, Weights};

/// Strides of the maps that a head reads, as far as an encoder has them, where nothing says otherwise.
const STRIDES: [usize; 3] = [8, 16, 32];

/// Settings that hold for a whole process.
pub(crate) const OF_PROCESS: [&str; 3] = ["threads", "device", "kernels"];

/// Everything a detector's training depends on; stored complete as `config.toml` in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DetectorConfig {
    /// What it shares with other runs; `data.path`, `data.split` and the crops of `data` have no part in it.
    #[serde(flatten)]
    pub base: Base,
    /// Images, and what of the network is trained.
    pub detect: DetectConfig,
    /// The head's sizes.
    pub head: HeadConfig,
    /// Weights of the terms of the loss.
    pub loss: LossConfig,
    /// Queries that learn to put boxes right.
    pub denoising: DenoisingConfig,
    /// How pictures are cut for training.
    pub view: ViewConfig,
}

/// Images with boxes, and what of the network is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DetectConfig {
    /// The images to train on.
    pub train: Origin,
    /// Those to score; where nothing is given, `data.held_out` of the others are held out.
    pub val: Origin,
    /// Train on at most so many images, drawn with the seed; 0 for all.
    pub limit: usize,
    /// Takes all boxes for one class.
    pub class_agnostic: bool,
    /// Trains the encoder too; its batch statistics stay as they are.
    pub unfreeze: bool,
    /// Whitens the maps by their moments over training images, before the first step, for the head to read.
    pub whiten: bool,
    /// Image pixels a position of each map that the head reads: powers of two in ascending order, the last one
    /// `encoder.stride`, which is that of the weights, 8 at least. Where nothing is given, 8, 16 and 32 up to it.
    pub strides: Vec<usize>,
    /// Learning rate of the encoder, where it is trained, relative to `optim.learning_rate`.
    pub encoder_rate: f64,
    /// Trains on so many images only, always the same and as they are, and scores those: whether a head can learn at
    /// all. 0 for training as usual.
    pub overfit: usize,
}

impl Default for DetectConfig {
    fn default() -> Self {
        Self {
            train: Origin::default(),
            val: Origin::default(),
            limit: 0,
            class_agnostic: false,
            unfreeze: false,
            whiten: true,
            strides: Vec::new(),
            encoder_rate: 0.1,
            overfit: 0,
        }
    }
}

impl Default for DetectorConfig {
    fn default() -> Self {
        Self {
            base: Base {
                image_size: ImageSize::square(256),
                data: DataConfig {
                    jitter: [0.2, 0.2, 0.2, 0.05],
                    jitter_share: 0.5,
                    ..DataConfig::default()
                },
                optim: OptimConfig {
                    epochs: 60,
                    batch_size: 8,
                    betas: [0.9, 0.999],
                    clip_norm: 1.0,
                    ..OptimConfig::default()
                },
                ..Base::default()
            },
            detect: DetectConfig::default(),
            head: HeadConfig::default(),
            loss: LossConfig::default(),
            denoising: DenoisingConfig::default(),
            view: ViewConfig::default(),
        }
    }
}

impl Deref for DetectorConfig {
    type Target = Base;

    fn deref(&self) -> &Base {
        &self.base
    }
}

impl DerefMut for DetectorConfig {
    fn deref_mut(&mut self) -> &mut Base {
        &mut self.base
    }
}

impl DetectorConfig {
    /// Defaults, then `file`, then `settings` (pairs of dotted key and value); resolved and checked.
    pub fn load(file: Option<&Path>, settings: &[(String, String)]) -> Result<Self> {
        Self::load_for(Vec::new(), file, settings)
    }

    /// As [`Self::load`] for weights that ask for `of_weights`. The stride, and the channels of weights that are still to
    /// be drawn, are as the file has them where it says so.
    pub fn load_for(
        mut of_weights: Vec<(String, String)>,
        file: Option<&Path>,
        settings: &[(String, String)],
    ) -> Result<Self> {
        let table: Option<Table> = file.map(|path| read_toml(path, "--config")).transpose()?;
        // A stride of 0 says nothing.
        let says = |section: &str, key: &str| {
            let section = table.as_ref().and_then(|table| table.get(section));
            let value = section.and_then(|section| section.get(key));
            value.is_some_and(|value| value.as_integer() != Some(0))
        };
        let drawn = of_weights.contains(&("encoder.init".into(), String::new()));
        of_weights.retain(|(key, _)| match key.as_str() {
            "encoder.stride" => !says("encoder", "stride"),
            "data.channels" => !(drawn && says("data", "channels")),
            _ => true,
        });
        of_weights.extend_from_slice(settings);
        let (layer, choices) = (file.zip(table.as_ref()), Base::choices());
        let mut config: Self = read_table(layered::<Self>("", layer, &of_weights, &choices)?)?;
        config.resolve()?;
        Ok(config)
    }

    /// One that says with what to compute, of all `settings`: for what has to be known before weights are opened.
    pub fn of_process(mut settings: Vec<(String, String)>) -> Result<Self> {
        settings.retain(|(key, _)| OF_PROCESS.contains(&key.as_str()));
        Self::load(None, &settings)
    }

    /// An encoder's weights, by a name that [`Weights::open`] knows, and the settings of a detector that follow from them.
    pub fn settings_of_weights(name: &str) -> Result<(Weights, Vec<(String, String)>)> {
        // Untrained weights are only asked for their form: training draws its own.
        let blank = ImageForm {
            size: ImageSize::square(64),
            channels: 3,
            stride: 0,
        };
        let weights = Weights::open(name, 0, blank)?;
        let mut settings = vec![
            ("encoder.name".into(), weights.metadata.encoder.clone()),
            (
                "data.channels".into(),
                weights.metadata.mean.len().to_string(),
            ),
        ];
        let metadata = &weights.metadata;
        let (init, own) = match metadata.method.as_str() {
            "none" => ("", 0),
            _ => (name, metadata.stride),
        };
        let stride = least_stride(encoder::find(&metadata.encoder)?, own);
        settings.push(("encoder.init".into(), init.to_owned()));
        settings.push(("encoder.stride".into(), stride.to_string()));
        Ok((weights, settings))
    }

    /// That of a run, which must be a detector's.
    pub fn of_run(run: &RunFolder) -> Result<Self> {
        if !is_detector(run)? {
            return Err(Error::Foreign {
                path: run.path().to_owned(),
                message: "is no detector; train one on its encoder with `qbheat detect train`"
                    .into(),
            });
        }
        Self::load(Some(&run.file(CONFIG_FILE)), &[])
    }

    /// As text, complete.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration is valid TOML")
    }

    fn resolve(&mut self) -> Result<()> {
        let Self { base, detect, .. } = self;
        base.resolve(|encoder: &EncoderSpec, _| least_stride(encoder, 0))?;
        let own = base.encoder.stride;
        require(
            base.image_size.shorter() >= 2 * own,
            "image_size",
            base.image_size,
            &format!("sides of at least twice encoder.stride = {own}"),
        )?;
        if detect.strides.is_empty() {
            detect.strides = STRIDES.into_iter().filter(|&stride| stride < own).collect();
            detect.strides.push(own);
        }
        require(
            detect.strides.is_sorted_by(|a, b| a < b)
                && detect.strides.iter().all(|stride| stride.is_power_of_two())
                && detect.strides.last() == Some(&own),
            "detect.strides",
            format!("{:?}", detect.strides),
            &format!("powers of two in ascending order, the last one encoder.stride = {own}"),
        )?;
        for origin in [&mut detect.train, &mut detect.val] {
            make_absolute(&mut origin.path)?;
            make_absolute(&mut origin.images)?;
        }
        require(
            detect.encoder_rate.is_finite() && detect.encoder_rate > 0.0,
            "detect.encoder_rate",
            detect.encoder_rate,
            "a number above 0; detect.unfreeze = false keeps the encoder as it is",
        )?;
        self.head.check("head")?;
        self.loss.check("loss")?;
        self.denoising.check("denoising")?;
        self.view.check("view")
    }
}

/// The smallest stride of an encoder from the finest of [`STRIDES`] up, and not below the one that its weights know.
fn least_stride(encoder: &EncoderSpec, known: usize) -> usize {
    let least = STRIDES[0].max(known);
    let fitting = encoder.strides.iter().filter(|&&stride| stride >= least);
    *fitting.min().unwrap_or(&encoder.strides[0])
}

/// Whether a run trains a detector.
pub fn is_detector(run: &RunFolder) -> Result<bool> {
    // Whether it is otherwise sound is for whoever reads it to say.
    let table: Table = toml::from_str(&run.config()?).unwrap_or_default();
    Ok(table.contains_key("detect"))
}

/// An error where a run trains a detector.
pub(crate) fn refuse_detector(run: &RunFolder) -> Result<()> {
    if !is_detector(run)? {
        return Ok(());
    }
    Err(Error::Foreign {
        path: run.path().to_owned(),
        message: "is a detector; give the run or the weights that its encoder comes from (encoder.init in its \
                  config.toml)"
            .into(),
    })
}
