//! The page of a detector.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::iter::once;
use std::path::PathBuf;

use askama::Template;
use serde_json::Value;

use super::{REPORT_FILE, pictures, plots};
use crate::data::Picture;
use crate::detect::{Baselines, COLOURS, ClassScore, DetectionSet, Prediction, Score, describe};
use crate::error::Result;
use crate::train::{RunFolder, write_durably};

/// Classes whose curves of precision and recall are drawn.
const CURVES: usize = 12;
/// No more than there are colours to tell them apart.
const CURVES_A_PLOT: usize = 6;
/// Classes up to which a person can read the table of confusion.
const CONFUSED: usize = 20;
/// Best, middling and worst images shown.
const SHOWN: [usize; 3] = [4, 4, 8];
/// Found boxes drawn on an image.
const DRAWN: usize = 100;
/// Pixels of a shown picture's longer side.
const LONGEST: usize = 480;
/// What the page of a detector is made of.
pub struct DetectionReport<'a> {
    /// The run's folder: its log and its configuration.
    pub run: &'a RunFolder,
    /// What stands at the top, such as encoder, data and training.
    pub facts: Vec<(&'static str, String)>,
    /// The images that were trained on.
    pub train: &'a DetectionSet,
    /// The images that are scored.
    pub held_out: &'a DetectionSet,
    /// For each image of `held_out`, most certain first.
    pub predictions: &'a [Vec<Prediction>],
    /// What they are worth.
    pub score: &'a Score,
    /// What predictors are worth that look at no picture.
    pub baselines: &'a Baselines,
    /// Least score of the boxes that are drawn, and of those that [`Score::confusion`] counts.
    pub confidence: f64,
}

#[derive(Template)]
#[template(path = "detection.html")]
struct Page<'a> {
    title: String,
    facts: &'a [(&'static str, String)],
    /// What the images are that it is scored on.
    scored: &'static str,
    sentence: String,
    figures: Vec<(&'static str, [String; 7])>,
    classes: Vec<ClassRow<'a>>,
    curves_note: String,
    curves: Vec<String>,
    confusion: Option<Confusion<'a>>,
    most_confused: usize,
    confidence: f64,
    training: Vec<Plot>,
    most_drawn: usize,
    groups: Vec<Group>,
    unreadable: Vec<String>,
    data: Vec<Part>,
    config: String,
}

struct ClassRow<'a> {
    name: &'a str,
    boxes: usize,
    ap: String,
    ap50: String,
}

/// Which class was taken for which; a cell is how often, and its style.
struct Confusion<'a> {
    columns: Vec<&'a str>,
    rows: Vec<(&'a str, Vec<(&'static str, String)>)>,
}

struct Plot {
    caption: &'static str,
    svg: String,
}

/// Images that are found equally well.
struct Group {
    heading: &'static str,
    images: Vec<Shown>,
}

/// An image with its boxes.
struct Shown {
    /// Of the image in its set: tells its picture from the others of the page.
    number: usize,
    name: String,
    ap: String,
    /// A data URL.
    picture: String,
    frame: Frame,
    panels: [Panel; 2],
}

struct Panel {
    caption: String,
    boxes: Vec<Drawn>,
}

/// The picture's coordinates, and sizes in them that come out alike for pictures of any size.
#[derive(Clone, Copy)]
struct Frame {
    width: u32,
    height: u32,
    line: f64,
    font: f64,
}

/// A box and where its label stands.
struct Drawn {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
    colour: String,
    crowd: bool,
    label: String,
    label_x: f64,
    label_y: f64,
    /// Which end of the label is at `label_x`.
    anchor: &'static str,
}

/// One of the two sets.
struct Part {
    heading: &'static str,
    path: String,
    summary: String,
    missing: String,
    findings: String,
}

/// Writes `report.html` into the run; its path. Pictures that cannot be read any more are named in the page.
///
/// # Panics
/// Where predictions or scores are those of another number of images, or of classes, than `held_out` has.
pub fn write_detection_report(report: &DetectionReport) -> Result<PathBuf> {
    let DetectionReport {
        run,
        facts,
        train,
        held_out,
        predictions,
        score,
        baselines,
        confidence,
    } = report;
    let images = held_out.images.len();
    assert_eq!(predictions.len(), images, "predictions of each image");
    assert_eq!(score.images.len(), images, "a score of each image");
    let (groups, unreadable) = groups(report)?;
    let scored = held_out.scored_beside(train).adjective();
    let page = Page {
        title: run
            .path()
            .file_name()
            .map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned()),
        facts,
        scored,
        sentence: sentence(images, scored, score, baselines),
        figures: vec![
            ("detector", figures(score)),
            (
                "mean boxes of the training images",
                figures(&baselines.mean_boxes),
            ),
            ("chance", figures(&baselines.chance)),
        ],
        classes: score.classes.iter().map(class_row).collect(),
        curves_note: curves_note(score),
        curves: curves(score)?,
        confusion: confusion(score),
        most_confused: CONFUSED,
        confidence: *confidence,
        training: training(&run.read_events()?)?,
        most_drawn: DRAWN,
        groups,
        unreadable,
        data: vec![
            part("Images to train on", train),
            part("Images to score", held_out),
        ],
        config: run.config()?,
    };
    let html = page.render().map_err(plots::failed)?;
    let path = run.file(REPORT_FILE);
    write_durably(&path, html.as_bytes())?;
    Ok(path)
}

fn percent(figure: Option<f64>) -> String {
    figure.map_or("–".into(), |figure| format!("{:.1}", 100.0 * figure))
}

fn figures(score: &Score) -> [String; 7] {
    [
        score.ap,
        score.ap50,
        score.ap75,
        score.ap_small,
        score.ap_medium,
        score.ap_large,
        score.recall[2],
    ]
    .map(percent)
}

/// The detector beside predictors that look at no picture.
fn sentence(images: usize, scored: &str, score: &Score, baselines: &Baselines) -> String {
    let Baselines { chance, mean_boxes } = baselines;
    let verdict = match (is_above(score, mean_boxes), is_above(score, chance)) {
        (true, true) => "It is above both, so it has learnt something of what it sees.",
        (false, true) => {
            "It is not above the mean boxes in both figures: nothing says that it has learnt anything of what it sees."
        }
        (true, false) => {
            "It is not above chance in both figures: nothing says that it has learnt anything of what it sees."
        }
        (false, false) => {
            "It is above neither of them in both figures: nothing says that it has learnt anything of what it sees."
        }
    };
    let boxes: usize = score.classes.iter().map(|class| class.boxes).sum();
    let of = |score: &Score| format!("{} and {}", percent(score.ap), percent(score.ap50));
    format!(
        "On {images} {scored} images with {boxes} boxes, AP and AP50 of the detector are {} %; two predictors that look at \
         no picture have {} % (mean boxes of the training images) and {} % (chance). {verdict}",
        of(score),
        of(mean_boxes),
        of(chance)
    )
}

/// Whether AP and AP50 are higher as the page shows them.
fn is_above(score: &Score, floor: &Score) -> bool {
    let shown = |figure: Option<f64>| figure.map(|figure| (1000.0 * figure).round() as i64);
    shown(score.ap) > shown(floor.ap) && shown(score.ap50) > shown(floor.ap50)
}

fn class_row(class: &ClassScore) -> ClassRow<'_> {
    ClassRow {
        name: &class.class,
        boxes: class.boxes,
        ap: percent(class.ap),
        ap50: percent(class.ap50),
    }
}

/// Classes of which there are boxes, those with most of them first.
fn by_boxes(score: &Score) -> Vec<&ClassScore> {
    let with_boxes = score.classes.iter().filter(|class| class.boxes > 0);
    let mut classes: Vec<&ClassScore> = with_boxes.collect();
    classes.sort_by_key(|class| Reverse(class.boxes));
    classes
}

fn curves_note(score: &Score) -> String {
    match by_boxes(score).len() {
        classes if classes > CURVES => {
            format!("Shown are the {CURVES} classes with most boxes, of {classes}.")
        }
        _ => String::new(),
    }
}

fn curves(score: &Score) -> Result<Vec<String>> {
    let mut classes = by_boxes(score);
    classes.truncate(CURVES);
    let plot = |classes: &[&ClassScore]| {
        let curves: Vec<plots::Named> = classes
            .iter()
            .map(|class| {
                let points = class.curve.iter();
                let points = points.map(|&[recall, precision]| (recall, precision));
                (class.class.clone(), points.collect())
            })
            .collect();
        plots::shares(&curves, "recall", "precision")
    };
    classes.chunks(CURVES_A_PLOT).map(plot).collect()
}

/// Nothing where there are too many classes.
fn confusion(score: &Score) -> Option<Confusion<'_>> {
    let none = score.classes.len();
    if none > CONFUSED {
        return None;
    }
    let classes = || score.classes.iter().map(|class| &class.class[..]);
    let rows = classes().chain(once("nothing there"));
    let rows = rows.zip(&score.confusion).enumerate();
    let cells = |row: usize, counts: &[u64]| -> Vec<(&'static str, String)> {
        let counts = counts.iter().enumerate();
        counts
            .map(|(column, count)| match row == column {
                // Where nothing is and nothing is found there is nothing to count.
                true if row == none => ("number", "–".to_owned()),
                true => ("number right", count.to_string()),
                false => ("number", count.to_string()),
            })
            .collect()
    };
    Some(Confusion {
        columns: classes().chain(once("not found")).collect(),
        rows: rows
            .map(|(row, (name, counts))| (name, cells(row, counts)))
            .collect(),
    })
}

/// What the log has of the way there.
fn training(events: &[Value]) -> Result<Vec<Plot>> {
    // `key` is a JSON pointer.
    let series = |kind: &str, x: &str, key: &str| -> Vec<(f64, f64)> {
        events
            .iter()
            .filter(|event| event["kind"] == kind)
            .filter_map(|event| Some((event[x].as_f64()?, event.pointer(key)?.as_f64()?)))
            .collect()
    };
    let of_steps = |key: &str| series("step", "step", key);
    let mut training = Vec::new();
    let mut add = |caption: &'static str, svg: String| training.push(Plot { caption, svg });

    let losses = of_steps("/loss");
    if !losses.is_empty() {
        add(
            "Loss of each step (orange), running mean (blue).",
            plots::loss(&losses, None)?,
        );
    }

    let names: BTreeSet<&String> = events
        .iter()
        .filter_map(|event| event["terms"].as_object())
        .flat_map(|terms| terms.keys())
        .collect();
    let terms: Vec<plots::Named> = names
        .into_iter()
        .map(|name| {
            let points = of_steps(&format!("/terms/{name}"));
            (name.clone(), plots::running_mean(&points))
        })
        .filter(|(_, points)| !points.is_empty())
        .collect();
    if !terms.is_empty() {
        add(
            "Terms of the loss, running means.",
            plots::curves(&terms, "step", "term of the loss")?,
        );
    }

    let watched: Vec<plots::Named> = [("AP", "/ap"), ("AP50", "/ap50")]
        .into_iter()
        .map(|(name, key)| {
            let points = series("epoch", "epoch", key).into_iter();
            // The log counts epochs from 0; a figure is that of the end of its epoch.
            let points = points.map(|(epoch, figure)| (epoch + 1.0, 100.0 * figure));
            (name.to_owned(), points.collect::<Vec<_>>())
        })
        // One point makes no line.
        .filter(|(_, points)| points.len() > 1)
        .collect();
    if !watched.is_empty() {
        add(
            "AP and AP50 on the images to score along the way.",
            plots::curves(&watched, "epochs", "%")?,
        );
    }

    let overlaps = of_steps("/iou");
    if !overlaps.is_empty() {
        add(
            "Mean IoU of matched queries with their true boxes, running mean.",
            plots::line(&plots::running_mean(&overlaps), "IoU")?,
        );
    }

    let rates = of_steps("/lr");
    if !rates.is_empty() {
        add("Learning rate.", plots::line(&rates, "learning rate")?);
    }
    Ok(training)
}

/// The images shown, and names of those that cannot be read any more.
fn groups(report: &DetectionReport) -> Result<(Vec<Group>, Vec<String>)> {
    let images = &report.held_out.images;
    // On an image without boxes every prediction is wrong, however uncertain: its AP says nothing.
    let figures: Vec<Option<f64>> = images
        .iter()
        .zip(&report.score.images)
        .map(|(image, figure)| figure.filter(|_| image.objects().next().is_some()))
        .collect();
    let mut unreadable = Vec::new();
    let mut groups = Vec::new();
    for (heading, numbers) in ["Best", "Middling", "Worst"]
        .into_iter()
        .zip(choose(&figures))
    {
        let mut shown = Vec::new();
        for number in numbers {
            match report.held_out.picture(number) {
                Ok(picture) => shown.push(show(report, number, &picture)?),
                Err(_) => unreadable.push(images[number].name.clone()),
            }
        }
        if !shown.is_empty() {
            groups.push(Group {
                heading,
                images: shown,
            });
        }
    }
    Ok((groups, unreadable))
}

/// Numbers of the images with the best figures, best first, of middling ones, and of the worst, worst first. None is
/// there twice: where there are too few, half are the worst.
fn choose(figures: &[Option<f64>]) -> [Vec<usize>; 3] {
    let with_figure = figures.iter().enumerate();
    let with_figure = with_figure.filter_map(|(number, figure)| Some((number, (*figure)?)));
    let mut order: Vec<(usize, f64)> = with_figure.collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let order: Vec<usize> = order.into_iter().map(|(number, _)| number).collect();
    let all = order.len();
    let [best, middling, worst] = SHOWN;
    let worst = worst.min(all.div_ceil(2));
    let best = best.min((all - worst).div_ceil(2));
    let middling = middling.min(all - worst - best);
    let start = ((all - middling) / 2).clamp(best, all - worst - middling);
    [
        order[..best].to_vec(),
        order[start..start + middling].to_vec(),
        order[all - worst..].iter().rev().copied().collect(),
    ]
}

fn show(report: &DetectionReport, number: usize, picture: &Picture) -> Result<Shown> {
    let image = &report.held_out.images[number];
    let frame = Frame::of(image.width, image.height);
    let class = |number: usize| &report.held_out.classes[number].name[..];
    let truth = image.boxes.iter().map(|object| {
        let crowd = if object.crowd { " (crowd)" } else { "" };
        let label = format!("{}{crowd}", class(object.class));
        frame.place(object.bbox, object.class, object.crowd, label)
    });
    let truth: Vec<Drawn> = truth.collect();
    let certain = report.predictions[number].iter();
    let certain = certain.filter(|found| found.score >= report.confidence);
    let found = certain.take(DRAWN).map(|found| {
        let label = format!("{} {:.2}", class(found.class), found.score);
        frame.place(found.bbox, found.class, false, label)
    });
    let mut found: Vec<Drawn> = found.collect();
    // What is drawn last lies on top.
    found.reverse();
    Ok(Shown {
        number,
        name: image.name.clone(),
        ap: percent(report.score.images[number]),
        picture: pictures::scaled(picture, LONGEST)?,
        frame,
        panels: [
            Panel {
                caption: format!("true boxes: {}", truth.len()),
                boxes: truth,
            },
            Panel {
                caption: format!("found boxes: {}", found.len()),
                boxes: found,
            },
        ],
    })
}

impl Frame {
    fn of(width: u32, height: u32) -> Self {
        let longer = f64::from(width.max(height));
        Self {
            width,
            height,
            line: short(longer / 200.0),
            font: short(longer / 26.0),
        }
    }

    fn place(self, bbox: [f64; 4], class: usize, crowd: bool, label: String) -> Drawn {
        let [left, top, width, height] = bbox;
        let (picture_width, picture_height) = (f64::from(self.width), f64::from(self.height));
        // The label of a box far to the right would leave the picture.
        let is_right = left > 0.6 * picture_width;
        let (anchor, label_x) = if is_right {
            ("end", (left + width).min(picture_width))
        } else {
            ("start", left.max(0.0))
        };
        // Above the box where there is room, else within it.
        let label_y = if top > self.font {
            top - 0.25 * self.font
        } else {
            top.max(0.0) + self.font
        };
        Drawn {
            left: short(left),
            top: short(top),
            width: short(width.max(0.0)),
            height: short(height.max(0.0)),
            colour: hex(COLOURS[class % COLOURS.len()]),
            crowd,
            label,
            label_x: short(label_x),
            label_y: short(label_y.min(picture_height)),
            anchor,
        }
    }
}

fn hex([red, green, blue]: [u8; 3]) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Hundredths of a pixel are enough.
fn short(pixels: f64) -> f64 {
    (100.0 * pixels).round() / 100.0
}

fn part(heading: &'static str, set: &DetectionSet) -> Part {
    let summary = set.summary();
    Part {
        heading,
        path: set.path().display().to_string(),
        missing: summary.missing_classes().join(", "),
        summary: summary.to_string(),
        findings: describe(&set.findings),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::data::DataConfig;
    use crate::detect::{Class, Origin, TrueBox, baselines, score};
    use crate::observe::Silent;

    #[test]
    fn no_image_is_shown_twice_and_images_without_figure_are_not_shown() {
        for all in 0..40i32 {
            let mut figures: Vec<Option<f64>> = (0..all)
                .map(|number| Some(f64::from(number * 7 % 5)))
                .collect();
            figures.insert(all as usize / 2, None);
            let chosen = choose(&figures);
            let numbers: Vec<usize> = chosen.iter().flatten().copied().collect();
            let different: BTreeSet<usize> = numbers.iter().copied().collect();
            assert_eq!(numbers.len(), different.len(), "{all} images: {chosen:?}");
            assert_eq!(numbers.len(), (all as usize).min(16), "{all} images");
            assert!(numbers.iter().all(|&number| figures[number].is_some()));
        }
    }

    #[test]
    fn best_middling_and_worst_images_are_ends_and_middle_of_the_order() {
        // Image 0 is the best.
        let figures: Vec<Option<f64>> = (0..101i32)
            .map(|i| Some(1.0 - f64::from(i) / 100.0))
            .collect();
        let [best, middling, worst] = choose(&figures);
        assert_eq!(best, [0, 1, 2, 3]);
        assert_eq!(middling, [48, 49, 50, 51]);
        assert_eq!(worst, [100, 99, 98, 97, 96, 95, 94, 93]);
        assert_eq!(choose(&figures[..1]), [vec![], vec![], vec![0]]);
        assert_eq!(choose(&figures[..4]), [vec![0], vec![1], vec![3, 2]]);
    }

    /// One object on one image, and a prediction of it where `found` says so.
    fn scored(found: bool) -> Score {
        let classes = [Class {
            id: 1,
            name: "cell".into(),
        }];
        let bbox = [10.0, 10.0, 40.0, 40.0];
        let truth = TrueBox {
            annotation: None,
            class: 0,
            bbox,
            area: 1600.0,
            crowd: false,
        };
        let prediction = Prediction {
            class: 0,
            score: 0.9,
            bbox: if found { bbox } else { [90.0, 90.0, 5.0, 5.0] },
        };
        score(&[&[truth]], &classes, &[vec![prediction]], 0.5).unwrap()
    }

    #[test]
    fn a_detector_that_is_not_above_both_baselines_is_said_to_have_learnt_nothing() {
        let (good, bad) = (scored(true), scored(false));
        let verdict = |detector: &Score, mean_boxes: &Score, chance: &Score| {
            let baselines = Baselines {
                chance: chance.clone(),
                mean_boxes: mean_boxes.clone(),
            };
            sentence(1, "held-out", detector, &baselines)
        };
        let learnt = verdict(&good, &bad, &bad);
        assert!(learnt.contains("are 100.0 and 100.0 %"), "{learnt}");
        assert!(learnt.contains("above both"), "{learnt}");
        for (unlearnt, what) in [
            (verdict(&good, &good, &bad), "not above the mean boxes"),
            (verdict(&good, &bad, &good), "not above chance"),
            (verdict(&bad, &bad, &bad), "above neither"),
        ] {
            assert!(unlearnt.contains(what), "{unlearnt}");
            assert!(unlearnt.contains("nothing says"), "{unlearnt}");
        }
    }

    #[test]
    fn labels_stay_within_the_picture() {
        let frame = Frame::of(260, 130);
        let place = |bbox| frame.place(bbox, 8, false, "cell".into());
        let corner = place([-5.0, -5.0, 20.0, 20.0]);
        assert_eq!((corner.label_x, corner.label_y), (0.0, frame.font));
        assert_eq!(
            (corner.anchor, corner.colour.as_str()),
            ("start", "#56b4e9")
        );
        let far = place([250.0, 100.0, 20.0, 20.0]);
        assert_eq!((far.label_x, far.anchor), (260.0, "end"));
        assert!(far.label_y < 100.0);
    }

    #[test]
    fn the_page_of_a_run_shows_its_images_and_names_those_that_are_gone() {
        let home = tempfile::tempdir().unwrap();
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bccd");
        let images = home.path().join("data");
        fs::create_dir_all(images.join("images")).unwrap();
        for entry in fs::read_dir(format!("{fixture}/images")).unwrap() {
            let entry = entry.unwrap();
            let copy = images.join("images").join(entry.file_name());
            fs::copy(entry.path(), copy).unwrap();
        }
        let origin = Origin {
            path: format!("{fixture}/annotations/instances_val.json").into(),
            images: images.clone(),
            ..Origin::default()
        };
        // Without memory pictures are read when the page is made.
        let data = DataConfig {
            memory_mib: 0,
            ..DataConfig::default()
        };
        let mut set = DetectionSet::open(&origin, &data, &Silent).unwrap();
        set.classes[0].name = "<a & b>".into();
        let gone = set.images[0].name.clone();
        fs::remove_file(images.join(&gone)).unwrap();
        let predictions: Vec<Vec<Prediction>> = set
            .images
            .iter()
            .map(|image| {
                let objects = image.objects().map(|object| Prediction {
                    class: object.class,
                    score: 0.9,
                    bbox: object.bbox,
                });
                objects.collect()
            })
            .collect();
        let score = score(&set.boxes(), &set.classes, &predictions, 0.5).unwrap();
        let run = RunFolder::create(&home.path().join("cells"), "seed = 3\n").unwrap();
        let mut log = run.events(0).unwrap();
        for step in 1..=3 {
            log.append(&json!({
                "kind": "step", "step": step, "loss": 2.5, "lr": 1e-4, "iou": null,
                "terms": {"class": 1.0, "giou": 1.5},
            }))
            .unwrap();
            log.append(&json!({"kind": "epoch", "epoch": step - 1, "step": step, "ap": 0.1}))
                .unwrap();
        }
        let path = write_detection_report(&DetectionReport {
            run: &run,
            facts: vec![("encoder", "tiny".into())],
            train: &set,
            held_out: &set,
            predictions: &predictions,
            score: &score,
            baselines: &baselines(&set, &set, 0).unwrap(),
            confidence: 0.5,
        });
        let html = fs::read_to_string(path.unwrap()).unwrap();
        let left = set.images.len() - 1;
        assert_eq!(html.matches("data:image/jpeg;base64,").count(), left);
        assert_eq!(html.matches("<use ").count(), left);
        assert!(html.contains(&format!("cannot be read any more: {gone}")));
        assert!(html.contains("It is above both") && html.contains("seed = 3"));
        assert!(html.contains(" 0.90</text>") && !html.contains("<a & b>"));
        assert!(html.contains("Terms of the loss") && !html.contains("Mean IoU"));
    }
}
