//! Patch targets and the masked loss.

use burn::tensor::Tensor;

const EPSILON: f32 = 1e-6;

/// Cuts images into square patches, row by row: `[N, 3, H, W]` to `[N, (H/p)·(W/p), p·p·3]`, colours last.
pub fn patches(images: Tensor<4>, p: usize) -> Tensor<3> {
    let [n, colours, height, width] = images.dims();
    let (rows, columns) = (height / p, width / p);
    images
        .reshape([n, colours, rows, p, columns, p])
        .permute([0, 2, 4, 3, 5, 1])
        .reshape([n, rows * columns, p * p * colours])
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

/// Each patch minus its mean, over its deviation.
pub fn normalise_patches(patches: Tensor<3>) -> Tensor<3> {
    let (mean, deviation) = patch_statistics(&patches);
    (patches - mean) / deviation
}

/// Σ weight·(mean over the patch of squared differences) / Σ weight: `[N, T, P]`, `[N, T, P]`, `[N, T]` to `[1]`.
pub fn weighted_mean_squared_error(
    predicted: Tensor<3>,
    target: Tensor<3>,
    weights: Tensor<2>,
) -> Tensor<1> {
    let difference = predicted - target;
    // Reduced axis by axis: Burn's whole-tensor sum may split large tensors differently from run to run.
    let error = (difference.clone() * difference)
        .mean_dim(2)
        .squeeze_dim::<2>(2);
    (error * weights.clone()).sum_dim(1).sum() / weights.sum_dim(1).sum()
}
