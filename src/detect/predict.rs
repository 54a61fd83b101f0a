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
use crate::train::{RunFolder, Surroundings, create_folder, write_durably};

const RESULTS_FILE: &str = "results.json";
const JPEG_QUALITY: u8 = 90;
/// Pictures after which results are first written: on a disk that gets full there is no room for them in the end.
const FIRST_RESULTS: usize = 1000;

/// How pictures are predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictConfig {
    /// Least score that is drawn and written.
    pub least_score: f64,
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
    /// Images that it did not come to before it was stopped.
    pub missing: usize,
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
/// - in the end, and now and then before it, `results.json`, COCO's list of results, with the images' names. Images
///   that could be read have the ids 1, 2, … in the order of `sources`, and by name within each.
///
/// `find` is the detector: boxes in pixels of the picture, the most certain first, with classes of `classes`. `data`
/// says what images are decoded to. A source is an image, a folder, which is searched with all below it, or a `.tar`.
/// Images that cannot be read are told and passed over; that none can is an error. `around` may stop it after each
/// image.
///
/// # Panics
/// Where `find` answers with a class that does not exist.
pub fn predict(
    mut find: impl FnMut(&Picture) -> Vec<Prediction>,
    classes: &[Class],
    data: &DataConfig,
    sources: &[PathBuf],
    out: &Path,
    config: &PredictConfig,
    around: &Surroundings,
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
    let observer = around.observer;
    let results = out.join(RESULTS_FILE);
    let mut records: Vec<Record> = Vec::new();
    let mut unreadable = Vec::new();
    let mut pictures = 0;
    let mut next_results = FIRST_RESULTS;
    let mut taken = HashSet::new();
    observer.begin("finding objects", images.len() as u64);
    for (done, &(source, entry)) in (1..).zip(&images) {
        match source.picture(entry, data) {
            Ok(picture) => {
                let mut found = find(&picture);
                found.retain(|prediction| prediction.score >= config.least_score);
                let path = out.join(picture_name(&entry.name, &mut taken));
                if let Err(error) = write_picture(&path, picture, &found, classes) {
                    // What was found so far took longer than this picture. Where there is no room for it either, older
                    // results remain.
                    let _ = write_results(&results, &records);
                    return Err(error);
                }
                pictures += 1;
                let record = |prediction: &Prediction| Record {
                    image_id: pictures,
                    file_name: &entry.name,
                    category_id: classes[prediction.class].id,
                    bbox: prediction.bbox.map(|number| rounded(number, 2)),
                    score: rounded(prediction.score, 5),
                };
                records.extend(found.iter().map(record));
                if pictures == next_results {
                    write_results(&results, &records)?;
                    next_results += next_results / 4;
                }
            }
            Err(reason) => {
                let name = entry.name.to_string();
                observer.note(&format!("passed over an image: {name}: {reason}"));
                unreadable.push(BadImage { name, reason });
            }
        }
        observer.progress(done, "");
        if (around.stop)() {
            break;
        }
    }
    observer.end();
    let missing = images.len() - pictures - unreadable.len();
    if pictures == 0
        && missing == 0
        && let (Some(source), Some(BadImage { name, reason })) =
            (sources.first(), unreadable.first())
    {
        let message = format!(
            "no image can be read ({} tried); the first is {name}: {reason}. Repair them or give others",
            unreadable.len()
        );
        return Err(Error::data(source.path(), message));
    }
    create_folder(out)?;
    write_results(&results, &records)?;
    Ok(Predicted {
        pictures,
        boxes: records.len(),
        unreadable,
        missing,
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

fn write_results(path: &Path, records: &[Record]) -> Result<()> {
    let json = serde_json::to_vec(records).expect("texts and numbers can be written");
    write_durably(path, &json)
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
    use crate::train::fault;

    fn classes() -> Vec<Class> {
        [(3, "dog"), (7, "cat")]
            .map(|(id, name)| Class {
                id,
                name: name.to_owned(),
            })
            .to_vec()
    }

    /// A cat, a dog and a doubtful dog in every picture.
    fn find(_: &Picture) -> Vec<Prediction> {
        let found = [
            (1, 0.876_543_2, [1.234, 2.0, 10.006, 8.5]),
            (0, 0.5, [4.0, 4.0, 6.0, 6.0]),
            (0, 0.1, [0.0, 0.0, 5.0, 5.0]),
        ];
        let found = found.map(|(class, score, bbox)| Prediction { class, score, bbox });
        found.to_vec()
    }

    const ALONE: Surroundings = Surroundings {
        observer: &Silent,
        stop: &|| false,
    };

    fn run(sources: &[PathBuf], out: &Path) -> Result<Predicted> {
        run_within(&ALONE, sources, out)
    }

    fn run_within(around: &Surroundings, sources: &[PathBuf], out: &Path) -> Result<Predicted> {
        let config = PredictConfig { least_score: 0.3 };
        let data = DataConfig::default();
        predict(find, &classes(), &data, sources, out, &config, around)
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
    fn boxes_are_drawn_in_colour_on_a_grey_picture() {
        let home = tempfile::tempdir().unwrap();
        let (image, out) = (home.path().join("1.png"), home.path().join("out"));
        save(&image, 200);
        let data = DataConfig {
            channels: 1,
            ..DataConfig::default()
        };
        let config = PredictConfig { least_score: 0.6 };
        let find = |picture: &Picture| {
            assert_eq!(picture.channels, 1);
            find(picture)
        };
        let predicted = predict(find, &classes(), &data, &[image], &out, &config, &ALONE).unwrap();
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
    fn what_was_found_is_kept_where_it_is_stopped_or_the_disk_is_full() {
        let home = tempfile::tempdir().unwrap();
        let images = home.path().join("images");
        for name in ["1.png", "2.png", "3.png"] {
            save(&images.join(name), 60);
        }
        let images = [images];
        let out = home.path().join("stopped");
        let around = Surroundings {
            stop: &|| true,
            ..ALONE
        };
        let predicted = run_within(&around, &images, &out).unwrap();
        assert_eq!((predicted.pictures, predicted.missing), (1, 2));
        assert_eq!(results(&predicted).as_array().unwrap().len(), 2);

        // A picture takes five writes: this is one of the second.
        fault::fail_at(7);
        let out = home.path().join("full");
        let error = run(&images, &out).unwrap_err();
        assert!(error.to_string().contains("injected"), "{error}");
        let kept = fs::read(out.join(RESULTS_FILE)).unwrap();
        let kept: Vec<Value> = serde_json::from_slice(&kept).unwrap();
        assert!(kept.len() == 2 && kept.iter().all(|found| found["image_id"] == 1));
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
