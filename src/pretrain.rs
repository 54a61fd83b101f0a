//! Pre-training runs: the methods by name, and what surrounds the training loop.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;
use serde_json::json;

use crate::config::{Config, Method};
use crate::data::{BadImage, Batch, Dataset, Index, Loader, LoaderConfig};
use crate::encoder::{self, Encoder};
use crate::error::{Error, Result};
use crate::heat::{QbHeat, Quadrant};
use crate::nn::Init;
use crate::observe::Observer;
use crate::probe::{self, Part, ProbeConfig};
use crate::random::{self, Purpose};
use crate::train::{
    AdamW, AdamWConfig, Checkpoint, Checkpoints, ENCODER_FILE, Events, INDEX_FILE, Position,
    RunFolder, Schedule, StepReport, StepTimes, Stop, TrainState, train, write_durably,
};
use crate::weights::{given_encoder, save_encoder};

/// Batches from which the trivial predictor's loss is estimated.
const BASELINE_BATCHES: u64 = 8;
/// Kind of the event that an image became unreadable.
const BAD_IMAGE: &str = "bad-image";

/// A network that pre-trains an encoder: what the training loop needs to know of a method.
pub trait PretrainModel: Module {
    /// Loss of a batch on `device`, `[1]`.
    fn loss(&self, batch: &Images, seed: u64) -> Tensor<1>;
    /// The encoder inside.
    fn encoder(&self) -> &Encoder;
    /// The same network around another encoder of the same shape.
    fn with_encoder(self, encoder: Encoder) -> Self;
    /// The loss that needs no learning, estimated on some batches.
    fn trivial_loss(&self, batches: &[Images], seed: u64) -> f64;
    /// Figures of its own to log once an epoch.
    fn metrics(&self) -> Vec<(&'static str, f64)>;
}

/// A batch on the device.
pub struct Images {
    /// `[N, 3, H, W]`, normalised.
    pub pixels: Tensor<4>,
    /// Numbers of the images in the data set.
    pub indices: Vec<usize>,
    /// The epoch it belongs to.
    pub epoch: u64,
}

impl Images {
    /// Puts a batch of square images on `device`.
    pub fn new(batch: Batch, size: usize, device: &Device) -> Self {
        let shape = [batch.indices.len(), 3, size, size];
        Self {
            pixels: Tensor::from_data(TensorData::new(batch.pixels, shape), device),
            indices: batch.indices,
            epoch: batch.epoch,
        }
    }

    /// The visible quadrant of each image: a pure function of seed, epoch and image.
    pub fn quadrants(&self, seed: u64) -> Vec<Quadrant> {
        self.indices
            .iter()
            .map(|&index| {
                let mut random = random::stream(seed, Purpose::Quadrant, self.epoch, index as u64);
                Quadrant::ALL[random.random_range(0..4)]
            })
            .collect()
    }
}

impl PretrainModel for QbHeat {
    fn loss(&self, batch: &Images, seed: u64) -> Tensor<1> {
        self.loss(batch.pixels.clone(), &batch.quadrants(seed))
    }

    fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    fn with_encoder(mut self, encoder: Encoder) -> Self {
        self.encoder = encoder;
        self
    }

    fn trivial_loss(&self, batches: &[Images], seed: u64) -> f64 {
        let share = 1.0 / batches.len() as f32;
        let average = batches
            .iter()
            .map(|batch| self.average_patch(batch.pixels.clone()) * share)
            .reduce(|sum, patch| sum + patch)
            .expect("there is at least one batch");
        let losses = batches.iter().map(|batch| {
            let quadrants = batch.quadrants(seed);
            let loss = self.trivial_loss(batch.pixels.clone(), &quadrants, average.clone());
            f64::from(loss.into_scalar::<f32>())
        });
        losses.sum::<f64>() * f64::from(share)
    }

    fn metrics(&self) -> Vec<(&'static str, f64)> {
        vec![("commutator", self.propagator.commutator())]
    }
}

/// A QB-Heat network with fresh weights.
pub fn qb_heat(config: &Config, device: &Device) -> Result<QbHeat> {
    let mut init = Init::new(config.seed, device);
    let encoder = encoder::find(&config.encoder.name)?.build(config.encoder.stride, &mut init)?;
    Ok(QbHeat::new(
        &config.qb_heat,
        encoder,
        config.encoder.stride,
        &mut init,
    ))
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The run folder.
    pub run: PathBuf,
    /// Steps taken in all.
    pub steps: u64,
    /// Steps that were planned.
    pub planned: u64,
    /// Loss of the first step that this process took, and of the last.
    pub losses: Option<(f32, f32)>,
    /// Loss of the trivial predictor.
    pub trivial_loss: f64,
    /// Images a second over the steps that this process took.
    pub images_per_s: f64,
    /// Images that became unreadable during the run, so that others stood in for them.
    pub bad_images: usize,
}

impl Outcome {
    /// Whether it was stopped before its end.
    pub fn stopped(&self) -> bool {
        self.steps < self.planned
    }
}

/// What surrounds a run.
pub struct Surroundings<'a> {
    /// Told how it goes.
    pub observer: &'a dyn Observer,
    /// Asked after each step whether to stop.
    pub stop: &'a dyn Fn() -> bool,
}

/// Starts a run in a new folder.
pub fn start(
    config: &Config,
    dataset: &Dataset,
    out: &Path,
    around: &Surroundings,
) -> Result<Outcome> {
    check_size(config, dataset)?;
    let run = RunFolder::create(out, &config.to_toml())?;
    write_index(&run, dataset)?;
    Run::new(run, config, dataset, around).go(None)
}

/// The images of a run that goes on, numbered as they were when it was started. Where they are not the same any more
/// that is an error, or, with `accept_changed`, they are taken as they are now.
pub fn reopen_data(
    run: &RunFolder,
    config: &Config,
    accept_changed: bool,
    observer: &dyn Observer,
) -> Result<Dataset> {
    let path = run.file(INDEX_FILE);
    let index = match std::fs::read(&path) {
        Ok(bytes) => Index::from_bytes(bytes).map_err(|reason| {
            let remedy = "restore it, or remove it to take the images as they are now";
            Error::data(&path, format!("damaged ({reason}); {remedy}"))
        })?,
        // Killed before it had one, a run has not used its images yet; and old runs have none.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return open_anew(run, config, observer);
        }
        Err(error) => return Err(Error::io(&path)(error)),
    };
    match Dataset::reopen(&config.data, config.seed, &index, observer) {
        Err(Error::DataChanged { changes, .. }) if accept_changed => {
            observer.note(&format!("going on with changed images: {changes}"));
            open_anew(run, config, observer)
        }
        reopened => reopened,
    }
}

fn open_anew(run: &RunFolder, config: &Config, observer: &dyn Observer) -> Result<Dataset> {
    let dataset = Dataset::open(&config.data, config.seed, observer)?;
    write_index(run, &dataset)?;
    Ok(dataset)
}

fn write_index(run: &RunFolder, dataset: &Dataset) -> Result<()> {
    write_durably(&run.file(INDEX_FILE), &dataset.index().to_bytes())
}

/// Refuses a batch that is larger than the training images.
pub fn check_size(config: &Config, dataset: &Dataset) -> Result<()> {
    let images = dataset.train.len();
    if config.optim.batch_size > images {
        return Err(Error::BatchTooLarge {
            batch_size: config.optim.batch_size,
            images,
        });
    }
    Ok(())
}

/// The configuration of a run, with more epochs where its schedule says how.
pub fn resumed_config(run: &RunFolder, epochs: Option<usize>) -> Result<Config> {
    let path = run.file(crate::train::CONFIG_FILE);
    let mut config = Config::load(Some(&path), &[])?;
    let Some(epochs) = epochs.filter(|&epochs| epochs != config.optim.epochs) else {
        return Ok(config);
    };
    if epochs < config.optim.epochs {
        return Err(Error::Refused(format!(
            "--epochs {epochs}: the run is planned for {} epochs and cannot be made shorter; stop it with Ctrl-C",
            config.optim.epochs
        )));
    }
    if config.optim.schedule == Schedule::Cosine {
        return Err(Error::Refused(format!(
            "--epochs {epochs}: the learning rate of this run follows a cosine that ends at 0 after {} epochs, so \
             there is no rate for later ones; start a new run with `--init {}`, or use optim.schedule = \"constant\" \
             for runs that may grow",
            config.optim.epochs,
            run.path().display()
        )));
    }
    config.optim.epochs = epochs;
    config.resolve()?;
    run.write_config(&config.to_toml())?;
    Ok(config)
}

/// Goes on from the newest checkpoint that verifies.
pub fn resume(
    run: RunFolder,
    config: &Config,
    dataset: &Dataset,
    around: &Surroundings,
) -> Result<Outcome> {
    check_size(config, dataset)?;
    let checkpoints = run.checkpoints(config.run.keep_checkpoints);
    if checkpoints.is_empty() {
        around
            .observer
            .note("the run died before its first checkpoint; beginning anew");
        return Run::new(run, config, dataset, around).go(None);
    }
    let (checkpoint, problems) = checkpoints.newest_valid()?;
    for problem in problems {
        around
            .observer
            .note(&format!("passed over a checkpoint: {problem}"));
    }
    let found = (
        checkpoint.position.seed,
        checkpoint.position.steps_per_epoch,
    );
    let expected = (config.seed, steps_per_epoch(config, dataset));
    let run = Run::new(run, config, dataset, around);
    // Other images, which `reopen_data` only lets pass where that was asked for, may make longer or shorter epochs.
    let same_data = [String::new(), run.fingerprint.clone()].contains(&checkpoint.position.data);
    if found.0 != expected.0 || found.1 != expected.1 && same_data {
        return Err(Error::Foreign {
            path: run.folder.path().to_owned(),
            message: format!(
                "its checkpoint belongs to seed {} and {} steps an epoch, configuration and data now give seed {} \
                 and {} steps; restore them as they were",
                found.0, found.1, expected.0, expected.1
            ),
        });
    }
    around.observer.note(&format!(
        "going on after step {} of {}",
        checkpoint.position.step,
        config.optim.epochs as u64 * expected.1
    ));
    run.go(Some(checkpoint))
}

fn steps_per_epoch(config: &Config, dataset: &Dataset) -> u64 {
    (dataset.train.len() / config.optim.batch_size) as u64
}

struct Run<'a> {
    folder: RunFolder,
    checkpoints: Checkpoints,
    config: &'a Config,
    dataset: &'a Dataset,
    around: &'a Surroundings<'a>,
    loading: LoaderConfig,
    steps_per_epoch: u64,
    /// Of the images' index.
    fingerprint: String,
    device: Device,
}

impl<'a> Run<'a> {
    fn new(
        folder: RunFolder,
        config: &'a Config,
        dataset: &'a Dataset,
        around: &'a Surroundings<'a>,
    ) -> Self {
        Self {
            checkpoints: folder.checkpoints(config.run.keep_checkpoints),
            folder,
            config,
            dataset,
            around,
            loading: LoaderConfig {
                seed: config.seed,
                image_size: config.image_size,
                batch_size: config.optim.batch_size,
                data: config.data.clone(),
            },
            steps_per_epoch: steps_per_epoch(config, dataset),
            fingerprint: dataset.index().fingerprint(),
            device: crate::device().autodiff(),
        }
    }

    fn go(&self, from: Option<Checkpoint>) -> Result<Outcome> {
        match self.config.method {
            Method::QbHeat => self.train(qb_heat(self.config, &self.device)?, from),
        }
    }

    fn train<M: PretrainModel>(&self, model: M, from: Option<Checkpoint>) -> Result<Outcome> {
        let optimizer = AdamWConfig::from(&self.config.optim);
        let trivial_loss = self.trivial_loss(&model)?;
        let (state, mut events) = match from {
            None => {
                let mut events = self.folder.events(0)?;
                events.append(&json!({"kind": "baseline", "trivial_loss": trivial_loss}))?;
                let model = match given_encoder(self.config, &self.device)? {
                    Some(encoder) => model.with_encoder(encoder),
                    None => model,
                };
                let optimizer = AdamW::new(optimizer);
                let state = TrainState {
                    model,
                    optimizer,
                    step: 0,
                };
                // A run that dies before its first regular checkpoint can then be resumed too.
                self.save(&state, &mut events)?;
                (state, events)
            }
            Some(checkpoint) => (
                checkpoint.restore(model, optimizer, &self.device)?,
                self.folder.events(checkpoint.position.events_bytes)?,
            ),
        };
        let rate = self.config.optim.learning_rates(self.steps_per_epoch);
        let first_step = state.step;
        let mut loader = Loader::new(
            &self.dataset.images,
            &self.dataset.train,
            &self.loading,
            first_step,
        );
        let mut pace = Pace::default();
        let mut losses: Option<(f32, f32)> = None;
        let mut bad_images = self.logged_bad_images()?;
        let passed_over = RefCell::new(Vec::new());
        let observer = self.around.observer;
        observer.begin("pre-training", rate.total_steps);
        let trained = train(
            state,
            &rate,
            || {
                let mut batch = loader.next_batch()?;
                passed_over.borrow_mut().append(&mut batch.passed_over);
                Ok(Images::new(batch, self.config.image_size, &self.device))
            },
            |model: &M, batch| model.loss(&batch, self.config.seed),
            |state, report| {
                losses = Some((losses.map_or(report.loss, |(first, _)| first), report.loss));
                pace.add(&report.times);
                for bad in passed_over.take() {
                    if bad_images.insert(bad.name.clone()) {
                        self.log_bad_image(&bad, &mut events)?;
                    }
                }
                self.log_step(report, &mut events)?;
                observer.progress(report.step, &self.describe(report, &pace, trivial_loss));
                if state.step.is_multiple_of(self.steps_per_epoch) {
                    self.end_of_epoch(state, &mut events)?;
                }
                let stop = (self.around.stop)();
                let last = state.step == rate.total_steps;
                let due = state.step.is_multiple_of(self.config.run.checkpoint_every)
                    || state.step.is_multiple_of(self.steps_per_epoch);
                if due || stop || last {
                    self.save(state, &mut events)?;
                }
                Ok(if stop { Stop::Now } else { Stop::No })
            },
        );
        observer.end();
        if let Err(Error::NonFinite {
            step,
            loss,
            gradient_norm,
        }) = &trained
        {
            // As text, because JSON has no word for what is not finite.
            events.append(&json!({
                "kind": "non-finite",
                "step": step,
                "loss": loss.to_string(),
                "gradient_norm": gradient_norm.to_string(),
            }))?;
            events.sync()?;
        }
        let state = trained?;
        if state.step == rate.total_steps {
            let file = self.folder.file(ENCODER_FILE);
            save_encoder(state.model.encoder(), self.config, &file)?;
        }
        Ok(Outcome {
            run: self.folder.path().to_owned(),
            steps: state.step,
            planned: rate.total_steps,
            losses,
            trivial_loss,
            images_per_s: pace.images_per_s(self.config.optim.batch_size),
            bad_images: bad_images.len(),
        })
    }

    /// Names of the images that the run has met as unreadable so far.
    fn logged_bad_images(&self) -> Result<BTreeSet<String>> {
        let events = self.folder.read_events()?.into_iter();
        let names = events
            .filter(|event| event["kind"] == BAD_IMAGE)
            .filter_map(|event| event["name"].as_str().map(str::to_owned));
        Ok(names.collect())
    }

    fn log_bad_image(&self, bad: &BadImage, events: &mut Events) -> Result<()> {
        let BadImage { name, reason } = bad;
        self.around.observer.note(&format!(
            "became unreadable, another image stands in: {name}: {reason}"
        ));
        events.append(&json!({"kind": BAD_IMAGE, "name": name, "reason": reason}))
    }

    fn trivial_loss<M: PretrainModel>(&self, model: &M) -> Result<f64> {
        let mut loader = Loader::new(&self.dataset.images, &self.dataset.train, &self.loading, 0);
        let batches = (0..BASELINE_BATCHES.min(self.steps_per_epoch))
            .map(|_| {
                let batch = loader.next_batch()?;
                Ok(Images::new(batch, self.config.image_size, &crate::device()))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(model.valid().trivial_loss(&batches, self.config.seed))
    }

    fn save<M: Module>(&self, state: &TrainState<M>, events: &mut Events) -> Result<()> {
        let position = Position {
            step: state.step,
            steps_per_epoch: self.steps_per_epoch,
            seed: self.config.seed,
            events_bytes: events.sync()?,
            data: self.fingerprint.clone(),
        };
        self.checkpoints.save(state, position)
    }

    fn log_step(&self, report: &StepReport, events: &mut Events) -> Result<()> {
        let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
        events.append(&json!({
            "kind": "step",
            "step": report.step,
            "epoch": (report.step - 1) / self.steps_per_epoch,
            "loss": report.loss,
            "lr": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "ms": {
                "data": ms(report.times.data),
                "forward": ms(report.times.forward),
                "backward": ms(report.times.backward),
                "optimizer": ms(report.times.optimizer),
            },
        }))
    }

    fn describe(&self, report: &StepReport, pace: &Pace, trivial_loss: f64) -> String {
        let epoch = (report.step - 1) / self.steps_per_epoch + 1;
        let [data, forward, backward, optimizer] = pace.shares();
        format!(
            "epoch {epoch}/{} · loss {:.4} (trivial {trivial_loss:.4}) · lr {:.1e} · {:.0} images/s · data {data:.0} % \
             forward {forward:.0} % backward {backward:.0} % optimiser {optimizer:.0} %",
            self.config.optim.epochs,
            report.loss,
            report.learning_rate,
            pace.images_per_s(self.config.optim.batch_size),
        )
    }

    fn end_of_epoch<M: PretrainModel>(
        &self,
        state: &TrainState<M>,
        events: &mut Events,
    ) -> Result<()> {
        let epoch = state.step / self.steps_per_epoch;
        let mut event = json!({"kind": "epoch", "epoch": epoch - 1, "step": state.step});
        for (name, value) in state.model.metrics() {
            event[name] = value.into();
        }
        let every = self.config.run.watch_every as u64;
        if every > 0 && epoch.is_multiple_of(every) {
            self.watch(state.model.encoder(), &mut event)?;
            self.around.observer.note(&describe_watch(epoch, &event));
        }
        events.append(&event)
    }

    /// Adds rank, spread and, where there are labels, k-NN accuracy of the features as they are now.
    fn watch(&self, encoder: &Encoder, event: &mut serde_json::Value) -> Result<()> {
        let config = ProbeConfig {
            image_size: self.config.image_size,
            stride: self.config.encoder.stride,
            seed: self.config.seed,
            epochs: 0,
            memory_mib: 0,
        };
        let silent = crate::observe::Silent;
        let classes = &self.dataset.classes;
        let limit = self.config.run.watch_images;
        let part = |indices: &[usize]| -> Result<Part> {
            let labelled = Part::labelled(self.dataset, indices, classes)?;
            Ok(labelled.limit(limit, self.config.seed))
        };
        let (train, held_out) = (part(&self.dataset.train)?, part(&self.dataset.held_out)?);
        if train.indices.is_empty() || held_out.indices.is_empty() {
            let unlabelled = Part {
                dataset: self.dataset,
                indices: self.dataset.train.iter().copied().take(limit).collect(),
                labels: Vec::new(),
            };
            let features = probe::extract(encoder, &unlabelled, &config, false, &silent)?;
            add_statistics(event, &features);
            return Ok(());
        }
        let features = probe::extract(encoder, &train, &config, false, &silent)?;
        add_statistics(event, &features);
        let scored = probe::extract(encoder, &held_out, &config, false, &silent)?;
        let whitening = features.whitening();
        let scores = probe::knn_scores(
            &whitening.apply_pooled(&features),
            (&train.labels, classes.len()),
            &whitening.apply_pooled(&scored),
        );
        event["knn_top1"] = scores.top(1, &held_out.labels).into();
        Ok(())
    }
}

fn add_statistics(event: &mut serde_json::Value, features: &probe::Features) {
    let statistics = probe::feature_statistics(features);
    event["effective_rank"] = statistics.effective_rank.into();
    event["spread"] = statistics.spread.into();
}

fn describe_watch(epoch: u64, event: &serde_json::Value) -> String {
    let figure = |name: &str| event[name].as_f64();
    let mut text = format!("after epoch {epoch}:");
    if let Some(knn) = figure("knn_top1") {
        text += &format!(" k-NN {knn:.1} %,");
    }
    if let (Some(rank), Some(spread)) = (figure("effective_rank"), figure("spread")) {
        text += &format!(" effective rank {rank:.1}, spread {spread:.2}");
    }
    if let Some(commutator) = figure("commutator") {
        text += &format!(", ‖AB−BA‖/(‖A‖‖B‖) {commutator:.3}");
    }
    text
}

/// Time of the steps so far; the first is left out, it warms caches.
#[derive(Default)]
struct Pace {
    steps: u64,
    times: StepTimes,
}

impl Pace {
    fn add(&mut self, times: &StepTimes) {
        if self.steps == 1 {
            self.times = StepTimes::default();
        }
        self.steps += 1;
        self.times.data += times.data;
        self.times.forward += times.forward;
        self.times.backward += times.backward;
        self.times.optimizer += times.optimizer;
    }

    fn images_per_s(&self, batch_size: usize) -> f64 {
        let counted = self.steps.saturating_sub(1).max(1);
        (counted as usize * batch_size) as f64 / self.times.total().as_secs_f64().max(1e-9)
    }

    fn shares(&self) -> [f64; 4] {
        let total = self.times.total().as_secs_f64().max(1e-9);
        [
            self.times.data,
            self.times.forward,
            self.times.backward,
            self.times.optimizer,
        ]
        .map(|part| 100.0 * part.as_secs_f64() / total)
    }
}

/// How fast the training step is.
pub struct BenchResult {
    /// Images a second of the fastest step.
    pub best: f64,
    /// Images a second of the median step.
    pub median: f64,
    /// Parts of the median step in milliseconds.
    pub milliseconds: std::collections::BTreeMap<&'static str, f64>,
}

/// Times the real training step, loader included, on the images of `config.data`.
pub fn bench(config: &Config, steps: usize, observer: &dyn Observer) -> Result<BenchResult> {
    const WARM_UP: usize = 2;
    let dataset = Dataset::open(&config.data, config.seed, observer)?;
    check_size(config, &dataset)?;
    let device = crate::device().autodiff();
    let mut rate = config
        .optim
        .learning_rates(steps_per_epoch(config, &dataset));
    rate.total_steps = (steps + WARM_UP) as u64;
    let loading = LoaderConfig {
        seed: config.seed,
        image_size: config.image_size,
        batch_size: config.optim.batch_size,
        data: config.data.clone(),
    };
    let mut loader = Loader::new(&dataset.images, &dataset.train, &loading, 0);
    let state = TrainState {
        model: qb_heat(config, &device)?,
        optimizer: AdamW::new(AdamWConfig::from(&config.optim)),
        step: 0,
    };
    let mut times = Vec::new();
    observer.begin("timing steps", rate.total_steps);
    train(
        state,
        &rate,
        || {
            Ok(Images::new(
                loader.next_batch()?,
                config.image_size,
                &device,
            ))
        },
        |model: &QbHeat, batch| PretrainModel::loss(model, &batch, config.seed),
        |_, report| {
            times.push(report.times);
            observer.progress(report.step, "");
            Ok(Stop::No)
        },
    )?;
    observer.end();
    times.drain(..WARM_UP);
    times.sort_by_key(StepTimes::total);
    let images_per_s =
        |times: &StepTimes| config.optim.batch_size as f64 / times.total().as_secs_f64();
    let middle = &times[times.len() / 2];
    let parts = [
        ("data", middle.data),
        ("forward", middle.forward),
        ("backward", middle.backward),
        ("optimizer", middle.optimizer),
    ];
    Ok(BenchResult {
        best: images_per_s(&times[0]),
        median: images_per_s(middle),
        milliseconds: parts
            .into_iter()
            .map(|(part, time)| (part, time.as_secs_f64() * 1e3))
            .collect(),
    })
}
