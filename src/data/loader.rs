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
pub struct Loader {
    lanes: Vec<Receiver<Result<Batch>>>,
    next: usize,
}

struct Worker {
    images: Arc<Images>,
    subset: Arc<Vec<usize>>,
    config: LoaderConfig,
}

impl Loader {
    /// Batches of the images numbered in `subset`, beginning with the one of step `first_step` (from 0).
    pub fn new(
        images: &Arc<Images>,
        subset: &Arc<Vec<usize>>,
        config: &LoaderConfig,
        first_step: u64,
    ) -> Self {
        let threads = config.data.loader_threads as u64;
        let lanes = (0..threads)
            .map(|lane| {
                let (sender, receiver) = sync_channel(AHEAD);
                let worker = Worker {
                    images: images.clone(),
                    subset: subset.clone(),
                    config: config.clone(),
                };
                thread::spawn(move || worker.run(first_step + lane, threads, &sender));
                receiver
            })
            .collect();
        Self { lanes, next: 0 }
    }

    /// The next batch; waits for it.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let lane = self.next;
        self.next = (lane + 1) % self.lanes.len();
        self.lanes[lane]
            .recv()
            .expect("a loader thread lives as long as its loader")
    }
}

impl Worker {
    /// Prepares steps `first`, `first + stride`, … until nobody wants them any more.
    fn run(&self, first: u64, stride: u64, sender: &SyncSender<Result<Batch>>) {
        let steps_per_epoch = (self.subset.len() / self.config.batch_size) as u64;
        let mut order = (u64::MAX, Vec::new());
        let mut step = first;
        loop {
            let epoch = step / steps_per_epoch;
            if order.0 != epoch {
                let count = self.subset.len();
                order = (
                    epoch,
                    random::permutation(self.config.seed, Purpose::Order, epoch, count),
                );
            }
            let start = (step % steps_per_epoch) as usize * self.config.batch_size;
            let places = &order.1[start..start + self.config.batch_size];
            if sender.send(self.batch(epoch, places)).is_err() {
                return;
            }
            step += stride;
        }
    }

    fn batch(&self, epoch: u64, places: &[usize]) -> Result<Batch> {
        let LoaderConfig {
            seed,
            image_size,
            views,
            data,
            ..
        } = &self.config;
        let indices: Vec<usize> = places.iter().map(|&place| self.subset[place]).collect();
        let room = indices.len() * data.channels * image_size.pixels();
        let mut pixels: Vec<Vec<f32>> = vec![Vec::with_capacity(room); *views];
        let mut passed_over = Vec::new();
        for &index in &indices {
            let (picture, bad) = self.images.picture(index)?;
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
            labels: indices.iter().map(|&i| self.images.label(i)).collect(),
            indices,
            pixels,
            passed_over,
        })
    }
}
