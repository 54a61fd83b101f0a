//! Detection: pictures with boxes, from a COCO file to average precision.

mod average_precision;
mod boxes;
mod coco;
mod denoising;
mod detections;
mod head;
mod loader;
mod loss;
mod matching;
mod origin;
mod prior;
mod set;
mod view;

pub use average_precision::{ClassScore, Prediction, Score, score};
pub use boxes::{Overlap, corners, from_corners, overlap, overlaps};
pub use coco::{AnnotatedImage, Class, Finding, Kind, MOST_BOXES, TrueBox, describe};
pub use denoising::{DenoisingConfig, Noised, noised};
pub use detections::{Detection, detections, suppress};
pub use head::{Answers, DetectionHead, Group, HeadConfig, Level};
pub use loader::{DetectionBatch, DetectionLoader, DetectionLoaderConfig};
pub use loss::{LossConfig, Losses, Terms, focal, losses};
pub use matching::{NotFinite, Pair, assign};
pub use origin::Origin;
pub use prior::{Baselines, MeanBoxes, baselines, chance};
pub use set::{ClassSize, DetectionSet, Spread, Summary};
pub use view::{Placement, View, ViewBox, ViewConfig, padding};
