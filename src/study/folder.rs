//! A study's folder: what is kept of its cells, and how those that are missing are run.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Cell;
use crate::error::{Error, Result};
use crate::train::{CONFIG_FILE, RunFolder, Surroundings, create_folder, write_durably};

/// Finished cells, one JSON file each; small enough to be kept with the results of a study.
const CELLS: &str = "cells";
/// Run folders.
const RUNS: &str = "runs";
/// Images a second of a training step, measured once.
const PACE: &str = "pace.json";

/// How a study stands.
pub struct StudyOutcome<C = Cell> {
    /// Cells with the scores they have so far, in the study's order.
    pub cells: Vec<C>,
    /// Cells that failed: name and reason.
    pub failed: Vec<(String, String)>,
    /// Whether it was stopped before its end.
    pub stopped: bool,
}

/// A study's folder, and what surrounds the runs in it. Cells are known by their names.
pub(super) struct StudyFolder<'a> {
    folder: RunFolder,
    pub around: &'a Surroundings<'a>,
}

impl<'a> StudyFolder<'a> {
    pub fn at(path: &Path, around: &'a Surroundings<'a>) -> Self {
        Self {
            folder: RunFolder::at(path),
            around,
        }
    }

    /// A file or folder in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.file(name)
    }

    /// What is kept of a cell.
    pub fn kept<C: DeserializeOwned>(&self, cell: &str) -> Result<Option<C>> {
        read_kept(&self.cell_file(cell))
    }

    /// Keeps what is known of a cell.
    pub fn keep(&self, cell: &str, known: &impl Serialize) -> Result<()> {
        write_kept(&self.cell_file(cell), known)
    }

    fn cell_file(&self, cell: &str) -> PathBuf {
        self.file(CELLS).join(format!("{cell}.json"))
    }

    /// Where a cell's run is, or is to be.
    pub fn run_of(&self, cell: &str) -> RunFolder {
        RunFolder::at(&self.file(RUNS).join(cell))
    }

    /// A cell's run, where it was begun.
    pub fn begun(&self, cell: &str) -> Option<RunFolder> {
        let run = self.run_of(cell);
        run.file(CONFIG_FILE).is_file().then_some(run)
    }

    /// Keeps what a cell's run is begun with, which the run does not say itself.
    pub fn begin_with(&self, cell: &str, given: &impl Serialize) -> Result<()> {
        write_kept(&self.given_file(cell), given)
    }

    /// What a cell's run was begun with; nothing where that was not kept.
    pub fn begun_with<G: DeserializeOwned>(&self, cell: &str) -> Result<Option<G>> {
        read_kept(&self.given_file(cell))
    }

    fn given_file(&self, cell: &str) -> PathBuf {
        self.file(RUNS).join(format!("{cell}.given.json"))
    }

    /// The epochs of every cell, or why it cannot be run, of which `check` finds some, without running any.
    pub fn lengths<P>(
        &self,
        cells: &[P],
        name: impl Fn(&P) -> String,
        check: impl Fn(&P) -> Result<()>,
        epochs: impl Fn(&P) -> Result<usize>,
    ) -> Result<Vec<(String, Result<usize>)>> {
        self.check_no_run()?;
        create_folder(self.folder.path())?;
        let _lock = self.folder.lock()?;
        let length = |cell| check(cell).and_then(|()| epochs(cell));
        let cells = cells.iter();
        Ok(cells.map(|cell| (name(cell), length(cell))).collect())
    }

    /// Refuses the folder of a run, whose report would be written over.
    fn check_no_run(&self) -> Result<()> {
        if !self.file(CONFIG_FILE).exists() {
            return Ok(());
        }
        Err(Error::RunExists {
            path: self.folder.path().to_owned(),
        })
    }

    /// Makes what is missing, cell by cell, until it is asked to stop; what `check` refuses is found before anything is
    /// made. A cell that fails does not keep the others from being made. After each cell `progress` is told how the study
    /// stands.
    pub fn run<P, C>(
        &self,
        cells: &[P],
        name: impl Fn(&P) -> String,
        check: impl Fn(&P) -> Result<()>,
        make: impl Fn(&P) -> Result<()>,
        kept: impl Fn(&P) -> Result<Option<C>>,
        mut progress: impl FnMut(&StudyOutcome<C>) -> Result<()>,
    ) -> Result<StudyOutcome<C>> {
        self.check_no_run()?;
        for folder in [CELLS, RUNS] {
            create_folder(&self.file(folder))?;
        }
        let _lock = self.folder.lock()?;
        for cell in cells {
            check(cell)?;
        }
        let Surroundings { observer, stop } = self.around;
        // Those that an earlier process made are among them, however far this one has come.
        let all_kept = || -> Result<Vec<C>> {
            let kept = cells.iter().filter_map(|cell| kept(cell).transpose());
            kept.collect()
        };
        let mut outcome = StudyOutcome {
            cells: all_kept()?,
            failed: Vec::new(),
            stopped: false,
        };
        for (i, cell) in cells.iter().enumerate() {
            // Scoring does not heed a signal; what follows it should.
            outcome.stopped |= stop();
            if outcome.stopped {
                break;
            }
            let name = name(cell);
            observer.note(&format!("cell {} of {}: {name}", i + 1, cells.len()));
            match make(cell) {
                Ok(()) => {}
                Err(Error::Stopped) => outcome.stopped = true,
                Err(error) => {
                    observer.note(&format!("{name} failed: {error}"));
                    outcome.failed.push((name, error.to_string()));
                }
            }
            outcome.cells = all_kept()?;
            progress(&outcome)?;
        }
        Ok(outcome)
    }

    /// The images a second that are known by this key, else those that are measured, which then are known.
    pub fn pace(&self, key: String, measure: impl FnOnce() -> Result<f64>) -> Result<f64> {
        let path = self.file(PACE);
        let mut known: BTreeMap<String, f64> = read_kept(&path)?.unwrap_or_default();
        if let Some(&pace) = known.get(&key) {
            return Ok(pace);
        }
        let pace = measure()?;
        known.insert(key, pace);
        write_kept(&path, &known)?;
        Ok(pace)
    }

    /// How many epochs of so many images, in batches of `batch`, come closest to so many minutes, at least one.
    pub fn epochs_in(
        &self,
        minutes: f64,
        pace: f64,
        [images, batch]: [usize; 2],
        cell: &str,
    ) -> usize {
        // Of whole batches, as training takes them.
        let of_epoch = (images / batch * batch) as f64;
        let epochs = (minutes * 60.0 * pace / of_epoch).round().max(1.0);
        self.around.observer.note(&format!(
            "{cell}: {pace:.0} images/s, so {minutes} minutes are {epochs} epochs"
        ));
        epochs as usize
    }
}

/// What a study has kept in a file; nothing where it has not.
fn read_kept<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.map_err(Error::io(path))?,
    };
    let kept = serde_json::from_slice(&bytes).map_err(|error| Error::Foreign {
        path: path.to_owned(),
        message: format!(
            "is nothing that a study wrote ({error}); delete it to have it made again"
        ),
    })?;
    Ok(Some(kept))
}

/// Keeps something in a file.
fn write_kept(path: &Path, kept: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(kept).expect("what is kept is valid JSON");
    write_durably(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Silent;

    #[test]
    fn what_cannot_be_read_is_not_taken_as_missing() {
        let home = tempfile::tempdir().unwrap();
        let read = |path: &Path| read_kept::<f64>(path);
        assert_eq!(read(&home.path().join("none")).unwrap(), None);
        assert!(read(home.path()).is_err());
    }

    #[test]
    fn no_cell_is_begun_once_it_is_asked_to_stop() {
        let home = tempfile::tempdir().unwrap();
        let made = std::cell::Cell::new(0);
        let stop = || made.get() > 0;
        let around = Surroundings {
            observer: &Silent,
            stop: &stop,
        };
        let make = |_: &i32| {
            made.set(made.get() + 1);
            Ok(())
        };
        let outcome = StudyFolder::at(home.path(), &around).run(
            &[0, 1],
            i32::to_string,
            |_| Ok(()),
            make,
            |&cell| Ok((cell < made.get()).then_some(cell)),
            |_| Ok(()),
        );
        let outcome = outcome.unwrap();
        assert!(outcome.stopped && outcome.failed.is_empty());
        assert_eq!((made.get(), outcome.cells), (1, vec![0]));
    }
}
