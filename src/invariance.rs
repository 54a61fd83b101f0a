//! The hypothesis that QB-Heat builds on, tested on encoders: from weights and images to figures. The maths is in
//! [`crate::heat`].

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Tensor;
use nalgebra::DMatrix;
use rayon::prelude::*;
use serde::Serialize;

use crate::data::{Dataset, ImageSize};
use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::heat::{
    Derivative, Difference, Law, Moments, Propagator, Quotient, RankPoint, Removed, Sums,
    eigenvalues, quotient, r2_by_rank,
};
use crate::nn::{Init, StateDict, values};
use crate::observe::Observer;
use crate::pretrain::{resumed_config, seen_held_out};
use crate::probe::whole_images;
use crate::random::{self, Purpose};
use crate::train::RunFolder;
use crate::weights::{ImageForm, Weights};

/// Images that are scored at most.
pub const SCORED: usize = 1000;
/// Images that residuals are mapped for.
pub const SHOWN: usize = 8;

const BATCH: usize = 64;
/// Rows and columns of the smallest map whose half is more than the distance between neighbours.
const LEAST_SIDE: usize = 4;
/// A fit wants a few samples for each number of a row of T.
const SAMPLES_A_CHANNEL: usize = 4;
/// Features that vary less than by this share of what they vary within an image are the same for all images, but for
/// rounding.
const SAME: f64 = 1e-12;
const PROPAGATOR: &str = "propagator.";
const FEATURE_NORM: &str = "feature_norm.";

/// Streams of random order.
const FITTED_ORDER: u64 = 2;
const SCORED_ORDER: u64 = 3;
const POSITION_ORDER: u64 = 4;

/// Images to fit the laws on and images to score them with.
pub struct Parts<'a> {
    /// Where they are.
    pub dataset: &'a Dataset,
    /// Numbers of the images to fit on.
    pub fitted: Vec<usize>,
    /// Numbers of the images to score.
    pub scored: Vec<usize>,
    /// Whether the latter are a fifth of the training images, because the data set has no held-out part.
    pub drawn: bool,
    /// Images that could be fitted on.
    available: usize,
}

impl<'a> Parts<'a> {
    /// Training images, at most `images`, to fit on and held-out images, at most [`SCORED`], to score; drawn with `seed`.
    pub fn of(dataset: &'a Dataset, images: usize, seed: u64) -> Result<Self> {
        let in_random_order = |indices: &[usize], stream: u64| -> Vec<usize> {
            let order = random::permutation(seed, Purpose::Sample, stream, indices.len());
            order.into_iter().map(|place| indices[place]).collect()
        };
        let drawn = dataset.held_out.is_empty();
        let mut fitted = in_random_order(&dataset.train, FITTED_ORDER);
        let mut scored = if drawn {
            fitted.split_off(fitted.len() - fitted.len() / 5)
        } else {
            in_random_order(&dataset.held_out, SCORED_ORDER)
        };
        if scored.is_empty() {
            return Err(Error::data(
                dataset.path(),
                "has too few images to fit on some and score the law on others; give more",
            ));
        }
        let available = fitted.len();
        fitted.truncate(images);
        scored.truncate(SCORED);
        Ok(Self {
            dataset,
            fitted,
            scored,
            drawn,
            available,
        })
    }

    /// The images that residuals are mapped for.
    pub fn shown(&self) -> &[usize] {
        &self.scored[..SHOWN.min(self.scored.len())]
    }

    /// Refuses a fit with fewer than a few samples a channel.
    fn check_size(&self, laws: &[Law], difference: Difference, of: &Measured) -> Result<()> {
        let places = laws.iter().map(|law| law.places(difference, of.grid));
        let fewest = places.map(|[rows, columns]| rows * columns).min();
        let Some(fewest) = fewest.filter(|_| of.grid.iter().all(|&side| side >= LEAST_SIDE)) else {
            let [h, w] = of.grid;
            return Err(Error::Refused(format!(
                "{}: its map of {h}×{w} positions is too small for differences over half of it, which need at least \
                 {LEAST_SIDE}×{LEAST_SIDE}; give weights that take larger images or have a smaller stride",
                of.weights
            )));
        };
        let needed = (SAMPLES_A_CHANNEL * of.channels).div_ceil(fewest);
        let found = self.fitted.len();
        if found >= needed {
            return Ok(());
        }
        let few = format!(
            "{found} images are too few to fit a {0}×{0} matrix for {1}, which needs {SAMPLES_A_CHANNEL} samples a channel: \
             at least {needed} images",
            of.channels, of.weights
        );
        Err(if self.available >= needed {
            Error::Refused(format!("--images: {few}"))
        } else {
            let share = if self.drawn {
                "four fifths of its images, because none are held out"
            } else {
                "its training images"
            };
            Error::data(
                self.dataset.path(),
                format!("{few} (the laws are fitted on {share}); give more images with --data"),
            )
        })
    }
}

/// What was found for all encoders.
#[derive(Clone, Debug, Serialize)]
pub struct Invariance {
    /// The data set.
    pub data: PathBuf,
    /// Size of the images.
    pub image_size: ImageSize,
    /// Decided which images were drawn, the order of shuffled positions, and untrained weights.
    pub seed: u64,
    /// How derivatives were taken.
    pub difference: Difference,
    /// Images that the laws were fitted on.
    pub fitted_images: usize,
    /// Images that they were scored with.
    pub scored_images: usize,
    /// Whether the latter were drawn from the training images.
    pub scored_drawn: bool,
    /// What was found for each.
    pub encoders: Vec<Measured>,
}

/// What was found for one encoder.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// What the user called the weights.
    pub weights: String,
    /// Name of the architecture.
    pub encoder: String,
    /// Pre-training method; `none` for untrained weights.
    pub method: String,
    /// Epochs of pre-training.
    pub epochs: usize,
    /// Whether pre-training on these images held out others than those that are scored: [`seen_held_out`].
    pub may_have_seen_scored: bool,
    /// Image pixels a position of the map.
    pub stride: usize,
    /// Channels of the map.
    pub channels: usize,
    /// Rows and columns of the map.
    pub grid: [usize; 2],
    /// Each law that fits on the map.
    pub laws: Vec<LawResult>,
    /// Eigenvalues of T over half the map, real and imaginary part.
    pub t_eigenvalues: Vec<[f64; 2]>,
    /// Eigenvalues of S at its largest lag.
    pub s_eigenvalues: Vec<[f64; 2]>,
    /// The matrices that pre-training learned, where it learned any.
    pub learned: Option<Learned>,
    /// Residuals of T over half the map, then between neighbours.
    #[serde(skip)]
    pub residuals: Vec<ResidualMaps>,
}

/// How well a law holds.
#[derive(Clone, Debug, Serialize)]
pub struct LawResult {
    /// The law, in words.
    pub name: String,
    /// The law.
    #[serde(flatten)]
    pub law: Law,
    /// Places of a map times images of the fit.
    pub samples: usize,
    /// R² of the matrix fitted.
    pub r2: R2,
    /// The same where all maps' positions are shuffled by one permutation.
    pub shuffled: R2,
    /// R² of the best multiple of the identity, position means removed.
    pub r2_of_scalar: f64,
    /// R² of the best matrices of lower ranks, position means removed.
    pub by_rank: Vec<RankPoint>,
    /// `A B⁻¹` as learned beside T as fitted, for first derivatives.
    pub learned: Option<AsLearned>,
}

/// R² on the images that are scored, by what was removed from the derivatives first.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct R2 {
    /// Each position's mean over images: the main figure.
    pub position_means_removed: f64,
    /// Each channel's mean over images and places.
    pub channel_means_removed: f64,
    /// Nothing.
    pub raw: f64,
}

/// The matrix that pre-training learned in place of T.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct AsLearned {
    /// R² of `A B⁻¹`.
    pub r2: R2,
    /// `‖T − A B⁻¹‖_F / ‖T‖_F`, T being fitted with position means removed.
    pub distance: f64,
}

/// A and B as pre-training learned them.
///
/// `z_x = A B⁻¹ z_y` is their law for derivatives, and for finite differences of all steps but exponential ones, whose
/// differences obey it up to terms of second order.
#[derive(Clone, Debug, Serialize)]
pub struct Learned {
    /// `‖AB − BA‖_F / (‖A‖_F ‖B‖_F)`.
    pub commutator: f64,
    /// Rank of B to the precision of 32-bit numbers. Where it is smaller than the number of channels, `B⁻¹` is the
    /// pseudo-inverse.
    pub rank_of_b: usize,
    /// The largest singular value of B over the smallest; none where the latter is 0.
    pub condition_of_b: f64,
    /// Whether they step from features that were layer-normalised first, and hence not from those that are tested.
    pub steps_from_normalised_features: bool,
    /// Eigenvalues of A.
    pub a_eigenvalues: Vec<[f64; 2]>,
    /// Eigenvalues of B.
    pub b_eigenvalues: Vec<[f64; 2]>,
}

/// Where on the shown images a law fails.
#[derive(Clone, Debug)]
pub struct ResidualMaps {
    /// The law.
    pub law: Law,
    /// Rows and columns of its places, which lie in the middle of the image.
    pub places: [usize; 2],
    /// `‖z_x − T z_y‖²` at each place of each image, over the mean of `‖z_x‖²`; position means removed.
    pub images: Vec<Vec<f64>>,
}

/// The weights called `names`, then the untrained network of each encoder and stride among them that has none. Refused
/// where they take images of different sizes, whose maps could not be compared.
pub fn open_weights(names: &[String], seed: u64) -> Result<Vec<Weights>> {
    let untrained = |weights: &Weights| weights.metadata.method == "none";
    let form = ImageForm {
        size: ImageSize::square(64),
        channels: 3,
        stride: 0,
    };
    let open = |name: &str, form| Weights::open(name, seed, form);
    let mut all = names
        .iter()
        .map(|name| open(name, form))
        .collect::<Result<Vec<_>>>()?;
    // Untrained networks are built for the images that the trained ones were trained with.
    if let Some(trained) = all.iter().find(|weights| !untrained(weights)) {
        let form = trained.metadata.images();
        for weights in all.iter_mut().filter(|weights| untrained(weights)) {
            *weights = open(&weights.name, form)?;
        }
    }
    if let Some((first, others)) = all.split_first() {
        let describe = |form: ImageForm| match form.channels {
            1 => format!("grey images of {} px", form.size),
            _ => format!("colour images of {} px", form.size),
        };
        let expected = describe(first.metadata.images());
        for other in others {
            let found = describe(other.metadata.images());
            if found != expected {
                return Err(Error::Refused(format!(
                    "{} takes {expected}, {} takes {found}, so their maps cannot be compared; give weights that take the \
                     same images",
                    first.name, other.name
                )));
            }
        }
    }
    let mut added: Vec<Weights> = Vec::new();
    for weights in &all {
        let own = &weights.metadata;
        let is_its_untrained = |other: &Weights| {
            let theirs = &other.metadata;
            untrained(other) && theirs.encoder == own.encoder && theirs.stride == own.stride
        };
        if !all.iter().chain(&added).any(is_its_untrained) {
            let name = format!("untrained:{}", own.encoder);
            added.push(open(&name, own.images())?);
        }
    }
    all.extend(added);
    Ok(all)
}

/// Fits and scores every law for each of `weights`, of which there is at least one and all take the same images: in
/// evaluation mode, on whole images.
pub fn measure(
    weights: &[Weights],
    parts: &Parts,
    difference: Difference,
    seed: u64,
    observer: &dyn Observer,
) -> Result<Invariance> {
    let encoders = weights
        .iter()
        .map(|weights| measure_one(weights, parts, difference, seed, observer))
        .collect::<Result<_>>()?;
    Ok(Invariance {
        data: parts.dataset.path().to_owned(),
        image_size: weights[0].metadata.image_size,
        seed,
        difference,
        fitted_images: parts.fitted.len(),
        scored_images: parts.scored.len(),
        scored_drawn: parts.drawn,
        encoders,
    })
}

fn measure_one(
    weights: &Weights,
    parts: &Parts,
    difference: Difference,
    seed: u64,
    observer: &dyn Observer,
) -> Result<Measured> {
    let metadata = &weights.metadata;
    let size = metadata.image_size;
    let grid = [size.height, size.width].map(|side| side.div_ceil(metadata.stride));
    let channels = weights.encoder.channels();
    let laws = Law::all(grid, difference);
    let seen = seen_held_out(weights, parts.dataset, seed)?;
    if let Some(seen) = &seen {
        observer.note(&seen.why);
    }
    let mut measured = Measured {
        weights: weights.name.clone(),
        encoder: metadata.encoder.clone(),
        method: metadata.method.clone(),
        epochs: metadata.epochs,
        may_have_seen_scored: seen.is_some(),
        stride: metadata.stride,
        channels,
        grid,
        laws: Vec::new(),
        t_eigenvalues: Vec::new(),
        s_eigenvalues: Vec::new(),
        learned: None,
        residuals: Vec::new(),
    };
    parts.check_size(&laws, difference, &measured)?;

    let learned = match &weights.run {
        Some(run) => generators(run, channels, grid, observer)?,
        None => None,
    };
    let learned = learned.map(|generators| {
        let quotient = quotient(&generators.a, &generators.b);
        (generators, quotient)
    });
    let both = |order: &[usize]| {
        let sums = Sums::new(&laws, difference, grid, channels, order);
        Both {
            fitted: sums.clone(),
            scored: sums,
        }
    };
    let positions = grid[0] * grid[1];
    let mut in_place = both(&(0..positions).collect::<Vec<_>>());
    let mut shuffled = both(&random::permutation(
        seed,
        Purpose::Sample,
        POSITION_ORDER,
        positions,
    ));
    let encoder = weights.encoder.valid();
    let map = |indices: &[usize]| maps(&encoder, parts.dataset, indices, size);
    let total = parts.fitted.len() + parts.scored.len();
    observer.begin(&format!("features of {}", weights.name), total as u64);
    let mut done = 0;
    for (indices, are_fitted) in [(&parts.fitted, true), (&parts.scored, false)] {
        for batch in indices.chunks(BATCH) {
            let maps = map(batch)?;
            for both in [&mut in_place, &mut shuffled] {
                let sums = if are_fitted {
                    &mut both.fitted
                } else {
                    &mut both.scored
                };
                sums.add(&maps);
            }
            done += batch.len() as u64;
            observer.progress(done, "");
        }
    }
    observer.end();
    if !(0..laws.len()).all(|law| in_place.varies(law)) {
        return Err(Error::Foreign {
            path: PathBuf::from(&weights.name),
            message: "its features are the same for all images, or not finite: there is no law to fit; give other \
                      weights"
                .into(),
        });
    }

    let found: Vec<(LawResult, DMatrix<f64>)> = laws
        .par_iter()
        .enumerate()
        .map(|(i, law)| {
            let learned = learned.as_ref().map(|(_, quotient)| quotient);
            law_result(i, law, &in_place, &shuffled, learned)
        })
        .collect();
    let shown = map(parts.shown())?;
    let residuals = |wanted: Law| {
        let law = laws.iter().position(|law| *law == wanted)?;
        let [_, scored] = in_place.moments(law, Removed::PositionMeans);
        let of_image = |map: &[f32]| -> Vec<f64> {
            let residuals = in_place.fitted.residuals(law, &found[law].1, map);
            residuals.into_iter().map(|r| r / scored.spread()).collect()
        };
        Some(ResidualMaps {
            law: wanted,
            places: wanted.places(difference, grid),
            images: shown
                .chunks_exact(positions * channels)
                .map(of_image)
                .collect(),
        })
    };
    let half = Law::over_half(grid);
    let neighbours = Law {
        lag: [1, 1],
        ..half
    };
    measured.residuals = [half, neighbours]
        .into_iter()
        .filter_map(residuals)
        .collect();
    if let Some((_, t)) = found.iter().find(|(result, _)| result.law == half) {
        measured.t_eigenvalues = eigenvalues(t.clone());
    }
    let widest = found
        .iter()
        .rfind(|(result, _)| result.law.derivative == Derivative::Second);
    // What is fitted is z_xx ≈ M z_yy.
    if let Some((_, m)) = widest {
        measured.s_eigenvalues = eigenvalues(-m);
    }
    measured.learned = learned.map(|(generators, quotient)| Learned {
        commutator: generators.commutator,
        rank_of_b: quotient.rank,
        condition_of_b: quotient.condition,
        steps_from_normalised_features: generators.from_normalised,
        a_eigenvalues: eigenvalues(generators.a),
        b_eigenvalues: eigenvalues(generators.b),
    });
    measured.laws = found.into_iter().map(|(result, _)| result).collect();
    Ok(measured)
}

/// Sums over the images of the fit and over those that are scored.
struct Both {
    fitted: Sums,
    scored: Sums,
}

impl Both {
    /// Of the fit, then of the score.
    fn moments(&self, law: usize, removed: Removed) -> [Moments; 2] {
        [&self.fitted, &self.scored].map(|sums| sums.moments(law, removed, &self.fitted))
    }

    /// R² of the matrix that `matrix` makes of the moments of the fit.
    fn r2(&self, law: usize, matrix: impl Fn(&Moments) -> DMatrix<f64>) -> R2 {
        let r2 = |removed| {
            let [fitted, scored] = self.moments(law, removed);
            scored.r2(&matrix(&fitted))
        };
        R2 {
            position_means_removed: r2(Removed::PositionMeans),
            channel_means_removed: r2(Removed::ChannelMeans),
            raw: r2(Removed::Nothing),
        }
    }

    /// Whether images differ by more than rounding.
    fn varies(&self, law: usize) -> bool {
        let raw = self.moments(law, Removed::Nothing);
        let rest = self.moments(law, Removed::PositionMeans);
        // NaN compares as false.
        raw.iter()
            .zip(&rest)
            .all(|(raw, rest)| rest.spread() > SAME * raw.spread() && raw.spread().is_finite())
    }
}

/// How well a law holds, and its matrix.
fn law_result(
    i: usize,
    law: &Law,
    in_place: &Both,
    shuffled: &Both,
    learned: Option<&Quotient>,
) -> (LawResult, DMatrix<f64>) {
    let [fitted, scored] = in_place.moments(i, Removed::PositionMeans);
    let matrix = fitted.fit();
    let learned = learned.filter(|_| law.derivative == Derivative::First);
    let result = LawResult {
        name: law.to_string(),
        law: *law,
        samples: fitted.samples(),
        r2: in_place.r2(i, Moments::fit),
        shuffled: shuffled.r2(i, Moments::fit),
        r2_of_scalar: scored.r2_of_scalar(fitted.fit_scalar()),
        by_rank: r2_by_rank(&matrix, &fitted, &scored),
        learned: learned.map(|quotient| AsLearned {
            r2: in_place.r2(i, |_| quotient.matrix.clone()),
            distance: (&matrix - &quotient.matrix).norm() / matrix.norm(),
        }),
    };
    (result, matrix)
}

/// Feature maps of whole images, `[N, h, w, C]`.
fn maps(
    encoder: &Encoder,
    dataset: &Dataset,
    indices: &[usize],
    size: ImageSize,
) -> Result<Vec<f32>> {
    let images = whole_images(dataset, indices, size)?;
    Ok(values(encoder.channels_last(images)))
}

/// A and B of a run.
struct Generators {
    a: DMatrix<f64>,
    b: DMatrix<f64>,
    commutator: f64,
    from_normalised: bool,
}

/// A and B of the newest checkpoint, for maps of `[h, w]` positions; none where the run's method has none.
fn generators(
    run: &RunFolder,
    channels: usize,
    [h, w]: [usize; 2],
    observer: &dyn Observer,
) -> Result<Option<Generators>> {
    let config = resumed_config(run, None)?;
    let checkpoints = run.checkpoints(config.run.keep_checkpoints);
    let checkpoint = checkpoints.newest_valid(observer)?;
    let tensors = checkpoint.model.0;
    let from_normalised = tensors.keys().any(|name| name.starts_with(FEATURE_NORM));
    let own: StateDict = StateDict(
        tensors
            .into_iter()
            .filter_map(|(name, tensor)| {
                let own = name.strip_prefix(PROPAGATOR)?;
                Some((own.to_owned(), tensor))
            })
            .collect(),
    );
    if own.0.is_empty() {
        return Ok(None);
    }
    let mut init = Init::new(0, &crate::device().autodiff());
    let blank = Propagator::new(channels, config.qb_heat.propagator, &mut init);
    let path = || run.path().to_owned();
    let propagator = own
        .load_into(blank)
        .map_err(|source| Error::Weights {
            path: path(),
            source,
        })?
        .valid();
    let host = |matrix: Tensor<2>| {
        DMatrix::from_row_slice(channels, channels, &values(matrix)).cast::<f64>()
    };
    let (a, b) = propagator.generators([h / 2, w / 2]);
    let (a, b) = (host(a), host(b));
    if !a.iter().chain(b.iter()).all(|value| value.is_finite()) {
        return Err(Error::Foreign {
            path: path(),
            message: "the A and B of its newest checkpoint are not finite; give its encoder.safetensors to test the \
                      encoder alone"
                .into(),
        });
    }
    Ok(Some(Generators {
        a,
        b,
        commutator: propagator.commutator(),
        from_normalised,
    }))
}
