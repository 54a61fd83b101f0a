//! Linear layers over the last axis, alone and two of them with GELU between.

use rayon::prelude::*;

use crate::array::Array;
use crate::gemm::{
    Onto, Packed, Rows, RowsMut, multiply, multiply_rows_transposed, multiply_transposed,
};
use crate::operation::{Forward, Operation};
use crate::rows::{self, CHUNK, chunks, parallel_chunk};
use crate::simd::{add, gelu, gelu_with_derivative, unwritten, vectorised};

/// A weight `[outputs, inputs]` as what `x Wᵀ` multiplies x with.
fn packed_transposed(weight: &Array) -> Packed {
    let [outputs, inputs] = weight.matrix();
    Packed::new([inputs, outputs], weight, [1, inputs])
}

/// A weight `[outputs, inputs]` as what its gradient `dy W` multiplies dy with.
fn packed(weight: &Array) -> Packed {
    let [outputs, inputs] = weight.matrix();
    Packed::new([outputs, inputs], weight, [inputs, 1])
}

fn onto(bias: Option<&Array>) -> Onto<'_> {
    bias.map_or(Onto::Zero, |bias| Onto::Row(bias))
}

/// `sums[j] += Σ_i rows[i, j]`
fn add_rows(rows: &[f32], sums: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(sums.len()) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += value;
                }
            }
        },
    );
}

/// The parts of a tensor with its last axis replaced.
fn with_columns(shape: &[usize], columns: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    *shape.last_mut().expect("there is a last axis") = columns;
    shape
}

/// `x Wᵀ + b`; inputs: x `[…, K]`, W `[N, K]`, and b `[N]` where there is one. As a step, `x + factor·x Wᵀ` with a factor
/// for each sample; inputs then: x `[samples, T, C]`, W `[C, C]`.
#[derive(Debug)]
pub struct Linear {
    /// Empty where it is no step.
    pub factors: Vec<f32>,
}

/// Gradients of so large a weight are cut by its outputs where there are so few pieces of rows.
const LARGE: usize = 1 << 16;
const FEW: usize = 8;
/// Outputs whose part of such a gradient one thread takes at a time.
const OUTPUTS: usize = 64;

impl Linear {
    /// `x Wᵀ + b`.
    pub const PLAIN: Self = Self {
        factors: Vec::new(),
    };

    fn is_step(&self) -> bool {
        !self.factors.is_empty()
    }

    /// `rows` times the factors of their samples, the first being row `start` of all.
    fn scale(&self, start: usize, per_sample: usize, rows: &mut [f32], width: usize) {
        vectorised(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    let factor = self.factors[(start + i) / per_sample];
                    for value in row {
                        *value *= factor;
                    }
                }
            },
        );
    }

    /// The gradient of `x Wᵀ`: that of the output, or for a step times its factors.
    fn inner(&self, gradient: &Array, per_sample: usize) -> Array {
        let mut inner = gradient.clone();
        if self.is_step() {
            let [_, columns] = gradient.matrix();
            inner
                .values_mut()
                .par_chunks_mut(CHUNK * columns)
                .enumerate()
                .for_each(|(i, rows)| self.scale(i * CHUNK, per_sample, rows, columns));
        }
        inner
    }

    fn per_sample(&self, rows: usize) -> usize {
        rows / self.factors.len().max(1)
    }
}

impl Operation for Linear {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let (x, weight) = (&inputs[0], &inputs[1]);
        let [rows, depth] = x.matrix();
        let [columns, inputs_of_weight] = weight.matrix();
        assert_eq!(
            inputs_of_weight, depth,
            "the weight's inputs are x's last axis"
        );
        let packed = packed_transposed(weight);
        let onto = onto(inputs.get(2));
        let mut y = unwritten(rows * columns);
        let chunk = parallel_chunk(rows);
        y.par_chunks_mut(chunk * columns)
            .zip(x.par_chunks(chunk * depth))
            .enumerate()
            .for_each(|(i, (y, x))| {
                multiply(x.len() / depth, x, &packed, onto, y);
                if self.is_step() {
                    self.scale(i * chunk, self.per_sample(rows), y, columns);
                    add(y, x);
                }
            });
        Forward::from(Array::new(y, &with_columns(&x.shape(), columns)))
    }

    fn backward(
        &self,
        inputs: &[Array],
        _saved: &[Array],
        gradient: &Array,
        wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let (x, weight) = (&inputs[0], &inputs[1]);
        let [rows, depth] = x.matrix();
        let [columns, _] = weight.matrix();
        let dy = self.inner(gradient, self.per_sample(rows));
        let by_rows = rows.div_ceil(rows::piece(rows, 1)) >= FEW || columns * depth < LARGE;
        let piece = if by_rows {
            rows::piece(rows, 1)
        } else {
            parallel_chunk(rows)
        };
        let packed = packed(weight);
        let mut dx = unwritten(if wanted[0] { rows * depth } else { 0 });
        let pieces = rows.div_ceil(piece);
        let parts: Vec<(Vec<f32>, Vec<f32>)> = rows::split(&mut dx, piece * depth, pieces)
            .into_par_iter()
            .enumerate()
            .map(|(i, dx)| {
                let first = i * piece;
                let mut dw = unwritten(if by_rows { columns * depth } else { 0 });
                let mut db = vec![0.0; columns];
                for (start, count) in chunks(piece.min(rows - first)) {
                    let row = first + start;
                    let dy = &dy[row * columns..][..count * columns];
                    let x = &x[row * depth..][..count * depth];
                    if wanted[0] {
                        let dx = &mut dx[start * depth..][..count * depth];
                        multiply(count, dy, &packed, Onto::Zero, dx);
                        if self.is_step() {
                            add(dx, &gradient[row * depth..]);
                        }
                    }
                    if wanted[1] && by_rows {
                        multiply_transposed(count, [columns, depth], dy, x, start > 0, &mut dw);
                    }
                    add_rows(dy, &mut db);
                }
                (dw, db)
            })
            .collect();
        let (dw, db): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let dw = wanted[1].then(|| {
            let dw = if by_rows {
                rows::add_up(dw)
            } else {
                by_outputs(rows, [columns, depth], &dy, x)
            };
            Array::new(dw, &weight.shape())
        });
        let mut found = vec![wanted[0].then(|| Array::new(dx, &x.shape())), dw];
        if inputs.len() > 2 {
            found.push(wanted[2].then(|| Array::new(rows::add_up(db), &[columns])));
        }
        found
    }
}

/// `Σ_r dy[r, i]·x[r, j]`, cut by i.
fn by_outputs(rows: usize, [columns, depth]: [usize; 2], dy: &[f32], x: &[f32]) -> Vec<f32> {
    let mut dw = unwritten(columns * depth);
    dw.par_chunks_mut(OUTPUTS * depth)
        .enumerate()
        .for_each(|(i, dw)| {
            let size = [dw.len() / depth, depth];
            let dy = Rows::new(&dy[i * OUTPUTS..], columns);
            let dw = RowsMut::new(dw, depth);
            multiply_rows_transposed(rows, size, dy, Rows::new(x, depth), false, dw);
        });
    dw
}

/// `W₂ gelu(W₁ x + b₁) + b₂`; inputs: x `[…, K]`, W₁ `[H, K]`, b₁ `[H]`, W₂ `[N, H]`, b₂ `[N]`.
///
/// Keeps `W₁ x + b₁` for the gradient, not its GELU.
#[derive(Debug)]
pub struct Mlp;

impl Operation for Mlp {
    fn forward(&self, inputs: &[Array], saves: bool) -> Forward {
        let [x, w1, b1, w2, b2] = inputs else {
            unreachable!("a perceptron has five inputs")
        };
        let [rows, depth] = x.matrix();
        let [[inside, _], [columns, _]] = [w1.matrix(), w2.matrix()];
        assert_eq!([w1.matrix()[1], w2.matrix()[1]], [depth, inside]);
        let (p1, p2) = (packed_transposed(w1), packed_transposed(w2));
        let mut y = unwritten(rows * columns);
        let chunk = parallel_chunk(rows);
        let mut hidden = unwritten(if saves { rows * inside } else { 0 });
        let kept = rows::split(&mut hidden, chunk * inside, rows.div_ceil(chunk));
        y.par_chunks_mut(chunk * columns)
            .zip(x.par_chunks(chunk * depth))
            .zip(kept)
            .for_each_init(
                || unwritten(chunk * inside),
                |active, ((y, x), kept)| {
                    let count = x.len() / depth;
                    let active = &mut active[..count * inside];
                    multiply(count, x, &p1, Onto::Row(b1), active);
                    if saves {
                        kept.copy_from_slice(active);
                    }
                    vectorised(
                        #[inline(always)]
                        || {
                            for value in &mut *active {
                                *value = gelu(*value);
                            }
                        },
                    );
                    multiply(count, active, &p2, Onto::Row(b2), y);
                },
            );
        Forward {
            output: Array::new(y, &with_columns(&x.shape(), columns)),
            extras: Vec::new(),
            saved: if saves {
                vec![Array::new(hidden, &[rows, inside])]
            } else {
                Vec::new()
            },
        }
    }

    fn backward(
        &self,
        inputs: &[Array],
        saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let [x, w1, b1, w2, b2] = inputs else {
            unreachable!("a perceptron has five inputs")
        };
        let hidden = &saved[0];
        let [rows, depth] = x.matrix();
        let [[inside, _], [columns, _]] = [w1.matrix(), w2.matrix()];
        let (p1, p2) = (packed(w1), packed(w2));
        let piece = rows::piece(rows, 1);
        let mut dx = unwritten(rows * depth);
        let parts: Vec<[Vec<f32>; 4]> = dx
            .par_chunks_mut(piece * depth)
            .zip(x.par_chunks(piece * depth))
            .zip(gradient.par_chunks(piece * columns))
            .zip(hidden.par_chunks(piece * inside))
            .map(|(((dx, x), dy), hidden)| {
                let (mut dw1, mut db1) = (unwritten(inside * depth), vec![0.0; inside]);
                let (mut dw2, mut db2) = (unwritten(columns * inside), vec![0.0; columns]);
                let (mut active, mut inner) =
                    (unwritten(CHUNK * inside), unwritten(CHUNK * inside));
                for (start, count) in chunks(x.len() / depth) {
                    let dy = &dy[start * columns..][..count * columns];
                    let x = &x[start * depth..][..count * depth];
                    let hidden = &hidden[start * inside..][..count * inside];
                    let active = &mut active[..count * inside];
                    let inner = &mut inner[..count * inside];
                    multiply(count, dy, &p2, Onto::Zero, inner);
                    vectorised(
                        #[inline(always)]
                        || {
                            for ((active, inner), &hidden) in
                                active.iter_mut().zip(inner.iter_mut()).zip(hidden)
                            {
                                let (value, slope) = gelu_with_derivative(hidden);
                                *active = value;
                                *inner *= slope;
                            }
                        },
                    );
                    let add = start > 0;
                    multiply_transposed(count, [columns, inside], dy, active, add, &mut dw2);
                    add_rows(dy, &mut db2);
                    multiply_transposed(count, [inside, depth], inner, x, add, &mut dw1);
                    add_rows(inner, &mut db1);
                    let dx = &mut dx[start * depth..][..count * depth];
                    multiply(count, inner, &p1, Onto::Zero, dx);
                }
                [dw1, db1, dw2, db2]
            })
            .collect();
        let mut sums: [Vec<Vec<f32>>; 4] = Default::default();
        for part in parts {
            for (sum, part) in sums.iter_mut().zip(part) {
                sum.push(part);
            }
        }
        let [dw1, db1, dw2, db2] = sums.map(rows::add_up);
        [(dx, x), (dw1, w1), (db1, b1), (dw2, w2), (db2, b2)]
            .into_iter()
            .map(|(values, like)| Some(Array::new(values, &like.shape())))
            .collect()
    }
}
