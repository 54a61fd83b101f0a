//! Pre-training runs: the methods, and what a run of them does.

mod method;
mod run;

use std::path::Path;

use crate::config::{Config, refuse_detector};
use crate::data::{Dataset, Index, Split, SplitChoice, place};
use crate::error::{Error, Result};
use crate::observe::Observer;
use crate::train::{
    CONFIG_FILE, Course, INDEX_FILE, RunFolder, Schedule, Surroundings, write_durably,
};
use crate::weights::{Weights, given_encoder};

pub use method::{Images, PretrainModel, qb_heat};
pub(crate) use method::{WithModel, traits, with_model};
pub use run::replay;
use run::{From, Run};

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// As any run.
    pub course: crate::train::Outcome,
    /// Loss of the trivial predictor.
    pub trivial_loss: f64,
}

/// Starts a run in a new folder.
pub fn start(
    config: &Config,
    dataset: &Dataset,
    out: &Path,
    around: &Surroundings,
) -> Result<Outcome> {
    let config = &suited(config, dataset)?;
    // Whatever cannot be used is found before there is a folder.
    let given = given_encoder(config, &crate::device().autodiff())?;
    let folder = RunFolder::create(out, &config.to_toml())?;
    let course = course(folder, config, dataset, around)?;
    write_index(course.folder(), dataset)?;
    let run = Run {
        course: &course,
        config,
        dataset,
        observer: around.observer,
    };
    run.go(From::Start(given))
}

fn course<'a>(
    folder: RunFolder,
    config: &'a Config,
    dataset: &Dataset,
    around: &'a Surroundings<'a>,
) -> Result<Course<'a>> {
    let steps_per_epoch = steps_per_epoch(config, dataset);
    let fingerprint = dataset.index().fingerprint();
    Course::new(folder, &config.base, steps_per_epoch, fingerprint, around)
}

/// The images of a run that goes on, numbered as they were when it was started. Where they are not the same any more
/// that is an error, or, with `accept_changed`, they are taken as they are now.
pub fn reopen_data(
    run: &RunFolder,
    config: &Config,
    accept_changed: bool,
    observer: &dyn Observer,
) -> Result<Dataset> {
    // Where another process is at work on the run, its images need not be looked at.
    let _lock = run.lock()?;
    // Killed before it had one, a run has not used its images yet; and old runs have none.
    let Some(index) = read_index(run)? else {
        return Dataset::open(&config.data, config.seed, observer);
    };
    match Dataset::reopen(&config.data, config.seed, &index, observer) {
        Err(Error::DataChanged { changes, .. }) if accept_changed => {
            observer.note(&format!("going on with changed images: {changes}"));
            Dataset::open(&config.data, config.seed, observer)
        }
        reopened => reopened,
    }
}

/// The index of the images that a run was started on, where it has one.
pub fn read_index(run: &RunFolder) -> Result<Option<Index>> {
    let path = run.file(INDEX_FILE);
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(Error::io(&path))?,
    };
    Index::from_bytes(bytes).map(Some).map_err(|reason| {
        let remedy = "restore it, or remove it to take the images as they are now";
        Error::data(&path, format!("damaged ({reason}); {remedy}"))
    })
}

/// That weights were pre-trained on images that are scored.
pub struct Seen {
    /// How that came about.
    pub why: String,
    /// Whether that is known, not only possible.
    pub certain: bool,
}

/// The configuration of the run that weights are of, where it was trained on what lies where `dataset` does.
fn trained_on(weights: &Weights, dataset: &Dataset) -> Result<Option<Config>> {
    let run = weights.run.as_ref();
    let trained = run.map(|run| resumed_config(run, None)).transpose()?;
    Ok(trained.filter(|trained| place(&trained.data.path) == place(dataset.path())))
}

/// Whether weights were pre-trained on images of `val` that a probe scores: all of them where it has no split of its own.
pub fn seen_in_val(weights: &Weights, val: &Dataset) -> Result<Option<Seen>> {
    if matches!(val.split, Split::Own { .. }) || trained_on(weights, val)?.is_none() {
        return Ok(None);
    }
    let why = format!(
        "{}: trained on most of the images that are scored; given as --data, without --val, they are scored where it held \
         them out",
        weights.name
    );
    Ok(Some(Seen { why, certain: true }))
}

/// Whether weights were pre-trained on images that `dataset`, opened with `seed`, holds out. A split that is drawn is another
/// one with another seed or share, and once images were added or are gone.
pub fn seen_held_out(weights: &Weights, dataset: &Dataset, seed: u64) -> Result<Option<Seen>> {
    let (name, own) = (&weights.name, weights.metadata.seed);
    let Split::Stratified {
        held_out,
        of_train_folder,
    } = dataset.split
    else {
        return Ok(None);
    };
    if weights.metadata.method == "none" {
        return Ok(None);
    }
    let Some(trained) = trained_on(weights, dataset)? else {
        let why = format!(
            "{name}: trained with seed {own}; if that was on these images, it saw most of those that are scored, which are \
             held out with seed {seed}: --seed {own} holds out the same"
        );
        let seen = Seen {
            why,
            certain: false,
        };
        return Ok((own != seed).then_some(seen));
    };
    let index = weights.run.as_ref().map(read_index).transpose()?.flatten();
    let what = if index.is_some_and(|index| !dataset.is_of(&index)) {
        "they have changed since, so others are held out now"
    } else if of_train_folder && trained.data.split == SplitChoice::Own {
        "then none of its training folder were held out"
    } else if own != seed {
        &format!("--seed {own} holds out the same as then")
    } else if held_out > trained.data.held_out {
        "fewer were held out then"
    } else {
        return Ok(None);
    };
    let why = format!("{name}: trained on these images, also on some that are scored; {what}");
    Ok(Some(Seen { why, certain: true }))
}

/// Keeps which images a run is on from here, where it does not say so yet.
fn write_index(run: &RunFolder, dataset: &Dataset) -> Result<()> {
    if read_index(run)?.is_some_and(|kept| dataset.is_of(&kept)) {
        return Ok(());
    }
    write_durably(&run.file(INDEX_FILE), &dataset.index().to_bytes())
}

/// The configuration with what follows from the images; refused where they do not do for it.
pub fn suited(config: &Config, dataset: &Dataset) -> Result<Config> {
    check_size(config, dataset)?;
    let mut config = config.clone();
    if traits(config.method, config.objective.target).labelled {
        let refused = |what: String| {
            Err(Error::data(
                dataset.path(),
                format!(
                    "{what}; method {} learns from labels: sort the images into classes, a folder each",
                    config.method.name()
                ),
            ))
        };
        if dataset.classes.is_empty() {
            return refused("has no classes, or only one class".into());
        }
        let all = dataset.train.len();
        let unlabelled = |&&image: &&usize| dataset.images.label(image).is_none();
        let without = dataset.train.iter().filter(unlabelled).count();
        if without > 0 {
            return refused(format!(
                "{without} of its {all} training images have no class"
            ));
        }
        let first = dataset.images.label(dataset.train[0]);
        let is_first = |&image: &usize| dataset.images.label(image) == first;
        if dataset.train.iter().all(is_first) {
            return refused("has one class only among its training images".into());
        }
        let classes = dataset.classes.len();
        if ![0, classes].contains(&config.supervised.classes) {
            return Err(Error::Value {
                key: "supervised.classes".into(),
                value: config.supervised.classes.to_string(),
                expected: format!("{classes}, as many as the images have, or 0"),
            });
        }
        config.supervised.classes = classes;
    }
    Ok(config)
}

/// Refuses a batch that is larger than the training images.
fn check_size(config: &Config, dataset: &Dataset) -> Result<()> {
    let images = dataset.train.len();
    if config.optim.batch_size > images {
        return Err(Error::BatchTooLarge {
            batch_size: config.optim.batch_size,
            images,
        });
    }
    Ok(())
}

/// The configuration of a run, with more epochs where its schedule says how.
pub fn resumed_config(run: &RunFolder, epochs: Option<usize>) -> Result<Config> {
    refuse_detector(run)?;
    let path = run.file(CONFIG_FILE);
    let mut config = Config::load(Some(&path), &[])?;
    let Some(epochs) = epochs.filter(|&epochs| epochs != config.optim.epochs) else {
        return Ok(config);
    };
    if epochs < config.optim.epochs {
        return Err(Error::Refused(format!(
            "--epochs {epochs}: the run is planned for {} epochs and cannot be made shorter; stop it with Ctrl-C",
            config.optim.epochs
        )));
    }
    if config.optim.schedule == Schedule::Cosine {
        return Err(Error::Refused(format!(
            "--epochs {epochs}: the learning rate of this run follows a cosine that ends at 0 after {} epochs, so \
             there is no rate for later ones; start a new run with `--init {}`, or use optim.schedule = \"constant\" \
             for runs that may grow",
            config.optim.epochs,
            run.path().display()
        )));
    }
    config.optim.epochs = epochs;
    config.resolve()?;
    Ok(config)
}

/// Goes on from the newest checkpoint that verifies.
pub fn resume(
    run: RunFolder,
    config: &Config,
    dataset: &Dataset,
    around: &Surroundings,
) -> Result<Outcome> {
    let config = &suited(config, dataset)?;
    let course = course(run, config, dataset, around)?;
    let run = Run {
        course: &course,
        config,
        dataset,
        observer: around.observer,
    };
    let from = match course.newest()? {
        Some(checkpoint) => From::Checkpoint(checkpoint),
        None => From::Start(given_encoder(config, &crate::device().autodiff())?),
    };
    // Only now that they are not refused: images that were let pass as changed become the run's own.
    write_index(course.folder(), dataset)?;
    if resumed_config(course.folder(), None)?.optim.epochs != config.optim.epochs {
        course.folder().write_config(&config.to_toml())?;
    }
    run.go(from)
}

fn steps_per_epoch(config: &Config, dataset: &Dataset) -> u64 {
    (dataset.train.len() / config.optim.batch_size) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Silent;
    use crate::train::{ENCODER_FILE, fault};

    /// Two steps on eight small images.
    fn config(data: &Path) -> Config {
        let settings = [
            ("data.path", data.to_str().unwrap()),
            ("image_size", "16"),
            ("encoder.stride", "4"),
            ("optim.batch_size", "4"),
            ("optim.epochs", "1"),
            ("qb_heat.decoder.depth", "0"),
            ("run.checkpoint_every", "1"),
            ("run.keep_checkpoints", "1"),
            ("run.watch_every", "0"),
        ];
        Config::load(
            None,
            &settings.map(|(key, value)| (key.into(), value.into())),
        )
        .unwrap()
    }

    #[test]
    fn whichever_write_fails_the_run_goes_on_to_the_same_end() {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("set");
        std::fs::create_dir(&data).unwrap();
        for i in 0..8u8 {
            image::RgbImage::from_fn(16, 16, |x, y| image::Rgb([x as u8 * i, y as u8, i]))
                .save(data.join(format!("{i}.png")))
                .unwrap();
        }
        let config = config(&data);
        let dataset = Dataset::open(&config.data, config.seed, &Silent).unwrap();
        let around = Surroundings {
            observer: &Silent,
            stop: &|| false,
        };
        let begin = |run: &Path| start(&config, &dataset, run, &around);
        let encoder = |run: &Path| std::fs::read(run.join(ENCODER_FILE)).unwrap();
        let reference = home.path().join("reference");
        begin(&reference).unwrap();
        let mut failures = 0;
        for k in 1.. {
            let run = home.path().join(format!("run-{k}"));
            fault::fail_at(k);
            let outcome = begin(&run);
            let untouched = fault::is_pending();
            fault::fail_at(0);
            if untouched {
                outcome.unwrap();
                break;
            }
            // The last clean-up of old checkpoints may fail without harm.
            if let Err(error) = outcome {
                failures += 1;
                assert!(error.to_string().contains("injected"), "write {k}: {error}");
                let again = match RunFolder::open(&run) {
                    Ok(folder) => resume(folder, &config, &dataset, &around),
                    // Before it had a configuration it had not begun.
                    Err(_) => begin(&run),
                };
                again.unwrap_or_else(|error| panic!("after write {k} failed: {error}"));
            }
            assert!(encoder(&run) == encoder(&reference), "write {k}");
        }
        assert!(failures > 40, "only {failures} writes were tried");
    }
}
