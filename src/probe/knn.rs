//! k nearest neighbours.

use burn::tensor::Tensor;

use super::Scores;
use super::features::Matrix;

const NEIGHBOURS: usize = 20;
const TEMPERATURE: f32 = 0.07;
/// Rows of similarities computed at once.
const CHUNK: usize = 512;

/// For one image: numbers of the most similar others and their cosine similarity, most similar first.
pub type Neighbours = Vec<(usize, f32)>;

/// The vote of the 20 nearest training images by cosine similarity s, each with weight e^(s/0.07) (Wu et al.,
/// arXiv 1805.01978). `train` comes with its labels and the number of classes.
pub fn knn_scores(train: &Matrix, (labels, classes): (&[u32], usize), held_out: &Matrix) -> Scores {
    let mut values = vec![0.0; held_out.rows() * classes];
    for (scores, neighbours) in values
        .chunks_exact_mut(classes)
        .zip(nearest_neighbours(train, held_out, NEIGHBOURS))
    {
        for (index, similarity) in neighbours {
            scores[labels[index] as usize] += (similarity / TEMPERATURE).exp();
        }
    }
    Scores { values, classes }
}

/// For each row of `queries` the `k` rows of `candidates` with the highest cosine similarity; of equal ones the first.
pub fn nearest_neighbours(candidates: &Matrix, queries: &Matrix, k: usize) -> Vec<Neighbours> {
    let device = crate::device();
    let k = k.min(candidates.rows());
    let candidates = unit_rows(candidates.tensor(&device)).transpose();
    let all = unit_rows(queries.tensor(&device));
    let mut found = Vec::with_capacity(queries.rows());
    for start in (0..queries.rows()).step_by(CHUNK) {
        let end = (start + CHUNK).min(queries.rows());
        let similarities = all
            .clone()
            .slice_dim(0, start..end)
            .matmul(candidates.clone());
        let columns = similarities.dims()[1];
        for row in crate::nn::values(similarities).chunks_exact(columns) {
            let mut order: Vec<usize> = (0..columns).collect();
            let by_similarity = |a: &usize, b: &usize| row[*b].total_cmp(&row[*a]).then(a.cmp(b));
            if k < columns {
                order.select_nth_unstable_by(k, by_similarity);
                order.truncate(k);
            }
            order.sort_unstable_by(by_similarity);
            found.push(order.into_iter().map(|i| (i, row[i])).collect());
        }
    }
    found
}

fn unit_rows(rows: Tensor<2>) -> Tensor<2> {
    let lengths = (rows.clone() * rows.clone())
        .sum_dim(1)
        .sqrt()
        .clamp_min(1e-12);
    rows / lengths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, standard_normal, stream};

    fn random_matrix(rows: usize, columns: usize, seed: u64) -> Matrix {
        let mut random = stream(seed, Purpose::Sample, 0, 0);
        Matrix {
            values: (0..rows * columns)
                .map(|_| standard_normal(&mut random))
                .collect(),
            columns,
        }
    }

    #[test]
    fn votes_equal_those_of_a_brute_force_search_in_double_precision() {
        let (train, held_out) = (random_matrix(700, 6, 1), random_matrix(600, 6, 2));
        let labels: Vec<u32> = (0..700).map(|i| i % 5).collect();
        let scores = knn_scores(&train, (&labels, 5), &held_out);
        let cosine = |a: &[f32], b: &[f32]| {
            let dot = |x: &[f32], y: &[f32]| -> f64 {
                x.iter()
                    .zip(y)
                    .map(|(x, y)| f64::from(*x) * f64::from(*y))
                    .sum()
            };
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        for query in 0..600 {
            let mut all: Vec<(f64, u32)> = (0..700)
                .map(|i| (cosine(train.row(i), held_out.row(query)), labels[i]))
                .collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut expected = [0f64; 5];
            for (similarity, label) in &all[..20] {
                expected[*label as usize] += (similarity / 0.07).exp();
            }
            for (class, expected) in expected.iter().enumerate() {
                let found = f64::from(scores.values[query * 5 + class]);
                assert!(
                    (found - expected).abs() <= 1e-3 * expected.max(1.0),
                    "{found} {expected}"
                );
            }
        }
    }
}
