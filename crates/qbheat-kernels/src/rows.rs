//! Cutting rows into pieces: what runs in parallel, and in which order partial sums are added.
//!
//! The cuts follow from the number of rows alone, never from the number of threads, and partial sums are added in the
//! order of the pieces: results are the same bit for bit on any number of threads.

use rayon::prelude::*;

/// Rows that a kernel takes on at a time, so that what it makes of them stays in a core's cache.
pub const CHUNK: usize = 64;
/// Pieces with partial sums of their own.
const MOST_PIECES: usize = 16;
/// So that adding partial sums costs little beside making them.
const LEAST_ROWS: usize = 128;

/// Rows of each of the pieces that `rows` are cut into, the last perhaps fewer; a multiple of `unit`.
pub fn piece(rows: usize, unit: usize) -> usize {
    let pieces = (rows / LEAST_ROWS).clamp(1, MOST_PIECES);
    let least = rows.div_ceil(pieces).max(1);
    // Whole chunks, where a sample does not decide.
    least.next_multiple_of(if unit == 1 { 8 } else { unit })
}

/// Chunks of at most [`CHUNK`] rows of `0..rows`: first row and how many.
pub fn chunks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows)
        .step_by(CHUNK)
        .map(move |start| (start, CHUNK.min(rows - start)))
}

/// Rows of a chunk where every one may run on another thread: fewer where there are few rows.
pub fn parallel_chunk(rows: usize) -> usize {
    (rows / MOST_PIECES).clamp(8, CHUNK).next_multiple_of(8)
}

/// `values` in pieces of a length; `pieces` empty ones where there are no values.
pub fn split(values: &mut [f32], length: usize, pieces: usize) -> Vec<&mut [f32]> {
    let mut split: Vec<&mut [f32]> = values.chunks_mut(length.max(1)).collect();
    split.resize_with(pieces, Default::default);
    split
}

/// The sum of vectors of the same length, first to last.
pub fn add_up(parts: Vec<Vec<f32>>) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let Some(mut total) = parts.next() else {
        return Vec::new();
    };
    let parts: Vec<Vec<f32>> = parts.collect();
    if parts.is_empty() {
        return total;
    }
    total
        .par_chunks_mut(4096)
        .enumerate()
        .for_each(|(i, total)| {
            for part in &parts {
                for (sum, value) in total.iter_mut().zip(&part[i * 4096..]) {
                    *sum += value;
                }
            }
        });
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_chunks_cover_all_rows_once() {
        for rows in [1, 7, 64, 65, 127, 256, 1000, 16384] {
            for unit in [1, 16, 49] {
                let piece = piece(rows, unit);
                assert!(piece > 0 && (unit == 1 || piece.is_multiple_of(unit)));
                assert!(rows.div_ceil(piece) <= MOST_PIECES);
            }
            let mut next = 0;
            for (start, count) in chunks(rows) {
                assert_eq!(start, next);
                assert!(count > 0 && count <= CHUNK);
                next += count;
            }
            assert_eq!(next, rows);
            assert!((8..=CHUNK).contains(&parallel_chunk(rows)));
        }
    }

    #[test]
    fn parts_are_added_in_order() {
        let parts = vec![vec![1e8f32; 5000], vec![1.0; 5000], vec![-1e8; 5000]];
        assert!(add_up(parts).iter().all(|&sum| sum == 0.0));
    }
}
