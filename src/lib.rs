//! QB-Heat (arXiv 2211.13228): self-supervised pre-training of light vision networks.
//!
//! [`heat`] is the paper; [`pretrain`] runs it on a folder of images; [`probe`] says what the features are worth.
#![warn(missing_docs)]

pub mod baseline;
pub mod bench;
pub mod config;
pub mod data;
pub mod detect;
mod device;
pub mod encoder;
pub mod error;
#[cfg(test)]
mod fuzz;
pub mod heat;
pub mod invariance;
pub mod latent;
pub mod nn;
pub mod observe;
pub mod pretrain;
pub mod probe;
pub mod random;
pub mod report;
pub mod study;
pub mod train;
pub mod weights;

pub use device::{Compute, compute_on, device};
