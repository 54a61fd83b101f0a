//! Which query answers for which box: DETR's bipartite matching (Carion et al., arXiv 2005.12872).

use hotcoco::primitives::assign::lsap;

use super::boxes::overlap;
use super::loss::{ALPHA, LossConfig};
use super::view::ViewBox;

/// A query and the box that it answers for, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Row of the predictions.
    pub query: usize,
    /// Place in the list of what is to be found.
    pub object: usize,
}

/// A cost that is infinite or NaN, as where a prediction is.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("giving box {} to query {} costs {cost}", pair.object, pair.query)]
pub struct NotFinite {
    /// What it is the cost of.
    pub pair: Pair,
    /// Not a finite number.
    pub cost: f64,
}

/// The pairs that cost least together, sorted by query: no query and no object comes up twice, and there are as many
/// pairs as there are of the fewer. Predictions of one image: `logits`, Q rows of a number a class, and `boxes`, Q rows
/// of four.
///
/// A pair costs `class`·(the focal loss of saying that class, less that of denying it) + `l1`·Σ|difference of the boxes| −
/// `giou`·(their generalised IoU), with the weights of the loss (Zhu et al., arXiv 2010.04159).
pub fn assign(
    logits: &[f32],
    boxes: &[f32],
    objects: &[ViewBox],
    weights: &LossConfig,
) -> Result<Vec<Pair>, NotFinite> {
    let boxes = boxes.as_chunks::<4>().0;
    let classes = logits.len() / boxes.len().max(1);
    let truths: Vec<[f64; 4]> = objects
        .iter()
        .map(|object| object.bbox.map(f64::from))
        .collect();
    let mut costs = Vec::with_capacity(boxes.len() * objects.len());
    for (bbox, logits) in boxes.iter().zip(logits.chunks_exact(classes.max(1))) {
        let bbox = bbox.map(f64::from);
        let of_class: Vec<f64> = logits.iter().map(|&logit| class_cost(logit)).collect();
        costs.extend(objects.iter().zip(&truths).map(|(object, &truth)| {
            let l1: f64 = bbox.iter().zip(truth).map(|(a, b)| (a - b).abs()).sum();
            weights.class * of_class[object.class] + weights.l1 * l1
                - weights.giou * overlap(bbox, truth).generalised
        }));
    }
    cheapest(&costs, objects.len())
}

/// What saying "yes" costs more than saying "no": α(1 − p)²(−log p) − (1 − α)p²(−log(1 − p)).
fn class_cost(logit: f32) -> f64 {
    let logit = f64::from(logit);
    // −log σ(x), also where σ(x) is 0 in floating point.
    let surprise = |x: f64| (-x).max(0.0) + (-x.abs()).exp().ln_1p();
    let p = 1.0 / (1.0 + (-logit).exp());
    ALPHA * (1.0 - p).powi(2) * surprise(logit) - (1.0 - ALPHA) * p.powi(2) * surprise(-logit)
}

/// The cheapest pairs of a row and a column of `costs`, which has so many columns.
fn cheapest(costs: &[f64], columns: usize) -> Result<Vec<Pair>, NotFinite> {
    // The solver panics on some costs that are not finite and answers wrongly on others.
    if let Some(place) = costs.iter().position(|cost| !cost.is_finite()) {
        return Err(NotFinite {
            pair: Pair {
                query: place / columns,
                object: place % columns,
            },
            cost: costs[place],
        });
    }
    let rows = costs.len() / columns.max(1);
    let (queries, objects) = lsap(costs, rows, columns, false);
    let pairs = queries.into_iter().zip(objects);
    Ok(pairs
        .map(|(query, object)| Pair { query, object })
        .collect())
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::random::{Purpose, stream};

    /// The least sum of one entry a row, each of another column; rows ≤ columns.
    fn brute_force(costs: &[Vec<f64>], taken: &mut Vec<bool>) -> f64 {
        let Some((row, rest)) = costs.split_first() else {
            return 0.0;
        };
        let mut least = f64::INFINITY;
        for (column, cost) in row.iter().enumerate() {
            if !taken[column] {
                taken[column] = true;
                least = least.min(cost + brute_force(rest, taken));
                taken[column] = false;
            }
        }
        least
    }

    #[test]
    fn pairs_cost_as_little_as_the_best_of_all_permutations() {
        let mut random = stream(3, Purpose::Sample, 0, 0);
        for rows in 1..=6 {
            for columns in 1..=6 {
                let costs: Vec<f64> = (0..rows * columns)
                    .map(|_| random.random_range(-2.0..3.0))
                    .collect();
                let pairs = cheapest(&costs, columns).unwrap();
                assert_eq!(pairs.len(), rows.min(columns));
                assert!(pairs.is_sorted_by(|a, b| a.query < b.query));
                let mut objects: Vec<usize> = pairs.iter().map(|pair| pair.object).collect();
                objects.sort_unstable();
                objects.dedup();
                assert_eq!(objects.len(), pairs.len());
                let found: f64 = pairs
                    .iter()
                    .map(|pair| costs[pair.query * columns + pair.object])
                    .sum();
                let (long, short) = (rows.max(columns), rows.min(columns));
                let wide: Vec<Vec<f64>> = (0..short)
                    .map(|i| {
                        let entry = |j: usize| match rows <= columns {
                            true => costs[i * columns + j],
                            false => costs[j * columns + i],
                        };
                        (0..long).map(entry).collect()
                    })
                    .collect();
                let least = brute_force(&wide, &mut vec![false; long]);
                assert!((found - least).abs() < 1e-12, "{rows}×{columns}");
            }
        }
    }

    fn object(class: usize, bbox: [f32; 4]) -> ViewBox {
        ViewBox { class, bbox }
    }

    #[test]
    fn each_box_goes_to_the_query_that_has_it_and_its_class() {
        let here = [0.3, 0.3, 0.2, 0.2];
        let there = [0.7, 0.6, 0.3, 0.1];
        let boxes = [[0.5; 4], there, here, here].concat();
        let logits = [[0.0, 0.0], [-2.0, 2.0], [-2.0, 2.0], [2.0, -2.0]].concat();
        let objects = [object(0, here), object(1, there), object(1, here)];
        let pairs = assign(&logits, &boxes, &objects, &LossConfig::default()).unwrap();
        let found: Vec<(usize, usize)> = pairs.iter().map(|p| (p.query, p.object)).collect();
        assert_eq!(found, [(1, 1), (2, 2), (3, 0)]);
    }

    #[test]
    fn more_boxes_than_queries_and_none_of_either_are_matched() {
        let bbox = [0.5, 0.5, 0.2, 0.2];
        let weights = LossConfig::default();
        let far = object(0, [0.1, 0.9, 0.1, 0.1]);
        let pairs = assign(&[0.0], &bbox, &[far, object(0, bbox), far], &weights).unwrap();
        assert_eq!(
            pairs,
            [Pair {
                query: 0,
                object: 1
            }]
        );
        assert_eq!(assign(&[0.0], &bbox, &[], &weights), Ok(Vec::new()));
        assert_eq!(assign(&[], &[], &[far], &weights), Ok(Vec::new()));
    }

    #[test]
    fn a_prediction_that_is_not_finite_is_an_error_that_names_the_pair() {
        let bbox = [0.5, 0.5, 0.2, 0.2];
        let objects = [object(0, bbox), object(0, bbox)];
        let weights = LossConfig::default();
        for (logit, width) in [
            (f32::NAN, 0.2),
            (f32::INFINITY, 0.2),
            (0.0, f32::NAN),
            (0.0, f32::INFINITY),
        ] {
            let boxes = [bbox, [0.5, 0.5, width, 0.2]].concat();
            let error = assign(&[0.0, logit], &boxes, &objects, &weights).unwrap_err();
            let first = Pair {
                query: 1,
                object: 0,
            };
            assert_eq!(error.pair, first);
            assert!(error.to_string().contains("box 0 to query 1"), "{error}");
        }
    }
}
