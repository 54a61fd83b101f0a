//! Counting multiply-adds while a network runs.

use std::cell::Cell;

thread_local! {
    static COUNT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The products of all convolutions, linear layers and attentions that `forward` runs on this thread; norms,
/// activations and sums are not counted.
pub fn multiply_adds(forward: impl FnOnce()) -> u64 {
    COUNT.set(Some(0));
    forward();
    COUNT.take().unwrap_or(0)
}

/// Adds to a count that is under way.
pub(crate) fn spend(products: usize) {
    if let Some(count) = COUNT.get() {
        COUNT.set(Some(count + products as u64));
    }
}
