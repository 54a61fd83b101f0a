//! Chains of convolution, batch normalisation and activation over channels-last maps, `[N, H, W, C]`.
//!
//! A chain keeps what its convolutions made, before normalisation; normalised and activated maps are made anew from it,
//! a few rows at a time, wherever they are read.

mod backward;
mod evaluate;
mod forward;
mod source;
mod window;

use std::borrow::Cow;

use rayon::prelude::*;

use crate::array::Array;
use crate::depthwise::Geometry;
use crate::norm::{Activation, Behind, Moments, Parameters, combine};
use crate::operation::{Forward, Operation};
use crate::rows::CHUNK;
use crate::simd::{add, unwritten};
use backward::{Back, Found, last_sums};
use forward::convolve;
use source::Source;
use window::Window;

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

impl Operation for Chain {
    fn forward(&self, inputs: &[Array], saves: bool) -> Forward {
        let stages = self.stages(inputs);
        let x = &inputs[0];
        let evaluated = (self.fixed && !saves).then(|| evaluate::evaluate(self, &stages, inputs));
        if let Some(output) = evaluated.flatten() {
            return Forward::from(output);
        }
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
            if saves {
                saved.extend([z.clone(), mean, variance]);
            }
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
