//! A stage's way back, in pieces of whole samples.

use std::borrow::Cow;

use rayon::prelude::*;

use super::forward::fill;
use super::source::Source;
use super::{Kind, Stage};
use crate::depthwise::{self, Geometry, Padded, TAPS};
use crate::gemm::{Onto, Packed, multiply, multiply_transposed};
use crate::norm::{Activation, Behind, Slopes, Sums};
use crate::rows::{self, CHUNK, chunks};
use crate::simd::{add, unwritten};

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

/// What the last activation leaves for the normalisation in front of it.
pub(super) fn last_sums(stage: &Stage, behind: &Behind, gradient: &[f32]) -> (Sums, Vec<f32>) {
    let source = Source::Behind(behind);
    let mut dtheta = vec![0.0; dtheta_length(&source, stage.samples)];
    let samples = samples_per_piece(stage);
    let (rows, columns) = (stage.rows_to(), stage.to[2]);
    let pieces = stage.samples.div_ceil(samples);
    let parts: Vec<Sums> = rows::split(&mut dtheta, samples * 2 * columns, pieces)
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
pub(super) struct Back<'a> {
    pub(super) stage: &'a Stage<'a>,
    pub(super) behind: &'a Behind,
    pub(super) slopes: &'a Slopes,
    pub(super) dy: &'a [f32],
    pub(super) source: &'a Source<'a>,
    pub(super) wants_dx: bool,
    /// Added to dx.
    pub(super) skip: Option<&'a [f32]>,
}

pub(super) struct Found {
    /// The gradient of what the source gives; empty where it is not wanted.
    pub(super) dx: Vec<f32>,
    pub(super) dw: Vec<f32>,
    /// Of the source's normalisation.
    pub(super) sums: Sums,
    pub(super) dtheta: Vec<f32>,
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
    pub(super) fn run(&self) -> Found {
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
        let parts: Vec<(Vec<f32>, Sums)> = rows::split(&mut dx, samples * rows * columns, pieces)
            .into_par_iter()
            .zip(rows::split(&mut dtheta, samples * 2 * columns, pieces))
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
