//! `qbheat detect`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use qbheat::compute_on;
use qbheat::config::DetectorConfig;
use qbheat::data::ImageSize;
use qbheat::detect::{
    self, DetectionSet, DetectorOutcome, Evaluation, EvaluationConfig, Origin, PredictConfig, Sets,
    Trained, baselines, describe, evaluate, find_parts, predict,
};
use qbheat::error::Result;
use qbheat::observe::Observer;
use qbheat::train::{RunFolder, Surroundings};
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common, Settings, compute_as, signals};

/// Images of `--overfit-one-batch`, its epochs (of 25 steps), and the AP that a sound head reaches on them.
const OVERFIT_IMAGES: usize = 8;
const OVERFIT_EPOCHS: usize = 12;
const OVERFIT_AP: f64 = 0.9;

#[derive(Args)]
pub struct Detect {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a detector's head on images with boxes, on a frozen encoder.
    Train(Box<Train>),
    /// Score a detector: COCO's average precision.
    Eval(Eval),
    /// Find objects in images: pictures with boxes, and a COCO results file.
    Predict(Predict),
}

impl Detect {
    pub fn json(&self) -> bool {
        match &self.command {
            Command::Train(command) => command.common.json,
            Command::Eval(command) => command.common.json,
            Command::Predict(command) => command.common.json,
        }
    }

    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        match &self.command {
            Command::Train(command) => command.run(progress),
            Command::Eval(command) => command.run(progress),
            Command::Predict(command) => command.run(progress),
        }
    }
}

#[derive(Args)]
struct Train {
    /// The encoder: a run, an encoder.safetensors, untrained:ENCODER, or builtin:mobilenet-tiny-cifar10.
    weights: String,
    /// COCO's .json, or a .tar or folder that holds it and the images.
    #[arg(long)]
    data: PathBuf,
    /// Folder or .tar of the images, where they do not lie beside the .json.
    #[arg(long)]
    images: Option<PathBuf>,
    /// A piece of the annotation file's name, where --data holds several [default: train].
    #[arg(long)]
    part: Option<String>,
    /// The same for the images to score [default: val in --data, else some of the images are held out].
    #[arg(long)]
    val: Option<PathBuf>,
    /// Folder or .tar of the images of --val [default: --images].
    #[arg(long, requires = "val")]
    val_images: Option<PathBuf>,
    /// A piece of the name of the annotation file of --val, where it holds several.
    #[arg(long)]
    val_part: Option<String>,
    /// The run folder to make.
    #[arg(long)]
    out: PathBuf,
    /// Train the encoder too, with a learning rate of its own (detect.encoder_rate).
    #[arg(long)]
    unfreeze: bool,
    /// Take all boxes for one class.
    #[arg(long)]
    class_agnostic: bool,
    /// Train on at most this many images, drawn with the seed.
    #[arg(long)]
    limit: Option<usize>,
    /// Size of the frames: a side in pixels, or HEIGHTxWIDTH [default: 256].
    #[arg(long)]
    image_size: Option<ImageSize>,
    /// Passes over the images [default: 60].
    #[arg(long)]
    epochs: Option<usize>,
    /// Images a step [default: 8].
    #[arg(long)]
    batch_size: Option<usize>,
    /// Only see whether it can learn: 8 images by heart in 300 steps. Exits with 1 where AP stays below 0.9.
    #[arg(long)]
    overfit_one_batch: bool,
    /// A TOML file of settings; flags and --set win over it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A setting, such as head.queries=50; may be given often.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    #[command(flatten)]
    common: Common,
}

impl Train {
    fn run(&self, progress: &Progress) -> Result<Answer> {
        // Weights are opened for their form before there is a configuration, and that settles the device.
        if let Some(device) = self.common.device {
            compute_on(device)?;
        }
        let mut config = self.config()?;
        compute_as(&config.base, &self.common)?;
        RunFolder::check_free(&self.out)?;
        find_parts(&mut config.detect)?;
        let sets = Sets::open(&config, progress)?;
        progress.note(&describe_sets(&sets, config.detect.overfit > 0));
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        let outcome = detect::start(&config, &sets, &self.out, &around)?;
        answer_of_detector(&outcome, &config, &sets)
    }

    fn config(&self) -> Result<DetectorConfig> {
        // What the weights were made for comes before what the user wishes.
        let (_, settings) = DetectorConfig::settings_of_weights(&self.weights)?;
        let mut settings = Settings(settings);
        if self.overfit_one_batch {
            settings
                .add("detect.overfit", Some(OVERFIT_IMAGES))
                .add("optim.epochs", Some(OVERFIT_EPOCHS));
        }
        let images = self.images.as_ref().map(|path| path.display());
        let val_images = self.val_images.as_ref().or(self.images.as_ref());
        settings
            .common(&self.common)
            .add("detect.train.path", Some(self.data.display()))
            .add("detect.train.images", images)
            .add("detect.train.part", self.part.as_ref())
            .add("detect.val.part", self.val_part.as_ref())
            .add("detect.unfreeze", self.unfreeze.then_some(true))
            .add("detect.class_agnostic", self.class_agnostic.then_some(true))
            .add("detect.limit", self.limit)
            .add("image_size", self.image_size.map(ImageSize::to_toml))
            .add("optim.epochs", self.epochs)
            .add("optim.batch_size", self.batch_size);
        let own_part = self.val_part.as_ref().map(|_| &self.data);
        if let Some(val) = self.val.as_ref().or(own_part) {
            settings
                .add("detect.val.path", Some(val.display()))
                .add("detect.val.images", val_images.map(|path| path.display()));
        }
        settings.parsed(&self.settings)?;
        DetectorConfig::load(self.config.as_deref(), settings.pairs())
    }
}

#[derive(Args)]
struct Eval {
    /// The run of a detector.
    detector: PathBuf,
    /// COCO's .json, or a .tar or folder that holds it and the images.
    #[arg(long)]
    data: PathBuf,
    /// Folder or .tar of the images, where they do not lie beside the .json.
    #[arg(long)]
    images: Option<PathBuf>,
    /// A piece of the annotation file's name, where --data holds several.
    #[arg(long)]
    part: Option<String>,
    /// Leave out predictions that overlap a more certain one of their class by an IoU above this; early in training there
    /// may be duplicates.
    #[arg(long, value_name = "IOU")]
    suppress: Option<f64>,
    #[command(flatten)]
    common: Common,
}

impl Eval {
    fn run(&self, progress: &Progress) -> Result<Answer> {
        let trained = Trained::open_with(&self.detector, &self.common)?;
        let origin = Origin {
            path: self.data.clone(),
            images: self.images.clone().unwrap_or_default(),
            part: self.part.clone().unwrap_or_default(),
        };
        let set = DetectionSet::open(&origin, &trained.config.data, progress)?;
        let set = match trained.config.detect.class_agnostic {
            true => set.class_agnostic(),
            false => set.with_classes(&trained.classes)?,
        };
        progress.note(&describe_set(&set));
        let how = EvaluationConfig {
            suppress: self.suppress,
            ..EvaluationConfig::new(trained.config.image_size)
        };
        let evaluation = evaluate(&trained.detector, &set, &how, progress)?;
        let json = json!({
            "detector": self.detector,
            "steps": trained.steps,
            "ap": evaluation.score.ap,
            "ap50": evaluation.score.ap50,
            "ap75": evaluation.score.ap75,
            "score": evaluation.score,
        });
        Ok(Answer::done(json, describe_score(&evaluation)))
    }
}

#[derive(Args)]
struct Predict {
    /// The run of a detector.
    detector: PathBuf,
    /// Images, folders of them, or .tar files.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// A folder to make, for the pictures and results.json.
    #[arg(long)]
    out: PathBuf,
    /// Least score, from 0 to 1, of what is drawn and written.
    #[arg(long, default_value_t = 0.3)]
    least_score: f64,
    /// Leave out what overlaps something more certain of its class by an IoU above this.
    #[arg(long, value_name = "IOU")]
    suppress: Option<f64>,
    #[command(flatten)]
    common: Common,
}

impl Predict {
    fn run(&self, progress: &Progress) -> Result<Answer> {
        let trained = Trained::open_with(&self.detector, &self.common)?;
        let how = EvaluationConfig {
            suppress: self.suppress,
            ..EvaluationConfig::new(trained.config.image_size)
        };
        let config = PredictConfig {
            least_score: self.least_score,
            most: how.limit,
        };
        let found = predict(
            |picture| Ok(trained.find(picture, &how)),
            &trained.classes,
            &trained.config.data,
            &self.images,
            &self.out,
            &config,
            progress,
        )?;
        let mut text = format!(
            "{} boxes in {} images: {}",
            found.boxes,
            found.pictures,
            found.results.display()
        );
        if !found.unreadable.is_empty() {
            text += &format!("; {} images could not be read", found.unreadable.len());
        }
        Ok(Answer::done(json!(found), text))
    }
}

/// A detector from its run, on the machine that the command asks for.
trait OpenWith: Sized {
    fn open_with(run: &Path, common: &Common) -> Result<Self>;
}

impl OpenWith for Trained {
    fn open_with(run: &Path, common: &Common) -> Result<Self> {
        let run = RunFolder::open(run)?;
        compute_as(&DetectorConfig::of_run(&run)?.base, common)?;
        Trained::open(&run)
    }
}

/// How a detector's training ended, for people and for scripts.
pub fn answer_of_detector(
    outcome: &DetectorOutcome,
    config: &DetectorConfig,
    sets: &Sets,
) -> Result<Answer> {
    let DetectorOutcome { course, evaluation } = outcome;
    let run = course.run.display();
    let (first, last) = course.losses.unzip();
    let mut json = json!({
        "run": course.run,
        "steps": course.steps,
        "planned_steps": course.planned,
        "first_loss": first,
        "last_loss": last,
        "images_per_s": course.images_per_s,
        "bad_images": course.bad_images,
    });
    let Some(evaluation) = evaluation else {
        return Ok(super::answer_of_stop(course, json));
    };
    let floors = baselines(&sets.train, &sets.val, config.seed)?;
    let score = &evaluation.score;
    for (key, figure) in [("ap", score.ap), ("ap50", score.ap50), ("ap75", score.ap75)] {
        json[key] = figure.into();
    }
    json["score"] = json!(score);
    json["mean_boxes"] = json!({"ap": floors.mean_boxes.ap, "ap50": floors.mean_boxes.ap50});
    json["chance"] = json!({"ap": floors.chance.ap, "ap50": floors.chance.ap50});
    let mut text = format!(
        "finished after {} steps, {:.1} images/s\n{}\nthe mean boxes of the training images have AP {} AP50 {}, random \
         boxes AP {} AP50 {}",
        course.steps,
        course.images_per_s,
        describe_score(evaluation),
        percent(floors.mean_boxes.ap),
        percent(floors.mean_boxes.ap50),
        percent(floors.chance.ap),
        percent(floors.chance.ap50),
    );
    if config.detect.overfit == 0 {
        text += &format!("\nnext: qbheat report {run}, qbheat detect predict {run} IMAGE… --out …");
        return Ok(Answer::done(json, text));
    }
    let sound = score.ap.is_some_and(|ap| ap > OVERFIT_AP);
    text += match sound {
        true => "\nit can learn: it knows its images by heart",
        false => {
            "\nSOMETHING IS WRONG: AP stays below 0.9 on the very images it was trained on. Look at their boxes with \
             `qbheat report`; where they are right, a small object may need a larger --image-size, a frozen encoder \
             --unfreeze, and a low learning rate more steps (--epochs) or a higher optim.learning_rate"
        }
    };
    Ok(Answer {
        exit_code: u8::from(!sound),
        json,
        text,
    })
}

fn percent(figure: Option<f64>) -> String {
    figure.map_or_else(|| "–".into(), |figure| format!("{:.1} %", 100.0 * figure))
}

fn describe_score(evaluation: &Evaluation) -> String {
    let score = &evaluation.score;
    let mut text = format!(
        "AP {}, AP50 {}, AP75 {}; small {}, medium {}, large {}",
        percent(score.ap),
        percent(score.ap50),
        percent(score.ap75),
        percent(score.ap_small),
        percent(score.ap_medium),
        percent(score.ap_large)
    );
    for class in &score.classes {
        text += &format!(
            "\n  {}: AP {}, AP50 {} ({} boxes)",
            class.class,
            percent(class.ap),
            percent(class.ap50),
            class.boxes
        );
    }
    text
}

fn describe_set(set: &DetectionSet) -> String {
    let mut text = format!("{}: {}", set.path().display(), set.summary());
    if !set.findings.is_empty() {
        text += &format!("\n{}", describe(&set.findings));
    }
    text
}

/// What is to be known before a training begins.
pub fn describe_sets(sets: &Sets, overfit: bool) -> String {
    let mut text = format!("training on {}", describe_set(&sets.train));
    if overfit {
        return text + "\nand scored on the same images: this only shows whether it can learn";
    }
    text += &format!("\nscored on {}", describe_set(&sets.val));
    let summary = sets.val.summary();
    let missing = summary.missing_classes();
    if !missing.is_empty() {
        text += &format!(
            "\nof these classes there is no box to score: {}",
            missing.join(", ")
        );
    }
    text
}
