//! Quadrants: cropping the visible one, putting four together.

use burn::tensor::{Device, Tensor, TensorData};

use crate::nn::rows_at;

use super::Corner;

/// A quarter of an image, or of a feature map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quadrant {
    /// Small x, small y.
    TopLeft,
    /// Large x, small y.
    TopRight,
    /// Small x, large y.
    BottomLeft,
    /// Large x, large y.
    BottomRight,
}

impl Quadrant {
    /// In the order in which [`sort_by_quadrant`] groups a batch.
    pub const ALL: [Self; 4] = [
        Self::TopLeft,
        Self::TopRight,
        Self::BottomLeft,
        Self::BottomRight,
    ];

    /// In the right half?
    pub fn is_right(self) -> bool {
        matches!(self, Self::TopRight | Self::BottomRight)
    }

    /// In the lower half?
    pub fn is_lower(self) -> bool {
        matches!(self, Self::BottomLeft | Self::BottomRight)
    }

    /// Where it starts, in halves: (row, column).
    pub fn cell(self) -> (usize, usize) {
        (usize::from(self.is_lower()), usize::from(self.is_right()))
    }
}

/// How many images of a sorted batch show each quadrant, in the order of [`Quadrant::ALL`].
pub type GroupSizes = [usize; 4];

/// Sorts a batch so that images with the same visible quadrant stand together: the sorted images, the size of each
/// group, and for each sorted place the place it came from.
///
/// `images`: `[N, C, H, W]`; `visible`: one quadrant an image.
pub fn sort_by_quadrant(
    images: Tensor<4>,
    visible: &[Quadrant],
) -> (Tensor<4>, GroupSizes, Vec<usize>) {
    let mut order: Vec<usize> = (0..visible.len()).collect();
    order.sort_by_key(|&i| visible[i]);
    let sizes = Quadrant::ALL.map(|quadrant| visible.iter().filter(|&&v| v == quadrant).count());
    (rows_at(images, &order), sizes, order)
}

/// The sizes of a batch of `count` images that all show the same quadrant.
pub fn all_show(visible: Quadrant, count: usize) -> GroupSizes {
    Quadrant::ALL.map(|quadrant| if quadrant == visible { count } else { 0 })
}

/// The non-empty groups of a sorted batch: quadrant and range of places.
pub(super) fn groups(
    sizes: &GroupSizes,
) -> impl Iterator<Item = (Quadrant, std::ops::Range<usize>)> {
    let mut start = 0;
    Quadrant::ALL
        .into_iter()
        .zip(*sizes)
        .map(move |(quadrant, size)| {
            start += size;
            (quadrant, start - size..start)
        })
        .filter(|(_, range)| !range.is_empty())
}

/// Cuts out of each image its visible quadrant: `[N, C, H, W]`, sorted, to `[N, C, H/2, W/2]`.
pub fn visible_quarters(images: &Tensor<4>, sizes: &GroupSizes) -> Tensor<4> {
    let [_, channels, height, width] = images.dims();
    let (h, w) = (height / 2, width / 2);
    let quarters = groups(sizes).map(|(quadrant, range)| {
        let (row, column) = quadrant.cell();
        images.clone().slice([
            range,
            0..channels,
            row * h..(row + 1) * h,
            column * w..(column + 1) * w,
        ])
    });
    Tensor::cat(quarters.collect(), 0)
}

/// The features of all four quarters, named by where they lie from the visible one; each `[N, T, C]`.
pub struct Quarters {
    /// What the encoder made of the visible quarter.
    pub visible: Tensor<3>,
    /// Predicted for the quarter in the same rows.
    pub beside: Tensor<3>,
    /// Predicted for the quarter in the same columns.
    pub above_or_below: Tensor<3>,
    /// Predicted for the quarter across.
    pub diagonal: Tensor<3>,
}

/// Puts four quarters of `[h, w]` positions each where they belong, in a batch sorted by visible quadrant:
/// `[N, 4·h·w, C]`, row by row over the whole map.
pub fn assemble(quarters: Quarters, sizes: &GroupSizes, [h, w]: [usize; 2]) -> Tensor<3> {
    let table = |visible: Quadrant| {
        let (lower, right) = visible.cell();
        (0..4 * h * w)
            .map(|place| {
                let (y, x) = (place / (2 * w), place % (2 * w));
                let across = usize::from((x >= w) != (right == 1));
                let down = usize::from((y >= h) != (lower == 1));
                (2 * down + across, y % h * w + x % w)
            })
            .collect()
    };
    let tables = Quadrant::ALL.map(table).into();
    let table_of = groups(sizes)
        .flat_map(|(visible, range)| range.map(move |_| visible as usize))
        .collect();
    let Quarters {
        visible,
        beside,
        above_or_below,
        diagonal,
    } = quarters;
    let parts = vec![visible, beside, above_or_below, diagonal];
    qbheat_kernels::arrange(parts, tables, table_of)
}

/// The weight of each position in the loss, `[N, rows·columns]`: `visible_weight` in each image's block of half the rows
/// and half the columns, 1 elsewhere.
pub fn weights(
    corners: &[Corner],
    [rows, columns]: [usize; 2],
    visible_weight: f32,
    device: &Device,
) -> Tensor<2> {
    let mut values = Vec::with_capacity(corners.len() * rows * columns);
    for corner in corners {
        let (block_rows, block_columns) = (
            corner.row..corner.row + rows / 2,
            corner.column..corner.column + columns / 2,
        );
        for y in 0..rows {
            for x in 0..columns {
                let inside = block_rows.contains(&y) && block_columns.contains(&x);
                values.push(if inside { visible_weight } else { 1.0 });
            }
        }
    }
    let shape = [corners.len(), rows * columns];
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One image, one channel; pixel values are their own index.
    fn counting(side: usize, device: &Device) -> Tensor<4> {
        let values: Vec<f32> = (0..side * side).map(|v| v as f32).collect();
        Tensor::from_data(TensorData::new(values, [1, 1, side, side]), device)
    }

    #[test]
    fn cropping_and_assembling_are_inverse() {
        let device = Device::flex();
        let image = counting(4, &device);
        let whole: Vec<f32> = image.to_data().try_into_vec().unwrap();
        for visible in Quadrant::ALL {
            let quarter = |right: bool, lower: bool| {
                let quadrant = Quadrant::ALL
                    .into_iter()
                    .find(|q| q.is_right() == right && q.is_lower() == lower)
                    .unwrap();
                visible_quarters(&image, &all_show(quadrant, 1)).reshape([1, 4, 1])
            };
            let (right, lower) = (visible.is_right(), visible.is_lower());
            let quarters = Quarters {
                visible: quarter(right, lower),
                beside: quarter(!right, lower),
                above_or_below: quarter(right, !lower),
                diagonal: quarter(!right, !lower),
            };
            let map = assemble(quarters, &all_show(visible, 1), [2, 2]);
            assert_eq!(map.into_data().try_into_vec::<f32>().unwrap(), whole);
        }
    }

    #[test]
    fn weights_are_zero_exactly_on_the_visible_block() {
        let upper_right = Corner { row: 0, column: 2 };
        let values = weights(&[upper_right], [2, 4], 0.0, &Device::flex());
        assert_eq!(
            values.into_data().try_into_vec::<f32>().unwrap(),
            [1., 1., 0., 0., 1., 1., 1., 1.]
        );
    }

    #[test]
    fn sorting_keeps_the_order_within_a_quadrant() {
        use Quadrant::*;
        let device = Device::flex();
        let images = Tensor::<4>::from_data(
            TensorData::new(vec![0f32, 1., 2., 3., 4.], [5, 1, 1, 1]),
            &device,
        );
        let (sorted, sizes, order) = sort_by_quadrant(
            images,
            &[BottomRight, TopLeft, BottomRight, TopRight, TopLeft],
        );
        assert_eq!(order, [1, 4, 3, 0, 2]);
        assert_eq!(sizes, [2, 1, 0, 2]);
        assert_eq!(
            sorted.into_data().try_into_vec::<f32>().unwrap(),
            [1., 4., 3., 0., 2.]
        );
    }
}
