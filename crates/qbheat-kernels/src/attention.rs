//! Attention (Vaswani et al., arXiv 1706.03762), one head of one sample at a time.

use rayon::prelude::*;

use crate::array::Array;
use crate::gemm::{Onto, Packed, Rows, RowsMut, multiply_rows, multiply_rows_transposed};
use crate::operation::{Forward, Operation};
use crate::simd::{dot, exp, largest, sum, unwritten, vectorised};

/// `softmax(q kᵀ / √(C/heads)) v` in each of `heads` contiguous groups of channels.
///
/// Inputs: q `[N, L, C]`, k and v `[N, S, C]`; or one, `[N, T, 3·C]`, that holds all three side by side. Keeps nothing:
/// the gradient computes the weights once more.
#[derive(Debug)]
pub struct Attention {
    pub heads: usize,
}

/// Where q, k and v stand.
struct Layout {
    samples: usize,
    /// Rows of q, and of k and v.
    lengths: [usize; 2],
    /// Channels of all heads, and of one.
    channels: usize,
    head: usize,
    /// For q, k, v: which input, how far into a row, length of that input's rows.
    parts: [(usize, usize, usize); 3],
}

impl Layout {
    fn of(inputs: &[Array], heads: usize) -> Self {
        let [samples, l, width] = inputs[0].dims();
        if inputs.len() == 1 {
            assert!(
                width.is_multiple_of(3 * heads),
                "{width} channels of q, k, v for {heads} heads"
            );
            let channels = width / 3;
            return Self {
                samples,
                lengths: [l, l],
                channels,
                head: channels / heads,
                parts: [
                    (0, 0, width),
                    (0, channels, width),
                    (0, 2 * channels, width),
                ],
            };
        }
        let length = inputs[1].dims::<3>()[1];
        assert!(
            width.is_multiple_of(heads),
            "{width} channels for {heads} heads"
        );
        assert!(
            inputs[1..]
                .iter()
                .all(|x| x.dims() == [samples, length, width])
        );
        Self {
            samples,
            lengths: [l, inputs[1].dims::<3>()[1]],
            channels: width,
            head: width / heads,
            parts: [(0, 0, width), (1, 0, width), (2, 0, width)],
        }
    }

    fn length(&self, part: usize) -> usize {
        self.lengths[usize::from(part > 0)]
    }

    /// Part 0, 1 or 2 (q, k, v) of one sample's head.
    fn rows<'a>(&self, inputs: &'a [Array], part: usize, sample: usize, head: usize) -> Rows<'a> {
        let (input, offset, stride) = self.parts[part];
        let start = sample * self.length(part) * stride + offset + head * self.head;
        Rows::new(&inputs[input][start..], stride)
    }

    fn fill(&self, packed: &mut Packed, rows: Rows, part: usize, transposed: bool) {
        let (length, stride) = (self.length(part), self.parts[part].2);
        if transposed {
            packed.fill([self.head, length], rows.values(), [1, stride]);
        } else {
            packed.fill([length, self.head], rows.values(), [stride, 1]);
        }
    }
}

#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    slopes: Vec<f32>,
    packed: Packed,
}

impl Scratch {
    fn new(layout: &Layout) -> Self {
        let size = layout.lengths[0] * layout.lengths[1];
        Self {
            weights: unwritten(size),
            slopes: unwritten(size),
            packed: Packed::default(),
        }
    }
}

/// softmax(scale·x) of each row of `width`.
fn softmax(x: &mut [f32], width: usize, scale: f32) {
    vectorised(
        #[inline(always)]
        || {
            for row in x.chunks_exact_mut(width) {
                let most = largest(row);
                for x in &mut *row {
                    *x = exp((*x - most) * scale);
                }
                let share = 1.0 / sum(row);
                for x in row {
                    *x *= share;
                }
            }
        },
    );
}

impl Attention {
    /// The weights of each row of q over the rows of k.
    fn weigh(&self, layout: &Layout, q: Rows, k: Rows, scratch: &mut Scratch) {
        let [l, s] = layout.lengths;
        layout.fill(&mut scratch.packed, k, 1, true);
        let weights = RowsMut::new(&mut scratch.weights, s);
        multiply_rows(l, q, &scratch.packed, Onto::Zero, weights);
        softmax(&mut scratch.weights, s, scale(layout));
    }
}

fn scale(layout: &Layout) -> f32 {
    1.0 / (layout.head as f32).sqrt()
}

impl Operation for Attention {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let layout = Layout::of(inputs, self.heads);
        let ([l, _], channels) = (layout.lengths, layout.channels);
        let mut y = unwritten(layout.samples * l * channels);
        y.par_chunks_mut(l * channels).enumerate().for_each_init(
            || Scratch::new(&layout),
            |scratch, (sample, y)| {
                for head in 0..self.heads {
                    let part = |part| layout.rows(inputs, part, sample, head);
                    self.weigh(&layout, part(0), part(1), scratch);
                    layout.fill(&mut scratch.packed, part(2), 2, false);
                    let weights = Rows::new(&scratch.weights, layout.lengths[1]);
                    let y = RowsMut::new(&mut y[head * layout.head..], channels);
                    multiply_rows(l, weights, &scratch.packed, Onto::Zero, y);
                }
            },
        );
        Forward::from(Array::new(y, &[layout.samples, l, channels]))
    }

    fn backward(
        &self,
        inputs: &[Array],
        _saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let layout = Layout::of(inputs, self.heads);
        let ([l, s], channels) = (layout.lengths, layout.channels);
        let mut found: Vec<Vec<f32>> = inputs.iter().map(|x| unwritten(x.len())).collect();
        // One entry a sample, of one slice an input.
        let mut samples: Vec<Vec<&mut [f32]>> = (0..layout.samples).map(|_| Vec::new()).collect();
        for (input, found) in inputs.iter().zip(&mut found) {
            let per_sample = input.len() / layout.samples.max(1);
            for (sample, part) in samples.iter_mut().zip(found.chunks_mut(per_sample.max(1))) {
                sample.push(part);
            }
        }
        samples.into_par_iter().enumerate().for_each_init(
            || Scratch::new(&layout),
            |scratch, (sample, mut found)| {
                for head in 0..self.heads {
                    let part = |part| layout.rows(inputs, part, sample, head);
                    let [q, k, v] = [part(0), part(1), part(2)];
                    let dy = &gradient[sample * l * channels + head * layout.head..];
                    let dy = Rows::new(dy, channels);
                    let mut into = |part: usize, run: &mut dyn FnMut(RowsMut)| {
                        let (input, offset, stride) = layout.parts[part];
                        let start = offset + head * layout.head;
                        run(RowsMut::new(&mut found[input][start..], stride));
                    };
                    self.weigh(&layout, q, k, scratch);
                    let Scratch {
                        weights,
                        slopes,
                        packed,
                    } = &mut *scratch;
                    let size = [s, layout.head];
                    into(2, &mut |dv| {
                        multiply_rows_transposed(l, size, Rows::new(weights, s), dy, false, dv);
                    });
                    layout.fill(packed, v, 2, true);
                    multiply_rows(l, dy, packed, Onto::Zero, RowsMut::new(slopes, s));
                    let scale = scale(&layout);
                    vectorised(
                        #[inline(always)]
                        || {
                            for (slopes, weights) in
                                slopes.chunks_exact_mut(s).zip(weights.chunks_exact(s))
                            {
                                let level = dot(slopes, weights);
                                for (slope, weight) in slopes.iter_mut().zip(weights) {
                                    *slope = weight * (*slope - level) * scale;
                                }
                            }
                        },
                    );
                    layout.fill(packed, k, 1, false);
                    into(0, &mut |dq| {
                        multiply_rows(l, Rows::new(slopes, s), packed, Onto::Zero, dq);
                    });
                    into(1, &mut |dk| {
                        multiply_rows_transposed(l, size, Rows::new(slopes, s), q, false, dk);
                    });
                }
            },
        );
        inputs
            .iter()
            .zip(found)
            .map(|(input, found)| Some(Array::new(found, &input.shape())))
            .collect()
    }
}
