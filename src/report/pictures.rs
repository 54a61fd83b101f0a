//! Small pictures as data URLs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use burn::tensor::Tensor;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::data::colour_statistics;
use crate::error::{Error, Result};

const GREY: [u8; 3] = [214, 214, 214];
const HOT: [u8; 3] = [255, 80, 0];
/// How much of the image the largest value of an overlay hides.
const OPACITY: f64 = 0.85;

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
