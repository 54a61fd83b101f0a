//! Attention.

use burn::tensor::Tensor;

use super::cost::spend;

/// `softmax(q kᵀ / √(C/heads)) v` in each of `heads` contiguous groups of channels (Vaswani et al., arXiv 1706.03762).
///
/// `q`: `[N, L, C]`, `k` and `v`: `[N, S, C]`; the softmax is over S. The answer: `[N, L, C]`.
pub fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, heads: usize) -> Tensor<3> {
    attend_within(q, k, v, heads, Vec::new())
}

/// [`attend`] of rows to each other, S being L, where each sees those of its own segment only: `segments` has a number for
/// each row of each sample, `[N·L]`; empty where they see all.
pub fn attend_within(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    segments: Vec<u32>,
) -> Tensor<3> {
    let [n, l, c] = q.dims();
    spend(2 * n * l * k.dims()[1] * c);
    qbheat_kernels::attention_within(q, k, v, heads, segments)
}
