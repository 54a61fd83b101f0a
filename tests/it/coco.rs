//! COCO files of every kind, and what becomes of what is wrong in them.

use std::fs;
use std::path::{Path, PathBuf};

use qbheat::config::DetectConfig;
use qbheat::data::DataConfig;
use qbheat::detect::{Class, DetectionSet, Kind, Origin, TrueBox, find_parts};
use qbheat::error::Error;
use qbheat::observe::Silent;
use serde_json::{Value, json};

use crate::support::{fixtures, write_images};

const SIDE: u32 = 32;

/// 16 images of BCCD, made by `tools/make_bccd_fixture.py`.
pub fn bccd() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bccd")
}

fn open(origin: &Origin) -> Result<DetectionSet, Error> {
    let config = DataConfig {
        max_bad_share: 0.5,
        ..DataConfig::default()
    };
    DetectionSet::open(origin, &config, &Silent)
}

/// Of a `.tar` or folder the annotation file with `part` in its name.
pub fn open_part(path: &Path, part: &str) -> Result<DetectionSet, Error> {
    open(&Origin {
        path: path.to_owned(),
        part: part.to_owned(),
        ..Origin::default()
    })
}

/// Three images and two boxes.
fn boxes() -> Value {
    let image = |id: u64| {
        let name = format!("images/{:03}.png", id - 1);
        json!({"id": id, "file_name": name, "width": SIDE, "height": SIDE})
    };
    json!({
        "info": {"description": "cats and dogs"},
        "images": [image(1), image(2), image(3)],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 12], "area": 100, "iscrowd": 0},
            {"id": 12, "image_id": 2, "category_id": 2, "bbox": [0, 0, 32, 32.0], "area": 1024, "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "pet"}],
    })
}

/// A folder with the images of [`boxes`] and this annotation file.
fn folder(annotations: &str) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["images"], 3, SIDE);
    fs::write(home.path().join("images/text.png"), "no image").unwrap();
    fs::write(home.path().join("boxes.json"), annotations).unwrap();
    home
}

fn open_json(annotations: &str) -> Result<DetectionSet, Error> {
    let home = folder(annotations);
    open_part(&home.path().join("boxes.json"), "")
}

/// [`boxes`], changed.
pub fn changed(change: impl Fn(&mut Value)) -> Result<DetectionSet, Error> {
    let mut annotations = boxes();
    change(&mut annotations);
    open_json(&annotations.to_string())
}

fn first_annotation(key: &'static str, value: Value) -> impl Fn(&mut Value) {
    move |annotations| annotations["annotations"][0][key] = value.clone()
}

fn push(list: &'static str, value: Value) -> impl Fn(&mut Value) {
    move |annotations| {
        let list = annotations[list].as_array_mut().unwrap();
        list.push(value.clone());
    }
}

fn all_boxes(set: &DetectionSet) -> Vec<TrueBox> {
    set.boxes().concat()
}

#[test]
fn a_sound_file_is_read_as_it_stands() {
    let set = open_json(&boxes().to_string()).unwrap();
    assert_eq!(set.findings, []);
    let class = |id, name: &str| Class {
        id,
        name: name.to_owned(),
    };
    assert_eq!(set.classes, [class(1, "cat"), class(2, "dog")]);
    let names: Vec<&str> = set.images.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(
        names,
        ["images/000.png", "images/001.png", "images/002.png"]
    );
    let object = |annotation, class, bbox, area| TrueBox {
        annotation: Some(annotation),
        class,
        bbox,
        area,
        crowd: false,
    };
    let expected = [
        object(11, 0, [2.0, 3.0, 10.0, 12.0], 100.0),
        object(12, 1, [0.0, 0.0, 32.0, 32.0], 1024.0),
    ];
    assert_eq!(all_boxes(&set), expected);
    let picture = set.picture(0).unwrap();
    assert_eq!((picture.width, picture.height), (SIDE, SIDE));
    let summary = set.summary();
    assert_eq!(
        (summary.images, summary.without_boxes, summary.boxes),
        (3, 1, 2)
    );
    assert_eq!((summary.sides.largest, summary.shares.largest), (32.0, 1.0));
    assert_eq!(summary.missing_classes(), Vec::<&str>::new());
    assert!(
        summary.to_string().contains("dog: 1 in 1 images"),
        "{summary}"
    );
    assert_ne!(
        set.fingerprint(),
        changed(first_annotation("bbox", json!([2, 3, 10, 13])))
            .unwrap()
            .fingerprint()
    );
}

/// A change, what is found of it, in which words, and how many images and boxes remain.
struct Case {
    change: Box<dyn Fn(&mut Value)>,
    kind: Kind,
    words: &'static [&'static str],
    rest: (usize, usize),
}

fn case(
    change: impl Fn(&mut Value) + 'static,
    kind: Kind,
    words: &'static [&'static str],
    rest: (usize, usize),
) -> Case {
    Case {
        change: Box::new(change),
        kind,
        words,
        rest,
    }
}

fn check_cases(cases: Vec<Case>) {
    for (number, case) in cases.into_iter().enumerate() {
        let set = changed(case.change).unwrap_or_else(|error| panic!("case {number}: {error}"));
        let [finding] = &set.findings[..] else {
            panic!("case {number}: {:?}", set.findings);
        };
        assert_eq!(finding.kind, case.kind, "case {number}");
        let text = finding.to_string();
        for word in case.words {
            assert!(
                text.contains(word),
                "case {number} should mention `{word}`: {text}"
            );
        }
        let rest = (set.images.len(), all_boxes(&set).len());
        assert_eq!(rest, case.rest, "case {number}");
        assert_eq!(set.summary().findings[&case.kind], 1);
    }
}

#[test]
fn images_that_are_wrong_are_named_with_id_and_file_and_the_rest_is_used() {
    let image = |number: usize, key: &'static str, value: Value| {
        move |annotations: &mut Value| annotations["images"][number][key] = value.clone()
    };
    let again = |annotations: &mut Value| {
        let first = annotations["images"][0].clone();
        annotations["images"].as_array_mut().unwrap().push(first);
    };
    let two_ids = |annotations: &mut Value| {
        let name = annotations["images"][0]["file_name"].clone();
        push("images", json!({"id": 4, "file_name": name}))(annotations);
        // The first of these is what image 1 has already.
        for bbox in [[2, 3, 10, 12], [5, 5, 6, 6]] {
            let annotation = json!({"image_id": 4, "category_id": 1, "bbox": bbox});
            push("annotations", annotation)(annotations);
        }
    };
    check_cases(vec![
        case(
            image(0, "file_name", json!("images/nowhere.png")),
            Kind::ImageMissing,
            &["image 1 (images/nowhere.png)", "a box goes"],
            (2, 1),
        ),
        case(
            image(2, "file_name", json!("images/text.png")),
            Kind::ImageUnreadable,
            &["image 3 (images/text.png)"],
            (2, 2),
        ),
        case(
            image(0, "height", json!(64)),
            Kind::ImageOfAnotherShape,
            &["image 1 (images/000.png)", "32x64"],
            (2, 1),
        ),
        case(
            image(2, "file_name", Value::Null),
            Kind::ImageBroken,
            &["image 3", "file_name"],
            (2, 2),
        ),
        case(
            again,
            Kind::ImageTwice,
            &["image 1 (images/000.png)", "twice"],
            (3, 2),
        ),
        case(
            two_ids,
            Kind::ImageUnderTwoIds,
            &["image 4 (images/000.png)", "image 1"],
            (3, 3),
        ),
    ]);
}

#[test]
fn annotations_that_are_wrong_are_named_with_id_and_file_and_the_rest_is_used() {
    let set = first_annotation;
    let copy = |annotations: &mut Value| {
        let first = annotations["annotations"][0].clone();
        annotations["annotations"]
            .as_array_mut()
            .unwrap()
            .push(first);
    };
    let same_id = |annotations: &mut Value| annotations["annotations"][1]["id"] = json!(11);
    let broken = |key: &'static str, value: Value, words: &'static [&'static str]| {
        case(set(key, value), Kind::AnnotationBroken, words, (3, 1))
    };
    check_cases(vec![
        case(
            set("image_id", json!(9)),
            Kind::ImageUnknown,
            &["annotation 11", "no image 9"],
            (3, 1),
        ),
        case(
            set("category_id", json!(7)),
            Kind::CategoryUnknown,
            &["annotation 11 (images/000.png)", "no category 7"],
            (3, 1),
        ),
        broken("image_id", json!("1"), &["annotation 11", "image_id"]),
        broken("image_id", json!(-1), &["annotation 11", "-1"]),
        broken(
            "category_id",
            json!(null),
            &["annotation 11", "category_id"],
        ),
        broken("iscrowd", json!(2), &["annotation 11", "iscrowd"]),
        broken(
            "bbox",
            json!(null),
            &["annotation 11 (images/000.png)", "no bbox"],
        ),
        broken("bbox", json!([1, 2, 3]), &["annotation 11", "3 numbers"]),
        case(
            copy,
            Kind::AnnotationTwice,
            &["annotation 11 (images/000.png)", "second"],
            (3, 2),
        ),
        case(
            same_id,
            Kind::AnnotationTwice,
            &["annotation 11 (images/001.png)", "both"],
            (3, 2),
        ),
        case(
            push("categories", json!({"id": 0, "name": "cat"})),
            Kind::CategoryTwice,
            &["category 0", "category 1"],
            (3, 2),
        ),
    ]);
}

#[test]
fn boxes_that_are_wrong_are_named_with_id_and_file_and_the_rest_is_used() {
    type Words = &'static [&'static str];
    let with = |bbox: Value, kind: Kind, words: Words, rest: (usize, usize)| {
        case(first_annotation("bbox", bbox), kind, words, rest)
    };
    let broken = |bbox: Value, words: Words| with(bbox, Kind::BoxBroken, words, (3, 1));
    let outside = |bbox: Value, words: Words| with(bbox, Kind::BoxOutside, words, (3, 1));
    check_cases(vec![
        broken(
            json!([1, 2, "3", 4]),
            &["annotation 11 (images/000.png)", "no number"],
        ),
        broken(
            json!([1, 2, null, 4]),
            &["annotation 11 (images/000.png)", "no number"],
        ),
        broken(
            json!([1, 2, -3, 4]),
            &["annotation 11 (images/000.png)", "-3"],
        ),
        broken(
            json!([1, 2, 3, 0]),
            &["annotation 11 (images/000.png)", "not above 0"],
        ),
        outside(
            json!([40, 2, 10, 10]),
            &["annotation 11 (images/000.png)", "32x32"],
        ),
        outside(
            json!([-10, 2, 10.5, 10]),
            &["annotation 11 (images/000.png)"],
        ),
        outside(
            json!([1e300, 1e300, 1e308, 1e308]),
            &["annotation 11 (images/000.png)"],
        ),
        with(
            json!([28, -4, 10, 12]),
            Kind::BoxClipped,
            &["annotation 11 (images/000.png)", "32x32"],
            (3, 2),
        ),
    ]);
}

#[test]
fn boxes_follow_clipping_and_another_size_and_small_omissions_are_tolerated() {
    let set = changed(first_annotation("bbox", json!([28, -4, 10, 12]))).unwrap();
    let TrueBox { bbox, area, .. } = &all_boxes(&set)[0];
    assert_eq!((*bbox, *area), ([28.0, 0.0, 4.0, 8.0], 32.0));
    // That of an outline that is not cut stays.
    let set = changed(|annotations| {
        first_annotation("bbox", json!([28, -4, 10, 12]))(annotations);
        first_annotation("area", json!(20))(annotations);
    });
    assert_eq!(all_boxes(&set.unwrap())[0].area, 20.0);

    // Rounded numbers that reach a hair beyond are only set right.
    let set = changed(first_annotation("bbox", json!([22.001, 0, 10, 12]))).unwrap();
    assert_eq!(set.findings, []);
    let [left, _, width, _] = all_boxes(&set)[0].bbox;
    assert_eq!(left + width, 32.0);

    let set = changed(|annotations| {
        annotations["images"][0]["width"] = json!(64);
        annotations["images"][0]["height"] = json!(64);
    })
    .unwrap();
    assert_eq!(set.findings[0].kind, Kind::ImageOfAnotherSize);
    let TrueBox { bbox, area, .. } = &all_boxes(&set)[0];
    assert_eq!((*bbox, *area), ([1.0, 1.5, 5.0, 6.0], 25.0));

    let set = changed(|annotations| {
        let image = annotations["images"][0].as_object_mut().unwrap();
        image.remove("width");
        image["id"] = json!(1.0);
        let annotation = annotations["annotations"][0].as_object_mut().unwrap();
        annotation.remove("area");
        annotation.remove("id");
        annotation["iscrowd"] = json!(false);
    })
    .unwrap();
    assert_eq!(set.findings, []);
    let TrueBox {
        annotation, area, ..
    } = &all_boxes(&set)[0];
    assert_eq!((*annotation, *area), (None, 120.0));
}

#[test]
fn crowds_are_kept_and_not_counted_as_objects() {
    let set = changed(first_annotation("iscrowd", json!(1))).unwrap();
    assert_eq!(set.findings, []);
    let summary = set.summary();
    assert_eq!((summary.boxes, summary.crowds), (1, 1));
    assert_eq!(set.images[0].objects().count(), 0);
    assert_eq!(summary.missing_classes(), ["cat"]);
}

#[test]
fn ten_thousand_boxes_in_an_image_are_kept_and_told() {
    let set = changed(|annotations| {
        let list = annotations["annotations"].as_array_mut().unwrap();
        list.extend((0..10_000).map(|i| {
            let corner = i % 20;
            json!({"id": 100 + i, "image_id": 3, "category_id": 1, "bbox": [corner, corner, 8, 8]})
        }));
    })
    .unwrap();
    assert_eq!(set.findings.len(), 1);
    assert_eq!(set.findings[0].kind, Kind::ManyBoxes);
    let text = set.findings[0].to_string();
    assert!(
        text.starts_with("image 3 (images/002.png): it has 10000 boxes"),
        "{text}"
    );
    assert_eq!(set.summary().most_boxes, 10_000);
}

#[test]
fn words_for_nan_cost_only_their_box() {
    let text = boxes()
        .to_string()
        .replace("[2,3,10,12]", "[2,NaN,Infinity,12]");
    assert!(text.contains("NaN"));
    let set = open_json(&text).unwrap();
    assert_eq!(set.findings[0].kind, Kind::BoxBroken);
    assert_eq!(set.findings[0].record, "annotation 11");
    assert_eq!(all_boxes(&set).len(), 1);
}

#[test]
fn files_that_cannot_be_meant_are_refused() {
    let refused = |set: Result<DetectionSet, Error>, words: &[&str]| {
        let text = set.err().expect("it is refused").to_string();
        for word in words {
            assert!(text.contains(word), "`{word}` is missing: {text}");
        }
    };
    for text in [
        "",
        "boxes",
        "[]",
        "{}",
        "[{\"image_id\": 1}]",
        "\u{feff}{\"images\": []}",
    ] {
        refused(
            open_json(text),
            &[
                "boxes.json",
                "not COCO's JSON",
                "images, annotations and categories",
            ],
        );
    }
    let replace = |key: &'static str, value: Value| {
        changed(move |annotations| annotations[key] = value.clone())
    };
    refused(
        replace("annotations", json!({"id": 1})),
        &["boxes.json", "not COCO's JSON"],
    );
    refused(
        replace("annotations", json!([1, 2])),
        &["boxes.json", "an annotation"],
    );
    refused(replace("annotations", json!([])), &["boxes.json", "no box"]);
    refused(
        replace("categories", json!([])),
        &["boxes.json", "categories is empty"],
    );
    refused(
        replace("categories", json!([{"id": 4}])),
        &["boxes.json", "category 4 has no name"],
    );
    refused(
        replace("categories", json!([{"name": "cat"}])),
        &["boxes.json", "category without id"],
    );
    refused(
        replace(
            "categories",
            json!([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]),
        ),
        &["boxes.json", "category 1", "`cat`", "`dog`"],
    );
    refused(
        replace(
            "categories",
            json!([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]),
        ),
        &["boxes.json", "categories 1 and 2", "`cat`"],
    );
    refused(
        changed(|annotations| annotations["images"][1]["id"] = json!(1)),
        &[
            "boxes.json",
            "image id 1",
            "images/000.png",
            "images/001.png",
        ],
    );
    refused(
        changed(|annotations| {
            for annotation in annotations["annotations"].as_array_mut().unwrap() {
                annotation["bbox"] = json!([0, 0, -1, -1]);
            }
        }),
        &[
            "boxes.json",
            "no box",
            "annotation 11 (images/000.png)",
            "annotation 12",
        ],
    );
    refused(
        changed(|annotations| {
            for image in 0..2_usize {
                annotations["images"][image]["file_name"] = json!(format!("gone/{image}.png"));
            }
        }),
        &[
            "2 of 3",
            "data.max_bad_share",
            "image 1 (gone/0.png)",
            "no such image below",
        ],
    );
    let missing = open_part(Path::new("/nowhere/boxes.json"), "")
        .err()
        .unwrap();
    assert_eq!(missing.exit_code(), 2);
    refused(Err(missing), &["/nowhere/boxes.json", "--data"]);
    let home = folder(&boxes().to_string());
    refused(
        open_part(&home.path().join("boxes.json"), "val"),
        &["boxes.json", "no `val` in its name"],
    );
    let missing = open(&Origin {
        path: home.path().join("boxes.json"),
        images: "/nowhere".into(),
        ..Origin::default()
    });
    refused(missing, &["/nowhere", "--images"]);
}

#[test]
fn a_part_without_boxes_is_refused_as_a_part() {
    let set = open_json(&boxes().to_string()).unwrap();
    assert_eq!(set.part(&[0, 2]).unwrap().images.len(), 2);
    let text = set.part(&[2]).err().unwrap().to_string();
    assert!(
        text.contains("1 of its 3 images") && text.contains("data.held_out"),
        "{text}"
    );
}

#[test]
fn a_picture_that_exif_turns_is_annotated_upright() {
    let home = tempfile::tempdir().unwrap();
    fs::copy(
        fixtures().join("exif-6.jpg"),
        home.path().join("turned.jpg"),
    )
    .unwrap();
    write_images(home.path(), &["images"], 1, SIDE);
    let with_sides = |width: u32, height: u32| {
        let annotations = json!({
            "images": [
                {"id": 1, "file_name": "turned.jpg", "width": width, "height": height},
                {"id": 2, "file_name": "images/000.png"},
            ],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 12, 17]},
                {"id": 2, "image_id": 2, "category_id": 1, "bbox": [1, 2, 12, 17]},
            ],
            "categories": [{"id": 1, "name": "gradient"}],
        });
        let path = home.path().join("boxes.json");
        fs::write(&path, annotations.to_string()).unwrap();
        open_part(&path, "").unwrap()
    };
    let upright = with_sides(14, 20);
    assert_eq!(upright.findings, []);
    assert_eq!(
        (upright.images[0].width, upright.images[0].height),
        (14, 20)
    );
    let lying = with_sides(20, 14);
    assert_eq!(lying.images.len(), 1);
    let text = lying.findings[0].to_string();
    assert!(
        text.contains("image 1 (turned.jpg)") && text.contains("EXIF"),
        "{text}"
    );
}

#[test]
fn one_tar_or_folder_holds_images_and_several_annotation_files() {
    let home = tempfile::tempdir().unwrap();
    let tar = home.path().join("bccd.tar");
    let mut builder = tar::Builder::new(fs::File::create(&tar).unwrap());
    builder.append_dir_all("cells/bccd", bccd()).unwrap();
    builder.finish().unwrap();
    drop(builder);
    let json = bccd().join("annotations/instances_val.json");
    for (path, part) in [(&tar, "val"), (&bccd(), "val"), (&json, "")] {
        let set = open_part(path, part).unwrap();
        assert_eq!(set.findings, [], "{}", path.display());
        assert_eq!((set.images.len(), all_boxes(&set).len()), (4, 78));
        let classes: Vec<&str> = set
            .classes
            .iter()
            .map(|class| class.name.as_str())
            .collect();
        assert_eq!(classes, ["RBC", "WBC", "Platelets"]);
        assert!(set.path().ends_with("annotations/instances_val.json"));
        assert_eq!(set.picture(3).unwrap().width, 640);
    }
    // Annotations that no image lies beside.
    let apart = Origin {
        path: bccd().join("annotations"),
        images: bccd().join("images"),
        part: "val".to_owned(),
    };
    assert_eq!(apart.annotation_files().unwrap().len(), 2);
    assert_eq!(open(&apart).unwrap().images.len(), 4);
    let message = |part: &str| open_part(&tar, part).err().unwrap().to_string();
    let several = message("");
    assert!(
        several.contains("bccd.tar") && several.contains("instances_train.json"),
        "{several}"
    );
    let none = message("test");
    assert!(
        none.contains("`test`") && none.contains("instances_val.json"),
        "{none}"
    );
    let origin = Origin {
        path: tar,
        ..Origin::default()
    };
    assert_eq!(
        origin.annotation_files().unwrap(),
        ["train", "val"].map(|part| format!("cells/bccd/annotations/instances_{part}.json"))
    );
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["images"], 1, SIDE);
    let without = open_part(home.path(), "").err().unwrap().to_string();
    assert!(without.contains("no annotation file"), "{without}");
}

#[test]
fn the_annotations_to_score_are_found_beside_those_to_train_on() {
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["images"], 1, SIDE);
    let found = |part: &str| {
        let mut config = DetectConfig {
            train: Origin {
                path: home.path().to_owned(),
                part: part.to_owned(),
                ..Origin::default()
            },
            ..DetectConfig::default()
        };
        find_parts(&mut config).unwrap();
        assert_eq!(
            config.val.path.as_os_str().is_empty(),
            config.val.part.is_empty()
        );
        [config.train.part, config.val.part]
    };
    let add = |names: [&str; 2]| {
        for name in names {
            fs::write(home.path().join(name), "{}").unwrap();
        }
    };
    add(["instances_train2017.json", "instances_val2017.json"]);
    assert_eq!(found(""), ["train", "val"]);
    assert_eq!(found("train"), ["train", "val"]);
    assert_eq!(found("val"), ["val", ""]);
    add(["captions_train2017.json", "captions_val2017.json"]);
    assert_eq!(
        found("instances_train"),
        ["instances_train", "instances_val"]
    );
    assert_eq!(found("instances_val"), ["instances_val", ""]);
    assert_eq!(found(""), ["", ""]);
}

#[test]
fn file_names_lead_to_the_one_image_that_they_can_mean() {
    let home = folder("");
    fs::create_dir(home.path().join("other")).unwrap();
    fs::copy(
        home.path().join("images/000.png"),
        home.path().join("other/000.png"),
    )
    .unwrap();
    let named = |name: &str| {
        let mut annotations = boxes();
        annotations["images"][0]["file_name"] = json!(name);
        fs::write(home.path().join("boxes.json"), annotations.to_string()).unwrap();
        open_part(&home.path().join("boxes.json"), "").unwrap()
    };
    for name in [
        "images/000.png",
        "./images/000.png",
        "images\\000.png",
        "/home/me/set/images/000.png",
    ] {
        assert_eq!(named(name).findings, [], "{name}");
    }
    for name in ["000.png", "000.jpg", "0.png", "/images", "ges/000.png"] {
        let findings = named(name).findings;
        assert_eq!(findings[0].kind, Kind::ImageMissing, "{name}");
    }
    let text = named("000.png").findings[0].to_string();
    assert!(text.contains("images/000.png and other/000.png"), "{text}");
}

#[test]
fn classes_of_another_set_are_matched_by_name_and_mismatches_are_named() {
    let trained = open_json(&boxes().to_string()).unwrap().classes;
    let with = |categories: Value, second: u64| {
        changed(|annotations| {
            annotations["categories"] = categories.clone();
            annotations["annotations"][1]["category_id"] = json!(second);
        })
        .unwrap()
        .with_classes(&trained)
    };
    let same = with(
        json!([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]),
        2,
    )
    .unwrap();
    assert_eq!(same.findings, []);
    let swapped = with(
        json!([{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]),
        2,
    )
    .unwrap();
    let classes: Vec<usize> = all_boxes(&swapped)
        .iter()
        .map(|object| object.class)
        .collect();
    assert_eq!(classes, [1, 0]);
    assert_eq!(swapped.classes, trained);
    let kinds: Vec<Kind> = swapped
        .findings
        .iter()
        .map(|finding| finding.kind)
        .collect();
    assert_eq!(kinds, [Kind::CategoryMoved; 2]);
    let text = swapped.findings[0].to_string();
    assert!(text.contains("category 1: `dog` had the id 2"), "{text}");

    let more = with(
        json!([{"id": 1, "name": "cat"}, {"id": 5, "name": "cow"}]),
        5,
    )
    .unwrap();
    assert_eq!(more.findings[0].kind, Kind::CategoryUnknown);
    let text = more.findings[0].to_string();
    assert!(
        text.contains("category 5: `cow`") && text.contains("1 boxes"),
        "{text}"
    );
    assert_eq!(all_boxes(&more).len(), 1);
    assert_eq!(more.summary().missing_classes(), ["dog"]);

    let renamed = with(
        json!([{"id": 1, "name": "cat"}, {"id": 2, "name": "Dog"}]),
        2,
    );
    let text = renamed.err().unwrap().to_string();
    assert!(
        text.contains("category 2 is `Dog`") && text.contains("`dog`"),
        "{text}"
    );
    let others = changed(|annotations| {
        annotations["categories"] = json!([{"id": 8, "name": "cow"}]);
        for annotation in annotations["annotations"].as_array_mut().unwrap() {
            annotation["category_id"] = json!(8);
        }
    });
    let text = others
        .unwrap()
        .with_classes(&trained)
        .err()
        .unwrap()
        .to_string();
    assert!(text.contains("no box") && text.contains("`cow`"), "{text}");

    let agnostic = open_json(&boxes().to_string()).unwrap().class_agnostic();
    assert_eq!(agnostic.classes.len(), 1);
    assert!(all_boxes(&agnostic).iter().all(|object| object.class == 0));
}
