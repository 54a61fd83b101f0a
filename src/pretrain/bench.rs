//! How fast the training step is.

use super::{Images, PretrainModel, WithModel, check_size, steps_per_epoch, with_model};
use crate::config::Config;
use crate::data::{Dataset, Loader};
use crate::error::Result;
use crate::observe::Observer;
use crate::train::{AdamW, AdamWConfig, StepTimes, Stop, TrainState, give_up, train};

/// Steps that are not counted: they fill caches.
const WARM_UP: usize = 2;

/// How fast the training step is.
pub struct BenchResult {
    /// Images a second of the fastest step.
    pub best: f64,
    /// Images a second of the median step.
    pub median: f64,
    /// Parts of the median step in milliseconds.
    pub milliseconds: std::collections::BTreeMap<&'static str, f64>,
}

/// Times the real training step, loader included, on the images of `config.data`.
pub fn bench(config: &Config, steps: usize, observer: &dyn Observer) -> Result<BenchResult> {
    let dataset = Dataset::open(&config.data, config.seed, observer)?;
    check_size(config, &dataset)?;
    let timing = Timing {
        config,
        dataset,
        steps,
        observer,
    };
    let mut times = with_model(config, &crate::device().autodiff(), timing)?;
    times.drain(..WARM_UP);
    times.sort_by_key(StepTimes::total);
    let images_per_s =
        |times: &StepTimes| config.optim.batch_size as f64 / times.total().as_secs_f64();
    let middle = &times[times.len() / 2];
    let parts = [
        ("data", middle.data),
        ("forward", middle.forward),
        ("backward", middle.backward),
        ("optimizer", middle.optimizer),
    ];
    Ok(BenchResult {
        best: images_per_s(&times[0]),
        median: images_per_s(middle),
        milliseconds: parts
            .into_iter()
            .map(|(part, time)| (part, time.as_secs_f64() * 1e3))
            .collect(),
    })
}

struct Timing<'a> {
    config: &'a Config,
    dataset: Dataset,
    steps: usize,
    observer: &'a dyn Observer,
}

impl WithModel for Timing<'_> {
    type Output = Vec<StepTimes>;

    /// The times of each step, those of the warm-up first.
    fn with<M: PretrainModel>(self, model: M) -> Result<Vec<StepTimes>> {
        let Self {
            config,
            dataset,
            observer,
            ..
        } = self;
        let device = crate::device().autodiff();
        let mut rate = config
            .optim
            .learning_rates(steps_per_epoch(config, &dataset));
        rate.total_steps = (self.steps + WARM_UP) as u64;
        let mut loader = Loader::new(&dataset.images, &dataset.train, &config.loading(), 0);
        let state = TrainState {
            model,
            optimizer: AdamW::new(AdamWConfig::from(&config.optim)),
            step: 0,
        };
        let mut times = Vec::new();
        observer.begin("timing steps", rate.total_steps);
        train(
            state,
            &rate,
            || Ok(Images::new(loader.next_batch()?, &device)),
            |model: &M, batch| model.loss(&batch, config.seed),
            give_up,
            |_, report| {
                times.push(report.times);
                observer.progress(report.step, "");
                Ok(Stop::No)
            },
        )?;
        observer.end();
        Ok(times)
    }
}
