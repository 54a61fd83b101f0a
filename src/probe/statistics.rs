//! Whether features collapse.

use serde::Serialize;

use super::Features;

/// How many dimensions features use.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FeatureStatistics {
    /// exp of the entropy of the shares of variance along the eigenvectors of the channel covariance over positions:
    /// 1 where all features lie on a line, C where they fill all channels evenly.
    pub effective_rank: f64,
    /// Mean over channels of the deviation of pooled, length-normalised features, times √C: 0 where all images look
    /// alike, 1 where they are spread evenly over the sphere (Chen and He, arXiv 2011.10566).
    pub spread: f64,
}

/// Effective rank and spread of some features.
pub fn feature_statistics(features: &Features) -> FeatureStatistics {
    FeatureStatistics {
        effective_rank: effective_rank(&features.eigenvalues()),
        spread: spread(&features.pooled.values, features.pooled.columns),
    }
}

fn effective_rank(eigenvalues: &[f64]) -> f64 {
    let total: f64 = eigenvalues.iter().map(|e| e.max(0.0)).sum();
    let entropy: f64 = eigenvalues
        .iter()
        .map(|e| e.max(0.0) / total)
        .filter(|&share| share > 0.0)
        .map(|share| -share * share.ln())
        .sum();
    entropy.exp()
}

fn spread(values: &[f32], columns: usize) -> f64 {
    let rows: Vec<Vec<f64>> = values
        .chunks_exact(columns)
        .map(|row| {
            let row: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            let length = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
            row.iter().map(|v| v / length).collect()
        })
        .collect();
    let count = rows.len() as f64;
    let deviations = (0..columns).map(|column| {
        let mean = rows.iter().map(|row| row[column]).sum::<f64>() / count;
        let variance = rows
            .iter()
            .map(|row| (row[column] - mean).powi(2))
            .sum::<f64>()
            / count;
        variance.sqrt()
    });
    deviations.sum::<f64>() / columns as f64 * (columns as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_is_one_on_a_line_and_full_where_all_directions_are_alike() {
        assert!((effective_rank(&[3.0, 0.0, 0.0]) - 1.0).abs() < 1e-12);
        assert!((effective_rank(&[2.0; 5]) - 5.0).abs() < 1e-12);
    }

    #[test]
    fn spread_is_zero_where_all_are_alike_and_one_on_opposite_axes() {
        assert!(spread(&[1.0, 2.0, 2.0, 4.0], 2) < 1e-7);
        let axes = [1.0, 0.0, -1.0, 0.0, 0.0, 1.0, 0.0, -1.0];
        assert!((spread(&axes, 2) - 1.0).abs() < 1e-12);
    }
}
