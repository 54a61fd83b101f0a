//! Multinomial logistic regression, solved to convergence.

use std::collections::VecDeque;

use nalgebra::DMatrix;
use rayon::prelude::*;

use super::features::Matrix;
use super::{Scores, stratified_places};
use crate::observe::Observer;

/// Strengths of the L2 penalty that are tried, strongest first.
const STRENGTHS: [f64; 6] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];
const HELD_OUT: f64 = 0.2;
const MAX_ITERATIONS: usize = 1000;
/// Converged when no entry of the gradient of the mean loss is larger.
const TOLERANCE: f64 = 1e-5;
const HISTORY: usize = 10;
/// Sums run over this many parts in a fixed order, so that they do not depend on the number of threads.
const PARTS: usize = 8;

/// A fitted classifier: scores are `x·weights + bias`.
pub struct Logistic {
    /// Inputs by classes.
    pub weights: DMatrix<f64>,
    /// One a class.
    pub bias: Vec<f64>,
    /// Whether the gradient fell below the tolerance.
    pub converged: bool,
}

/// The strength that was chosen.
pub struct Strength {
    /// λ in mean cross-entropy + λ/2·‖weights‖².
    pub l2: f64,
    /// Whether the final fit converged.
    pub converged: bool,
}

/// Scores of `held_out` by logistic regression on `train`. The strength of the penalty is the one that does best on a
/// stratified fifth of the training images, after fitting on the others; the classifier is then fitted on all.
pub fn linear_scores(
    train: &Matrix,
    (labels, classes): (&[u32], usize),
    held_out: &Matrix,
    seed: u64,
    observer: &dyn Observer,
) -> (Scores, Strength) {
    let (fit_places, check_places) = stratified_places(labels, HELD_OUT, seed);
    let chosen = |places: &[usize]| -> Vec<u32> { places.iter().map(|&p| labels[p]).collect() };
    let (check, check_labels) = (train.rows_at(&check_places), chosen(&check_places));
    let problem = Problem::new(&train.rows_at(&fit_places), &chosen(&fit_places), classes);
    observer.begin("solving the linear probe", STRENGTHS.len() as u64 + 1);
    let mut start = vec![0.0; (train.columns + 1) * classes];
    // Without an image to check by, none is chosen: one of the middle.
    let mut best = (
        f64::NEG_INFINITY,
        STRENGTHS[STRENGTHS.len() / 2],
        start.clone(),
    );
    for (done, l2) in STRENGTHS.into_iter().enumerate() {
        let (solution, _) = minimise(|x| problem.loss(x, l2), start);
        let score = problem
            .classifier(&solution, true)
            .scores(&check)
            .top(1, &check_labels);
        observer.progress(done as u64 + 1, &format!("L2 {l2:.0e}: {score:.1} %"));
        if score > best.0 {
            best = (score, l2, solution.clone());
        }
        start = solution;
    }
    let (_, l2, start) = best;
    let classifier = fit(&Problem::new(train, labels, classes), l2, start);
    observer.end();
    let strength = Strength {
        l2,
        converged: classifier.converged,
    };
    (classifier.scores(held_out), strength)
}

/// Minimises mean cross-entropy + `l2`/2·‖weights‖² over weights and bias (the bias is not penalised), by L-BFGS from
/// zero.
pub fn fit_logistic(inputs: &Matrix, labels: &[u32], classes: usize, l2: f64) -> Logistic {
    let start = vec![0.0; (inputs.columns + 1) * classes];
    fit(&Problem::new(inputs, labels, classes), l2, start)
}

fn fit(problem: &Problem, l2: f64, start: Vec<f64>) -> Logistic {
    let (solution, converged) = minimise(|x| problem.loss(x, l2), start);
    problem.classifier(&solution, converged)
}

impl Logistic {
    /// A score for each row and class.
    pub fn scores(&self, inputs: &Matrix) -> Scores {
        let rows =
            DMatrix::from_row_slice(inputs.rows(), inputs.columns, &inputs.values).cast::<f64>();
        let products = rows * &self.weights;
        let values = products
            .row_iter()
            .flat_map(|row| {
                row.iter()
                    .zip(&self.bias)
                    .map(|(product, bias)| (product + bias) as f32)
                    .collect::<Vec<_>>()
            })
            .collect();
        Scores {
            values,
            classes: self.bias.len(),
        }
    }
}

/// Inputs and labels in parts; parameters are the weights column by column (a column a class), then the bias.
struct Problem {
    parts: Vec<Part>,
    inputs: usize,
    classes: usize,
    count: f64,
}

struct Part {
    rows: DMatrix<f64>,
    transposed: DMatrix<f64>,
    labels: Vec<u32>,
}

impl Problem {
    fn new(inputs: &Matrix, labels: &[u32], classes: usize) -> Self {
        let size = labels.len().div_ceil(PARTS).max(1);
        let parts = inputs
            .values
            .chunks(size * inputs.columns)
            .zip(labels.chunks(size))
            .map(|(values, labels)| {
                let rows =
                    DMatrix::from_row_slice(labels.len(), inputs.columns, values).cast::<f64>();
                Part {
                    transposed: rows.transpose(),
                    rows,
                    labels: labels.to_vec(),
                }
            })
            .collect();
        Self {
            parts,
            inputs: inputs.columns,
            classes,
            count: labels.len() as f64,
        }
    }

    fn classifier(&self, parameters: &[f64], converged: bool) -> Logistic {
        let (weights, bias) = parameters.split_at(self.inputs * self.classes);
        Logistic {
            weights: DMatrix::from_column_slice(self.inputs, self.classes, weights),
            bias: bias.to_vec(),
            converged,
        }
    }

    fn loss(&self, parameters: &[f64], l2: f64) -> (f64, Vec<f64>) {
        let (flat, bias) = parameters.split_at(self.inputs * self.classes);
        let weights = DMatrix::from_column_slice(self.inputs, self.classes, flat);
        let parts: Vec<(f64, Vec<f64>)> = self
            .parts
            .par_iter()
            .map(|part| part.loss(&weights, bias))
            .collect();
        let mut loss = 0.5 * l2 * flat.iter().map(|w| w * w).sum::<f64>();
        let mut gradient: Vec<f64> = flat.iter().map(|w| l2 * w).collect();
        gradient.resize(parameters.len(), 0.0);
        for (part_loss, part_gradient) in parts {
            loss += part_loss / self.count;
            for (total, part) in gradient.iter_mut().zip(part_gradient) {
                *total += part / self.count;
            }
        }
        (loss, gradient)
    }
}

impl Part {
    /// Summed cross-entropy and its gradient.
    fn loss(&self, weights: &DMatrix<f64>, bias: &[f64]) -> (f64, Vec<f64>) {
        let mut errors = &self.rows * weights;
        let mut loss = 0.0;
        let mut bias_gradient = vec![0.0; bias.len()];
        for (mut row, &label) in errors.row_iter_mut().zip(&self.labels) {
            let mut highest = f64::NEG_INFINITY;
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
                highest = highest.max(*value);
            }
            let total: f64 = row.iter().map(|value| (value - highest).exp()).sum();
            let log_total = highest + total.ln();
            loss += log_total - row[label as usize];
            for (class, value) in row.iter_mut().enumerate() {
                *value = (*value - log_total).exp() - f64::from(u8::from(class == label as usize));
                bias_gradient[class] += *value;
            }
        }
        let mut gradient = (&self.transposed * errors).as_slice().to_vec();
        gradient.extend(bias_gradient);
        (loss, gradient)
    }
}

/// L-BFGS (Liu and Nocedal 1989) with backtracking: the minimiser of a convex smooth function, and whether the
/// gradient fell below the tolerance.
fn minimise(function: impl Fn(&[f64]) -> (f64, Vec<f64>), mut x: Vec<f64>) -> (Vec<f64>, bool) {
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let (mut value, mut gradient) = function(&x);
    let mut history: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
    for _ in 0..MAX_ITERATIONS {
        if gradient.iter().all(|g| g.abs() <= TOLERANCE) {
            return (x, true);
        }
        let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut factors = Vec::with_capacity(history.len());
        for (step, change, curvature) in history.iter().rev() {
            let factor = dot(step, &direction) / curvature;
            direction
                .iter_mut()
                .zip(change)
                .for_each(|(d, c)| *d -= factor * c);
            factors.push(factor);
        }
        let scale = match history.back() {
            Some((_, change, curvature)) => curvature / dot(change, change),
            None => 1.0 / dot(&gradient, &gradient).sqrt().max(1.0),
        };
        direction.iter_mut().for_each(|d| *d *= scale);
        for ((step, change, curvature), factor) in history.iter().zip(factors.into_iter().rev()) {
            let correction = factor - dot(change, &direction) / curvature;
            direction
                .iter_mut()
                .zip(step)
                .for_each(|(d, s)| *d += correction * s);
        }
        let slope = dot(&gradient, &direction);
        let mut length = 1.0;
        let (next, next_value, next_gradient) = loop {
            let next: Vec<f64> = x
                .iter()
                .zip(&direction)
                .map(|(x, d)| x + length * d)
                .collect();
            let (next_value, next_gradient) = function(&next);
            if next_value <= value + 1e-4 * length * slope {
                break (next, next_value, next_gradient);
            }
            length *= 0.5;
            if length < 1e-12 {
                // No descent within rounding: this is as far as double precision goes.
                return (x, false);
            }
        };
        let step: Vec<f64> = next.iter().zip(&x).map(|(new, old)| new - old).collect();
        let change: Vec<f64> = next_gradient
            .iter()
            .zip(&gradient)
            .map(|(new, old)| new - old)
            .collect();
        let curvature = dot(&step, &change);
        if curvature > 0.0 {
            if history.len() == HISTORY {
                history.pop_front();
            }
            history.push_back((step, change, curvature));
        }
        (x, value, gradient) = (next, next_value, next_gradient);
    }
    (x, false)
}
