//! From a file's bytes to pixels.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};

const MAX_SIDE: u32 = 20_000;
const MAX_BYTES: u64 = 512 << 20;

/// A decoded image: 8-bit RGB, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height·width·3` bytes.
    pub rgb: Vec<u8>,
}

/// What can be told without decoding pixels.
pub(super) struct Header {
    pub format: &'static str,
    pub width: u32,
    pub height: u32,
}

/// Decodes an image of any format that is compiled in, told by its content and not by its name, and turns it as its
/// EXIF orientation says. Sides and memory are limited before anything is allocated.
pub(super) fn decode(bytes: &[u8]) -> Result<(Header, Picture), String> {
    let text = |error: image::ImageError| error.to_string();
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| error.to_string())?;
    let format = reader.format().map_or("unknown", name);
    reader.limits(limits());
    let mut decoder = reader.into_decoder().map_err(text)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(text)?;
    image.apply_orientation(orientation);
    let rgb = image.into_rgb8();
    let (width, height) = rgb.dimensions();
    if width == 0 || height == 0 {
        return Err("it has no pixels".into());
    }
    let header = Header {
        format,
        width,
        height,
    };
    let picture = Picture {
        width,
        height,
        rgb: rgb.into_raw(),
    };
    Ok((header, picture))
}

/// Reads format and size only.
pub(super) fn header(bytes: &[u8]) -> Result<Header, String> {
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| error.to_string())?;
    let format = reader.format().map_or("unknown", name);
    reader.limits(limits());
    let (width, height) = reader
        .into_dimensions()
        .map_err(|error| error.to_string())?;
    Ok(Header {
        format,
        width,
        height,
    })
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_BYTES);
    limits
}

fn name(format: image::ImageFormat) -> &'static str {
    format
        .extensions_str()
        .first()
        .copied()
        .unwrap_or("unknown")
}
