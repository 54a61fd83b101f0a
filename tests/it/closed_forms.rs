//! The propagator against its closed forms (METHOD: `I ± ΔA` undo each other only where A² = 0) and a trusted matrix
//! exponential; the encoder's blindness for masked pixels.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};
use nalgebra::DMatrix;
use qbheat::heat::{
    Corner, Direction, Nearest, Parametrisation, Propagator, Quadrant, Quarters, all_show,
    assemble, matrix_exponential,
};
use qbheat::nn::Init;

use crate::support::{difference, tensor, values, wave};

fn propagator(kind: Parametrisation, matrices: &[f32], size: usize) -> Propagator {
    let device = qbheat::device();
    let mut propagator = Propagator::new(size, kind, &mut Init::new(0, &device));
    let count = matrices.len() / (size * size);
    propagator.matrices = Param::from_tensor(Tensor::from_data(
        TensorData::new(matrices.to_vec(), [count, size, size]),
        &device,
    ));
    propagator
}

/// All four quarters of a field, each from the others, by unit steps of `p`.
fn assert_quarters_predict_each_other(p: &Propagator, size: usize) {
    let z: Tensor<3> = tensor::<3>(&wave(&[2, 4, size], 0.3, 1.0)).inner();
    let right = p.step(z.clone(), Direction::Right);
    let down = p.step(z.clone(), Direction::Down);
    let across = p.step(right.clone(), Direction::Down);
    let images = z.dims()[0];
    let quarters = [
        (Quadrant::TopLeft, z),
        (Quadrant::TopRight, right),
        (Quadrant::BottomLeft, down),
        (Quadrant::BottomRight, across),
    ];
    let all = Quarters {
        visible: quarters[0].1.clone(),
        beside: quarters[1].1.clone(),
        above_or_below: quarters[2].1.clone(),
        diagonal: quarters[3].1.clone(),
    };
    let reference = values(assemble(all, &all_show(Quadrant::TopLeft, images), [2, 2]));
    for (quadrant, z) in quarters {
        let sizes = all_show(quadrant, images);
        let whole = values(assemble(p.propagate(z, &sizes), &sizes, [2, 2]));
        let error = difference(&whole, &reference);
        assert!(error < 1e-5, "from {quadrant:?}: {error:e}");
    }
}

#[test]
fn signed_steps_of_commuting_nilpotent_matrices_predict_every_quarter_from_every_other() {
    // A maps e3 to e1, B maps e3 to 2·e1: A² = B² = 0 and AB = BA = 0.
    let mut matrices = [0f32; 2 * 9];
    matrices[2] = 1.0;
    matrices[9 + 2] = 2.0;
    let p = propagator(Parametrisation::Signed, &matrices, 3);
    assert_quarters_predict_each_other(&p, 3);
    assert!(p.commutator() < 1e-7);
}

#[test]
fn exponential_steps_of_commuting_matrices_predict_every_quarter_from_every_other() {
    let a = DMatrix::from_fn(3, 3, |i, j| 0.3 * ((3 * i + j) as f32).sin());
    // A polynomial of A commutes with A.
    let b = &a * &a - &a * 0.5;
    let mut matrices: Vec<f32> = a.transpose().iter().copied().collect();
    matrices.extend(b.transpose().iter());
    let p = propagator(Parametrisation::Exponential, &matrices, 3);
    assert_quarters_predict_each_other(&p, 3);
    assert!(p.commutator() < 1e-6);
}

#[test]
fn generators_are_the_change_over_a_block_by_its_width_and_height() {
    let matrices: Vec<f32> = (0..16).map(|i| i as f32).collect();
    let separate = propagator(Parametrisation::Separate, &matrices, 2);
    // (right − left)/2 is (4 − 0)/2 = 2 in every entry, (down − up): the same.
    let (a, b) = separate.generators([2, 4]);
    assert_eq!((values(a), values(b)), (vec![0.5; 4], vec![1.0; 4]));
    let signed = propagator(Parametrisation::Signed, &matrices[..8], 2);
    let (a, b) = signed.generators([2, 4]);
    assert_eq!(values(a), [0.0, 0.25, 0.5, 0.75]);
    assert_eq!(values(b), [2.0, 2.5, 3.0, 3.5]);
}

#[test]
fn commutator_of_a_known_pair() {
    // E12·E21 − E21·E12 = diag(1, −1), of norm √2.
    let matrices = [0., 1., 0., 0., 0., 0., 1., 0.];
    let p = propagator(Parametrisation::Signed, &matrices, 2);
    assert!((p.commutator() - 2f64.sqrt()).abs() < 1e-6);
}

#[test]
fn matrix_exponential_equals_nalgebras() {
    for (size, scale) in [(2, 0.1), (5, 1.0), (16, 3.0), (24, 0.5)] {
        let m = wave(&[size, size], 0.7, scale);
        let trusted = DMatrix::from_row_slice(size, size, &m.values)
            .cast::<f64>()
            .exp();
        let expected: Vec<f32> = trusted.transpose().iter().map(|&v| v as f32).collect();
        let found = values(matrix_exponential(tensor::<2>(&m).inner()));
        let error = difference(&found, &expected);
        assert!(error < 1e-5, "{size}×{size}, scale {scale}: {error:e}");
    }
}

/// From a block anywhere on a map of 4 rows and 6 columns, every position of a field `z(x, y)` that the propagator's
/// steps leave exact.
fn assert_blocks_predict_their_field(
    p: &Propagator,
    size: usize,
    z: impl Fn(f32, f32) -> Vec<f32>,
) {
    let (rows, columns) = (4, 6);
    let whole: Vec<f32> = (0..rows * columns)
        .flat_map(|i| z((i % columns) as f32, (i / columns) as f32))
        .collect();
    for (row, column) in [(0, 0), (1, 2), (2, 3), (0, 1), (2, 0)] {
        let visible: Vec<f32> = (row..row + rows / 2)
            .flat_map(|y| (column..column + columns / 2).map(move |x| (x, y)))
            .flat_map(|(x, y)| z(x as f32, y as f32))
            .collect();
        let block = [rows / 2, columns / 2];
        let device = qbheat::device();
        let visible = Tensor::<3>::from_data(
            TensorData::new(visible, [1, block[0] * block[1], size]),
            &device,
        );
        let nearest = Nearest::new(&[Corner { row, column }], block, &device);
        let found = values(p.spread(nearest.gather(visible), &nearest, block));
        let error = difference(&found, &whole);
        assert!(error < 1e-5, "from ({row}, {column}): {error:e}");
    }
}

#[test]
fn exponential_steps_over_true_distances_predict_an_exponential_field_from_a_block_anywhere() {
    let a = DMatrix::from_fn(3, 3, |i, j| 0.1 * ((3 * i + j) as f32).sin());
    let b = &a * &a - &a * 0.5;
    let z0 = DMatrix::from_column_slice(3, 1, &[1.0f32, -0.5, 2.0]);
    // The matrices step over a whole block: 3 columns, 2 rows.
    let mut matrices: Vec<f32> = (a.transpose() * 3.0).iter().copied().collect();
    matrices.extend((b.transpose() * 2.0).iter());
    let p = propagator(Parametrisation::Exponential, &matrices, 3);
    assert_blocks_predict_their_field(&p, 3, |x, y| {
        ((&a * x + &b * y).exp() * &z0).as_slice().to_vec()
    });
}

#[test]
fn linear_steps_over_true_distances_predict_a_linear_field_from_a_block_anywhere() {
    // A maps e3 to e1, B maps e3 to 2·e1: all products are 0, so z(x, y) = (I + xA + yB) z(0, 0).
    let field = |x: f32, y: f32| vec![1.0 + x * 3.0 + 2.0 * y * 3.0, -0.5, 3.0];
    let a = [0f32, 0., 3., 0., 0., 0., 0., 0., 0.];
    let b = [0f32, 0., 4., 0., 0., 0., 0., 0., 0.];
    let signed = [a, b].concat();
    let p = propagator(Parametrisation::Signed, &signed, 3);
    assert_blocks_predict_their_field(&p, 3, field);
    let opposite = |m: [f32; 9]| m.map(|v| -v);
    let separate = [opposite(a), a, opposite(b), b].concat();
    let p = propagator(Parametrisation::Separate, &separate, 3);
    assert_blocks_predict_their_field(&p, 3, field);
}
