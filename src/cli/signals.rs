//! INT and TERM: once to finish the step and save, twice to leave at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// From now on the first INT or TERM is only noted and a second one ends the program.
pub fn catch() {
    let signal = SIGNAL.get_or_init(Arc::default);
    let second = Arc::new(AtomicBool::new(false));
    for number in [SIGINT, SIGTERM] {
        // Handlers run in the order of their registration: the first signal finds `second` unset.
        let registered = flag::register_conditional_shutdown(number, 128 + number, second.clone())
            .and_then(|_| flag::register(number, second.clone()))
            .and_then(|_| flag::register_usize(number, signal.clone(), number as usize));
        registered.expect("INT and TERM can be caught");
    }
}

/// What a command exits with that was stopped.
pub fn exit_code() -> u8 {
    received().map_or(1, |signal| 128 + signal as u8)
}

/// The signal that came, if any.
pub fn received() -> Option<usize> {
    SIGNAL
        .get()
        .map(|signal| signal.load(Ordering::Relaxed))
        .filter(|&number| number != 0)
}
