//! What a frozen encoder's features are worth (and, with `finetune`, what they are worth as a start).

mod features;
mod finetune;
mod knn;
mod linear;
mod record;
mod reestimate;
mod statistics;
mod tran1;

use serde::{Deserialize, Serialize};

use crate::data::{Dataset, ImageSize};
use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::observe::Observer;
use crate::random::{self, Purpose};
use crate::train::{AdamW, AdamWConfig, LearningRate, Schedule, TrainState};

pub(crate) use features::Moments;
pub use features::{Features, Matrix, Whitening, extract, whole_images};
pub use finetune::{Classifier, finetune};
pub use knn::{Neighbours, knn_scores, nearest_neighbours};
pub use linear::{Logistic, fit_logistic, linear_scores};
pub use record::{ProbeRecord, SHIPPED_ROW, UNTRAINED, mean_gain, named, probe_data};
pub(crate) use record::{file_name, is_row};
pub use reestimate::reestimate_batch_norm;
pub use statistics::{FeatureStatistics, feature_statistics};
pub use tran1::tran1_scores;

/// Of what probes train: tran-1 and fine-tuning.
const LEARNING_RATE: f64 = 1e-3;
const WEIGHT_DECAY: f64 = 0.05;
/// Epochs of tran-1 and of fine-tuning, where nothing else is asked for.
pub const EPOCHS: usize = 15;
/// Feature maps up to this many MiB are worth keeping.
const FEATURE_MEMORY_MIB: u64 = 4096;

/// The ways to score features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Vote of the 20 nearest training images, nothing trained.
    Knn,
    /// Multinomial logistic regression on pooled features, solved to convergence.
    Linear,
    /// One transformer block over the map's positions, then pool and classify.
    #[serde(rename = "tran-1")]
    Tran1,
    /// Everything trained.
    Finetune,
}

impl Protocol {
    /// In the order in which tables show them.
    pub const ALL: [Self; 4] = [Self::Knn, Self::Linear, Self::Tran1, Self::Finetune];

    /// As typed and printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Knn => "knn",
            Self::Linear => "linear",
            Self::Tran1 => "tran-1",
            Self::Finetune => "finetune",
        }
    }
}

/// How a probe is run.
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// Size of the images.
    pub image_size: ImageSize,
    /// Decides initial weights, order and held-out parts.
    pub seed: u64,
    /// Epochs of tran-1 and of fine-tuning.
    pub epochs: usize,
    /// Tran-1 is trained for as long as does best on a held-out part of its training images instead.
    pub search: bool,
    /// Feature maps up to this many MiB are computed once and kept.
    pub memory_mib: u64,
    /// Scores what goes into the block so many before the encoder's end instead of its feature map; see
    /// [`Encoder::layer`].
    pub layers_before_end: usize,
}

impl ProbeConfig {
    /// The usual one for images of this size.
    pub fn new(image_size: ImageSize, seed: u64) -> Self {
        Self {
            image_size,
            seed,
            epochs: EPOCHS,
            search: false,
            memory_mib: FEATURE_MEMORY_MIB,
            layers_before_end: 0,
        }
    }
}

/// Images to train a probe on and images to score it with.
pub struct ProbeData<'a> {
    /// Labelled images to train on.
    pub train: Part<'a>,
    /// Labelled images to score.
    pub held_out: Part<'a>,
    /// Names of the classes.
    pub classes: &'a [String],
}

/// Some labelled images of a data set.
#[derive(Clone)]
pub struct Part<'a> {
    /// Where they are.
    pub dataset: &'a Dataset,
    /// Their numbers there.
    pub indices: Vec<usize>,
    /// Their classes.
    pub labels: Vec<u32>,
}

impl<'a> Part<'a> {
    /// Those of `indices` that have a label, as numbered in `classes`.
    pub fn labelled(dataset: &'a Dataset, indices: &[usize], classes: &[String]) -> Result<Self> {
        let known: Vec<Option<u32>> = dataset
            .classes
            .iter()
            .map(|class| classes.iter().position(|c| c == class).map(|i| i as u32))
            .collect();
        let mut part = Self {
            dataset,
            indices: Vec::new(),
            labels: Vec::new(),
        };
        for &index in indices {
            let Some(label) = dataset.images.label(index) else {
                continue;
            };
            let Some(label) = known[label as usize] else {
                return Err(Error::data(
                    dataset.path(),
                    format!(
                        "class `{}` does not occur in the training images",
                        dataset.classes[label as usize]
                    ),
                ));
            };
            part.indices.push(index);
            part.labels.push(label);
        }
        Ok(part)
    }

    /// At most `count` of them, the same share of each class as near as whole images allow, drawn with `seed`.
    pub fn limit(mut self, count: usize, seed: u64) -> Self {
        if count >= self.indices.len() {
            return self;
        }
        let mut kept = balanced_places(&self.labels, seed);
        kept.truncate(count);
        kept.sort_unstable();
        self.indices = kept.iter().map(|&place| self.indices[place]).collect();
        self.labels = kept.iter().map(|&place| self.labels[place]).collect();
        self
    }
}

/// Places with labels, in an order whose every beginning has the same share of each class as near as whole images allow:
/// one of each class comes first.
fn balanced_places(labels: &[u32], seed: u64) -> Vec<usize> {
    let of_class = places_of_classes(labels, seed);
    let mut shares: Vec<(f64, usize)> = Vec::with_capacity(labels.len());
    for members in of_class {
        let share = |rank: usize| rank as f64 / members.len() as f64;
        shares.extend(
            members
                .iter()
                .enumerate()
                .map(|(i, &place)| (share(i), place)),
        );
    }
    // Stable, so that of equal shares the class with the smaller number comes first.
    shares.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    shares.into_iter().map(|(_, place)| place).collect()
}

/// The places of each class in an order drawn with `seed`.
fn places_of_classes(labels: &[u32], seed: u64) -> Vec<Vec<usize>> {
    let classes = labels.iter().max().map_or(0, |&label| label as usize + 1);
    let mut of_class = vec![Vec::new(); classes];
    for place in random::permutation(seed, Purpose::Sample, 0, labels.len()) {
        of_class[labels[place] as usize].push(place);
    }
    of_class
}

/// Places with labels, parted in two: the rest, and `share` of each class, at least one image of each that has two.
pub(crate) fn stratified_places(labels: &[u32], share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let (mut rest, mut chosen) = (Vec::new(), Vec::new());
    for members in places_of_classes(labels, seed) {
        let wanted = (members.len() as f64 * share).round() as usize;
        let count = wanted.max(usize::from(members.len() > 1));
        chosen.extend(&members[..count]);
        rest.extend(&members[count..]);
    }
    (rest, chosen)
}

/// A protocol and the share of the labels that it may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Task {
    /// Which protocol.
    pub protocol: Protocol,
    /// 1 for all labels; less for linear and tran-1 only.
    pub labels: f64,
}

/// Protocols with all labels.
pub fn whole_tasks(protocols: &[Protocol]) -> Vec<Task> {
    let all = |&protocol: &Protocol| Task {
        protocol,
        labels: 1.0,
    };
    protocols.iter().map(all).collect()
}

/// The score of one protocol.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProbeResult {
    /// Which protocol.
    pub protocol: Protocol,
    /// Share of the labels used.
    #[serde(default = "all_labels")]
    pub labels: f64,
    /// Share of held-out images whose class came first, in percent.
    pub top1: f64,
    /// Share whose class was among the first five, in percent, where there are more than five classes.
    pub top5: Option<f64>,
    /// What else is worth knowing: strengths chosen, variants.
    pub details: serde_json::Map<String, serde_json::Value>,
    /// Images trained on.
    pub train_images: usize,
    /// Images scored.
    pub held_out_images: usize,
    /// Accuracy of each class, in percent; none where no held-out image has it.
    pub per_class: Vec<ClassAccuracy>,
    /// Held-out images by true class (row) and predicted class (column).
    pub confusion: Vec<Vec<u32>>,
}

fn all_labels() -> f64 {
    1.0
}

/// Accuracy on the images of one class.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClassAccuracy {
    /// Its name.
    pub class: String,
    /// Held-out images.
    pub images: u32,
    /// Share recognised, in percent.
    pub top1: Option<f64>,
}

/// A score for each class of each image, row by row.
pub struct Scores {
    /// `images·classes` numbers.
    pub values: Vec<f32>,
    /// Classes.
    pub classes: usize,
}

impl Scores {
    /// The share of images whose true class is among the `k` with the highest scores, in percent. Of equal scores the
    /// class with the smaller number counts as higher.
    pub fn top(&self, k: usize, labels: &[u32]) -> f64 {
        let hits = self
            .values
            .chunks_exact(self.classes)
            .zip(labels)
            .filter(|(scores, label)| {
                let label = **label as usize;
                let above = scores
                    .iter()
                    .enumerate()
                    .filter(|&(class, &score)| {
                        score > scores[label] || (score == scores[label] && class < label)
                    })
                    .count();
                above < k
            })
            .count();
        100.0 * hits as f64 / labels.len() as f64
    }

    fn result(&self, task: Task, train_images: usize, data: &ProbeData) -> ProbeResult {
        let labels = &data.held_out.labels;
        let mut confusion = vec![vec![0; self.classes]; self.classes];
        for (scores, &label) in self.values.chunks_exact(self.classes).zip(labels) {
            let best = (0..self.classes).fold(0, |best, class| {
                if scores[class] > scores[best] {
                    class
                } else {
                    best
                }
            });
            confusion[label as usize][best] += 1;
        }
        let per_class = confusion
            .iter()
            .enumerate()
            .map(|(class, row)| {
                let images: u32 = row.iter().sum();
                ClassAccuracy {
                    class: data.classes[class].clone(),
                    images,
                    top1: (images > 0).then(|| 100.0 * f64::from(row[class]) / f64::from(images)),
                }
            })
            .collect();
        ProbeResult {
            protocol: task.protocol,
            labels: task.labels,
            top1: self.top(1, labels),
            top5: (self.classes > 5).then(|| self.top(5, labels)),
            details: serde_json::Map::new(),
            train_images,
            held_out_images: labels.len(),
            per_class,
            confusion,
        }
    }
}

/// Scores an encoder by each of `tasks` and hands each result to `found`; features are computed once for all of them. The
/// encoder is used in evaluation mode on whole images.
pub fn probe(
    encoder: &Encoder,
    data: &ProbeData,
    tasks: &[Task],
    config: &ProbeConfig,
    observer: &dyn Observer,
    mut found: impl FnMut(ProbeResult) -> Result<()>,
) -> Result<()> {
    let is_frozen = |task: &&Task| task.protocol != Protocol::Finetune;
    let of_size = |mut result: ProbeResult| {
        let size = serde_json::json!(config.image_size);
        result.details.insert("image_size".into(), size);
        result
    };
    if tasks.iter().any(|task| is_frozen(&task)) {
        let keep_maps = tasks.iter().any(|task| task.protocol == Protocol::Tran1);
        let train = extract(encoder, &data.train, config, keep_maps, observer)?;
        let held_out = extract(encoder, &data.held_out, config, keep_maps, observer)?;
        for (features, part) in [(&train, &data.train), (&held_out, &data.held_out)] {
            // NaN is above nothing: every class would come first.
            if !features.pooled.values.iter().all(|value| value.is_finite()) {
                return Err(Error::data(
                    part.dataset.path(),
                    "its features are infinite or NaN: the weights are damaged, or their training diverged",
                ));
            }
        }
        let whitening = train.whitening();
        let frozen = Frozen {
            pooled: [&train, &held_out].map(|features| whitening.apply_pooled(features)),
            features: [train, held_out],
            whitening,
            data,
            config,
            observer,
        };
        for &task in tasks.iter().filter(is_frozen) {
            found(of_size(frozen.score(task)?))?;
        }
    }
    for &task in tasks.iter().filter(|task| !is_frozen(task)) {
        let scores = finetune(encoder, data, config, observer)?;
        let mut result = scores.result(task, data.train.indices.len(), data);
        result.details.insert("epochs".into(), config.epochs.into());
        found(of_size(result))?;
    }
    Ok(())
}

/// Features of training and of held-out images, and what probes on them share.
struct Frozen<'a> {
    features: [Features<'a>; 2],
    /// Whitened means over positions.
    pooled: [Matrix; 2],
    whitening: Whitening,
    data: &'a ProbeData<'a>,
    config: &'a ProbeConfig,
    observer: &'a dyn Observer,
}

impl Frozen<'_> {
    fn score(&self, task: Task) -> Result<ProbeResult> {
        let Self { data, config, .. } = self;
        let [train, held_out] = &self.features;
        let [train_pooled, held_out_pooled] = &self.pooled;
        let classes = data.classes.len();
        let places = labelled_places(&data.train.labels, task.labels, config.seed);
        let labels: Vec<u32> = places.iter().map(|&p| data.train.labels[p]).collect();
        let labelled = (&labels[..], classes);
        let result = |scores: Scores| scores.result(task, places.len(), data);
        Ok(match task.protocol {
            Protocol::Knn => {
                let whitened =
                    knn_scores(&train_pooled.rows_at(&places), labelled, held_out_pooled);
                let plain = knn_scores(&train.pooled.rows_at(&places), labelled, &held_out.pooled);
                let mut result = result(whitened);
                let plain = plain.top(1, &data.held_out.labels);
                result
                    .details
                    .insert("top1_unwhitened".into(), plain.into());
                result
            }
            Protocol::Linear => {
                let (scores, strength) = linear_scores(
                    &train_pooled.rows_at(&places),
                    labelled,
                    held_out_pooled,
                    config.seed,
                    self.observer,
                );
                let mut result = result(scores);
                result.details.insert("l2".into(), strength.l2.into());
                result
                    .details
                    .insert("converged".into(), strength.converged.into());
                result
            }
            Protocol::Tran1 => {
                let (scores, epochs) = tran1_scores(
                    (train, &places),
                    labelled,
                    held_out,
                    &self.whitening,
                    config,
                    self.observer,
                )?;
                let mut result = result(scores);
                result.details.insert("epochs".into(), epochs.into());
                if config.search {
                    result.details.insert("searched".into(), true.into());
                }
                result
            }
            Protocol::Finetune => unreachable!("fine-tuning is no frozen protocol"),
        })
    }
}

/// A network before its first step, and the learning rates of `total_steps` of them, of which `per_pass` see all images.
fn begin<M>(model: M, per_pass: usize, total_steps: u64) -> (TrainState<M>, LearningRate) {
    let state = TrainState {
        model,
        optimizer: AdamW::new(AdamWConfig {
            betas: [0.9, 0.999],
            weight_decay: WEIGHT_DECAY,
            clip_norm: 0.0,
            encoder_rate: 1.0,
        }),
        step: 0,
    };
    let rate = LearningRate {
        peak: LEARNING_RATE,
        warmup_steps: per_pass as u64 / 2,
        total_steps,
        schedule: Schedule::Cosine,
    };
    (state, rate)
}

/// Places of the images whose labels may be used: the same share of each class, at least one image of each.
fn labelled_places(labels: &[u32], share: f64, seed: u64) -> Vec<usize> {
    if share >= 1.0 {
        return (0..labels.len()).collect();
    }
    let few = |members: Vec<usize>| {
        let wanted = (members.len() as f64 * share).round().max(1.0) as usize;
        members.into_iter().take(wanted)
    };
    let of_class = places_of_classes(labels, seed);
    let mut places: Vec<usize> = of_class.into_iter().flat_map(few).collect();
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_labels_is_the_same_share_of_each_class() {
        let labels: Vec<u32> = (0..220).map(|i| u32::from(i < 20)).collect();
        let places = labelled_places(&labels, 0.1, 3);
        let of_class = |class| places.iter().filter(|&&p| labels[p] == class).count();
        assert_eq!([of_class(0), of_class(1)], [20, 2]);
        let few = labelled_places(&labels, 0.001, 3);
        assert_eq!(few.len(), 2);
        assert!(few.iter().all(|place| places.contains(place)));
    }

    #[test]
    fn the_beginning_of_a_balanced_order_has_its_share_of_each_class() {
        // Ten classes of seven images and one of a single one.
        let labels: Vec<u32> = (0..71).map(|i| i / 7).collect();
        let order = balanced_places(&labels, 3);
        let of_class = |count: usize, class| {
            let taken = order[..count].iter();
            taken.filter(|&&p| labels[p] == class).count()
        };
        assert!((0..11).all(|class| of_class(11, class) == 1));
        assert!((0..10).all(|class| [3, 4].contains(&of_class(36, class))));
        let mut all = order.clone();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..71));
    }

    #[test]
    fn top_k_counts_classes_with_higher_scores() {
        let scores = Scores {
            values: vec![0.1, 0.5, 0.4, 0.3, 0.3, 0.2],
            classes: 3,
        };
        assert_eq!(scores.top(1, &[1, 1]), 50.0);
        assert_eq!(scores.top(2, &[2, 1]), 100.0);
        assert_eq!(scores.top(2, &[0, 2]), 0.0);
    }
}
