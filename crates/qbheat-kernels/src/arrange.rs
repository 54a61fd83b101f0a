//! Rows of several sequences put into a new order.

use rayon::prelude::*;

use crate::array::Array;
use crate::operation::{Forward, Operation};
use crate::simd::unwritten;

/// For one group of samples: for each row of the result, which of the group's inputs it comes from and which row of that
/// it is. Every row of every input comes up once.
pub type Table = Vec<(usize, usize)>;

/// Inputs: for each group as many sequences `[N of the group, T, C]` as its table names; the output: `[N, rows, C]`, the
/// groups one after another, each as its table says.
#[derive(Debug)]
pub struct Arrange {
    pub tables: Vec<Table>,
}

impl Arrange {
    fn per_group(&self, inputs: usize) -> usize {
        inputs / self.tables.len()
    }
}

impl Operation for Arrange {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let rows = self.tables[0].len();
        let [_, length, width] = inputs[0].dims();
        let groups = inputs.chunks(self.per_group(inputs.len()));
        let samples: usize = groups.clone().map(|parts| parts[0].dims::<3>()[0]).sum();
        let mut y = unwritten(samples * rows * width);
        let mut rest = &mut y[..];
        for (parts, table) in groups.zip(&self.tables) {
            let count = parts[0].dims::<3>()[0];
            let (y, more) = rest.split_at_mut(count * rows * width);
            rest = more;
            let parts: Vec<&[f32]> = parts.iter().map(|part| &part[..]).collect();
            y.par_chunks_mut((rows * width).max(1))
                .enumerate()
                .for_each(|(sample, y)| {
                    for (y, &(part, row)) in y.chunks_exact_mut(width).zip(table) {
                        let from = (sample * length + row) * width;
                        y.copy_from_slice(&parts[part][from..from + width]);
                    }
                });
        }
        Forward {
            output: Array::new(y, &[samples, rows, width]),
            extras: Vec::new(),
            saved: Vec::new(),
        }
    }

    fn backward(
        &self,
        inputs: &[Array],
        _saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let rows = self.tables[0].len();
        let [_, length, width] = inputs[0].dims();
        let per_group = self.per_group(inputs.len());
        let mut start = 0;
        let mut found = Vec::new();
        for (parts, table) in inputs.chunks(per_group).zip(&self.tables) {
            let count = parts[0].dims::<3>()[0];
            let dy = &gradient[start * rows * width..][..count * rows * width];
            start += count;
            for part in 0..per_group {
                let mut places = vec![0; length];
                for (place, &(from, row)) in table.iter().enumerate() {
                    if from == part {
                        places[row] = place;
                    }
                }
                let mut dx = unwritten(count * length * width);
                dx.par_chunks_mut((length * width).max(1))
                    .zip(dy.par_chunks((rows * width).max(1)))
                    .for_each(|(dx, dy)| {
                        for (dx, place) in dx.chunks_exact_mut(width).zip(&places) {
                            dx.copy_from_slice(&dy[place * width..][..width]);
                        }
                    });
                found.push(Some(Array::new(dx, &parts[part].shape())));
            }
        }
        found
    }
}
