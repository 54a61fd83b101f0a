//! A run's configuration: defaults, overridden by the method's preset, a TOML file and `key=value` settings in that
//! order; checked here once.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::baseline::{MoCoConfig, SupervisedConfig};
use crate::data::{DataConfig, ImageSize, LoaderConfig, SplitChoice};
use crate::device::Compute;
use crate::encoder;
use crate::error::{Error, Result, nearest};
use crate::heat::{Parametrisation, Place, QbHeatConfig};
use crate::latent::{ObjectiveConfig, Target};
use crate::pretrain::traits;
use crate::train::{OptimConfig, RunConfig, Schedule};
use crate::weights::ImageForm;

/// Everything a pre-training run depends on; stored complete as `config.toml` in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Decides all that is random.
    pub seed: u64,
    /// Threads of the training step; 0 takes all cores.
    pub threads: usize,
    /// What computes: `cpu`, `wgpu` or `cuda[:N]`.
    pub device: Compute,
    /// Computes with the fused operations of `qbheat-kernels`, where the device has them; without, with Burn's own.
    pub kernels: bool,
    /// Size in pixels of the images the network sees: a side, or `[height, width]`.
    pub image_size: ImageSize,
    /// The pre-training method.
    pub method: Method,
    /// Where images come from and how they are prepared.
    pub data: DataConfig,
    /// The network to pre-train.
    pub encoder: EncoderConfig,
    /// QB-Heat's own choices.
    pub qb_heat: QbHeatConfig,
    /// What QB-Heat predicts.
    pub objective: ObjectiveConfig,
    /// MoCo-v2's own choices.
    pub moco: MoCoConfig,
    /// Those of supervised pre-training.
    pub supervised: SupervisedConfig,
    /// How weights are updated.
    pub optim: OptimConfig,
    /// What is kept and watched along the way.
    pub run: RunConfig,
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
}

/// What tables call QB-Heat with [`Target::Latent`].
pub const LATENT: &str = "qb-heat-latent";

/// Which encoder, at which stride, from which weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncoderConfig {
    /// A name from [`encoder::all`].
    pub name: String,
    /// Image pixels per position of the feature map; 0 chooses the one that gives an 8×8 map.
    pub stride: usize,
    /// A run folder or an `encoder.safetensors` to start from; empty for fresh weights.
    pub init: PathBuf,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            name: "mobilenet-tiny".to_owned(),
            stride: 0,
            init: PathBuf::new(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 0,
            threads: 0,
            device: Compute::Cpu,
            kernels: true,
            image_size: ImageSize::square(64),
            method: Method::QbHeat,
            data: DataConfig::default(),
            encoder: EncoderConfig::default(),
            qb_heat: QbHeatConfig::default(),
            objective: ObjectiveConfig::default(),
            moco: MoCoConfig::default(),
            supervised: SupervisedConfig::default(),
            optim: OptimConfig::default(),
            run: RunConfig::default(),
        }
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
        let layer: Option<Table> = file.map(|path| read_toml(path, "--config")).transpose()?;
        let layered = |preset: &str| {
            let mut table = Table::try_from(Self::default()).expect("the defaults are valid TOML");
            let preset = preset.parse().expect("a preset is valid TOML");
            merge(&mut table, preset, "").expect("a preset has keys of the configuration");
            if let (Some(layer), Some(path)) = (&layer, file) {
                merge(&mut table, layer.clone(), "").map_err(|error| Error::Config {
                    path: path.to_owned(),
                    message: error.to_string(),
                })?;
            }
            for (key, value) in settings {
                set(&mut table, key, value)?;
            }
            check_choices(&table)?;
            Ok::<_, Error>(table)
        };
        // Which preset there is follows from the other layers.
        let table = layered("")?;
        let checked = "the choices were checked";
        let method = table["method"].clone().try_into().expect(checked);
        let target = table["objective"]["target"].clone();
        let target = target.try_into().expect(checked);
        let table = layered(traits(method, target).preset)?;
        let mut config: Self = table.try_into().map_err(|error| Error::Value {
            key: "configuration".into(),
            value: "…".into(),
            expected: format!("{error}"),
        })?;
        config.resolve()?;
        Ok(config)
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

    /// The images that the network sees.
    pub fn images(&self) -> ImageForm {
        ImageForm {
            size: self.image_size,
            channels: self.data.channels,
            stride: self.encoder.stride,
        }
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
        if self.threads == 0 {
            self.threads = std::thread::available_parallelism().map_or(1, usize::from);
        }
        // A later command may be given in another folder.
        for path in [&mut self.data.path, &mut self.encoder.init] {
            make_absolute(path)?;
        }
        let encoder = encoder::find(&self.encoder.name)?;
        if self.encoder.stride == 0 {
            self.encoder.stride = encoder.default_stride(self.image_size.shorter());
        }
        encoder.check_stride(self.encoder.stride)?;
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
        self.data.check()?;
        self.optim.check()?;
        let longest_warmup = self.optim.epochs as f64 / 10.0;
        self.optim.warmup_epochs = self.optim.warmup_epochs.min(longest_warmup);
        self.run.check()
    }
}

/// Names of what is inside the program stay as they are.
fn make_absolute(path: &mut PathBuf) -> Result<()> {
    let is_name = path
        .to_str()
        .is_some_and(|text| text.is_empty() || text.starts_with("builtin:"));
    if !is_name {
        *path = std::path::absolute(&*path).map_err(Error::io(path))?;
    }
    Ok(())
}

/// An error that names the key unless `holds`.
pub(crate) fn require(
    holds: bool,
    key: &str,
    value: impl std::fmt::Display,
    expected: &str,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Value {
        key: key.to_owned(),
        value: value.to_string(),
        expected: expected.to_owned(),
    })
}

/// Splits `key=value`.
pub fn parse_setting(text: &str) -> Result<(String, String)> {
    text.split_once('=')
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .ok_or_else(|| Error::Setting(text.to_owned()))
}

/// A TOML file; `flag` says where its path was given.
pub(crate) fn read_toml<T: DeserializeOwned>(path: &Path, flag: &'static str) -> Result<T> {
    let at = |message: String| Error::Config {
        path: path.to_owned(),
        message,
    };
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::Missing {
            path: path.to_owned(),
            flag,
        },
        _ => at(error.to_string()),
    })?;
    toml::from_str(&text).map_err(|error| at(error.to_string()))
}

fn merge(base: &mut Table, layer: Table, prefix: &str) -> Result<()> {
    for (name, value) in layer {
        let key = format!("{prefix}{name}");
        let Some(old) = base.get_mut(&name) else {
            let known = base.keys().map(|known| format!("{prefix}{known}"));
            return Err(Error::Unknown {
                what: "key",
                nearest: nearest(&key, known),
                given: key,
            });
        };
        match (old, value) {
            (Value::Table(old), Value::Table(value)) => merge(old, value, &format!("{key}."))?,
            (old, value) => *old = convert(&key, old, value)?,
        }
    }
    Ok(())
}

fn set(table: &mut Table, key: &str, text: &str) -> Result<()> {
    let parts: Vec<&str> = key.split('.').collect();
    // A name or path that looks like a number is still a name.
    let innermost = if expects_text(table, &parts) {
        Value::String(text.to_owned())
    } else {
        parse_value(text)
    };
    let nested = parts.iter().rev().fold(innermost, |value, part| {
        Value::Table(Table::from_iter([((*part).to_owned(), value)]))
    });
    let Value::Table(layer) = nested else {
        unreachable!("a key has at least one part")
    };
    merge(table, layer, "")
}

fn expects_text(table: &Table, parts: &[&str]) -> bool {
    let mut value = table.get(parts[0]);
    for part in &parts[1..] {
        value = value.and_then(|value| value.get(part));
    }
    matches!(value, Some(Value::String(_)))
}

fn parse_value(text: &str) -> Value {
    format!("value = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn convert(key: &str, old: &Value, new: Value) -> Result<Value> {
    if key == "image_size" {
        return match ImageSize::deserialize(new.clone()) {
            Ok(_) => Ok(new),
            Err(_) => Err(Error::Value {
                key: key.to_owned(),
                value: new.to_string(),
                expected: "a whole number of pixels, or [height, width]".into(),
            }),
        };
    }
    match (old, new) {
        (Value::Float(_), Value::Integer(number)) => Ok(Value::Float(number as f64)),
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            let converted = old.iter().zip(new).map(|(old, new)| convert(key, old, new));
            Ok(Value::Array(converted.collect::<Result<_>>()?))
        }
        (Value::Array(old), new) => Err(Error::Value {
            key: key.to_owned(),
            value: new.to_string(),
            expected: format!("a list of {} values", old.len()),
        }),
        (Value::Integer(_), Value::Integer(number)) if number < 0 => Err(Error::Value {
            key: key.to_owned(),
            value: number.to_string(),
            expected: "a whole number from 0 up".into(),
        }),
        (old, new) if old.same_type(&new) => Ok(new),
        (old, new) => Err(Error::Value {
            key: key.to_owned(),
            value: new.to_string(),
            expected: match old {
                Value::Integer(_) => "a whole number from 0 up".into(),
                Value::Float(_) => "a number".into(),
                Value::Boolean(_) => "true or false".into(),
                Value::Table(_) => "a section of keys".into(),
                _ => "text".into(),
            },
        }),
    }
}

fn check_choices(table: &Table) -> Result<()> {
    use Parametrisation::*;
    let choices = [
        ("method", names(&Method::ALL)),
        ("objective.target", names(&[Target::Pixels, Target::Latent])),
        ("data.split", names(&[SplitChoice::Own, SplitChoice::Drawn])),
        ("qb_heat.visible", names(&[Place::Corner, Place::Anywhere])),
        (
            "qb_heat.propagator",
            names(&[Signed, Separate, Exponential, NormLinear]),
        ),
        (
            "optim.schedule",
            names(&[Schedule::Cosine, Schedule::Constant]),
        ),
    ];
    for (key, allowed) in choices {
        let mut value = &Value::Table(table.clone());
        for part in key.split('.') {
            value = &value[part];
        }
        let given = value.as_str().unwrap_or_default();
        if !allowed.iter().any(|name| name == given) {
            return Err(Error::Value {
                key: key.to_owned(),
                value: given.to_owned(),
                expected: format!(
                    "one of {}{}",
                    allowed.join(", "),
                    nearest(given, &allowed)
                        .map(|name| format!("; did you mean `{name}`?"))
                        .unwrap_or_default()
                ),
            });
        }
    }
    Ok(())
}

fn names<T: Serialize>(variants: &[T]) -> Vec<String> {
    variants
        .iter()
        .filter_map(|variant| Value::try_from(variant).ok()?.as_str().map(str::to_owned))
        .collect()
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
