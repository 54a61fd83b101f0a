//! Memory that is kept for the next step.
//!
//! Every training step asks for the same large blocks as the one before. Given back to the system and fetched anew,
//! their pages cost more time than many a layer's arithmetic.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

/// The system's allocator, except that large blocks are cut from regions that are kept when the blocks are freed.
///
/// The smallest free range that is large enough is taken; free neighbours become one. A region that is free as a whole
/// goes back to the system where the others hold a quarter more than was ever in use.
pub struct KeepingAllocator {
    state: Mutex<State>,
}

/// Smaller blocks are the system's.
const LEAST: usize = 1 << 16;
/// Smallest region.
const REGION: usize = 32 << 20;
/// Of blocks and of what stands in front of each.
const UNIT: usize = 64;
/// Regions are whole huge pages, where the system has such.
const PAGE: usize = 2 << 20;

/// Stands in front of each range, free or not; the last in a region has size 0.
#[repr(C, align(64))]
struct Header {
    /// Bytes of the range, header included.
    size: usize,
    /// Bytes of the range in front of it; 0 for a region's first.
    before: usize,
    is_free: bool,
    /// Neighbours in the list of free ranges.
    next: *mut Header,
    previous: *mut Header,
}

const _: () = assert!(size_of::<Header>() == UNIT);

struct State {
    /// First of the free ranges.
    free: *mut Header,
    /// Bytes of all regions, and of ranges in use now and at their peak.
    held: usize,
    in_use: usize,
    peak: usize,
}

// SAFETY: regions belong to the allocator alone, whichever thread works on them under its lock.
unsafe impl Send for State {}

fn is_kept(layout: Layout) -> bool {
    (LEAST..isize::MAX as usize / 2).contains(&layout.size()) && layout.align() <= UNIT
}

/// # Safety
/// `size` is a multiple of [`PAGE`], far below what overflows.
unsafe fn region_layout(size: usize) -> Layout {
    // SAFETY: the caller's.
    unsafe { Layout::from_size_align_unchecked(size, PAGE) }
}

impl KeepingAllocator {
    /// Keeps nothing yet.
    #[allow(
        clippy::new_without_default,
        reason = "a static needs a constant function"
    )]
    pub const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                free: null_mut(),
                held: 0,
                in_use: 0,
                peak: 0,
            }),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The methods' pointers are to headers of ranges of this allocator's regions, which stay valid and are nobody else's
/// while the lock is held.
impl State {
    /// A range of at least so many bytes behind its header; null where the system has no more.
    unsafe fn take(&mut self, bytes: usize) -> *mut Header {
        let size = bytes.next_multiple_of(UNIT) + UNIT;
        // SAFETY: see above.
        unsafe {
            let mut found = self.smallest(size);
            if found.is_null() {
                found = self.add_region(size);
                if found.is_null() {
                    return found;
                }
            }
            self.unlink(found);
            self.split(found, size);
            (*found).is_free = false;
            self.in_use += (*found).size;
            self.peak = self.peak.max(self.in_use);
            found
        }
    }

    unsafe fn give(&mut self, range: *mut Header) {
        // SAFETY: see above.
        unsafe {
            self.in_use -= (*range).size;
            let mut range = range;
            let next = following(range);
            if (*next).is_free {
                self.unlink(next);
                (*range).size += (*next).size;
            }
            let before = (*range).before;
            if before > 0 {
                let previous = range.byte_sub(before);
                if (*previous).is_free {
                    self.unlink(previous);
                    (*previous).size += (*range).size;
                    range = previous;
                }
            }
            (*following(range)).before = (*range).size;
            self.link(range);
            self.shrink(range);
        }
    }

    unsafe fn smallest(&self, size: usize) -> *mut Header {
        let mut best: *mut Header = null_mut();
        let mut range = self.free;
        // SAFETY: see above.
        unsafe {
            while !range.is_null() {
                if (*range).size >= size && (best.is_null() || (*range).size < (*best).size) {
                    best = range;
                }
                range = (*range).next;
            }
        }
        best
    }

    /// A new region as one free range.
    unsafe fn add_region(&mut self, size: usize) -> *mut Header {
        let bytes = (size + UNIT).max(REGION).next_multiple_of(PAGE);
        // SAFETY: the size is not zero; both headers lie within the region.
        unsafe {
            let first: *mut Header = System.alloc(region_layout(bytes)).cast();
            if first.is_null() {
                return first;
            }
            ask_for_huge_pages(first.cast(), bytes);
            self.held += bytes;
            let header = |size, before| Header {
                size,
                before,
                is_free: false,
                next: null_mut(),
                previous: null_mut(),
            };
            first.write(header(bytes - UNIT, 0));
            following(first).write(header(0, bytes - UNIT));
            self.link(first);
            first
        }
    }

    /// Leaves a range as large as needed; the rest becomes a free one.
    unsafe fn split(&mut self, range: *mut Header, size: usize) {
        // SAFETY: see above; the rest is large enough for its header.
        unsafe {
            let rest_size = (*range).size - size;
            if rest_size < LEAST {
                return;
            }
            (*range).size = size;
            let rest = following(range);
            rest.write(Header {
                size: rest_size,
                before: size,
                is_free: false,
                next: null_mut(),
                previous: null_mut(),
            });
            (*following(rest)).before = rest_size;
            self.link(rest);
        }
    }

    /// Gives a region back that is free as a whole, where it is not needed to hold as much as was in use at the peak.
    unsafe fn shrink(&mut self, range: *mut Header) {
        // SAFETY: see above; the region is in nobody's hands.
        unsafe {
            let bytes = (*range).size + UNIT;
            let is_whole = (*range).before == 0 && (*following(range)).size == 0;
            if is_whole && self.held - bytes >= self.peak + self.peak / 4 {
                self.unlink(range);
                self.held -= bytes;
                System.dealloc(range.cast(), region_layout(bytes));
            }
        }
    }

    unsafe fn link(&mut self, range: *mut Header) {
        // SAFETY: see above.
        unsafe {
            (*range).is_free = true;
            (*range).previous = null_mut();
            (*range).next = self.free;
            if !self.free.is_null() {
                (*self.free).previous = range;
            }
        }
        self.free = range;
    }

    unsafe fn unlink(&mut self, range: *mut Header) {
        // SAFETY: see above.
        unsafe {
            let Header { next, previous, .. } = *range;
            if previous.is_null() {
                self.free = next;
            } else {
                (*previous).next = next;
            }
            if !next.is_null() {
                (*next).previous = previous;
            }
        }
    }
}

/// Fewer and larger pages: a step walks through hundreds of MiB.
fn ask_for_huge_pages(region: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: advice about a region of our own; where it is not heeded, nothing changes.
    unsafe {
        libc::madvise(region.cast(), bytes, libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (region, bytes);
}

/// # Safety
/// `range` is not the last of its region.
unsafe fn following(range: *mut Header) -> *mut Header {
    // SAFETY: ranges of a region follow each other without gap.
    unsafe { range.byte_add((*range).size) }
}

// SAFETY: blocks are at least as large and as aligned as asked for and belong to nobody else. Whether one comes from a
// region follows from its layout alone.
unsafe impl GlobalAlloc for KeepingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_kept(layout) {
            // SAFETY: the caller's.
            return unsafe { System.alloc(layout) };
        }
        // SAFETY: a range is larger than its header.
        unsafe {
            let range = self.with(|state| state.take(layout.size()));
            if range.is_null() {
                null_mut()
            } else {
                range.add(1).cast()
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !is_kept(layout) {
            // SAFETY: the caller's.
            return unsafe { System.dealloc(block, layout) };
        }
        // SAFETY: the block came from `alloc`, which left its header in front of it.
        unsafe { self.with(|state| state.give(block.cast::<Header>().sub(1))) }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn blocks_never_overlap_and_all_that_is_freed_becomes_one_again() {
        let allocator = KeepingAllocator::new();
        let mut random = StdRng::seed_from_u64(0);
        let mut blocks: Vec<(*mut u8, Layout, u8)> = Vec::new();
        // SAFETY: layouts are not empty, blocks are freed as they were taken and used within their size.
        unsafe {
            for round in 0..4000 {
                if blocks.len() < 40 && random.random_range(0..100) < 60 {
                    let size = random.random_range(LEAST..3_000_000);
                    let layout = Layout::from_size_align(size, 4).unwrap();
                    let block = allocator.alloc(layout);
                    assert!(!block.is_null() && block.addr().is_multiple_of(UNIT));
                    let mark = round as u8;
                    block.write_bytes(mark, size);
                    blocks.push((block, layout, mark));
                } else if !blocks.is_empty() {
                    let chosen = random.random_range(0..blocks.len());
                    let (block, layout, mark) = blocks.swap_remove(chosen);
                    for i in [0, layout.size() / 2, layout.size() - 1] {
                        assert_eq!(*block.add(i), mark);
                    }
                    allocator.dealloc(block, layout);
                }
            }
            for (block, layout, _) in blocks.drain(..) {
                allocator.dealloc(block, layout);
            }
            allocator.with(|state| {
                assert_eq!(state.in_use, 0);
                assert!(state.held <= state.peak + state.peak / 4 + REGION);
                let mut range = state.free;
                let mut whole = 0;
                while !range.is_null() {
                    assert!((*range).before == 0 && (*following(range)).size == 0);
                    whole += (*range).size + UNIT;
                    let next = (*range).next;
                    System.dealloc(range.cast(), region_layout((*range).size + UNIT));
                    range = next;
                }
                assert_eq!(whole, state.held);
            });
        }
    }

    #[test]
    fn a_freed_block_is_used_again() {
        let allocator = KeepingAllocator::new();
        let layout = Layout::from_size_align(100_000, 4).unwrap();
        // SAFETY: as above.
        unsafe {
            let first = allocator.alloc(layout);
            first.write_bytes(7, 100_000);
            allocator.dealloc(first, layout);
            let again = allocator.alloc_zeroed(layout);
            assert_eq!(first, again);
            assert!((0..100_000).all(|i| *again.add(i) == 0));
            allocator.dealloc(again, layout);
        }
    }
}
