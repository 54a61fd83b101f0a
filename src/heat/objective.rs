//! Patch targets and the masked loss.

use burn::tensor::Tensor;

const EPSILON: f32 = 1e-6;

/// Cuts images into square patches, row by row: `[N, 3, H, W]` to `[N, (H/p)·(W/p), p·p·3]`, colours last. No gradient
/// flows back to the images.
pub fn patches(images: Tensor<4>, p: usize) -> Tensor<3> {
    qbheat_kernels::patches(images, p, None)
}

/// [`patches`], each minus its mean and over its deviation, as [`patch_statistics`] has them.
pub fn normalised_patches(images: Tensor<4>, p: usize) -> Tensor<3> {
    qbheat_kernels::patches(images, p, Some(EPSILON))
}

/// The inverse of [`patches`] for images of `[rows, columns]` patches.
pub fn unpatch(patches: Tensor<3>, p: usize, [rows, columns]: [usize; 2]) -> Tensor<4> {
    let [n, _, values] = patches.dims();
    let colours = values / (p * p);
    patches
        .reshape([n, rows, columns, p, p, colours])
        .permute([0, 5, 1, 3, 2, 4])
        .reshape([n, colours, rows * p, columns * p])
}

/// Mean and deviation of each patch, `[N, T, 1]` each: the deviation is √(unbiased variance + 1e-6), as in MAE
/// (arXiv 2111.06377).
pub fn patch_statistics(patches: &Tensor<3>) -> (Tensor<3>, Tensor<3>) {
    let values = patches.dims()[2];
    let mean = patches.clone().mean_dim(2);
    let centred = patches.clone() - mean.clone();
    let variance = (centred.clone() * centred).sum_dim(2) / (values - 1) as f32;
    (mean, (variance + EPSILON).sqrt())
}
