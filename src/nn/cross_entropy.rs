//! Cross-entropy of class scores.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};

use super::total;

/// Cross-entropy of scores `[N, classes]` against labels of which the share `smoothing` is spread evenly over all
/// classes, averaged, `[1]`: PyTorch's `cross_entropy`.
pub fn cross_entropy(scores: Tensor<2>, labels: &[u32], smoothing: f64) -> Tensor<1> {
    let [rows, classes] = scores.dims();
    let labels: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
    let labels = Tensor::<2, Int>::from_data(TensorData::new(labels, [rows, 1]), &scores.device());
    let logs = log_softmax(scores, 1);
    let own = logs.clone().gather(1, labels).mean();
    if smoothing == 0.0 {
        return own.neg();
    }
    let all = total(logs) / (rows * classes) as f32;
    (own * (1.0 - smoothing) + all * smoothing).neg()
}
