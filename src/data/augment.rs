//! From a picture to what the network sees.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::colour::distort;
use super::{DataConfig, ImageSize, Picture};

const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

const CROP_TRIES: usize = 10;

/// A crop box in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Crop {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// Mean and deviation of each channel over ImageNet, of values from 0 to 1: of red, green and blue, or, for one channel,
/// their averages.
pub fn colour_statistics(channels: usize) -> (Vec<f32>, Vec<f32>) {
    let of = |colours: [f32; 3]| {
        if channels == 1 {
            vec![colours.iter().sum::<f32>() / 3.0]
        } else {
            colours.to_vec()
        }
    };
    (of(MEAN), of(STD))
}

/// A random resized crop and a random horizontal flip, then what changes colours and sharpness: one plane of
/// `height·width` bytes a channel.
///
/// The crop is torchvision's: an area share from `crop_scale` and a ratio of width to height from `crop_ratio`
/// (log-uniform; times the ratio of `size`, so that a wide view distorts no more than a square one), tried up to ten
/// times, else the largest centred crop within the ratio's bounds.
pub fn random_view(
    picture: &Picture,
    size: ImageSize,
    config: &DataConfig,
    random: &mut ChaCha8Rng,
) -> Vec<u8> {
    let crop = random_crop(picture, aspect(size), config, random);
    let flip = random.random_bool(config.flip);
    let mut view = resize(picture, &crop, size, flip);
    distort(&mut view, size, config, random);
    view
}

/// The whole image for evaluation: the largest centred crop of the ratio of `size`, resized.
pub fn whole_view(picture: &Picture, size: ImageSize) -> Vec<u8> {
    resize(picture, &centred(picture, aspect(size)), size, false)
}

fn aspect(size: ImageSize) -> f64 {
    size.width as f64 / size.height as f64
}

/// Bytes of a view to the numbers a network sees: each channel minus its mean, over its deviation.
pub fn normalise(view: &[u8], size: ImageSize, into: &mut Vec<f32>) {
    let (means, deviations) = colour_statistics(view.len() / size.pixels());
    for (channel, values) in view.chunks_exact(size.pixels()).enumerate() {
        let (mean, scale) = (means[channel], 1.0 / deviations[channel]);
        into.extend(
            values
                .iter()
                .map(|&v| (f32::from(v) / 255.0 - mean) * scale),
        );
    }
}

fn random_crop(
    picture: &Picture,
    aspect: f64,
    config: &DataConfig,
    random: &mut ChaCha8Rng,
) -> Crop {
    let (width, height) = (f64::from(picture.width), f64::from(picture.height));
    let [least, largest] = config.crop_scale;
    let [narrow, wide] = config.crop_ratio.map(|ratio| (aspect * ratio).ln());
    for _ in 0..CROP_TRIES {
        let area = width * height * random.random_range(least..=largest);
        let ratio = random.random_range(narrow..=wide).exp();
        let (w, h) = ((area * ratio).sqrt(), (area / ratio).sqrt());
        if w <= width && h <= height {
            return Crop {
                left: random.random::<f64>() * (width - w),
                top: random.random::<f64>() * (height - h),
                width: w,
                height: h,
            };
        }
    }
    let ratio = (width / height).clamp(narrow.exp(), wide.exp());
    centred(picture, ratio)
}

/// The largest centred crop of this ratio of width to height.
fn centred(picture: &Picture, ratio: f64) -> Crop {
    let (width, height) = (f64::from(picture.width), f64::from(picture.height));
    let (w, h) = (width.min(height * ratio), height.min(width / ratio));
    Crop {
        left: (width - w) / 2.0,
        top: (height - h) / 2.0,
        width: w,
        height: h,
    }
}

/// A part of a picture at another size, mirrored where `flip` says so: one plane of `size` a channel.
pub(crate) fn resize(picture: &Picture, crop: &Crop, size: ImageSize, flip: bool) -> Vec<u8> {
    let side = |side: usize| u32::try_from(side).expect("an image's side is small");
    let channels = picture.channels;
    let pixel_type = match channels {
        1 => PixelType::U8,
        _ => PixelType::U8x3,
    };
    let source = ImageRef::new(picture.width, picture.height, &picture.pixels, pixel_type)
        .expect("a picture has a byte for each channel of each pixel");
    let mut target = Image::new(side(size.width), side(size.height), pixel_type);
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
        .crop(crop.left, crop.top, crop.width, crop.height);
    Resizer::new()
        .resize(&source, &mut target, &options)
        .expect("the crop lies within the picture");
    let pixels = target.buffer();
    let width = size.width;
    let mut view = vec![0; channels * size.pixels()];
    for (channel, plane) in view.chunks_exact_mut(size.pixels()).enumerate() {
        for (y, row) in plane.chunks_exact_mut(width).enumerate() {
            for (x, value) in row.iter_mut().enumerate() {
                let x = if flip { width - 1 - x } else { x };
                *value = pixels[(y * width + x) * channels + channel];
            }
        }
    }
    view
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    fn gradient(width: u32, height: u32) -> Picture {
        let pixels = (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 7]))
            .collect();
        Picture {
            width,
            height,
            channels: 3,
            pixels,
        }
    }

    #[test]
    fn a_view_at_the_pictures_own_size_is_the_picture() {
        let picture = gradient(8, 8);
        let view = whole_view(&picture, ImageSize::square(8));
        for (i, pixel) in picture.pixels.chunks(3).enumerate() {
            assert_eq!([view[i], view[64 + i], view[128 + i]], *pixel);
        }
    }

    #[test]
    fn a_wide_picture_is_seen_through_its_central_square() {
        let view = whole_view(&gradient(16, 8), ImageSize::square(8));
        assert_eq!((view[0], view[7]), (4, 11));
    }

    #[test]
    fn a_wide_view_of_a_square_picture_is_its_central_band() {
        let size = ImageSize {
            height: 4,
            width: 8,
        };
        let view = whole_view(&gradient(8, 8), size);
        assert_eq!(view.len(), 3 * 32);
        // Green counts rows: the band begins in row 2.
        assert_eq!((view[32], view[63]), (2, 5));
    }

    #[test]
    fn one_channel_is_resized_as_each_of_three_equal_ones() {
        let grey = Picture {
            width: 16,
            height: 8,
            channels: 1,
            pixels: (0..128).map(|i| (i * i) as u8).collect(),
        };
        let colour = Picture {
            channels: 3,
            pixels: grey.pixels.iter().flat_map(|&v| [v; 3]).collect(),
            ..grey
        };
        let config = DataConfig::default();
        let view = |picture| {
            random_view(
                picture,
                ImageSize::square(6),
                &config,
                &mut stream(0, Purpose::Augmentation, 0, 0),
            )
        };
        assert_eq!(view(&grey).repeat(3), view(&colour));
    }

    #[test]
    fn crops_stay_inside_and_keep_area_and_ratio() {
        let config = DataConfig::default();
        let picture = gradient(100, 60);
        for index in 0..500 {
            let crop = random_crop(
                &picture,
                1.0,
                &config,
                &mut stream(0, Purpose::Augmentation, 0, index),
            );
            let share = crop.width * crop.height / 6000.0;
            let ratio = crop.width / crop.height;
            assert!((0.299..=1.001).contains(&share), "{share}");
            assert!((0.749..=1.334).contains(&ratio), "{ratio}");
            assert!(crop.left >= 0.0 && crop.left + crop.width <= 100.0 + 1e-9);
            assert!(crop.top >= 0.0 && crop.top + crop.height <= 60.0 + 1e-9);
        }
    }

    #[test]
    fn half_of_the_views_are_flipped() {
        let config = DataConfig {
            crop_scale: [1.0, 1.0],
            crop_ratio: [1.0, 1.0],
            ..DataConfig::default()
        };
        let picture = gradient(8, 8);
        let flipped = (0..400)
            .filter(|&index| {
                let mut random = stream(0, Purpose::Augmentation, 0, index);
                random_view(&picture, ImageSize::square(8), &config, &mut random)[0] == 7
            })
            .count();
        assert!((150..=250).contains(&flipped), "{flipped}");
    }
}
