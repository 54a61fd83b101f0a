//! Depthwise 3×3 convolutions with a border of one, on bands of rows in a scratch image that has the border around it.
//!
//! Vectors go over channels; the nine weights of a vector's channels stay in registers while it goes over the band.

use pulp::{Simd, WithSimd};

use crate::simd::{arch, splat, within};

/// Taps of a kernel.
pub const TAPS: usize = 9;

/// Extents of a map and of the result.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub stride: usize,
}

impl Geometry {
    pub fn rows(&self) -> usize {
        self.height.div_ceil(self.stride)
    }

    pub fn columns(&self) -> usize {
        self.width.div_ceil(self.stride)
    }

    /// Rows of the result that one band makes, so that its scratch images stay in a core's cache.
    pub fn band(&self) -> usize {
        self.band_within(40_000)
    }

    /// As [`Self::band`], for scratch images of so many floats.
    pub fn band_within(&self, floats: usize) -> usize {
        let per_row = (self.width + 2) * self.channels * self.stride;
        (floats / per_row).clamp(1, self.rows())
    }
}

/// Weights `[C, 1, 3, 3]` by tap: `[9, C]`, backwards where `flipped`.
pub fn by_tap(weight: &[f32], flipped: bool) -> Vec<f32> {
    let channels = weight.len() / TAPS;
    (0..TAPS)
        .flat_map(|tap| {
            let tap = if flipped { TAPS - 1 - tap } else { tap };
            (0..channels).map(move |channel| weight[channel * TAPS + tap])
        })
        .collect()
}

/// The inverse of [`by_tap`].
pub fn by_channel(taps: &[f32]) -> Vec<f32> {
    let channels = taps.len() / TAPS;
    (0..channels)
        .flat_map(|channel| (0..TAPS).map(move |tap| taps[tap * channels + channel]))
        .collect()
}

/// Rows of an image with a column of zeros on either side; rows outside of the image are zeros too.
pub struct Padded {
    values: Vec<f32>,
    width: usize,
    channels: usize,
}

impl Padded {
    /// Room for `rows` rows.
    pub fn new(rows: usize, width: usize, channels: usize) -> Self {
        Self {
            values: vec![0.0; rows * (width + 2) * channels],
            width,
            channels,
        }
    }

    /// Fills the rows from image row `first` on, which may lie outside of `0..height`; `row` writes one of the image's.
    pub fn fill(
        &mut self,
        first: isize,
        count: usize,
        height: usize,
        mut row: impl FnMut(usize, &mut [f32]),
    ) {
        let pitch = self.pitch();
        let inner = self.channels..self.channels + self.width * self.channels;
        for (i, target) in self.values.chunks_exact_mut(pitch).take(count).enumerate() {
            let target = &mut target[inner.clone()];
            match usize::try_from(first + i as isize) {
                Ok(y) if y < height => row(y, target),
                _ => target.fill(0.0),
            }
        }
    }

    fn pitch(&self) -> usize {
        (self.width + 2) * self.channels
    }

    /// Floats in front of which a kernel at (row, column) of the padded image ends.
    fn end(&self, row: usize, column: usize) -> usize {
        row * self.pitch() + (column + 1) * self.channels
    }
}

/// One vector's channels, or its first ones.
#[derive(Clone, Copy)]
struct Block<S: Simd, const PART: bool> {
    simd: S,
    first: usize,
    rest: pulp::MemMask<S::m32s>,
}

impl<S: Simd, const PART: bool> Block<S, PART> {
    /// # Safety
    /// The block's channels at `from` may be read.
    #[inline(always)]
    unsafe fn load(&self, from: *const f32) -> S::f32s {
        unsafe {
            let from = from.add(self.first);
            if PART {
                self.simd.mask_load_ptr_f32s(self.rest, from)
            } else {
                from.cast::<S::f32s>().read_unaligned()
            }
        }
    }

    /// # Safety
    /// The block's channels at `to` may be written.
    #[inline(always)]
    unsafe fn store(&self, to: *mut f32, values: S::f32s) {
        unsafe {
            let to = to.add(self.first);
            if PART {
                self.simd.mask_store_ptr_f32s(self.rest, to, values);
            } else {
                to.cast::<S::f32s>().write_unaligned(values);
            }
        }
    }

    /// # Safety
    /// `taps` holds nine times as many floats as there are channels.
    #[inline(always)]
    unsafe fn taps(&self, taps: *const f32, channels: usize) -> [S::f32s; TAPS] {
        let mut loaded = [self.simd.splat_f32s(0.0); TAPS];
        for (tap, vector) in loaded.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *vector = unsafe { self.load(taps.add(tap * channels)) };
        }
        loaded
    }
}

/// A loop over a band that does the same for every vector's channels.
trait Loop {
    fn channels(&self) -> usize;

    /// # Safety
    /// The extents must have been checked against what is read and written.
    unsafe fn run<S: Simd, const PART: bool>(&self, block: Block<S, PART>);
}

/// Runs a loop over all channels, a vector at a time.
struct OverChannels<L>(L);

impl<L: Loop> WithSimd for OverChannels<L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let channels = self.0.channels();
        for first in (0..channels).step_by(S::F32_LANES) {
            let filled = (channels - first).min(S::F32_LANES);
            let rest = simd.mask_between_m32s(0, filled as u32);
            // SAFETY: whoever made the loop has checked its extents.
            unsafe {
                if filled == S::F32_LANES {
                    self.0.run(Block::<S, false> { simd, first, rest });
                } else {
                    self.0.run(Block::<S, true> { simd, first, rest });
                }
            }
        }
    }
}

/// `out[y, x] = Σ taps[ky, kx]·image[y·stride + ky, x·stride + kx]` for `rows`×`columns` positions.
pub fn convolve(image: &Padded, taps: &[f32], stride: usize, size: [usize; 2], out: &mut [f32]) {
    run(image, taps, stride, size, &[], None, out);
}

/// As [`convolve`], onto a bias `[C]` and every entry brought within bounds, if there are any.
pub fn convolve_within(
    image: &Padded,
    taps: &[f32],
    stride: usize,
    size: [usize; 2],
    (bias, bounds): (&[f32], Option<[f32; 2]>),
    out: &mut [f32],
) {
    assert_eq!(bias.len(), image.channels);
    run(image, taps, stride, size, bias, bounds, out);
}

/// `bias`: empty for none.
fn run(
    image: &Padded,
    taps: &[f32],
    stride: usize,
    [rows, columns]: [usize; 2],
    bias: &[f32],
    bounds: Option<[f32; 2]>,
    out: &mut [f32],
) {
    let channels = image.channels;
    assert!(out.len() >= rows * columns * channels && taps.len() == TAPS * channels);
    assert!(
        rows == 0
            || image.end((rows - 1) * stride + 2, (columns - 1) * stride + 2) <= image.values.len()
    );
    arch().dispatch(OverChannels(Convolve {
        image,
        taps,
        stride,
        rows,
        columns,
        bias,
        bounds,
        out: out.as_mut_ptr(),
    }));
}

struct Convolve<'a> {
    image: &'a Padded,
    taps: &'a [f32],
    stride: usize,
    rows: usize,
    columns: usize,
    bias: &'a [f32],
    bounds: Option<[f32; 2]>,
    out: *mut f32,
}

impl Loop for Convolve<'_> {
    fn channels(&self) -> usize {
        self.image.channels
    }

    #[inline(always)]
    unsafe fn run<S: Simd, const PART: bool>(&self, block: Block<S, PART>) {
        let channels = self.image.channels;
        let pitch = self.image.pitch();
        let simd = block.simd;
        // SAFETY: all positions lie within the padded image and within `out`.
        unsafe {
            let taps = block.taps(self.taps.as_ptr(), channels);
            let bias = if self.bias.is_empty() {
                simd.splat_f32s(0.0)
            } else {
                block.load(self.bias.as_ptr())
            };
            let bounds = self.bounds.map(|bounds| splat(simd, bounds));
            for y in 0..self.rows {
                let row = self.image.values.as_ptr().add(y * self.stride * pitch);
                let out = self.out.add(y * self.columns * channels);
                for x in 0..self.columns {
                    let corner = row.add(x * self.stride * channels);
                    let mut sums = [bias, simd.splat_f32s(0.0), simd.splat_f32s(0.0)];
                    for (tap, &weight) in taps.iter().enumerate() {
                        let pixel = block.load(corner.add(tap / 3 * pitch + tap % 3 * channels));
                        sums[tap % 3] = simd.mul_add_e_f32s(weight, pixel, sums[tap % 3]);
                    }
                    let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), sums[2]);
                    let sum = within(simd, sum, bounds);
                    block.store(out.add(x * channels), sum);
                }
            }
        }
    }
}

/// `dtaps[ky, kx] += Σ dz[y + 1, x + 1]·image[y·stride + ky, x·stride + kx]` over `rows`×`columns` positions; `dz` has its
/// border around it, as the image has.
pub fn correlate(
    image: &Padded,
    dz: &Padded,
    stride: usize,
    [rows, columns]: [usize; 2],
    dtaps: &mut [f32],
) {
    let channels = image.channels;
    assert!(dtaps.len() == TAPS * channels && dz.channels == channels && columns > 0 && rows > 0);
    assert!(image.end((rows - 1) * stride + 2, (columns - 1) * stride + 2) <= image.values.len());
    assert!(dz.end(rows, columns) <= dz.values.len());
    arch().dispatch(OverChannels(Correlate {
        image,
        dz,
        stride,
        rows,
        columns,
        dtaps: dtaps.as_mut_ptr(),
    }));
}

struct Correlate<'a> {
    image: &'a Padded,
    dz: &'a Padded,
    stride: usize,
    rows: usize,
    columns: usize,
    dtaps: *mut f32,
}

impl Loop for Correlate<'_> {
    fn channels(&self) -> usize {
        self.image.channels
    }

    #[inline(always)]
    unsafe fn run<S: Simd, const PART: bool>(&self, block: Block<S, PART>) {
        let channels = self.image.channels;
        let pitch = self.image.pitch();
        let simd = block.simd;
        // SAFETY: all positions lie within the padded images; `dtaps` holds nine rows of channels.
        unsafe {
            let into = self.dtaps;
            let mut sums = block.taps(into, channels);
            for y in 0..self.rows {
                let row = self.image.values.as_ptr().add(y * self.stride * pitch);
                let dz = self
                    .dz
                    .values
                    .as_ptr()
                    .add((y + 1) * self.dz.pitch() + channels);
                for x in 0..self.columns {
                    let corner = row.add(x * self.stride * channels);
                    let slope = block.load(dz.add(x * channels));
                    for (tap, sum) in sums.iter_mut().enumerate() {
                        let pixel = block.load(corner.add(tap / 3 * pitch + tap % 3 * channels));
                        *sum = simd.mul_add_e_f32s(slope, pixel, *sum);
                    }
                }
            }
            for (tap, &sum) in sums.iter().enumerate() {
                block.store(into.add(tap * channels), sum);
            }
        }
    }
}

/// The gradient of the image at stride 2, `rows`×`columns` of it from an even row on: each position was seen by the taps
/// that fit its parity. `dz` has its border around it; its row 1 is where the first row's middle tap was.
pub fn spread(dz: &Padded, taps: &[f32], [rows, columns]: [usize; 2], dx: &mut [f32]) {
    let channels = dz.channels;
    assert!(dx.len() >= rows * columns * channels && taps.len() == TAPS * channels);
    assert!(rows == 0 || dz.end(rows / 2 + 1, columns / 2 + 1) <= dz.values.len());
    arch().dispatch(OverChannels(Spread {
        dz,
        taps,
        rows,
        columns,
        dx: dx.as_mut_ptr(),
    }));
}

struct Spread<'a> {
    dz: &'a Padded,
    taps: &'a [f32],
    rows: usize,
    columns: usize,
    dx: *mut f32,
}

/// Along one axis: which tap saw a position of this parity, and how many places further its result stands.
const SEEN_BY: [&[(usize, usize)]; 2] = [&[(1, 0)], &[(0, 1), (2, 0)]];

impl Loop for Spread<'_> {
    fn channels(&self) -> usize {
        self.dz.channels
    }

    #[inline(always)]
    unsafe fn run<S: Simd, const PART: bool>(&self, block: Block<S, PART>) {
        let channels = self.dz.channels;
        let pitch = self.dz.pitch();
        let simd = block.simd;
        // SAFETY: all positions lie within the padded gradient and within `dx`.
        unsafe {
            let taps = block.taps(self.taps.as_ptr(), channels);
            for y in 0..self.rows {
                let out = self.dx.add(y * self.columns * channels);
                let row = self.dz.values.as_ptr().add((y / 2 + 1) * pitch + channels);
                for (parity, seen_by) in SEEN_BY.iter().enumerate() {
                    for x in (parity..self.columns).step_by(2) {
                        let mut sum = simd.splat_f32s(0.0);
                        for &(ky, down) in SEEN_BY[y % 2] {
                            for &(kx, right) in *seen_by {
                                let from = row.add(down * pitch + (x / 2 + right) * channels);
                                let slope = block.load(from);
                                sum = simd.mul_add_e_f32s(taps[ky * 3 + kx], slope, sum);
                            }
                        }
                        block.store(out.add(x * channels), sum);
                    }
                }
            }
        }
    }
}
