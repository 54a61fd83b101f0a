//! From a study file of detectors to cells, each with a complete configuration or the reason why it has none.

use toml::Value;

use super::DetectionFile;
use super::file::ALL;
use crate::config::{DetectConfig, DetectorConfig};
use crate::error::{Error, Result};
use crate::nn::StateDict;
use crate::probe::file_name;
use crate::study::plan::is_among;

/// One cell to be run.
pub(super) struct Planned {
    /// Name of its row.
    pub method: String,
    seed: u64,
    /// What it is run with, or why it cannot be.
    ready: Result<Ready, String>,
}

/// What a cell is run with.
pub(super) struct Ready {
    pub settings: Vec<(String, String)>,
    /// What these make; where the study counts minutes, its epochs are still to be found.
    pub config: DetectorConfig,
    /// Hash of the weights.
    pub weights: String,
}

impl Planned {
    /// Its name, also as part of a path.
    pub fn name(&self) -> String {
        format!("{}.seed{}", file_name(&self.method), self.seed)
    }

    pub fn ready(&self) -> Result<&Ready> {
        let ready = self.ready.as_ref();
        ready.map_err(|reason| Error::Refused(reason.clone()))
    }
}

/// What a row's weights give.
struct RowWeights {
    settings: Vec<(String, String)>,
    hash: String,
}

impl DetectionFile {
    /// All cells, seed by seed, so that an early stop leaves whole columns.
    pub(super) fn plan(&self, common: &[(String, String)]) -> Result<Vec<Planned>> {
        let origins = self.origins()?;
        let rows = self.rows().into_iter().map(|row| {
            let weights = self.open(&row);
            (row, weights)
        });
        let rows: Vec<_> = rows.collect();
        let mut cells: Vec<Planned> = Vec::new();
        for &seed in &self.seeds {
            for (row, weights) in &rows {
                if !is_among(&self.set, row, "seeds", &self.seeds, &seed)? {
                    continue;
                }
                let ready = match weights {
                    Ok(weights) => Ok(self.ready(row, seed, weights, &origins, common)?),
                    Err(reason) => Err(reason.clone()),
                };
                let cell = Planned {
                    method: row.clone(),
                    seed,
                    ready,
                };
                if let Some(other) = cells.iter().find(|other| other.name() == cell.name()) {
                    return Err(Error::Refused(format!(
                        "rows `{}` and `{row}` would both be called {}; rename one",
                        other.method,
                        cell.name()
                    )));
                }
                cells.push(cell);
            }
        }
        Ok(cells)
    }

    /// The weights of a row, or why there are none.
    fn open(&self, row: &str) -> Result<RowWeights, String> {
        let own = self.set.get(row).and_then(|own| own.get("weights"));
        let entry = own.and_then(Value::as_str).unwrap_or(row);
        let name = self.weights.get(entry).ok_or("not in [weights]")?;
        let because = |reason: String| format!("[weights] {entry} = {name:?}: {reason}");
        let (weights, settings) =
            DetectorConfig::settings_of_weights(name).map_err(|error| match error {
                Error::Missing { .. } => because("no such file or folder".into()),
                other => because(other.to_string()),
            })?;
        let bytes = StateDict::of(&weights.encoder).to_bytes("");
        let bytes = bytes.map_err(|error| because(error.to_string()))?;
        Ok(RowWeights {
            settings,
            hash: blake3::hash(&bytes).to_hex().to_string(),
        })
    }

    fn ready(
        &self,
        row: &str,
        seed: u64,
        weights: &RowWeights,
        origins: &DetectConfig,
        common: &[(String, String)],
    ) -> Result<Ready> {
        let mut settings = weights.settings.clone();
        settings.extend(origins.train.settings("detect.train"));
        settings.extend(origins.val.settings("detect.val"));
        let mut add = |key: &str, value: String| settings.push((key.to_owned(), value));
        add("image_size", self.image_size.to_toml());
        add("optim.batch_size", self.batch_size.to_string());
        add("seed", seed.to_string());
        if let Some(epochs) = self.epochs {
            add("optim.epochs", epochs.to_string());
        }
        settings.extend(self.own_settings(ALL)?);
        settings.extend(self.own_settings(row)?);
        settings.extend_from_slice(common);
        Ok(Ready {
            config: DetectorConfig::load(None, &settings)?,
            settings,
            weights: weights.hash.clone(),
        })
    }
}
