//! Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) and the activation behind it, as a convolution's
//! neighbours see them: applied while reading, undone while going back.

use crate::array::Array;
use crate::simd::vectorised;

/// What follows a normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// max(v, 0)
    Relu,
    /// min(max(v, 0), 6)
    Relu6,
    /// max(a₁·v, a₂·v) with a₁ and a₂ of each sample and channel (Chen et al., arXiv 2003.10027).
    Dynamic,
}

/// Mean and sum of squared distances from it, of each column of some rows.
pub struct Moments {
    rows: usize,
    mean: Vec<f32>,
    squares: Vec<f32>,
}

impl Moments {
    /// Of rows of `columns` numbers.
    pub fn of(values: &[f32], columns: usize) -> Self {
        let rows = values.len() / columns;
        let tile = tile(columns);
        // Distances from the first row: small beside the values where these are far from 0.
        let origin = &values[..columns];
        let from = tiled(origin, tile);
        let (mut sums, mut squares) = (vec![0.0; tile], vec![0.0; tile]);
        vectorised(
            #[inline(always)]
            || {
                for values in values.chunks(tile) {
                    let length = values.len();
                    let (from, sums) = (&from[..length], &mut sums[..length]);
                    let squares = &mut squares[..length];
                    for i in 0..length {
                        let distance = values[i] - from[i];
                        sums[i] += distance;
                        squares[i] += distance * distance;
                    }
                }
            },
        );
        let (sums, mut squares) = (fold(sums, columns), fold(squares, columns));
        let mut mean = origin.to_vec();
        for ((mean, square), sum) in mean.iter_mut().zip(&mut squares).zip(sums) {
            let off = sum / rows as f32;
            *mean += off;
            *square -= sum * off;
            if *square < 0.0 {
                *square = 0.0;
            }
        }
        Self {
            rows,
            mean,
            squares,
        }
    }
}

/// Mean and biased variance of each column, of parts taken together in their order.
pub fn combine(parts: &[Moments], columns: usize) -> (Vec<f32>, Vec<f32>) {
    let total = parts.iter().map(|part| part.rows).sum::<usize>() as f64;
    let mut means = vec![0.0f64; columns];
    for part in parts {
        for (sum, &mean) in means.iter_mut().zip(&part.mean) {
            *sum += f64::from(mean) * part.rows as f64;
        }
    }
    means.iter_mut().for_each(|mean| *mean /= total);
    let mut variances = vec![0.0f64; columns];
    for part in parts {
        for (column, sum) in variances.iter_mut().enumerate() {
            let distance = f64::from(part.mean[column]) - means[column];
            *sum += f64::from(part.squares[column]) + distance * distance * part.rows as f64;
        }
    }
    variances.iter_mut().for_each(|variance| *variance /= total);
    let single = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
    (single(means), single(variances))
}

/// Length of several rows that fill whole vectors, so that no loop over a few columns is left with a remainder.
fn tile(columns: usize) -> usize {
    const FULL: usize = 64;
    let mut rows = 1;
    while !(rows * columns).is_multiple_of(16) && rows < 16 {
        rows *= 2;
    }
    columns * (rows * (FULL / (rows * columns)).max(1))
}

/// `values` over and over.
fn tiled(values: &[f32], length: usize) -> Vec<f32> {
    values.iter().copied().cycle().take(length).collect()
}

/// The inverse for sums.
fn fold(mut sums: Vec<f32>, columns: usize) -> Vec<f32> {
    for i in columns..sums.len() {
        sums[i % columns] += sums[i];
    }
    sums.truncate(columns);
    sums
}

/// A convolution's result, `[rows, C]`, and what follows it: v = scale·z + shift, y = activation(v).
pub struct Behind {
    /// None where it is not kept.
    z: Option<Array>,
    columns: usize,
    mean: Array,
    /// Reciprocal deviations.
    inverse: Vec<f32>,
    gamma: Array,
    /// Tiled.
    scale: Vec<f32>,
    shift: Vec<f32>,
    centre: Vec<f32>,
    activation: Activation,
    /// For [`Activation::Dynamic`], `[N, 2·C]`: a₁, then a₂ of each sample.
    theta: Option<Array>,
    rows_per_sample: usize,
}

/// Σ g and Σ g·(z − mean) of each column, g the gradient of v.
pub struct Sums {
    level: Vec<f64>,
    along: Vec<f64>,
}

impl Sums {
    pub fn zero(columns: usize) -> Self {
        Self {
            level: vec![0.0; columns],
            along: vec![0.0; columns],
        }
    }

    /// Of parts, first to last.
    pub fn of(parts: &[Self], columns: usize) -> Self {
        let mut total = Self::zero(columns);
        for part in parts {
            for (sums, more) in [
                (&mut total.level, &part.level),
                (&mut total.along, &part.along),
            ] {
                for (sum, more) in sums.iter_mut().zip(more) {
                    *sum += more;
                }
            }
        }
        total
    }
}

/// The gradient of z as `g·k1 − z·k2 + k3`, tiled, and those of scale and shift.
pub struct Slopes {
    coefficients: [Vec<f32>; 3],
    pub gamma: Vec<f32>,
    pub beta: Vec<f32>,
}

/// Statistics and parameters of a normalisation, `[C]` each.
pub struct Parameters {
    pub mean: Array,
    pub variance: Array,
    pub gamma: Array,
    pub beta: Array,
    pub epsilon: f32,
}

impl Behind {
    pub fn new(
        z: Option<Array>,
        parameters: Parameters,
        activation: Activation,
        theta: Option<Array>,
        rows_per_sample: usize,
    ) -> Self {
        let Parameters {
            mean,
            variance,
            gamma,
            beta,
            epsilon,
        } = parameters;
        let columns = mean.len();
        let tile = tile(columns);
        let inverse: Vec<f32> = variance
            .iter()
            .map(|variance| 1.0 / (variance + epsilon).sqrt())
            .collect();
        let scale: Vec<f32> = gamma.iter().zip(&inverse).map(|(g, i)| g * i).collect();
        let shift: Vec<f32> = (0..columns).map(|c| beta[c] - mean[c] * scale[c]).collect();
        Self {
            z,
            columns,
            centre: tiled(&mean, tile),
            mean,
            inverse,
            gamma,
            scale: tiled(&scale, tile),
            shift: tiled(&shift, tile),
            activation,
            theta,
            rows_per_sample,
        }
    }

    pub fn activation(&self) -> Activation {
        self.activation
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows `start..start+count` in runs that lie in one sample: number of the sample, first row, number of rows.
    fn runs(&self, start: usize, count: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let per_sample = match self.activation {
            Activation::Dynamic => self.rows_per_sample,
            _ => usize::MAX,
        };
        let end = start + count;
        let mut next = start;
        std::iter::from_fn(move || {
            (next < end).then(|| {
                let sample = next / per_sample;
                let last = end.min((sample + 1).saturating_mul(per_sample));
                let run = (sample, next, last - next);
                next = last;
                run
            })
        })
    }

    fn slopes_of(&self, sample: usize) -> [Vec<f32>; 2] {
        let Some(theta) = &self.theta else {
            return [Vec::new(), Vec::new()];
        };
        let theta = &theta[sample * 2 * self.columns..][..2 * self.columns];
        let (first, second) = theta.split_at(self.columns);
        [first, second].map(|slopes| tiled(slopes, self.scale.len()))
    }

    fn z(&self, start: usize, count: usize) -> &[f32] {
        let z = self.z.as_ref().expect("z is kept where it is read");
        &z[start * self.columns..][..count * self.columns]
    }

    /// y of rows `start..`, as many as `y` holds.
    pub fn apply(&self, start: usize, y: &mut [f32]) {
        let tile = self.scale.len();
        let mut rest = y;
        for (sample, first, count) in self.runs(start, rest.len() / self.columns) {
            let (y, more) = rest.split_at_mut(count * self.columns);
            rest = more;
            let z = self.z(first, count);
            let slopes = self.slopes_of(sample);
            vectorised(
                #[inline(always)]
                || {
                    for (y, z) in y.chunks_mut(tile).zip(z.chunks(tile)) {
                        self.activate(z, &slopes, y);
                    }
                },
            );
        }
    }

    /// Turns z, rows `start..`, into y where it stands.
    pub fn apply_in_place(&self, start: usize, z: &mut [f32]) {
        let tile = self.scale.len();
        let mut copy = vec![0.0; tile];
        let mut rest = z;
        for (sample, _, count) in self.runs(start, rest.len() / self.columns) {
            let (values, more) = rest.split_at_mut(count * self.columns);
            rest = more;
            let slopes = self.slopes_of(sample);
            vectorised(
                #[inline(always)]
                || {
                    for values in values.chunks_mut(tile) {
                        let copy = &mut copy[..values.len()];
                        copy.copy_from_slice(values);
                        self.activate(copy, &slopes, values);
                    }
                },
            );
        }
    }

    /// y of at most one tile.
    #[inline(always)]
    fn activate(&self, z: &[f32], slopes: &[Vec<f32>; 2], y: &mut [f32]) {
        let length = y.len();
        let (z, scale, shift) = (&z[..length], &self.scale[..length], &self.shift[..length]);
        match self.activation {
            Activation::Identity => {
                for i in 0..length {
                    y[i] = z[i] * scale[i] + shift[i];
                }
            }
            Activation::Relu => {
                for i in 0..length {
                    let v = z[i] * scale[i] + shift[i];
                    // Not `max`, which would make a NaN 0.
                    y[i] = if v < 0.0 { 0.0 } else { v };
                }
            }
            Activation::Relu6 => {
                for i in 0..length {
                    y[i] = (z[i] * scale[i] + shift[i]).clamp(0.0, 6.0);
                }
            }
            Activation::Dynamic => {
                let (a, b) = (&slopes[0][..length], &slopes[1][..length]);
                for i in 0..length {
                    let v = z[i] * scale[i] + shift[i];
                    y[i] = (a[i] * v).max(b[i] * v);
                }
            }
        }
    }

    /// Adds rows `start..` to the sums; `dtheta` belongs to the samples from number `first_sample` on.
    pub fn add_sums(
        &self,
        start: usize,
        dy: &[f32],
        sums: &mut Sums,
        first_sample: usize,
        dtheta: &mut [f32],
    ) {
        let columns = self.columns;
        let tile = self.scale.len();
        let mut rest = dy;
        for (sample, first, count) in self.runs(start, dy.len() / columns) {
            let (dy, more) = rest.split_at(count * columns);
            rest = more;
            let z = self.z(first, count);
            let slopes = self.slopes_of(sample);
            let mut found = [vec![0.0; tile], vec![0.0; tile]];
            let mut dslopes = slopes.clone();
            dslopes.iter_mut().for_each(|slopes| slopes.fill(0.0));
            vectorised(
                #[inline(always)]
                || {
                    for (dy, z) in dy.chunks(tile).zip(z.chunks(tile)) {
                        if self.activation == Activation::Dynamic {
                            self.add_slopes(dy, z, &slopes, &mut dslopes);
                        }
                        let length = dy.len();
                        let [level, along] = &mut found;
                        let (level, along) = (&mut level[..length], &mut along[..length]);
                        let (z, centre) = (&z[..length], &self.centre[..length]);
                        self.each_gradient(dy, z, &slopes, |i, g| {
                            level[i] += g;
                            along[i] += g * (z[i] - centre[i]);
                        });
                    }
                },
            );
            let [level, along] = found.map(|found| fold(found, columns));
            for (sums, found) in [(&mut sums.level, level), (&mut sums.along, along)] {
                for (sum, found) in sums.iter_mut().zip(found) {
                    *sum += f64::from(found);
                }
            }
            if self.activation == Activation::Dynamic {
                let target = &mut dtheta[(sample - first_sample) * 2 * columns..][..2 * columns];
                for (target, found) in target.chunks_mut(columns).zip(dslopes) {
                    for (sum, found) in target.iter_mut().zip(fold(found, columns)) {
                        *sum += found;
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn add_slopes(
        &self,
        dy: &[f32],
        z: &[f32],
        slopes: &[Vec<f32>; 2],
        dslopes: &mut [Vec<f32>; 2],
    ) {
        let length = dy.len();
        let (z, scale, shift) = (&z[..length], &self.scale[..length], &self.shift[..length]);
        let (a, b) = (&slopes[0][..length], &slopes[1][..length]);
        let [da, db] = dslopes;
        let (da, db) = (&mut da[..length], &mut db[..length]);
        for i in 0..length {
            let v = z[i] * scale[i] + shift[i];
            let gradient = dy[i] * v;
            let is_first = a[i] * v > b[i] * v;
            da[i] += if is_first { gradient } else { 0.0 };
            db[i] += if is_first { 0.0 } else { gradient };
        }
    }

    /// The gradient of v for each entry of at most one tile.
    #[inline(always)]
    fn each_gradient(
        &self,
        dy: &[f32],
        z: &[f32],
        slopes: &[Vec<f32>; 2],
        mut take: impl FnMut(usize, f32),
    ) {
        let length = dy.len();
        let (z, scale, shift) = (&z[..length], &self.scale[..length], &self.shift[..length]);
        match self.activation {
            Activation::Identity => {
                for (i, &g) in dy.iter().enumerate() {
                    take(i, g);
                }
            }
            Activation::Relu => {
                for i in 0..length {
                    // Read whether it is used or not: else the processor masks every read.
                    let (v, dy) = (z[i] * scale[i] + shift[i], dy[i]);
                    take(i, if v > 0.0 { dy } else { 0.0 });
                }
            }
            Activation::Relu6 => {
                for i in 0..length {
                    let (v, dy) = (z[i] * scale[i] + shift[i], dy[i]);
                    take(i, if v > 0.0 && v < 6.0 { dy } else { 0.0 });
                }
            }
            Activation::Dynamic => {
                let (a, b) = (&slopes[0][..length], &slopes[1][..length]);
                for i in 0..length {
                    let v = z[i] * scale[i] + shift[i];
                    let slope = if a[i] * v > b[i] * v { a[i] } else { b[i] };
                    take(i, dy[i] * slope);
                }
            }
        }
    }

    /// How the gradient of z follows from that of y. With `fixed` statistics z does not change them.
    pub fn slopes(&self, sums: &Sums, rows: usize, fixed: bool) -> Slopes {
        let mut coefficients: [Vec<f32>; 3] = Default::default();
        let (mut dgamma, mut dbeta) = (Vec::new(), Vec::new());
        let [k1, k2, k3] = &mut coefficients;
        for column in 0..self.columns {
            let inverse = f64::from(self.inverse[column]);
            let scale = f64::from(self.gamma[column]) * inverse;
            let (level, along) = (sums.level[column], sums.along[column] * inverse);
            let share = if fixed { 0.0 } else { scale / rows as f64 };
            let per_z = share * inverse * along;
            k1.push(scale as f32);
            k2.push(per_z as f32);
            k3.push((per_z * f64::from(self.mean[column]) - share * level) as f32);
            dgamma.push(along as f32);
            dbeta.push(level as f32);
        }
        Slopes {
            coefficients: coefficients.map(|values| tiled(&values, self.scale.len())),
            gamma: dgamma,
            beta: dbeta,
        }
    }

    /// The gradient of z for rows `start..`, as many as `dz` holds; `dy` starts at the same row.
    pub fn dz(&self, start: usize, dy: &[f32], slopes: &Slopes, dz: &mut [f32]) {
        let columns = self.columns;
        let tile = self.scale.len();
        let [k1, k2, k3] = &slopes.coefficients;
        let (mut rest, mut rest_of_dy) = (dz, dy);
        for (sample, first, count) in self.runs(start, rest.len() / columns) {
            let (dz, more) = rest.split_at_mut(count * columns);
            let (dy, more_dy) = rest_of_dy.split_at(count * columns);
            (rest, rest_of_dy) = (more, more_dy);
            let z = self.z(first, count);
            let slopes = self.slopes_of(sample);
            vectorised(
                #[inline(always)]
                || {
                    for ((dz, dy), z) in
                        dz.chunks_mut(tile).zip(dy.chunks(tile)).zip(z.chunks(tile))
                    {
                        let length = dz.len();
                        let (k1, k2, k3) = (&k1[..length], &k2[..length], &k3[..length]);
                        let z = &z[..length];
                        self.each_gradient(dy, z, &slopes, |i, g| {
                            dz[i] = g * k1[i] - z[i] * k2[i] + k3[i];
                        });
                    }
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_hold_whole_rows() {
        for columns in 1..400 {
            let tile = tile(columns);
            assert!(tile.is_multiple_of(columns) && tile >= columns);
            assert!(tile.is_multiple_of(16), "{columns} columns, tile of {tile}");
        }
    }

    #[test]
    fn moments_of_parts_are_those_of_the_whole() {
        let values: Vec<f32> = (0..3 * 70)
            .map(|i| ((i * 37) % 101) as f32 + 1000.0)
            .collect();
        let parts: Vec<Moments> = values
            .chunks(3 * 20)
            .map(|part| Moments::of(part, 3))
            .collect();
        let (mean, variance) = combine(&parts, 3);
        for column in 0..3 {
            let column_of: Vec<f64> = (0..70)
                .map(|row| f64::from(values[row * 3 + column]))
                .collect();
            let exact = column_of.iter().sum::<f64>() / 70.0;
            let spread = column_of.iter().map(|x| (x - exact).powi(2)).sum::<f64>() / 70.0;
            assert!((f64::from(mean[column]) - exact).abs() < 1e-4);
            assert!((f64::from(variance[column]) - spread).abs() < 1e-3 * spread);
        }
    }
}
