//! Boxes `[centre x, centre y, width, height]`, as shares of a frame's sides, and how far two of them overlap.

use burn::tensor::Tensor;

/// Left, top, right and bottom of a box.
pub fn corners([x, y, width, height]: [f64; 4]) -> [f64; 4] {
    let (across, down) = (width / 2.0, height / 2.0);
    [x - across, y - down, x + across, y + down]
}

/// The box with these corners.
pub fn from_corners([left, top, right, bottom]: [f64; 4]) -> [f64; 4] {
    [
        (left + right) / 2.0,
        (top + bottom) / 2.0,
        right - left,
        bottom - top,
    ]
}

/// How far two boxes, or rows of them, overlap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlap<T> {
    /// Intersection over union, 0 to 1.
    pub iou: T,
    /// That minus the share of the smallest box around both that neither covers, −1 to 1 (Rezatofighi et al., arXiv
    /// 1902.09630): it has a slope where the boxes are apart, too.
    pub generalised: T,
}

/// Of two boxes, one of them at least of an area above 0.
pub fn overlap(a: [f64; 4], b: [f64; 4]) -> Overlap<f64> {
    let (a, b) = (corners(a), corners(b));
    let area = |[left, top, right, bottom]: [f64; 4]| (right - left) * (bottom - top);
    let between = |low: fn(f64, f64) -> f64, high: fn(f64, f64) -> f64| {
        [
            low(a[0], b[0]),
            low(a[1], b[1]),
            high(a[2], b[2]),
            high(a[3], b[3]),
        ]
    };
    let inner = between(f64::max, f64::min);
    let outer = between(f64::min, f64::max);
    let apart = inner[0] > inner[2] || inner[1] > inner[3];
    let both = if apart { 0.0 } else { area(inner) };
    let union = area(a) + area(b) - both;
    let iou = both / union;
    let hull = area(outer);
    Overlap {
        iou,
        generalised: iou - (hull - union) / hull,
    }
}

/// Row by row, differentiably: a and b `[M, 4]` to `[M]` each, one box of each pair at least of an area above 0.
pub fn overlaps(a: Tensor<2>, b: Tensor<2>) -> Overlap<Tensor<1>> {
    let rows = a.dims()[0];
    let (a, b) = (Corners::of(a), Corners::of(b));
    let inner = Corners {
        low: a.low.clone().max_pair(b.low.clone()),
        high: a.high.clone().min_pair(b.high.clone()),
    };
    let outer = Corners {
        low: a.low.clone().min_pair(b.low.clone()),
        high: a.high.clone().max_pair(b.high.clone()),
    };
    let both = inner.area();
    let union = a.area() + b.area() - both.clone();
    let iou = both / union.clone();
    let hull = outer.area();
    let generalised = iou.clone() - (hull.clone() - union) / hull;
    Overlap {
        iou: iou.reshape([rows]),
        generalised: generalised.reshape([rows]),
    }
}

/// Upper left and lower right corners, `[M, 2]` each.
struct Corners {
    low: Tensor<2>,
    high: Tensor<2>,
}

impl Corners {
    fn of(boxes: Tensor<2>) -> Self {
        let centre = boxes.clone().slice_dim(1, 0..2);
        let half = boxes.slice_dim(1, 2..4) * 0.5;
        Self {
            low: centre.clone() - half.clone(),
            high: centre + half,
        }
    }

    /// `[M, 1]`; 0 where the lower right corner is not below and to the right of the other.
    fn area(self) -> Tensor<2> {
        let sides = (self.high - self.low).clamp_min(0.0);
        sides.clone().slice_dim(1, 0..1) * sides.slice_dim(1, 1..2)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::nn::values;

    /// Pairs of boxes by their corners, IoU and generalised IoU, reckoned by hand.
    const PAIRS: [([f64; 4], [f64; 4], f64, f64); 5] = [
        // The same.
        ([0.1, 0.2, 0.5, 0.4], [0.1, 0.2, 0.5, 0.4], 1.0, 1.0),
        // A quarter of each in common: 1/7; of the hull of 9 quarters, 2 are bare.
        (
            [0.0, 0.0, 0.4, 0.4],
            [0.2, 0.2, 0.6, 0.6],
            1.0 / 7.0,
            1.0 / 7.0 - 2.0 / 9.0,
        ),
        // One in the other.
        ([0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75], 0.25, 0.25),
        // Side by side with an equal gap.
        ([0.0, 0.0, 0.2, 0.2], [0.4, 0.0, 0.6, 0.2], 0.0, -1.0 / 3.0),
        // Apart along both axes: 2 of 9 parts covered.
        ([0.0, 0.0, 0.1, 0.1], [0.2, 0.2, 0.3, 0.3], 0.0, -7.0 / 9.0),
    ];

    #[test]
    fn overlaps_have_their_closed_forms() {
        for (a, b, iou, generalised) in PAIRS {
            for (a, b) in [(a, b), (b, a)] {
                let found = overlap(from_corners(a), from_corners(b));
                assert!((found.iou - iou).abs() < 1e-12, "{a:?} {b:?}: {found:?}");
                assert!(
                    (found.generalised - generalised).abs() < 1e-12,
                    "{a:?} {b:?}: {found:?}"
                );
            }
        }
    }

    #[test]
    fn rows_of_tensors_overlap_as_single_boxes_do() {
        let rows = |side: usize| {
            let boxes = PAIRS.map(|pair| from_corners([pair.0, pair.1][side]).map(|v| v as f32));
            let data = TensorData::new(boxes.concat(), [PAIRS.len(), 4]);
            Tensor::<2>::from_data(data, &crate::device())
        };
        let found = overlaps(rows(0), rows(1));
        let (iou, generalised) = (values(found.iou), values(found.generalised));
        for (i, pair) in PAIRS.iter().enumerate() {
            assert!((f64::from(iou[i]) - pair.2).abs() < 1e-5);
            assert!((f64::from(generalised[i]) - pair.3).abs() < 1e-5);
        }
    }

    #[test]
    fn corners_and_back_is_the_same_box() {
        let bbox = [0.4, 0.6, 0.2, 0.5];
        let back = from_corners(corners(bbox));
        assert!(bbox.iter().zip(back).all(|(a, b)| (a - b).abs() < 1e-15));
        assert_eq!(corners([0.5, 0.5, 1.0, 0.5]), [0.0, 0.25, 1.0, 0.75]);
    }
}
