//! Initial weights from one stream of random numbers, drawn in the order in which layers are built.
//!
//! Burn's own initialisers draw from a generator of the whole process, and lazily; a run could then not be
//! repeated from its seed alone.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{LayerNorm, Linear};
use crate::random;

/// From which side a kernel's scale is reckoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fan {
    /// Uniform in ±1/√(inputs of an output): PyTorch's default.
    In,
    /// Normal of deviation √(2/(kernel²·outputs)): He et al., arXiv 1502.01852, as torchvision's light networks have
    /// it, depthwise kernels included.
    Out,
}

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

    /// A kernel `[outputs, inputs of each, height, width]`.
    pub fn kernel(&mut self, shape: [usize; 4], fan: Fan) -> Param<Tensor<4>> {
        let [outputs, inputs, height, width] = shape;
        match fan {
            Fan::In => self.fan_in(shape, inputs * height * width),
            Fan::Out => self.normal(shape, (2.0 / (height * width * outputs) as f32).sqrt()),
        }
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

    /// A linear layer, weights and bias uniform in ±1/√inputs: PyTorch's default.
    pub fn linear(&mut self, inputs: usize, outputs: usize) -> Linear {
        Linear {
            weight: self.fan_in([outputs, inputs], inputs),
            bias: self.fan_in([outputs], inputs),
        }
    }

    /// A linear layer with weights from a normal distribution and bias 0.
    pub fn normal_linear(&mut self, inputs: usize, outputs: usize, deviation: f32) -> Linear {
        Linear {
            weight: self.normal([outputs, inputs], deviation),
            bias: self.constant([outputs], 0.0),
        }
    }

    /// A layer norm of scale 1 and shift 0.
    pub fn layer_norm(&mut self, width: usize) -> LayerNorm {
        LayerNorm {
            weight: self.constant([width], 1.0),
            bias: self.constant([width], 0.0),
        }
    }

    fn param<const D: usize>(&self, shape: [usize; D], values: Vec<f32>) -> Param<Tensor<D>> {
        Param::from_tensor(Tensor::from_data(
            TensorData::new(values, shape),
            &self.device,
        ))
    }
}
