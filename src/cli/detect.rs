//! `qbheat detect`

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use qbheat::config::{Base, DetectConfig, DetectorConfig};
use qbheat::data::ImageSize;
use qbheat::detect::{
    self, DetectorOutcome, Evaluation, EvaluationConfig, Figures, Origin, PredictConfig, Sets,
    Trained, evaluate, find_parts, percent, predict,
};
use qbheat::error::{Error, Result};
use qbheat::observe::Observer;
use qbheat::train::{RunFolder, Surroundings};
use serde_json::json;

use super::progress::Progress;
use super::{
    Answer, Common, Settings, answer_of_stop, compute_as, describe_bad_images, json_of_course,
    signals,
};

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

/// Images with boxes.
#[derive(Args)]
struct Boxes {
    /// COCO's .json, or a .tar or folder that holds it and the images.
    #[arg(long)]
    data: PathBuf,
    /// Folder or .tar of the images, where they do not lie beside the .json.
    #[arg(long)]
    images: Option<PathBuf>,
    /// A piece of the annotation file's name, where --data holds several; training takes train where there is one.
    #[arg(long)]
    part: Option<String>,
}

impl Boxes {
    fn origin(&self) -> Origin {
        Origin {
            path: self.data.clone(),
            images: self.images.clone().unwrap_or_default(),
            part: self.part.clone().unwrap_or_default(),
        }
    }
}

#[derive(Args)]
struct Train {
    /// The encoder: a run, an encoder.safetensors, untrained:ENCODER, or builtin:mobilenet-tiny-cifar10.
    weights: String,
    #[command(flatten)]
    boxes: Boxes,
    /// Images to score, as --data has them [default: the part val of --data, else some of the images are held out].
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
    /// Only see whether it can learn: 8 images by heart in 300 steps, without images to score. Exits with 1 where AP stays
    /// below 0.9.
    #[arg(long, conflicts_with_all = ["val", "val_part", "limit", "batch_size"])]
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
        compute_as(&self.machine()?.base, &self.common)?;
        let mut config = self.config()?;
        RunFolder::check_free(&self.out)?;
        find_parts(&mut config.detect)?;
        let sets = Sets::open(&config, progress)
            .map_err(|error| in_flags_of_train(error, &config.detect))?;
        progress.note(&sets.describe());
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        let outcome = detect::start(&config, &sets, &self.out, &around)?;
        Ok(answer_of_detector(&outcome, &config))
    }

    /// A configuration that says what computes, before anything does.
    fn machine(&self) -> Result<DetectorConfig> {
        // What is wrong with the file is said where the rest of it is read.
        let file = self.config.as_ref();
        let file = file.and_then(|path| fs::read_to_string(path).ok());
        let file: Base = toml::from_str(&file.unwrap_or_default()).unwrap_or_default();
        let mut settings = Settings::default();
        settings
            .add("threads", Some(file.threads))
            .add("device", Some(file.device))
            .add("kernels", Some(file.kernels))
            .parsed(&self.settings)?;
        DetectorConfig::of_process(settings.0)
    }

    fn config(&self) -> Result<DetectorConfig> {
        // What the weights were made for comes before what the user wishes.
        let (_, of_weights) = DetectorConfig::settings_of_weights(&self.weights)
            .map_err(|error| error.called("WEIGHTS"))?;
        let mut settings = Settings::default();
        if self.overfit_one_batch {
            settings
                .add("detect.overfit", Some(OVERFIT_IMAGES))
                .add("optim.epochs", Some(OVERFIT_EPOCHS));
        }
        settings
            .common(&self.common)
            .add("detect.unfreeze", self.unfreeze.then_some(true))
            .add("detect.class_agnostic", self.class_agnostic.then_some(true))
            .add("detect.limit", self.limit)
            .add("image_size", self.image_size.map(ImageSize::to_toml))
            .add("optim.epochs", self.epochs)
            .add("optim.batch_size", self.batch_size);
        let train = self.boxes.origin();
        let val = train.to_score(
            self.val.as_deref().unwrap_or(Path::new("")),
            self.val_images.as_deref().unwrap_or(Path::new("")),
            self.val_part.as_deref().unwrap_or_default(),
        );
        settings.0.extend(train.settings("detect.train"));
        settings.0.extend(val.settings("detect.val"));
        settings.parsed(&self.settings)?;
        DetectorConfig::load_for(of_weights, self.config.as_deref(), settings.pairs())
    }
}

/// An error with the flag by which a path was given to `detect train`: whoever opens images does not know whether they
/// are those to score.
fn in_flags_of_train(error: Error, config: &DetectConfig) -> Error {
    let DetectConfig { train, val, .. } = config;
    let flag = match &error {
        Error::Missing { path, .. } if *path == val.path && *path != train.path => "--val",
        Error::Missing { path, .. } if *path == val.images && *path != train.images => {
            "--val-images"
        }
        _ => return error,
    };
    error.called(flag)
}

#[derive(Args)]
struct Eval {
    /// The run of a detector.
    detector: PathBuf,
    #[command(flatten)]
    boxes: Boxes,
    /// Leave out predictions that overlap a more certain one of their class by an IoU above this; early in training there
    /// may be duplicates.
    #[arg(long, value_name = "IOU", value_parser = parse_share)]
    suppress: Option<f64>,
    #[command(flatten)]
    common: Common,
}

impl Eval {
    fn run(&self, progress: &Progress) -> Result<Answer> {
        let trained = open_trained(&self.detector, &self.common, progress)?;
        let Trained {
            config,
            classes,
            steps,
            planned,
            ..
        } = &trained;
        let origin = self.boxes.origin();
        let set = config
            .detect
            .open_for(&origin, classes, &config.data, progress)?;
        progress.note(&set.describe());
        let how = EvaluationConfig {
            suppress: self.suppress,
            ..EvaluationConfig::new(config.image_size)
        };
        let evaluation = evaluate(&trained.detector, &set, &how, progress)?;
        let mut json = json!(Figures::from(&evaluation.score));
        json["detector"] = json!(self.detector);
        json["steps"] = json!(steps);
        json["planned_steps"] = json!(planned);
        json["score"] = json!(evaluation.score);
        let text = describe_score(&evaluation);
        Ok(Answer::done(
            json,
            format!("after {steps} of {planned} steps: {text}"),
        ))
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
    #[arg(long, default_value_t = 0.3, value_parser = parse_share)]
    least_score: f64,
    /// Leave out what overlaps something more certain of its class by an IoU above this.
    #[arg(long, value_name = "IOU", value_parser = parse_share)]
    suppress: Option<f64>,
    #[command(flatten)]
    common: Common,
}

impl Predict {
    fn run(&self, progress: &Progress) -> Result<Answer> {
        let trained = open_trained(&self.detector, &self.common, progress)?;
        let how = EvaluationConfig {
            suppress: self.suppress,
            ..EvaluationConfig::new(trained.config.image_size)
        };
        let config = PredictConfig {
            least_score: self.least_score,
        };
        signals::catch();
        let around = Surroundings {
            observer: progress,
            stop: &|| signals::received().is_some(),
        };
        let found = predict(
            |picture| trained.find(picture, &how),
            &trained.classes,
            &trained.config.data,
            &self.images,
            &self.out,
            &config,
            &around,
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
        let mut exit_code = 0;
        if found.missing > 0 {
            text += &format!("; stopped, {} images are missing", found.missing);
            exit_code = signals::exit_code();
        }
        Ok(Answer {
            exit_code,
            json: json!(found),
            text,
        })
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a number from 0 to 1 is expected".to_owned())
}

/// A detector from its run, on the machine that the command asks for.
pub fn open_trained(run: &Path, common: &Common, observer: &dyn Observer) -> Result<Trained> {
    let run = RunFolder::open(run)?;
    compute_as(&DetectorConfig::of_run(&run)?.base, common)?;
    Trained::open(&run, observer)
}

/// How a detector's training ended, for people and for scripts.
pub fn answer_of_detector(outcome: &DetectorOutcome, config: &DetectorConfig) -> Answer {
    let DetectorOutcome {
        course,
        evaluation,
        floors,
    } = outcome;
    let mut json = json_of_course(course);
    let Some(evaluation) = evaluation else {
        return answer_of_stop(course, json);
    };
    let (run, score) = (course.run.display(), &evaluation.score);
    let figures = Figures::from(score);
    for (key, figure) in [
        ("ap", figures.ap),
        ("ap50", figures.ap50),
        ("ap75", figures.ap75),
    ] {
        json[key] = figure.into();
    }
    json["score"] = json!(score);
    json["mean_boxes"] = json!(floors.mean_boxes);
    json["chance"] = json!(floors.chance);
    let pace = match course.losses {
        Some(_) => format!("{:.1} images/s", course.images_per_s),
        None => "nothing left to do".to_owned(),
    };
    let mut text = format!(
        "finished after {} steps, {pace}{}\n{}\nmean boxes of the training images: {}; random boxes: {}",
        course.steps,
        describe_bad_images(course),
        describe_score(evaluation),
        floors.mean_boxes,
        floors.chance,
    );
    if config.detect.overfit == 0 {
        text += &format!("\nnext: qbheat report {run}, qbheat detect predict {run} IMAGE… --out …");
        return Answer::done(json, text);
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
    Answer {
        exit_code: u8::from(!sound),
        json,
        text,
    }
}

fn describe_score(evaluation: &Evaluation) -> String {
    let score = &evaluation.score;
    let mut text = format!(
        "{}; small {}, medium {}, large {}",
        Figures::from(score),
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
