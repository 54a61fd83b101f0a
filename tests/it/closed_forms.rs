//! The propagator against its closed forms (METHOD: `I ± ΔA` undo each other only where A² = 0) and a trusted matrix
//! exponential; the encoder's blindness for masked pixels; the test of the hypothesis on fields that obey it and on
//! noise.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};
use nalgebra::DMatrix;
use qbheat::heat::{
    Corner, Derivative, Difference, Direction, Law, Nearest, Parametrisation, Propagator, Quadrant,
    Quarters, Removed, Sums, all_show, assemble, eigenvalues, matrix_exponential, quotient,
    r2_by_rank,
};
use qbheat::nn::Init;
use qbheat::random::{Purpose, permutation, standard_normal, stream};

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

/// Maps of 6×6 positions and 3 channels for the invariance test.
const FIELD: [usize; 2] = [6, 6];

/// A and B that commute, B being a polynomial of A and well conditioned.
fn commuting() -> [DMatrix<f64>; 2] {
    let a = DMatrix::<f64>::from_row_slice(
        3,
        3,
        &[0.10, 0.06, -0.04, -0.05, -0.12, 0.08, 0.03, 0.07, 0.15],
    );
    let b = DMatrix::<f64>::identity(3, 3) * 0.15 - &a * 0.4 + &a * &a * 1.5;
    [a, b]
}

/// Maps `[N, 6, 6, 3]` with `z(x, y) = step(x, y) z₀`, z₀ being drawn for each of the numbered images.
fn fields(images: std::ops::Range<u64>, step: impl Fn(usize, usize) -> DMatrix<f64>) -> Vec<f32> {
    let steps: Vec<DMatrix<f64>> = (0..36).map(|i| step(i % 6, i / 6)).collect();
    let mut maps = Vec::new();
    for image in images {
        let mut random = stream(0, Purpose::Sample, 0, image);
        let z0 = DMatrix::from_fn(3, 1, |_, _| f64::from(standard_normal(&mut random)));
        for step in &steps {
            maps.extend((step * &z0).iter().map(|&z| z as f32));
        }
    }
    maps
}

fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut random = stream(seed, Purpose::Sample, 0, 0);
    (0..count).map(|_| standard_normal(&mut random)).collect()
}

/// One law's matrix as fitted on some maps, and R² on others.
struct Fitted {
    matrix: DMatrix<f64>,
    r2: f64,
    /// By rank, on the maps of the fit and on the others.
    by_rank: Vec<[f64; 2]>,
}

struct Test<'a> {
    maps: [&'a [f32]; 2],
    grid: [usize; 2],
    channels: usize,
    difference: Difference,
    order: Vec<usize>,
}

impl Test<'_> {
    fn of(maps: [&[f32]; 2], [h, w]: [usize; 2], channels: usize) -> Test<'_> {
        Test {
            maps,
            grid: [h, w],
            channels,
            difference: Difference::Forward,
            order: (0..h * w).collect(),
        }
    }

    fn fit(&self, law: Law, removed: Removed) -> Fitted {
        let sums = self.maps.map(|maps| {
            let mut sums = Sums::new(
                &[law],
                self.difference,
                self.grid,
                self.channels,
                &self.order,
            );
            sums.add(maps);
            sums
        });
        let [fitted, scored] = sums.each_ref().map(|of| of.moments(0, removed, &sums[0]));
        let matrix = fitted.fit();
        Fitted {
            r2: scored.r2(&matrix),
            by_rank: r2_by_rank(&matrix, &fitted, &scored)
                .iter()
                .map(|point| [point.r2_fitted, point.r2])
                .collect(),
            matrix,
        }
    }
}

fn neighbours(derivative: Derivative) -> Law {
    Law {
        derivative,
        lag: [1, 1],
        shared: true,
    }
}

fn apart(found: &DMatrix<f64>, expected: &DMatrix<f64>) -> f64 {
    (found - expected).norm() / expected.norm()
}

#[test]
fn a_field_of_unit_steps_has_the_t_and_s_of_its_generators() {
    let [a, b] = commuting();
    let one = DMatrix::<f64>::identity(3, 3);
    let power =
        |m: &DMatrix<f64>, times: usize| (0..times).fold(one.clone(), |p, _| p * (&one + m));
    let step = |x, y| power(&a, x) * power(&b, y);
    let maps = [fields(0..40, step), fields(40..60, step)];
    let mut test = Test::of([&maps[0], &maps[1]], FIELD, 3);
    let t = &a * b.clone().try_inverse().unwrap();
    let minus_s = &t * &t;
    for (derivative, expected) in [(Derivative::First, &t), (Derivative::Second, &minus_s)] {
        let found = test.fit(neighbours(derivative), Removed::PositionMeans);
        let error = apart(&found.matrix, expected);
        assert!(error < 1e-4, "{derivative:?}: {error:e}");
        assert!(found.r2 > 0.9999, "{derivative:?}: {}", found.r2);
        let [fitted, scored] = found.by_rank.last().unwrap();
        assert!(*fitted > 0.9999 && *scored > 0.9999);
        assert_eq!(found.by_rank.len(), 3, "ranks 1, 2 and 3");
    }
    // As learned matrices would be compared with it.
    let learned = quotient(&a, &b);
    assert!(apart(&learned.matrix, &t) < 1e-9);
    assert_eq!(learned.rank, 3);

    // A chance order of the positions leaves nothing of the law but what any linear relation finds in so few channels.
    for seed in 0..3 {
        test.order = permutation(seed, Purpose::Sample, 0, 36);
        let shuffled = test.fit(neighbours(Derivative::First), Removed::PositionMeans);
        assert!(shuffled.r2 < 0.7, "{}", shuffled.r2);
    }
}

#[test]
fn an_exponential_field_has_the_t_of_its_finite_differences_at_every_lag() {
    let [a, b] = commuting();
    let step = |x: usize, y: usize| (&a * x as f64 + &b * y as f64).exp();
    let maps = [fields(0..40, step), fields(40..60, step)];
    let test = Test::of([&maps[0], &maps[1]], FIELD, 3);
    let one = DMatrix::<f64>::identity(3, 3);
    for (law, lag) in [
        (neighbours(Derivative::First), 1.0),
        (Law::over_half(FIELD), 3.0),
    ] {
        let denominator = ((&b * lag).exp() - &one).try_inverse().unwrap();
        let expected = ((&a * lag).exp() - &one) * denominator;
        let found = test.fit(law, Removed::PositionMeans);
        let error = apart(&found.matrix, &expected);
        assert!(error < 1e-4 && found.r2 > 0.9999, "{law}: {error:e}");
    }
}

#[test]
fn planes_have_the_same_t_by_forward_differences_and_by_sobels() {
    // z = (x I + y R) z₀ has z_x = z₀ and z_y = R z₀.
    let [_, r] = commuting();
    let one = DMatrix::<f64>::identity(3, 3);
    let step = |x: usize, y: usize| &one * x as f64 + &r * y as f64;
    let maps = [fields(0..40, step), fields(40..60, step)];
    let mut test = Test::of([&maps[0], &maps[1]], FIELD, 3);
    let expected = r.clone().try_inverse().unwrap();
    for difference in [Difference::Forward, Difference::Sobel] {
        test.difference = difference;
        for law in Law::all(FIELD, difference) {
            if law.derivative == Derivative::First {
                let found = test.fit(law, Removed::PositionMeans);
                let error = apart(&found.matrix, &expected);
                assert!(error < 1e-4, "{difference:?}, {law}: {error:e}");
            }
        }
    }
}

#[test]
fn white_noise_obeys_no_law_but_what_a_shared_position_explains() {
    let (images, grid, channels) = (200, [8, 8], 4);
    let maps = [1, 2].map(|seed| noise(seed, images * 64 * channels));
    let test = Test::of([&maps[0], &maps[1]], grid, channels);
    for law in Law::all(grid, Difference::Forward) {
        let found = test.fit(law, Removed::PositionMeans);
        for pair in found.by_rank.windows(2) {
            assert!(pair[0][0] <= pair[1][0] + 1e-12, "{law}: a rank too many");
        }
        let last = found.by_rank.last().unwrap();
        assert!((last[1] - found.r2).abs() < 1e-9, "{law}");
        // Both differences are z' − z with the same z: T = I/2, and R² = ¼ at any lag.
        match (law.derivative, law.shared) {
            (Derivative::First, true) => {
                assert!((found.r2 - 0.25).abs() < 0.04, "{law}: {}", found.r2);
                let half = DMatrix::<f64>::identity(channels, channels) * 0.5;
                assert!(apart(&found.matrix, &half) < 0.15, "{law}");
            }
            (Derivative::First, false) => assert!(found.r2.abs() < 0.01, "{law}: {}", found.r2),
            // z'' − 2z' + z likewise: one part in six, R² = 1/36.
            (Derivative::Second, _) => {
                assert!((found.r2 - 1.0 / 36.0).abs() < 0.02, "{law}: {}", found.r2);
            }
        }
    }
}

#[test]
fn what_all_images_have_in_common_at_a_position_is_no_law() {
    let (images, grid, channels) = (100, [8, 8], 4);
    let maps = [3, 4].map(|seed| {
        let mut maps = noise(seed, images * 64 * channels);
        for (i, z) in maps.iter_mut().enumerate() {
            let position = i / channels % 64;
            *z += ((position % 8 + position / 8) as f32).powi(2);
        }
        maps
    });
    let test = Test::of([&maps[0], &maps[1]], grid, channels);
    let law = Law::all(grid, Difference::Forward)
        .into_iter()
        .find(|law| !law.shared)
        .unwrap();
    let r2 = |removed| test.fit(law, removed).r2;
    assert!(r2(Removed::Nothing) > 0.9);
    assert!(r2(Removed::ChannelMeans) > 0.5);
    assert!(r2(Removed::PositionMeans).abs() < 0.01);
}

#[test]
fn a_singular_b_is_inverted_where_it_can_be_and_said_to_be_singular() {
    let b = DMatrix::from_row_slice(3, 3, &[2.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]);
    let found = quotient(&DMatrix::identity(3, 3), &b);
    let expected = DMatrix::from_row_slice(3, 3, &[0.5, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    assert!(apart(&found.matrix, &expected) < 1e-12);
    assert_eq!(found.rank, 2);
    assert!(found.condition > 1e12);
}

#[test]
fn eigenvalues_of_a_rotation_lie_on_the_unit_circle() {
    // A turn by a right angle, and a factor of 3 along its axis.
    let m = DMatrix::from_row_slice(3, 3, &[0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0]);
    let mut found = eigenvalues(m);
    found.sort_by(|a, b| a[1].total_cmp(&b[1]));
    let expected = [[0.0, -1.0], [3.0, 0.0], [0.0, 1.0]];
    let errors = found.iter().flatten().zip(expected.iter().flatten());
    assert_eq!(found.len(), 3);
    assert!(
        errors.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) < 1e-9,
        "{found:?}"
    );
}
