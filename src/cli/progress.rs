//! Progress on the terminal; nothing but notes where stderr is none.

use std::io::Write;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qbheat::observe::Observer;

/// A bar with time left on stderr.
pub struct Progress(Mutex<ProgressBar>);

impl Progress {
    pub fn new() -> Self {
        Self(Mutex::new(ProgressBar::hidden()))
    }

    /// Takes the bar off the screen.
    pub fn clear(&self) {
        self.bar().finish_and_clear();
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Observer for Progress {
    fn begin(&self, stage: &str, total: u64) {
        let style =
            ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}, {eta} left {wide_msg}")
                .expect("the template is valid");
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5))
            .with_style(style)
            .with_prefix(stage.to_owned());
        std::mem::replace(&mut *self.bar(), bar).finish_and_clear();
    }

    fn progress(&self, done: u64, detail: &str) {
        let bar = self.bar();
        bar.set_position(done);
        if !bar.is_hidden() && !detail.is_empty() {
            bar.set_message(detail.to_owned());
        }
    }

    fn end(&self) {
        self.clear();
    }

    fn note(&self, text: &str) {
        // Where nobody listens any more there is nobody to tell.
        self.bar().suspend(|| {
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }
}
