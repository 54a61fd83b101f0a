//! All integration tests in one program: linking one is faster than linking many.

mod bad_images;
mod bad_input;
mod changed_data;
mod closed_forms;
mod coco;
mod command_line;
mod data;
mod detect_train;
mod detection;
mod detection_study;
mod detector;
mod encoders;
mod images;
mod invariance;
mod learning;
mod methods;
mod reference;
mod reliability;
mod sources;
mod study;
mod support;
