//! A pre-norm transformer block (ViT, arXiv 2010.11929) as one operation, so that what its parts leave for each other is
//! nobody else's: x + W_o attention(LN(x)), then that + mlp(LN(that)).

use rayon::prelude::*;

use crate::array::Array;
use crate::attention::Attention;
use crate::layer_norm::LayerNorm;
use crate::linear::{Linear, Mlp};
use crate::operation::{Forward, Operation};
use crate::simd::add;

/// Inputs: x `[N, T, C]`; scale and shift of the first norm; weight and bias of q, k, v at once and of the projection;
/// scale and shift of the second norm; weights and biases of the perceptron, in turn.
#[derive(Debug)]
pub struct Block {
    pub heads: usize,
    pub epsilon: f32,
}

/// Entries that one thread adds at a time.
const PART: usize = 1 << 14;

/// `values + others`, in the place of the former.
fn sum(mut values: Array, others: &[f32]) -> Array {
    values
        .values_mut()
        .par_chunks_mut(PART)
        .zip(others.par_chunks(PART))
        .for_each(|(values, others)| add(values, others));
    values
}

/// The inputs of each part, behind what it reads.
struct Parts<'a> {
    norm1: &'a [Array],
    qkv: &'a [Array],
    projection: &'a [Array],
    norm2: &'a [Array],
    mlp: &'a [Array],
}

impl<'a> Parts<'a> {
    fn of(inputs: &'a [Array]) -> Self {
        Self {
            norm1: &inputs[1..3],
            qkv: &inputs[3..5],
            projection: &inputs[5..7],
            norm2: &inputs[7..9],
            mlp: &inputs[9..13],
        }
    }
}

fn with(x: &Array, parameters: &[Array]) -> Vec<Array> {
    std::iter::once(x).chain(parameters).cloned().collect()
}

/// The gradients of a part's inputs: of what it reads, and of its parameters.
fn back(
    operation: &impl Operation,
    inputs: &[Array],
    saved: &[Array],
    gradient: &Array,
) -> (Array, Vec<Option<Array>>) {
    let wanted = vec![true; inputs.len()];
    let mut found = operation
        .backward(inputs, saved, gradient, &wanted)
        .into_iter();
    let dx = found.next().flatten().expect("it was wanted");
    (dx, found.collect())
}

impl Block {
    fn norm(&self) -> LayerNorm {
        LayerNorm {
            epsilon: self.epsilon,
        }
    }

    fn attention(&self) -> Attention {
        Attention::new(self.heads)
    }
}

impl Operation for Block {
    fn forward(&self, inputs: &[Array], saves: bool) -> Forward {
        let x = &inputs[0];
        let parts = Parts::of(inputs);
        let normed1 = self.norm().forward(&with(x, parts.norm1), saves);
        let qkv = Linear::PLAIN.forward(&with(&normed1.output, parts.qkv), saves);
        let seen = self
            .attention()
            .forward(std::slice::from_ref(&qkv.output), saves);
        let projected = Linear::PLAIN.forward(&with(&seen.output, parts.projection), saves);
        let middle = sum(projected.output, x);
        let normed2 = self.norm().forward(&with(&middle, parts.norm2), saves);
        let mlp = Mlp.forward(&with(&normed2.output, parts.mlp), saves);
        let output = sum(mlp.output, &middle);
        let mut saved = Vec::new();
        if saves {
            saved.extend([
                normed1.output,
                qkv.output,
                seen.output,
                middle,
                normed2.output,
            ]);
            saved.extend(
                normed1
                    .saved
                    .into_iter()
                    .chain(normed2.saved)
                    .chain(mlp.saved),
            );
        }
        Forward {
            output,
            extras: Vec::new(),
            saved,
        }
    }

    fn backward(
        &self,
        inputs: &[Array],
        saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let x = &inputs[0];
        let parts = Parts::of(inputs);
        let [
            normed1,
            qkv,
            seen,
            middle,
            normed2,
            statistics1,
            statistics2,
            hidden,
        ] = saved
        else {
            unreachable!("a block keeps eight arrays")
        };
        let one = std::slice::from_ref;
        let (d, dmlp) = back(&Mlp, &with(normed2, parts.mlp), one(hidden), gradient);
        let (d, dnorm2) = back(
            &self.norm(),
            &with(middle, parts.norm2),
            one(statistics2),
            &d,
        );
        let dmiddle = sum(d, gradient);
        let (d, dprojection) = back(&Linear::PLAIN, &with(seen, parts.projection), &[], &dmiddle);
        let (d, _) = back(&self.attention(), one(qkv), &[], &d);
        let (d, dqkv) = back(&Linear::PLAIN, &with(normed1, parts.qkv), &[], &d);
        let (d, dnorm1) = back(&self.norm(), &with(x, parts.norm1), one(statistics1), &d);
        let dx = sum(d, &dmiddle);
        std::iter::once(Some(dx))
            .chain(dnorm1)
            .chain(dqkv)
            .chain(dprojection)
            .chain(dnorm2)
            .chain(dmlp)
            .collect()
    }
}
