//! Batch normalisation with PyTorch's semantics.

use std::collections::BTreeMap;

use burn::module::{Flag, Module, ModuleMapper, Param, RunningState};
use burn::tensor::Tensor;

use super::Init;
use super::state::{is_statistic, tensors, with_tensors};

pub(super) const EPSILON: f32 = 1e-5;
const MOMENTUM: f32 = 0.1;

/// Scale, shift and statistics of a batch normalisation over channels (Ioffe and Szegedy, arXiv 1502.03167), which
/// [`super::chain`] applies.
///
/// Differs from Burn's layer on purpose: the running variance is the unbiased one, as in PyTorch, and the mode
/// follows the module's training flag alone ([`Module::valid`] turns it off), not whether gradients are recorded.
#[derive(Module, Debug)]
pub struct BatchNorm {
    /// Scale, `[C]`.
    pub weight: Param<Tensor<1>>,
    /// Shift, `[C]`.
    pub bias: Param<Tensor<1>>,
    /// Moving average of the batch means, `[C]`.
    pub running_mean: RunningState<Tensor<1>>,
    /// Moving average of the unbiased batch variances, `[C]`.
    pub running_var: RunningState<Tensor<1>>,
    training: Param<Flag>,
}

impl BatchNorm {
    /// Scale 1, shift 0, running mean 0 and variance 1.
    pub fn new(channels: usize, init: &mut Init) -> Self {
        Self {
            weight: init.constant([channels], 1.0),
            bias: init.constant([channels], 0.0),
            running_mean: RunningState::new(Tensor::zeros([channels], init.device())),
            running_var: RunningState::new(Tensor::ones([channels], init.device())),
            training: Param::from_bool(true),
        }
    }

    /// Mean and variance to normalise by, where they are not the batch's own.
    pub(super) fn fixed(&self) -> Option<[Tensor<1>; 2]> {
        let running = [&self.running_mean, &self.running_var];
        (!self.training.is_enabled()).then(|| running.map(RunningState::value))
    }

    /// Moves the running statistics towards a batch's mean and biased variance, `[C]` each, of `samples` samples.
    pub(super) fn update(&self, mean: Tensor<1>, variance: Tensor<1>, samples: usize) {
        let unbiased = samples as f32 / (samples.max(2) - 1) as f32;
        for (state, batch) in [
            (&self.running_mean, mean),
            (&self.running_var, variance * unbiased),
        ] {
            state.update(state.value() * (1.0 - MOMENTUM) + batch.detach() * MOMENTUM);
            // Without this the new value would show one update late, in checkpoints too.
            state.value_sync();
        }
    }
}

/// `module` with all its batch normalisations using the statistics of each batch, and updating the running ones, or
/// using the running ones only; whether gradients are recorded does not matter to it.
pub fn use_batch_statistics<M: Module>(module: M, used: bool) -> M {
    struct Mode(bool);
    impl ModuleMapper for Mode {
        fn map_flag(&mut self, _flag: Param<Flag>) -> Param<Flag> {
            Param::from_bool(self.0)
        }
    }
    module.map(&mut Mode(used))
}

/// The running statistics of all batch normalisations in a module, as they were.
pub struct RunningStatistics(BTreeMap<String, Tensor<1>>);

impl RunningStatistics {
    /// Those of `module` now; nothing is copied.
    pub fn of(module: &impl Module) -> Self {
        let mut found = tensors(module);
        found.retain(|path, _| is_statistic(path));
        Self(found)
    }

    /// Puts them back into the module they came from.
    pub fn restore<M: Module>(mut self, module: M) -> M {
        with_tensors(module, |path, _| self.0.remove(path))
    }
}
