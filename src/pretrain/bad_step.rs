//! Steps whose loss or gradients are not finite: kept under the run, passed over or not, and played again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::run::Run;
use super::{Images, PretrainModel, WithModel, with_model};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::nn::{Named, StateDict};
use crate::train::{
    AdamW, AdamWConfig, BadStep, Checkpoints, Events, RunFolder, TrainState, create_folder,
    write_durably,
};

const KIND: &str = "non-finite";
const FOLDER: &str = "bad-step";
const BATCH: &str = "batch.safetensors";
const PIXELS: &str = "pixels";
/// Batches, networks and optimisers of earlier bad steps make room for the newest.
const KEPT: usize = 1;

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
    /// Their classes, where all of them have one.
    #[serde(default)]
    labels: Vec<u32>,
    /// Their names.
    files: Vec<String>,
    /// Norm of each parameter's gradient.
    gradient_norms: BTreeMap<String, String>,
}

/// How many bad steps are in a log.
pub(super) fn logged(events: &[Value]) -> u64 {
    events.iter().filter(|event| event["kind"] == KIND).count() as u64
}

impl Run<'_> {
    /// Logs a bad step, the `count`-th of the run, and keeps all it takes to play it again; an error where the run may
    /// not pass over so many.
    pub(super) fn keep_bad_step<M: PretrainModel>(
        &self,
        state: &TrainState<M>,
        bad: &BadStep,
        count: u64,
        events: &mut Events,
    ) -> Result<()> {
        let allowed = self.config.run.skip_non_finite;
        let skipped = count <= allowed;
        // The batch is a function of the step: made again rather than kept at every step.
        let batch = self.loader(state.step).next_batch()?;
        let record = Record {
            step: bad.step,
            epoch: batch.epoch,
            loss: bad.loss.to_string(),
            gradient_norm: bad.gradient_norm.to_string(),
            files: batch
                .indices
                .iter()
                .map(|&index| self.dataset.images.name(index).to_owned())
                .collect(),
            indices: batch.indices,
            labels: batch
                .labels
                .into_iter()
                .collect::<Option<_>>()
                .unwrap_or_default(),
            gradient_norms: AdamW::gradient_norms(&state.model, bad.gradients)
                .into_iter()
                .map(|(name, norm)| (name, norm.to_string()))
                .collect(),
        };
        events.append(&json!({
            "kind": KIND,
            "step": record.step,
            "loss": record.loss,
            "gradient_norm": record.gradient_norm,
            "skipped": skipped,
        }))?;
        let pixels = Named {
            shape: batch.shape.to_vec(),
            values: batch.pixels,
        };
        let tensors = StateDict([(PIXELS.to_owned(), pixels)].into());
        let text = serde_json::to_string(&record).expect("a record is valid JSON");
        let folder = self.folder.file(FOLDER);
        create_folder(&folder)?;
        let path = folder.join(BATCH);
        let bytes = tensors.to_bytes(&text).map_err(|source| Error::Weights {
            path: path.clone(),
            source,
        })?;
        let position = self.position(state.step, events)?;
        Checkpoints::new(folder, KEPT).save(state, position)?;
        write_durably(&path, &bytes)?;
        if !skipped {
            return Err(bad.error());
        }
        self.around.observer.note(&format!(
            "step {} passed over: loss {}, gradient norm {} ({count} of {allowed} that run.skip_non_finite allows)",
            bad.step, bad.loss, bad.gradient_norm
        ));
        Ok(())
    }
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

/// Takes the bad step that a run has kept once more.
pub fn replay(run: &RunFolder, config: &Config) -> Result<Replay> {
    with_model(
        config,
        &crate::device().autodiff(),
        KeptStep { run, config },
    )
}

struct KeptStep<'a> {
    run: &'a RunFolder,
    config: &'a Config,
}

impl WithModel for KeptStep<'_> {
    type Output = Replay;

    fn with<M: PretrainModel>(self, model: M) -> Result<Replay> {
        replay_with(self.run, self.config, model)
    }
}

fn replay_with<M: PretrainModel>(run: &RunFolder, config: &Config, model: M) -> Result<Replay> {
    let device = crate::device().autodiff();
    let folder = run.file(FOLDER);
    let path = folder.join(BATCH);
    let bytes = std::fs::read(&path).map_err(|_| Error::Foreign {
        path: run.path().to_owned(),
        message: "has kept no bad step: all its losses and gradients were finite".into(),
    })?;
    let damaged = |message: String| Error::Foreign {
        path: path.clone(),
        message,
    };
    let (tensors, text) = StateDict::from_bytes(&bytes).map_err(|source| Error::Weights {
        path: path.clone(),
        source,
    })?;
    let record: Record = serde_json::from_str(&text.unwrap_or_default())
        .map_err(|error| damaged(format!("its record is damaged ({error})")))?;
    let pixels = tensors
        .0
        .get(PIXELS)
        .ok_or_else(|| damaged("it holds no pixels".into()))?;
    let (checkpoint, _) = Checkpoints::new(folder, KEPT).newest_valid()?;
    let state = checkpoint.restore(model, AdamWConfig::from(&config.optim), &device)?;
    let batch = Images {
        pixels: pixels
            .tensor(&device)
            .ok_or_else(|| damaged("its pixels are no batch of images".into()))?,
        indices: record.indices,
        labels: record.labels,
        epoch: record.epoch,
    };
    let loss = state.model.loss(&batch, config.seed);
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
    let per_view = pixels.values.len() / pixels.shape[0].max(1);
    Ok(Replay {
        step: record.step,
        recorded: [record.loss, record.gradient_norm],
        replayed: [value.to_string(), gradient_norm.to_string()],
        bad_pixels: record
            .files
            .iter()
            .enumerate()
            .filter(|(i, _)| {
                let views = pixels.values.chunks(per_view.max(1));
                views.skip(*i).step_by(record.files.len()).any(is_bad)
            })
            .map(|(_, name)| name.clone())
            .collect(),
        files: record.files,
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
