//! Batches of pictures with boxes, and the figures of predictions: AP as pycocotools has it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qbheat::config::DetectorConfig;
use qbheat::data::{DataConfig, ImageSize};
use qbheat::detect::{
    Class, DetectionBatch, DetectionLoader, DetectionLoaderConfig, DetectionSet, Kind, MeanBoxes,
    Prediction, Score, Sets, TrueBox, ViewConfig, baselines, chance, score,
};
use qbheat::error::Error;
use qbheat::observe::{Notes, Observer, Silent};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::coco::{bccd, changed, open_part};
use crate::support::write_images;

fn loader(view: Option<ViewConfig>, threads: usize, first_step: u64) -> DetectionLoader {
    let set = open_part(&bccd(), "train").unwrap();
    let config = DetectionLoaderConfig {
        seed: 3,
        image_size: ImageSize {
            height: 48,
            width: 80,
        },
        batch_size: 5,
        view,
        data: DataConfig {
            loader_threads: threads,
            ..DataConfig::default()
        },
    };
    DetectionLoader::new(&Arc::new(set), &config, first_step)
}

fn batches(loader: &mut DetectionLoader, count: usize) -> Vec<DetectionBatch> {
    (0..count).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn batches_are_the_same_for_any_number_of_threads_and_from_any_step_on() {
    let reference = batches(&mut loader(Some(ViewConfig::default()), 1, 0), 6);
    let same = |found: &[DetectionBatch], expected: &[DetectionBatch]| {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(
                (found.epoch, &found.indices),
                (expected.epoch, &expected.indices)
            );
            assert!(found.pixels == expected.pixels, "other pixels");
            assert_eq!(found.boxes, expected.boxes);
            assert_eq!(found.placements, expected.placements);
        }
    };
    same(
        &batches(&mut loader(Some(ViewConfig::default()), 3, 0), 6),
        &reference,
    );
    same(
        &batches(&mut loader(Some(ViewConfig::default()), 2, 3), 3),
        &reference[3..],
    );
    assert_eq!(reference[0].shape, [5, 3, 48, 80]);
    assert_eq!(reference[0].pixels.len(), 5 * 3 * 48 * 80);
    let epochs: Vec<u64> = reference.iter().map(|batch| batch.epoch).collect();
    assert_eq!(epochs, [0, 0, 1, 1, 2, 2]);
}

#[test]
fn without_a_view_of_its_own_training_sees_what_evaluation_sees() {
    let batch = loader(None, 1, 0).next_batch().unwrap();
    let set = open_part(&bccd(), "train").unwrap();
    let whole = DetectionBatch::whole(&set, &batch.indices, batch.placements[0].frame).unwrap();
    assert!(whole.pixels == batch.pixels, "other pixels");
    assert_eq!((whole.shape, whole.boxes), (batch.shape, batch.boxes));
}

/// A folder of 12 images with a box each, and their annotations as `train.json`.
fn twelve() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["images"], 12, 32);
    let images: Vec<Value> = (0..12)
        .map(|id| json!({"id": id, "file_name": format!("images/{id:03}.png")}))
        .collect();
    let boxes: Vec<Value> = (0..12)
        .map(|id| json!({"id": id, "image_id": id, "category_id": 1, "bbox": [2, 3, 10, 12]}))
        .collect();
    let document = json!({
        "images": images,
        "annotations": boxes,
        "categories": [{"id": 1, "name": "cat"}],
    });
    fs::write(home.path().join("train.json"), document.to_string()).unwrap();
    home
}

/// Images of `train.json` that are not kept in memory; where nothing is to be scored, 3 of 12 are held out.
fn sets(home: &Path, more: &[(&str, &str)], observer: &dyn Observer) -> Result<Sets, Error> {
    let train = home.join("train.json").display().to_string();
    let given = [
        ("detect.train.path", train.as_str()),
        ("optim.batch_size", "4"),
        ("data.held_out", "0.25"),
        ("data.memory_mib", "0"),
    ];
    let settings: Vec<(String, String)> = given
        .iter()
        .chain(more)
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    Sets::open(&DetectorConfig::load(None, &settings)?, observer)
}

#[test]
fn images_that_cannot_be_decoded_are_not_scored_and_others_are_trained_on_in_their_place() {
    let home = twelve();
    let open = |allowed: &str, observer: &dyn Observer| {
        sets(home.path(), &[("data.max_bad_share", allowed)], observer)
    };
    let sound = open("0.4", &Silent).unwrap();
    assert_eq!((sound.train.images.len(), sound.val.images.len()), (9, 3));
    let first = |set: &DetectionSet| set.images[0].name.clone();
    let (trained, scored) = (first(&sound.train), first(&sound.val));
    for name in [&trained, &scored] {
        // The header stays, and so does the length.
        let path = home.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[60..].fill(0);
        fs::write(&path, bytes).unwrap();
    }

    let notes = Notes::default();
    let damaged = open("0.4", &notes).unwrap();
    let told = notes.so_far().concat();
    assert!(told.contains(&scored) && !told.contains(&trained), "{told}");
    assert_eq!(
        (damaged.train.images.len(), damaged.val.images.len()),
        (9, 2)
    );
    assert_eq!(damaged.val.summary().findings[&Kind::ImageUnreadable], 1);
    assert!((0..2).all(|index| damaged.val.picture(index).is_ok()));
    // So a run that has begun goes on.
    assert_eq!(damaged.fingerprint(), sound.fingerprint());
    let batch = DetectionBatch::whole(&damaged.train, &[0, 2], ImageSize::square(32)).unwrap();
    assert_eq!(batch.indices, [1, 2]);
    assert_eq!(batch.passed_over[0].name, trained);

    let text = open("0.1", &Silent).err().unwrap().to_string();
    for word in ["1 of 3", "data.max_bad_share", scored.as_str()] {
        assert!(text.contains(word), "`{word}` is missing: {text}");
    }
}

#[test]
fn it_is_said_how_the_images_to_score_came_to_be() {
    let home = twelve();
    let at = |name: &str| home.path().join(name).display().to_string();
    let (train, val) = (at("train.json"), at("val.json"));
    let text = fs::read_to_string(&train).unwrap();
    fs::write(&val, text + "\n").unwrap();
    let limit = ("detect.limit", "5");
    let same = ("detect.val.path", train.as_str());
    let by_heart = "only shows whether it can learn";
    for (more, words) in [
        (vec![], "scored on images held out of it: 3 images"),
        (vec![limit], "scored on images held out of it: 3 images"),
        (
            vec![("detect.val.path", val.as_str())],
            "val.json: 12 images",
        ),
        (vec![same], by_heart),
        (vec![same, limit], by_heart),
        (vec![("detect.overfit", "4")], by_heart),
    ] {
        let said = sets(home.path(), &more, &Silent).unwrap().describe();
        assert!(said.contains(words), "{more:?}: {said}");
    }
}

#[derive(Deserialize)]
struct Parity {
    classes: usize,
    truths: Vec<Vec<ParityTruth>>,
    predictions: Vec<Vec<ParityPrediction>>,
    figures: Vec<f64>,
}

#[derive(Deserialize)]
struct ParityTruth {
    class: usize,
    bbox: [f64; 4],
    area: f64,
    crowd: bool,
}

#[derive(Deserialize)]
struct ParityPrediction {
    class: usize,
    score: f64,
    bbox: [f64; 4],
}

fn classes(count: usize) -> Vec<Class> {
    (0..count)
        .map(|number| Class {
            id: number as u64,
            name: format!("class {number}"),
        })
        .collect()
}

/// In pycocotools' order.
fn figures(score: &Score) -> Vec<Option<f64>> {
    let precision = [
        score.ap,
        score.ap50,
        score.ap75,
        score.ap_small,
        score.ap_medium,
        score.ap_large,
    ];
    let recall = score.recall.into_iter().chain(score.recall_by_size);
    precision.into_iter().chain(recall).collect()
}

/// Made by `tools/make_coco_fixture.py`.
#[test]
fn the_twelve_figures_are_those_of_pycocotools() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/coco-parity.json");
    let sets: Vec<Parity> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(sets.len() > 5);
    for (number, set) in sets.into_iter().enumerate() {
        let truths: Vec<Vec<TrueBox>> = set
            .truths
            .into_iter()
            .map(|boxes| {
                let boxes = boxes.into_iter();
                boxes
                    .map(|truth| TrueBox {
                        annotation: None,
                        class: truth.class,
                        bbox: truth.bbox,
                        area: truth.area,
                        crowd: truth.crowd,
                    })
                    .collect()
            })
            .collect();
        let truths: Vec<&[TrueBox]> = truths.iter().map(Vec::as_slice).collect();
        let predictions: Vec<Vec<Prediction>> = set
            .predictions
            .into_iter()
            .map(|found| {
                let found = found.into_iter();
                found
                    .map(|ParityPrediction { class, score, bbox }| Prediction {
                        class,
                        score,
                        bbox,
                    })
                    .collect()
            })
            .collect();
        let scored = score(&truths, &classes(set.classes), &predictions, 0.5).unwrap();
        for (found, expected) in figures(&scored).into_iter().zip(set.figures) {
            let found = found.unwrap_or(-1.0);
            assert!(
                (found - expected).abs() < 1e-6,
                "set {number}: {found} is not {expected}"
            );
        }
        // The whole is the mean of the classes that have boxes.
        let of_classes: Vec<f64> = scored.classes.iter().filter_map(|class| class.ap).collect();
        if let Some(ap) = scored.ap {
            let mean = of_classes.iter().sum::<f64>() / of_classes.len() as f64;
            assert!((ap - mean).abs() < 1e-9, "set {number}: {ap} is not {mean}");
        } else {
            assert!(of_classes.is_empty());
        }
    }
}

fn truth(class: usize, bbox: [f64; 4]) -> TrueBox {
    TrueBox {
        annotation: None,
        class,
        bbox,
        area: bbox[2] * bbox[3],
        crowd: false,
    }
}

fn found(class: usize, score: f64, bbox: [f64; 4]) -> Prediction {
    Prediction { class, score, bbox }
}

#[test]
fn curves_confusion_and_single_images_are_those_that_one_can_count() {
    let [a, b, c] = [
        [0.0, 0.0, 50.0, 50.0],
        [60.0, 0.0, 40.0, 40.0],
        [0.0, 60.0, 30.0, 30.0],
    ];
    let first = [truth(0, a), truth(0, b)];
    let second = [truth(1, c)];
    let truths: [&[TrueBox]; 3] = [&first, &second, &[]];
    // One found, one taken for the other class, one where nothing is, one too unsure to be counted.
    let predictions = [
        vec![found(0, 0.9, a), found(1, 0.8, b)],
        vec![found(1, 0.7, [70.0, 70.0, 20.0, 20.0]), found(1, 0.1, c)],
        vec![],
    ];
    let scored = score(&truths, &classes(2), &predictions, 0.5).unwrap();
    assert_eq!(scored.confusion, [[1u64, 1, 0], [0, 0, 1], [0, 1, 0]]);
    assert_eq!(scored.classes[0].boxes, 2);
    // Half of the boxes are found, without a mistake: 51 of 101 recalls have precision 1.
    let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-9;
    assert!(
        close(scored.classes[0].ap, 51.0 / 101.0),
        "{:?}",
        scored.classes[0]
    );
    let curve = &scored.classes[0].curve;
    assert_eq!(curve.len(), 51);
    assert!(
        curve
            .iter()
            .all(|&[recall, precision]| recall <= 0.5 && precision > 0.999)
    );
    // Found as the third.
    assert!(
        close(scored.classes[1].ap50, 1.0 / 3.0),
        "{:?}",
        scored.classes[1]
    );
    assert_eq!(scored.images[2], None);
    assert!(scored.images[0] < Some(1.0) && scored.images[0] > Some(0.0));
    let nothing = score(&truths, &classes(2), &[vec![], vec![], vec![]], 0.5).unwrap();
    assert_eq!((nothing.ap, nothing.ap_large), (Some(0.0), None));
    assert_eq!(nothing.confusion, [[0u64, 0, 2], [0, 0, 1], [0, 0, 0]]);
}

#[test]
fn numbers_that_are_none_do_not_reach_the_evaluation() {
    let first = [truth(0, [0.0, 0.0, 5.0, 5.0])];
    let truths: [&[TrueBox]; 1] = [&first];
    for bad in [f64::NAN, f64::INFINITY] {
        for prediction in [found(0, bad, [0.0; 4]), found(0, 0.5, [0.0, bad, 1.0, 1.0])] {
            let error = score(&truths, &classes(1), &[vec![prediction]], 0.5).unwrap_err();
            assert!(error.to_string().contains("image number 0"), "{error}");
        }
    }
    let unknown = score(&truths, &classes(1), &[vec![found(1, 0.5, [0.0; 4])]], 0.5);
    assert!(unknown.unwrap_err().to_string().contains("class number 1"));
}

#[test]
fn predictors_that_look_at_nothing_reach_what_the_data_give_away() {
    // A box at the same place in every image gives itself away, chance finds it hardly ever.
    let same = changed(|annotations| {
        for image in [1_usize, 2] {
            annotations["annotations"][image - 1] = json!(
                {"id": image, "image_id": image, "category_id": 2, "bbox": [4, 8, 6, 10]}
            );
        }
        annotations["images"].as_array_mut().unwrap().pop();
    })
    .unwrap();
    let reached = baselines(&same, &same, 0).unwrap();
    assert!(
        reached.mean_boxes.ap > Some(0.999),
        "{:?}",
        reached.mean_boxes.ap
    );
    assert!(reached.chance.ap < Some(0.2), "{:?}", reached.chance.ap);
    assert_eq!(reached, baselines(&same, &same, 0).unwrap());
    let [predicted] = MeanBoxes::of(&same.images).predict(64, 32)[..] else {
        panic!("there is one place with boxes");
    };
    assert_eq!(predicted, found(1, 1.0, [8.0, 8.0, 12.0, 10.0]));

    let train = open_part(&bccd(), "train").unwrap();
    let val = open_part(&bccd(), "val").unwrap();
    let reached = baselines(&train, &val, 0).unwrap();
    assert!(reached.mean_boxes.ap50 > reached.chance.ap50);
    assert!(
        reached.mean_boxes.ap50 < Some(0.5),
        "{:?}",
        reached.mean_boxes.ap50
    );
    for Prediction { class, score, bbox } in chance(40, 30, 3, 1, 2) {
        let [left, top, width, height] = bbox;
        assert!(class < 3 && (0.0..1.0).contains(&score));
        assert!(left >= 0.0 && top >= 0.0 && left + width <= 40.0 && top + height <= 30.0);
    }
}
