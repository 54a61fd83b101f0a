//! Every kind of image is what Pillow or arithmetic says (`tools/make_images.py`).

use qbheat::data::{DataConfig, Dataset, Picture};
use qbheat::observe::Silent;
use safetensors::SafeTensors;

use crate::support::fixtures;

/// JPEG leaves the inverse cosine transform and the colours between two samples to the decoder.
const JPEG_TOLERANCE: u8 = 3;

fn pictures(config: DataConfig) -> Vec<(String, Picture)> {
    let config = DataConfig {
        path: fixtures(),
        max_bad_share: 0.0,
        ..config
    };
    let dataset = Dataset::open(&config, 0, &Silent).unwrap();
    (0..dataset.images.len())
        .map(|index| {
            let (picture, _) = dataset.images.picture(index).unwrap();
            (dataset.images.name(index).to_owned(), picture.into_owned())
        })
        .collect()
}

fn compare(channels: usize, suffix: &str) {
    let bytes = std::fs::read(fixtures().join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let found = pictures(DataConfig {
        channels,
        ..DataConfig::default()
    });
    assert_eq!(
        2 * found.len(),
        expected.len(),
        "every file has its expected pixels"
    );
    let mut wrong = Vec::new();
    for (name, picture) in found {
        let expected = expected.tensor(&format!("{name}{suffix}")).unwrap();
        assert_eq!(
            [picture.height as usize, picture.width as usize],
            expected.shape()[..2],
            "{name}"
        );
        assert_eq!(picture.channels, channels);
        let allowed = match name.as_str() {
            // The decoder cuts 255·(1 − C)·(1 − K) where Pillow rounds.
            "cmyk.tiff" => 1,
            name if name.ends_with(".jpg") => JPEG_TOLERANCE,
            _ => 0,
        };
        assert_eq!(picture.pixels.len(), expected.data().len(), "{name}");
        let pairs = picture.pixels.iter().zip(expected.data());
        let difference = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        if difference > allowed {
            wrong.push((name, difference));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_kind_of_image_has_the_pixels_that_pillow_reads() {
    compare(3, "");
}

#[test]
fn one_channel_is_the_luma_that_pillow_computes() {
    compare(1, ".luma");
}

#[test]
fn transparent_pixels_show_the_background_that_was_asked_for() {
    let found = pictures(DataConfig {
        background: [10, 20, 250],
        ..DataConfig::default()
    });
    let picture = |name: &str| &found.iter().find(|(found, _)| found == name).unwrap().1;
    let (over, opaque) = (picture("rgb-alpha.png"), picture("rgb.png"));
    // The alpha of column x is 255·x/19, rounded.
    for (i, pixel) in over.pixels.chunks(3).enumerate() {
        let alpha = (255.0 * (i % 20) as f64 / 19.0).round() / 255.0;
        for (channel, below) in [10.0, 20.0, 250.0].into_iter().enumerate() {
            let above = f64::from(opaque.pixels[3 * i + channel]);
            let mixed = above * alpha + below * (1.0 - alpha);
            assert!((f64::from(pixel[channel]) - mixed).abs() <= 0.5 + 1e-9);
        }
    }
}
