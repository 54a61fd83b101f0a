//! A, B, and I ± ΔA: from the features of one block to those of its neighbours.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::block::Nearest;
use super::quarter::{GroupSizes, Quadrant, Quarters, groups};
use crate::nn::Init;
use crate::nn::cost::spend;

const DEVIATION: f32 = 0.02;
const NORM_EPSILON: f32 = 1e-6;

/// How the step from one block to the next is written.
///
/// What is learned is the change over a whole block, `M_x = (w/2)·A` and `M_y = (h/2)·B`, so that the optimiser's step
/// does not depend on the geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Parametrisation {
    /// `z ± M z`: one matrix an axis, the sign is the direction.
    Signed,
    /// `z + M z`: a matrix a direction.
    Separate,
    /// `e^{±M} z`: one matrix an axis, exact inverses of each other.
    Exponential,
    /// `z + M ẑ`, ẑ normalised over channels (FINOLA, arXiv 2305.16319): a matrix a direction.
    NormLinear,
}

/// Where a block's neighbour lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Larger x.
    Right,
    /// Smaller x.
    Left,
    /// Larger y.
    Down,
    /// Smaller y.
    Up,
}

impl Direction {
    /// From a quadrant to the one in the same rows.
    fn beside(visible: Quadrant) -> Self {
        if visible.is_right() {
            Self::Left
        } else {
            Self::Right
        }
    }

    /// From a quadrant to the one in the same columns.
    fn above_or_below(visible: Quadrant) -> Self {
        if visible.is_lower() {
            Self::Up
        } else {
            Self::Down
        }
    }

    fn is_vertical(self) -> bool {
        matches!(self, Self::Down | Self::Up)
    }

    fn is_positive(self) -> bool {
        matches!(self, Self::Right | Self::Down)
    }
}

/// The learned matrices; feature vectors are columns, `∂z/∂x = A z`.
#[derive(Module, Debug)]
pub struct Propagator {
    /// `[2, C, C]`: M_x, M_y; or `[4, C, C]`: left, right, up, down.
    pub matrices: Param<Tensor<3>>,
    #[module(skip)]
    parametrisation: Parametrisation,
}

impl Propagator {
    /// Matrices drawn from a normal distribution of deviation 0.02.
    pub fn new(channels: usize, parametrisation: Parametrisation, init: &mut Init) -> Self {
        let count = match parametrisation {
            Parametrisation::Signed | Parametrisation::Exponential => 2,
            Parametrisation::Separate | Parametrisation::NormLinear => 4,
        };
        Self {
            matrices: init.normal([count, channels, channels], DEVIATION),
            parametrisation,
        }
    }

    /// All four quarters from the visible one, `z`: `[N, T, C]`, of a batch sorted by visible quadrant. The diagonal one is
    /// the mean of the two orders, ½(P_y P_x z + P_x P_y z).
    pub fn propagate(&self, z: Tensor<3>, sizes: &GroupSizes) -> Quarters {
        // One matrix an axis for all images; what differs is the sign.
        let signed = (self.parametrisation == Parametrisation::Signed)
            .then(|| [Direction::Right, Direction::Down].map(|direction| self.axis(direction)));
        let over = |z: Tensor<3>, towards: fn(Quadrant) -> Direction| {
            if let Some(axes) = &signed {
                let signs = groups(sizes).flat_map(|(visible, range)| {
                    let positive = towards(visible).is_positive();
                    range.map(move |_| if positive { 1.0 } else { -1.0 })
                });
                let vertical = towards(Quadrant::TopLeft).is_vertical();
                return move_by(axes[usize::from(vertical)].clone(), z, signs.collect());
            }
            let parts = groups(sizes)
                .map(|(visible, range)| self.step(z.clone().slice_dim(0, range), towards(visible)));
            Tensor::cat(parts.collect(), 0)
        };
        let beside = over(z.clone(), Direction::beside);
        let above_or_below = over(z.clone(), Direction::above_or_below);
        let diagonal = (over(beside.clone(), Direction::above_or_below)
            + over(above_or_below.clone(), Direction::beside))
            * 0.5;
        Quarters {
            visible: z,
            beside,
            above_or_below,
            diagonal,
        }
    }

    /// The block next to `z` (`[N, T, C]`) in one direction.
    pub fn step(&self, z: Tensor<3>, direction: Direction) -> Tensor<3> {
        let all = |factor: f32| vec![factor; z.dims()[0]];
        match self.parametrisation {
            Parametrisation::Signed => {
                let sign = if direction.is_positive() { 1.0 } else { -1.0 };
                move_by(self.axis(direction), z.clone(), all(sign))
            }
            Parametrisation::Separate => move_by(self.towards(direction), z.clone(), all(1.0)),
            Parametrisation::NormLinear => {
                z.clone() + apply(self.towards(direction), normalise_channels(z))
            }
            Parametrisation::Exponential if direction.is_positive() => {
                apply(matrix_exponential(self.axis(direction)), z)
            }
            Parametrisation::Exponential => apply(matrix_exponential(-self.axis(direction)), z),
        }
    }

    /// Every position of a map from the visible one nearest to it, over its true distance: `z` holds the features of
    /// the latter, `[N, T, C]`. Where both distances are not 0, the mean of the two orders, ½(P_y P_x z + P_x P_y z).
    /// `[h, w]` is the size of a block, over which the learned matrices step.
    pub fn spread(&self, z: Tensor<3>, nearest: &Nearest, [h, w]: [usize; 2]) -> Tensor<3> {
        let over_x = |z| self.walk(z, &nearest.right, [Direction::Right, Direction::Left], w);
        let over_y = |z| self.walk(z, &nearest.down, [Direction::Down, Direction::Up], h);
        (over_y(over_x(z.clone())) + over_x(over_y(z))) * 0.5
    }

    /// Each position of `z` (`[N, T, C]`) moved by its own `distance` (`[N, T, 1]`, in positions), of at most a block's
    /// `width`, forwards where it is positive.
    fn walk(
        &self,
        z: Tensor<3>,
        distance: &Tensor<3>,
        [forwards, backwards]: [Direction; 2],
        width: usize,
    ) -> Tensor<3> {
        let blocks = distance.clone() / width as f32;
        let (ahead, behind) = (
            blocks.clone().clamp_min(0.0),
            blocks.clone().neg().clamp_min(0.0),
        );
        match self.parametrisation {
            Parametrisation::Signed => z.clone() + apply(self.axis(forwards), z) * blocks,
            Parametrisation::Separate => {
                z.clone()
                    + apply(self.towards(forwards), z.clone()) * ahead
                    + apply(self.towards(backwards), z) * behind
            }
            Parametrisation::NormLinear => {
                let unit = normalise_channels(z.clone());
                z + apply(self.towards(forwards), unit.clone()) * ahead
                    + apply(self.towards(backwards), unit) * behind
            }
            Parametrisation::Exponential => {
                let over_one = self.axis(forwards) / width as f32;
                let steps = [
                    (matrix_exponential(over_one.clone()), distance.clone()),
                    (matrix_exponential(over_one.neg()), distance.clone().neg()),
                ];
                steps.into_iter().fold(z, |z, (step, distance)| {
                    (1..=width).fold(z, |z, k| {
                        let goes_on = distance.clone().greater_equal_elem(k as f32).float();
                        z.clone() + (apply(step.clone(), z.clone()) - z) * goes_on
                    })
                })
            }
        }
    }

    /// A and B, `[C, C]` each, for a block of `h`×`w` positions. Where each direction has a matrix of its own, half
    /// the difference of the two opposite ones.
    pub fn generators(&self, [h, w]: [usize; 2]) -> (Tensor<2>, Tensor<2>) {
        let block = |axis: Direction, opposite: Direction| match self.parametrisation {
            Parametrisation::Signed | Parametrisation::Exponential => self.axis(axis),
            Parametrisation::Separate | Parametrisation::NormLinear => {
                (self.towards(axis) - self.towards(opposite)) * 0.5
            }
        };
        (
            block(Direction::Right, Direction::Left) / w as f32,
            block(Direction::Down, Direction::Up) / h as f32,
        )
    }

    /// `‖AB − BA‖_F / (‖A‖_F ‖B‖_F)`: mixed derivatives agree only where it is 0.
    pub fn commutator(&self) -> f64 {
        let (a, b) = self.generators([1, 1]);
        let (a, b) = (a.detach(), b.detach());
        let commutator = a.clone().matmul(b.clone()) - b.clone().matmul(a.clone());
        frobenius(commutator) / (frobenius(a) * frobenius(b))
    }

    fn axis(&self, direction: Direction) -> Tensor<2> {
        self.matrix(usize::from(direction.is_vertical()))
    }

    fn towards(&self, direction: Direction) -> Tensor<2> {
        self.matrix(2 * usize::from(direction.is_vertical()) + usize::from(direction.is_positive()))
    }

    fn matrix(&self, i: usize) -> Tensor<2> {
        self.matrices
            .val()
            .slice_dim(0, i..i + 1)
            .squeeze_dim::<2>(0)
    }
}

/// `M z` at every position: `[C, C]`, `[N, T, C]` to `[N, T, C]`. With channels last that is `z Mᵀ`.
fn apply(m: Tensor<2>, z: Tensor<3>) -> Tensor<3> {
    count(&z);
    qbheat_kernels::linear(z, m, None)
}

/// `z + sign·M z` at every position, with a sign for each image.
fn move_by(m: Tensor<2>, z: Tensor<3>, signs: Vec<f32>) -> Tensor<3> {
    count(&z);
    qbheat_kernels::linear_step(z, m, signs)
}

fn count(z: &Tensor<3>) {
    let [n, t, c] = z.dims();
    spend(n * t * c * c);
}

/// ẑ = (z − mean)/√(variance + 1e-6) over the channels of each position (the biased variance, as in layer norm).
fn normalise_channels(z: Tensor<3>) -> Tensor<3> {
    let centred = z.clone() - z.mean_dim(2);
    let variance = (centred.clone() * centred.clone()).mean_dim(2);
    centred / (variance + NORM_EPSILON).sqrt()
}

/// `e^M` by scaling and squaring of a Taylor series, in ordinary matrix products and hence differentiable.
///
/// M is halved until its largest column sum is at most ½; a series of eight terms then leaves an error of
/// (½)⁹/9! ≈ 5e-9.
pub fn matrix_exponential(m: Tensor<2>) -> Tensor<2> {
    const TERMS: usize = 8;
    let [size, _] = m.dims();
    let norm: f32 = m.clone().detach().abs().sum_dim(0).max().into_scalar();
    let halvings = if norm.is_finite() && norm > 0.5 {
        (norm / 0.5).log2().ceil() as i32
    } else {
        0
    };
    let m = m * 0.5f32.powi(halvings);
    let identity = Tensor::<2>::eye(size, &m.device());
    // Horner: I + M/1 (I + M/2 (I + M/3 (…))).
    let series = (1..=TERMS).rev().fold(identity.clone(), |inner, k| {
        identity.clone() + (m.clone() / k as f32).matmul(inner)
    });
    (0..halvings).fold(series, |power, _| power.clone().matmul(power))
}

fn frobenius(m: Tensor<2>) -> f64 {
    let squares: f32 = (m.clone() * m).sum().into_scalar();
    f64::from(squares).sqrt()
}
