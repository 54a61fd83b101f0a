//! Small pictures as data URLs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use burn::tensor::Tensor;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::data::colour_statistics;
use crate::error::{Error, Result};
use crate::heat::Quadrant;

const GREY: [u8; 3] = [214, 214, 214];

/// The row of one image; each field but the name is a data URL.
pub struct Pictures {
    pub name: String,
    pub original: String,
    pub visible: String,
    pub reconstruction: String,
    pub components: String,
    pub neighbours: Vec<String>,
}

/// A normalised image `[1, 3, H, W]`.
pub fn image(image: Tensor<4>) -> Result<String> {
    let (rgb, [h, w]) = pixels(image);
    data_url(&rgb, [h, w])
}

/// What the encoder saw; the rest grey.
pub fn visible(image: Tensor<4>, quadrant: Quadrant) -> Result<String> {
    let (mut rgb, [h, w]) = pixels(image);
    for (i, pixel) in rgb.iter_mut().enumerate() {
        if !inside(quadrant, i, [h, w]) {
            *pixel = GREY;
        }
    }
    data_url(&rgb, [h, w])
}

/// The prediction, with the visible quarter as it was.
pub fn completed(original: Tensor<4>, predicted: Tensor<4>, quadrant: Quadrant) -> Result<String> {
    let (original, [h, w]) = pixels(original);
    let (mut rgb, _) = pixels(predicted);
    for (i, pixel) in rgb.iter_mut().enumerate() {
        if inside(quadrant, i, [h, w]) {
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

fn inside(quadrant: Quadrant, pixel: usize, [h, w]: [usize; 2]) -> bool {
    let (row, column) = quadrant.cell();
    (pixel / w) / (h / 2) == row && (pixel % w) / (w / 2) == column
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
