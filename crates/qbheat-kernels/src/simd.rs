//! The processor's vectors: choosing an instruction set, and functions that its loops are made of.
//!
//! Loops over slices are plain Rust: inside [`vectorised`] the compiler may use all that the processor has. Only where
//! sums must stay in registers are vectors written out, with `pulp`.

use std::sync::OnceLock;

use pulp::{Arch, Simd, WithSimd};

/// The best instruction set of this processor, or the lesser one that the environment variable `QBHEAT_KERNELS` names:
/// `scalar` or, on x86, `avx2`.
pub fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| match std::env::var("QBHEAT_KERNELS").as_deref() {
        Ok("scalar") => Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Ok("avx2") => pulp::x86::V3::try_new().map_or(Arch::Scalar, Arch::V3),
        _ => Arch::new(),
    })
}

/// Runs `body`, marked `#[inline(always)]` inside, with the best instruction set.
#[inline(always)]
pub fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    arch().dispatch(body)
}

/// What the vectors of an instruction set are.
#[derive(Clone, Copy)]
pub struct Vectors {
    /// Floats in one.
    pub lanes: usize,
    /// How many the processor holds at once.
    pub registers: usize,
}

impl Vectors {
    /// Those of an instruction set.
    #[inline(always)]
    pub fn of<S: Simd>() -> Self {
        Self {
            lanes: S::F32_LANES,
            registers: S::REGISTER_COUNT,
        }
    }

    /// Those in use.
    pub fn in_use() -> Self {
        struct InUse;
        impl WithSimd for InUse {
            type Output = Vectors;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> Vectors {
                Vectors::of::<S>()
            }
        }
        arch().dispatch(InUse)
    }
}

/// A new vector whose entries are to be written before they are read.
pub fn unwritten(length: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(length);
    // SAFETY: the kernels write every entry before one is read; zeroing them first would cost as much time as many a
    // kernel.
    #[allow(clippy::uninit_vec)]
    unsafe {
        values.set_len(length);
    }
    values
}

/// A vector full of each.
#[inline(always)]
pub fn splat<S: Simd>(simd: S, values: [f32; 2]) -> [S::f32s; 2] {
    values.map(|value| simd.splat_f32s(value))
}

/// The value brought within bounds, if there are any; a NaN stays one.
#[inline(always)]
pub fn within<S: Simd>(simd: S, value: S::f32s, bounds: Option<[S::f32s; 2]>) -> S::f32s {
    let Some([low, high]) = bounds else {
        return value;
    };
    let value = simd.select_f32s(simd.less_than_f32s(value, low), low, value);
    simd.select_f32s(simd.less_than_f32s(high, value), high, value)
}

/// `values[i] += others[i]`, as far as both go.
pub fn add(values: &mut [f32], others: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (value, other) in values.iter_mut().zip(others) {
                *value += other;
            }
        },
    );
}

/// Σ `term(i)` as many sums side by side, which are added pairwise at the end.
#[inline(always)]
fn reduce(length: usize, term: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 64;
    let mut sums = [0.0f32; LANES];
    let whole = length / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    for i in whole..length {
        sums[i - whole] += term(i);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Σ xᵢ
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    reduce(x.len(), |i| x[i])
}

/// Σ (xᵢ − centre)²
#[inline(always)]
pub fn squared_distances(x: &[f32], centre: f32) -> f32 {
    reduce(x.len(), |i| {
        let distance = x[i] - centre;
        distance * distance
    })
}

/// Σ xᵢ·yᵢ
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let y = &y[..x.len()];
    reduce(x.len(), |i| x[i] * y[i])
}

/// The largest entry.
#[inline(always)]
pub fn largest(x: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut most = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (most, &value) in most.iter_mut().zip(chunk) {
            *most = if value > *most { value } else { *most };
        }
    }
    rest.iter()
        .chain(&most)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

/// eˣ to two units in the last place, e⁻⁸⁷ below −87; for x up to 88.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding it rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first of few digits, so that its products with n are exact.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let series = 0.5
        + r * (0.166_666_65
            + r * (0.041_665_795 + r * (0.008_333_452 + r * (1.398_2e-3 + r * 1.987_569_1e-4))));
    let value = 1.0 + r + r * r * series;
    let power = (shifted.to_bits() << 23).wrapping_add(127 << 23);
    value * f32::from_bits(power)
}

/// The Gauss error function to 5e-7.
#[inline(always)]
fn erf(x: f32) -> f32 {
    // Rational approximation on [−4, 4], beyond which the value is ±1 in single precision.
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let p = -1.609_603_3e-2
        + s * (-2.954_6e-3
            + s * (-7.349_906e-4
                + s * (-5.692_506_5e-5
                    + s * (-2.101_024e-6 + s * (2.770_681_4e-8 + s * -2.726_142_3e-10)))));
    let q = -1.426_473_9e-2
        + s * (-7.373_329e-3 + s * (-1.682_827e-3 + s * (-2.133_740_5e-4 + s * -1.456_607_2e-5)));
    // At ±4 the quotient is one unit short of ±1, which a large x would make much of.
    if x.abs() < 4.0 { x * p / q } else { x * 0.25 }
}

/// x·Φ(x) (Hendrycks and Gimpel, arXiv 1606.08415), with the error function, not its approximation by tanh.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// GELU and its derivative, Φ(x) + x·φ(x).
#[inline(always)]
pub fn gelu_with_derivative(x: f32) -> (f32, f32) {
    let below = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    // 1/√(2π)
    let density = 0.398_942_3 * exp(-0.5 * x * x);
    (x * below, below + x * density)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By its Taylor series in double precision, which converges everywhere.
    fn exact_erf(x: f64) -> f64 {
        let mut term = x;
        let mut sum = x;
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn erf_and_exp_are_as_good_as_single_precision() {
        for i in -4000..=4000 {
            let x = i as f32 / 1000.0;
            let wrong = f64::from(erf(x)) - exact_erf(f64::from(x));
            assert!(wrong.abs() < 5e-7, "erf({x}) is wrong by {wrong}");
        }
        for i in -8600..=8700 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            let wrong = (f64::from(exp(x)) - exact) / exact;
            assert!(wrong.abs() < 2.5e-7, "exp({x}) is wrong by {wrong}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn sums_cover_every_entry() {
        for length in [0, 1, 15, 63, 64, 65, 200] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let expected: f32 = x.iter().sum();
            assert_eq!(sum(&x), expected);
            assert_eq!(dot(&x, &vec![2.0; length]), 2.0 * expected);
            let squares: f32 = x.iter().map(|x| (x - 1.0) * (x - 1.0)).sum();
            assert_eq!(squared_distances(&x, 1.0), squares);
            let most = x.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(largest(&x), most);
        }
    }
}
