//! What can go wrong, each with what to do about it.

use std::path::{Path, PathBuf};

use crate::nn::StateError;

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One variant for each way to be wrong.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("unknown {what} `{given}`: expected {expected}")]
    Unknown {
        what: &'static str,
        given: String,
        expected: String,
    },
    #[error("{key} = {value}: expected {expected}")]
    Value {
        key: String,
        value: String,
        expected: String,
    },
    #[error("`{0}` is not of the form key=value; write for example --set optim.epochs=20")]
    Setting(String),
    #[error("{}: {message}", path.display())]
    Config { path: PathBuf, message: String },
    #[error("{}: no such file or folder; check the path given to {flag}", path.display())]
    Missing { path: PathBuf, flag: &'static str },
    #[error("{}: {message}", path.display())]
    Data { path: PathBuf, message: String },
    #[error(
        "{}: the images are not those that the run was started on: {changes}; restore them, or take them as they are \
         now with `qbheat resume --accept-changed-data`", path.display()
    )]
    DataChanged { path: PathBuf, changes: String },
    #[error(
        "{bad} of {all} images are unreadable, more than data.max_bad_share = {allowed} allows; repair or remove \
         them, or raise it with --set data.max_bad_share=…:\n{list}"
    )]
    TooManyBad {
        bad: usize,
        all: usize,
        allowed: f64,
        list: String,
    },
    #[error(
        "optim.batch_size = {batch_size}: the data set has only {images} images to train on; use a smaller batch"
    )]
    BatchTooLarge { batch_size: usize, images: usize },
    #[error(
        "{}: not a run folder (it has no {missing}); `qbheat pretrain` and `qbheat detect train` make one, where --out \
         says", path.display()
    )]
    NotARun {
        path: PathBuf,
        missing: &'static str,
    },
    #[error("{}: this run exists already; go on with `qbheat resume {}`, or choose another --out", path.display(), path.display())]
    RunExists { path: PathBuf },
    #[error("{}: another process is at work on this run; wait for it or stop it", path.display())]
    RunBusy { path: PathBuf },
    #[error("{}: the folder is not empty and is no run; choose another --out", path.display())]
    NotEmpty { path: PathBuf },
    #[error("{}: no checkpoint verifies; restore one, or begin anew with another --out{problems}", path.display())]
    NoCheckpoint { path: PathBuf, problems: String },
    #[error("{}: {source}", path.display())]
    Weights { path: PathBuf, source: StateError },
    #[error("{}: {message}", path.display())]
    Foreign { path: PathBuf, message: String },
    #[error("{0}")]
    Refused(String),
    #[error("stopped")]
    Stopped,
    #[error(
        "the loss or a gradient became infinite or NaN in step {step} (loss {loss}, gradient norm {gradient_norm}); \
         the weights were left as they were before it. Lower optim.learning_rate or optim.clip_norm"
    )]
    NonFinite {
        step: u64,
        loss: f64,
        gradient_norm: f64,
    },
    #[error(
        "the features have collapsed: after epoch {epoch} their effective rank is {rank:.2}, below run.rank_floor = \
         {floor}. For latent targets raise objective.decorrelation, else lower optim.learning_rate"
    )]
    Collapsed { epoch: u64, rank: f64, floor: f64 },
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("drawing a plot failed: {0}")]
    Plot(String),
}

impl Error {
    /// 2 where the command was given wrongly, 1 where the work failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unknown { .. }
            | Self::Value { .. }
            | Self::Setting(_)
            | Self::Config { .. }
            | Self::Missing { .. }
            | Self::BatchTooLarge { .. }
            | Self::NotARun { .. }
            | Self::RunExists { .. }
            | Self::NotEmpty { .. }
            | Self::Refused(_) => 2,
            _ => 1,
        }
    }

    /// The same with the flag or key by which the path that is missing was given.
    pub fn called(self, flag: &'static str) -> Self {
        match self {
            Self::Missing { path, .. } => Self::Missing { path, flag },
            other => other,
        }
    }

    /// `given` is none of `names`.
    pub fn unknown<S: AsRef<str>>(
        what: &'static str,
        given: impl Into<String>,
        names: impl IntoIterator<Item = S>,
    ) -> Self {
        let given = given.into();
        Self::Unknown {
            what,
            expected: one_of(names, &given),
            given,
        }
    }

    /// Names the file of an I/O error.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    /// Names the data set of a complaint.
    pub fn data(path: &Path, message: impl Into<String>) -> Self {
        Self::Data {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}

/// What would have been right instead of `given`: all `names`, and the one that `given` resembles.
pub fn one_of<S: AsRef<str>>(names: impl IntoIterator<Item = S>, given: &str) -> String {
    /// Below it two names have little in common (Jaro-Winkler, 1 for the same).
    const ALIKE: f64 = 0.7;
    let names: Vec<S> = names.into_iter().collect();
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    if let [only] = names[..] {
        return only.to_owned();
    }
    let nearest = names
        .iter()
        .map(|name| {
            (
                strsim::jaro_winkler(behind_table(given), behind_table(name)),
                name,
            )
        })
        .filter(|(similarity, _)| *similarity >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let hint = nearest.map_or_else(String::new, |(_, name)| format!("; did you mean `{name}`?"));
    format!("one of {}{hint}", names.join(", "))
}

/// A key without its table, which it shares with others.
fn behind_table(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}
