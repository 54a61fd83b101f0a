//! Features of whole images, computed once.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use nalgebra::{DMatrix, SymmetricEigen};
use rayon::prelude::*;

use super::{Part, ProbeConfig};
use crate::data::{BadImage, Dataset, ImageSize, normalise, whole_view};
use crate::encoder::Encoder;
use crate::error::Result;
use crate::observe::Observer;

const BATCH: usize = 128;
/// Directions with less variance than this share of the largest are not blown up.
const WHITENING_FLOOR: f64 = 1e-4;

/// Features of some images.
pub struct Features<'a> {
    /// Means over positions, `[N, C]`.
    pub pooled: Matrix,
    /// Rows and columns of the map.
    pub grid: [usize; 2],
    maps: Maps<'a>,
    moments: Moments,
}

/// Feature maps, `[N, T, C]`.
enum Maps<'a> {
    Kept(Vec<f32>),
    Recomputed {
        encoder: Box<Encoder>,
        dataset: &'a Dataset,
        indices: Vec<usize>,
        image_size: ImageSize,
        layers_before_end: usize,
    },
}

/// Rows of numbers on the host.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Row by row.
    pub values: Vec<f32>,
    /// Length of a row.
    pub columns: usize,
}

impl Matrix {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// Some of its rows, in this order.
    pub fn rows_at(&self, places: &[usize]) -> Self {
        Self {
            values: places.iter().flat_map(|&p| self.row(p).to_vec()).collect(),
            columns: self.columns,
        }
    }

    /// As a tensor, `[rows, columns]`.
    pub fn tensor(&self, device: &Device) -> Tensor<2> {
        let shape = [self.rows(), self.columns];
        Tensor::from_data(TensorData::new(self.values.clone(), shape), device)
    }

    pub(super) fn of(tensor: Tensor<2>) -> Self {
        Self {
            columns: tensor.dims()[1],
            values: crate::nn::values(tensor),
        }
    }
}

/// Running sums over positions, shifted by the first batch's mean so that their difference keeps its digits.
pub(crate) struct Moments {
    shift: Vec<f32>,
    count: f64,
    sum: Vec<f64>,
    products: Vec<f64>,
}

/// Computes the features of `part`: the encoder in evaluation mode, on whole images. Maps are kept where they fit into
/// `config.memory_mib`, else computed again whenever they are needed. The observer is told of images that cannot be read
/// any more and that others stand in for.
pub fn extract<'a>(
    encoder: &Encoder,
    part: &Part<'a>,
    config: &ProbeConfig,
    keep_maps: bool,
    observer: &dyn Observer,
) -> Result<Features<'a>> {
    let encoder = encoder.valid();
    let mut pooled = Vec::new();
    let mut kept = keep_maps.then(Vec::new);
    let mut moments: Option<Moments> = None;
    let (mut channels, mut grid) = (0, [0; 2]);
    observer.begin("computing features", part.indices.len() as u64);
    for (batch, indices) in part.indices.chunks(BATCH).enumerate() {
        let (images, passed_over) = readable_images(part.dataset, indices, config.image_size)?;
        for BadImage { name, reason } in passed_over {
            observer.note(&format!(
                "cannot be read, another image is counted in its place: {name}: {reason}"
            ));
        }
        let map = encoder.layer(images, config.layers_before_end)?;
        let [n, c, h, w] = map.dims();
        (channels, grid) = (c, [h, w]);
        if (part.indices.len() * c * h * w * 4) as u64 > config.memory_mib << 20 {
            kept = None;
        }
        let map = map.reshape([n, c, h * w]);
        pooled.extend(crate::nn::values(map.clone().mean_dim(2)));
        let positions = map.swap_dims(1, 2).reshape([n * h * w, c]);
        moments
            .get_or_insert_with(|| Moments::shifted_by_mean_of(&positions))
            .add(positions.clone());
        if let Some(kept) = &mut kept {
            kept.extend(crate::nn::values(positions));
        }
        observer.progress((batch * BATCH + n) as u64, "");
    }
    observer.end();
    let maps = match kept {
        Some(kept) => Maps::Kept(kept),
        None => Maps::Recomputed {
            encoder: Box::new(encoder),
            dataset: part.dataset,
            indices: part.indices.clone(),
            image_size: config.image_size,
            layers_before_end: config.layers_before_end,
        },
    };
    Ok(Features {
        pooled: Matrix {
            values: pooled,
            columns: channels,
        },
        grid,
        maps,
        moments: moments.expect("there is at least one image"),
    })
}

/// Whole images by number, normalised: `[N, channels, height, width]`.
pub fn whole_images(dataset: &Dataset, indices: &[usize], size: ImageSize) -> Result<Tensor<4>> {
    Ok(readable_images(dataset, indices, size)?.0)
}

/// As [`whole_images`], with the images that others stand in for.
fn readable_images(
    dataset: &Dataset,
    indices: &[usize],
    size: ImageSize,
) -> Result<(Tensor<4>, Vec<BadImage>)> {
    let read = |&index: &usize| {
        let (picture, passed_over) = dataset.images.picture(index)?;
        Ok((whole_view(&picture, size), passed_over))
    };
    let read: Vec<(Vec<u8>, Vec<BadImage>)> =
        indices.par_iter().map(read).collect::<Result<_>>()?;
    let (views, passed_over): (Vec<_>, Vec<_>) = read.into_iter().unzip();
    let mut pixels = Vec::with_capacity(views.iter().map(Vec::len).sum());
    for view in &views {
        normalise(view, size, &mut pixels);
    }
    let channels = pixels.len() / (indices.len() * size.pixels());
    let images = Tensor::from_data(
        TensorData::new(pixels, [indices.len(), channels, size.height, size.width]),
        &crate::device(),
    );
    Ok((images, passed_over.concat()))
}

impl Features<'_> {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.pooled.rows()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps of some images, `[N, T, C]`.
    pub fn maps(&self, places: &[usize]) -> Result<Tensor<3>> {
        let c = self.pooled.columns;
        let t = self.grid[0] * self.grid[1];
        match &self.maps {
            Maps::Kept(values) => {
                let mut chosen = Vec::with_capacity(places.len() * t * c);
                for &place in places {
                    chosen.extend_from_slice(&values[place * t * c..(place + 1) * t * c]);
                }
                let data = TensorData::new(chosen, [places.len(), t, c]);
                Ok(Tensor::from_data(data, &crate::device()))
            }
            Maps::Recomputed {
                encoder,
                dataset,
                indices,
                image_size,
                layers_before_end,
            } => {
                let indices: Vec<usize> = places.iter().map(|&place| indices[place]).collect();
                let images = whole_images(dataset, &indices, *image_size)?;
                let map = encoder.layer(images, *layers_before_end)?;
                Ok(map.reshape([places.len(), c, t]).swap_dims(1, 2))
            }
        }
    }

    /// The whitening that these features ask for.
    pub fn whitening(&self) -> Whitening {
        self.moments.whitening()
    }

    /// Eigenvalues of the channel covariance over positions.
    pub fn eigenvalues(&self) -> Vec<f64> {
        let (_, covariance) = self.moments.mean_and_covariance();
        covariance.symmetric_eigenvalues().as_slice().to_vec()
    }

    /// Mean over positions and the directions of largest variance, `[C]` each, largest first.
    pub fn principal_directions(&self, count: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
        let (mean, covariance) = self.moments.mean_and_covariance();
        let eigen = SymmetricEigen::new(covariance);
        let mut order: Vec<usize> = (0..eigen.eigenvalues.len()).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
        let directions = order
            .iter()
            .take(count)
            .map(|&i| eigen.eigenvectors.column(i).iter().copied().collect())
            .collect();
        (mean, directions)
    }
}

/// Subtracts the mean and multiplies by V/√(e + 1e-4·e_max), V and e being eigenvectors and eigenvalues of the channel
/// covariance over the positions of the training images.
pub struct Whitening {
    mean: Vec<f32>,
    matrix: Vec<f32>,
}

impl Whitening {
    /// Whitens rows of features, `[…, C]` flattened to `[R, C]`.
    pub fn apply(&self, rows: Tensor<2>) -> Tensor<2> {
        let [mean, matrix] = self.tensors(&rows.device());
        (rows - mean).matmul(matrix)
    }

    /// What is subtracted from rows of features, `[1, C]`, and what they are multiplied by then, `[C, C]`.
    pub fn tensors(&self, device: &Device) -> [Tensor<2>; 2] {
        let c = self.mean.len();
        [(&self.mean, 1), (&self.matrix, c)].map(|(values, rows)| {
            Tensor::from_data(TensorData::new(values.clone(), [rows, c]), device)
        })
    }

    /// Whitens pooled features (both are linear, so the order does not matter).
    pub fn apply_pooled(&self, features: &Features) -> Matrix {
        Matrix::of(self.apply(features.pooled.tensor(&crate::device())))
    }
}

impl Moments {
    /// None yet; sums will be taken of differences to the mean of these rows, which keeps digits.
    pub fn shifted_by_mean_of(positions: &Tensor<2>) -> Self {
        let shift = crate::nn::values(positions.clone().mean_dim(0));
        let c = shift.len();
        Self {
            shift,
            count: 0.0,
            sum: vec![0.0; c],
            products: vec![0.0; c * c],
        }
    }

    /// Adds rows of features, `[R, C]`.
    pub fn add(&mut self, positions: Tensor<2>) {
        let [count, c] = positions.dims();
        let shift = TensorData::new(self.shift.clone(), [1, c]);
        let shifted = positions.clone() - Tensor::from_data(shift, &positions.device());
        let products = shifted.clone().transpose().matmul(shifted.clone());
        let accumulate = |total: &mut [f64], part: Vec<f32>| {
            for (total, part) in total.iter_mut().zip(part) {
                *total += f64::from(part);
            }
        };
        accumulate(&mut self.sum, crate::nn::values(shifted.sum_dim(0)));
        accumulate(&mut self.products, crate::nn::values(products));
        self.count += count as f64;
    }

    /// The whitening that such features ask for.
    pub fn whitening(&self) -> Whitening {
        let (mean, covariance) = self.mean_and_covariance();
        let eigen = SymmetricEigen::new(covariance);
        let largest = eigen.eigenvalues.max().max(f64::MIN_POSITIVE);
        let mut matrix = eigen.eigenvectors;
        for (mut column, &eigenvalue) in matrix.column_iter_mut().zip(eigen.eigenvalues.iter()) {
            column /= (eigenvalue.max(0.0) + WHITENING_FLOOR * largest).sqrt();
        }
        Whitening {
            mean: mean.iter().map(|&v| v as f32).collect(),
            // Column-major storage of the transpose is row-major storage of the matrix.
            matrix: matrix
                .transpose()
                .as_slice()
                .iter()
                .map(|&v| v as f32)
                .collect(),
        }
    }

    fn mean_and_covariance(&self) -> (Vec<f64>, DMatrix<f64>) {
        let c = self.shift.len();
        let offset: Vec<f64> = self.sum.iter().map(|sum| sum / self.count).collect();
        let mean = offset
            .iter()
            .zip(&self.shift)
            .map(|(offset, &shift)| offset + f64::from(shift))
            .collect();
        let covariance = DMatrix::from_fn(c, c, |i, j| {
            self.products[i * c + j] / self.count - offset[i] * offset[j]
        });
        (mean, covariance)
    }
}
