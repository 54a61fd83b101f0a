//! Steps whose loss or gradients are not finite: kept under the run, and played again.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    AdamW, AdamWConfig, BadStep, Checkpoints, Events, Position, RunFolder, TrainState,
    create_folder, write_durably,
};
use crate::error::{Error, Result};
use crate::nn::{Named, StateDict};
use crate::observe::Silent;

const KIND: &str = "non-finite";
const FOLDER: &str = "bad-step";
const BATCH: &str = "batch.safetensors";
const PIXELS: &str = "pixels";
/// Batches, networks and optimisers of earlier bad steps make room for the newest.
const KEPT: usize = 1;

/// A batch as it is kept.
#[derive(Clone, Debug)]
pub struct KeptBatch {
    /// The epoch it belongs to.
    pub epoch: u64,
    /// Numbers of the images in the data set.
    pub indices: Vec<usize>,
    /// Their names.
    pub files: Vec<String>,
    /// `[views·N, channels, H, W]`, the first views of all images first.
    pub pixels: Named,
    /// What else the loss depends on.
    pub rest: Value,
}

/// What a bad step was made of. Numbers are text: JSON has no word for what is not finite.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    /// Counted from 1.
    step: u64,
    epoch: u64,
    loss: String,
    gradient_norm: String,
    /// Numbers of the images in the data set.
    indices: Vec<usize>,
    /// Their names.
    files: Vec<String>,
    rest: Value,
    /// Norm of each parameter's gradient.
    gradient_norms: BTreeMap<String, String>,
}

/// How many bad steps are in a log.
pub(super) fn logged(events: &[Value]) -> u64 {
    events.iter().filter(|event| event["kind"] == KIND).count() as u64
}

pub(super) fn log(bad: &BadStep, skipped: bool, events: &mut Events) -> Result<()> {
    events.append(&json!({
        "kind": KIND,
        "step": bad.step,
        "loss": bad.loss.to_string(),
        "gradient_norm": bad.gradient_norm.to_string(),
        "skipped": skipped,
    }))
}

/// Keeps all it takes to play a bad step again.
pub(super) fn keep<M: Module>(
    run: &RunFolder,
    state: &TrainState<M>,
    bad: &BadStep,
    batch: KeptBatch,
    position: Position,
) -> Result<()> {
    let record = Record {
        step: bad.step,
        epoch: batch.epoch,
        loss: bad.loss.to_string(),
        gradient_norm: bad.gradient_norm.to_string(),
        indices: batch.indices,
        files: batch.files,
        rest: batch.rest,
        gradient_norms: AdamW::gradient_norms(&state.model, bad.gradients)
            .into_iter()
            .map(|(name, norm)| (name, norm.to_string()))
            .collect(),
    };
    let tensors = StateDict([(PIXELS.to_owned(), batch.pixels)].into());
    let text = serde_json::to_string(&record).expect("a record is valid JSON");
    let folder = run.file(FOLDER);
    create_folder(&folder)?;
    let path = folder.join(BATCH);
    let bytes = tensors.to_bytes(&text).map_err(|source| Error::Weights {
        path: path.clone(),
        source,
    })?;
    Checkpoints::new(folder, KEPT).save(state, position)?;
    write_durably(&path, &bytes)
}

/// A bad step, taken again.
#[derive(Debug, Serialize)]
pub struct Replay {
    /// Counted from 1.
    pub step: u64,
    /// Loss and norm of all gradients as they were.
    pub recorded: [String; 2],
    /// Loss and norm of all gradients now.
    pub replayed: [String; 2],
    /// Images of the batch.
    pub files: Vec<String>,
    /// Images whose pixels are not all finite.
    pub bad_pixels: Vec<String>,
    /// Parameters whose values are not all finite.
    pub bad_parameters: Vec<String>,
    /// Parameters whose gradients are not all finite.
    pub bad_gradients: Vec<String>,
    /// The ten largest finite norms of gradients.
    pub largest_gradients: Vec<(String, f64)>,
}

impl Replay {
    /// Whether it came out as it had been.
    pub fn is_same(&self) -> bool {
        self.recorded == self.replayed
    }
}

/// Takes the bad step that a run has kept once more, with `model` for its form; `loss` has the kept batch, or says what
/// is wrong with it.
pub fn replay_step<M: Module>(
    run: &RunFolder,
    model: M,
    optimizer: AdamWConfig,
    device: &Device,
    loss: impl FnOnce(&M, &KeptBatch) -> std::result::Result<Tensor<1>, String>,
) -> Result<Replay> {
    let folder = run.file(FOLDER);
    let path = folder.join(BATCH);
    let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::Foreign {
            path: run.path().to_owned(),
            message: "has kept no bad step: all its losses and gradients were finite".into(),
        },
        _ => Error::io(&path)(error),
    })?;
    let damaged = |message: String| Error::Foreign {
        path: path.clone(),
        message,
    };
    let (mut tensors, text) = StateDict::from_bytes(&bytes).map_err(|source| Error::Weights {
        path: path.clone(),
        source,
    })?;
    let record: Record = serde_json::from_str(&text.unwrap_or_default())
        .map_err(|error| damaged(format!("its record is damaged ({error})")))?;
    let batch = KeptBatch {
        epoch: record.epoch,
        indices: record.indices,
        files: record.files,
        pixels: tensors
            .0
            .remove(PIXELS)
            .ok_or_else(|| damaged("it holds no pixels".into()))?,
        rest: record.rest,
    };
    // The step of an older one is not that of the batch, and is told.
    let checkpoint = Checkpoints::new(folder, KEPT).newest_valid(&Silent)?;
    let kept = checkpoint.position.step + 1;
    if kept != record.step {
        return Err(Error::Foreign {
            path: run.path().to_owned(),
            message: format!(
                "died while it kept a bad step: the network is that of step {kept}, the batch that of step {}; go on \
                 with `qbheat resume {}`, which keeps both again where it meets the step again",
                record.step,
                run.path().display()
            ),
        });
    }
    let state = checkpoint.restore(model, optimizer, device)?;
    let loss = loss(&state.model, &batch).map_err(damaged)?;
    let value: f32 = loss.clone().into_scalar();
    let gradients = loss.backward();
    let mut norms = AdamW::gradient_norms(&state.model, &gradients);
    let gradient_norm = AdamW::gradient_norm(&state.model, &gradients);
    let bad_gradients = norms
        .iter()
        .filter(|(_, norm)| !norm.is_finite())
        .map(|(name, _)| name.clone())
        .collect();
    norms.retain(|(_, norm)| norm.is_finite());
    norms.sort_by(|a, b| b.1.total_cmp(&a.1));
    norms.truncate(10);
    let is_bad = |values: &[f32]| values.iter().any(|value| !value.is_finite());
    let KeptBatch { files, pixels, .. } = batch;
    let per_view = pixels.values.len() / pixels.shape[0].max(1);
    Ok(Replay {
        step: record.step,
        recorded: [record.loss, record.gradient_norm],
        replayed: [value.to_string(), gradient_norm.to_string()],
        bad_pixels: files
            .iter()
            .enumerate()
            .filter(|(i, _)| {
                let views = pixels.values.chunks(per_view.max(1));
                views.skip(*i).step_by(files.len()).any(is_bad)
            })
            .map(|(_, name)| name.clone())
            .collect(),
        files,
        bad_parameters: StateDict::of(&state.model)
            .0
            .into_iter()
            .filter(|(_, tensor)| is_bad(&tensor.values))
            .map(|(name, _)| name)
            .collect(),
        bad_gradients,
        largest_gradients: norms,
    })
}
