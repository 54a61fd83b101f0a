//! Sums that come out the same each time.

use burn::tensor::Tensor;

/// The sum of all entries, `[1]`, axis by axis: Burn's sum over a whole tensor of 4 Mi entries and more is cut as threads
/// happen to be free, and its last digits change from run to run.
pub(crate) fn total(x: Tensor<2>) -> Tensor<1> {
    x.sum_dim(1).sum_dim(0).reshape([1])
}
