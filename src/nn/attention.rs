//! Attention.

use burn::tensor::Tensor;

use super::cost::spend;

/// `softmax(q kᵀ / √(C/heads)) v` in each of `heads` contiguous groups of channels (Vaswani et al., arXiv 1706.03762).
///
/// `q`: `[N, L, C]`, `k` and `v`: `[N, S, C]`; the softmax is over S. The answer: `[N, L, C]`.
pub fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, heads: usize) -> Tensor<3> {
    let [n, l, c] = q.dims();
    spend(2 * n * l * k.dims()[1] * c);
    qbheat_kernels::attention(q, k, v, heads)
}

/// [`attend`] of a sequence to itself, with its q, k and v side by side: `[N, T, 3·C]` to `[N, T, C]`.
pub fn attend_to_itself(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    let [n, t, c] = qkv.dims();
    spend(2 * n * t * t * (c / 3));
    qbheat_kernels::self_attention(qkv, heads)
}
