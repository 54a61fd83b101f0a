//! From a study file to cells, each with a complete configuration.

use toml::{Table, Value};

use super::{StudyFile, twice};
use crate::config::{Config, LATENT, Method, OF_PROCESS};
use crate::error::{Error, Result};
use crate::probe::{Protocol, Task, UNTRAINED, file_name};

/// Keys of `[set.NAME]` that are not settings.
const OWN_KEYS: [&str; 4] = ["method", "seeds", "encoders", "labels"];
/// Settings that a study makes itself.
const OF_STUDY: [&str; 3] = ["seed", "encoder.name", "data.path"];
/// Settings that decide which images are scored, and how large: methods that differ in them could not be compared.
const OF_ENCODERS: [&str; 3] = ["image_size", "data.split", "data.held_out"];

/// One cell to be run.
#[derive(Clone, Debug)]
pub struct PlannedCell {
    /// As the study calls it.
    pub method: String,
    /// The configuration; where the study counts minutes, its epochs are still to be found.
    pub config: Config,
    /// How it is scored.
    pub tasks: Vec<Task>,
    /// Whether nothing is trained.
    pub untrained: bool,
}

impl PlannedCell {
    /// Its name, also as part of a path.
    pub fn name(&self) -> String {
        format!("{}.seed{}", self.kind(), self.config.seed)
    }

    /// Its name without the seed.
    pub(super) fn kind(&self) -> String {
        format!("{}.{}", file_name(&self.method), self.config.encoder.name)
    }
}

/// All cells of a study, in the order in which they are run: seed by seed, so that an early stop leaves whole columns.
pub struct Plan {
    /// The cells.
    pub cells: Vec<PlannedCell>,
}

impl Plan {
    /// Resolves a study file; `common` are settings of the command line, which hold for all cells.
    pub fn new(file: &StudyFile, common: &[(String, String)]) -> Result<Self> {
        let mut cells: Vec<PlannedCell> = Vec::new();
        for &seed in &file.seeds {
            for encoder in &file.encoders {
                for method in &file.methods {
                    if !file.has(method, encoder, seed)? {
                        continue;
                    }
                    let cell = file.cell(method, encoder, seed, common)?;
                    if let Some(other) = cells.iter().find(|other| other.name() == cell.name()) {
                        return Err(Error::Refused(format!(
                            "methods `{}` and `{method}` would both be called {}; rename one",
                            other.method,
                            cell.name()
                        )));
                    }
                    cells.push(cell);
                }
            }
        }
        Ok(Self { cells })
    }
}

impl StudyFile {
    fn own(&self, name: &str, key: &str) -> Option<&Value> {
        self.set.get(name)?.get(key)
    }

    /// Whether the study has this combination.
    fn has(&self, method: &str, encoder: &str, seed: u64) -> Result<bool> {
        let mut has = true;
        for name in [method, encoder] {
            has &= is_among(&self.set, name, "seeds", &self.seeds, &seed)?;
        }
        let encoder = encoder.to_owned();
        Ok(has && is_among(&self.set, method, "encoders", &self.encoders, &encoder)?)
    }

    fn cell(
        &self,
        method: &str,
        encoder: &str,
        seed: u64,
        common: &[(String, String)],
    ) -> Result<PlannedCell> {
        let known = || {
            Method::ALL
                .map(Method::name)
                .into_iter()
                .chain([LATENT, UNTRAINED])
        };
        let base: String = match self.own(method, "method") {
            Some(_) if known().any(|name| name == method) => {
                return Err(Error::Refused(format!(
                    "[set.{method}] method: {method} is a method itself; give the row a name of its own"
                )));
            }
            Some(base) => read(method, "method", base)?,
            None => method.to_owned(),
        };
        let mut settings: Vec<(String, String)> = match base.as_str() {
            // Whatever the method would be: only encoder and images matter.
            UNTRAINED => Vec::new(),
            LATENT => vec![("objective.target".into(), "latent".into())],
            name if Method::ALL.iter().any(|known| known.name() == name) => {
                vec![("method".into(), name.into())]
            }
            _ => {
                let unknown = Error::unknown("method", base, known());
                return Err(Error::Refused(format!(
                    "{unknown}; for a name of your own say [set.NAME] method = \"…\""
                )));
            }
        };
        let mut add = |key: &str, value: String| settings.push((key.into(), value));
        add("data.path", self.data.display().to_string());
        add("encoder.name", encoder.to_owned());
        add("encoder.stride", self.stride.to_string());
        add("image_size", self.image_size.to_toml());
        add("optim.batch_size", self.batch_size.to_string());
        add("seed", seed.to_string());
        if let Some(epochs) = self.epochs {
            add("optim.epochs", epochs.to_string());
        }
        let of_study = |key: &str| {
            let of_length = key == "optim.epochs" && self.minutes.is_some();
            OF_STUDY.contains(&key) || OF_PROCESS.contains(&key) || of_length
        };
        settings.extend(own_settings(&self.set, encoder, &OWN_KEYS, of_study)?);
        let of_method = own_settings(&self.set, method, &OWN_KEYS, of_study)?;
        let of_encoder = |(key, _): &&(String, String)| OF_ENCODERS.contains(&key.as_str());
        if let Some((key, _)) = of_method.iter().find(of_encoder) {
            return Err(Error::Refused(format!(
                "[set.{method}] {key}: methods that differ in it cannot be compared; give it to all, in [set.{encoder}]"
            )));
        }
        settings.extend(of_method);
        settings.extend_from_slice(common);
        let labels = match chosen(&self.set, method, "labels", &self.labels)? {
            Some(labels) => Some(labels),
            None => chosen(&self.set, encoder, "labels", &self.labels)?,
        };
        Ok(PlannedCell {
            method: method.to_owned(),
            config: Config::load(None, &settings)?,
            tasks: tasks(
                &self.protocols,
                &labels.unwrap_or_else(|| self.labels.clone()),
            ),
            untrained: base == UNTRAINED,
        })
    }
}

/// Linear and tran-1 with each share of the labels, the others with all.
fn tasks(protocols: &[Protocol], labels: &[f64]) -> Vec<Task> {
    let mut tasks = Vec::new();
    for &protocol in protocols {
        match protocol {
            Protocol::Linear | Protocol::Tran1 => {
                tasks.extend(labels.iter().map(|&labels| Task { protocol, labels }));
            }
            _ => tasks.push(Task {
                protocol,
                labels: 1.0,
            }),
        }
    }
    tasks
}

fn read<T: serde::de::DeserializeOwned>(name: &str, key: &str, value: &Value) -> Result<T> {
    value.clone().try_into().map_err(|error| Error::Value {
        key: format!("set.{name}.{key}"),
        value: value.to_string(),
        expected: error.to_string().trim().to_owned(),
    })
}

/// Whether `[set.NAME]` leaves `wanted` in; what it lists must be of the study's own.
pub(super) fn is_among<T>(set: &Table, name: &str, key: &str, all: &[T], wanted: &T) -> Result<bool>
where
    T: serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let chosen = chosen(set, name, key, all)?;
    Ok(chosen.is_none_or(|chosen| chosen.contains(wanted)))
}

/// What `[set.NAME]` lists under `key`, where it does: some of the study's own, each once.
fn chosen<T>(set: &Table, name: &str, key: &str, all: &[T]) -> Result<Option<Vec<T>>>
where
    T: serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Some(list) = set.get(name).and_then(|own| own.get(key)) else {
        return Ok(None);
    };
    let chosen: Vec<T> = read(name, key, list)?;
    let foreign = chosen.iter().find(|one| !all.contains(one));
    let wrong = foreign.map(|one| format!("{one:?}"));
    match wrong.or_else(|| twice(&chosen)) {
        Some(value) => Err(Error::Value {
            key: format!("set.{name}.{key}"),
            value,
            expected: format!("some of the study's {key}, {all:?}, each once"),
        }),
        None => Ok(Some(chosen)),
    }
}

/// The settings of `[set.NAME]`, without the keys in `own`, which are none; refused where the key of one is `of_study`.
pub(super) fn own_settings(
    set: &Table,
    name: &str,
    own: &[&str],
    of_study: impl Fn(&str) -> bool,
) -> Result<Vec<(String, String)>> {
    let mut settings = Vec::new();
    if let Some(Value::Table(table)) = set.get(name) {
        flatten(table, "", own, &mut settings);
    }
    if let Some((key, _)) = settings.iter().find(|(key, _)| of_study(key)) {
        let reason = if OF_PROCESS.contains(&key.as_str()) {
            "that holds for all that one command does; give it --threads, --device or the variable QBHEAT_KERNELS"
        } else {
            "that is the study's own to say, for all cells"
        };
        return Err(Error::Refused(format!("[set.{name}] {key}: {reason}")));
    }
    Ok(settings)
}

/// Nested tables to pairs of dotted key and value, without the keys in `own`, which are no settings.
fn flatten(table: &Table, prefix: &str, own: &[&str], into: &mut Vec<(String, String)>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        match value {
            _ if own.contains(&key.as_str()) => {}
            Value::Table(inner) => flatten(inner, &format!("{key}."), own, into),
            Value::String(text) => into.push((key, text.clone())),
            other => into.push((key, other.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<Plan> {
        Plan::new(&toml::from_str(text).unwrap(), &[])
    }

    #[test]
    fn names_sets_and_seeds_make_the_cells() {
        let plan = plan(
            r#"
            data = "x"
            epochs = 3
            encoders = ["mobilenet-tiny", "mf-tiny"]
            methods = ["qb-heat", "slow", "qb-heat-latent", "untrained"]
            seeds = [0, 1]
            [set.slow]
            method = "moco-v2"
            optim.learning_rate = 1e-4
            "data.crop_scale" = [0.5, 1.0]
            [set.mf-tiny]
            seeds = [0]
            "#,
        )
        .unwrap();
        assert_eq!(plan.cells.len(), 4 * 2 + 4);
        let slow = &plan.cells[1];
        assert_eq!(slow.name(), "slow.mobilenet-tiny.seed0");
        assert_eq!(slow.config.method, Method::MocoV2);
        assert_eq!(slow.config.optim.learning_rate, 1e-4);
        assert_eq!(slow.config.data.crop_scale, [0.5, 1.0]);
        assert_eq!(plan.cells[2].config.method_name(), LATENT);
    }

    #[test]
    fn labels_concern_linear_and_tran_1_only() {
        let made = tasks(&[Protocol::Knn, Protocol::Linear], &[1.0, 0.1]);
        let shares: Vec<f64> = made.iter().map(|task| task.labels).collect();
        assert_eq!(shares, [1.0, 1.0, 0.1]);
    }

    #[test]
    fn a_misspelt_method_is_named() {
        let text = r#"
            data = "x"
            epochs = 3
            encoders = ["mobilenet-tiny"]
            methods = ["moco-v3"]
        "#;
        let message = plan(text).err().unwrap().to_string();
        assert!(message.contains("`moco-v2`"), "{message}");
    }
}
