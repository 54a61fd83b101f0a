//! Small layers that Burn lacks, or has with another meaning than PyTorch.

mod batch_norm;
mod convolution;
mod init;
mod position;
mod state;
mod transformer;

pub use batch_norm::BatchNorm;
pub use convolution::{Pointwise, convolution};
pub use init::Init;
pub use position::sin_cos_2d;
pub use state::{Named, StateDict, StateError};
pub(crate) use state::{Path, values};
pub use transformer::TransformerBlock;
