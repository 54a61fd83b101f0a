//! Where tensors live: the processor, or a GPU where the program was built for one.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::OnceLock;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compute {
    /// The processor, by Burn's Flex back end and the fused operations of `qbheat-kernels`.
    #[default]
    Cpu,
    /// A GPU by Vulkan, Metal or DirectX; needs the Cargo feature `wgpu`.
    Wgpu,
    /// An NVIDIA GPU, by its number; needs the Cargo feature `cuda`.
    Cuda(usize),
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Wgpu => f.write_str("wgpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for Compute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().map(Self::Cuda);
        match text {
            "cpu" => Some(Self::Cpu),
            "wgpu" => Some(Self::Wgpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(number),
        }
        .ok_or_else(|| format!("`{text}` is no device; there are cpu, wgpu and cuda[:N]"))
    }
}

impl TryFrom<String> for Compute {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Compute> for String {
    fn from(compute: Compute) -> Self {
        compute.to_string()
    }
}

static CHOSEN: OnceLock<Device> = OnceLock::new();

/// The device that everything runs on: the one chosen with [`compute_on`], else the processor.
pub fn device() -> Device {
    CHOSEN.get_or_init(Device::flex).clone()
}

/// Chooses the device for the whole process, before anything has asked for it; an error where this program or this
/// machine has no such device.
pub fn compute_on(compute: Compute) -> Result<()> {
    let device = open(compute)?;
    if compute != Compute::Cpu {
        try_out(compute, &device)?;
    }
    if *CHOSEN.get_or_init(|| device.clone()) == device {
        Ok(())
    } else {
        Err(unusable(compute, "another device is in use already"))
    }
}

/// Burn and its drivers report a missing GPU by a panic, when it is first used.
fn try_out(compute: Compute, device: &Device) -> Result<()> {
    let sum = || Tensor::<1>::ones([2], device).sum().into_scalar::<f32>();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let answer = catch_unwind(AssertUnwindSafe(sum));
    std::panic::set_hook(hook);
    match answer {
        Ok(2.0) => Ok(()),
        Ok(_) => Err(unusable(compute, "it computes 1 + 1 wrongly")),
        Err(_) => Err(unusable(compute, "no driver or no such GPU was found")),
    }
}

fn open(compute: Compute) -> Result<Device> {
    match compute {
        Compute::Cpu => Ok(Device::flex()),
        #[cfg(feature = "wgpu")]
        Compute::Wgpu => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        Compute::Cuda(number) => Ok(Device::cuda(number)),
        #[allow(unreachable_patterns, reason = "depends on the features")]
        missing => Err(unusable(
            missing,
            "this program was built without it; take --device cpu, or build with `cargo build --release --features wgpu` or \
             `cuda`",
        )),
    }
}

fn unusable(compute: Compute, why: &str) -> Error {
    Error::Refused(format!("--device {compute}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for compute in [
            Compute::Cpu,
            Compute::Wgpu,
            Compute::Cuda(0),
            Compute::Cuda(3),
        ] {
            assert_eq!(compute.to_string().parse(), Ok(compute));
        }
        for wrong in ["gpu", "cuda:", "cuda:-1", "CPU", ""] {
            assert!(wrong.parse::<Compute>().is_err(), "{wrong}");
        }
    }
}
