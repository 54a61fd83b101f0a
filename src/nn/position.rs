//! Fixed position encodings.

use burn::tensor::{Device, Tensor, TensorData};

/// Sine and cosine position encodings of an `height`×`width` grid, `[1, height·width, channels]`.
///
/// The first half of the channels encodes the row, the second the column; in each half sines come before cosines,
/// at frequencies `10000^(-k/(channels/4))` (Vaswani et al., arXiv 1706.03762, in two dimensions as in MAE).
/// `channels` is a multiple of four.
pub fn sin_cos_2d(height: usize, width: usize, channels: usize, device: &Device) -> Tensor<3> {
    let quarter = channels / 4;
    let frequency = |k: usize| 10_000f64.powf(-(k as f64) / quarter as f64);
    let mut values = Vec::with_capacity(height * width * channels);
    for row in 0..height {
        for column in 0..width {
            for position in [row, column] {
                let angles = (0..quarter).map(|k| position as f64 * frequency(k));
                values.extend(angles.clone().map(|angle| angle.sin() as f32));
                values.extend(angles.map(|angle| angle.cos() as f32));
            }
        }
    }
    Tensor::from_data(
        TensorData::new(values, [1, height * width, channels]),
        device,
    )
}
