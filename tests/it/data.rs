//! Data sets and the order of batches.

use std::fs;
use std::sync::Arc;

use qbheat::data::{BUILTIN, DataConfig, Dataset, ImageSize, Loader, LoaderConfig, Split};
use qbheat::observe::Silent;

use crate::support::write_images;

fn open(path: &str) -> Dataset {
    let config = DataConfig {
        path: path.into(),
        ..DataConfig::default()
    };
    Dataset::open(&config, 0, &Silent).unwrap()
}

/// Hash of the pixels and the numbers of the images of some batches.
fn batches(
    dataset: &Dataset,
    threads: usize,
    first_step: u64,
    count: usize,
) -> Vec<(Vec<usize>, String)> {
    let config = LoaderConfig {
        seed: 5,
        image_size: ImageSize::square(16),
        batch_size: 32,
        views: 1,
        data: DataConfig {
            loader_threads: threads,
            ..DataConfig::default()
        },
    };
    let subset = Arc::new((0..100).map(|i| i * 37 % 5000).collect());
    let mut loader = Loader::new(&dataset.images, &subset, &config, first_step);
    (0..count)
        .map(|_| {
            let batch = loader.next_batch().unwrap();
            let bytes: Vec<u8> = batch.pixels.iter().flat_map(|v| v.to_le_bytes()).collect();
            (batch.indices, blake3::hash(&bytes).to_hex().to_string())
        })
        .collect()
}

#[test]
fn the_builtin_set_is_balanced() {
    let dataset = open(BUILTIN);
    assert_eq!((dataset.train.len(), dataset.held_out.len()), (5000, 1000));
    assert_eq!(dataset.classes.len(), 10);
    for (part, each) in [(&dataset.train, 500), (&dataset.held_out, 100)] {
        for class in 0..10 {
            let label = |&&i: &&usize| dataset.images.label(i) == Some(class);
            assert_eq!(part.iter().filter(label).count(), each);
        }
    }
}

#[test]
fn order_and_pixels_are_the_same_for_any_number_of_threads_and_from_any_step() {
    let dataset = open(BUILTIN);
    let reference = batches(&dataset, 1, 0, 8);
    for threads in [2, 8] {
        assert_eq!(batches(&dataset, threads, 0, 8), reference);
    }
    // Three batches an epoch: step 4 is in the middle of the second.
    assert_eq!(batches(&dataset, 2, 4, 4), reference[4..]);
    let mut epoch: Vec<usize> = reference[..3].iter().flat_map(|(i, _)| i.clone()).collect();
    epoch.sort_unstable();
    epoch.dedup();
    assert_eq!(epoch.len(), 96, "no image comes twice in an epoch");
    assert_ne!(
        reference[0].0, reference[3].0,
        "each epoch has its own order"
    );
}

#[test]
fn a_folder_and_a_tar_of_it_are_the_same_data_set() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("set");
    write_images(&folder, &["a", "b"], 10, 16);
    let tar = home.path().join("set.tar");
    let mut builder = tar::Builder::new(fs::File::create(&tar).unwrap());
    builder.append_dir_all("set", &folder).unwrap();
    builder.finish().unwrap();
    let (from_folder, from_tar) = (open(folder.to_str().unwrap()), open(tar.to_str().unwrap()));
    assert_eq!(from_folder.classes, ["a", "b"]);
    assert_eq!(from_folder.classes, from_tar.classes);
    let drawn = Split::Stratified {
        held_out: 0.1,
        of_train_folder: false,
    };
    assert_eq!(from_folder.split, drawn);
    assert_eq!(
        (from_folder.train.clone(), from_folder.held_out.len()),
        (from_tar.train.clone(), 2)
    );
    for i in 0..20 {
        let pictures =
            [&from_folder, &from_tar].map(|set| set.images.picture(i).unwrap().0.into_owned());
        assert_eq!(pictures[0], pictures[1]);
        assert_eq!(from_folder.images.label(i), from_tar.images.label(i));
    }
}

#[test]
fn images_that_do_not_fit_into_memory_are_decoded_when_needed_and_give_the_same_batches() {
    let cached = open(BUILTIN);
    let config = DataConfig {
        path: BUILTIN.into(),
        memory_mib: 1,
        ..DataConfig::default()
    };
    let uncached = Dataset::open(&config, 0, &Silent).unwrap();
    assert!(cached.summary.cached && !uncached.summary.cached);
    assert_eq!(batches(&uncached, 2, 0, 2), batches(&cached, 2, 0, 2));
}
