//! Layer normalisation (Ba et al., arXiv 1607.06450).

use rayon::prelude::*;

use crate::array::Array;
use crate::operation::{Forward, Operation};
use crate::rows::{self, parallel_chunk};
use crate::simd::{dot, squared_distances, sum, unwritten, vectorised};

/// Inputs: x `[…, C]`, scale `[C]`, shift `[C]`.
#[derive(Debug)]
pub struct LayerNorm {
    pub epsilon: f32,
}

impl Operation for LayerNorm {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let [x, scale, shift] = inputs else {
            unreachable!("a layer norm has three inputs")
        };
        let [rows, width] = x.matrix();
        let (scale, shift): (&[f32], &[f32]) = (scale, shift);
        assert_eq!([scale.len(), shift.len()], [width; 2]);
        let mut y = unwritten(rows * width);
        // Mean and reciprocal deviation of each row.
        let mut statistics = unwritten(2 * rows);
        let chunk = parallel_chunk(rows);
        y.par_chunks_mut(chunk * width)
            .zip(x.par_chunks(chunk * width))
            .zip(statistics.par_chunks_mut(2 * chunk))
            .for_each(|((y, x), statistics)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for ((y, x), statistics) in y
                            .chunks_exact_mut(width)
                            .zip(x.chunks_exact(width))
                            .zip(statistics.as_chunks_mut::<2>().0)
                        {
                            let mean = sum(x) / width as f32;
                            let variance = squared_distances(x, mean) / width as f32;
                            let inverse = 1.0 / (variance + self.epsilon).sqrt();
                            *statistics = [mean, inverse];
                            for (((y, x), scale), shift) in
                                y.iter_mut().zip(x).zip(scale).zip(shift)
                            {
                                *y = (x - mean) * inverse * scale + shift;
                            }
                        }
                    },
                );
            });
        Forward {
            output: Array::new(y, &x.shape()),
            extras: Vec::new(),
            saved: vec![Array::new(statistics, &[rows, 2])],
        }
    }

    fn backward(
        &self,
        inputs: &[Array],
        saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let (x, scale): (&Array, &[f32]) = (&inputs[0], &inputs[1]);
        let [rows, width] = x.matrix();
        let piece = rows::piece(rows, 1);
        let mut dx = unwritten(rows * width);
        let parts: Vec<[Vec<f32>; 2]> = dx
            .par_chunks_mut(piece * width)
            .zip(x.par_chunks(piece * width))
            .zip(gradient.par_chunks(piece * width))
            .zip(saved[0].par_chunks(2 * piece))
            .map(|(((dx, x), dy), statistics)| {
                let mut sums = [vec![0.0; width], vec![0.0; width]];
                let mut unit = vec![0.0; width];
                vectorised(
                    #[inline(always)]
                    || {
                        let [dscale, dshift] = &mut sums;
                        for (((dx, x), dy), &[mean, inverse]) in dx
                            .chunks_exact_mut(width)
                            .zip(x.chunks_exact(width))
                            .zip(dy.chunks_exact(width))
                            .zip(statistics.as_chunks::<2>().0)
                        {
                            let (scale, dx) = (&scale[..width], &mut dx[..width]);
                            let (x, dy) = (&x[..width], &dy[..width]);
                            let unit = &mut unit[..width];
                            let (dscale, dshift) = (&mut dscale[..width], &mut dshift[..width]);
                            for i in 0..width {
                                unit[i] = (x[i] - mean) * inverse;
                                dx[i] = dy[i] * scale[i];
                                dscale[i] += dy[i] * unit[i];
                                dshift[i] += dy[i];
                            }
                            let along = dot(dx, unit) / width as f32;
                            let level = sum(dx) / width as f32;
                            for (dx, unit) in dx.iter_mut().zip(&*unit) {
                                *dx = (*dx - level - unit * along) * inverse;
                            }
                        }
                    },
                );
                sums
            })
            .collect();
        let (dscale, dshift) = parts.into_iter().map(|[a, b]| (a, b)).unzip();
        vec![
            Some(Array::new(dx, &x.shape())),
            Some(Array::new(rows::add_up(dscale), &[width])),
            Some(Array::new(rows::add_up(dshift), &[width])),
        ]
    }
}
