use burn::tensor::{Int, Tensor, TensorData};

/// The rows of a tensor, along its first dimension, with these numbers and in this order.
pub(crate) fn rows_at<const D: usize>(tensor: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let numbers: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let numbers = TensorData::new(numbers, [rows.len()]);
    let numbers = Tensor::<1, Int>::from_data(numbers, &tensor.device());
    tensor.select(0, numbers)
}
