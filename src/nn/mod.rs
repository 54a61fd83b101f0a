//! Small layers that Burn lacks, or has with another meaning than PyTorch.

mod attention;
mod batch_norm;
mod convolution;
pub(crate) mod cost;
mod cross_entropy;
mod init;
mod linear;
mod moving_average;
mod parts;
mod position;
mod rows;
mod state;
mod sum;
mod transformer;

pub use attention::{attend, attend_within};
pub use batch_norm::{BatchNorm, RunningStatistics, use_batch_statistics};
pub use convolution::{ConvNorm, Convolution, Layer, chain};
pub use cost::multiply_adds;
pub use cross_entropy::cross_entropy;
pub use init::{Fan, Init};
pub use linear::{LayerNorm, Linear, perceptron};
pub use moving_average::{follow, teacher_of};
pub(crate) use parts::{side_by_side, sum_of_losses};
pub use position::sin_cos_2d;
pub use qbheat_kernels::Activation;
pub(crate) use rows::rows_at;
pub use state::{Named, StateDict, StateError};
pub(crate) use state::{Path, values};
pub(crate) use sum::total;
pub use transformer::TransformerBlock;
