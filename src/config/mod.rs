//! A run's configuration: defaults, overridden by the method's preset, a TOML file and `key=value` settings in that
//! order; checked here once.

mod base;
mod detector;
mod layers;

use std::ops::{Deref, DerefMut};
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::Table;

use crate::baseline::{MoCoConfig, SupervisedConfig};
use crate::data::{ImageSize, LoaderConfig};
use crate::encoder::EncoderSpec;
use crate::error::Result;
use crate::heat::{Parametrisation, Place, QbHeatConfig};
use crate::latent::{ObjectiveConfig, Target};
use crate::pretrain::traits;

pub use base::{Base, EncoderConfig};
pub use detector::{DetectConfig, DetectorConfig, is_detector};
pub(crate) use detector::{OF_PROCESS, refuse_detector};
pub use layers::parse_setting;
use layers::{Choice, layered, names, read_table};
pub(crate) use layers::{read_toml, require};

/// Everything a pre-training run depends on; stored complete as `config.toml` in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// What it shares with other runs.
    #[serde(flatten)]
    pub base: Base,
    /// The pre-training method.
    pub method: Method,
    /// QB-Heat's own choices.
    pub qb_heat: QbHeatConfig,
    /// What QB-Heat predicts.
    pub objective: ObjectiveConfig,
    /// MoCo-v2's own choices.
    pub moco: MoCoConfig,
    /// Those of supervised pre-training.
    pub supervised: SupervisedConfig,
}

/// The pre-training methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// arXiv 2211.13228.
    QbHeat,
    /// arXiv 2003.04297.
    MocoV2,
    /// Cross-entropy with labels.
    Supervised,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::QbHeat, Self::MocoV2, Self::Supervised];

    /// As typed and printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::QbHeat => "qb-heat",
            Self::MocoV2 => "moco-v2",
            Self::Supervised => "supervised",
        }
    }

    /// The sections of a configuration that concern it alone.
    pub fn sections(self) -> &'static [&'static str] {
        match self {
            Self::QbHeat => &["qb_heat", "objective"],
            Self::MocoV2 => &["moco"],
            Self::Supervised => &["supervised"],
        }
    }
}

/// What tables call QB-Heat with [`Target::Latent`].
pub const LATENT: &str = "qb-heat-latent";

impl Default for Config {
    fn default() -> Self {
        Self {
            base: Base::default(),
            method: Method::QbHeat,
            qb_heat: QbHeatConfig::default(),
            objective: ObjectiveConfig::default(),
            moco: MoCoConfig::default(),
            supervised: SupervisedConfig::default(),
        }
    }
}

impl Deref for Config {
    type Target = Base;

    fn deref(&self) -> &Base {
        &self.base
    }
}

impl DerefMut for Config {
    fn deref_mut(&mut self) -> &mut Base {
        &mut self.base
    }
}

impl Config {
    /// Defaults, then the method's preset, then `file`, then `settings` (pairs of dotted key and value); resolved and
    /// checked.
    pub fn load(file: Option<&Path>, settings: &[(String, String)]) -> Result<Self> {
        let config = Self::load_for_any_size(file, settings)?;
        config.check_training()?;
        Ok(config)
    }

    /// As [`Self::load`], for uses other than pre-training: images of any size, batches of one.
    pub fn load_for_any_size(file: Option<&Path>, settings: &[(String, String)]) -> Result<Self> {
        let table: Option<Table> = file.map(|path| read_toml(path, "--config")).transpose()?;
        let layer = file.zip(table.as_ref());
        let layered = |preset: &str| layered::<Self>(preset, layer, settings, &Self::choices());
        // Which preset there is follows from the other layers.
        let table = layered("")?;
        let checked = "the choices were checked";
        let method = table["method"].clone().try_into().expect(checked);
        let target = table["objective"]["target"].clone();
        let target = target.try_into().expect(checked);
        let mut config: Self = read_table(layered(traits(method, target).preset)?)?;
        config.resolve()?;
        Ok(config)
    }

    fn choices() -> Vec<Choice> {
        use Parametrisation::*;
        let mut choices = vec![
            ("method", names(&Method::ALL)),
            ("objective.target", names(&[Target::Pixels, Target::Latent])),
            ("qb_heat.visible", names(&[Place::Corner, Place::Anywhere])),
            (
                "qb_heat.propagator",
                names(&[Signed, Separate, Exponential, NormLinear]),
            ),
        ];
        choices.extend(Base::choices());
        choices
    }

    /// Whether a batch has statistics, and images can be cut into what the method cuts them into.
    fn check_training(&self) -> Result<()> {
        require(
            self.optim.batch_size > 1,
            "optim.batch_size",
            self.optim.batch_size,
            "at least 2, for batch normalisation",
        )?;
        match self.method {
            Method::QbHeat => self.check_quarters(),
            Method::MocoV2 => self.moco.check(self.optim.batch_size),
            Method::Supervised => Ok(()),
        }
    }

    /// Whether images can be cut into blocks of whole positions of the feature map.
    fn check_quarters(&self) -> Result<()> {
        let cell = 2 * self.encoder.stride;
        let ImageSize { height, width } = self.image_size;
        let fitting = |side: usize| (side.div_ceil(cell) * cell).max(cell);
        require(
            fitting(height) == height && fitting(width) == width,
            "image_size",
            self.image_size,
            &format!(
                "a multiple of twice the stride (2·{} = {cell}), {} say",
                self.encoder.stride,
                ImageSize {
                    height: fitting(height),
                    width: fitting(width)
                }
            ),
        )
    }

    /// The batches that training sees.
    pub fn loading(&self) -> LoaderConfig {
        LoaderConfig {
            seed: self.seed,
            image_size: self.image_size,
            batch_size: self.optim.batch_size,
            views: traits(self.method, self.objective.target).views,
            data: self.data.clone(),
        }
    }

    /// What tables call the method.
    pub fn method_name(&self) -> &'static str {
        match (self.method, self.objective.target) {
            (Method::QbHeat, Target::Latent) => LATENT,
            (method, _) => method.name(),
        }
    }

    /// As text, complete.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration is valid TOML")
    }

    /// Fills in what depends on the machine or on other keys, and checks every value.
    pub fn resolve(&mut self) -> Result<()> {
        self.base.resolve(EncoderSpec::default_stride)?;
        let decoder = &self.qb_heat.decoder;
        require(
            decoder.heads > 0,
            "qb_heat.decoder.heads",
            decoder.heads,
            "at least 1",
        )?;
        require(
            decoder.width > 0
                && decoder.width.is_multiple_of(4)
                && decoder.width.is_multiple_of(decoder.heads),
            "qb_heat.decoder.width",
            decoder.width,
            "a multiple of 4 and of qb_heat.decoder.heads",
        )?;
        require(
            self.qb_heat.visible_weight >= 0.0 && self.qb_heat.visible_weight.is_finite(),
            "qb_heat.visible_weight",
            self.qb_heat.visible_weight,
            "a number from 0 up",
        )?;
        self.objective.check()?;
        require(
            self.method == Method::QbHeat || self.objective.target == Target::Pixels,
            "objective.target",
            "latent",
            &format!("pixels where the method is {}", self.method.name()),
        )?;
        self.supervised.check()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(settings: &[&str]) -> Result<Config> {
        let settings: Result<Vec<_>> = settings.iter().map(|s| parse_setting(s)).collect();
        Config::load(None, &settings?)
    }

    fn message(settings: &[&str]) -> String {
        load(settings).unwrap_err().to_string()
    }

    #[test]
    fn a_resolved_configuration_survives_the_way_through_its_file() {
        let config = load(&["image_size=32", "optim.learning_rate=1", "encoder.init=7"]).unwrap();
        assert_eq!(config.encoder.stride, 4);
        assert_eq!(config.encoder.init, std::path::absolute("7").unwrap());
        let back: Config = toml::from_str(&config.to_toml()).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn a_misspelt_key_is_named_with_the_nearest_valid_one() {
        let text = message(&["optim.epoch=3"]);
        assert!(
            text.contains("`optim.epoch`") && text.contains("`optim.epochs`"),
            "{text}"
        );
        let text = message(&["qbheat.propagator=signed"]);
        assert!(text.contains("`qb_heat`"), "{text}");
    }

    #[test]
    fn a_misspelt_value_is_named_with_the_nearest_valid_one() {
        let text = message(&["qb_heat.propagator=sined"]);
        assert!(
            text.contains("qb_heat.propagator") && text.contains("`signed`"),
            "{text}"
        );
        let text = message(&["encoder.name=mobilnet-tiny"]);
        assert!(text.contains("`mobilenet-tiny`"), "{text}");
    }

    #[test]
    fn a_wrong_type_or_range_names_the_key() {
        for (setting, expected) in [
            ("optim.epochs=many", "whole number"),
            ("optim.epochs=-1", "whole number"),
            ("optim.batch_size=0", "at least"),
            ("image_size=60", "twice the stride"),
            ("image_size=[64, 90]", "64x96 say"),
            ("image_size=-64", "whole number of pixels"),
            ("image_size=64x", "whole number of pixels"),
            ("image_size=0", "from 1 to"),
            ("image_size=[64, 0]", "from 1 to"),
            ("encoder.stride=16", "strides of mobilenet-tiny"),
            ("optim.betas=0.9", "list of 2"),
            ("qb_heat.normalise_patches=1", "true or false"),
            ("data.channels=2", "1 for luma or 3 for RGB"),
            ("data.jitter=[0.4, 0.4, 0.4, 0.6]", "hue from 0 to 0.5"),
            ("method=moco", "`moco-v2`"),
            ("data.background=[0,0,256]", "from 0 to 255"),
        ] {
            let key = setting.split('=').next().unwrap();
            let text = message(&[setting]);
            assert!(
                text.contains(key) && text.contains(expected),
                "{setting}: {text}"
            );
        }
    }

    #[test]
    fn every_method_has_a_preset_that_settings_win_over() {
        let moco = load(&["method=moco-v2"]).unwrap();
        assert_eq!(moco.data.crop_scale, [0.2, 1.0]);
        assert_eq!(moco.data.jitter, [0.4, 0.4, 0.4, 0.1]);
        let own = load(&["method=moco-v2", "data.grey=0"]).unwrap();
        assert_eq!((own.data.grey, own.data.blur), (0.0, 0.5));
        load(&["method=supervised"]).unwrap();
        let latent = load(&["objective.target=latent"]).unwrap();
        assert_eq!(latent.run.rank_floor, 3.0);
        let text = message(&["method=supervised", "objective.target=latent"]);
        assert!(text.contains("objective.target"), "{text}");
        let text = message(&["method=moco-v2", "optim.batch_size=6"]);
        assert!(text.contains("moco.sub_batches"), "{text}");
    }

    #[test]
    fn mutated_files_are_read_or_refused() {
        let whole = load(&[]).unwrap().to_toml().into_bytes();
        let corpus = [
            whole,
            b"seed = 3\n[optim]\nepochs = 2\nbetas = [0.9, 0.99]\n".to_vec(),
        ];
        let file = tempfile::NamedTempFile::new().unwrap();
        crate::fuzz::survives(&corpus, 2_000, |bytes| {
            std::fs::write(&file, bytes).unwrap();
            let _ = Config::load(Some(file.path()), &[]);
        });
    }
}
