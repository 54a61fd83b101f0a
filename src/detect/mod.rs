//! Detection: pictures with boxes, from a COCO file to average precision.

mod average_precision;
mod coco;
mod loader;
mod origin;
mod prior;
mod set;
mod view;

pub use average_precision::{ClassScore, Prediction, Score, score};
pub use coco::{AnnotatedImage, Class, Finding, Kind, MOST_BOXES, TrueBox, describe};
pub use loader::{DetectionBatch, DetectionLoader, DetectionLoaderConfig};
pub use origin::Origin;
pub use prior::{Baselines, MeanBoxes, baselines, chance};
pub use set::{ClassSize, DetectionSet, Spread, Summary};
pub use view::{Placement, View, ViewBox, ViewConfig, padding};
