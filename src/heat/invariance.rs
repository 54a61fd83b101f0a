//! The hypothesis itself, tested: are the derivatives of a feature map along its two axes related linearly, by one
//! matrix at every position of every image?
//!
//! From `z_x = A z` and `z_y = B z` follow `z_x = T z_y` with `T = A B⁻¹`, and `z_xx + S z_yy = 0` with `S = −A² B⁻²`.
//! Both matrices are fitted by least squares to finite differences. Where sums over all places of all images of
//! `x xᵀ`, `x yᵀ` and `y yᵀ` are known, x and y being the two sides of a law, so is the error of any matrix: nothing
//! else is kept of the maps.

use std::fmt;

use nalgebra::{DMatrix, Schur, SymmetricEigen};
use rayon::prelude::*;
use serde::Serialize;

/// Columns that are multiplied at once: many enough for a fast product, few enough for little memory.
const COLUMNS: usize = 4096;
/// What is added to each eigenvalue of `Σ y yᵀ`, as a share of their mean. Features are 32-bit numbers: what varies less
/// than by 3e-5 of the average channel is close to their rounding and must not blow up a fit.
const RIDGE: f64 = 1e-9;
/// Iterations of the QR algorithm for each eigenvalue before it counts as stuck; it takes two or three.
const QR_STEPS: usize = 100;

/// How derivatives are taken on a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Difference {
    /// `(z(x + lag) − z(x)) / lag`; twice over for second derivatives.
    Forward,
    /// Central differences, smoothed along the other axis by (1, 2, 1)/4. For first derivatives their two ends lie `lag`
    /// positions apart, rounded down to an even number, and at least 2.
    Sobel,
}

/// Which derivatives a law relates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Derivative {
    /// `z_x ≈ T z_y`.
    First,
    /// `z_xx ≈ −S z_yy`.
    Second,
}

/// A linear relation between the derivatives along x and along y at one distance, to be tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Law {
    /// First or second derivatives.
    pub derivative: Derivative,
    /// Positions that a difference spans, down and to the right.
    pub lag: [usize; 2],
    /// Whether the derivatives are taken at the same place. Forward differences then both contain `−z(x, y)`, which
    /// alone explains a quarter of white noise. Else the one along y is taken as many columns further right as it needs
    /// to have no position in common with the one along x.
    pub shared: bool,
}

/// What is subtracted from both sides of a law before it is fitted and scored; means are those of the images it is
/// fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// Nothing: the law as the paper states it.
    Nothing,
    /// Each channel's mean over images and places.
    ChannelMeans,
    /// Each channel's mean over images at each place: what all images have in common there, as padding makes it.
    PositionMeans,
}

/// Offsets from a place, `[down, right]`, each with its weight.
type Stencil = Vec<([usize; 2], f64)>;
/// A stencil at one place of a map: numbers of positions with their weights.
type Taps = Vec<(usize, f64)>;

impl Difference {
    /// Offsets and weights along the axis of the derivative.
    fn along(self, derivative: Derivative, lag: usize) -> Vec<(usize, f64)> {
        let step = self.step(derivative, lag);
        let unit = step as f64;
        match (self, derivative) {
            (Self::Forward, Derivative::First) => vec![(0, -1.0 / unit), (step, 1.0 / unit)],
            (Self::Sobel, Derivative::First) => vec![(0, -0.5 / unit), (2 * step, 0.5 / unit)],
            (_, Derivative::Second) => [(0, 1.0), (step, -2.0), (2 * step, 1.0)]
                .map(|(offset, weight)| (offset, weight / (unit * unit)))
                .to_vec(),
        }
    }

    /// Offsets and weights along the other axis.
    fn across(self, derivative: Derivative, lag: usize) -> Vec<(usize, f64)> {
        let step = self.step(derivative, lag);
        match self {
            Self::Forward => vec![(0, 1.0)],
            Self::Sobel => vec![(0, 0.25), (step, 0.5), (2 * step, 0.25)],
        }
    }

    fn step(self, derivative: Derivative, lag: usize) -> usize {
        match (self, derivative) {
            (Self::Sobel, Derivative::First) => (lag / 2).max(1),
            _ => lag,
        }
    }
}

impl Law {
    /// Those to test on maps of `[h, w]` positions, as far as they fit on them: T between neighbours, over half the map,
    /// and without a shared position; S between neighbours and as far as the map reaches.
    pub fn all(grid: [usize; 2], difference: Difference) -> Vec<Self> {
        let law = |derivative, lag, shared| Self {
            derivative,
            lag,
            shared,
        };
        let apart = grid.map(|side| (side / 2).saturating_sub(1).max(1));
        let widest = grid.map(|side| (side.saturating_sub(1) / 2).max(1));
        let mut laws = vec![
            law(Derivative::First, [1, 1], true),
            Self::over_half(grid),
            law(Derivative::First, apart, false),
            law(Derivative::Second, [1, 1], true),
            law(Derivative::Second, widest, true),
        ];
        laws.dedup();
        laws.retain(|law| !law.places(difference, grid).contains(&0));
        laws
    }

    /// T at half the map's height and width, the distance that pre-training trains.
    pub fn over_half(grid: [usize; 2]) -> Self {
        Self {
            derivative: Derivative::First,
            lag: grid.map(|side| (side / 2).max(1)),
            shared: true,
        }
    }

    /// Rows and columns of the places on a map of `[h, w]` positions where both derivatives can be taken.
    pub fn places(&self, difference: Difference, [h, w]: [usize; 2]) -> [usize; 2] {
        let stencils = self.stencils(difference);
        let reach = |axis: usize| {
            let offsets = stencils.iter().flatten().map(|(offset, _)| offset[axis]);
            offsets.max().unwrap_or(0)
        };
        [h.saturating_sub(reach(0)), w.saturating_sub(reach(1))]
    }

    /// The derivative along x, then the one along y.
    fn stencils(&self, difference: Difference) -> [Stencil; 2] {
        let [down, right] = self.lag;
        let along = |lag| difference.along(self.derivative, lag);
        let across = |lag| difference.across(self.derivative, lag);
        let x = outer(&across(down), &along(right));
        let mut y = outer(&along(down), &across(right));
        if !self.shared {
            let meet = |shift: &usize| {
                let mut moved = y.iter().map(|([row, column], _)| [*row, column + shift]);
                moved.any(|offset| x.iter().any(|(other, _)| *other == offset))
            };
            let shift = (1..)
                .find(|shift| !meet(shift))
                .expect("stencils are finite");
            for (offset, _) in &mut y {
                offset[1] += shift;
            }
        }
        [x, y]
    }
}

impl fmt::Display for Law {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self.derivative {
            Derivative::First => "T, lag ",
            Derivative::Second => "S, lag ",
        })?;
        match self.lag {
            [down, right] if down == right => write!(f, "{down}")?,
            [down, right] => write!(f, "{down}×{right}")?,
        }
        f.write_str(if self.shared {
            ""
        } else {
            ", no shared position"
        })
    }
}

fn outer(rows: &[(usize, f64)], columns: &[(usize, f64)]) -> Stencil {
    rows.iter()
        .flat_map(|&(down, a)| {
            columns
                .iter()
                .map(move |&(right, b)| ([down, right], a * b))
        })
        .collect()
}

/// Sums over maps, from which every law can be fitted and scored.
#[derive(Clone)]
pub struct Sums {
    channels: usize,
    images: usize,
    /// z at each position, `[h·w, C]`.
    positions: Vec<f64>,
    laws: Vec<LawSums>,
}

/// The two sides of a law, x and y, at each place, and sums of their products over places and images.
#[derive(Clone)]
struct LawSums {
    x: Vec<Taps>,
    y: Vec<Taps>,
    /// `Σ ‖x‖²`.
    xx: f64,
    /// `Σ x yᵀ`, `[C, C]`.
    xy: DMatrix<f64>,
    /// `Σ y yᵀ`, `[C, C]`.
    yy: DMatrix<f64>,
}

impl Sums {
    /// Of no maps yet; these will have `[h, w]` positions and `channels` channels. Position i of a map is taken to be
    /// its position `order[i]`: another order than `0..h·w` is the control with shuffled positions.
    pub fn new(
        laws: &[Law],
        difference: Difference,
        [h, w]: [usize; 2],
        channels: usize,
        order: &[usize],
    ) -> Self {
        let laws = laws.iter().map(|law| {
            let [rows, columns] = law.places(difference, [h, w]);
            let [x, y] = law.stencils(difference).map(|stencil| {
                let places = (0..rows * columns).map(|i| (i / columns, i % columns));
                let taps = places.map(|(row, column)| {
                    stencil
                        .iter()
                        .map(|([down, right], weight)| {
                            (order[(row + down) * w + column + right], *weight)
                        })
                        .collect::<Taps>()
                });
                taps.collect::<Vec<Taps>>()
            });
            LawSums {
                x,
                y,
                xx: 0.0,
                xy: DMatrix::zeros(channels, channels),
                yy: DMatrix::zeros(channels, channels),
            }
        });
        Self {
            channels,
            images: 0,
            positions: vec![0.0; h * w * channels],
            laws: laws.collect(),
        }
    }

    /// Adds a batch of maps, `[N, h, w, C]`.
    pub fn add(&mut self, maps: &[f32]) {
        let size = self.positions.len();
        assert_eq!(maps.len() % size, 0, "maps are of another size");
        for map in maps.chunks_exact(size) {
            for (sum, &z) in self.positions.iter_mut().zip(map) {
                *sum += f64::from(z);
            }
        }
        self.images += maps.len() / size;
        let channels = self.channels;
        self.laws
            .par_iter_mut()
            .for_each(|law| law.add(maps, size, channels));
    }

    /// What a law is fitted to or scored by. The means to remove are those of `fitted`.
    pub fn moments(&self, law: usize, removed: Removed, fitted: &Self) -> Moments {
        let LawSums { x, xx, xy, yy, .. } = &self.laws[law];
        let mut moments = Moments {
            samples: self.images * x.len(),
            xx: *xx,
            xy: xy.clone(),
            yy: yy.clone(),
        };
        if removed == Removed::Nothing {
            return moments;
        }
        let [x_mean, y_mean] = fitted.sides(law).map(|sums| {
            let means = sums / fitted.images as f64;
            if removed == Removed::PositionMeans {
                return means;
            }
            let overall = means.column_mean();
            DMatrix::from_fn(means.nrows(), means.ncols(), |channel, _| overall[channel])
        });
        // Σ (x − μ)(y − ν)ᵀ = Σ x yᵀ − μ (Σ y − n ν)ᵀ − (Σ x) νᵀ at each place, where sums are over n images.
        let [x_sum, y_sum] = self.sides(law);
        let images = self.images as f64;
        let y_rest = (&y_sum - &y_mean * images).transpose();
        let y_mean_t = y_mean.transpose();
        moments.xx += images * x_mean.norm_squared() - 2.0 * x_mean.dot(&x_sum);
        moments.xy -= &x_mean * &y_rest + &x_sum * &y_mean_t;
        moments.yy -= &y_mean * &y_rest + &y_sum * &y_mean_t;
        moments
    }

    /// `‖x − M y‖²` at each place of one map `[h, w, C]`, the position means of these sums removed.
    pub fn residuals(&self, law: usize, matrix: &DMatrix<f64>, map: &[f32]) -> Vec<f64> {
        let images = self.images as f64;
        let centred: Vec<f64> = map
            .iter()
            .zip(&self.positions)
            .map(|(&z, sum)| f64::from(z) - sum / images)
            .collect();
        let [x, y] = self.laws[law].sides(&centred, centred.len(), self.channels);
        let rest = x - matrix * y;
        rest.column_iter().map(|z| z.norm_squared()).collect()
    }

    /// Both sides of a law summed over images, `[C, places]` each.
    fn sides(&self, law: usize) -> [DMatrix<f64>; 2] {
        self.laws[law].sides(&self.positions, self.positions.len(), self.channels)
    }
}

impl LawSums {
    fn add(&mut self, maps: &[f32], size: usize, channels: usize) {
        let together = (COLUMNS / self.x.len()).max(1);
        for maps in maps.chunks(together * size) {
            let [x, y] = self.sides(maps, size, channels);
            let y_t = y.transpose();
            self.xx += x.norm_squared();
            self.xy.gemm(1.0, &x, &y_t, 1.0);
            self.yy.gemm(1.0, &y, &y_t, 1.0);
        }
    }

    /// Both sides on maps of `size` numbers: `[N, h, w, C]` to `[C, N·places]` each.
    fn sides<V: Copy + Into<f64>>(
        &self,
        maps: &[V],
        size: usize,
        channels: usize,
    ) -> [DMatrix<f64>; 2] {
        [&self.x, &self.y].map(|side| {
            let columns = maps.len() / size * side.len();
            let mut derivatives = vec![0.0; columns * channels];
            let mut column = derivatives.chunks_exact_mut(channels);
            for map in maps.chunks_exact(size) {
                for (taps, sum) in side.iter().zip(&mut column) {
                    for &(position, weight) in taps {
                        let z = &map[position * channels..(position + 1) * channels];
                        for (sum, &z) in sum.iter_mut().zip(z) {
                            let z: f64 = z.into();
                            *sum += weight * z;
                        }
                    }
                }
            }
            DMatrix::from_vec(channels, columns, derivatives)
        })
    }
}

/// Second moments of the two sides of a law, x and y, over places and images.
#[derive(Clone, Debug)]
pub struct Moments {
    samples: usize,
    xx: f64,
    xy: DMatrix<f64>,
    yy: DMatrix<f64>,
}

impl Moments {
    /// Places times images.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Mean of `‖x‖²`.
    pub fn spread(&self) -> f64 {
        self.xx / self.samples as f64
    }

    /// The M that makes `Σ ‖x − M y‖²` least: T, or −S. Where y does not reach all directions it is the one near 0, by a
    /// ridge of 1e-9 of the mean eigenvalue of `Σ y yᵀ`.
    pub fn fit(&self) -> DMatrix<f64> {
        let size = self.yy.nrows();
        let ridge = RIDGE * self.yy.trace() / size as f64;
        let ridged = &self.yy + DMatrix::from_diagonal_element(size, size, ridge);
        match ridged.cholesky() {
            Some(factor) => factor.solve(&self.xy.transpose()).transpose(),
            // Then y is 0 everywhere, and any matrix fits equally well.
            None => DMatrix::zeros(size, size),
        }
    }

    /// The c that makes `Σ ‖x − c y‖²` least.
    pub fn fit_scalar(&self) -> f64 {
        self.xy.trace() / self.yy.trace()
    }

    /// `R² = 1 − Σ ‖x − M y‖² / Σ ‖x‖²` over all places, images and channels. What it measures against is that
    /// derivatives equal what was removed from them: nothing at all, or means of the images of the fit.
    pub fn r2(&self, matrix: &DMatrix<f64>) -> f64 {
        (2.0 * matrix.dot(&self.xy) - (matrix * &self.yy).dot(matrix)) / self.xx
    }

    /// R² of `M = c·I`.
    pub fn r2_of_scalar(&self, c: f64) -> f64 {
        (2.0 * c * self.xy.trace() - c * c * self.yy.trace()) / self.xx
    }
}

/// R² of the best matrix of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RankPoint {
    /// The rank.
    pub rank: usize,
    /// R² on the images that are scored.
    pub r2: f64,
    /// R² on the images of the fit, which can only rise with the rank.
    pub r2_fitted: f64,
}

/// R² of the matrices of rank 1, 2, 4, … and C that fit best (reduced-rank regression, Izenman 1975): `U Uᵀ M`, M being
/// the fit of full rank and U the first eigenvectors of the covariance of the fitted values, `M (Σ y yᵀ) Mᵀ`.
pub fn r2_by_rank(matrix: &DMatrix<f64>, fitted: &Moments, scored: &Moments) -> Vec<RankPoint> {
    let channels = matrix.nrows();
    let eigen = SymmetricEigen::new(matrix * &fitted.yy * matrix.transpose());
    let mut order: Vec<usize> = (0..channels).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    // What the directions explain adds up, because they are orthogonal.
    let cumulated = |moments: &Moments| -> Vec<f64> {
        let explained = (&moments.xy * 2.0 - matrix * &moments.yy) * matrix.transpose();
        let turned = explained * &eigen.eigenvectors;
        let shares = order
            .iter()
            .map(|&k| eigen.eigenvectors.column(k).dot(&turned.column(k)) / moments.xx);
        shares
            .scan(0.0, |sum, share| {
                *sum += share;
                Some(*sum)
            })
            .collect()
    };
    let (r2, r2_fitted) = (cumulated(scored), cumulated(fitted));
    std::iter::successors(Some(1), |rank| Some(2 * rank))
        .take_while(|&rank| rank < channels)
        .chain([channels])
        .map(|rank| RankPoint {
            rank,
            r2: r2[rank - 1],
            r2_fitted: r2_fitted[rank - 1],
        })
        .collect()
}

/// `A B⁻¹` of learned matrices.
#[derive(Clone, Debug)]
pub struct Quotient {
    /// `A B⁻¹`, or `A B⁺` where B is singular, `[C, C]`.
    pub matrix: DMatrix<f64>,
    /// Singular values of B above C·1.2e-7 of the largest, to which 32-bit numbers are exact; the others count as 0.
    pub rank: usize,
    /// The largest singular value of B over the smallest.
    pub condition: f64,
}

/// `A B⁻¹` by the singular value decomposition of B; both must be finite.
pub fn quotient(a: &DMatrix<f64>, b: &DMatrix<f64>) -> Quotient {
    let svd = b.clone().svd(true, true);
    let (largest, least) = (svd.singular_values.max(), svd.singular_values.min());
    let cutoff = b.nrows() as f64 * f64::from(f32::EPSILON) * largest;
    Quotient {
        rank: svd.rank(cutoff),
        condition: largest / least,
        matrix: a * svd
            .pseudo_inverse(cutoff)
            .expect("both sides were computed"),
    }
}

/// Eigenvalues, real and imaginary part; none where their iteration does not end.
pub fn eigenvalues(matrix: DMatrix<f64>) -> Vec<[f64; 2]> {
    let steps = QR_STEPS * matrix.nrows();
    let schur = Schur::try_new(matrix, f64::EPSILON, steps);
    schur.map_or_else(Vec::new, |schur| {
        let values = schur.complex_eigenvalues();
        values.iter().map(|value| [value.re, value.im]).collect()
    })
}
