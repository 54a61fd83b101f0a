//! A stage's convolution.

use rayon::prelude::*;

use super::source::Source;
use super::{Kind, Stage};
use crate::depthwise::{self, Geometry, Padded};
use crate::gemm::{Onto, Packed, multiply};
use crate::rows::{CHUNK, parallel_chunk};
use crate::simd::unwritten;

/// The stage's convolution; `finish` sees each run of rows of it as soon as it is made.
pub(super) fn convolve<T: Send>(
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
pub(super) fn bands<'a>(
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
pub(super) fn fill(
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
