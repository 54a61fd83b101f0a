//! What a detector finds in pictures, drawn and as numbers.

use std::collections::HashSet;
use std::iter;
use std::path::{Path, PathBuf};

use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use serde::Serialize;

use super::average_precision::Prediction;
use super::coco::Class;
use super::drawing::{Labelled, draw};
use crate::data::{BadImage, DataConfig, Entry, Picture, Source};
use crate::error::{Error, Result};
use crate::observe::Observer;
use crate::train::{RunFolder, create_folder, write_durably};

const RESULTS_FILE: &str = "results.json";
const JPEG_QUALITY: u8 = 90;

/// How pictures are predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictConfig {
    /// Least score that is drawn and written.
    pub least_score: f64,
    /// Most boxes an image.
    pub most: usize,
}

/// What a detector found in pictures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Predicted {
    /// Images that could be read.
    pub pictures: usize,
    /// Boxes drawn on them.
    pub boxes: usize,
    /// Images that could not be read.
    pub unreadable: Vec<BadImage>,
    /// The file of results.
    pub results: PathBuf,
}

/// A box in COCO's list of results.
#[derive(Serialize)]
struct Record<'a> {
    image_id: usize,
    file_name: &'a str,
    category_id: u64,
    bbox: [f64; 4],
    score: f64,
}

/// Finds objects in images and writes under `out`, which must not hold anything yet:
///
/// - for each image that can be read a JPEG with boxes, labels and scores, at the image's place below its source and
///   under its name; with a number added where another image has that name already;
/// - in the end `results.json`, COCO's list of results, with the images' names. Images that could be read have the ids
///   1, 2, … in the order of `sources`, and by name within each.
///
/// `find` is the detector: boxes in pixels of the picture, the most certain first, with classes of `classes`. `data`
/// says what images are decoded to. A source is an image, a folder, which is searched with all below it, or a `.tar`.
/// Images that cannot be read are told and passed over; that none can is an error.
///
/// # Panics
/// Where `find` answers with a class that does not exist.
pub fn predict(
    mut find: impl FnMut(&Picture) -> Result<Vec<Prediction>>,
    classes: &[Class],
    data: &DataConfig,
    sources: &[PathBuf],
    out: &Path,
    config: &PredictConfig,
    observer: &dyn Observer,
) -> Result<Predicted> {
    RunFolder::check_free(out)?;
    let sources: Vec<Source> = sources
        .iter()
        .map(|path| open(path))
        .collect::<Result<_>>()?;
    let images: Vec<(&Source, &Entry)> = sources
        .iter()
        .flat_map(|source| source.entries.iter().map(move |entry| (source, entry)))
        .collect();
    let mut records = Vec::new();
    let mut unreadable = Vec::new();
    let mut pictures = 0;
    let mut taken = HashSet::new();
    observer.begin("finding objects", images.len() as u64);
    for (done, &(source, entry)) in (1..).zip(&images) {
        match source.picture(entry, data) {
            Ok(picture) => {
                pictures += 1;
                let mut found = find(&picture)?;
                found.retain(|prediction| prediction.score >= config.least_score);
                found.truncate(config.most);
                let record = |prediction: &Prediction| Record {
                    image_id: pictures,
                    file_name: &entry.name,
                    category_id: classes[prediction.class].id,
                    bbox: prediction.bbox.map(|number| rounded(number, 2)),
                    score: rounded(prediction.score, 5),
                };
                records.extend(found.iter().map(record));
                let path = out.join(picture_name(&entry.name, &mut taken));
                write_picture(&path, picture, &found, classes)?;
            }
            Err(reason) => {
                let name = entry.name.to_string();
                observer.note(&format!("passed over an image: {name}: {reason}"));
                unreadable.push(BadImage { name, reason });
            }
        }
        observer.progress(done, "");
    }
    observer.end();
    if pictures == 0
        && let (Some(source), Some(BadImage { name, reason })) =
            (sources.first(), unreadable.first())
    {
        let message = format!(
            "no image can be read ({} tried); the first is {name}: {reason}. Repair them or give others",
            unreadable.len()
        );
        return Err(Error::data(source.path(), message));
    }
    let results = out.join(RESULTS_FILE);
    create_folder(out)?;
    let json = serde_json::to_vec(&records).expect("texts and numbers can be written");
    write_durably(&results, &json)?;
    Ok(Predicted {
        pictures,
        boxes: records.len(),
        unreadable,
        results,
    })
}

fn open(path: &Path) -> Result<Source> {
    if !path.exists() {
        return Err(Error::Missing {
            path: path.to_owned(),
            flag: "IMAGE",
        });
    }
    Source::open_any(path)
}

fn rounded(number: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (number * scale).round() / scale
}

/// `a/b.png` to `a/b.jpg`, and to `a/b-2.jpg` where that is taken, also in capitals, which not every disk tells apart.
fn picture_name(name: &str, taken: &mut HashSet<String>) -> String {
    let stem = Path::new(name).with_extension("").display().to_string();
    let numbered = (2..).map(|number| format!("{stem}-{number}.jpg"));
    iter::once(format!("{stem}.jpg"))
        .chain(numbered)
        .find(|name| taken.insert(name.to_lowercase()))
        .expect("numbers do not end")
}

fn write_picture(
    path: &Path,
    picture: Picture,
    found: &[Prediction],
    classes: &[Class],
) -> Result<()> {
    let boxes: Vec<Labelled> = found
        .iter()
        .map(|&Prediction { class, score, bbox }| Labelled {
            class,
            label: format!("{} {score:.2}", classes[class].name),
            bbox,
        })
        .collect();
    let mut picture = in_rgb(picture);
    draw(&mut picture, &boxes);
    let mut jpeg = Vec::new();
    picture
        .write_with_encoder(JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY))
        .map_err(|error| Error::data(path, error.to_string()))?;
    if let Some(folder) = path.parent() {
        create_folder(folder)?;
    }
    write_durably(path, &jpeg)
}

fn in_rgb(picture: Picture) -> RgbImage {
    let pixels = match picture.channels {
        1 => picture.pixels.iter().flat_map(|&luma| [luma; 3]).collect(),
        _ => picture.pixels,
    };
    RgbImage::from_raw(picture.width, picture.height, pixels)
        .expect("a picture has height·width·channels bytes")
}

#[cfg(test)]
mod tests {
    use std::{fs, slice};

    use image::Rgb;
    use serde_json::{Value, json};

    use super::*;
    use crate::observe::Silent;

    fn classes() -> Vec<Class> {
        [(3, "dog"), (7, "cat")]
            .map(|(id, name)| Class {
                id,
                name: name.to_owned(),
            })
            .to_vec()
    }

    /// A cat, a dog and a doubtful dog in every picture.
    fn find(_: &Picture) -> Result<Vec<Prediction>> {
        let found = [
            (1, 0.876_543_2, [1.234, 2.0, 10.006, 8.5]),
            (0, 0.5, [4.0, 4.0, 6.0, 6.0]),
            (0, 0.1, [0.0, 0.0, 5.0, 5.0]),
        ];
        let found = found.map(|(class, score, bbox)| Prediction { class, score, bbox });
        Ok(found.to_vec())
    }

    fn run(sources: &[PathBuf], out: &Path) -> Result<Predicted> {
        let config = PredictConfig {
            least_score: 0.3,
            most: 10,
        };
        let data = DataConfig::default();
        predict(find, &classes(), &data, sources, out, &config, &Silent)
    }

    fn save(path: &Path, width: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(width, 40, Rgb([200, 30, 30]))
            .save(path)
            .unwrap();
    }

    fn results(predicted: &Predicted) -> Value {
        serde_json::from_slice(&fs::read(&predicted.results).unwrap()).unwrap()
    }

    fn width_of(picture: PathBuf) -> u32 {
        image::open(picture).unwrap().width()
    }

    #[test]
    fn a_folder_gives_a_picture_an_image_and_one_list_of_results() {
        let home = tempfile::tempdir().unwrap();
        let (images, out) = (home.path().join("images"), home.path().join("a/out"));
        save(&images.join("1.png"), 60);
        save(&images.join("below/1.png"), 70);
        fs::write(images.join("notes.txt"), "no image").unwrap();
        let predicted = run(&[images], &out).unwrap();
        assert_eq!((predicted.pictures, predicted.boxes), (2, 4));
        assert!(predicted.unreadable.is_empty(), "{predicted:?}");
        assert_eq!(predicted.results, out.join("results.json"));
        let of = |id: u64, name: &str| {
            [
                json!({"image_id": id, "file_name": name, "category_id": 7, "bbox": [1.23, 2.0, 10.01, 8.5],
                    "score": 0.87654}),
                json!({"image_id": id, "file_name": name, "category_id": 3, "bbox": [4.0, 4.0, 6.0, 6.0],
                    "score": 0.5}),
            ]
        };
        let expected = [of(1, "1.png"), of(2, "below/1.png")].concat();
        assert_eq!(results(&predicted), Value::Array(expected));
        assert_eq!(width_of(out.join("1.jpg")), 60);
        assert_eq!(width_of(out.join("below/1.jpg")), 70);
    }

    #[test]
    fn images_of_the_same_name_have_a_picture_each() {
        let home = tempfile::tempdir().unwrap();
        let images = ["a/1.png", "b/1.png", "b/1.jpg"].map(|name| home.path().join(name));
        for (image, width) in images.iter().zip([60, 70, 80]) {
            save(image, width);
        }
        let out = home.path().join("out");
        let sources = [images[0].clone(), home.path().join("b")];
        assert_eq!(run(&sources, &out).unwrap().pictures, 3);
        assert_eq!(width_of(out.join("1.jpg")), 60);
        assert_eq!(width_of(out.join("1-2.jpg")), 80);
        assert_eq!(width_of(out.join("1-3.jpg")), 70);
    }

    #[test]
    fn at_most_as_many_boxes_as_asked_for_are_drawn_on_a_grey_picture() {
        let home = tempfile::tempdir().unwrap();
        let (image, out) = (home.path().join("1.png"), home.path().join("out"));
        save(&image, 200);
        let data = DataConfig {
            channels: 1,
            ..DataConfig::default()
        };
        let config = PredictConfig {
            least_score: 0.0,
            most: 1,
        };
        let find = |picture: &Picture| {
            assert_eq!(picture.channels, 1);
            find(picture)
        };
        let predicted = predict(find, &classes(), &data, &[image], &out, &config, &Silent).unwrap();
        assert_eq!(predicted.boxes, 1);
        assert_eq!(results(&predicted).as_array().unwrap().len(), 1);
        let picture = image::open(out.join("1.jpg")).unwrap().into_rgb8();
        // 0.299·200 + 0.587·30 + 0.114·30 = 80.8
        let Rgb(values) = picture.get_pixel(190, 30);
        assert!(
            values.iter().all(|value| value.abs_diff(81) < 3),
            "{values:?}"
        );
        let coloured = |Rgb([red, _, blue]): &Rgb<u8>| red.abs_diff(*blue) > 50;
        assert!(picture.pixels().any(coloured));
    }

    #[test]
    fn what_is_no_image_is_passed_over_and_told() {
        let home = tempfile::tempdir().unwrap();
        let (images, out) = (home.path().join("images"), home.path().join("out"));
        save(&images.join("good.png"), 60);
        fs::write(images.join("bad.png"), "no image").unwrap();
        let predicted = run(slice::from_ref(&images), &out).unwrap();
        assert_eq!(predicted.pictures, 1);
        let [bad] = &predicted.unreadable[..] else {
            panic!("{predicted:?}");
        };
        assert_eq!(bad.name, "bad.png");
        assert!(bad.reason.starts_with("its content is none of"), "{bad:?}");
        assert_eq!(results(&predicted)[0]["file_name"], "good.png");
        assert_eq!(results(&predicted)[0]["image_id"], 1);
        assert!(!out.join("bad.jpg").exists());

        let nothing = home.path().join("nothing");
        let error = run(&[images.join("bad.png")], &nothing).unwrap_err();
        assert!(
            error.to_string().contains("bad.png: its content"),
            "{error}"
        );
        assert!(!nothing.exists());
    }

    #[test]
    fn nothing_is_overwritten() {
        let home = tempfile::tempdir().unwrap();
        let (image, out) = (home.path().join("1.png"), home.path().join("out"));
        save(&image, 60);
        save(&out.join("1.jpg"), 90);
        let error = run(&[image], &out).unwrap_err();
        assert!(matches!(error, Error::NotEmpty { .. }), "{error}");
        assert_eq!(width_of(out.join("1.jpg")), 90);
        assert!(!out.join(RESULTS_FILE).exists());
    }

    #[test]
    fn a_missing_image_is_named() {
        let home = tempfile::tempdir().unwrap();
        let missing = home.path().join("missing.png");
        let error = run(slice::from_ref(&missing), &home.path().join("out")).unwrap_err();
        assert!(
            matches!(&error, Error::Missing { path, flag: "IMAGE" } if *path == missing),
            "{error}"
        );
    }
}
