//! How fast training and feature extraction are.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use serde::Serialize;

use crate::config::{Config, Method, require};
use crate::data::{Batch, Dataset, Loader};
use crate::encoder::{self, Build};
use crate::error::{Error, Result};
use crate::heat::{Place, Visible};
use crate::nn::{Init, Named, StateDict, TransformerBlock, multiply_adds, values};
use crate::observe::Observer;
use crate::pretrain::{Images, PretrainModel, WithModel, qb_heat, suited, with_model};
use crate::probe::Classifier;
use crate::train::{
    AdamW, AdamWConfig, StepTimes, Stop, TrainState, give_up, settled, train, write_durably,
};

/// Steps that are not counted: they fill caches.
const WARM_UP: usize = 2;
/// Classes of the classifier that is timed, and tokens and width of the transformer block.
const CLASSES: usize = 100;
const BLOCK: [usize; 2] = [64, 192];
const HEADS: usize = 4;
/// Passes over the batch that a training step costs: forward, and twice as much backward.
const PASSES: f64 = 3.0;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// A pre-training step of the configured method.
    Pretrain,
    /// A training step on whole images: encoder, mean over positions, linear classifier, cross entropy.
    Supervised,
    /// Feature maps of whole images in evaluation mode.
    Features,
    /// Forward and backward pass of one transformer block of four heads on `[N, 64, 192]`.
    Block,
}

/// How to time it.
pub struct BenchConfig<'a> {
    /// What is timed.
    pub work: Work,
    /// Steps that are timed, after two that are not.
    pub steps: usize,
    /// Takes the first batch again and again instead of loading new ones.
    pub one_batch: bool,
    /// Where to keep the weights before the first step and its batch, as safetensors.
    pub keep_step: Option<&'a Path>,
}

/// How fast it is.
pub struct BenchResult {
    /// Images a second of the fastest step.
    pub best: f64,
    /// Images a second of the median step.
    pub median: f64,
    /// Images a second of all steps together.
    pub mean: f64,
    /// Parts of the median step in milliseconds.
    pub milliseconds: BTreeMap<&'static str, f64>,
    /// Learned numbers.
    pub parameters: usize,
    /// Loss of the first step; for works without one, the mean square of what comes out.
    pub first_loss: f32,
    /// Billions of floating-point operations a second of the fastest step, in convolutions, linear layers and attention.
    pub gflops: f64,
    /// What products of matrices reach on this machine with the same threads.
    pub peak_gflops: f64,
}

/// Times `bench.work` on the images of `dataset`.
pub fn bench(
    config: &Config,
    dataset: &Dataset,
    bench: &BenchConfig,
    observer: &dyn Observer,
) -> Result<BenchResult> {
    let config = &match bench.work {
        Work::Block => config.clone(),
        _ => suited(config, dataset)?,
    };
    let timing = Timing {
        config,
        dataset,
        bench,
        observer,
    };
    let Measured {
        mut times,
        parameters,
        first_loss,
        products,
    } = match bench.work {
        Work::Pretrain => with_model(config, &crate::device().autodiff(), timing)?,
        Work::Supervised => timing.supervised()?,
        Work::Features => timing.features()?,
        Work::Block => timing.block()?,
    };
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
    let total: Duration = times.iter().map(StepTimes::total).sum();
    let passes = if bench.work == Work::Features {
        1.0
    } else {
        PASSES
    };
    Ok(BenchResult {
        best: images_per_s(&times[0]),
        median: images_per_s(middle),
        mean: (times.len() * config.optim.batch_size) as f64 / total.as_secs_f64(),
        milliseconds: parts
            .into_iter()
            .map(|(part, time)| (part, time.as_secs_f64() * 1e3))
            .collect(),
        parameters,
        first_loss,
        gflops: 2.0 * products as f64 * passes / times[0].total().as_secs_f64() / 1e9,
        peak_gflops: qbheat_kernels::peak_gflops(),
    })
}

struct Timing<'a> {
    config: &'a Config,
    dataset: &'a Dataset,
    bench: &'a BenchConfig<'a>,
    observer: &'a dyn Observer,
}

struct Measured {
    times: Vec<StepTimes>,
    parameters: usize,
    first_loss: f32,
    /// Multiply-adds of a forward pass of the batch.
    products: u64,
}

impl WithModel for Timing<'_> {
    type Output = Measured;

    fn with<M: PretrainModel>(self, model: M) -> Result<Measured> {
        let (config, seed) = (self.config, self.config.seed);
        if let Some(path) = self.bench.keep_step {
            require(
                config.method_name() == Method::QbHeat.name(),
                "method",
                config.method_name(),
                "qb-heat, where the step is kept",
            )?;
            let batch = self.first_images()?;
            let network = qb_heat(config, &crate::device())?;
            let visible = batch.visible(network.place(), network.patch(), seed);
            keep(
                path,
                &model,
                sorted(batch.pixels, &visible, network.place())?,
            )?;
        }
        let device = crate::device().autodiff();
        let loss = |model: &M, batch| model.loss(&Images::new(batch, &device), seed);
        self.train(model, loss, M::follow)
    }
}

impl Timing<'_> {
    fn loader(&self) -> Loader {
        let Dataset { images, train, .. } = self.dataset;
        Loader::new(images, train, &self.config.loading(), 0)
    }

    fn first_images(&self) -> Result<Images> {
        Ok(Images::new(self.loader().next_batch()?, &crate::device()))
    }

    fn build(&self) -> Build {
        Build {
            stride: self.config.encoder.stride,
            inputs: self.config.data.channels,
        }
    }

    fn supervised(&self) -> Result<Measured> {
        let device = crate::device().autodiff();
        let mut init = Init::new(self.config.seed, &device);
        let spec = encoder::find(&self.config.encoder.name)?;
        let encoder = spec.build(self.build(), &mut init)?;
        let classifier = init.linear(encoder.channels(), CLASSES);
        let model = Classifier::new(encoder, classifier);
        if let Some(path) = self.bench.keep_step {
            let batch = self.first_images()?;
            keep(path, &model, [("pixels", batch.pixels)])?;
        }
        let loss = |model: &Classifier, batch: Batch| {
            let labels: Vec<u32> = (0..batch.shape[0]).map(|i| (i % CLASSES) as u32).collect();
            model.loss(Images::new(batch, &device).pixels, &labels)
        };
        self.train(model, loss, settled)
    }

    fn features(&self) -> Result<Measured> {
        let mut init = Init::new(self.config.seed, &crate::device());
        let spec = encoder::find(&self.config.encoder.name)?;
        let encoder = spec.build(self.build(), &mut init)?.valid();
        let images = self.first_images()?;
        if let Some(path) = self.bench.keep_step {
            keep(path, &encoder, [("pixels", images.pixels.clone())])?;
        }
        self.passes(&encoder, |encoder| {
            let start = Instant::now();
            let map = encoder.channels_last(images.pixels.clone());
            let forward = start.elapsed();
            (
                values((map.clone() * map).mean())[0],
                forward,
                Duration::ZERO,
            )
        })
    }

    fn block(&self) -> Result<Measured> {
        let device = crate::device().autodiff();
        let [tokens, width] = BLOCK;
        let mut init = Init::new(self.config.seed, &device);
        let block = TransformerBlock::new(width, HEADS, &mut init);
        let shape = [self.config.optim.batch_size, tokens, width];
        let x = init.normal(shape, 1.0).val();
        if let Some(path) = self.bench.keep_step {
            keep(path, &block, [("pixels", x.clone())])?;
        }
        self.passes(&block, |block| {
            let start = Instant::now();
            let y = block.forward(x.clone());
            let loss = (y.clone() * y).mean();
            let value = values(loss.clone())[0];
            let forward = start.elapsed();
            let start = Instant::now();
            drop(loss.backward());
            (value, forward, start.elapsed())
        })
    }

    /// Times passes of a module, each of which gives its loss and how long forward and backward took.
    fn passes<M: Module>(
        &self,
        module: &M,
        mut pass: impl FnMut(&M) -> (f32, Duration, Duration),
    ) -> Result<Measured> {
        let total = self.bench.steps + WARM_UP;
        let mut first_loss = 0.0;
        let mut times = Vec::new();
        let products = multiply_adds(|| first_loss = pass(module).0);
        self.observer.begin("timing passes", total as u64);
        for i in 0..total {
            let (_, forward, backward) = pass(module);
            self.observer.progress(i as u64 + 1, "");
            times.push(StepTimes {
                forward,
                backward,
                ..StepTimes::default()
            });
        }
        self.observer.end();
        times.drain(..WARM_UP);
        Ok(Measured {
            times,
            parameters: StateDict::of(module).parameters(),
            first_loss,
            products,
        })
    }

    /// Times training steps.
    fn train<M: Module>(
        &self,
        model: M,
        mut loss: impl FnMut(&M, Batch) -> Tensor<1>,
        settle: impl FnMut(M) -> M,
    ) -> Result<Measured> {
        let Self {
            config,
            bench,
            observer,
            ..
        } = self;
        let total = bench.steps + WARM_UP;
        let rate = crate::train::LearningRate {
            total_steps: total as u64,
            ..config.optim.learning_rates(total as u64)
        };
        let mut loader = self.loader();
        let first = loader.next_batch()?;
        let parameters = StateDict::of(&model).parameters();
        let mut counted = None;
        let state = TrainState {
            model,
            optimizer: AdamW::new(AdamWConfig::from(&config.optim)),
            step: 0,
        };
        let mut times = Vec::new();
        let mut first_loss = None;
        observer.begin("timing steps", rate.total_steps);
        train(
            state,
            &rate,
            || {
                if bench.one_batch {
                    Ok(first.clone())
                } else {
                    loader.next_batch()
                }
            },
            |model: &M, batch| {
                if counted.is_some() {
                    return loss(model, batch);
                }
                let mut found = None;
                counted = Some(multiply_adds(|| found = Some(loss(model, batch))));
                found.expect("the pass has run")
            },
            settle,
            give_up,
            |_, report| {
                first_loss.get_or_insert(report.loss);
                times.push(report.times);
                observer.progress(report.step, "");
                Ok(Stop::No)
            },
        )?;
        observer.end();
        times.drain(..WARM_UP);
        Ok(Measured {
            times,
            parameters,
            first_loss: first_loss.unwrap_or_default(),
            products: counted.unwrap_or_default(),
        })
    }
}

/// Images with the same visible quadrant together, and how many show each.
fn sorted(
    pixels: Tensor<4>,
    visible: &Visible,
    place: Place,
) -> Result<[(&'static str, Tensor<4>); 2]> {
    let Visible::Quadrants(quadrants) = visible else {
        return Err(Error::Value {
            key: "qb_heat.visible".into(),
            value: format!("{place:?}").to_lowercase(),
            expected: "corner, where the step is kept".into(),
        });
    };
    let (pixels, sizes, _) = crate::heat::sort_by_quadrant(pixels, quadrants);
    let sizes = sizes.map(|size| size as f32).to_vec();
    let groups = Tensor::from_data(TensorData::new(sizes, [1, 1, 1, 4]), &pixels.device());
    Ok([("pixels", pixels), ("groups", groups)])
}

/// Writes a module's tensors and what goes into it.
fn keep<const D: usize, const N: usize>(
    path: &Path,
    module: &impl Module,
    inputs: [(&str, Tensor<D>); N],
) -> Result<()> {
    let mut state = StateDict::of(module);
    for (name, tensor) in inputs {
        let shape = tensor.dims().to_vec();
        let values = values(tensor);
        state.0.insert(name.to_owned(), Named { shape, values });
    }
    let bytes = state.to_bytes("").map_err(|source| Error::Weights {
        path: path.to_owned(),
        source,
    })?;
    write_durably(path, &bytes)
}
