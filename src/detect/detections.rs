//! What a head's answers say is there.

use super::boxes::overlap;
use super::head::Group;
use crate::nn::values;

/// Something that was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    /// How certain, 0 to 1.
    pub score: f32,
    /// Number of its class.
    pub class: usize,
    /// `[centre x, centre y, width, height]` as shares of the frame's sides.
    pub bbox: [f32; 4],
}

/// The `limit` most certain detections of each image of a batch, most certain first: pairs of a query of the last layer
/// and a class, as Deformable DETR (arXiv 2010.04159) takes them, so that one box may come up with several classes.
pub fn detections(groups: &[Group], limit: usize) -> Vec<Vec<Detection>> {
    let images: usize = groups.iter().map(|group| group.images.len()).sum();
    let mut found = vec![Vec::new(); images];
    for group in groups {
        let Some(last) = group.layers.last() else {
            continue;
        };
        let [_, queries, classes] = last.logits.dims();
        let (logits, boxes) = (values(last.logits.clone()), values(last.boxes.clone()));
        let samples = logits
            .chunks_exact(queries * classes)
            .zip(boxes.as_chunks::<4>().0.chunks_exact(queries));
        for (&image, (logits, boxes)) in group.images.iter().zip(samples) {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order.truncate(limit);
            found[image] = order
                .into_iter()
                .map(|place| Detection {
                    score: 1.0 / (1.0 + (-logits[place]).exp()),
                    class: place % classes,
                    bbox: boxes[place / classes],
                })
                .collect();
        }
    }
    found
}

/// Greedy suppression class by class: a detection goes where one of its class with a higher score overlaps it by an IoU
/// above `most`. A set of predictions needs none once it is trained; in early epochs it may have duplicates.
pub fn suppress(mut detections: Vec<Detection>, most: f64) -> Vec<Detection> {
    detections.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut kept: Vec<Detection> = Vec::with_capacity(detections.len());
    for detection in detections {
        let bbox = detection.bbox.map(f64::from);
        let is_known = kept.iter().any(|other| {
            other.class == detection.class && overlap(other.bbox.map(f64::from), bbox).iou > most
        });
        if !is_known {
            kept.push(detection);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::detect::head::Answers;

    #[test]
    fn the_most_certain_pairs_of_query_and_class_come_back_to_their_images() {
        let device = crate::device();
        let answers = |logits: [[f32; 2]; 2], x: f32| Answers {
            logits: Tensor::from_data([logits], &device),
            boxes: Tensor::from_data([[[x, 0.5, 0.1, 0.1], [x, 0.5, 0.2, 0.2]]], &device),
        };
        let group = |image: usize, logits, x| Group {
            images: vec![image],
            proposals: answers(logits, x),
            layers: vec![answers([[9.0; 2]; 2], 0.0), answers(logits, x)],
            denoised: Vec::new(),
        };
        let groups = [
            group(1, [[0.0, -1.0], [2.0, 1.0]], 0.3),
            group(0, [[-3.0, 0.0], [-2.0, -2.5]], 0.7),
        ];
        let found = detections(&groups, 3);
        let kinds = |image: usize| -> Vec<(usize, f32)> {
            found[image].iter().map(|d| (d.class, d.bbox[2])).collect()
        };
        assert_eq!(kinds(0), [(1, 0.1), (0, 0.2), (1, 0.2)]);
        assert_eq!(kinds(1), [(0, 0.2), (1, 0.2), (0, 0.1)]);
        assert_eq!(found[0][0].score, 0.5);
        assert_eq!(found[1][0].bbox[0], 0.3);
        assert_eq!(detections(&groups, 1)[0].len(), 1);
    }

    #[test]
    fn suppression_leaves_the_best_of_each_class_and_place() {
        let detection = |score, class, x| Detection {
            score,
            class,
            bbox: [x, 0.5, 0.2, 0.2],
        };
        let all = vec![
            detection(0.4, 0, 0.51),
            detection(0.9, 0, 0.5),
            detection(0.8, 1, 0.5),
            detection(0.3, 0, 0.7),
        ];
        let kept = suppress(all.clone(), 0.5);
        assert_eq!(kept, [all[1], all[2], all[3]]);
        assert_eq!(suppress(all, 1.0).len(), 4);
    }
}
