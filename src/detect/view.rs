//! What a detector sees: a picture, or a part of it, resized with its aspect kept into the top left corner of a frame.
//! The rest of the frame, at the right and at the bottom, is padding.
//!
//! Boxes in the frame are `[centre x, centre y, width, height]` as shares of the frame's sides, the form that networks
//! predict. [`Placement`] leads there from pixels of the picture, and back.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::coco::TrueBox;
use crate::config::require;
use crate::data::{Crop, DataConfig, ImageSize, Picture, distort, normalise, resize};
use crate::error::Result;

/// Places that are tried for a part of a picture until there is something to be found in it.
const CROP_TRIES: usize = 10;
/// Pixels of the frame: a box that is seen with a narrower side is not asked for.
const NARROWEST: f64 = 2.0;

/// How training changes what is seen, beside the flip and the colours of [`DataConfig`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ViewConfig {
    /// Smallest and largest size of the whole picture relative to the one that just fits into the frame; log-uniform.
    /// Of a larger one a part is seen, at a random place.
    pub scale: [f64; 2],
}

impl Default for ViewConfig {
    fn default() -> Self {
        Self { scale: [0.7, 1.5] }
    }
}

impl ViewConfig {
    /// Whether every value is usable; `section` is where its keys are.
    pub fn check(&self, section: &str) -> Result<()> {
        let [least, largest] = self.scale;
        require(
            0.01 <= least && least <= largest && largest <= 100.0,
            &format!("{section}.scale"),
            format!("{:?}", self.scale),
            "two factors from 0.01 to 100, the smaller first",
        )
    }
}

/// How a picture, or a part of it, lies in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// The part that is seen, whole pixels.
    crop: Crop,
    /// Whether it is mirrored, left to right.
    flip: bool,
    /// Pixels of the frame that it covers, from the top left corner.
    pub content: ImageSize,
    /// Size of the frame.
    pub frame: ImageSize,
}

/// A box to be found in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ViewBox {
    /// Number of its class.
    pub class: usize,
    /// `[centre x, centre y, width, height]` as shares of the frame's sides.
    pub bbox: [f32; 4],
}

/// A picture as it is seen.
pub struct View {
    /// Where it lies.
    pub placement: Placement,
    /// What is to be found in it.
    pub boxes: Vec<ViewBox>,
    /// One plane of [`Placement::content`] a channel.
    pub planes: Vec<u8>,
}

impl Placement {
    /// The whole picture, as large as fits.
    pub fn whole(width: u32, height: u32, frame: ImageSize) -> Self {
        let crop = Crop {
            left: 0.0,
            top: 0.0,
            width: f64::from(width),
            height: f64::from(height),
        };
        Self::of(crop, fitting(width, height, frame), false, frame)
    }

    /// `scale` is pixels of the frame for a pixel of the picture.
    fn of(crop: Crop, scale: f64, flip: bool, frame: ImageSize) -> Self {
        let side = |pixels: f64, most: usize| ((pixels * scale).round() as usize).clamp(1, most);
        Self {
            content: ImageSize {
                height: side(crop.height, frame.height),
                width: side(crop.width, frame.width),
            },
            crop,
            flip,
            frame,
        }
    }

    /// Part, size and side of a picture that training sees, by chance. Where a place holds none of the boxes, another
    /// is tried, and in the end the whole picture is seen.
    fn random(
        picture: &Picture,
        boxes: &[TrueBox],
        frame: ImageSize,
        config: &ViewConfig,
        flip: f64,
        random: &mut ChaCha8Rng,
    ) -> Self {
        let (width, height) = (picture.width, picture.height);
        let [least, largest] = config.scale.map(f64::ln);
        let scale = fitting(width, height, frame) * random.random_range(least..=largest).exp();
        let flip = random.random_bool(flip);
        let seen = |frame_side: usize, side: u32| {
            let pixels = (frame_side as f64 / scale).round();
            (pixels as u32).clamp(1, side)
        };
        let (seen_width, seen_height) = (seen(frame.width, width), seen(frame.height, height));
        let anything = boxes.iter().any(|object| !object.crowd);
        for _ in 0..CROP_TRIES {
            let crop = Crop {
                left: f64::from(random.random_range(0..=width - seen_width)),
                top: f64::from(random.random_range(0..=height - seen_height)),
                width: f64::from(seen_width),
                height: f64::from(seen_height),
            };
            let placement = Self::of(crop, scale, flip, frame);
            if !anything || !placement.see(boxes).is_empty() {
                return placement;
            }
        }
        Self {
            flip,
            ..Self::whole(width, height, frame)
        }
    }

    /// Rows and columns of a map that show anything of the picture.
    pub fn shown(&self, stride: usize) -> [usize; 2] {
        [self.content.height, self.content.width].map(|side| side.div_ceil(stride))
    }

    /// Pixels of the frame for a pixel of the picture, along x and y; they differ by the rounding of the content.
    fn scale(&self) -> [f64; 2] {
        [
            self.content.width as f64 / self.crop.width,
            self.content.height as f64 / self.crop.height,
        ]
    }

    /// From `[left, top, width, height]` in pixels of the picture to `[centre x, centre y, width, height]` as shares of
    /// the frame. What is not seen lies beyond the content.
    pub fn to_view(&self, [left, top, width, height]: [f64; 4]) -> [f64; 4] {
        let [along_x, along_y] = self.scale();
        let x = (left + width / 2.0 - self.crop.left) * along_x;
        let y = (top + height / 2.0 - self.crop.top) * along_y;
        let x = match self.flip {
            true => self.content.width as f64 - x,
            false => x,
        };
        let (frame_width, frame_height) = (self.frame.width as f64, self.frame.height as f64);
        [
            x / frame_width,
            y / frame_height,
            width * along_x / frame_width,
            height * along_y / frame_height,
        ]
    }

    /// The way back, clipped to what is seen of the picture.
    pub fn to_picture(&self, [x, y, width, height]: [f64; 4]) -> [f64; 4] {
        let [along_x, along_y] = self.scale();
        let (frame_width, frame_height) = (self.frame.width as f64, self.frame.height as f64);
        let x = match self.flip {
            true => self.content.width as f64 - x * frame_width,
            false => x * frame_width,
        };
        let y = y * frame_height;
        let half = [width * frame_width / 2.0, height * frame_height / 2.0];
        clip(
            [
                self.crop.left + (x - half[0]) / along_x,
                self.crop.top + (y - half[1]) / along_y,
                2.0 * half[0] / along_x,
                2.0 * half[1] / along_y,
            ],
            &self.crop,
        )
    }

    /// What is to be found: boxes whose centre is seen, clipped to what is seen, no side narrower than two pixels of
    /// the frame; no crowds.
    pub fn see(&self, boxes: &[TrueBox]) -> Vec<ViewBox> {
        let inside = |centre: f64, from: f64, length: f64| (from..from + length).contains(&centre);
        let crop = &self.crop;
        let mut seen = Vec::new();
        for TrueBox {
            class, bbox, crowd, ..
        } in boxes
        {
            let [left, top, width, height] = *bbox;
            let centre_seen = inside(left + width / 2.0, crop.left, crop.width)
                && inside(top + height / 2.0, crop.top, crop.height);
            let view = self.to_view(clip(*bbox, crop));
            let wide = view[2] * self.frame.width as f64 >= NARROWEST;
            let high = view[3] * self.frame.height as f64 >= NARROWEST;
            if !crowd && centre_seen && wide && high {
                seen.push(ViewBox {
                    class: *class,
                    bbox: view.map(|share| share as f32),
                });
            }
        }
        seen
    }
}

/// Pixels of the frame for a pixel of a picture that just fits.
fn fitting(width: u32, height: u32, frame: ImageSize) -> f64 {
    let along = |frame: usize, side: u32| frame as f64 / f64::from(side);
    along(frame.width, width).min(along(frame.height, height))
}

/// The part of `[left, top, width, height]` that lies within; sides of 0 where none does.
fn clip([left, top, width, height]: [f64; 4], within: &Crop) -> [f64; 4] {
    let along = |start: f64, length: f64, from: f64, size: f64| {
        let (first, last) = (start.max(from), (start + length).min(from + size));
        (first.min(from + size), (last - first).max(0.0))
    };
    let (left, width) = along(left, width, within.left, within.width);
    let (top, height) = along(top, height, within.top, within.height);
    [left, top, width, height]
}

impl View {
    /// The whole picture, for evaluation.
    pub fn whole(picture: &Picture, boxes: &[TrueBox], frame: ImageSize) -> Self {
        Self::of(
            picture,
            boxes,
            Placement::whole(picture.width, picture.height, frame),
        )
    }

    /// What training sees: part, size and side by chance, then what `data` says of colours and sharpness.
    pub fn random(
        picture: &Picture,
        boxes: &[TrueBox],
        frame: ImageSize,
        config: &ViewConfig,
        data: &DataConfig,
        random: &mut ChaCha8Rng,
    ) -> Self {
        let placement = Placement::random(picture, boxes, frame, config, data.flip, random);
        let mut view = Self::of(picture, boxes, placement);
        distort(&mut view.planes, placement.content, data, random);
        view
    }

    fn of(picture: &Picture, boxes: &[TrueBox], placement: Placement) -> Self {
        let Placement {
            crop,
            flip,
            content,
            ..
        } = placement;
        Self {
            boxes: placement.see(boxes),
            planes: resize(picture, &crop, content, flip),
            placement,
        }
    }

    /// Appends the frame as the numbers that a network sees, `[channels, height, width]`. The padding is 0, the mean of
    /// each channel.
    pub fn write(&self, into: &mut Vec<f32>) {
        let Placement { content, frame, .. } = self.placement;
        let mut values = Vec::with_capacity(self.planes.len());
        normalise(&self.planes, content, &mut values);
        for plane in values.chunks_exact(content.pixels()) {
            let end = into.len() + frame.pixels();
            for row in plane.chunks_exact(content.width) {
                into.extend_from_slice(row);
                into.resize(into.len() + frame.width - content.width, 0.0);
            }
            into.resize(end, 0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    fn object(class: usize, bbox: [f64; 4]) -> TrueBox {
        TrueBox {
            annotation: None,
            class,
            bbox,
            area: bbox[2] * bbox[3],
            crowd: false,
        }
    }

    /// Black, each box in a colour of its own: the channel of its class at full strength.
    fn painted(width: u32, height: u32, boxes: &[TrueBox]) -> Picture {
        let mut pixels = vec![0; 3 * (width * height) as usize];
        for TrueBox { class, bbox, .. } in boxes {
            let [left, top, box_width, box_height] = bbox.map(|pixels| pixels as u32);
            for y in top..top + box_height {
                for x in left..left + box_width {
                    pixels[3 * (y * width + x) as usize + class] = 255;
                }
            }
        }
        Picture {
            width,
            height,
            channels: 3,
            pixels,
        }
    }

    /// Left, top, right and bottom of the pixels at more than half strength in a plane of the view.
    fn extent(view: &View, channel: usize) -> Option<[f64; 4]> {
        let ImageSize { height, width } = view.placement.content;
        let plane = &view.planes[channel * width * height..(channel + 1) * width * height];
        let bright = plane.iter().enumerate().filter(|(_, value)| **value > 127);
        let places = bright.map(|(at, _)| ((at % width) as f64, (at / width) as f64));
        places.fold(None, |extent, (x, y)| {
            let [left, top, right, bottom] = extent.unwrap_or([x, y, x, y]);
            Some([
                left.min(x),
                top.min(y),
                right.max(x + 1.0),
                bottom.max(y + 1.0),
            ])
        })
    }

    #[test]
    fn pixels_under_a_box_before_are_the_pixels_under_it_after() {
        let config = ViewConfig { scale: [0.4, 3.0] };
        let (mut kept, mut dropped, mut clipped) = (0, 0, 0);
        for seed in 0..3000 {
            let random = &mut stream(seed, Purpose::Augmentation, 0, 0);
            let (width, height) = (random.random_range(60..200), random.random_range(60..200));
            let frame = ImageSize {
                height: random.random_range(64..160),
                width: random.random_range(64..160),
            };
            // One in each third, so that none covers another.
            let boxes: Vec<TrueBox> = (0..3)
                .map(|class| {
                    let third = width / 3;
                    let box_width = random.random_range(8..=third);
                    let box_height = random.random_range(8..=height);
                    let left = class * third + random.random_range(0..=third - box_width);
                    let top = random.random_range(0..=height - box_height);
                    object(
                        class as usize,
                        [left, top, box_width, box_height].map(f64::from),
                    )
                })
                .collect();
            let picture = painted(width, height, &boxes);
            let data = DataConfig::default();
            let view = View::random(&picture, &boxes, frame, &config, &data, random);
            let Placement { content, crop, .. } = view.placement;
            assert!(content.height <= frame.height && content.width <= frame.width);
            assert!(!view.boxes.is_empty());
            for truth in &boxes {
                let [left, top, box_width, box_height] = truth.bbox;
                let (x, y) = (left + box_width / 2.0, top + box_height / 2.0);
                let centre_seen = crop.left <= x
                    && x < crop.left + crop.width
                    && crop.top <= y
                    && y < crop.top + crop.height;
                let found = view.boxes.iter().find(|seen| seen.class == truth.class);
                let Some(ViewBox { bbox, .. }) = found else {
                    let seen = extent(&view, truth.class).unwrap_or_default();
                    let narrow = seen[2] - seen[0] <= 3.0 || seen[3] - seen[1] <= 3.0;
                    assert!(!centre_seen || narrow, "seed {seed}: {truth:?}");
                    dropped += 1;
                    continue;
                };
                assert!(centre_seen, "seed {seed}: {truth:?}");
                let [x, y, share_width, share_height] = bbox.map(f64::from);
                let half = (share_width / 2.0, share_height / 2.0);
                let (across, down) = (frame.width as f64, frame.height as f64);
                let expected = [
                    (x - half.0) * across,
                    (y - half.1) * down,
                    (x + half.0) * across,
                    (y + half.1) * down,
                ];
                let seen = extent(&view, truth.class).expect("its pixels are seen");
                for (seen, expected) in seen.iter().zip(expected) {
                    let difference = (seen - expected).abs();
                    assert!(difference <= 1.0, "seed {seed}: {seen} is not {expected}");
                }
                kept += 1;
                let back = view.placement.to_picture(bbox.map(f64::from));
                let same = back
                    .iter()
                    .zip(truth.bbox)
                    .all(|(a, b)| (a - b).abs() < 1e-3);
                clipped += usize::from(!same);
            }
        }
        // All that can happen happens often.
        assert!(
            kept > 3000 && dropped > 500 && clipped > 500,
            "{kept} {dropped} {clipped}"
        );
    }

    #[test]
    fn the_way_back_from_a_frame_is_the_way_there() {
        for seed in 0..200 {
            let random = &mut stream(seed, Purpose::Sample, 0, 0);
            let (width, height) = (random.random_range(1..500), random.random_range(1..500));
            let frame = ImageSize {
                height: random.random_range(1..300),
                width: random.random_range(1..300),
            };
            let placement = Placement {
                flip: random.random(),
                ..Placement::whole(width, height, frame)
            };
            let (width, height) = (f64::from(width), f64::from(height));
            let [left, top]: [f64; 2] = random.random();
            let bbox = [
                left * width,
                top * height,
                (1.0 - left) * width * random.random::<f64>(),
                (1.0 - top) * height * random.random::<f64>(),
            ];
            let back = placement.to_picture(placement.to_view(bbox));
            for (back, there) in back.iter().zip(bbox) {
                assert!(
                    (back - there).abs() < 1e-9 * width.max(height),
                    "seed {seed}"
                );
            }
        }
    }

    #[test]
    fn a_prediction_beyond_the_picture_is_clipped_to_it() {
        let placement = Placement::whole(40, 20, ImageSize::square(40));
        let clipped = placement.to_picture([0.0, 0.5, 0.5, 1.0]);
        assert_eq!(clipped, [0.0, 0.0, 10.0, 20.0]);
        let [.., width, height] = placement.to_picture([0.5, 0.9, 0.2, 0.1]);
        assert_eq!((width, height), (8.0, 0.0));
    }

    #[test]
    fn the_rest_of_a_frame_is_padding() {
        let boxes = [object(0, [0.0, 0.0, 8.0, 4.0])];
        let picture = painted(8, 4, &boxes);
        let frame = ImageSize {
            height: 6,
            width: 10,
        };
        let view = View::whole(&picture, &boxes, frame);
        // 5 rows of 10 pixels: the width decides.
        assert_eq!(
            view.placement.content,
            ImageSize {
                height: 5,
                width: 10
            }
        );
        assert_eq!(view.boxes[0].bbox, [0.5, 5.0 / 12.0, 1.0, 5.0 / 6.0]);
        let mut numbers = Vec::new();
        view.write(&mut numbers);
        assert_eq!(numbers.len(), 3 * 60);
        assert!(numbers[50..60].iter().all(|&number| number == 0.0));
        assert!(numbers[..50].iter().all(|&number| number > 0.0));
    }

    #[test]
    fn crowds_and_boxes_too_small_to_see_are_not_asked_for() {
        let crowd = TrueBox {
            crowd: true,
            ..object(0, [0.0, 0.0, 50.0, 50.0])
        };
        let boxes = [
            crowd,
            object(1, [0.0, 0.0, 3.0, 50.0]),
            object(2, [0.0, 0.0, 4.0, 50.0]),
        ];
        let seen = Placement::whole(100, 100, ImageSize::square(50)).see(&boxes);
        assert_eq!(seen.iter().map(|seen| seen.class).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_view_is_a_function_of_seed_epoch_and_image() {
        let boxes = [object(0, [10.0, 10.0, 30.0, 30.0])];
        let picture = painted(80, 60, &boxes);
        let data = DataConfig {
            jitter: [0.4, 0.4, 0.4, 0.1],
            jitter_share: 1.0,
            ..DataConfig::default()
        };
        let view = |seed, epoch, image| {
            let random = &mut stream(seed, Purpose::Augmentation, epoch, image);
            let frame = ImageSize::square(64);
            View::random(
                &picture,
                &boxes,
                frame,
                &ViewConfig::default(),
                &data,
                random,
            )
        };
        let reference = view(0, 1, 2);
        let again = view(0, 1, 2);
        assert_eq!(
            (&reference.planes, reference.placement),
            (&again.planes, again.placement)
        );
        for other in [view(1, 1, 2), view(0, 2, 2), view(0, 1, 3)] {
            assert_ne!(reference.planes, other.planes);
        }
    }
}
