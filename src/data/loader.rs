//! Batches, prepared beside the training step and delivered in a fixed order.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::{BadImage, DataConfig, ImageSize, Images, augment};
use crate::error::Result;
use crate::random::{self, Purpose};

/// Batches that a thread prepares ahead.
const AHEAD: usize = 2;

/// Images as numbers, and where they came from.
#[derive(Clone)]
pub struct Batch {
    /// Epoch the batch belongs to, from 0.
    pub epoch: u64,
    /// Numbers of the images in the data set.
    pub indices: Vec<usize>,
    /// Class of each image, where it has one.
    pub labels: Vec<Option<u32>>,
    /// `[views·N, channels, height, width]`, normalised: the first views of all images, then the second ones, ….
    pub pixels: Vec<f32>,
    /// That shape.
    pub shape: [usize; 4],
    /// Images that could not be read any more; others stand in their place.
    pub passed_over: Vec<BadImage>,
}

/// What a loader delivers. Content and order follow from these values alone, whatever the number of threads.
#[derive(Clone)]
pub struct LoaderConfig {
    /// Decides order and augmentation.
    pub seed: u64,
    /// Size of the views.
    pub image_size: ImageSize,
    /// Images a batch; the rest of an epoch is left out.
    pub batch_size: usize,
    /// Augmented views of each image.
    pub views: usize,
    /// Augmentation and number of threads.
    pub data: DataConfig,
}

/// An endless sequence of batches of randomly augmented images, from a given step on.
pub struct Loader(Lanes<Batch>);

/// Which images stand in which batch.
#[derive(Clone)]
pub(crate) struct Order {
    /// Decides the order of each epoch.
    pub seed: u64,
    /// Numbers of the images.
    pub subset: Arc<Vec<usize>>,
    /// Images a batch; the rest of an epoch is left out.
    pub batch_size: usize,
}

/// Threads that prepare batches of any kind, one after the other in turn. They must not hand work to the pool of threads
/// that compute: the one that waits for a batch may be all that this has.
pub(crate) struct Lanes<B> {
    lanes: Vec<Receiver<Result<B>>>,
    next: usize,
}

impl Loader {
    /// Batches of the images numbered in `subset`, beginning with the one of step `first_step` (from 0).
    pub fn new(
        images: &Arc<Images>,
        subset: &Arc<Vec<usize>>,
        config: &LoaderConfig,
        first_step: u64,
    ) -> Self {
        let order = Order {
            seed: config.seed,
            subset: subset.clone(),
            batch_size: config.batch_size,
        };
        let (images, config) = (images.clone(), config.clone());
        let threads = config.data.loader_threads;
        Self(Lanes::new(
            order,
            threads,
            first_step,
            move |epoch, indices| config.batch(&images, epoch, indices),
        ))
    }

    /// The next batch; waits for it.
    pub fn next_batch(&mut self) -> Result<Batch> {
        self.0.next_batch()
    }
}

impl<B: Send + 'static> Lanes<B> {
    /// `prepare` makes a batch of an epoch and the numbers of its images; the first is that of step `first_step`.
    pub fn new(
        order: Order,
        threads: usize,
        first_step: u64,
        prepare: impl Fn(u64, Vec<usize>) -> Result<B> + Send + Sync + 'static,
    ) -> Self {
        let prepare = Arc::new(prepare);
        let lanes = (0..threads as u64)
            .map(|lane| {
                let (sender, receiver) = sync_channel(AHEAD);
                let (order, prepare) = (order.clone(), prepare.clone());
                thread::spawn(move || {
                    order.run(first_step + lane, threads as u64, &*prepare, &sender);
                });
                receiver
            })
            .collect();
        Self { lanes, next: 0 }
    }

    /// The next batch; waits for it.
    pub fn next_batch(&mut self) -> Result<B> {
        let lane = self.next;
        self.next = (lane + 1) % self.lanes.len();
        self.lanes[lane]
            .recv()
            .expect("a loader thread lives as long as its loader")
    }
}

impl Order {
    /// Prepares steps `first`, `first + stride`, … until nobody wants them any more.
    fn run<B>(
        &self,
        first: u64,
        stride: u64,
        prepare: impl Fn(u64, Vec<usize>) -> Result<B>,
        sender: &SyncSender<Result<B>>,
    ) {
        let steps_per_epoch = (self.subset.len() / self.batch_size) as u64;
        let mut order = (u64::MAX, Vec::new());
        let mut step = first;
        loop {
            let epoch = step / steps_per_epoch;
            if order.0 != epoch {
                let count = self.subset.len();
                order = (
                    epoch,
                    random::permutation(self.seed, Purpose::Order, epoch, count),
                );
            }
            let start = (step % steps_per_epoch) as usize * self.batch_size;
            let places = &order.1[start..start + self.batch_size];
            let indices = places.iter().map(|&place| self.subset[place]).collect();
            if sender.send(prepare(epoch, indices)).is_err() {
                return;
            }
            step += stride;
        }
    }
}

impl LoaderConfig {
    fn batch(&self, images: &Images, epoch: u64, indices: Vec<usize>) -> Result<Batch> {
        let LoaderConfig {
            seed,
            image_size,
            views,
            data,
            ..
        } = self;
        let room = indices.len() * data.channels * image_size.pixels();
        let mut pixels: Vec<Vec<f32>> = vec![Vec::with_capacity(room); *views];
        let mut passed_over = Vec::new();
        for &index in &indices {
            let (picture, bad) = images.picture(index)?;
            passed_over.extend(bad);
            let mut random = random::stream(*seed, Purpose::Augmentation, epoch, index as u64);
            for pixels in &mut pixels {
                let view = augment::random_view(&picture, *image_size, data, &mut random);
                augment::normalise(&view, *image_size, pixels);
            }
        }
        let pixels = match &mut pixels[..] {
            [only] => std::mem::take(only),
            several => several.concat(),
        };
        let count = views * indices.len();
        let channels = pixels.len() / (count * image_size.pixels());
        Ok(Batch {
            epoch,
            shape: [count, channels, image_size.height, image_size.width],
            labels: indices.iter().map(|&i| images.label(i)).collect(),
            indices,
            pixels,
            passed_over,
        })
    }
}
