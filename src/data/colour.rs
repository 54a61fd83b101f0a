//! Random changes of colour and sharpness, as torchvision's `ColorJitter`, `RandomGrayscale` and `GaussianBlur` make them.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{DataConfig, ImageSize};

/// Share of red, green and blue in luma (ITU-R BT.601).
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];
/// Least and largest deviation of the blur in pixels of an image of 224 (Chen et al., arXiv 2003.04297).
const BLUR: [f64; 2] = [0.1, 2.0];
const BLUR_SIDE: f64 = 224.0;

/// A change with its random strength.
#[derive(Clone, Copy)]
enum Change {
    /// Times a factor.
    Brightness(f32),
    /// Away from, or towards, the mean luma of the image, by a factor.
    Contrast(f32),
    /// Away from, or towards, each pixel's luma, by a factor.
    Saturation(f32),
    /// Hue turned by a share of the circle.
    Hue(f32),
}

/// Changes a view's colours and sharpness as `config` says: jitter, then grey, then blur, each or none.
///
/// `view`: one plane of `size` a channel. One channel has brightness, contrast and sharpness only.
pub(crate) fn distort(
    view: &mut [u8],
    size: ImageSize,
    config: &DataConfig,
    random: &mut ChaCha8Rng,
) {
    let changes = if random.random_bool(config.jitter_share) {
        jitter(config.jitter, random)
    } else {
        Vec::new()
    };
    let grey = random.random_bool(config.grey);
    let deviation = random.random_bool(config.blur).then(|| {
        let [least, largest] = BLUR.map(|deviation| deviation * size.shorter() as f64 / BLUR_SIDE);
        random.random_range(least..=largest) as f32
    });
    if changes.is_empty() && !grey && deviation.is_none() {
        return;
    }
    let mut pixels: Vec<f32> = view.iter().map(|&byte| f32::from(byte) / 255.0).collect();
    for change in changes {
        change.apply(&mut pixels, size.pixels());
    }
    if grey {
        Change::Saturation(0.0).apply(&mut pixels, size.pixels());
    }
    if let Some(deviation) = deviation {
        for plane in pixels.chunks_exact_mut(size.pixels()) {
            blur(plane, size, deviation);
        }
    }
    for (byte, value) in view.iter_mut().zip(pixels) {
        *byte = (value * 255.0 + 0.5) as u8;
    }
}

/// The four changes in random order: factors of brightness, contrast and saturation from 1 − strength to 1 + strength,
/// a turn of the hue from −strength to strength.
fn jitter(strengths: [f64; 4], random: &mut ChaCha8Rng) -> Vec<Change> {
    let [brightness, contrast, saturation, hue] =
        strengths.map(|strength| random.random_range(-strength..=strength) as f32);
    let mut changes = vec![
        Change::Brightness(1.0 + brightness),
        Change::Contrast(1.0 + contrast),
        Change::Saturation(1.0 + saturation),
        Change::Hue(hue),
    ];
    changes.retain(|change| !change.is_none());
    changes.shuffle(random);
    changes
}

impl Change {
    fn is_none(self) -> bool {
        match self {
            Self::Brightness(factor) | Self::Contrast(factor) | Self::Saturation(factor) => {
                factor == 1.0
            }
            Self::Hue(turn) => turn == 0.0,
        }
    }

    /// `pixels`: planes of `area` values from 0 to 1, one or three.
    fn apply(self, pixels: &mut [f32], area: usize) {
        match self {
            Self::Brightness(factor) => {
                for value in pixels {
                    *value = (*value * factor).clamp(0.0, 1.0);
                }
            }
            Self::Contrast(factor) => {
                let luma: f64 = if pixels.len() == area {
                    pixels.iter().map(|&v| f64::from(v)).sum()
                } else {
                    let planes = pixels.chunks_exact(area).zip(LUMA);
                    planes
                        .map(|(plane, share)| {
                            let sum: f64 = plane.iter().map(|&v| f64::from(v)).sum();
                            sum * f64::from(share)
                        })
                        .sum()
                };
                let rest = (1.0 - factor) * (luma / area as f64) as f32;
                for value in pixels {
                    *value = (*value * factor + rest).clamp(0.0, 1.0);
                }
            }
            Self::Saturation(factor) => each_colour(pixels, area, |colour| {
                let luma: f32 = colour.iter().zip(LUMA).map(|(v, share)| v * share).sum();
                colour.map(|v| (v * factor + (1.0 - factor) * luma).clamp(0.0, 1.0))
            }),
            Self::Hue(turn) => each_colour(pixels, area, |colour| turn_hue(colour, turn)),
        }
    }
}

fn each_colour(pixels: &mut [f32], area: usize, change: impl Fn([f32; 3]) -> [f32; 3]) {
    if pixels.len() != 3 * area {
        return;
    }
    let (red, rest) = pixels.split_at_mut(area);
    let (green, blue) = rest.split_at_mut(area);
    for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
        [*r, *g, *b] = change([*r, *g, *b]);
    }
}

/// Turns the hue by a share of the circle; saturation and value in the sense of HSV stay.
fn turn_hue([r, g, b]: [f32; 3], turn: f32) -> [f32; 3] {
    let (value, least) = (r.max(g).max(b), r.min(g).min(b));
    let chroma = value - least;
    if chroma == 0.0 {
        return [r, g, b];
    }
    let sixths = if value == r {
        (g - b) / chroma
    } else if value == g {
        2.0 + (b - r) / chroma
    } else {
        4.0 + (r - g) / chroma
    };
    let sixths = (sixths + 6.0 * turn).rem_euclid(6.0);
    // Distance of the channel's own hue on the circle: within one sixth it is full, beyond two there is none.
    let channel = |own: f32| {
        let distance = (sixths - own).abs();
        let distance = distance.min(6.0 - distance);
        least + chroma * (2.0 - distance).clamp(0.0, 1.0)
    };
    [channel(0.0), channel(2.0), channel(4.0)]
}

/// Convolves a plane with a Gaussian that is cut off at three deviations; reflected at the borders.
fn blur(plane: &mut [f32], size: ImageSize, deviation: f32) {
    let longest = size.shorter() - 1;
    let radius = ((3.0 * deviation).ceil() as usize).min(longest);
    let mut kernel: Vec<f32> = (0..=radius)
        .map(|i| (-0.5 * (i as f32 / deviation).powi(2)).exp())
        .collect();
    let total = kernel[0] + 2.0 * kernel[1..].iter().sum::<f32>();
    kernel.iter_mut().for_each(|weight| *weight /= total);
    let mut line = Vec::new();
    let mut along = |start: usize, step: usize, count: usize, plane: &mut [f32]| {
        let at = |i: usize| plane[start + i * step];
        line.clear();
        line.extend((1..=radius).rev().map(at));
        line.extend((0..count).map(at));
        line.extend((1..=radius).map(|i| at(count - 1 - i)));
        for (i, window) in line.windows(2 * radius + 1).enumerate() {
            let sides: f32 = (1..=radius)
                .map(|k| kernel[k] * (window[radius - k] + window[radius + k]))
                .sum();
            plane[start + i * step] = (kernel[0] * window[radius] + sides).clamp(0.0, 1.0);
        }
    };
    for y in 0..size.height {
        along(y * size.width, 1, size.width, plane);
    }
    for x in 0..size.width {
        along(x, size.width, size.height, plane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    fn close(found: &[f32], expected: &[f32]) {
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn a_third_of_a_turn_makes_red_green_and_a_sixth_makes_it_yellow() {
        let red = [0.9, 0.1, 0.1];
        close(&turn_hue(red, 1.0 / 3.0), &[0.1, 0.9, 0.1]);
        close(&turn_hue(red, -1.0 / 3.0), &[0.1, 0.1, 0.9]);
        close(&turn_hue(red, 1.0 / 6.0), &[0.9, 0.9, 0.1]);
        close(&turn_hue([0.3, 0.5, 0.8], 0.0), &[0.3, 0.5, 0.8]);
        close(&turn_hue([0.4; 3], 0.3), &[0.4; 3]);
    }

    #[test]
    fn factors_do_to_colours_what_torchvision_documents() {
        let mut pixels = vec![0.2, 0.6, 0.4, 0.8, 0.1, 0.3];
        Change::Brightness(1.5).apply(&mut pixels, 2);
        close(&pixels, &[0.3, 0.9, 0.6, 1.0, 0.15, 0.45]);
        // Luma of the two pixels: 0.459 and 0.9074; their mean 0.6832.
        Change::Contrast(0.5).apply(&mut pixels, 2);
        close(&pixels, &[0.4916, 0.7916, 0.6416, 0.8416, 0.4166, 0.5666]);
        Change::Saturation(0.0).apply(&mut pixels, 2);
        close(&pixels[..2], &pixels[2..4]);
        close(&pixels[..2], &pixels[4..]);
    }

    #[test]
    fn a_blur_keeps_constants_and_spreads_a_point_as_the_gaussian_does() {
        let size = ImageSize::square(15);
        let mut flat = vec![0.25; 225];
        blur(&mut flat, size, 1.3);
        close(&flat, &[0.25; 225]);
        let mut point = vec![0.0; 225];
        point[7 * 15 + 7] = 1.0;
        blur(&mut point, size, 1.0);
        let ratio = point[7 * 15 + 8] / point[7 * 15 + 7];
        assert!((ratio - (-0.5f32).exp()).abs() < 1e-5, "{ratio}");
        assert!((point.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn views_are_changed_as_often_as_asked() {
        let size = ImageSize::square(8);
        let before: Vec<u8> = (0..192).map(|i| (i * 7 % 251) as u8).collect();
        let changed = |config: &DataConfig| {
            let views = (0..400).filter(|&index| {
                let mut view = before.clone();
                let random = &mut stream(0, Purpose::Augmentation, 0, index);
                distort(&mut view, size, config, random);
                view != before
            });
            views.count()
        };
        let none = DataConfig::default();
        assert_eq!(changed(&none), 0);
        let fifth = DataConfig {
            grey: 0.2,
            ..none.clone()
        };
        assert!((50..=110).contains(&changed(&fifth)));
        let jitter = DataConfig {
            jitter: [0.4, 0.4, 0.4, 0.1],
            jitter_share: 0.8,
            ..none
        };
        assert!((290..=350).contains(&changed(&jitter)));
    }
}
