//! Batches of pictures with boxes, prepared beside the training step and delivered in a fixed order.

use std::borrow::Cow;
use std::sync::Arc;

use rayon::prelude::*;

use super::set::DetectionSet;
use super::view::{Placement, View, ViewBox, ViewConfig};
use crate::data::{BadImage, DataConfig, ImageSize, Lanes, Order, Picture};
use crate::error::Result;
use crate::random::{self, Purpose};

/// Pictures as numbers, and what is to be found in them.
#[derive(Clone)]
pub struct DetectionBatch {
    /// Epoch the batch belongs to, from 0.
    pub epoch: u64,
    /// Numbers of the images in the set.
    pub indices: Vec<usize>,
    /// `[N, channels, height, width]`, normalised; 0 in the padding.
    pub pixels: Vec<f32>,
    /// That shape.
    pub shape: [usize; 4],
    /// What is to be found in each image.
    pub boxes: Vec<Vec<ViewBox>>,
    /// Where each picture lies in its frame.
    pub placements: Vec<Placement>,
    /// Images that could not be read; others stand in their place.
    pub passed_over: Vec<BadImage>,
}

/// What a loader delivers. Content and order follow from these values alone, whatever the number of threads.
#[derive(Clone)]
pub struct DetectionLoaderConfig {
    /// Decides order and augmentation.
    pub seed: u64,
    /// Size of the frames.
    pub image_size: ImageSize,
    /// Images a batch; the rest of an epoch is left out.
    pub batch_size: usize,
    /// How views change from epoch to epoch; none for whole pictures as they are.
    pub view: Option<ViewConfig>,
    /// Flip, colours and number of threads.
    pub data: DataConfig,
}

/// An endless sequence of batches, from a given step on.
pub struct DetectionLoader(Lanes<DetectionBatch>);

impl DetectionLoader {
    /// Batches of the images of a set, at least as many as a batch has, beginning with the one of step `first_step`
    /// (from 0).
    pub fn new(set: &Arc<DetectionSet>, config: &DetectionLoaderConfig, first_step: u64) -> Self {
        let order = Order {
            seed: config.seed,
            subset: Arc::new((0..set.images.len()).collect()),
            batch_size: config.batch_size,
        };
        let (set, config) = (set.clone(), config.clone());
        let threads = config.data.loader_threads;
        Self(Lanes::new(
            order,
            threads,
            first_step,
            move |epoch, indices| config.batch(&set, epoch, &indices),
        ))
    }

    /// The next batch; waits for it.
    pub fn next_batch(&mut self) -> Result<DetectionBatch> {
        self.0.next_batch()
    }
}

impl DetectionLoaderConfig {
    fn batch(&self, set: &DetectionSet, epoch: u64, indices: &[usize]) -> Result<DetectionBatch> {
        let mut batch = DetectionBatch::empty(epoch);
        for &index in indices {
            let (index, picture, passed_over) = set.picture_or_next(index)?;
            let boxes = &set.images[index].boxes;
            let view = match &self.view {
                None => View::whole(&picture, boxes, self.image_size),
                Some(config) => {
                    let random =
                        &mut random::stream(self.seed, Purpose::Augmentation, epoch, index as u64);
                    View::random(&picture, boxes, self.image_size, config, &self.data, random)
                }
            };
            batch.add(index, view);
            batch.passed_over.extend(passed_over);
        }
        Ok(batch)
    }
}

impl DetectionBatch {
    /// Whole pictures as they are; where one cannot be read, the next one that can stands in its place.
    pub fn whole(set: &DetectionSet, indices: &[usize], image_size: ImageSize) -> Result<Self> {
        Self::read(set, indices, image_size, |index| set.picture_or_next(index))
    }

    /// Whole pictures as they are, these and no others, for evaluation.
    pub(super) fn exactly(
        set: &DetectionSet,
        indices: &[usize],
        image_size: ImageSize,
    ) -> Result<Self> {
        Self::read(set, indices, image_size, |index| {
            Ok((index, set.picture(index)?, Vec::new()))
        })
    }

    fn read<'a>(
        set: &'a DetectionSet,
        indices: &[usize],
        image_size: ImageSize,
        picture: impl Fn(usize) -> Result<(usize, Cow<'a, Picture>, Vec<BadImage>)> + Sync,
    ) -> Result<Self> {
        let views: Vec<(usize, View, Vec<BadImage>)> = indices
            .par_iter()
            .map(|&index| {
                let (index, picture, passed_over) = picture(index)?;
                let view = View::whole(&picture, &set.images[index].boxes, image_size);
                Ok((index, view, passed_over))
            })
            .collect::<Result<_>>()?;
        let mut batch = Self::empty(0);
        for (index, view, passed_over) in views {
            batch.add(index, view);
            batch.passed_over.extend(passed_over);
        }
        Ok(batch)
    }

    /// Views of pictures with these numbers, at least one.
    pub(super) fn of(views: Vec<(usize, View)>) -> Self {
        let mut batch = Self::empty(0);
        for (index, view) in views {
            batch.add(index, view);
        }
        batch
    }

    fn empty(epoch: u64) -> Self {
        Self {
            epoch,
            indices: Vec::new(),
            pixels: Vec::new(),
            shape: [0; 4],
            boxes: Vec::new(),
            placements: Vec::new(),
            passed_over: Vec::new(),
        }
    }

    fn add(&mut self, index: usize, view: View) {
        view.write(&mut self.pixels);
        let Placement { content, frame, .. } = view.placement;
        let channels = view.planes.len() / content.pixels();
        self.indices.push(index);
        self.shape = [self.indices.len(), channels, frame.height, frame.width];
        self.boxes.push(view.boxes);
        self.placements.push(view.placement);
    }
}
