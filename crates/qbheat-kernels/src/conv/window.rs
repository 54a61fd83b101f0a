//! Dense convolutions as products of matrices: what each position of the result sees, in a row.

use crate::gemm::Packed;
use crate::simd::add;

/// What a position of a dense convolution's result sees.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
    pub(super) stride: usize,
    pub(super) side: usize,
    /// Of the result.
    pub(super) columns: usize,
}

impl Window {
    pub(super) fn depth(&self) -> usize {
        self.side * self.side * self.channels
    }

    /// A weight `[outputs, channels, side, side]` with channels last.
    pub(super) fn permuted(&self, weight: &[f32]) -> Vec<f32> {
        let taps = self.side * self.side;
        weight
            .chunks_exact(self.depth())
            .flat_map(|kernel| {
                (0..taps).flat_map(move |tap| {
                    (0..self.channels).map(move |channel| kernel[channel * taps + tap])
                })
            })
            .collect()
    }

    pub(super) fn unpermuted(&self, weight: &[f32]) -> Vec<f32> {
        let taps = self.side * self.side;
        weight
            .chunks_exact(self.depth())
            .flat_map(|kernel| {
                (0..self.channels).flat_map(move |channel| {
                    (0..taps).map(move |tap| kernel[tap * self.channels + channel])
                })
            })
            .collect()
    }

    pub(super) fn packed(&self, weight: &[f32]) -> Packed {
        let outputs = weight.len() / self.depth();
        Packed::new(
            [self.depth(), outputs],
            &self.permuted(weight),
            [1, self.depth()],
        )
    }

    /// For each row of the kernel at a position: where it starts in the image, which of its columns lie inside.
    fn runs(&self, position: usize) -> impl Iterator<Item = Run> {
        let border = self.side / 2;
        let (y, x) = (position / self.columns, position % self.columns);
        let left = x * self.stride;
        let inside = border.saturating_sub(left)..self.side.min(self.width + border - left);
        (0..self.side).map(move |ky| {
            let row = (y * self.stride + ky).checked_sub(border);
            let row = row.filter(|&row| row < self.height);
            Run {
                tap: ky * self.side,
                image: row
                    .map(|row| (row * self.width + left + inside.start - border) * self.channels),
                inside: inside.clone(),
            }
        })
    }

    /// What `count` positions of one image from `start` on see, `[count, depth]`.
    pub(super) fn gather<'b>(
        &self,
        image: &[f32],
        start: usize,
        count: usize,
        seen: &'b mut [f32],
    ) -> &'b [f32] {
        let seen = &mut seen[..count * self.depth()];
        for (i, seen) in seen.chunks_exact_mut(self.depth()).enumerate() {
            for run in self.runs(start + i) {
                let seen = &mut seen[run.tap * self.channels..][..self.side * self.channels];
                let Some(from) = run.image else {
                    seen.fill(0.0);
                    continue;
                };
                let (a, b) = (
                    run.inside.start * self.channels,
                    run.inside.end * self.channels,
                );
                seen[..a].fill(0.0);
                seen[a..b].copy_from_slice(&image[from..][..b - a]);
                seen[b..].fill(0.0);
            }
        }
        seen
    }

    /// Adds what those positions saw to where they saw it.
    pub(super) fn scatter(&self, seen: &[f32], start: usize, count: usize, image: &mut [f32]) {
        for (i, seen) in seen.chunks_exact(self.depth()).take(count).enumerate() {
            for run in self.runs(start + i) {
                let Some(from) = run.image else { continue };
                let seen = &seen[run.tap * self.channels..];
                let (a, b) = (
                    run.inside.start * self.channels,
                    run.inside.end * self.channels,
                );
                add(&mut image[from..][..b - a], &seen[a..b]);
            }
        }
    }
}

/// A kernel row's place in an image.
struct Run {
    /// Number of the row's first tap.
    tap: usize,
    /// Where its first inside column starts, if the row lies inside.
    image: Option<usize>,
    /// Its columns that lie inside.
    inside: std::ops::Range<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_see_what_a_loop_over_pixels_sees() {
        for (height, width, channels, side, stride) in [
            (5usize, 4usize, 2, 3, 1),
            (5, 4, 3, 3, 2),
            (6, 7, 1, 7, 2),
            (1, 1, 2, 3, 1),
            (4, 4, 1, 5, 3),
        ] {
            let columns = width.div_ceil(stride);
            let window = Window {
                height,
                width,
                channels,
                stride,
                side,
                columns,
            };
            let image: Vec<f32> = (1..=height * width * channels).map(|v| v as f32).collect();
            let count = height.div_ceil(stride) * columns;
            let mut seen = vec![f32::NAN; count * window.depth()];
            window.gather(&image, 0, count, &mut seen);
            for (i, &value) in seen.iter().enumerate() {
                let (position, within) = (i / window.depth(), i % window.depth());
                let (tap, channel) = (within / channels, within % channels);
                let y = (position / columns * stride + tap / side).wrapping_sub(side / 2);
                let x = (position % columns * stride + tap % side).wrapping_sub(side / 2);
                let expected = if y < height && x < width {
                    image[(y * width + x) * channels + channel]
                } else {
                    0.0
                };
                assert_eq!(value, expected, "position {position}, tap {tap}");
            }
            // Scattering is gathering's transpose: <seen, gather(image)> = <scatter(seen), image>.
            let weights: Vec<f32> = (0..seen.len()).map(|i| (i % 7) as f32).collect();
            let mut back = vec![0.0; image.len()];
            window.scatter(&weights, 0, count, &mut back);
            let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            assert_eq!(dot(&seen, &weights), dot(&image, &back));
        }
    }
}
