//! Rows of several sequences put into a new order.

use rayon::prelude::*;

use crate::array::Array;
use crate::operation::{Forward, Operation};
use crate::simd::unwritten;

/// For each row of the result, which input it comes from and which row of that it is.
pub type Table = Vec<(usize, usize)>;

/// Inputs: sequences `[N, T, C]`; the output: `[N, rows, C]`. Every row of every input comes up once in each table.
#[derive(Debug)]
pub struct Arrange {
    pub tables: Vec<Table>,
    /// Number of each sample's table.
    pub table_of: Vec<usize>,
}

impl Operation for Arrange {
    fn forward(&self, inputs: &[Array], _saves: bool) -> Forward {
        let rows = self.tables[0].len();
        let [samples, length, width] = inputs[0].dims();
        assert!(
            self.tables.iter().all(|table| table.len() == rows) && rows == inputs.len() * length
        );
        assert_eq!(self.table_of.len(), samples);
        let parts: Vec<&[f32]> = inputs.iter().map(|part| &part[..]).collect();
        let mut y = unwritten(samples * rows * width);
        y.par_chunks_mut((rows * width).max(1))
            .enumerate()
            .for_each(|(sample, y)| {
                let table = &self.tables[self.table_of[sample]];
                for (y, &(part, row)) in y.chunks_exact_mut(width).zip(table) {
                    let from = (sample * length + row) * width;
                    y.copy_from_slice(&parts[part][from..][..width]);
                }
            });
        Forward::from(Array::new(y, &[samples, rows, width]))
    }

    fn backward(
        &self,
        inputs: &[Array],
        _saved: &[Array],
        gradient: &Array,
        _wanted: &[bool],
    ) -> Vec<Option<Array>> {
        let rows = self.tables[0].len();
        let [samples, length, width] = inputs[0].dims();
        let dy: &[f32] = gradient;
        let part_of = |part: usize| {
            // For each row of the part, where it stands in the result.
            let places: Vec<Vec<usize>> = self
                .tables
                .iter()
                .map(|table| {
                    let mut places = vec![0; length];
                    for (place, &(from, row)) in table.iter().enumerate() {
                        if from == part {
                            places[row] = place;
                        }
                    }
                    places
                })
                .collect();
            let mut dx = unwritten(samples * length * width);
            dx.par_chunks_mut((length * width).max(1))
                .enumerate()
                .for_each(|(sample, dx)| {
                    let places = &places[self.table_of[sample]];
                    for (dx, place) in dx.chunks_exact_mut(width).zip(places) {
                        let from = (sample * rows + place) * width;
                        dx.copy_from_slice(&dy[from..][..width]);
                    }
                });
            Some(Array::new(dx, &[samples, length, width]))
        };
        (0..inputs.len()).map(part_of).collect()
    }
}
