//! AdamW with PyTorch's semantics.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use qbheat_kernels::AdamWStep;

use super::OptimConfig;
use crate::nn::{Named, Path, StateDict, StateError, values};

const EPSILON: f32 = 1e-8;

/// AdamW's constants.
#[derive(Clone, Copy, Debug)]
pub struct AdamWConfig {
    /// Decay rates of the two moving averages.
    pub betas: [f64; 2],
    /// Decoupled weight decay, on parameters of two axes and more that are no tokens.
    pub weight_decay: f64,
    /// Clipping by the norm over all parameters together; 0 turns it off.
    pub clip_norm: f64,
    /// Learning rate of the parameters below `encoder` relative to that of the others.
    pub encoder_rate: f64,
}

impl From<&OptimConfig> for AdamWConfig {
    fn from(config: &OptimConfig) -> Self {
        Self {
            betas: config.betas,
            weight_decay: config.weight_decay,
            clip_norm: config.clip_norm,
            encoder_rate: 1.0,
        }
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping by the global norm; epsilon 1e-8.
///
/// Not Burn's optimiser, because that one clips tensor by tensor and knows one weight decay for all parameters.
#[derive(Clone)]
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    moments: BTreeMap<String, Moments>,
}

/// Moving averages of gradient and squared gradient, flat.
#[derive(Clone)]
struct Moments {
    first: Tensor<1>,
    second: Tensor<1>,
}

/// What the parameters of an encoder are called that is a part of a network.
const ENCODER: &str = "encoder.";
const FIRST: &str = "first_moment.";
const SECOND: &str = "second_moment.";

impl AdamW {
    /// Before the first step.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            steps: 0,
            moments: BTreeMap::new(),
        }
    }

    /// The Euclidean norm of each parameter's gradient, by the parameter's path.
    pub fn gradient_norms(model: &impl Module, gradients: &Gradients) -> Vec<(String, f64)> {
        let mut norms = Norms {
            path: Path::default(),
            gradients,
            found: Vec::new(),
        };
        model.visit(&mut norms);
        norms.found
    }

    /// The Euclidean norm of all gradients together.
    pub fn gradient_norm(model: &impl Module, gradients: &Gradients) -> f64 {
        let squares = Self::gradient_norms(model, gradients)
            .into_iter()
            .map(|(_, norm)| norm * norm);
        squares.sum::<f64>().sqrt()
    }

    /// Counts a step without an update.
    pub fn skip_step(&mut self) {
        self.steps += 1;
    }

    /// One update of every parameter that has a gradient. `gradient_norm` is [`Self::gradient_norm`].
    pub fn step<M: Module>(
        &mut self,
        model: M,
        gradients: Gradients,
        gradient_norm: f64,
        learning_rate: f64,
    ) -> M {
        self.steps += 1;
        let clip = self.config.clip_norm;
        // The 1e-6 is PyTorch's, in clip_grad_norm_.
        let scale = if clip > 0.0 {
            (clip / (gradient_norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        model.map(&mut Update {
            path: Path::default(),
            optimizer: self,
            gradients,
            scale: scale as f32,
            learning_rate,
        })
    }

    /// The moving averages by parameter path.
    pub fn state(&self) -> StateDict {
        let named = |tensor: &Tensor<1>| Named {
            shape: tensor.dims().to_vec(),
            values: values(tensor.clone()),
        };
        let entries = self.moments.iter().flat_map(|(name, moments)| {
            [
                (format!("{FIRST}{name}"), named(&moments.first)),
                (format!("{SECOND}{name}"), named(&moments.second)),
            ]
        });
        StateDict(entries.collect())
    }

    /// As it was after `steps` steps.
    pub fn restore(
        config: AdamWConfig,
        steps: u64,
        state: &StateDict,
        device: &Device,
    ) -> Result<Self, StateError> {
        let tensor = |named: &Named| {
            Tensor::from_data(
                TensorData::new(named.values.clone(), [named.values.len()]),
                device,
            )
        };
        let seconds = state.under(SECOND);
        let moments = state.under(FIRST).0.into_iter().map(|(name, first)| {
            let second = seconds
                .0
                .get(&name)
                .ok_or_else(|| StateError::Missing(format!("{SECOND}{name}")))?;
            let moments = Moments {
                first: tensor(&first),
                second: tensor(second),
            };
            Ok((name, moments))
        });
        Ok(Self {
            config,
            steps,
            moments: moments.collect::<Result<_, StateError>>()?,
        })
    }

    fn update(
        &mut self,
        name: String,
        weights: Tensor<1>,
        (gradient, gradient_scale): (Tensor<1>, f32),
        decay: bool,
        learning_rate: f64,
    ) -> Tensor<1> {
        let [beta1, beta2] = self.config.betas;
        let correction1 = 1.0 - beta1.powf(self.steps as f64);
        let correction2 = 1.0 - beta2.powf(self.steps as f64);
        let previous = self.moments.remove(&name).unwrap_or_else(|| Moments {
            first: weights.zeros_like(),
            second: weights.zeros_like(),
        });
        let keep = if decay {
            1.0 - learning_rate * self.config.weight_decay
        } else {
            1.0
        };
        let step = AdamWStep {
            gradient_scale,
            betas: [beta1 as f32, beta2 as f32],
            keep: keep as f32,
            rate: (learning_rate / correction1) as f32,
            correction: correction2 as f32,
            epsilon: EPSILON,
        };
        let (weights, [first, second]) =
            qbheat_kernels::adamw(step, weights, gradient, [previous.first, previous.second]);
        self.moments.insert(name, Moments { first, second });
        weights
    }
}

/// Matrices and kernels decay; norms and biases (one axis) and learned tokens do not.
fn decays(name: &str, axes: usize) -> bool {
    axes > 1
        && !name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.contains("token"))
}

struct Norms<'a> {
    path: Path,
    gradients: &'a Gradients,
    found: Vec<(String, f64)>,
}

impl ModuleVisitor for Norms<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            let norm = qbheat_kernels::squared_norm(gradient).sqrt();
            self.found.push((self.path.name(), norm));
        }
    }
}

struct Update<'a> {
    path: Path,
    optimizer: &'a mut AdamW,
    gradients: Gradients,
    scale: f32,
    learning_rate: f64,
}

impl ModuleMapper for Update<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = param.val().grad_remove(&mut self.gradients) else {
            return param;
        };
        let name = self.path.name();
        let decay = decays(&name, D);
        let learning_rate = match name.starts_with(ENCODER) {
            true => self.learning_rate * self.optimizer.config.encoder_rate,
            false => self.learning_rate,
        };
        param.map(|old| {
            let shape = old.dims();
            let new = self.optimizer.update(
                name,
                old.inner().reshape([-1]),
                (gradient.reshape([-1]), self.scale),
                decay,
                learning_rate,
            );
            Tensor::from_inner(new.reshape(shape)).require_grad()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::decays;

    #[test]
    fn norms_biases_and_tokens_do_not_decay() {
        assert!(decays("encoder.blocks.0.expand.weight", 4));
        assert!(!decays("encoder.blocks.0.expand_norm.weight", 1));
        assert!(!decays("decoder.pixels.bias", 1));
        assert!(!decays("encoder.tokens", 3));
    }
}
