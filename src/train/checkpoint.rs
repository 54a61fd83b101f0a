//! Checkpoints: folders whose manifest, written last, says what must be in them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::durable::{SCRATCH, create_folder, remove_folder, rename_durably};
use super::{AdamW, AdamWConfig, TrainState, write_durably};
use crate::error::{Error, Result};
use crate::nn::StateDict;
use crate::observe::Observer;

const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "step-";

/// Where a run stands. All random numbers are functions of the seed and of this position, so there is no other random
/// state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Steps taken.
    pub step: u64,
    /// Steps an epoch has; together with `step` the place in the data.
    pub steps_per_epoch: u64,
    /// The run's seed.
    pub seed: u64,
    /// Length of `events.jsonl` when the checkpoint was written.
    pub events_bytes: u64,
    /// Fingerprint of the index of the images; empty in checkpoints older than indices.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub data: String,
}

impl Position {
    fn blake3(&self) -> String {
        let text = serde_json::to_vec(self).expect("a position is valid JSON");
        FileRecord::of(&text).blake3
    }
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    format: u32,
    position: Position,
    /// Guards the position, as the records below guard the files.
    position_blake3: String,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct FileRecord {
    bytes: u64,
    blake3: String,
}

impl FileRecord {
    fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            blake3: blake3::hash(bytes).to_hex().to_string(),
        }
    }
}

/// A checkpoint whose files were read and verified.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where the run stood.
    pub position: Position,
    /// All tensors of the network.
    pub model: StateDict,
    optimizer: StateDict,
    path: PathBuf,
}

impl Checkpoint {
    /// Puts the checkpoint into a network of the same architecture.
    pub fn restore<M: Module>(
        &self,
        model: M,
        optimizer: AdamWConfig,
        device: &Device,
    ) -> Result<TrainState<M>> {
        let named = |source| Error::Weights {
            path: self.path.clone(),
            source,
        };
        let step = self.position.step;
        Ok(TrainState {
            model: self.model.load_into(model).map_err(named)?,
            optimizer: AdamW::restore(optimizer, step, &self.optimizer, &device.clone().inner())
                .map_err(named)?,
            step,
        })
    }
}

/// The checkpoints of one run.
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// In `folder`, which may not exist yet, of which the newest `keep` stay.
    pub fn new(folder: PathBuf, keep: usize) -> Self {
        Self { folder, keep }
    }

    /// Whether none was ever completed.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.newest_first()?.is_empty())
    }

    /// Writes a checkpoint; when this returns it is on the disk. Older ones beyond the number to keep go.
    pub fn save<M: Module>(&self, state: &TrainState<M>, position: Position) -> Result<()> {
        let scratch = self.folder.join(format!("{SCRATCH}{:09}", position.step));
        let target = self.folder.join(format!("{PREFIX}{:09}", position.step));
        remove_folder(&scratch)?;
        create_folder(&scratch)?;
        let mut files = BTreeMap::new();
        for (name, tensors) in [
            (MODEL, StateDict::of(&state.model)),
            (OPTIMIZER, state.optimizer.state()),
        ] {
            let path = scratch.join(name);
            let bytes = tensors.to_bytes("").map_err(|source| Error::Weights {
                path: path.clone(),
                source,
            })?;
            write_durably(&path, &bytes)?;
            files.insert(name.to_owned(), FileRecord::of(&bytes));
        }
        let manifest = Manifest {
            format: FORMAT,
            position_blake3: position.blake3(),
            position,
            files,
        };
        let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is valid JSON");
        write_durably(&scratch.join(MANIFEST), &text)?;
        // Only a damaged checkpoint is ever in the way: a resume starts from the newest one that verifies.
        remove_folder(&target)?;
        rename_durably(&scratch, &target)?;
        self.clean_up(&target);
        Ok(())
    }

    /// The newest checkpoint that verifies; people are told what was wrong with newer ones.
    pub fn newest_valid(&self, observer: &dyn Observer) -> Result<Checkpoint> {
        let mut problems = Vec::new();
        for path in self.newest_first()? {
            match read(&path) {
                Ok(checkpoint) => {
                    for problem in &problems {
                        observer.note(&format!("passed over a checkpoint: {problem}"));
                    }
                    return Ok(checkpoint);
                }
                Err(problem) => problems.push(format!("{}: {problem}", path.display())),
            }
        }
        Err(Error::NoCheckpoint {
            path: self.folder.clone(),
            problems: problems.iter().map(|p| format!("\n  {p}")).collect(),
        })
    }

    fn newest_first(&self) -> Result<Vec<PathBuf>> {
        let mut found = self.entries(PREFIX)?;
        // Steps have nine digits, so names sort as numbers do.
        found.sort_unstable_by(|a, b| b.cmp(a));
        Ok(found)
    }

    /// What cannot be listed is an error: taken for nothing, it would be trained over.
    fn entries(&self, prefix: &str) -> Result<Vec<PathBuf>> {
        let list = || -> std::io::Result<Vec<PathBuf>> {
            fs::read_dir(&self.folder)?
                .map(|entry| Ok(entry?.path()))
                .collect()
        };
        let mut found = match list() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            listed => listed.map_err(Error::io(&self.folder))?,
        };
        let begins = |path: &Path| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with(prefix)
        };
        found.retain(|path| begins(path));
        Ok(found)
    }

    /// A failed deletion costs disk space, not the run: it is tried again after the next checkpoint.
    fn clean_up(&self, saved: &Path) {
        // Whoever saves below other checkpoints went on without them: they would outlive all that is sound.
        let (Ok(found), Ok(scratch)) = (self.newest_first(), self.entries(SCRATCH)) else {
            return;
        };
        let abandoned = found.partition_point(|path| path.as_path() > saved);
        let (abandoned, kept) = found.split_at(abandoned);
        let old = kept.iter().skip(self.keep);
        for path in abandoned.iter().chain(old).chain(&scratch) {
            let _ = remove_folder(path);
        }
    }
}

fn read(path: &Path) -> Result<Checkpoint, String> {
    let load = |name: &str| {
        fs::read(path.join(name)).map_err(|error| format!("{name} cannot be read ({error})"))
    };
    let manifest: Manifest = serde_json::from_slice(&load(MANIFEST)?)
        .map_err(|error| format!("{MANIFEST} is damaged ({error})"))?;
    if manifest.format != FORMAT {
        return Err(format!(
            "{MANIFEST} has format {}, this program reads {FORMAT}",
            manifest.format
        ));
    }
    if manifest.position.blake3() != manifest.position_blake3 {
        return Err(format!(
            "{MANIFEST} is damaged (its position is not what its hash says)"
        ));
    }
    let verified = |name: &str| {
        let record = manifest
            .files
            .get(name)
            .ok_or_else(|| format!("{MANIFEST} does not mention {name}"))?;
        let bytes = load(name)?;
        if FileRecord::of(&bytes) != *record {
            return Err(format!(
                "{name} is damaged (its hash is not the manifest's)"
            ));
        }
        let (tensors, _) =
            StateDict::from_bytes(&bytes).map_err(|error| format!("{name}: {error}"))?;
        Ok(tensors)
    };
    Ok(Checkpoint {
        model: verified(MODEL)?,
        optimizer: verified(OPTIMIZER)?,
        position: manifest.position,
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, Linear};
    use crate::observe::{Notes, Silent};

    const OPTIMIZER: AdamWConfig = AdamWConfig {
        betas: [0.9, 0.95],
        weight_decay: 0.0,
        clip_norm: 0.0,
        encoder_rate: 1.0,
    };

    fn save(checkpoints: &Checkpoints, step: u64) -> TrainState<Linear> {
        let state = TrainState {
            model: Init::new(0, &crate::device().autodiff()).linear(3, 2),
            optimizer: AdamW::new(OPTIMIZER),
            step,
        };
        let position = Position {
            step,
            steps_per_epoch: 1,
            seed: 0,
            events_bytes: 0,
            data: String::new(),
        };
        checkpoints.save(&state, position).unwrap();
        state
    }

    #[test]
    fn what_a_run_went_on_without_makes_room_for_its_newest_save() {
        let home = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(home.path().to_owned(), 1);
        save(&checkpoints, 1000);
        let damaged = checkpoints.newest_first().unwrap().remove(0);
        fs::write(damaged.join(MANIFEST), "{}").unwrap();
        save(&checkpoints, 525);
        let notes = Notes::default();
        let checkpoint = checkpoints.newest_valid(&notes).unwrap();
        let notes = notes.so_far();
        assert_eq!((checkpoint.position.step, notes.len()), (525, 0));
        assert_eq!(checkpoints.newest_first().unwrap(), [checkpoint.path]);
    }

    #[test]
    fn a_checkpoint_of_format_1_loads_for_ever() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/checkpoint-format-1"
        );
        let checkpoints = Checkpoints::new(folder.into(), 1);
        let problems = Notes::default();
        let checkpoint = checkpoints.newest_valid(&problems).unwrap();
        assert!(problems.so_far().is_empty());
        assert_eq!(
            checkpoint.position,
            Position {
                step: 5,
                steps_per_epoch: 2,
                seed: 7,
                events_bytes: 123,
                data: "ab".into(),
            }
        );
        let device = crate::device().autodiff();
        let fresh = Init::new(0, &device).linear(3, 2);
        let state = checkpoint.restore(fresh, OPTIMIZER, &device).unwrap();
        let weights = StateDict::of(&state.model);
        assert_eq!(
            weights.0["weight"].values,
            [0.0, 0.125, 0.25, 0.375, 0.5, 0.625]
        );
        assert_eq!(weights.0["bias"].values, [-1.0, 2.0]);
        let moments = state.optimizer.state();
        assert_eq!(moments.0["first_moment.bias"].values, [-0.25, 0.5]);
        assert_eq!(moments.0["second_moment.bias"].values, [1.0, 4.0]);
        assert_eq!(state.step, 5);
    }

    #[test]
    fn mutated_checkpoints_are_read_or_refused() {
        let home = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(home.path().to_owned(), 1);
        let device = crate::device().autodiff();
        let state = save(&checkpoints, 1);
        let folder = checkpoints.newest_first().unwrap().remove(0);
        for file in [MANIFEST, MODEL] {
            let path = folder.join(file);
            let whole = fs::read(&path).unwrap();
            crate::fuzz::survives(std::slice::from_ref(&whole), 1_000, |bytes| {
                // The hash catches nearly all of it, so tensors are also read for themselves.
                let _ = StateDict::from_bytes(bytes);
                fs::write(&path, bytes).unwrap();
                if let Ok(checkpoint) = checkpoints.newest_valid(&Silent) {
                    let restored = checkpoint.restore(state.model.clone(), OPTIMIZER, &device);
                    assert!(restored.is_ok());
                }
            });
            fs::write(&path, whole).unwrap();
        }
    }
}
