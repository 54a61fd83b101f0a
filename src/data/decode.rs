//! From a file's bytes to pixels.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{
    DynamicImage, ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageReader,
    ImageResult, Limits,
};

use super::DataConfig;

/// Longest side that a header may claim.
pub(super) const MAX_SIDE: u32 = 20_000;
/// Largest picture in memory, as the file stores it; as 8-bit RGB this is also Pillow's limit of 179 million pixels.
const MAX_BYTES: u64 = 512 << 20;
/// A JPEG's 8×8 block takes at least one bit.
const MAX_JPEG_PIXELS_A_BYTE: u64 = 512;
/// Sides more unequal than this are worth a look.
const EXTREME_ASPECT: u32 = 4;

const TRUNCATED: &str = "truncated: the file ends before the image does";

/// Ends of file names, and what is expected behind them.
pub(super) const EXTENSIONS: &[(&str, ImageFormat)] = &[
    ("jpg", ImageFormat::Jpeg),
    ("jpeg", ImageFormat::Jpeg),
    ("jpe", ImageFormat::Jpeg),
    ("jfif", ImageFormat::Jpeg),
    ("png", ImageFormat::Png),
    ("webp", ImageFormat::WebP),
    ("bmp", ImageFormat::Bmp),
    ("gif", ImageFormat::Gif),
    ("tif", ImageFormat::Tiff),
    ("tiff", ImageFormat::Tiff),
    ("ppm", ImageFormat::Pnm),
    ("pgm", ImageFormat::Pnm),
    ("pbm", ImageFormat::Pnm),
    ("pnm", ImageFormat::Pnm),
];

/// A decoded image: 8 bits a value, row by row, the channels of a pixel side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// 1 for luma, 3 for RGB.
    pub channels: usize,
    /// `height·width·channels` bytes.
    pub pixels: Vec<u8>,
}

/// What a picture is decoded to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    channels: usize,
    background: [u8; 3],
}

impl Target {
    pub fn of(config: &DataConfig) -> Self {
        Self {
            channels: config.channels,
            background: config.background.map(|value| value as u8),
        }
    }
}

/// What can be told without decoding pixels. Sides are those of the upright picture.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Header {
    pub format: &'static str,
    pub width: u32,
    pub height: u32,
}

/// Reads format and size only. Where `bytes` are not the `whole` file an error may only mean that they end too early.
pub(super) fn header(bytes: &[u8], whole: bool) -> Result<Header, String> {
    Ok(open(bytes, whole)?.header)
}

/// Decodes an image of any format that is compiled in, told by its content and not by its name: turned as its EXIF
/// orientation says, 16 bits scaled to 8, transparency laid over the background, and with one channel the luma of
/// ITU-R 601. Sides and memory are limited before anything is allocated.
pub(super) fn decode(bytes: &[u8], target: &Target) -> Result<(Header, Picture), String> {
    let opened = open(bytes, true)?;
    let header = opened.header.clone();
    Ok((header, opened.pixels(bytes, target)?.0))
}

/// Decodes an image and lists what is unusual about it; `extension` is the end of its name.
pub(super) fn inspect(
    bytes: &[u8],
    target: &Target,
    extension: &str,
) -> Result<(Header, Picture, Vec<&'static str>), String> {
    let opened = open(bytes, true)?;
    let header = opened.header.clone();
    let (format, colours) = (opened.format, opened.decoder.original_color_type());
    let rotated = opened.orientation != Orientation::NoTransforms;
    let (picture, transparent) = opened.pixels(bytes, target)?;
    let (width, height) = (header.width, header.height);
    let cmyk = matches!(
        colours,
        ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16
    ) || jpeg_frame(bytes).is_some_and(|frame| frame.components == 4);
    let bits = colours.bits_per_pixel() / u16::from(colours.channel_count());
    let named = EXTENSIONS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(extension));
    let odd = [
        (
            named.is_some_and(|&(_, named)| named != format),
            "its extension is of another format",
        ),
        (width == 1 || height == 1, "one pixel wide"),
        (bits > 8, "more than 8 bits"),
        (cmyk, "CMYK"),
        (transparent, "transparent"),
        (rotated, "rotated by EXIF"),
        (
            width.max(height) / width.min(height) >= EXTREME_ASPECT,
            "extreme aspect",
        ),
    ];
    let odd = odd.into_iter().filter(|(holds, _)| *holds);
    Ok((header, picture, odd.map(|(_, name)| name).collect()))
}

struct Opened<'a> {
    format: ImageFormat,
    header: Header,
    orientation: Orientation,
    decoder: Box<dyn ImageDecoder + 'a>,
}

fn open(bytes: &[u8], whole: bool) -> Result<Opened<'_>, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| error.to_string())?;
    let format = reader
        .format()
        .filter(|format| EXTENSIONS.iter().any(|(_, known)| known == format))
        .ok_or("its content is none of JPEG, PNG, WebP, BMP, GIF, TIFF, PNM")?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(explain)?;
    if decoder.total_bytes() > MAX_BYTES {
        return Err(too_large());
    }
    let orientation = match orientation_of(&mut decoder) {
        Err(error) if !whole => return Err(explain(error)),
        // A damaged description does not make the picture unreadable.
        found => found.unwrap_or(Orientation::NoTransforms),
    };
    let (mut width, mut height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err("it has no pixels".into());
    }
    if matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    ) {
        (width, height) = (height, width);
    }
    let header = Header {
        format: match format {
            ImageFormat::Pnm => "pnm",
            _ => format.extensions_str().first().copied().unwrap_or_default(),
        },
        width,
        height,
    };
    Ok(Opened {
        format,
        header,
        orientation,
        decoder: Box::new(decoder),
    })
}

fn orientation_of(decoder: &mut impl ImageDecoder) -> ImageResult<Orientation> {
    let found = decoder.orientation()?;
    if found != Orientation::NoTransforms {
        return Ok(found);
    }
    // Some programs begin the EXIF of WebP and PNG as that of a JPEG begins.
    let exif = decoder.exif_metadata()?.unwrap_or_default();
    let prefixed = exif.strip_prefix(b"Exif\0\0");
    Ok(prefixed
        .and_then(Orientation::from_exif_chunk)
        .unwrap_or(found))
}

impl Opened<'_> {
    /// The picture, and whether any pixel of it was transparent.
    fn pixels(self, bytes: &[u8], target: &Target) -> Result<(Picture, bool), String> {
        // The decoder fills up what is missing with grey.
        let pixels = u64::from(self.header.width) * u64::from(self.header.height);
        let enough = pixels <= MAX_JPEG_PIXELS_A_BYTE * bytes.len() as u64;
        if jpeg_frame(bytes).is_some_and(|frame| !(frame.complete && enough)) {
            return Err(TRUNCATED.into());
        }
        let mut image = DynamicImage::from_decoder(self.decoder).map_err(explain)?;
        image.apply_orientation(self.orientation);
        let (width, height) = (image.width(), image.height());
        let mut transparent = false;
        let mut pixels = if image.color().has_alpha() {
            let rgba = image.into_rgba8().into_raw();
            let (pixels, _) = rgba.as_chunks::<4>();
            transparent = pixels.iter().any(|&[.., alpha]| alpha < 255);
            pixels
                .iter()
                .flat_map(|&pixel| lay_over(pixel, target.background))
                .collect()
        } else {
            image.into_rgb8().into_raw()
        };
        if target.channels == 1 {
            let (colours, _) = pixels.as_chunks::<3>();
            pixels = colours.iter().map(luma).collect();
        }
        let picture = Picture {
            width,
            height,
            channels: target.channels,
            pixels,
        };
        Ok((picture, transparent))
    }
}

fn lay_over([red, green, blue, alpha]: [u8; 4], background: [u8; 3]) -> [u8; 3] {
    let alpha = u32::from(alpha);
    let mut mixed = [red, green, blue];
    for (value, below) in mixed.iter_mut().zip(background) {
        let sum = u32::from(*value) * alpha + u32::from(below) * (255 - alpha);
        *value = ((sum + 127) / 255) as u8;
    }
    mixed
}

/// 0.299 R + 0.587 G + 0.114 B in the fixed point of Pillow's `convert("L")`; equal values stay what they are.
fn luma(&[red, green, blue]: &[u8; 3]) -> u8 {
    let sum = 19_595 * u32::from(red) + 38_470 * u32::from(green) + 7_471 * u32::from(blue);
    ((sum + 0x8000) >> 16) as u8
}

fn explain(error: ImageError) -> String {
    match error {
        ImageError::Limits(_) => too_large(),
        ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            TRUNCATED.into()
        }
        ImageError::Unsupported(unsupported) => {
            format!("{unsupported}; convert it to 8- or 16-bit grey or RGB")
        }
        // Some of these end in a line break.
        other => other.to_string().trim_end().to_owned(),
    }
}

fn too_large() -> String {
    format!(
        "larger than {MAX_SIDE} pixels a side or {} MiB in memory; make it smaller",
        MAX_BYTES >> 20
    )
}

struct JpegFrame {
    components: u8,
    /// Whether the end of the image is there.
    complete: bool,
}

/// What the markers of a JPEG say; nothing where it is none.
fn jpeg_frame(bytes: &[u8]) -> Option<JpegFrame> {
    const START_OF_SCAN: u8 = 0xda;
    const END_OF_IMAGE: [u8; 2] = [0xff, 0xd9];
    let mut rest = bytes.strip_prefix(&[0xff, 0xd8])?;
    let mut components = 0;
    loop {
        // Any number of 0xff may stand before a marker.
        let start = rest.iter().position(|&byte| byte == 0xff)?;
        let marker_at = start + rest[start..].iter().position(|&byte| byte != 0xff)?;
        let marker = rest[marker_at];
        rest = &rest[marker_at + 1..];
        match marker {
            // These have no content.
            0x00 | 0x01 | 0xd0..=0xd7 => continue,
            START_OF_SCAN => break,
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
        if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) {
            components = *rest.get(7)?;
        }
        rest = rest.get(length.max(2)..)?;
    }
    Some(JpegFrame {
        components,
        // Within compressed data 0xff is followed by 0 or a restart marker.
        complete: rest.windows(2).rev().any(|pair| pair == END_OF_IMAGE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz;

    #[test]
    fn exif_that_begins_as_in_a_jpeg_or_is_not_there_yet_is_not_passed_over() {
        const EXIF: usize = 80;
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/images/rotated.webp"
        );
        let plain = std::fs::read(file).unwrap();
        assert_eq!(&plain[EXIF..EXIF + 4], b"EXIF");
        assert!(header(&plain[..plain.len() - 1], false).is_err());
        let mut prefixed = plain.clone();
        prefixed.splice(EXIF + 8..EXIF + 8, *b"Exif\0\0");
        for length_at in [4, EXIF + 4] {
            prefixed[length_at] += 6;
        }
        let target = Target::of(&DataConfig::default());
        let upright = decode(&plain, &target).unwrap();
        let stored = plain[24] + 1;
        assert_ne!(upright.0.width, u32::from(stored), "it lies on its side");
        assert_eq!(decode(&prefixed, &target).unwrap(), upright);
    }

    #[test]
    fn mutated_images_are_decoded_or_refused() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images");
        let mut paths: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().unwrap() != "safetensors")
            .collect();
        paths.sort();
        let corpus: Vec<Vec<u8>> = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
        assert!(corpus.len() > 50);
        let target = Target::of(&DataConfig::default());
        fuzz::survives(&corpus, 20_000, |bytes| {
            let header = header(bytes, true);
            if let Ok((decoded, picture)) = decode(bytes, &target) {
                assert_eq!(header, Ok(decoded));
                let pixels = picture.width as usize * picture.height as usize;
                assert_eq!(picture.pixels.len(), 3 * pixels);
            }
            let _ = inspect(bytes, &target, "png");
        });
    }
}
