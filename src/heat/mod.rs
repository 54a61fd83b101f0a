//! The paper: "Self-Supervised Learning based on Heat Equation" (arXiv 2211.13228).
//!
//! An encoder's feature map `z(x, y)` is taken to obey `z_x = A z` and `z_y = B z`. By finite differences,
//! `z(x + Δx, y) = (I + Δx A) z(x, y)` and `z(x, y + Δy) = (I + Δy B) z(x, y)`: the features of one visible quarter
//! of an image predict, linearly and position by position, those of the three masked quarters. A decoder turns the
//! four quarters into pixels, and the error on the masked ones trains everything.
//!
//! Two defaults are ours: the visible quarter's error counts too, and the decoder has no transformer block
//! ([`QbHeatConfig`]).

mod block;
mod decoder;
mod invariance;
mod objective;
mod propagator;
mod qb_heat;
mod quarter;

pub use block::{Corner, Nearest};
pub use decoder::{Decoder, DecoderConfig};
pub use invariance::{
    Derivative, Difference, Law, Moments, Quotient, RankPoint, Removed, Sums, eigenvalues,
    quotient, r2_by_rank,
};
pub use objective::{normalised_patches, patch_statistics, patches, unpatch};
pub use propagator::{Direction, Parametrisation, Propagator, matrix_exponential};
pub(crate) use qb_heat::{Arranged, see};
pub use qb_heat::{Place, QbHeat, QbHeatConfig, Reconstruction, Visible};
pub use quarter::{
    Quadrant, Quarters, all_show, assemble, sort_by_quadrant, visible_quarters, weights,
};
