//! How good predictions are: COCO's average precision, by `hotcoco`, with what is needed to see why.
//!
//! Predictions and true boxes are `[left, top, width, height]` in pixels of the picture. COCO's AP is the mean over
//! classes and over IoU thresholds from 0.50 to 0.95 of the precision, averaged over 101 recalls; an image's 100 best
//! predictions of a class count. What falls onto crowds is ignored. A figure is nothing where there is no box that it
//! could be about.

use std::fmt;

use hotcoco::{Annotation, COCO, COCOeval, Category, Dataset, Image, IouType};
use serde::{Deserialize, Serialize};

use super::coco::{Class, TrueBox};
use crate::error::{Error, Result};

/// IoU from which on a prediction has found a box, for curves, confusion and single images.
const FOUND: f64 = 0.5;
/// A score that no prediction reaches: `hotcoco` is not asked for boxes that may be labelled wrongly.
const NO_SCORE: f64 = f64::INFINITY;

/// A box that is believed to hold an object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Number of its class.
    pub class: usize,
    /// How sure it is; of any scale, only the order counts for AP.
    pub score: f64,
    /// `[left, top, width, height]` in pixels of the picture.
    pub bbox: [f64; 4],
}

/// What predictions are worth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Mean over IoU thresholds 0.50, 0.55, …, 0.95.
    pub ap: Option<f64>,
    /// At IoU 0.5.
    pub ap50: Option<f64>,
    /// At IoU 0.75.
    pub ap75: Option<f64>,
    /// Of objects below 32² pixels.
    pub ap_small: Option<f64>,
    /// Of objects from 32² to 96² pixels.
    pub ap_medium: Option<f64>,
    /// Of objects above 96² pixels.
    pub ap_large: Option<f64>,
    /// Average recall with 1, 10 and 100 predictions an image.
    pub recall: [Option<f64>; 3],
    /// Average recall of small, medium and large objects.
    pub recall_by_size: [Option<f64>; 3],
    /// For each class.
    pub classes: Vec<ClassScore>,
    /// Which class was taken for which, among predictions of at least the confidence asked for: a row for each true
    /// class and one for none, a column for each predicted class and one for none.
    pub confusion: Vec<Vec<u64>>,
    /// AP at IoU 0.5 of each image alone, all classes together; nothing for images with neither boxes nor predictions.
    pub images: Vec<Option<f64>>,
}

/// What predictions of one class are worth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScore {
    /// Its name.
    pub class: String,
    /// True boxes, without crowds.
    pub boxes: usize,
    /// Mean over IoU thresholds.
    pub ap: Option<f64>,
    /// At IoU 0.5.
    pub ap50: Option<f64>,
    /// Recall and precision at IoU 0.5 for recalls 0.00, 0.01, … as far as they are reached; a precision is the best at
    /// that recall or beyond it.
    pub curve: Vec<[f64; 2]>,
}

/// The three figures of COCO that count most, from 0 to 1; nothing where there is no box that one could be about.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Mean over IoU thresholds from 0.50 to 0.95.
    pub ap: Option<f64>,
    /// At IoU 0.5.
    pub ap50: Option<f64>,
    /// At IoU 0.75.
    pub ap75: Option<f64>,
}

impl From<&Score> for Figures {
    fn from(score: &Score) -> Self {
        Self {
            ap: score.ap,
            ap50: score.ap50,
            ap75: score.ap75,
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [ap, ap50, ap75] = [self.ap, self.ap50, self.ap75].map(percent);
        write!(f, "AP {ap}, AP50 {ap50}, AP75 {ap75}")
    }
}

/// A share as people read it.
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "–".into(), |share| format!("{:.1} %", 100.0 * share))
}

/// Scores the predictions of each image against its true boxes. `confidence` is the least score of a prediction that
/// [`Score::confusion`] counts. An error where a number is not finite or a class does not exist.
///
/// # Panics
/// Where there are predictions for more or fewer images than `truths` has.
pub fn score(
    truths: &[&[TrueBox]],
    classes: &[Class],
    predictions: &[Vec<Prediction>],
    confidence: f64,
) -> Result<Score> {
    assert_eq!(truths.len(), predictions.len(), "predictions of each image");
    check(classes.len(), predictions)?;
    let truth = COCO::from_dataset(dataset(truths, classes));
    let results = results(predictions);
    let found = truth.load_res_anns(results).map_err(refused)?;
    let mut evaluation = COCOeval::new(truth, found, IouType::Bbox);
    evaluation.evaluate().map_err(refused)?;
    evaluation.accumulate();
    // It also computes the figures; `summarize` would print them.
    evaluation.summarize_lines();
    let figures: Vec<Option<f64>> = evaluation
        .stats()
        .unwrap_or_default()
        .iter()
        .map(|&figure| computed(figure))
        .collect();
    let [
        ap,
        ap50,
        ap75,
        ap_small,
        ap_medium,
        ap_large,
        few,
        some,
        many,
        small,
        medium,
        large,
    ] = figures[..]
    else {
        return Err(Error::Refused(format!(
            "COCO's evaluation gave {} figures instead of 12",
            figures.len()
        )));
    };
    let images = evaluation
        .image_diagnostics(FOUND, NO_SCORE)
        .map_err(refused)?
        .images;
    let image = |number: usize| images.get(&id_of(number)).map(|image| image.ap);
    let confusion = evaluation.confusion_matrix(FOUND, None, Some(confidence));
    let rows = 0..=classes.len();
    Ok(Score {
        ap,
        ap50,
        ap75,
        ap_small,
        ap_medium,
        ap_large,
        recall: [few, some, many],
        recall_by_size: [small, medium, large],
        classes: class_scores(&evaluation, classes, truths),
        confusion: rows
            .clone()
            .map(|row| {
                rows.clone()
                    .map(|column| confusion.get(row, column))
                    .collect()
            })
            .collect(),
        images: (0..truths.len()).map(image).collect(),
    })
}

/// COCO counts from 1 here, in the order in which things are given.
fn id_of(number: usize) -> u64 {
    number as u64 + 1
}

/// What `hotcoco` says of figures that are about nothing is below 0.
fn computed(figure: f64) -> Option<f64> {
    (figure >= 0.0).then_some(figure)
}

fn refused(error: hotcoco::Error) -> Error {
    Error::Refused(format!("COCO's evaluation: {error}"))
}

fn check(classes: usize, predictions: &[Vec<Prediction>]) -> Result<()> {
    for (image, predictions) in predictions.iter().enumerate() {
        for Prediction { class, score, bbox } in predictions {
            if !score.is_finite() || !bbox.iter().all(|number| number.is_finite()) {
                return Err(Error::Refused(format!(
                    "a prediction for image number {image} is infinite or NaN (score {score}, box {bbox:?}): the \
                     weights are broken; go back to an earlier checkpoint and lower optim.learning_rate"
                )));
            }
            if *class >= classes {
                return Err(Error::Refused(format!(
                    "a prediction for image number {image} is of class number {class}, there are {classes}"
                )));
            }
        }
    }
    Ok(())
}

fn dataset(truths: &[&[TrueBox]], classes: &[Class]) -> Dataset {
    let images = (0..truths.len()).map(|number| Image {
        id: id_of(number),
        ..Image::default()
    });
    let categories = classes.iter().enumerate().map(|(number, class)| Category {
        id: id_of(number),
        name: class.name.clone(),
        ..Category::default()
    });
    let boxes = truths
        .iter()
        .enumerate()
        .flat_map(|(image, boxes)| boxes.iter().map(move |object| (image, object)));
    let annotations = boxes
        .enumerate()
        .map(|(number, (image, object))| Annotation {
            id: id_of(number),
            image_id: id_of(image),
            category_id: id_of(object.class),
            bbox: Some(object.bbox),
            area: Some(object.area),
            iscrowd: object.crowd,
            ..Annotation::default()
        });
    Dataset {
        images: images.collect(),
        annotations: annotations.collect(),
        categories: categories.collect(),
        ..Dataset::default()
    }
}

fn results(predictions: &[Vec<Prediction>]) -> Vec<Annotation> {
    let all = predictions
        .iter()
        .enumerate()
        .flat_map(|(image, predictions)| predictions.iter().map(move |found| (image, found)));
    all.map(|(image, found)| Annotation {
        image_id: id_of(image),
        category_id: id_of(found.class),
        bbox: Some(found.bbox),
        score: Some(found.score),
        ..Annotation::default()
    })
    .collect()
}

fn class_scores(
    evaluation: &COCOeval,
    classes: &[Class],
    truths: &[&[TrueBox]],
) -> Vec<ClassScore> {
    let mut boxes = vec![0; classes.len()];
    for object in truths
        .iter()
        .copied()
        .flatten()
        .filter(|object| !object.crowd)
    {
        boxes[object.class] += 1;
    }
    let parameters = &evaluation.params;
    let (area, most) = (parameters.all_area_idx(), parameters.max_det_idx());
    let curves = evaluation.accumulated().zip(parameters.iou_thr_idx(FOUND));
    let scores = classes.iter().zip(boxes).enumerate();
    scores
        .map(|(class, (Class { name, .. }, boxes))| {
            let mut score = ClassScore {
                class: name.clone(),
                boxes,
                ap: None,
                ap50: None,
                curve: Vec::new(),
            };
            let Some((curves, found)) = curves else {
                return score;
            };
            let precisions = |threshold: usize| -> Vec<f64> {
                let recalls = 0..curves.shape.r;
                let index = |recall| curves.precision_idx(threshold, recall, class, area, most);
                recalls
                    .map(|recall| curves.precision[index(recall)])
                    .collect()
            };
            let all: Vec<f64> = (0..curves.shape.t).flat_map(precisions).collect();
            let at_half = precisions(found);
            score.ap = mean(&all);
            score.ap50 = mean(&at_half);
            let reached = curves.recall[curves.recall_idx(found, class, area, most)];
            let points = parameters.rec_thrs.iter().zip(at_half);
            score.curve = points
                .filter(|&(&recall, precision)| recall <= reached && precision >= 0.0)
                .map(|(&recall, precision)| [recall, precision])
                .collect();
            score
        })
        .collect()
}

/// Of what was computed.
fn mean(figures: &[f64]) -> Option<f64> {
    let computed: Vec<f64> = figures.iter().copied().filter_map(computed).collect();
    (!computed.is_empty()).then(|| computed.iter().sum::<f64>() / computed.len() as f64)
}
