//! Products of a tall matrix and a small one, the shape of every layer of a light network: thousands of rows
//! (positions of a batch), tens to hundreds of columns (channels).
//!
//! The small side is packed once into panels as wide as two or three vectors; tiles of the result stay in registers.
//! Nothing here runs on more than one thread: callers cut the rows into pieces.

use std::marker::PhantomData;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::simd::{Vectors, arch, splat, within};

/// A matrix `[depth, columns]` in panels: all rows of the first panel's columns, then of the next one's. Columns are
/// filled up with zeros to a whole number of vectors.
#[derive(Default)]
pub struct Packed {
    values: Vec<f32>,
    depth: usize,
    columns: usize,
}

impl Packed {
    /// From entry (row, column) at `row·row_stride + column·column_stride`.
    pub fn new(size: [usize; 2], source: &[f32], strides: [usize; 2]) -> Self {
        let mut packed = Self::default();
        packed.fill(size, source, strides);
        packed
    }

    /// As [`Self::new`], in place of what it held.
    pub fn fill(
        &mut self,
        [depth, columns]: [usize; 2],
        source: &[f32],
        [row_stride, column_stride]: [usize; 2],
    ) {
        let vectors = Vectors::in_use();
        let length = depth * columns.next_multiple_of(vectors.lanes);
        if self.values.len() != length || !columns.is_multiple_of(vectors.lanes) {
            self.values.clear();
            self.values.resize(length, 0.0);
        }
        self.depth = depth;
        self.columns = columns;
        let fill = |(start, panel): (usize, &mut [f32])| {
            let width = panel.len() / depth;
            let filled = width.min(columns - start);
            let from = &source[start * column_stride..];
            if column_stride == 1 {
                for (row, target) in panel.chunks_exact_mut(width).enumerate() {
                    target[..filled].copy_from_slice(&from[row * row_stride..][..filled]);
                }
            } else {
                transpose(
                    panel,
                    width,
                    from,
                    filled,
                    depth,
                    [row_stride, column_stride],
                );
            }
        };
        let mut rest = &mut self.values[..];
        let panels = panels(columns, vectors).map(|(start, width)| {
            let (panel, more) = std::mem::take(&mut rest).split_at_mut(depth * width);
            rest = more;
            (start, panel)
        });
        if length < PARALLEL {
            panels.for_each(fill);
        } else {
            panels.collect::<Vec<_>>().into_par_iter().for_each(fill);
        }
    }
}

/// Weights of fewer entries are packed on one thread.
const PARALLEL: usize = 1 << 15;

/// `panel[row·width + column] = from[row·row_stride + column·column_stride]`, in squares that fit the cache's lines.
fn transpose(
    panel: &mut [f32],
    width: usize,
    from: &[f32],
    columns: usize,
    rows: usize,
    [row_stride, column_stride]: [usize; 2],
) {
    const SQUARE: usize = 16;
    for first_row in (0..rows).step_by(SQUARE) {
        let last_row = rows.min(first_row + SQUARE);
        for column in 0..columns {
            let from = &from[column * column_stride..];
            for row in first_row..last_row {
                panel[row * width + column] = from[row * row_stride];
            }
        }
    }
}

/// Start and width of each panel; widths are whole numbers of vectors.
#[inline(always)]
fn panels(columns: usize, vectors: Vectors) -> impl Iterator<Item = (usize, usize)> {
    let whole = columns.next_multiple_of(vectors.lanes);
    let width = vectors.lanes * if has_many(vectors) { 3 } else { 2 };
    (0..whole)
        .step_by(width)
        .map(move |start| (start, (whole - start).min(width)))
}

/// Whether there are registers for tiles of eight rows and three vectors: their sums, a row of the small side and an entry
/// of the tall one are 28. Tiles of six rows and two vectors take 15.
#[inline(always)]
fn has_many(vectors: Vectors) -> bool {
    vectors.registers >= 32
}

/// What the result is added to.
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    /// Nothing.
    Zero,
    /// A row, the same for all, `[columns]`.
    Row(&'a [f32]),
}

/// Rows of a matrix, each `stride` behind the one before.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    values: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    pub fn new(values: &'a [f32], stride: usize) -> Self {
        Self { values, stride }
    }

    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// Without the first ones.
    pub fn after(&self, rows: usize) -> Self {
        Self::new(&self.values[rows * self.stride..], self.stride)
    }

    fn check(&self, rows: usize, columns: usize) {
        check(self.values.len(), self.stride, rows, columns);
    }
}

/// Rows that are written, each `stride` behind the one before.
pub struct RowsMut<'a> {
    start: *mut f32,
    /// Floats from the first one to the last.
    length: usize,
    stride: usize,
    /// Most columns that belong to it.
    width: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: nobody else has the floats that belong to it, as with the slice that it was made of.
unsafe impl Send for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    pub fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self {
            start: values.as_mut_ptr(),
            length: values.len(),
            stride,
            width: stride,
            of: PhantomData,
        }
    }

    /// Cut into bands of so many columns, side by side, each of which may be written by another thread.
    pub fn bands(self, width: usize) -> impl Iterator<Item = Self> {
        assert!(width > 0 && self.width.is_multiple_of(width) && self.length >= self.width);
        (0..self.width).step_by(width).map(move |column| Self {
            // SAFETY: within the first row; no two bands have a column in common.
            start: unsafe { self.start.add(column) },
            length: self.length - column,
            width,
            ..self
        })
    }

    /// Without the first rows, or with all of them, for as long as the whole is not used.
    pub fn after(&mut self, rows: usize) -> RowsMut<'_> {
        let floats = rows * self.stride;
        assert!(floats < self.length);
        RowsMut {
            // SAFETY: within the floats that it has.
            start: unsafe { self.start.add(floats) },
            length: self.length - floats,
            ..*self
        }
    }

    fn check(&self, rows: usize, columns: usize) {
        assert!(columns <= self.width);
        check(self.length, self.stride, rows, columns);
    }
}

fn check(length: usize, stride: usize, rows: usize, columns: usize) {
    assert!(length >= (rows - 1) * stride + columns);
}

/// As [`multiply`] onto a row, every entry brought within bounds, if there are any.
pub fn multiply_within(
    rows: usize,
    a: &[f32],
    b: &Packed,
    bias: &[f32],
    bounds: Option<[f32; 2]>,
    c: &mut [f32],
) {
    let (a, c) = (Rows::new(a, b.depth), RowsMut::new(c, b.columns));
    run(rows, a, b, Onto::Row(bias), bounds, c);
}

/// `c[i, j] = onto + Σ_p a[i, p]·b[p, j]` with rows of `a` and `c` following each other without gap.
///
/// `a`: `[rows, depth]`, `c`: `[rows, columns]`.
pub fn multiply(rows: usize, a: &[f32], b: &Packed, onto: Onto, c: &mut [f32]) {
    let (a, c) = (Rows::new(a, b.depth), RowsMut::new(c, b.columns));
    multiply_rows(rows, a, b, onto, c);
}

/// As [`multiply`], with rows of `a` and `c` anywhere.
pub fn multiply_rows(rows: usize, a: Rows, b: &Packed, onto: Onto, c: RowsMut) {
    run(rows, a, b, onto, None, c);
}

fn run(rows: usize, a: Rows, b: &Packed, onto: Onto, bounds: Option<[f32; 2]>, c: RowsMut) {
    if rows == 0 {
        return;
    }
    a.check(rows, b.depth);
    c.check(rows, b.columns);
    if let Onto::Row(row) = onto {
        assert_eq!(row.len(), b.columns);
    }
    arch().dispatch(Multiply {
        rows,
        a,
        b,
        onto,
        bounds,
        c,
    });
}

struct Multiply<'a> {
    rows: usize,
    a: Rows<'a>,
    b: &'a Packed,
    onto: Onto<'a>,
    bounds: Option<[f32; 2]>,
    c: RowsMut<'a>,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            rows,
            a,
            b,
            onto,
            bounds,
            c,
        } = self;
        let mut panel = b.values.as_ptr();
        for (start, width) in panels(b.columns, Vectors::of::<S>()) {
            let bias = match onto {
                Onto::Zero => std::ptr::null(),
                Onto::Row(row) => row[start..].as_ptr(),
            };
            let tiles = Tiles {
                a: a.values.as_ptr(),
                a_strides: [a.stride, 1],
                b: panel,
                b_stride: width,
                depth: b.depth,
                // SAFETY: a column of the first row.
                c: unsafe { c.start.add(start) },
                c_stride: c.stride,
                filled: width.min(b.columns - start),
                bias,
                add: false,
                bounds,
            };
            // SAFETY: the lengths were checked in `run`; a panel holds `depth` rows of `width`.
            unsafe {
                tiles.all(simd, rows, width / S::F32_LANES);
                panel = panel.add(b.depth * width);
            }
        }
    }
}

/// `c[i, j] (+)= Σ_r a[r, i]·b[r, j]`, the gradient of a weight from rows of both sides.
///
/// `a`: `[rows, m]`, `b`: `[rows, n]`, `c`: `[m, n]`; adds to `c` where `add`.
pub fn multiply_transposed(
    rows: usize,
    [m, n]: [usize; 2],
    a: &[f32],
    b: &[f32],
    add: bool,
    c: &mut [f32],
) {
    let (a, b, c) = (Rows::new(a, m), Rows::new(b, n), RowsMut::new(c, n));
    multiply_rows_transposed(rows, [m, n], a, b, add, c);
}

/// As [`multiply_transposed`], with rows anywhere.
pub fn multiply_rows_transposed(
    rows: usize,
    [m, n]: [usize; 2],
    a: Rows,
    b: Rows,
    add: bool,
    c: RowsMut,
) {
    assert!(rows > 0 && m > 0);
    a.check(rows, m);
    b.check(rows, n);
    c.check(m, n);
    arch().dispatch(MultiplyTransposed {
        rows,
        m,
        n,
        a,
        b,
        add,
        c,
    });
}

struct MultiplyTransposed<'a> {
    rows: usize,
    m: usize,
    n: usize,
    a: Rows<'a>,
    b: Rows<'a>,
    add: bool,
    c: RowsMut<'a>,
}

impl WithSimd for MultiplyTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            rows,
            m,
            n,
            a,
            b,
            add,
            c,
        } = self;
        for (start, width) in panels(n, Vectors::of::<S>()) {
            let tiles = Tiles {
                a: a.values.as_ptr(),
                a_strides: [1, a.stride],
                b: b.values[start..].as_ptr(),
                b_stride: b.stride,
                depth: rows,
                // SAFETY: a column of the first row.
                c: unsafe { c.start.add(start) },
                c_stride: c.stride,
                filled: width.min(n - start),
                bias: std::ptr::null(),
                add,
                bounds: None,
            };
            // SAFETY: the lengths were checked in `multiply_rows_transposed`.
            unsafe { tiles.all(simd, m, width / S::F32_LANES) };
        }
    }
}

/// Tiles of one panel's columns.
#[derive(Clone, Copy)]
struct Tiles {
    a: *const f32,
    /// Between rows of the result, and along the depth.
    a_strides: [usize; 2],
    b: *const f32,
    b_stride: usize,
    depth: usize,
    c: *mut f32,
    c_stride: usize,
    /// How many floats of a row of the panel belong to the matrices.
    filled: usize,
    /// Null, or what every row starts from.
    bias: *const f32,
    add: bool,
    /// Least and largest result.
    bounds: Option<[f32; 2]>,
}

impl Tiles {
    /// # Safety
    /// All rows `0..rows` and all columns of the panel lie within the three matrices.
    #[inline(always)]
    unsafe fn all<S: Simd>(self, simd: S, rows: usize, vectors: usize) {
        unsafe {
            match vectors {
                3 if has_many(Vectors::of::<S>()) => self.rows::<S, 3>(simd, rows),
                2 => self.rows::<S, 2>(simd, rows),
                _ => self.rows::<S, 1>(simd, rows),
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const V: usize>(mut self, simd: S, rows: usize) {
        let mut left = rows;
        unsafe {
            if has_many(Vectors::of::<S>()) {
                while left >= 8 {
                    self.tile::<S, 8, V>(simd);
                    self.advance(8);
                    left -= 8;
                }
            } else {
                while left >= 6 {
                    self.tile::<S, 6, V>(simd);
                    self.advance(6);
                    left -= 6;
                }
            }
            if left >= 4 {
                self.tile::<S, 4, V>(simd);
                self.advance(4);
                left -= 4;
            }
            if left >= 2 {
                self.tile::<S, 2, V>(simd);
                self.advance(2);
                left -= 2;
            }
            if left == 1 {
                self.tile::<S, 1, V>(simd);
            }
        }
    }

    #[inline(always)]
    fn advance(&mut self, rows: usize) {
        self.a = self.a.wrapping_add(rows * self.a_strides[0]);
        self.c = self.c.wrapping_add(rows * self.c_stride);
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(&self, simd: S) {
        unsafe {
            if self.filled == V * S::F32_LANES {
                self.tile_of::<S, R, V, false>(simd);
            } else {
                self.tile_of::<S, R, V, true>(simd);
            }
        }
    }

    /// `PART`: the last vector of a row is not whole.
    ///
    /// The loops before and behind the one over the depth stay so small that the compiler unrolls them; else it would
    /// keep the sums in memory.
    #[inline(always)]
    unsafe fn tile_of<S: Simd, const R: usize, const V: usize, const PART: bool>(&self, simd: S) {
        let lanes = S::F32_LANES;
        let filled = self.filled - (V - 1) * lanes;
        let rest = simd.mask_between_m32s(0, filled as u32);
        unsafe {
            let load = |row: *const f32, j: usize| {
                let from = row.add(j * lanes);
                if PART && j == V - 1 {
                    simd.mask_load_ptr_f32s(rest, from)
                } else {
                    from.cast::<S::f32s>().read_unaligned()
                }
            };
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            if self.add {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = load(self.c.add(i * self.c_stride), j);
                    }
                }
            } else if !self.bias.is_null() {
                for sums in &mut sums {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = load(self.bias, j);
                    }
                }
            }
            let mut b = self.b;
            let mut a = self.a;
            for _ in 0..self.depth {
                let mut row = [simd.splat_f32s(0.0); V];
                for (j, vector) in row.iter_mut().enumerate() {
                    *vector = load(b, j);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = simd.splat_f32s(*a.add(i * self.a_strides[0]));
                    for (sum, &vector) in sums.iter_mut().zip(&row) {
                        *sum = simd.mul_add_e_f32s(x, vector, *sum);
                    }
                }
                // Beyond the end after the last turn, where nothing is read any more.
                b = b.wrapping_add(self.b_stride);
                a = a.wrapping_add(self.a_strides[1]);
            }
            let bounds = self.bounds.map(|bounds| splat(simd, bounds));
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    let sum = within(simd, sum, bounds);
                    let to = self.c.add(i * self.c_stride + j * lanes);
                    if PART && j == V - 1 {
                        simd.mask_store_ptr_f32s(rest, to, sum);
                    } else {
                        to.cast::<S::f32s>().write_unaligned(sum);
                    }
                }
            }
        }
    }
}
