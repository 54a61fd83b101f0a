//! What a stage reads: the chain's input, or the stage before it.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::norm::{Behind, Sums};
use crate::rows::CHUNK;
use crate::simd::unwritten;

/// What a stage reads.
pub(super) enum Source<'a> {
    Plain(&'a [f32], usize),
    Behind(&'a Behind),
}

impl Source<'_> {
    pub(super) fn columns(&self) -> usize {
        match self {
            Self::Plain(_, columns) => *columns,
            Self::Behind(behind) => behind.columns(),
        }
    }

    /// Rows `start..start+count`, in `scratch` where they must be made.
    pub(super) fn rows<'b>(
        &'b self,
        start: usize,
        count: usize,
        scratch: &'b mut [f32],
    ) -> &'b [f32] {
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
    pub(super) fn write(&self, start: usize, rows: &mut [f32]) {
        match self {
            Self::Plain(x, columns) => {
                rows.copy_from_slice(&x[start * columns..][..rows.len()]);
            }
            Self::Behind(behind) => behind.apply(start, rows),
        }
    }

    /// All of it.
    pub(super) fn whole(&self, rows: usize) -> Cow<'_, [f32]> {
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

    pub(super) fn scratch(&self, rows: usize) -> Vec<f32> {
        match self {
            Self::Plain(..) => Vec::new(),
            Self::Behind(behind) => unwritten(rows * behind.columns()),
        }
    }

    pub(super) fn add_sums(
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
