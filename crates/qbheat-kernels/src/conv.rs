//! Chains of convolution, batch normalisation and activation over channels-last maps, `[N, H, W, C]`.
//!
//! A chain keeps what its convolutions made, before normalisation; normalised and activated maps are made anew from it,
//! a few rows at a time, wherever they are read.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::array::Array;
use crate::depthwise::{self, Geometry, Padded, TAPS};
use crate::gemm::{Onto, Packed, multiply, multiply_transposed};
use crate::norm::{Activation, Behind, Moments, Parameters, Slopes, Sums, combine};
use crate::operation::{Forward, Operation};
use crate::rows::{self, CHUNK, chunks, parallel_chunk};
use crate::simd::{add, unwritten};

/// A convolution's form; padded so that stride 1 keeps the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 1×1, weight `[outputs, inputs, 1, 1]`.
    Pointwise,
    /// 3×3 of each channel by itself, weight `[multiplier·C, 1, 3, 3]`; stride 1 or 2.
    Depthwise {
        /// Between positions.
        stride: usize,
        /// Outputs of each channel, which follow each other.
        multiplier: usize,
    },
    /// Of odd side, weight `[outputs, inputs, side, side]`.
    Dense {
        /// Between positions.
        stride: usize,
    },
}

impl Kind {
    fn stride(self) -> usize {
        match self {
            Self::Pointwise => 1,
            Self::Depthwise { stride, .. } | Self::Dense { stride } => stride,
        }
    }
}

/// Convolutions, each with its normalisation and activation, one after another.
///
/// Inputs: x `[N, H, W, C]`; for each stage weight, scale and shift, then mean and variance where they are `fixed`, then
/// for a dynamic activation its slopes `[N, 2·C]`. Extras where they are not fixed: mean and biased variance of each
/// stage.
#[derive(Debug)]
pub struct Chain {
    pub stages: Vec<(Kind, Activation)>,
    /// Adds the input to the output.
    pub skip: bool,
    /// Normalises by given statistics, not by the batch's.
    pub fixed: bool,
    pub epsilon: f32,
}

/// One stage with its inputs.
struct Stage<'a> {
    kind: Kind,
    activation: Activation,
    /// Number of the first of its inputs.
    first: usize,
    weight: &'a Array,
    parameters: [&'a Array; 2],
    fixed: Option<[&'a Array; 2]>,
    theta: Option<&'a Array>,
    samples: usize,
    /// Height, width and channels of what comes in and goes out.
    from: [usize; 3],
    to: [usize; 3],
}

impl Stage<'_> {
    fn rows_from(&self) -> usize {
        self.from[0] * self.from[1]
    }

    fn rows_to(&self) -> usize {
        self.to[0] * self.to[1]
    }

    fn behind(&self, z: Option<Array>, statistics: [Array; 2], epsilon: f32) -> Behind {
        let [mean, variance] = statistics;
        let [gamma, beta] = self.parameters.map(Array::clone);
        let parameters = Parameters {
            mean,
            variance,
            gamma,
            beta,
            epsilon,
        };
        let theta = self.theta.cloned();
        Behind::new(z, parameters, self.activation, theta, self.rows_to())
    }

    fn geometry(&self) -> Geometry {
        let [height, width, _] = self.from;
        Geometry {
            height,
            width,
            channels: self.to[2],
            stride: self.kind.stride(),
        }
    }

    fn window(&self) -> Window {
        let [height, width, channels] = self.from;
        let [.., side] = self.weight.dims::<4>();
        Window {
            height,
            width,
            channels,
            stride: self.kind.stride(),
            side,
            columns: self.to[1],
        }
    }

    fn shape(&self) -> [usize; 4] {
        let [height, width, channels] = self.to;
        [self.samples, height, width, channels]
    }
}

impl Chain {
    fn stages<'a>(&self, inputs: &'a [Array]) -> Vec<Stage<'a>> {
        let [samples, height, width, channels] = inputs[0].dims();
        let mut from = [height, width, channels];
        let mut next = 1;
        self.stages
            .iter()
            .map(|&(kind, activation)| {
                let first = next;
                let mut take = || {
                    next += 1;
                    &inputs[next - 1]
                };
                let (weight, parameters) = (take(), [take(), take()]);
                let fixed = self.fixed.then(|| [take(), take()]);
                let theta = (activation == Activation::Dynamic).then(take);
                let outputs = weight.shape()[0];
                let stride = kind.stride();
                let to = [from[0].div_ceil(stride), from[1].div_ceil(stride), outputs];
                Stage {
                    kind,
                    activation,
                    first,
                    weight,
                    parameters,
                    fixed,
                    theta,
                    samples,
                    from: std::mem::replace(&mut from, to),
                    to,
                }
            })
            .collect()
    }
}

/// What a stage reads.
enum Source<'a> {
    Plain(&'a [f32], usize),
    Behind(&'a Behind),
}

impl Source<'_> {
    fn columns(&self) -> usize {
        match self {
            Self::Plain(_, columns) => *columns,
            Self::Behind(behind) => behind.columns(),
        }
    }

    /// Rows `start..start+count`, in `scratch` where they must be made.
    fn rows<'b>(&'b self, start: usize, count: usize, scratch: &'b mut [f32]) -> &'b [f32] {
        match self {
            Self::Plain(x, columns) => &x[start * columns..][..count * columns],
            Self::Behind(behind) => {
                let scratch = &mut scratch[..count * behind.columns()];
                behind.apply(start, scratch);
                scratch
            }
        }
    }

    /// Writes rows `start..`, as many as `rows` holds.
    fn write(&self, start: usize, rows: &mut [f32]) {
        match self {
            Self::Plain(x, columns) => {
                rows.copy_from_slice(&x[start * columns..][..rows.len()]);
            }
            Self::Behind(behind) => behind.apply(start, rows),
        }
    }

    /// All of it.
    fn whole(&self, rows: usize) -> Cow<'_, [f32]> {
        match self {
            Self::Plain(x, _) => Cow::Borrowed(x),
            Self::Behind(behind) => {
                let mut whole = unwritten(rows * behind.columns());
                whole
                    .par_chunks_mut(CHUNK * behind.columns())
                    .enumerate()
                    .for_each(|(i, rows)| behind.apply(i * CHUNK, rows));
                Cow::Owned(whole)
            }
        }
    }

    fn scratch(&self, rows: usize) -> Vec<f32> {
        match self {
            Self::Plain(..) => Vec::new(),
            Self::Behind(behind) => unwritten(rows * behind.columns()),
        }
    }

    fn add_sums(
        &self,
        start: usize,
        gradient: &[f32],
        sums: &mut Sums,
        first_sample: usize,
        dtheta: &mut [f32],
    ) {
        if let Self::Behind(behind) = self {
            behind.add_sums(start, gradient, sums, first_sample, dtheta);
        }
    }
}

// ------------------------------------------------------------------ forward

/// The stage's convolution; `finish` sees each run of rows of it as soon as it is made.
fn convolve<T: Send>(
    stage: &Stage,
    source: &Source,
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    let columns = stage.to[2];
    let rows = stage.samples * stage.rows_to();
    let mut z = unwritten(rows * columns);
    let finished = match stage.kind {
        Kind::Pointwise => {
            let depth = source.columns();
            let packed = Packed::new([depth, columns], stage.weight, [1, depth]);
            let chunk = parallel_chunk(rows);
            z.par_chunks_mut(chunk * columns)
                .enumerate()
                .map_init(
                    || source.scratch(chunk),
                    |scratch, (i, z)| {
                        let (start, count) = (i * chunk, z.len() / columns);
                        let x = source.rows(start, count, scratch);
                        multiply(count, x, &packed, Onto::Zero, z);
                        finish(start, z)
                    },
                )
                .collect()
        }
        Kind::Depthwise { stride, .. } => {
            let geometry = stage.geometry();
            let band = geometry.band();
            let taps = depthwise::by_tap(stage.weight, false);
            bands(&mut z, stage, band)
                .into_par_iter()
                .map_init(
                    || Padded::new(band * stride + 2, geometry.width, geometry.channels),
                    |image, (sample, first, z)| {
                        let count = z.len() / (geometry.columns() * columns);
                        fill(image, source, &geometry, sample, first, count);
                        let size = [count, geometry.columns()];
                        depthwise::convolve(image, &taps, stride, size, z);
                        finish((sample * geometry.rows() + first) * geometry.columns(), z)
                    },
                )
                .collect()
        }
        Kind::Dense { .. } => {
            let window = stage.window();
            let packed = window.packed(stage.weight);
            let x = source.whole(stage.samples * stage.rows_from());
            let per_sample = stage.rows_from() * stage.from[2];
            let band = (CHUNK / stage.to[1]).clamp(1, stage.to[0]);
            bands(&mut z, stage, band)
                .into_par_iter()
                .map_init(
                    || unwritten(band * stage.to[1] * window.depth()),
                    |scratch, (sample, first, z)| {
                        let (start, count) = (first * stage.to[1], z.len() / columns);
                        let image = &x[sample * per_sample..][..per_sample];
                        let seen = window.gather(image, start, count, scratch);
                        multiply(count, seen, &packed, Onto::Zero, z);
                        finish(sample * stage.rows_to() + start, z)
                    },
                )
                .collect()
        }
    };
    (z, finished)
}

/// A map's bands of rows: sample, first row, values.
fn bands<'a>(
    values: &'a mut [f32],
    stage: &Stage,
    band: usize,
) -> Vec<(usize, usize, &'a mut [f32])> {
    let [height, width, channels] = stage.to;
    values
        .chunks_mut((height * width * channels).max(1))
        .enumerate()
        .flat_map(|(sample, values)| {
            values
                .chunks_mut(band * width * channels)
                .enumerate()
                .map(move |(i, values)| (sample, i * band, values))
        })
        .collect()
}

/// The rows of a sample's image that `count` rows of the result from `first` on look at, each channel as often as it has
/// outputs.
fn fill(
    image: &mut Padded,
    source: &Source,
    geometry: &Geometry,
    sample: usize,
    first: usize,
    count: usize,
) {
    let top = (first * geometry.stride) as isize - 1;
    let rows = (count - 1) * geometry.stride + 3;
    let multiplier = geometry.channels / source.columns();
    let length = geometry.width * source.columns();
    let mut once = unwritten(if multiplier > 1 { length } else { 0 });
    image.fill(top, rows, geometry.height, |y, row| {
        let start = (sample * geometry.height + y) * geometry.width;
        if multiplier == 1 {
            source.write(start, row);
            return;
        }
        source.write(start, &mut once);
        for (copies, value) in row.chunks_exact_mut(multiplier).zip(&once) {
            copies.fill(*value);
        }
    });
}

impl Operation for Chain {
    fn forward(&self, inputs: &[Array], saves: bool) -> Forward {
        let stages = self.stages(inputs);
        let x = &inputs[0];
        let (mut extras, mut saved) = (Vec::new(), Vec::new());
        let mut previous: Option<Behind> = None;
        let mut made: Option<Array> = None;
        for (i, stage) in stages.iter().enumerate() {
            let source = match (&previous, &made) {
                (Some(behind), _) => Source::Behind(behind),
                (None, Some(made)) => Source::Plain(made, stage.from[2]),
                (None, None) => Source::Plain(x, stage.from[2]),
            };
            let last = i + 1 == stages.len();
            if let (Some(statistics), false) = (stage.fixed, saves) {
                let behind = stage.behind(None, statistics.map(Array::clone), self.epsilon);
                let skip = (last && self.skip).then_some(x);
                let (y, _) = convolve(stage, &source, |start, z| {
                    behind.apply_in_place(start, z);
                    if let Some(skip) = skip {
                        add(z, &skip[start * stage.to[2]..]);
                    }
                });
                (made, previous) = (Some(Array::new(y, &stage.shape())), None);
                continue;
            }
            let channels = stage.to[2];
            let (z, statistics) = match stage.fixed {
                Some(statistics) => {
                    let (z, _) = convolve(stage, &source, |_, _| ());
                    (z, statistics.map(Array::clone))
                }
                None => {
                    let (z, moments) = convolve(stage, &source, |_, z| Moments::of(z, channels));
                    let (mean, variance) = combine(&moments, channels);
                    let statistics = [mean, variance].map(|s| Array::new(s, &[channels]));
                    extras.extend(statistics.iter().cloned());
                    (z, statistics)
                }
            };
            let z = Array::new(z, &stage.shape());
            let [mean, variance] = statistics.clone();
            saved.extend([z.clone(), mean, variance]);
            previous = Some(stage.behind(Some(z), statistics, self.epsilon));
        }
        let output = match (previous, made) {
            (Some(behind), _) => {
                let stage = stages.last().expect("a chain has stages");
                let channels = stage.to[2];
                let mut y = unwritten(stage.shape().iter().product());
                y.par_chunks_mut(CHUNK * channels)
                    .enumerate()
                    .for_each(|(i, y)| {
                        behind.apply(i * CHUNK, y);
                        if self.skip {
                            add(y, &x[i * CHUNK * channels..]);
                        }
                    });
                Array::new(y, &stage.shape())
            }
            (None, made) => made.expect("a chain has stages"),
        };
        if !saves {
            saved.clear();
        }
        Forward {
            output,
            extras,
            saved,
        }
    }

    fn backward(
        &self,
        inputs: &[Array],
        saved: &[Array],
        gradient: &Array,
        wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let stages = self.stages(inputs);
        let behinds: Vec<Behind> = stages
            .iter()
            .zip(saved.as_chunks::<3>().0)
            .map(|(stage, [z, mean, variance])| {
                let statistics = [mean.clone(), variance.clone()];
                stage.behind(Some(z.clone()), statistics, self.epsilon)
            })
            .collect();
        let mut found: Vec<Option<Array>> = vec![None; inputs.len()];
        let last = stages.last().expect("a chain has stages");
        let (mut sums, mut dtheta) = last_sums(last, behinds.last().expect("as many"), gradient);
        let mut dy = Cow::Borrowed(&gradient[..]);
        for (i, stage) in stages.iter().enumerate().rev() {
            let behind = &behinds[i];
            let rows = stage.samples * stage.rows_to();
            let slopes = behind.slopes(&sums, rows, self.fixed);
            let source = match i.checked_sub(1) {
                Some(before) => Source::Behind(&behinds[before]),
                None => Source::Plain(&inputs[0], stage.from[2]),
            };
            let back = Back {
                stage,
                behind,
                slopes: &slopes,
                dy: &dy,
                source: &source,
                wants_dx: i > 0 || wanted[0],
                skip: (i == 0 && self.skip).then_some(&gradient[..]),
            };
            let Found {
                dx,
                dw,
                sums: sums_before,
                dtheta: dtheta_before,
            } = back.run();
            let [gamma, beta] = [slopes.gamma, slopes.beta].map(|d| Array::new(d, &[stage.to[2]]));
            found[stage.first] = Some(Array::new(dw, &stage.weight.shape()));
            found[stage.first + 1] = Some(gamma);
            found[stage.first + 2] = Some(beta);
            if let Some(theta) = stage.theta {
                let place = stage.first + if self.fixed { 5 } else { 3 };
                found[place] = Some(Array::new(dtheta, &theta.shape()));
            }
            (sums, dtheta) = (sums_before, dtheta_before);
            dy = Cow::Owned(dx);
        }
        if wanted[0] {
            found[0] = Some(Array::new(dy.into_owned(), &inputs[0].shape()));
        }
        found
    }
}

// ------------------------------------------------------------------ backward

/// Samples that one piece works on, so that no sum over a sample is cut.
fn samples_per_piece(stage: &Stage) -> usize {
    let per_sample = stage.rows_to();
    rows::piece(stage.samples * per_sample, per_sample) / per_sample
}

fn dtheta_length(source: &Source, samples: usize) -> usize {
    match source {
        Source::Behind(behind) if behind.activation() == Activation::Dynamic => {
            samples * 2 * behind.columns()
        }
        _ => 0,
    }
}

/// Pieces of `values`, of which each sample has `per_sample`; empty ones where there are no values.
fn split(values: &mut [f32], per_piece: usize, pieces: usize) -> Vec<&mut [f32]> {
    let mut split: Vec<&mut [f32]> = values.chunks_mut(per_piece.max(1)).collect();
    split.resize_with(pieces, Default::default);
    split
}

/// What the last activation leaves for the normalisation in front of it.
fn last_sums(stage: &Stage, behind: &Behind, gradient: &[f32]) -> (Sums, Vec<f32>) {
    let source = Source::Behind(behind);
    let mut dtheta = vec![0.0; dtheta_length(&source, stage.samples)];
    let samples = samples_per_piece(stage);
    let (rows, columns) = (stage.rows_to(), stage.to[2]);
    let pieces = stage.samples.div_ceil(samples);
    let parts: Vec<Sums> = split(&mut dtheta, samples * 2 * columns, pieces)
        .into_par_iter()
        .zip(gradient.par_chunks(samples * rows * columns))
        .enumerate()
        .map(|(i, (dtheta, dy))| {
            let mut sums = Sums::zero(columns);
            for (start, count) in chunks(dy.len() / columns) {
                let dy = &dy[start * columns..][..count * columns];
                let row = i * samples * rows + start;
                behind.add_sums(row, dy, &mut sums, i * samples, dtheta);
            }
            sums
        })
        .collect();
    (Sums::of(&parts, columns), dtheta)
}

/// One stage's way back.
struct Back<'a> {
    stage: &'a Stage<'a>,
    behind: &'a Behind,
    slopes: &'a Slopes,
    dy: &'a [f32],
    source: &'a Source<'a>,
    wants_dx: bool,
    /// Added to dx.
    skip: Option<&'a [f32]>,
}

struct Found {
    /// The gradient of what the source gives; empty where it is not wanted.
    dx: Vec<f32>,
    dw: Vec<f32>,
    /// Of the source's normalisation.
    sums: Sums,
    dtheta: Vec<f32>,
}

/// A piece of the batch and where its results go.
struct Piece<'a> {
    /// Number of the first sample, and how many.
    first: usize,
    samples: usize,
    dx: &'a mut [f32],
    dtheta: &'a mut [f32],
    sums: Sums,
}

impl Back<'_> {
    fn run(&self) -> Found {
        let Self { stage, source, .. } = self;
        let (rows, columns) = (stage.rows_from(), stage.from[2]);
        let mut dx = unwritten(if self.wants_dx {
            stage.samples * rows * columns
        } else {
            0
        });
        let mut dtheta = vec![0.0; dtheta_length(source, stage.samples)];
        let samples = samples_per_piece(stage);
        let pieces = stage.samples.div_ceil(samples);
        let weights = Weights::new(stage);
        let whole = match stage.kind {
            Kind::Dense { .. } => source.whole(stage.samples * rows),
            _ => Cow::Borrowed(&[][..]),
        };
        let parts: Vec<(Vec<f32>, Sums)> = split(&mut dx, samples * rows * columns, pieces)
            .into_par_iter()
            .zip(split(&mut dtheta, samples * 2 * columns, pieces))
            .enumerate()
            .map(|(i, (dx, dtheta))| {
                let first = i * samples;
                let mut piece = Piece {
                    first,
                    samples: samples.min(stage.samples - first),
                    dx,
                    dtheta,
                    sums: Sums::zero(columns),
                };
                let dw = match stage.kind {
                    Kind::Pointwise => self.pointwise(&mut piece, &weights),
                    Kind::Depthwise { stride, .. } => self.depthwise(&mut piece, &weights, stride),
                    Kind::Dense { .. } => self.dense(&mut piece, &weights, &whole),
                };
                if let (Some(skip), true) = (self.skip, self.wants_dx) {
                    add(piece.dx, &skip[first * rows * columns..]);
                }
                (dw, piece.sums)
            })
            .collect();
        let (dw, sums): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        Found {
            dx,
            dw: weights.restore(stage, rows::add_up(dw)),
            sums: Sums::of(&sums, columns),
            dtheta,
        }
    }

    fn pointwise(&self, piece: &mut Piece, weights: &Weights) -> Vec<f32> {
        let (depth, columns) = (self.stage.from[2], self.stage.to[2]);
        let rows = self.stage.rows_to();
        let mut dw = unwritten(columns * depth);
        let mut dz = unwritten(CHUNK * columns);
        let mut scratch = self.source.scratch(CHUNK);
        for (start, count) in chunks(piece.samples * rows) {
            let row = piece.first * rows + start;
            let dz = &mut dz[..count * columns];
            self.behind.dz(
                row,
                &self.dy[row * columns..][..count * columns],
                self.slopes,
                dz,
            );
            let x = self.source.rows(row, count, &mut scratch);
            multiply_transposed(count, [columns, depth], dz, x, start > 0, &mut dw);
            if self.wants_dx {
                let dx = &mut piece.dx[start * depth..][..count * depth];
                multiply(count, dz, &weights.packed, Onto::Zero, dx);
                self.source
                    .add_sums(row, dx, &mut piece.sums, piece.first, piece.dtheta);
            }
        }
        dw
    }

    fn depthwise(&self, piece: &mut Piece, weights: &Weights, stride: usize) -> Vec<f32> {
        let geometry = self.stage.geometry();
        let Geometry {
            height,
            width,
            channels,
            ..
        } = geometry;
        let (rows, columns, band) = (geometry.rows(), geometry.columns(), geometry.band());
        let mut image = Padded::new(band * stride + 2, width, channels);
        let mut dz = Padded::new(band + 2, columns, channels);
        let mut dtaps = vec![0.0; TAPS * channels];
        let (inputs, multiplier) = (self.stage.from[2], channels / self.stage.from[2]);
        let mut each = unwritten(if multiplier > 1 {
            band * stride * width * channels
        } else {
            0
        });
        for sample in 0..piece.samples {
            for first in (0..rows).step_by(band) {
                let count = band.min(rows - first);
                let whole = piece.first + sample;
                fill(&mut image, self.source, &geometry, whole, first, count);
                dz.fill(first as isize - 1, count + 2, rows, |y, dz| {
                    let row = (whole * rows + y) * columns;
                    let dy = &self.dy[row * channels..][..columns * channels];
                    self.behind.dz(row, dy, self.slopes, dz);
                });
                depthwise::correlate(&image, &dz, stride, [count, columns], &mut dtaps);
                if self.wants_dx {
                    let top = first * stride;
                    let count = (count * stride).min(height - top);
                    let start = (sample * height + top) * width;
                    let dx = &mut piece.dx[start * inputs..][..count * width * inputs];
                    let target = if multiplier == 1 { &mut *dx } else { &mut each };
                    if stride == 1 {
                        depthwise::convolve(&dz, &weights.taps, 1, [count, width], target);
                    } else {
                        depthwise::spread(&dz, &weights.taps, [count, width], target);
                    }
                    if multiplier > 1 {
                        for (dx, each) in dx.iter_mut().zip(each.chunks_exact(multiplier)) {
                            *dx = each.iter().sum();
                        }
                    }
                    let row = piece.first * height * width + start;
                    self.source
                        .add_sums(row, dx, &mut piece.sums, piece.first, piece.dtheta);
                }
            }
        }
        dtaps
    }

    fn dense(&self, piece: &mut Piece, weights: &Weights, x: &[f32]) -> Vec<f32> {
        let window = self.stage.window();
        let (depth, columns) = (window.depth(), self.stage.to[2]);
        let (rows_from, rows_to) = (self.stage.rows_from(), self.stage.rows_to());
        let per_sample = rows_from * window.channels;
        let mut dw = unwritten(columns * depth);
        let (mut dz, mut seen) = (unwritten(CHUNK * columns), unwritten(CHUNK * depth));
        if self.wants_dx {
            piece.dx.fill(0.0);
        }
        for sample in 0..piece.samples {
            let whole = piece.first + sample;
            let image = &x[whole * per_sample..][..per_sample];
            for (start, count) in chunks(rows_to) {
                let row = whole * rows_to + start;
                let dz = &mut dz[..count * columns];
                self.behind.dz(
                    row,
                    &self.dy[row * columns..][..count * columns],
                    self.slopes,
                    dz,
                );
                let add = sample > 0 || start > 0;
                let gathered = window.gather(image, start, count, &mut seen);
                multiply_transposed(count, [columns, depth], dz, gathered, add, &mut dw);
                if self.wants_dx {
                    let seen = &mut seen[..count * depth];
                    multiply(count, dz, &weights.packed, Onto::Zero, seen);
                    let dx = &mut piece.dx[sample * per_sample..][..per_sample];
                    window.scatter(seen, start, count, dx);
                }
            }
            if self.wants_dx {
                let dx = &piece.dx[sample * per_sample..][..per_sample];
                self.source.add_sums(
                    whole * rows_from,
                    dx,
                    &mut piece.sums,
                    piece.first,
                    piece.dtheta,
                );
            }
        }
        dw
    }
}

/// A stage's weight as its way back needs it.
struct Weights {
    /// Of matrices, `[outputs, depth]`.
    packed: Packed,
    /// Of depthwise kernels, backwards at stride 1.
    taps: Vec<f32>,
}

impl Weights {
    fn new(stage: &Stage) -> Self {
        let (depth, columns) = (stage.from[2], stage.to[2]);
        let mut weights = Self {
            packed: Packed::default(),
            taps: Vec::new(),
        };
        match stage.kind {
            Kind::Pointwise => {
                weights.packed = Packed::new([columns, depth], stage.weight, [depth, 1]);
            }
            Kind::Depthwise { stride, .. } => {
                weights.taps = depthwise::by_tap(stage.weight, stride == 1);
            }
            Kind::Dense { .. } => {
                let window = stage.window();
                let by_window = window.permuted(stage.weight);
                weights.packed =
                    Packed::new([columns, window.depth()], &by_window, [window.depth(), 1]);
            }
        }
        weights
    }

    /// The weight's gradient in the weight's own order.
    fn restore(&self, stage: &Stage, dw: Vec<f32>) -> Vec<f32> {
        match stage.kind {
            Kind::Pointwise => dw,
            Kind::Depthwise { .. } => depthwise::by_channel(&dw),
            Kind::Dense { .. } => stage.window().unpermuted(&dw),
        }
    }
}

/// What a position of a dense convolution's result sees.
#[derive(Clone, Copy)]
struct Window {
    height: usize,
    width: usize,
    channels: usize,
    stride: usize,
    side: usize,
    /// Of the result.
    columns: usize,
}

impl Window {
    fn depth(&self) -> usize {
        self.side * self.side * self.channels
    }

    /// A weight `[outputs, channels, side, side]` with channels last.
    fn permuted(&self, weight: &[f32]) -> Vec<f32> {
        let taps = self.side * self.side;
        weight
            .chunks_exact(self.depth())
            .flat_map(|kernel| {
                (0..taps).flat_map(move |tap| {
                    (0..self.channels).map(move |channel| kernel[channel * taps + tap])
                })
            })
            .collect()
    }

    fn unpermuted(&self, weight: &[f32]) -> Vec<f32> {
        let taps = self.side * self.side;
        weight
            .chunks_exact(self.depth())
            .flat_map(|kernel| {
                (0..self.channels).flat_map(move |channel| {
                    (0..taps).map(move |tap| kernel[tap * self.channels + channel])
                })
            })
            .collect()
    }

    fn packed(&self, weight: &[f32]) -> Packed {
        let outputs = weight.len() / self.depth();
        Packed::new(
            [self.depth(), outputs],
            &self.permuted(weight),
            [1, self.depth()],
        )
    }

    /// For each row of the kernel at a position: where it starts in the image, which of its columns lie inside.
    fn runs(&self, position: usize) -> impl Iterator<Item = Run> {
        let border = self.side / 2;
        let (y, x) = (position / self.columns, position % self.columns);
        let left = x * self.stride;
        let inside = border.saturating_sub(left)..self.side.min(self.width + border - left);
        (0..self.side).map(move |ky| {
            let row = (y * self.stride + ky).checked_sub(border);
            let row = row.filter(|&row| row < self.height);
            Run {
                tap: ky * self.side,
                image: row
                    .map(|row| (row * self.width + left + inside.start - border) * self.channels),
                inside: inside.clone(),
            }
        })
    }

    /// What `count` positions of one image from `start` on see, `[count, depth]`.
    fn gather<'b>(
        &self,
        image: &[f32],
        start: usize,
        count: usize,
        seen: &'b mut [f32],
    ) -> &'b [f32] {
        let seen = &mut seen[..count * self.depth()];
        for (i, seen) in seen.chunks_exact_mut(self.depth()).enumerate() {
            for run in self.runs(start + i) {
                let seen = &mut seen[run.tap * self.channels..][..self.side * self.channels];
                let Some(from) = run.image else {
                    seen.fill(0.0);
                    continue;
                };
                let (a, b) = (
                    run.inside.start * self.channels,
                    run.inside.end * self.channels,
                );
                seen[..a].fill(0.0);
                seen[a..b].copy_from_slice(&image[from..][..b - a]);
                seen[b..].fill(0.0);
            }
        }
        seen
    }

    /// Adds what those positions saw to where they saw it.
    fn scatter(&self, seen: &[f32], start: usize, count: usize, image: &mut [f32]) {
        for (i, seen) in seen.chunks_exact(self.depth()).take(count).enumerate() {
            for run in self.runs(start + i) {
                let Some(from) = run.image else { continue };
                let seen = &seen[run.tap * self.channels..];
                let (a, b) = (
                    run.inside.start * self.channels,
                    run.inside.end * self.channels,
                );
                add(&mut image[from..][..b - a], &seen[a..b]);
            }
        }
    }
}

/// A kernel row's place in an image.
struct Run {
    /// Number of the row's first tap.
    tap: usize,
    /// Where its first inside column starts, if the row lies inside.
    image: Option<usize>,
    /// Its columns that lie inside.
    inside: std::ops::Range<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_see_what_a_loop_over_pixels_sees() {
        for (height, width, channels, side, stride) in [
            (5usize, 4usize, 2, 3, 1),
            (5, 4, 3, 3, 2),
            (6, 7, 1, 7, 2),
            (1, 1, 2, 3, 1),
            (4, 4, 1, 5, 3),
        ] {
            let columns = width.div_ceil(stride);
            let window = Window {
                height,
                width,
                channels,
                stride,
                side,
                columns,
            };
            let image: Vec<f32> = (1..=height * width * channels).map(|v| v as f32).collect();
            let count = height.div_ceil(stride) * columns;
            let mut seen = vec![f32::NAN; count * window.depth()];
            window.gather(&image, 0, count, &mut seen);
            for (i, &value) in seen.iter().enumerate() {
                let (position, within) = (i / window.depth(), i % window.depth());
                let (tap, channel) = (within / channels, within % channels);
                let y = (position / columns * stride + tap / side).wrapping_sub(side / 2);
                let x = (position % columns * stride + tap % side).wrapping_sub(side / 2);
                let expected = if y < height && x < width {
                    image[(y * width + x) * channels + channel]
                } else {
                    0.0
                };
                assert_eq!(value, expected, "position {position}, tap {tap}");
            }
            // Scattering is gathering's transpose: <seen, gather(image)> = <scatter(seen), image>.
            let weights: Vec<f32> = (0..seen.len()).map(|i| (i % 7) as f32).collect();
            let mut back = vec![0.0; image.len()];
            window.scatter(&weights, 0, count, &mut back);
            let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            assert_eq!(dot(&seen, &weights), dot(&image, &back));
        }
    }
}
