//! Boxes with labels, drawn onto a picture.

use std::convert::Infallible;

use embedded_graphics::mono_font::iso_8859_1::{FONT_6X10, FONT_7X13, FONT_9X15, FONT_10X20};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{PrimitiveStyle, Rectangle};
use embedded_graphics::text::Baseline;
use embedded_graphics::text::renderer::TextRenderer;
use image::{Rgb, RgbImage};

/// RGB of classes, over and over. Told apart by most people with a colour-vision deficiency (Okabe and Ito, 2008); without
/// their black, which dark pictures hide.
pub const COLOURS: [[u8; 3]; 7] = [
    [230, 159, 0],
    [86, 180, 233],
    [0, 158, 115],
    [240, 228, 66],
    [0, 114, 178],
    [213, 94, 0],
    [204, 121, 167],
];
const FONTS: [&MonoFont; 4] = [&FONT_6X10, &FONT_7X13, &FONT_9X15, &FONT_10X20];
/// Lines of text that the longer side of a picture has room for, at most; in small pictures fewer.
const LINES: u32 = 50;
/// Strokes that the longer side has room for, at most.
const STROKES: u32 = 200;
const LEAST_STROKE: u32 = 2;

/// A box to be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// Number of its class, which decides on its colour.
    pub class: usize,
    /// What stands above it. Characters beyond ISO 8859-1 are shown as ?.
    pub label: String,
    /// `[left, top, width, height]` in pixels of the picture.
    pub bbox: [f64; 4],
}

/// Draws frames and, over them all, labels; where they overlap, the first of `boxes` is on top. Boxes are cut at the
/// picture's edges, and labels are moved so that they begin inside it.
pub fn draw(picture: &mut RgbImage, boxes: &[Labelled]) {
    let (width, height) = picture.dimensions();
    let longer = width.max(height);
    let stroke = (longer / STROKES).max(LEAST_STROKE);
    let mut canvas = Canvas { picture, scale: 1 };
    for Labelled { class, bbox, .. } in boxes.iter().rev() {
        let style = PrimitiveStyle::with_stroke(colour_of(*class), stroke);
        let frame = frame(*bbox, width, height).into_styled(style);
        let Ok(()) = frame.draw(&mut canvas);
    }
    let font = FONTS
        .into_iter()
        .rfind(|font| LINES * font.character_size.height <= longer)
        .unwrap_or(&FONT_6X10);
    // The largest font is too small for photographs.
    canvas.scale = (longer / (LINES * font.character_size.height)).max(1);
    for Labelled { class, label, bbox } in boxes.iter().rev() {
        let colour = colour_of(*class);
        let mut style = MonoTextStyle::new(font, readable_on(colour));
        style.background_color = Some(colour);
        let metrics = style.measure_string(label, Point::zero(), Baseline::Top);
        let size = metrics.bounding_box.size;
        let corner = frame(*bbox, width, height).top_left / canvas.scale as i32;
        let last = Point::zero() + canvas.size().saturating_sub(size);
        let place = (corner - size.y_axis())
            .component_max(Point::zero())
            .component_min(last);
        let Ok(_) = style.draw_string(label, place, Baseline::Top, &mut canvas);
    }
}

fn colour_of(class: usize) -> Rgb888 {
    let [red, green, blue] = COLOURS[class % COLOURS.len()];
    Rgb888::new(red, green, blue)
}

/// Black or white, whichever contrasts more by WCAG's formula.
fn readable_on(colour: Rgb888) -> Rgb888 {
    let linear = |value: u8| (f64::from(value) / 255.0).powf(2.2);
    let luminance =
        0.2126 * linear(colour.r()) + 0.7152 * linear(colour.g()) + 0.0722 * linear(colour.b());
    // (luminance + 0.05) / 0.05 against 1.05 / (luminance + 0.05).
    if (luminance + 0.05).powi(2) > 0.05 * 1.05 {
        Rgb888::BLACK
    } else {
        Rgb888::WHITE
    }
}

/// A box as whole pixels, at least one wide and high, cut at the picture's edges.
fn frame([left, top, box_width, box_height]: [f64; 4], width: u32, height: u32) -> Rectangle {
    let span = |start: f64, length: f64, side: u32| {
        let cut = |at: f64| at.round().clamp(0.0, f64::from(side)) as i32;
        let (start, end) = (cut(start), cut(start + length));
        (start, (end - start).max(1) as u32)
    };
    let (left, box_width) = span(left, box_width, width);
    let (top, box_height) = span(top, box_height, height);
    Rectangle::new(Point::new(left, top), Size::new(box_width, box_height))
}

/// A picture on which each pixel that is drawn covers `scale`·`scale`.
struct Canvas<'a> {
    picture: &'a mut RgbImage,
    scale: u32,
}

impl OriginDimensions for Canvas<'_> {
    fn size(&self) -> Size {
        let (width, height) = self.picture.dimensions();
        Size::new(width, height) / self.scale
    }
}

impl DrawTarget for Canvas<'_> {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        for Pixel(place, colour) in pixels {
            let corner = place * self.scale as i32;
            for Point { x, y } in Rectangle::new(corner, Size::new_equal(self.scale)).points() {
                // What is below 0 wraps round to far beyond the picture.
                if let Some(pixel) = self.picture.get_pixel_mut_checked(x as u32, y as u32) {
                    *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::ops::Range;

    use super::*;

    const GREY: Rgb<u8> = Rgb([50; 3]);
    const SKY: Rgb<u8> = Rgb([86, 180, 233]);
    const BLACK: Rgb<u8> = Rgb([0; 3]);

    fn drawn(width: u32, height: u32, label: &str, bbox: [f64; 4]) -> RgbImage {
        let mut picture = RgbImage::from_pixel(width, height, GREY);
        let object = Labelled {
            class: 1 + COLOURS.len(),
            label: label.to_owned(),
            bbox,
        };
        draw(&mut picture, &[object]);
        picture
    }

    fn colours(picture: &RgbImage, columns: Range<u32>, rows: Range<u32>) -> HashSet<Rgb<u8>> {
        rows.flat_map(|y| columns.clone().map(move |x| (x, y)))
            .map(|(x, y)| *picture.get_pixel(x, y))
            .collect()
    }

    #[test]
    fn a_frame_has_the_colour_of_its_class_and_what_it_holds_stays() {
        let picture = drawn(200, 120, "cat 0.87", [20.0, 30.0, 80.0, 60.0]);
        for (columns, rows) in [
            (19..21, 30..91),
            (99..101, 30..91),
            (19..101, 30..31),
            (19..101, 89..91),
        ] {
            assert_eq!(colours(&picture, columns, rows), HashSet::from([SKY]));
        }
        for (columns, rows) in [(21..99, 31..89), (101..200, 0..120), (0..200, 91..120)] {
            assert_eq!(colours(&picture, columns, rows), HashSet::from([GREY]));
        }
        // Eight characters of 6 by 10 pixels.
        let label = colours(&picture, 20..68, 20..30);
        assert_eq!(label, HashSet::from([SKY, BLACK]));
        assert_eq!(colours(&picture, 68..200, 0..29), HashSet::from([GREY]));
    }

    #[test]
    fn text_grows_with_the_picture() {
        let picture = drawn(2000, 200, "a", [100.0, 100.0, 500.0, 50.0]);
        let label = colours(&picture, 100..120, 60..95);
        assert_eq!(label, HashSet::from([SKY, BLACK]));
        assert_eq!(colours(&picture, 120..600, 0..95), HashSet::from([GREY]));
    }

    #[test]
    fn a_label_stays_inside_the_picture() {
        let picture = drawn(200, 120, "cat 0.87", [180.0, 0.0, 100.0, 100.0]);
        let label = colours(&picture, 152..200, 0..10);
        assert_eq!(label, HashSet::from([SKY, BLACK]));
    }

    #[test]
    fn characters_that_the_font_lacks_are_question_marks() {
        let bbox = [20.0, 30.0, 80.0, 60.0];
        assert_eq!(
            drawn(200, 120, "Käse 名\n", bbox),
            drawn(200, 120, "Käse ??", bbox)
        );
    }

    #[test]
    fn any_box_can_be_drawn_on_any_picture() {
        for bbox in [
            [0.0; 4],
            [10.0, 10.0, 0.0, 0.0],
            [10.0, 10.0, -5.0, -5.0],
            [-50.0, -50.0, 100.0, 100.0],
            [-50.0, -50.0, 10.0, 10.0],
            [1e9, 1e9, 10.0, 10.0],
            [-1e300, 0.0, f64::INFINITY, f64::NAN],
        ] {
            for (width, height) in [(1, 1), (32, 32), (2500, 10), (10, 2500)] {
                drawn(width, height, "", bbox);
                drawn(width, height, &"long".repeat(100), bbox);
            }
        }
    }
}
