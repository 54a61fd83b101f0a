//! How the library tells whoever called it what it is doing; it never prints.

use std::sync::Mutex;

/// Receives progress. Every method may do nothing.
pub trait Observer: Send + Sync {
    /// A stage of `total` parts begins.
    fn begin(&self, stage: &str, total: u64);
    /// `done` parts of the present stage are done; `detail` says how it goes.
    fn progress(&self, done: u64, detail: &str);
    /// The present stage is over.
    fn end(&self);
    /// A sentence that a person should see.
    fn note(&self, text: &str);
}

/// Tells nobody.
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _stage: &str, _total: u64) {}
    fn progress(&self, _done: u64, _detail: &str) {}
    fn end(&self) {}
    fn note(&self, _text: &str) {}
}

/// Keeps the sentences, and nothing else.
#[derive(Default)]
pub struct Notes(Mutex<Vec<String>>);

impl Notes {
    /// Those so far.
    pub fn so_far(&self) -> Vec<String> {
        self.0.lock().expect("no holder panics").clone()
    }
}

impl Observer for Notes {
    fn begin(&self, _stage: &str, _total: u64) {}
    fn progress(&self, _done: u64, _detail: &str) {}
    fn end(&self) {}
    fn note(&self, text: &str) {
        self.0.lock().expect("no holder panics").push(text.into());
    }
}
