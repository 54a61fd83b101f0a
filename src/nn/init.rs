//! Initial weights from one stream of random numbers, drawn in the order in which layers are built.
//!
//! Burn's own initialisers draw from a generator of the whole process, and lazily; a run could then not be
//! repeated from its seed alone.

use burn::module::Param;
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::random;

/// Where new layers get their weights and their device from.
pub struct Init {
    random: ChaCha8Rng,
    device: Device,
}

impl Init {
    /// Weights that depend on `seed` and on the order of the calls only.
    pub fn new(seed: u64, device: &Device) -> Self {
        Self {
            random: random::stream(seed, random::Purpose::Weights, 0, 0),
            device: device.clone(),
        }
    }

    /// The device that new weights live on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Uniform in ±1/√`fan_in`: PyTorch's default for convolutions and linear layers.
    pub fn fan_in<const D: usize>(&mut self, shape: [usize; D], fan_in: usize) -> Param<Tensor<D>> {
        let bound = 1.0 / (fan_in as f32).sqrt();
        let values = (0..shape.iter().product())
            .map(|_| self.random.random_range(-bound..bound))
            .collect();
        self.param(shape, values)
    }

    /// Normal with mean 0.
    pub fn normal<const D: usize>(
        &mut self,
        shape: [usize; D],
        deviation: f32,
    ) -> Param<Tensor<D>> {
        let values = (0..shape.iter().product())
            .map(|_| deviation * random::standard_normal(&mut self.random))
            .collect();
        self.param(shape, values)
    }

    /// One value everywhere.
    pub fn constant<const D: usize>(&mut self, shape: [usize; D], value: f32) -> Param<Tensor<D>> {
        self.param(shape, vec![value; shape.iter().product()])
    }

    /// A linear layer with bias; Burn stores its weight as `[inputs, outputs]`.
    pub fn linear(&mut self, inputs: usize, outputs: usize) -> Linear {
        Linear {
            weight: self.fan_in([inputs, outputs], inputs),
            bias: Some(self.fan_in([outputs], inputs)),
        }
    }

    /// A layer norm over the last axis, epsilon 1e-5 as in PyTorch.
    pub fn layer_norm(&mut self, width: usize) -> LayerNorm {
        LayerNormConfig::new(width).init(&self.device)
    }

    fn param<const D: usize>(&self, shape: [usize; D], values: Vec<f32>) -> Param<Tensor<D>> {
        Param::from_tensor(Tensor::from_data(
            TensorData::new(values, shape),
            &self.device,
        ))
    }
}
