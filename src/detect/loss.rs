//! What a detector's answers cost: focal loss of the classes, L1 and generalised IoU of the boxes.

use burn::tensor::activation::{log_sigmoid, sigmoid};
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::boxes::{overlap, overlaps};
use super::denoising::Noised;
use super::head::{Answers, Group};
use super::matching::{Pair, assign};
use super::view::ViewBox;
use crate::config::require;
use crate::error::Result;
use crate::nn::{rows_at, total, values};

/// Share of the focal loss that a true class has.
pub(super) const ALPHA: f64 = 0.25;

/// Weights of the terms, in the loss and in the costs of the matching.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// Of the classes' focal loss.
    pub class: f64,
    /// Of the boxes' differences.
    pub l1: f64,
    /// Of 1 − the boxes' generalised IoU.
    pub giou: f64,
}

impl Default for LossConfig {
    /// Deformable DETR's (arXiv 2010.04159).
    fn default() -> Self {
        Self {
            class: 2.0,
            l1: 5.0,
            giou: 2.0,
        }
    }
}

impl LossConfig {
    /// Whether every value is usable; `section` is where its keys are.
    pub fn check(&self, section: &str) -> Result<()> {
        for (key, weight) in [("class", self.class), ("l1", self.l1), ("giou", self.giou)] {
            require(
                weight.is_finite() && weight >= 0.0,
                &format!("{section}.{key}"),
                weight,
                "a number from 0 up",
            )?;
        }
        Ok(())
    }

    fn weights(&self) -> [f64; 3] {
        [self.class, self.l1, self.giou]
    }
}

/// The loss of a batch, and what to log of it.
pub struct Losses {
    /// The sum of all terms with their weights, `[1]`. NaN where a prediction is not finite.
    pub total: Tensor<1>,
    /// What to log.
    pub figures: LossFigures,
}

/// What there is to know of a loss; those of several groups of a batch add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossFigures {
    /// The loss's parts.
    pub terms: Terms,
    /// Queries of the last layer that answer for a box.
    pub matched: usize,
    /// What there was to be found.
    pub objects: usize,
    /// Sum of the IoUs of those queries' boxes with the true ones.
    iou_sum: f64,
}

impl LossFigures {
    /// Mean IoU of the boxes that answer for one with that one; 0 where there are none.
    pub fn iou(&self) -> f64 {
        self.iou_sum / self.matched.max(1) as f64
    }
}

impl std::iter::Sum for LossFigures {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            terms: sum.terms + one.terms,
            matched: sum.matched + one.matched,
            objects: sum.objects + one.objects,
            iou_sum: sum.iou_sum + one.iou_sum,
        })
    }
}

/// Parts of a loss; those of the last layer without their weights, the others with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Terms {
    /// Focal loss of the last layer.
    pub class: f64,
    /// L1 of the last layer's boxes.
    pub l1: f64,
    /// 1 − generalised IoU of the last layer's boxes.
    pub giou: f64,
    /// All of the layers before it.
    pub earlier: f64,
    /// All of the proposals.
    pub proposals: f64,
    /// All of the denoising queries.
    pub denoising: f64,
}

impl std::ops::Add for Terms {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            class: self.class + other.class,
            l1: self.l1 + other.l1,
            giou: self.giou + other.giou,
            earlier: self.earlier + other.earlier,
            proposals: self.proposals + other.proposals,
            denoising: self.denoising + other.denoising,
        }
    }
}

/// What a sum over answers counts as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Proposals,
    Earlier,
    Last,
    Denoising,
}

/// The loss of a head's answers: for its proposals and for each layer of its decoder, focal loss (Lin et al., arXiv
/// 1708.02002; α 0.25, γ 2) over all queries and classes, L1 and 1 − generalised IoU of the matched boxes, each divided
/// by the number of boxes in the batch (arXiv 2005.12872 and 2010.04159); the same for denoising queries, divided by
/// their number (arXiv 2203.01305). Every answer set is matched anew.
///
/// `objects` is what is to be found in each image of the batch; `noised` the denoising queries that the head was given,
/// or empty. With some of the batch's groups it is their share of the batch's loss.
pub fn losses(
    groups: &[Group],
    objects: &[Vec<ViewBox>],
    noised: &[Vec<Noised>],
    config: &LossConfig,
) -> Losses {
    let wanted: usize = objects.iter().map(Vec::len).sum();
    let spoilt: usize = noised.iter().map(Vec::len).sum();
    let mut sums = Vec::new();
    let mut stages = Vec::new();
    let mut finite = true;
    let mut ious = Vec::new();
    for group in groups {
        let matched = std::iter::once((Stage::Proposals, &group.proposals));
        let last = group.layers.len() - 1;
        let layers = group.layers.iter().enumerate().map(|(i, answers)| {
            let stage = if i == last {
                Stage::Last
            } else {
                Stage::Earlier
            };
            (stage, answers)
        });
        for (stage, answers) in matched.chain(layers) {
            let found = Matched::of(answers, &group.images, objects, config);
            finite &= found.finite;
            if stage == Stage::Last {
                ious.extend(found.ious);
            }
            sums.extend(terms(answers.rows(), &found.pairs));
            stages.push(stage);
        }
        for answers in &group.denoised {
            let (rows, pairs) = put_right(answers, &group.images, objects, noised);
            if !pairs.is_empty() {
                sums.extend(terms(rows, &pairs));
                stages.push(Stage::Denoising);
            }
        }
    }
    let sums = Tensor::cat(sums, 0);
    let host = values(sums.clone());
    let mut terms = Terms::default();
    let mut weights = Vec::with_capacity(host.len());
    for (stage, parts) in stages.into_iter().zip(host.as_chunks::<3>().0) {
        let count = match stage {
            Stage::Denoising => spoilt,
            _ => wanted,
        };
        let share = 1.0 / count.max(1) as f64;
        let [class, l1, giou] = parts.map(|part| f64::from(part) * share);
        let whole = config.class * class + config.l1 * l1 + config.giou * giou;
        match stage {
            Stage::Proposals => terms.proposals += whole,
            Stage::Earlier => terms.earlier += whole,
            Stage::Denoising => terms.denoising += whole,
            Stage::Last => {
                terms.class += class;
                terms.l1 += l1;
                terms.giou += giou;
            }
        }
        // Without a match there is no loss to learn from: the training loop takes NaN for a bad step.
        let known = if finite { 1.0 } else { f64::NAN };
        weights.extend(
            config
                .weights()
                .map(|weight| (weight * share * known) as f32),
        );
    }
    let count = weights.len();
    let weights = Tensor::<1>::from_data(TensorData::new(weights, [count]), &sums.device());
    let images = groups.iter().flat_map(|group| &group.images);
    Losses {
        total: (sums * weights).sum_dim(0),
        figures: LossFigures {
            terms,
            matched: ious.len(),
            objects: images.map(|&image| objects[image].len()).sum(),
            iou_sum: ious.iter().sum(),
        },
    }
}

/// Rows of answers and what each of some of them should be.
struct Matched<'a> {
    pairs: Vec<(usize, &'a ViewBox)>,
    ious: Vec<f64>,
    finite: bool,
}

impl<'a> Matched<'a> {
    /// Matches each image's queries with what is to be found in it.
    fn of(
        answers: &Answers,
        images: &[usize],
        objects: &'a [Vec<ViewBox>],
        config: &LossConfig,
    ) -> Self {
        let [_, queries, classes] = answers.logits.dims();
        let (logits, boxes) = (
            values(answers.logits.clone()),
            values(answers.boxes.clone()),
        );
        let mut matched = Self {
            pairs: Vec::new(),
            ious: Vec::new(),
            finite: true,
        };
        let samples = logits
            .chunks_exact(queries * classes)
            .zip(boxes.chunks_exact(queries * 4));
        for (sample, (&image, (logits, boxes))) in images.iter().zip(samples).enumerate() {
            let objects = &objects[image];
            let Ok(pairs) = assign(logits, boxes, objects, config) else {
                matched.finite = false;
                continue;
            };
            let boxes = boxes.as_chunks::<4>().0;
            for Pair { query, object } in pairs {
                let object = &objects[object];
                let [found, truth] = [boxes[query], object.bbox].map(|bbox| bbox.map(f64::from));
                matched.ious.push(overlap(found, truth).iou);
                matched.pairs.push((sample * queries + query, object));
            }
        }
        matched
    }
}

/// The answers of denoising queries, without those that only fill up shorter lists, and what each should be.
fn put_right<'a>(
    answers: &Answers,
    images: &[usize],
    objects: &'a [Vec<ViewBox>],
    noised: &[Vec<Noised>],
) -> ([Tensor<2>; 2], Vec<(usize, &'a ViewBox)>) {
    let queries = answers.logits.dims()[1];
    let (mut rows, mut pairs) = (Vec::new(), Vec::new());
    for (sample, &image) in images.iter().enumerate() {
        for (query, &Noised { object, .. }) in noised[image].iter().enumerate() {
            pairs.push((rows.len(), &objects[image][object]));
            rows.push(sample * queries + query);
        }
    }
    if rows.is_empty() {
        return (answers.rows(), pairs);
    }
    (answers.rows().map(|all| rows_at(all, &rows)), pairs)
}

/// Sums of focal loss over all rows, and of L1 and 1 − generalised IoU over those with a box to be, `[1]` each: logits
/// `[R, classes]` and boxes `[R, 4]`.
fn terms([logits, boxes]: [Tensor<2>; 2], pairs: &[(usize, &ViewBox)]) -> [Tensor<1>; 3] {
    let [rows, classes] = logits.dims();
    let device = logits.device();
    let mut truth = vec![0f32; rows * classes];
    for (row, object) in pairs {
        truth[row * classes + object.class] = 1.0;
    }
    let truth = Tensor::from_data(TensorData::new(truth, [rows, classes]), &device);
    let class = focal(logits, truth);
    if pairs.is_empty() {
        let none = Tensor::zeros([1], &device);
        return [class, none.clone(), none];
    }
    let count = pairs.len();
    let rows: Vec<usize> = pairs.iter().map(|&(row, _)| row).collect();
    let truths: Vec<f32> = pairs.iter().flat_map(|(_, object)| object.bbox).collect();
    let truths = Tensor::<2>::from_data(TensorData::new(truths, [count, 4]), &device);
    let boxes = rows_at(boxes, &rows);
    let l1 = (boxes.clone() - truths.clone()).abs();
    let apart = overlaps(boxes, truths).generalised.neg() + 1.0;
    [class, total(l1), total(apart.reshape([count, 1]))]
}

/// −α_t (1 − p_t)² log p_t, summed; logits and truth (0 or 1) `[R, classes]` to `[1]`.
pub fn focal(logits: Tensor<2>, truth: Tensor<2>) -> Tensor<1> {
    // log p_t = log σ(±logit), which does not overflow.
    let signed = logits * (truth.clone() * 2.0 - 1.0);
    let missed = sigmoid(signed.clone().neg());
    let weight = truth * (2.0 * ALPHA - 1.0) + (1.0 - ALPHA);
    total(weight * missed.clone() * missed * log_sigmoid(signed).neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn focal_loss_has_its_closed_form_and_survives_extreme_logits() {
        let device = crate::device();
        let row = |values: [f32; 4]| Tensor::<2>::from_data([values], &device);
        let truth = [1.0, 0.0, 1.0, 0.0];
        let at = |logits| values(focal(row(logits), row(truth)))[0];
        // p = 1/2 everywhere: (α + (1 − α)) · ¼ · log 2, twice.
        assert!((at([0.0; 4]) - 0.5 * 2f32.ln()).abs() < 1e-6);
        // p = 3/4 for the truth, 1/4 for the rest.
        let sure = 3f32.ln();
        let expected = 2.0 * (4f32 / 3.0).ln() / 16.0;
        assert!((at([sure, -sure, sure, -sure]) - expected).abs() < 1e-6);
        assert!(at([200.0, -200.0, 200.0, -200.0]).abs() < 1e-6);
        let wrong = at([-200.0, 200.0, -200.0, 200.0]);
        assert!((wrong - 400.0).abs() < 1e-2, "{wrong}");
    }

    #[test]
    fn negative_or_infinite_weights_are_refused() {
        for (weights, key) in [([-1.0, 5.0, 2.0], "class"), ([2.0, f64::NAN, 2.0], "l1")] {
            let [class, l1, giou] = weights;
            let config = LossConfig { class, l1, giou };
            let text = config.check("loss").unwrap_err().to_string();
            assert!(text.contains(&format!("loss.{key}")), "{text}");
        }
    }
}
