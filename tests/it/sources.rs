//! Tars of every kind, and what `qbheat check` says of a data set.

use std::fs;
use std::path::Path;

use qbheat::data::{BadImage, DataConfig, Dataset, Index};
use qbheat::error::Error;
use qbheat::observe::Silent;
use serde_json::{Value, json};
use tar::{EntryType, Header};

use crate::support::{fixtures, qbheat, stderr};

fn open(path: &Path) -> Result<Dataset, Error> {
    let config = DataConfig {
        path: path.into(),
        max_bad_share: 0.9,
        ..DataConfig::default()
    };
    Dataset::open(&config, 0, &Silent)
}

fn names(dataset: &Dataset) -> Vec<&str> {
    let all = 0..dataset.images.len();
    all.map(|i| dataset.images.name(i)).collect()
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

/// A header with the name as it is, which `tar` itself would refuse to write for some.
fn header(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    header
}

/// A member, filled up to whole blocks.
fn member(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, EntryType::Regular, content.len() as u64)
        .as_bytes()
        .to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn write_tar(path: &Path, members: &[Vec<u8>]) {
    let mut bytes = members.concat();
    bytes.extend([0; 1024]);
    fs::write(path, bytes).unwrap();
}

#[test]
fn shards_are_one_data_set_whose_labels_stand_beside_the_images() {
    let home = tempfile::tempdir().unwrap();
    let image = fixture("rgb.png");
    let shard = |number: usize, members: &[(&str, &[u8])]| {
        let members: Vec<_> = members
            .iter()
            .map(|(name, bytes)| member(name, bytes))
            .collect();
        write_tar(&home.path().join(format!("s-{number:03}.tar")), &members);
    };
    // Keys begin anew in each shard; a label may come before its image or after it.
    shard(
        0,
        &[
            ("0.png", &image),
            ("0.cls", b"10\n"),
            ("1.cls", b"9"),
            ("1.png", &image),
        ],
    );
    shard(
        1,
        &[
            ("0.png", &image),
            ("0.json", br#"{"caption": "x", "label": 9}"#),
        ],
    );
    shard(
        2,
        &[
            ("0.png", &image),
            ("0.json", br#"{"class": "10"}"#),
            ("2.png", &image),
        ],
    );
    let dataset = open(&home.path().join("s-{000..002}.tar")).unwrap();
    assert_eq!(
        names(&dataset),
        ["0.png", "0.png", "0.png", "1.png", "2.png"]
    );
    assert_eq!(dataset.classes, ["9", "10"], "numbers keep their order");
    let labels: Vec<_> = (0..5).map(|i| dataset.images.label(i)).collect();
    assert_eq!(labels, [Some(1), Some(0), Some(1), Some(0), None]);
    assert_eq!(
        dataset.summary.others, 0,
        "labels are used, not passed over"
    );

    let missing = open(&home.path().join("s-{000..003}.tar")).err().unwrap();
    assert!(missing.to_string().contains("s-003.tar"), "{missing}");
    assert_eq!(missing.exit_code(), 2);
}

#[test]
fn a_class_beside_an_image_is_part_of_what_a_run_was_started_on() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("set.tar");
    let image = fixture("rgb.png");
    let write = |second: &[u8], third: Option<&[u8]>| {
        let mut members = vec![
            member("a.png", &image),
            member("a.cls", b"cat"),
            member("b.png", &image),
            member("b.cls", second),
            member("c.png", &image),
        ];
        members.extend(third.map(|third| member("c.cls", third)));
        write_tar(&path, &members);
    };
    write(b"dog", None);
    let index = open(&path).unwrap().index();
    let config = DataConfig {
        path: path.clone(),
        ..DataConfig::default()
    };
    let reopen = |index: &Index| Dataset::reopen(&config, 0, index, &Silent);
    reopen(&index).unwrap();
    // As it was written before there were classes in it.
    let bytes = image.len();
    let records = ["a", "b", "c"].map(|name| format!("[\"{name}.png\",{bytes},true]\n"));
    let records = records.concat();
    let hash = blake3::hash(records.as_bytes()).to_hex();
    let older = format!("{{\"format\":1,\"blake3\":\"{hash}\"}}\n{records}");
    let older = Index::from_bytes(older.into_bytes()).unwrap();
    reopen(&older).unwrap();

    for (second, third, image) in [
        (&b"cat"[..], None, "b.png"),
        (b"dog", Some(&b"dog"[..]), "c.png"),
    ] {
        write(second, third);
        let refused = reopen(&index).err().unwrap().to_string();
        let words = format!("1 of another class ({image})");
        assert!(refused.contains(&words), "{refused}");
        reopen(&older).unwrap();
    }
}

#[test]
fn labels_that_are_none_are_told_and_leave_the_image_without() {
    let home = tempfile::tempdir().unwrap();
    let tar = home.path().join("set.tar");
    let image = fixture("rgb.png");
    write_tar(
        &tar,
        &[
            member("a.png", &image),
            member("a.json", b"{"),
            member("b.png", &image),
            member("b.cls", b"cat"),
            member("c.png", &image),
            member("c.json", br#"{"label": [1]}"#),
            member("d.png", &image),
            member("d.cls", b"dog"),
        ],
    );
    let dataset = open(&tar).unwrap();
    let labels: Vec<_> = (0..4).map(|i| dataset.images.label(i)).collect();
    assert_eq!(labels, [None, Some(0), None, Some(1)]);
    let output = qbheat(&["check", "--data", tar.to_str().unwrap(), "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bad = report["bad_labels"].as_array().unwrap();
    assert_eq!(bad.len(), 2);
    assert!(bad[0].as_str().unwrap().starts_with("a.json: not JSON"));
    assert_eq!(bad[1], "c.json: its class is neither text nor a number");
}

#[test]
fn a_file_beside_no_image_takes_no_class_from_its_folder() {
    let home = tempfile::tempdir().unwrap();
    let tar = home.path().join("set.tar");
    let image = fixture("rgb.png");
    write_tar(
        &tar,
        &[
            member("cats/1.png", &image),
            member("dogs/1.png", &image),
            member("about.json", br#"{"label": "pets"}"#),
            member("annotations.cls", b"pets"),
        ],
    );
    let dataset = open(&tar).unwrap();
    assert_eq!(dataset.classes, ["cats", "dogs"]);
    assert_eq!(dataset.summary.others, 2);
}

#[test]
fn members_that_hold_no_bytes_of_their_own_are_passed_over_with_the_reason() {
    let home = tempfile::tempdir().unwrap();
    let tar = home.path().join("set.tar");
    let mut link = header("link.png", EntryType::Link, 0);
    link.set_link_name("good.png").unwrap();
    link.set_cksum();
    let mut sparse = header("sparse.png", EntryType::GNUSparse, 0);
    sparse.as_gnu_mut().unwrap().set_real_size(0);
    sparse.set_cksum();
    write_tar(
        &tar,
        &[
            member("good.png", &fixture("rgb.png")),
            member("./dotted.png", &fixture("rgb.png")),
            link.as_bytes().to_vec(),
            sparse.as_bytes().to_vec(),
            header("folder.png", EntryType::Directory, 0)
                .as_bytes()
                .to_vec(),
            member("empty.png", b""),
        ],
    );
    let dataset = open(&tar).unwrap();
    let bad = |name: &str, reason: &str| BadImage {
        name: name.into(),
        reason: reason.into(),
    };
    assert_eq!(
        dataset.summary.unreadable,
        [
            bad("empty.png", "the file is empty"),
            bad(
                "link.png",
                "a link within the tar; make it with --hard-dereference and -h"
            ),
            bad(
                "sparse.png",
                "a sparse member of the tar; make it without --sparse"
            ),
        ]
    );
    assert_eq!(dataset.summary.images, 2);
}

#[test]
fn tars_that_lie_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let tar = home.path().join("set.tar");
    let good = member("good.png", &fixture("rgb.png"));
    let mut huge = header("huge.png", EntryType::Regular, 0);
    // Base 256: the largest size there is.
    huge.as_old_mut().size = [0xff; 12];
    huge.as_old_mut().size[0] = 0x80;
    huge.set_cksum();
    let mut large = header("large.png", EntryType::Regular, 1 << 40)
        .as_bytes()
        .to_vec();
    large.extend([0; 512]);
    let mut long_name = header("././@LongLink", EntryType::GNULongName, 1 << 40)
        .as_bytes()
        .to_vec();
    long_name.extend([b'a'; 512]);
    let mut sparse = header("sparse.png", EntryType::GNUSparse, 0);
    sparse.as_gnu_mut().unwrap().set_real_size(1 << 60);
    sparse.set_cksum();
    let mut sum = good.clone();
    sum[0] ^= 1;
    let cases: [(&str, Vec<u8>, &str); 8] = [
        (
            "above",
            member("../evil.png", b"x"),
            "`../evil.png` points outside",
        ),
        (
            "absolute",
            member("/etc/evil.png", b"x"),
            "`/etc/evil.png` points outside",
        ),
        ("within", member("a/../../evil.png", b"x"), "points outside"),
        ("huge size", huge.as_bytes().to_vec(), "not a readable tar"),
        (
            "size beyond the end",
            large,
            "truncated: member `large.png`",
        ),
        ("name beyond the end", long_name, "not a readable tar"),
        (
            "sparse map that does not add up",
            sparse.as_bytes().to_vec(),
            "not a readable tar",
        ),
        ("sum that is wrong", sum, "not a readable tar"),
    ];
    for (case, bytes, words) in cases {
        write_tar(&tar, &[good.clone(), bytes]);
        let text = open(&tar).err().expect(case).to_string();
        assert!(
            text.contains("set.tar") && text.contains(words),
            "{case}: {text}"
        );
    }
    let image = fixture("rgb.png").len();
    assert_ne!(
        (image + 1) % 512,
        0,
        "the last of these is a cut in the padding"
    );
    for length in [100, 512, 511 + image, 513 + image] {
        fs::write(&tar, &good[..length]).unwrap();
        let text = open(&tar).err().unwrap().to_string();
        assert!(text.contains("truncated"), "{length}: {text}");
    }
}

#[test]
fn a_hundred_thousand_empty_members_are_only_counted() {
    let home = tempfile::tempdir().unwrap();
    let tar = home.path().join("set.tar");
    let mut members = vec![member("x", b""); 100_000];
    members.push(member("good.png", &fixture("rgb.png")));
    write_tar(&tar, &members);
    let dataset = open(&tar).unwrap();
    assert_eq!(
        (dataset.summary.images, dataset.summary.others),
        (1, 100_000)
    );
}

#[test]
fn check_tells_what_is_odd_and_what_is_there_twice_and_fails_only_for_the_unreadable() {
    let home = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        let to = home.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(fixtures().join(from), to).unwrap();
    };
    copy("rgb.png", "a/1.png");
    copy("rgb.png", "a/2.png");
    copy("rgb.bmp", "b/1.bmp");
    copy("cmyk.jpg", "b/2.jpg");
    copy("exif-6.jpg", "b/3.jpg");
    copy("rgb-alpha-16.png", "b/4.png");
    copy("still.gif", "b/5.JPG");
    copy("lossless.webp", "b/6.webp");
    fs::write(home.path().join("b/7.pgm"), b"P5 1 5 255\n12345").unwrap();
    fs::write(home.path().join("b/notes.txt"), "hello").unwrap();
    let path = home.path().to_str().unwrap();
    let output = qbheat(&["check", "--data", path, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        report,
        json!({
            "readable": 9,
            "unreadable": [],
            "odd": [
                {"name": "b/2.jpg", "odd": ["CMYK"]},
                {"name": "b/3.jpg", "odd": ["rotated by EXIF"]},
                {"name": "b/4.png", "odd": ["more than 8 bits", "transparent"]},
                {"name": "b/5.JPG", "odd": ["its extension is of another format"]},
                {"name": "b/7.pgm", "odd": ["one pixel wide", "extreme aspect"]},
            ],
            "same_bytes": [["a/1.png", "a/2.png"]],
            "same_pixels": [["a/1.png", "b/1.bmp", "b/6.webp"]],
            "formats": {"bmp": 1, "gif": 1, "jpg": 2, "png": 3, "pnm": 1, "webp": 1},
            "sizes": [
                {"width": 20, "height": 14, "images": 7},
                {"width": 1, "height": 5, "images": 1},
                {"width": 14, "height": 20, "images": 1},
            ],
            "classes": [{"class": "a", "images": 2}, {"class": "b", "images": 7}],
            "others": 1,
            "bad_labels": [],
        })
    );
    fs::write(home.path().join("a/3.png"), "text").unwrap();
    let output = qbheat(&["check", "--data", path]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("9 images are readable, 1 are not"), "{text}");
    assert!(text.contains("a/3.png: its content is none of"), "{text}");
}
