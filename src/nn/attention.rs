//! Attention.

use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

use super::cost::spend;

/// `softmax(q kᵀ / √(C/heads)) v` in each of `heads` contiguous groups of channels (Vaswani et al., arXiv 1706.03762).
///
/// `q`: `[N, L, C]`, `k` and `v`: `[N, S, C]`; the softmax is over S. The answer: `[N, L, C]`.
pub fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, heads: usize) -> Tensor<3> {
    let [n, l, c] = q.dims();
    let s = k.dims()[1];
    spend(2 * n * l * s * c);
    let split =
        |x: Tensor<3>, length: usize| x.reshape([n, length, heads, c / heads]).swap_dims(1, 2);
    let q = split(q, l) * ((c / heads) as f32).powf(-0.5);
    let scores = q.matmul(split(k, s).transpose());
    softmax(scores, 3)
        .matmul(split(v, s))
        .swap_dims(1, 2)
        .reshape([n, l, c])
}
