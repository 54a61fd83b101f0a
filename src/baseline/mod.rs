//! The rivals: pre-training methods with the same face as QB-Heat.

mod moco;
mod supervised;

pub use moco::{MoCo, MoCoConfig};
pub use supervised::{Supervised, SupervisedConfig};
