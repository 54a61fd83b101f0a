//! What is no good image is passed over with a message that says why, and changes nothing for the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use qbheat::data::{DataConfig, Dataset, ImageSize, Loader, LoaderConfig};
use qbheat::error::Error;
use qbheat::observe::Silent;
use serde_json::Value;

use crate::support::{events, fixtures, qbheat, quick_run, stderr, write_images};

/// Name and reason of each unreadable image that `qbheat check` finds.
fn unreadable(folder: &Path) -> BTreeMap<String, String> {
    let output = qbheat(&["check", "--data", folder.to_str().unwrap(), "--json"]);
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let list = report["unreadable"].as_array().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!list.is_empty())));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    list.iter()
        .map(|bad| (text(&bad["name"]), text(&bad["reason"])))
        .collect()
}

#[test]
fn files_that_are_no_whole_image_are_passed_over_with_the_reason() {
    const TRUNCATED: &str = "truncated: the file ends before the image does";
    let home = tempfile::tempdir().unwrap();
    let fixture = |name: &str| fs::read(fixtures().join(name)).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(home.path().join(name), bytes).unwrap();
    write("zero.jpg", b"");
    write("text.jpg", b"not an image");
    for name in [
        "baseline.jpg",
        "progressive.jpg",
        "rgb.png",
        "rgb.bmp",
        "rgb.ppm",
        "rgb.tiff",
    ] {
        let bytes = fixture(name);
        write(&format!("cut-{name}"), &bytes[..bytes.len() - 30]);
    }
    // 13,300 by 13,300 pixels in 749 bytes.
    let claim = claim_in_jpeg("baseline.jpg", 0xc0, 13_300);
    write("too-large-for-its-bytes.jpg", &claim);
    write("good.png", &fixture("rgb.png"));
    let mut expected = BTreeMap::from([
        ("zero.jpg", "the file is empty"),
        ("too-large-for-its-bytes.jpg", TRUNCATED),
        (
            "text.jpg",
            "its content is none of JPEG, PNG, WebP, BMP, GIF, TIFF, PNM",
        ),
        ("cut-baseline.jpg", TRUNCATED),
        ("cut-progressive.jpg", TRUNCATED),
        ("cut-rgb.png", TRUNCATED),
        ("cut-rgb.bmp", TRUNCATED),
        ("cut-rgb.ppm", TRUNCATED),
        ("cut-rgb.tiff", TRUNCATED),
    ]);
    let found = unreadable(home.path());
    for (name, reason) in &found {
        assert_eq!(
            expected.remove(name.as_str()),
            Some(reason.as_str()),
            "{name}"
        );
    }
    assert!(expected.is_empty(), "{expected:?}");
}

#[test]
fn kinds_of_image_that_are_not_read_say_what_to_do() {
    let found = unreadable(&fixtures().join("../refused"));
    assert_eq!(found.len(), 4, "{found:?}");
    for reason in found.values() {
        assert!(reason.contains("Tiff"), "{reason}");
        assert!(
            reason.ends_with("convert it to 8- or 16-bit grey or RGB"),
            "{reason}"
        );
    }
}

#[cfg(unix)]
#[test]
fn what_only_looks_like_a_file_is_passed_over_and_odd_names_are_read() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{PermissionsExt, symlink};

    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let good = fixtures().join("rgb.png");
    fs::copy(&good, at("good.png")).unwrap();
    fs::copy(&good, home.path().join(OsStr::from_bytes(b"caf\xe9.png"))).unwrap();
    fs::create_dir(at("folder.png")).unwrap();
    fs::copy(&good, at("folder.png/inside.png")).unwrap();
    symlink("..", at("folder.png/above")).unwrap();
    symlink("good.png", at("link.png")).unwrap();
    symlink("nowhere.png", at("dangling.png")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(at("pipe.png"))
        .status();
    assert!(made.unwrap().success());
    fs::copy(&good, at("secret.png")).unwrap();
    fs::set_permissions(at("secret.png"), PermissionsExt::from_mode(0o000)).unwrap();
    let mut expected = BTreeMap::from([
        (
            "dangling.png".to_owned(),
            "there is no such file, or a link leads nowhere".to_owned(),
        ),
        (
            "pipe.png".to_owned(),
            "neither a file nor a link to one".to_owned(),
        ),
    ]);
    // Root reads everything.
    if fs::read(at("secret.png")).is_err() {
        let reason = "Permission denied (os error 13)";
        expected.insert("secret.png".into(), reason.into());
    }
    assert_eq!(unreadable(home.path()), expected);
    let config = DataConfig {
        path: home.path().into(),
        max_bad_share: 0.9,
        ..DataConfig::default()
    };
    let dataset = Dataset::open(&config, 0, &Silent).unwrap();
    let all = dataset.all();
    let names: Vec<&str> = all.iter().map(|&i| dataset.images.name(i)).collect();
    for name in ["caf\u{fffd}.png", "folder.png/inside.png", "link.png"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

/// A JPEG whose frame, which begins with this marker, says that it is a square of this side.
fn claim_in_jpeg(name: &str, marker: u8, side: u16) -> Vec<u8> {
    let mut bytes = fs::read(fixtures().join(name)).unwrap();
    let frame = bytes.windows(2).position(|w| w == [0xff, marker]).unwrap();
    for at in [frame + 5, frame + 7] {
        bytes[at..at + 2].copy_from_slice(&side.to_be_bytes());
    }
    bytes
}

/// Files of a few bytes whose headers claim gigapixels.
fn huge() -> Vec<(&'static str, Vec<u8>)> {
    let fixture = |name: &str| fs::read(fixtures().join(name)).unwrap();
    let mut png = fixture("rgb.png");
    png[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let sum = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&sum.to_be_bytes());
    let mut bmp = fixture("rgb.bmp");
    bmp[18..26].copy_from_slice(&[0x60, 0xea, 0, 0, 0x60, 0xea, 0, 0]);
    let mut gif = fixture("still.gif");
    gif[6..10].copy_from_slice(&[0x60, 0xea, 0x60, 0xea]);
    let mut tiff = fixture("grey-16.tif");
    let directory = u32::from_le_bytes(tiff[4..8].try_into().unwrap()) as usize;
    // Of its entries, of 12 bytes each, these are width, height and rows in a strip.
    for entry in [0, 1, 7] {
        let at = directory + 2 + 12 * entry + 8;
        tiff[at..at + 4].copy_from_slice(&60_000_u32.to_le_bytes());
    }
    // Width and height less one, of 14 bits each: 16,383 by 16,383.
    let mut webp = fixture("lossless.webp");
    assert_eq!(webp[12..16], *b"VP8L");
    webp[21..25].copy_from_slice(&0x0fff_bffe_u32.to_le_bytes());
    vec![
        ("huge.png", png),
        ("huge.tif", tiff),
        ("huge.webp", webp),
        ("huge.jpg", claim_in_jpeg("baseline.jpg", 0xc0, 60_000)),
        (
            "huge-progressive.jpg",
            claim_in_jpeg("progressive.jpg", 0xc2, 60_000),
        ),
        // Within the limit for sides and not within that for memory.
        ("large.jpg", claim_in_jpeg("baseline.jpg", 0xc0, 19_000)),
        ("huge.bmp", bmp),
        ("huge.gif", gif),
        ("huge.ppm", b"P6 60000 60000 255\n12345".to_vec()),
    ]
}

/// The checksum of PNG, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let sum = bytes.iter().fold(u32::MAX, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| {
            (sum >> 1) ^ (0xedb8_8320 * (sum & 1))
        })
    });
    !sum
}

#[test]
fn claims_of_gigapixels_are_refused_before_memory_is_taken() {
    let home = tempfile::tempdir().unwrap();
    for (name, bytes) in huge() {
        fs::write(home.path().join(name), bytes).unwrap();
    }
    let found = unreadable(home.path());
    assert_eq!(found.len(), huge().len(), "{found:?}");
    for (name, reason) in found {
        assert_eq!(
            reason, "larger than 20000 pixels a side or 512 MiB in memory; make it smaller",
            "{name}"
        );
    }
    #[cfg(target_os = "linux")]
    {
        // The same with less memory than any of these images would take.
        let command = format!(
            "ulimit -v 500000; exec {} check --threads 1 --data {}",
            env!("CARGO_BIN_EXE_qbheat"),
            home.path().display()
        );
        let output = std::process::Command::new("sh")
            .args(["-c", &command])
            .output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains(&format!("{} are not", huge().len())),
            "{text}"
        );
    }
}

/// Images that are not kept in memory, loaded by so many threads.
fn config(folder: &Path, loader_threads: usize) -> DataConfig {
    DataConfig {
        path: folder.into(),
        memory_mib: 0,
        max_bad_share: 0.5,
        loader_threads,
        ..DataConfig::default()
    }
}

/// Numbers of the images of four epochs, a hash of each one's pixels, and the bad ones met.
fn epochs(dataset: &Dataset, data: DataConfig) -> (Vec<(usize, blake3::Hash)>, Vec<String>) {
    const SIDE: usize = 8;
    let subset = Arc::new((0..8).collect());
    let loading = LoaderConfig {
        seed: 1,
        image_size: ImageSize::square(SIDE),
        batch_size: 4,
        views: 1,
        data,
    };
    let mut loader = Loader::new(&dataset.images, &subset, &loading, 0);
    let (mut seen, mut bad) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        let batch = loader.next_batch().unwrap();
        let views = batch.pixels.chunks(3 * SIDE * SIDE).map(|view| {
            let bytes: Vec<u8> = view.iter().flat_map(|value| value.to_le_bytes()).collect();
            blake3::hash(&bytes)
        });
        seen.extend(batch.indices.into_iter().zip(views));
        bad.extend(batch.passed_over.into_iter().map(|bad| bad.name));
    }
    (seen, bad)
}

#[test]
fn an_image_that_becomes_unreadable_leaves_order_and_pixels_of_all_others_as_they_were() {
    const BAD: usize = 3;
    let home = tempfile::tempdir().unwrap();
    write_images(home.path(), &["."], 8, 16);
    let dataset = Dataset::open(&config(home.path(), 1), 0, &Silent).unwrap();
    let index = dataset.index();
    let (before, bad) = epochs(&dataset, config(home.path(), 1));
    assert!(bad.is_empty());
    let path = home.path().join(dataset.images.name(BAD));
    let length = fs::read(&path).unwrap().len();
    fs::write(&path, vec![7; length]).unwrap();

    let reopened = Dataset::reopen(&config(home.path(), 1), 0, &index, &Silent).unwrap();
    assert_eq!(
        reopened.summary.unreadable[0].name,
        dataset.images.name(BAD)
    );
    let mut replaced: Option<Vec<blake3::Hash>> = None;
    for dataset in [&dataset, &reopened] {
        for threads in [1, 2, 8] {
            let (after, bad) = epochs(dataset, config(home.path(), threads));
            assert_eq!(bad, [dataset.images.name(BAD); 4], "once an epoch");
            let mut stand_ins = Vec::new();
            for (old, new) in before.iter().zip(after) {
                assert_eq!(old.0, new.0);
                if old.0 == BAD {
                    assert_ne!(old.1, new.1);
                    stand_ins.push(new.1);
                } else {
                    assert_eq!(old.1, new.1);
                }
            }
            assert_eq!(*replaced.get_or_insert(stand_ins.clone()), stand_ins);
        }
    }
}

#[test]
fn another_image_of_the_same_class_stands_in_and_never_one_of_the_other_part() {
    let home = tempfile::tempdir().unwrap();
    for part in ["train", "val"] {
        write_images(&home.path().join(part), &["a", "b"], 2, 16);
    }
    let dataset = Dataset::open(&config(home.path(), 1), 0, &Silent).unwrap();
    // The last of class a to train on; the next by number is of class b.
    let name = "train/a/001.png";
    let index = (0..8).find(|&i| dataset.images.name(i) == name).unwrap();
    let (stand_in, _) = dataset.images.picture(index - 1).unwrap();
    fs::write(home.path().join(name), "broken").unwrap();
    let (picture, bad) = dataset.images.picture(index).unwrap();
    assert_eq!(picture, stand_in);
    assert_eq!((bad.len(), bad[0].name.as_str()), (1, name));
    let first_of_b = (0..8).find(|&i| dataset.images.name(i) == "train/b/000.png");
    let (other_class, _) = dataset.images.picture(first_of_b.unwrap()).unwrap();
    fs::write(home.path().join("train/a/000.png"), "broken").unwrap();
    let (picture, bad) = dataset.images.picture(index).unwrap();
    assert_eq!((picture, bad.len()), (other_class, 2));
    for bad in ["train/b/000.png", "train/b/001.png"] {
        fs::write(home.path().join(bad), "broken").unwrap();
    }
    let error = dataset.images.picture(index).unwrap_err();
    assert!(matches!(error, Error::Data { .. }));
    let text = error.to_string();
    assert!(
        text.contains("4 images in a row") && text.contains(name),
        "{text}"
    );
}

#[test]
fn a_run_logs_a_bad_image_once_and_counts_it() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    write_images(&home.path().join("set"), &["a"], 8, 16);
    let run = at("run");
    let set = at("set");
    let mut arguments = quick_run(&set, &run);
    arguments.extend([
        "--set",
        "optim.schedule=constant",
        "--set",
        "data.memory_mib=0",
        "--set",
        "data.max_bad_share=0.5",
    ]);
    let output = qbheat(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let bad = home.path().join("set/a/005.png");
    let length = fs::read(&bad).unwrap().len();
    fs::write(&bad, vec![0; length]).unwrap();
    for (epochs, steps) in [("3", 6), ("4", 8)] {
        let output = qbheat(&["resume", &run, "--epochs", epochs, "--json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&answer["steps"], &answer["bad_images"]),
            (&steps.into(), &1.into())
        );
        let bad = events(&home.path().join("run"), Some("bad-image"));
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert_eq!(bad[0]["name"], "a/005.png");
        assert!(bad[0]["reason"].as_str().unwrap().contains("none of JPEG"));
    }
}
