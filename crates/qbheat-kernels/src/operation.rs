//! How a fused operation becomes one of Burn's: the only place that knows of back ends and of recording gradients.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, ExtensionType, Flex, backend_extension,
};
use burn::tensor::Tensor;

use crate::array::Array;

/// What an operation makes of its inputs.
pub struct Forward {
    /// The result that gradients flow through.
    pub output: Array,
    /// Further results, which gradients do not flow through.
    pub extras: Vec<Array>,
    /// What [`Operation::backward`] needs beside the inputs.
    pub saved: Vec<Array>,
}

impl From<Array> for Forward {
    /// A result alone: the gradient needs the inputs only.
    fn from(output: Array) -> Self {
        Self {
            output,
            extras: Vec::new(),
            saved: Vec::new(),
        }
    }
}

/// A fused operation.
pub trait Operation: Debug + Send + Sync {
    /// `saves`: whether [`Self::backward`] will follow.
    fn forward(&self, inputs: &[Array], saves: bool) -> Forward;

    /// The gradient of each input that is `wanted`, from that of the output.
    fn backward(
        &self,
        inputs: &[Array],
        saved: &[Array],
        gradient: &Array,
        wanted: &[bool],
    ) -> Vec<Option<Array>>;
}

/// Inputs an operation may have.
pub const MOST_INPUTS: usize = 19;

/// So many inputs, of which the first few count: Burn's dispatch knows fields, but no lists.
#[derive(ExtensionType)]
pub struct Inputs<B: Backend>(
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
);

impl<B: Backend> Inputs<B> {
    /// The last one stands in for those that do not count.
    fn new(mut inputs: Vec<FloatTensor<B>>) -> Self {
        let last = inputs.last().expect("there is always an input").clone();
        assert!(inputs.len() <= MOST_INPUTS);
        inputs.resize(MOST_INPUTS, last);
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("as many as there are fields");
        Self(
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
            next(),
        )
    }

    fn first(self, count: usize) -> Vec<FloatTensor<B>> {
        let Self(
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            t8,
            t9,
            t10,
            t11,
            t12,
            t13,
            t14,
            t15,
            t16,
            t17,
            t18,
        ) = self;
        let mut inputs = vec![
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18,
        ];
        inputs.truncate(count);
        inputs
    }
}

#[backend_extension(Flex, Autodiff)]
pub trait Fused: Backend {
    /// The output, then the extras, from the first `count` inputs.
    fn fused(
        #[extension_type] inputs: Inputs<Self>,
        count: usize,
        operation: Arc<dyn Operation>,
    ) -> Vec<FloatTensor<Self>>;
}

impl Fused for Flex {
    fn fused(inputs: Inputs<Self>, count: usize, operation: Arc<dyn Operation>) -> Vec<FlexTensor> {
        let inputs: Vec<Array> = inputs.first(count).into_iter().map(Array::dense).collect();
        let Forward { output, extras, .. } = operation.forward(&inputs, false);
        std::iter::once(output)
            .chain(extras)
            .map(Array::into_tensor)
            .collect()
    }
}

/// What is kept from the forward to the backward pass.
#[derive(Clone, Debug)]
struct State {
    operation: Arc<dyn Operation>,
    inputs: Vec<Array>,
    saved: Vec<Array>,
}

#[derive(Debug)]
struct Recorded;

impl<const N: usize> Backward<Flex, N> for Recorded {
    type State = State;

    fn backward(self, ops: Ops<State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = Array::dense(gradients.consume::<Flex>(&ops.node));
        let State {
            operation,
            inputs,
            saved,
        } = ops.state;
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let found = operation.backward(&inputs, &saved, &gradient, &wanted);
        drop((inputs, saved, gradient));
        for (parent, found) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(found)) = (parent, found) {
                gradients.register::<Flex>(parent.id, found.into_tensor());
            }
        }
    }
}

impl<C: CheckpointStrategy> Fused for Autodiff<Flex, C> {
    fn fused(
        inputs: Inputs<Self>,
        count: usize,
        operation: Arc<dyn Operation>,
    ) -> Vec<FloatTensor<Self>> {
        let inputs = inputs.first(count);
        macro_rules! with_count {
            ($($count:literal)*) => {
                match inputs.len() {
                    $($count => record::<C, $count>(inputs, operation),)*
                    more => unreachable!("{more} inputs, but at most {MOST_INPUTS} are possible"),
                }
            };
        }
        with_count!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19)
    }
}

fn record<C: CheckpointStrategy, const N: usize>(
    inputs: Vec<FloatTensor<Autodiff<Flex, C>>>,
    operation: Arc<dyn Operation>,
) -> Vec<FloatTensor<Autodiff<Flex, C>>> {
    let guards: [_; N] = std::array::from_fn(|i| inputs[i].node());
    let inputs: Vec<Array> = inputs
        .into_iter()
        .map(|input| Array::dense(input.into_primitive()))
        .collect();
    let prepared = Recorded.prepare::<C>(guards).compute_bound().stateful();
    let saves = matches!(prepared, OpsKind::Tracked(_));
    let Forward {
        output,
        extras,
        saved,
    } = operation.forward(&inputs, saves);
    let output = match prepared {
        OpsKind::Tracked(prepared) => {
            let state = State {
                operation,
                inputs,
                saved,
            };
            prepared.finish(state, output.into_tensor())
        }
        OpsKind::UnTracked(prepared) => prepared.finish(output.into_tensor()),
    };
    let extras = extras
        .into_iter()
        .map(|extra| Autodiff::<Flex, C>::from_inner(extra.into_tensor()));
    std::iter::once(output).chain(extras).collect()
}

/// One input, whatever its number of axes.
pub struct Input(FloatTensor<Dispatch>);

impl<const D: usize> From<Tensor<D>> for Input {
    fn from(tensor: Tensor<D>) -> Self {
        Self(tensor.into_dispatch())
    }
}

/// Runs an operation: its output, and its extras, which all have one axis.
pub fn run<const D: usize>(
    operation: impl Operation + 'static,
    inputs: impl IntoIterator<Item = Input>,
) -> (Tensor<D>, Vec<Tensor<1>>) {
    let inputs: Vec<FloatTensor<Dispatch>> = inputs.into_iter().map(|input| input.0).collect();
    let count = inputs.len();
    let outputs = Dispatch::fused(Inputs::new(inputs), count, Arc::new(operation));
    let mut outputs = outputs.into_iter();
    let output = outputs.next().expect("there is always an output");
    (
        Tensor::from_dispatch(output),
        outputs.map(Tensor::from_dispatch).collect(),
    )
}
