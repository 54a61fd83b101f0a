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
    /// Of each row of each sample: rows see those of their own segment only, L being S. Empty where they see all.
    pub segments: Vec<u32>,
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

    /// Rows of q that are weighed together, and which they are: `[first, count]`.
    fn blocks(&self) -> impl Iterator<Item = [usize; 2]> {
        let l = self.lengths[0];
        (0..l)
            .step_by(BLOCK)
            .map(move |first| [first, BLOCK.min(l - first)])
    }
}

/// So few rows of q are weighed at a time that their weights stay in the cache.
const BLOCK: usize = 64;

/// What one thread needs for one head after another.
struct Scratch {
    weights: Vec<f32>,
    slopes: Vec<f32>,
    keys: Packed,
    values: Packed,
    /// The keys, the other way round.
    back: Packed,
}

impl Scratch {
    fn new(layout: &Layout) -> Self {
        let [l, s] = layout.lengths;
        let size = BLOCK.min(l) * s;
        Self {
            weights: unwritten(size),
            slopes: unwritten(size),
            keys: Packed::default(),
            values: Packed::default(),
            back: Packed::default(),
        }
    }
}

/// Entries of softmax(x) so far below the largest are 0: they would not be seen beside it, and their products would be
/// subnormal numbers, which some processors are slow with.
const NOTHING: f32 = -75.0;

/// softmax(scale·x) of each row of `width`.
fn softmax(x: &mut [f32], width: usize, scale: f32) {
    vectorised(
        #[inline(always)]
        || {
            for row in x.chunks_exact_mut(width) {
                let most = largest(row);
                for x in &mut *row {
                    let below = (*x - most) * scale;
                    *x = if below < NOTHING { 0.0 } else { exp(below) };
                }
                let share = 1.0 / sum(row);
                for x in row {
                    *x *= share;
                }
            }
        },
    );
}

/// Leaves no score where rows of q, which begin with row `first`, meet rows of k of another segment.
fn keep_apart(segments: &[u32], first: usize, scores: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (row, own) in scores
                .chunks_exact_mut(segments.len())
                .zip(&segments[first..])
            {
                for (score, other) in row.iter_mut().zip(segments) {
                    *score = if other == own {
                        *score
                    } else {
                        f32::NEG_INFINITY
                    };
                }
            }
        },
    );
}

/// A head of a sample.
struct Head<'a> {
    layout: &'a Layout,
    /// Of the sample.
    segments: &'a [u32],
}

impl Head<'_> {
    /// The weights of `rows` rows of q, the first of all being `first`, over the rows of k.
    fn weigh(&self, first: usize, rows: usize, q: Rows, keys: &Packed, weights: &mut [f32]) {
        let s = self.layout.lengths[1];
        multiply_rows(rows, q, keys, Onto::Zero, RowsMut::new(weights, s));
        if !self.segments.is_empty() {
            keep_apart(self.segments, first, weights);
        }
        softmax(weights, s, scale(self.layout));
    }
}

impl Attention {
    /// Rows see all.
    pub fn new(heads: usize) -> Self {
        Self {
            heads,
            segments: Vec::new(),
        }
    }

    fn layout(&self, inputs: &[Array]) -> Layout {
        let layout = Layout::of(inputs, self.heads);
        let [l, s] = layout.lengths;
        assert!(self.segments.is_empty() || l == s && self.segments.len() == layout.samples * l);
        layout
    }

    fn head<'a>(&'a self, layout: &'a Layout, sample: usize) -> Head<'a> {
        let mut samples = self.segments.chunks_exact(layout.lengths[0]);
        Head {
            layout,
            segments: samples.nth(sample).unwrap_or_default(),
        }
    }
}

fn scale(layout: &Layout) -> f32 {
    1.0 / (layout.head as f32).sqrt()
}

/// What a head answers for one sample, from its q, k and v.
fn forward(head: &Head, [q, k, v]: [Rows; 3], scratch: &mut Scratch, mut y: RowsMut) {
    let layout = head.layout;
    let s = layout.lengths[1];
    layout.fill(&mut scratch.keys, k, 1, true);
    layout.fill(&mut scratch.values, v, 2, false);
    for [first, rows] in layout.blocks() {
        let weights = &mut scratch.weights[..rows * s];
        head.weigh(first, rows, q.after(first), &scratch.keys, weights);
        let weights = Rows::new(weights, s);
        let y = y.after(first);
        multiply_rows(rows, weights, &scratch.values, Onto::Zero, y);
    }
}

/// From the gradient of that answer those of q, k and v.
fn backward(
    head: &Head,
    [q, k, v]: [Rows; 3],
    dy: Rows,
    scratch: &mut Scratch,
    [mut dq, mut dk, mut dv]: [RowsMut; 3],
) {
    let layout = head.layout;
    let s = layout.lengths[1];
    let size = [s, layout.head];
    let scale = scale(layout);
    layout.fill(&mut scratch.keys, k, 1, true);
    layout.fill(&mut scratch.values, v, 2, true);
    layout.fill(&mut scratch.back, k, 1, false);
    for [first, rows] in layout.blocks() {
        let (q, dy, add) = (q.after(first), dy.after(first), first > 0);
        let weights = &mut scratch.weights[..rows * s];
        let slopes = &mut scratch.slopes[..rows * s];
        head.weigh(first, rows, q, &scratch.keys, weights);
        let weighed = Rows::new(weights, s);
        multiply_rows_transposed(rows, size, weighed, dy, add, dv.after(0));
        multiply_rows(
            rows,
            dy,
            &scratch.values,
            Onto::Zero,
            RowsMut::new(slopes, s),
        );
        vectorised(
            #[inline(always)]
            || {
                for (slopes, weights) in slopes.chunks_exact_mut(s).zip(weights.chunks_exact(s)) {
                    let level = dot(slopes, weights);
                    for (slope, weight) in slopes.iter_mut().zip(weights) {
                        *slope = weight * (*slope - level) * scale;
                    }
                }
            },
        );
        let slopes = Rows::new(slopes, s);
        multiply_rows(rows, slopes, &scratch.back, Onto::Zero, dq.after(first));
        multiply_rows_transposed(rows, size, slopes, q, add, dk.after(0));
    }
}

impl Operation for Attention {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let layout = self.layout(inputs);
        let ([l, _], channels) = (layout.lengths, layout.channels);
        let mut y = unwritten(layout.samples * l * channels);
        let bands: Vec<RowsMut> = y
            .chunks_mut(l * channels)
            .flat_map(|y| RowsMut::new(y, channels).bands(layout.head))
            .collect();
        bands.into_par_iter().enumerate().for_each_init(
            || Scratch::new(&layout),
            |scratch, (band, y)| {
                let (sample, head) = (band / self.heads, band % self.heads);
                let parts = [0, 1, 2].map(|part| layout.rows(inputs, part, sample, head));
                forward(&self.head(&layout, sample), parts, scratch, y);
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
        let layout = self.layout(inputs);
        let ([l, _], channels, heads) = (layout.lengths, layout.channels, self.heads);
        let mut found: Vec<Vec<f32>> = inputs.iter().map(|x| unwritten(x.len())).collect();
        let mut samples: Vec<_> = inputs
            .iter()
            .zip(&mut found)
            .map(|(input, found)| found.chunks_mut((input.len() / layout.samples.max(1)).max(1)))
            .collect();
        let mut tasks = Vec::with_capacity(layout.samples * heads);
        for _ in 0..layout.samples {
            // Whether side by side or one behind the other: the heads of q, then those of k, then those of v.
            let inputs = inputs.iter().zip(&mut samples);
            let bands = inputs.flat_map(|(input, found)| {
                let found = found.next().expect("a slice for each sample");
                RowsMut::new(found, input.dims::<3>()[2]).bands(layout.head)
            });
            let mut q: Vec<RowsMut> = bands.collect();
            let mut k = q.split_off(heads);
            let v = k.split_off(heads);
            tasks.extend(q.into_iter().zip(k).zip(v).map(|((q, k), v)| [q, k, v]));
        }
        tasks.into_par_iter().enumerate().for_each_init(
            || Scratch::new(&layout),
            |scratch, (task, found)| {
                let (sample, head) = (task / heads, task % heads);
                let parts = [0, 1, 2].map(|part| layout.rows(inputs, part, sample, head));
                let dy = &gradient[sample * l * channels + head * layout.head..];
                let dy = Rows::new(dy, channels);
                backward(&self.head(&layout, sample), parts, dy, scratch, found);
            },
        );
        inputs
            .iter()
            .zip(found)
            .map(|(input, found)| Some(Array::new(found, &input.shape())))
            .collect()
    }
}
