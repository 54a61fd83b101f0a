//! Small pictures as data URLs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use burn::tensor::Tensor;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::data::{Crop, ImageSize, Picture, colour_statistics, resize};
use crate::error::{Error, Result};

const GREY: [u8; 3] = [214, 214, 214];
const HOT: [u8; 3] = [255, 80, 0];
/// How much of the image the largest value of an overlay hides.
const OPACITY: f64 = 0.85;
/// Of 100, where more takes much room and is hardly seen.
const JPEG_QUALITY: u8 = 80;

/// The row of one image; what is no name is a data URL.
pub struct Pictures {
    pub name: String,
    pub original: String,
    /// What the network saw and what it made of it, where it saw a part.
    pub made: Option<[String; 2]>,
    pub components: String,
    pub neighbours: Vec<String>,
}

/// A rectangle of pixels.
#[derive(Clone, Copy)]
pub struct Block {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

impl Block {
    fn contains(self, pixel: usize, width: usize) -> bool {
        let (y, x) = (pixel / width, pixel % width);
        (self.top..self.top + self.height).contains(&y)
            && (self.left..self.left + self.width).contains(&x)
    }
}

/// A normalised image `[1, 3, H, W]`.
pub fn image(image: Tensor<4>) -> Result<String> {
    let (rgb, [h, w]) = pixels(image);
    data_url(&rgb, [h, w])
}

/// What the encoder saw; the rest grey.
pub fn visible(image: Tensor<4>, block: Block) -> Result<String> {
    let (mut rgb, [h, w]) = pixels(image);
    for (i, pixel) in rgb.iter_mut().enumerate() {
        if !block.contains(i, w) {
            *pixel = GREY;
        }
    }
    data_url(&rgb, [h, w])
}

/// The prediction, with the visible quarter as it was.
pub fn completed(original: Tensor<4>, predicted: Tensor<4>, block: Block) -> Result<String> {
    let (original, [h, w]) = pixels(original);
    let (mut rgb, _) = pixels(predicted);
    for (i, pixel) in rgb.iter_mut().enumerate() {
        if block.contains(i, w) {
            *pixel = original[i];
        }
    }
    data_url(&rgb, [h, w])
}

/// Positions of a map as colours, each component from 0 to 1.
pub fn colours(positions: &[[f64; 3]], grid: [usize; 2]) -> Result<String> {
    let rgb: Vec<[u8; 3]> = positions
        .iter()
        .map(|position| position.map(|v| (255.0 * v).round() as u8))
        .collect();
    data_url(&rgb, grid)
}

/// Values from 0 to 1 of cells of `side` pixels in `rows` and `columns`, in colour over the middle of a normalised image
/// `[1, 3, H, W]`.
pub fn overlay(
    image: Tensor<4>,
    values: &[f64],
    [rows, columns]: [usize; 2],
    side: usize,
) -> Result<String> {
    let (mut rgb, [h, w]) = pixels(image);
    let cell = |pixel: usize, pixels: usize, cells: usize| {
        let margin = pixels.saturating_sub(cells * side) / 2;
        let inside = pixel.checked_sub(margin)? / side;
        (inside < cells).then_some(inside)
    };
    for (i, pixel) in rgb.iter_mut().enumerate() {
        let place = cell(i / w, h, rows).zip(cell(i % w, w, columns));
        let value = place.map_or(0.0, |(row, column)| values[row * columns + column]);
        let share = OPACITY * value.clamp(0.0, 1.0);
        for (colour, hot) in pixel.iter_mut().zip(HOT) {
            *colour = (f64::from(*colour) * (1.0 - share) + f64::from(hot) * share).round() as u8;
        }
    }
    data_url(&rgb, [h, w])
}

/// A decoded picture as JPEG, no longer side above `longest` pixels; a small one keeps its size.
pub fn scaled(picture: &Picture, longest: usize) -> Result<String> {
    let (width, height) = (f64::from(picture.width), f64::from(picture.height));
    let scale = (longest as f64 / width.max(height)).min(1.0);
    let side = |side: f64| ((scale * side).round() as usize).max(1);
    let size = ImageSize {
        height: side(height),
        width: side(width),
    };
    let whole = Crop {
        left: 0.0,
        top: 0.0,
        width,
        height,
    };
    let planes = resize(picture, &whole, size, false);
    let planes: Vec<&[u8]> = planes.chunks_exact(size.pixels()).collect();
    let pixels: Vec<u8> = (0..size.pixels())
        .flat_map(|i| planes.iter().map(move |plane| plane[i]))
        .collect();
    let colours = match picture.channels {
        1 => ExtendedColorType::L8,
        _ => ExtendedColorType::Rgb8,
    };
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY)
        .write_image(&pixels, size.width as u32, size.height as u32, colours)
        .map_err(|error| Error::Plot(error.to_string()))?;
    Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg)))
}

fn pixels(image: Tensor<4>) -> (Vec<[u8; 3]>, [usize; 2]) {
    let [_, channels, h, w] = image.dims();
    let values = crate::nn::values(image);
    let (mean, deviation) = colour_statistics(channels);
    let rgb = (0..h * w)
        .map(|i| {
            std::array::from_fn(|colour| {
                let channel = colour.min(channels - 1);
                let value = values[channel * h * w + i] * deviation[channel] + mean[channel];
                (255.0 * value).round().clamp(0.0, 255.0) as u8
            })
        })
        .collect();
    (rgb, [h, w])
}

fn data_url(rgb: &[[u8; 3]], [h, w]: [usize; 2]) -> Result<String> {
    let mut png = Vec::new();
    PngEncoder::new(&mut png)
        .write_image(
            rgb.as_flattened(),
            w as u32,
            h as u32,
            ExtendedColorType::Rgb8,
        )
        .map_err(|error| Error::Plot(error.to_string()))?;
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(png)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOUR: [u8; 3] = [200, 100, 30];

    #[test]
    fn a_scaled_picture_keeps_its_shape_and_colours_and_never_grows() {
        for (channels, longest, expected) in
            [(3, 20, (20, 10)), (1, 20, (20, 10)), (3, 500, (100, 50))]
        {
            let colour = &COLOUR[..channels];
            let picture = Picture {
                width: 100,
                height: 50,
                channels,
                pixels: colour.repeat(100 * 50),
            };
            let url = scaled(&picture, longest).unwrap();
            let jpeg = url.strip_prefix("data:image/jpeg;base64,").unwrap();
            let decoded = image::load_from_memory(&STANDARD.decode(jpeg).unwrap()).unwrap();
            assert_eq!((decoded.width(), decoded.height()), expected);
            let pixels = decoded.into_bytes();
            for pixel in pixels.chunks_exact(channels) {
                let near = pixel.iter().zip(colour);
                assert!(near.clone().all(|(a, b)| a.abs_diff(*b) < 8), "{near:?}");
            }
        }
    }
}
