//! A detector's training, and the detector that a run has made.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Tensor;
use serde_json::{Value, json};

use super::average_precision::{Figures, Prediction};
use super::coco::Class;
use super::denoising::noised;
use super::detector::{Detector, Shape, in_picture, pixels};
use super::evaluation::{Evaluation, EvaluationConfig, evaluate};
use super::head::Level;
use super::loader::{DetectionBatch, DetectionLoader, DetectionLoaderConfig};
use super::loss::{LossFigures, losses};
use super::prior::{Floors, baselines};
use super::sets::Sets;
use super::view::{Placement, View, ViewBox};
use crate::config::DetectorConfig;
use crate::data::{BadImage, Picture};
use crate::encoder::{self, Build, Encoder};
use crate::error::{Error, Result};
use crate::nn::{Init, Named, StateDict, sum_of_losses};
use crate::observe::{Observer, Silent};
use crate::random::{self, Purpose};
use crate::train::{
    AdamWConfig, BASELINE, Course, KeptBatch, Outcome, Replay, RunFolder, Start, Surroundings,
    Trainee, replay_step, write_durably,
};
use crate::weights::given_encoder;

/// Names and ids of the classes, in the order of their numbers.
const CLASSES_FILE: &str = "classes.json";
/// Training images from which the whitening is taken.
const WHITENED_ON: usize = 1000;
/// What counts as an epoch of one batch that is seen again and again.
const OVERFIT_STEPS: u64 = 25;

/// How a detector's training ended.
pub struct DetectorOutcome {
    /// As any run.
    pub course: Outcome,
    /// Of the images to score, where training came to its end.
    pub evaluation: Option<Evaluation>,
    /// What needs no learning reaches on them.
    pub floors: Floors,
}

/// Trains a detector in a new folder.
pub fn start(
    config: &DetectorConfig,
    sets: &Sets,
    out: &Path,
    around: &Surroundings,
) -> Result<DetectorOutcome> {
    let config = &suited(config, sets);
    // Whatever cannot be used is found before there is a folder.
    let model = fresh(config, given(config)?, sets.classes().len())?;
    let folder = RunFolder::create(out, &config.to_toml())?;
    let course = course(folder, config, sets, around)?;
    begin(&course, config, sets, model)
}

/// Goes on from the newest checkpoint that verifies.
pub fn resume(
    folder: RunFolder,
    config: &DetectorConfig,
    sets: &Sets,
    around: &Surroundings,
) -> Result<DetectorOutcome> {
    let course = course(folder, config, sets, around)?;
    let Some(checkpoint) = course.newest()? else {
        let model = fresh(config, given(config)?, sets.classes().len())?;
        return begin(&course, config, sets, model);
    };
    let known = read_classes(course.folder())?;
    check_images(
        course.folder().path(),
        &checkpoint.position.data,
        &known,
        sets,
    )?;
    let model = fresh(config, None, sets.classes().len())?;
    go(&course, config, sets, Start::After(model, checkpoint))
}

/// Refuses other images, boxes or classes than a run was started with: what is drawn of others to be scored may be what
/// it was trained on.
fn check_images(run: &Path, data: &str, classes: &[Class], sets: &Sets) -> Result<()> {
    if data == sets.fingerprint() && classes == sets.classes() {
        return Ok(());
    }
    Err(Error::Foreign {
        path: run.to_owned(),
        message: format!(
            "was started with other images or boxes than {} and {} hold now; restore them",
            sets.train.path().display(),
            sets.val.path().display()
        ),
    })
}

/// The encoder that the configuration names, if any.
fn given(config: &DetectorConfig) -> Result<Option<Encoder>> {
    let given = given_encoder(config, &crate::device().autodiff());
    given.map_err(|error| error.called("encoder.init"))
}

/// With what follows from the images.
fn suited(config: &DetectorConfig, sets: &Sets) -> DetectorConfig {
    let mut config = config.clone();
    if config.detect.overfit > 0 {
        config.detect.overfit = sets.train.images.len();
        config.optim.batch_size = sets.train.images.len();
    }
    config
}

fn course<'a>(
    folder: RunFolder,
    config: &'a DetectorConfig,
    sets: &Sets,
    around: &'a Surroundings<'a>,
) -> Result<Course<'a>> {
    let steps_per_epoch = match config.detect.overfit {
        0 => (sets.train.images.len() / config.optim.batch_size) as u64,
        _ => OVERFIT_STEPS,
    };
    let data = sets.fingerprint();
    Course::new(folder, &config.base, steps_per_epoch, data, around)
}

fn begin(
    course: &Course,
    config: &DetectorConfig,
    sets: &Sets,
    model: Detector,
) -> Result<DetectorOutcome> {
    let classes = serde_json::to_vec(sets.classes()).expect("classes are valid JSON");
    write_durably(&course.folder().file(CLASSES_FILE), &classes)?;
    let floors = Floors::from(&baselines(&sets.train, &sets.val, config.seed)?);
    let mut baseline = json!(floors);
    baseline["kind"] = BASELINE.into();
    let model = match config.detect.whiten {
        true => whitened(model, config, sets)?,
        false => model,
    };
    go(course, config, sets, Start::Anew(model, baseline))
}

fn whitened(model: Detector, config: &DetectorConfig, sets: &Sets) -> Result<Detector> {
    let order = random::permutation(config.seed, Purpose::Sample, 0, sets.train.images.len());
    let looked_at = &order[..WHITENED_ON.min(order.len())];
    let batches = looked_at
        .chunks(config.optim.batch_size)
        .map(|indices| DetectionBatch::whole(&sets.train, indices, config.image_size));
    model.whitened_for(batches)
}

fn go(
    course: &Course,
    config: &DetectorConfig,
    sets: &Sets,
    from: Start<Detector>,
) -> Result<DetectorOutcome> {
    let device = crate::device().autodiff();
    let mut training = Training {
        config,
        sets,
        loader: loader(config, sets, from.steps()),
        observer: course.observer(),
        last: None,
        evaluation: None,
    };
    let (model, outcome) = course.go(&mut training, optimizer(config), &device, from)?;
    let evaluation = match training.evaluation {
        _ if outcome.stopped() => None,
        None => Some(evaluate(
            &model.valid(),
            &sets.val,
            &EvaluationConfig::new(config.image_size),
            course.observer(),
        )?),
        found => found,
    };
    Ok(DetectorOutcome {
        course: outcome,
        evaluation,
        floors: logged_floors(course.folder())?,
    })
}

fn optimizer(config: &DetectorConfig) -> AdamWConfig {
    AdamWConfig {
        encoder_rate: config.detect.encoder_rate,
        ..AdamWConfig::from(&config.optim)
    }
}

/// A network of the configuration's form on the autodiff device; fresh but for the encoder where one is given.
fn fresh(config: &DetectorConfig, given: Option<Encoder>, classes: usize) -> Result<Detector> {
    let device = crate::device().autodiff();
    let mut init = Init::new(config.seed, &device);
    let build = Build {
        stride: config.encoder.stride,
        inputs: config.data.channels,
    };
    let blank = encoder::find(&config.encoder.name)?.build(build, &mut init)?;
    let strides = &config.detect.strides;
    let channels = blank.map_channels(config.data.channels, &strides[..strides.len() - 1]);
    if channels.len() < strides.len() {
        return Err(Error::Value {
            key: "detect.strides".into(),
            value: format!("{strides:?}"),
            expected: format!("strides of maps that {} has", config.encoder.name),
        });
    }
    let levels = channels.into_iter().zip(strides);
    let shape = Shape {
        head: config.head.clone(),
        levels: levels
            .map(|(channels, &stride)| Level { channels, stride })
            .collect(),
        classes,
        unfreeze: config.detect.unfreeze,
    };
    Ok(Detector::new(given.unwrap_or(blank), &shape, &mut init))
}

fn loader(config: &DetectorConfig, sets: &Sets, first_step: u64) -> DetectionLoader {
    let loading = DetectionLoaderConfig {
        seed: config.seed,
        image_size: config.image_size,
        batch_size: config.optim.batch_size,
        view: (config.detect.overfit == 0).then(|| config.view.clone()),
        data: config.data.clone(),
    };
    DetectionLoader::new(&sets.train, &loading, first_step)
}

fn logged_floors(run: &RunFolder) -> Result<Floors> {
    let floors = serde_json::from_value(run.baseline()?.unwrap_or_default());
    floors.map_err(|error| Error::Foreign {
        path: run.path().to_owned(),
        message: format!("its log does not begin with what needs no learning ({error})"),
    })
}

/// A training under way.
struct Training<'a> {
    config: &'a DetectorConfig,
    sets: &'a Sets,
    loader: DetectionLoader,
    observer: &'a dyn Observer,
    last: Option<LossFigures>,
    evaluation: Option<Evaluation>,
}

impl Trainee for Training<'_> {
    type Model = Detector;
    type Batch = DetectionBatch;
    const STAGE: &'static str = "training the detector";

    fn next_batch(&mut self) -> Result<(DetectionBatch, Vec<BadImage>)> {
        let mut batch = self.loader.next_batch()?;
        let passed_over = std::mem::take(&mut batch.passed_over);
        Ok((batch, passed_over))
    }

    fn loss(&mut self, model: &Detector, batch: &DetectionBatch) -> Tensor<1> {
        let (loss, figures) = loss(self.config, model, batch);
        self.last = Some(figures);
        loss
    }

    fn add_figures(&self, event: &mut Value) {
        if let Some(last) = &self.last {
            event["terms"] = json!(last.terms);
            event["matched"] = last.matched.into();
            event["objects"] = last.objects.into();
            event["iou"] = last.iou().into();
        }
    }

    fn remark(&self) -> String {
        self.last.as_ref().map_or_else(String::new, |last| {
            format!(
                " · {} of {} boxes matched, mean IoU {:.2}",
                last.matched,
                last.objects,
                last.iou()
            )
        })
    }

    fn end_of_epoch(&mut self, epoch: u64, model: &Detector, event: &mut Value) -> Result<()> {
        let every = self.config.run.watch_every as u64;
        let last = epoch == self.config.optim.epochs as u64;
        if !(every > 0 && epoch.is_multiple_of(every) || last) {
            return Ok(());
        }
        let how = EvaluationConfig::new(self.config.image_size);
        let evaluation = evaluate(&model.valid(), &self.sets.val, &how, &Silent)?;
        let figures = Figures::from(&evaluation.score);
        event["ap"] = figures.ap.into();
        event["ap50"] = figures.ap50.into();
        event["ap75"] = figures.ap75.into();
        self.observer
            .note(&format!("after epoch {epoch}: {figures}"));
        self.evaluation = last.then_some(evaluation);
        Ok(())
    }

    fn keep_batch(&self, step: u64) -> Result<KeptBatch> {
        let batch = loader(self.config, self.sets, step).next_batch()?;
        let name = |&index: &usize| self.sets.train.images[index].name.clone();
        Ok(KeptBatch {
            epoch: batch.epoch,
            files: batch.indices.iter().map(name).collect(),
            indices: batch.indices,
            pixels: Named {
                shape: batch.shape.to_vec(),
                values: batch.pixels,
            },
            rest: json!([batch.placements, batch.boxes]),
        })
    }
}

fn loss(
    config: &DetectorConfig,
    model: &Detector,
    batch: &DetectionBatch,
) -> (Tensor<1>, LossFigures) {
    let spoilt: Vec<_> = batch
        .indices
        .iter()
        .zip(&batch.boxes)
        .map(|(&index, objects)| {
            let (epoch, index) = (batch.epoch, index as u64);
            let mut random = random::stream(config.seed, Purpose::Denoising, epoch, index);
            noised(
                objects,
                model.head().classes(),
                &config.denoising,
                &mut random,
            )
        })
        .collect();
    let (pixels, placements) = (pixels(batch, &crate::device()), &batch.placements);
    let unfreeze = config.detect.unfreeze;
    let alike = model.head().alike(placements);
    let (total, parts) = sum_of_losses(model, alike, |model, alike| {
        let group = model.train_forward(&pixels, alike, placements, &spoilt, unfreeze);
        let losses = losses(&[group], &batch.boxes, &spoilt, &config.loss);
        (losses.total, losses.figures)
    });
    (total, parts.into_iter().sum())
}

/// Takes the bad step that a run has kept once more.
pub fn replay(run: &RunFolder, config: &DetectorConfig) -> Result<Replay> {
    let device = crate::device().autodiff();
    let model = fresh(config, None, read_classes(run)?.len())?;
    replay_step(run, model, optimizer(config), &device, |model, kept| {
        let (placements, boxes): (Vec<Placement>, Vec<Vec<ViewBox>>) =
            serde_json::from_value(kept.rest.clone())
                .map_err(|error| format!("its boxes are damaged ({error})"))?;
        let Ok(shape) = <[usize; 4]>::try_from(&kept.pixels.shape[..]) else {
            return Err("its pixels are no batch of images".into());
        };
        let batch = DetectionBatch {
            epoch: kept.epoch,
            indices: kept.indices.clone(),
            pixels: kept.pixels.values.clone(),
            shape,
            boxes,
            placements,
            passed_over: Vec::new(),
        };
        Ok(loss(config, model, &batch).0)
    })
}

fn read_classes(run: &RunFolder) -> Result<Vec<Class>> {
    let path = run.file(CLASSES_FILE);
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Foreign {
        path,
        message: format!("is damaged ({error})"),
    })
}

/// A detector as a run has it now.
pub struct Trained {
    /// For evaluation.
    pub detector: Detector,
    /// The run's.
    pub config: DetectorConfig,
    /// In the order of their numbers.
    pub classes: Vec<Class>,
    /// Steps it was trained for.
    pub steps: u64,
    /// Steps that were planned.
    pub planned: u64,
    run: PathBuf,
    /// Fingerprint of the images and boxes.
    data: String,
}

impl Trained {
    /// From a run's newest checkpoint that verifies.
    pub fn open(run: &RunFolder, observer: &dyn Observer) -> Result<Self> {
        let config = DetectorConfig::of_run(run)?;
        let checkpoints = run.checkpoints(config.run.keep_checkpoints);
        if checkpoints.is_empty()? {
            return Err(Error::Foreign {
                path: run.path().to_owned(),
                message: format!(
                    "the run has no checkpoint yet; go on with `qbheat resume {}`",
                    run.path().display()
                ),
            });
        }
        let classes = read_classes(run)?;
        let checkpoint = checkpoints.newest_valid(observer)?;
        let model = fresh(&config, None, classes.len())?;
        let loaded = checkpoint.model.load_into(model);
        let detector = loaded.map_err(|source| Error::Weights {
            path: run.path().to_owned(),
            source,
        })?;
        let position = checkpoint.position;
        Ok(Self {
            detector: detector.valid(),
            classes,
            steps: position.step,
            planned: config.optim.epochs as u64 * position.steps_per_epoch,
            config,
            run: run.path().to_owned(),
            data: position.data,
        })
    }

    /// Refuses other images, boxes or classes than it was trained with.
    pub fn check_images(&self, sets: &Sets) -> Result<()> {
        check_images(&self.run, &self.data, &self.classes, sets)
    }

    /// What a table says of it.
    pub fn facts(&self, sets: &Sets) -> Vec<(&'static str, String)> {
        let Self {
            detector, config, ..
        } = self;
        let weights = match config.encoder.init.as_os_str().is_empty() {
            true => "untrained".to_owned(),
            false => config.encoder.init.display().to_string(),
        };
        let strides = config.detect.strides.iter().map(usize::to_string);
        let strides: Vec<String> = strides.collect();
        let state = match config.detect.unfreeze {
            true => format!("trained at {} of the rate", config.detect.encoder_rate),
            false => "frozen".to_owned(),
        };
        vec![
            (
                "encoder",
                format!(
                    "{} ({weights}), {state}; maps of stride {}",
                    config.encoder.name,
                    strides.join(", ")
                ),
            ),
            (
                "head",
                format!(
                    "{:.2} M parameters, {} queries",
                    StateDict::of(detector.head()).parameters() as f64 / 1e6,
                    config.head.queries
                ),
            ),
            (
                "data",
                format!(
                    "{}, {} images; scored on {}, {} images; frames of {} px",
                    sets.train.path().display(),
                    sets.train.images.len(),
                    sets.val.path().display(),
                    sets.val.images.len(),
                    config.image_size
                ),
            ),
            (
                "training",
                format!(
                    "after {} of {} steps of {} images, seed {}",
                    self.steps, self.planned, config.optim.batch_size, config.seed
                ),
            ),
        ]
    }

    /// What it finds in one picture, most certain first.
    pub fn find(&self, picture: &Picture, how: &EvaluationConfig) -> Vec<Prediction> {
        let view = View::whole(picture, &[], how.image_size);
        let placement = view.placement;
        let batch = DetectionBatch::of(vec![(0, view)]);
        let pixels = pixels(&batch, &crate::device());
        let found = self.detector.detect(pixels, &[placement], how.limit);
        let found = found.into_iter().next().unwrap_or_default();
        in_picture(found, &placement, how.suppress)
    }
}
