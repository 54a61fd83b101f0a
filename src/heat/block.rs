//! A visible block anywhere: every other position is predicted from the visible one nearest to it.
//!
//! The paper shows a corner and steps from block to block (see [`super::quarter`]). Here a block of the same size lies
//! anywhere on the grid of patches, and each step goes over the true distance, so that the geometry can be studied.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Where a visible block starts, in positions of the feature map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corner {
    /// From the top.
    pub row: usize,
    /// From the left.
    pub column: usize,
}

/// For each position of a whole map the visible one nearest to it, and how far it is.
pub struct Nearest {
    /// Number of that position within the block, row by row, `[N, T]`.
    positions: Tensor<2, Int>,
    /// Distance from it to the right, in positions, negative to the left, `[N, T, 1]`.
    pub right: Tensor<3>,
    /// Distance from it downwards, `[N, T, 1]`.
    pub down: Tensor<3>,
}

impl Nearest {
    /// For one block of `[h, w]` positions an image, on maps of twice as many rows and columns.
    pub fn new(corners: &[Corner], [h, w]: [usize; 2], device: &Device) -> Self {
        let positions = 4 * h * w;
        let mut nearest = Vec::with_capacity(corners.len() * positions);
        let (mut right, mut down) = (Vec::new(), Vec::new());
        for corner in corners {
            for y in 0..2 * h {
                for x in 0..2 * w {
                    let row = y.clamp(corner.row, corner.row + h - 1);
                    let column = x.clamp(corner.column, corner.column + w - 1);
                    nearest.push(((row - corner.row) * w + column - corner.column) as i32);
                    right.push(x as f32 - column as f32);
                    down.push(y as f32 - row as f32);
                }
            }
        }
        let n = corners.len();
        let distances = |values: Vec<f32>| {
            Tensor::from_data(TensorData::new(values, [n, positions, 1]), device)
        };
        Self {
            positions: Tensor::from_data(TensorData::new(nearest, [n, positions]), device),
            right: distances(right),
            down: distances(down),
        }
    }

    /// The features of each position's nearest visible one: `[N, h·w, C]` to `[N, 4·h·w, C]`.
    pub fn gather(&self, z: Tensor<3>) -> Tensor<3> {
        let channels = z.dims()[2];
        let positions = self.positions.clone().unsqueeze_dim::<3>(2);
        z.gather(1, positions.repeat_dim(2, channels))
    }
}
