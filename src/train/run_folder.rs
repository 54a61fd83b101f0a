//! A run is a folder; any later command needs only that folder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::durable::{self, SCRATCH};
use super::{Checkpoints, write_durably};
use crate::error::{Error, Result};

/// The complete, resolved configuration.
pub const CONFIG_FILE: &str = "config.toml";
/// Names and sizes of the images that the run was started on.
pub const INDEX_FILE: &str = "index.jsonl";
/// What pre-training was for.
pub const ENCODER_FILE: &str = "encoder.safetensors";
/// Kind of the event that a log begins with: what needs no learning.
pub const BASELINE: &str = "baseline";
const EVENTS_FILE: &str = "events.jsonl";

const LOCK_FILE: &str = ".lock";

/// A run that no other process may write into.
#[derive(Debug)]
pub struct RunLock(#[allow(dead_code, reason = "dropping the file ends the lock")] File);

/// The folder of one run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// A new run with this configuration. A folder that holds something already is left as it is.
    pub fn create(path: &Path, config: &str) -> Result<Self> {
        Self::check_free(path)?;
        durable::create_folder(path)?;
        let run = Self {
            path: path.to_owned(),
        };
        run.write_config(config)?;
        Ok(run)
    }

    /// Whether a run can be made at `path`: there is nothing, or an empty folder.
    pub fn check_free(path: &Path) -> Result<()> {
        let path_buf = path.to_owned();
        if path.join(CONFIG_FILE).exists() {
            return Err(Error::RunExists { path: path_buf });
        }
        // What a process left that died while it wrote the configuration does not count.
        let is_something = |entry: std::io::Result<fs::DirEntry>| {
            entry.is_ok_and(|entry| !entry.file_name().to_string_lossy().starts_with(SCRATCH))
        };
        match fs::read_dir(path).map(|mut entries| entries.any(is_something)) {
            Ok(true) => Err(Error::NotEmpty { path: path_buf }),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(path)(error))
            }
            _ => Ok(()),
        }
    }

    /// A folder that may come to hold a run.
    pub(crate) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// An existing run.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::Missing {
                path: path.to_owned(),
                flag: "RUN",
            });
        }
        if !path.join(CONFIG_FILE).is_file() {
            return Err(Error::NotARun {
                path: path.to_owned(),
                missing: CONFIG_FILE,
            });
        }
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Keeps other processes from writing into the run for as long as the answer lives. A process that dies leaves no
    /// lock behind.
    pub fn lock(&self) -> Result<RunLock> {
        let path = self.file(LOCK_FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::RunBusy {
                path: self.path.clone(),
            }),
            Err(TryLockError::Error(error)) if error.kind() != ErrorKind::Unsupported => {
                Err(Error::io(&path)(error))
            }
            // Some network file systems have no locks; a run on them is as good as unlocked.
            _ => Ok(RunLock(file)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file or folder in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The configuration's text.
    pub fn config(&self) -> Result<String> {
        let path = self.file(CONFIG_FILE);
        fs::read_to_string(&path).map_err(Error::io(&path))
    }

    /// Replaces the configuration.
    pub fn write_config(&self, config: &str) -> Result<()> {
        write_durably(&self.file(CONFIG_FILE), config.as_bytes())
    }

    /// Its checkpoints, of which the newest `keep` stay.
    pub fn checkpoints(&self, keep: usize) -> Checkpoints {
        Checkpoints::new(self.file("checkpoints"), keep)
    }

    /// The log, cut to its first `bytes` bytes.
    pub fn events(&self, bytes: u64) -> Result<Events> {
        let path = self.file(EVENTS_FILE);
        let open = || -> std::io::Result<(File, u64)> {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)?;
            let bytes = bytes.min(file.metadata()?.len());
            file.set_len(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(Error::io(&path))?;
        Ok(Events { file, bytes, path })
    }

    /// What the log says of what needs no learning, if anything.
    pub fn baseline(&self) -> Result<Option<serde_json::Value>> {
        let mut events = self.read_events()?.into_iter();
        Ok(events.find(|event| event["kind"] == BASELINE))
    }

    /// The log's objects, one a line; a last line that is not whole is left out.
    pub fn read_events(&self) -> Result<Vec<serde_json::Value>> {
        let path = self.file(EVENTS_FILE);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other.map_err(Error::io(&path))?,
        };
        Ok(text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }
}

/// The log of a run: one JSON object a line.
pub struct Events {
    file: File,
    bytes: u64,
    path: PathBuf,
}

impl Events {
    /// Appends an object.
    pub fn append(&mut self, event: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(event).expect("events are valid JSON");
        line.push(b'\n');
        durable::write_all(&mut self.file, &line).map_err(Error::io(&self.path))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Waits until everything is on the disk; the length then.
    pub fn sync(&mut self) -> Result<u64> {
        durable::sync(&self.file).map_err(Error::io(&self.path))?;
        Ok(self.bytes)
    }
}
