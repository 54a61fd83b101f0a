//! Denoising queries (Li et al., "DN-DETR", arXiv 2203.01305): true boxes, moved and misnamed, that a head learns to
//! put right while it trains. Which query answers for which box is known there, so that layers learn to refine a box
//! before the matching has settled.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::view::ViewBox;
use crate::config::require;
use crate::error::Result;
use crate::random::shuffled;

/// How true boxes are spoilt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DenoisingConfig {
    /// Copies of an image's boxes, each spoilt in another way; 0 leaves denoising out.
    pub groups: usize,
    /// Most of these queries an image: with many boxes there are fewer groups, with more than this a part of the boxes
    /// in one.
    pub queries: usize,
    /// Share of them whose class is drawn anew.
    pub label_noise: f64,
    /// How far a centre moves at most, as a share of half the box's side, and by what share a side grows or shrinks.
    pub box_noise: f64,
}

impl Default for DenoisingConfig {
    /// The paper's.
    fn default() -> Self {
        Self {
            groups: 5,
            queries: 100,
            label_noise: 0.2,
            box_noise: 0.4,
        }
    }
}

impl DenoisingConfig {
    /// Whether every value is usable; `section` is where its keys are.
    pub fn check(&self, section: &str) -> Result<()> {
        require(
            self.queries > 0,
            &format!("{section}.queries"),
            self.queries,
            "at least 1; groups = 0 turns denoising off",
        )?;
        require(
            (0.0..=1.0).contains(&self.label_noise),
            &format!("{section}.label_noise"),
            self.label_noise,
            "a share from 0 to 1",
        )?;
        require(
            (0.0..1.0).contains(&self.box_noise),
            &format!("{section}.box_noise"),
            self.box_noise,
            "a share from 0 to below 1",
        )
    }
}

/// A spoilt copy of a true box.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noised {
    /// Which copy of the boxes it belongs to; queries of different groups do not see each other.
    pub group: usize,
    /// The true one, by its place in the list of what is to be found.
    pub object: usize,
    /// Its class, perhaps a wrong one.
    pub class: usize,
    /// `[centre x, centre y, width, height]`, not quite its own.
    pub bbox: [f32; 4],
}

/// Spoilt copies of one image's boxes, drawn from `random`; group by group, at most `config.queries`.
pub fn noised(
    objects: &[ViewBox],
    classes: usize,
    config: &DenoisingConfig,
    random: &mut ChaCha8Rng,
) -> Vec<Noised> {
    let mut chosen: Vec<usize> = (0..objects.len()).collect();
    if objects.len() > config.queries {
        chosen = shuffled(objects.len(), random);
        chosen.truncate(config.queries);
    }
    let fitting = config.queries / chosen.len().max(1);
    let mut queries = Vec::with_capacity(config.groups.min(fitting) * chosen.len());
    for group in 0..config.groups.min(fitting) {
        queries.extend(chosen.iter().map(|&object| {
            let ViewBox { mut class, bbox } = objects[object];
            if random.random_bool(config.label_noise) {
                class = random.random_range(0..classes);
            }
            Noised {
                group,
                object,
                class,
                bbox: moved(bbox, config.box_noise as f32, random),
            }
        }));
    }
    queries
}

/// The centre moved by up to `noise` of half the sides, the sides longer or shorter by up to that share.
fn moved([x, y, width, height]: [f32; 4], noise: f32, random: &mut ChaCha8Rng) -> [f32; 4] {
    let mut by = || noise * random.random_range(-1.0..=1.0);
    [
        (x + by() * width / 2.0).clamp(0.0, 1.0),
        (y + by() * height / 2.0).clamp(0.0, 1.0),
        (width * (1.0 + by())).min(1.0),
        (height * (1.0 + by())).min(1.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    fn objects(count: usize) -> Vec<ViewBox> {
        (0..count)
            .map(|i| ViewBox {
                class: i % 3,
                bbox: [
                    0.2 + 0.6 * i as f32 / count as f32,
                    0.5,
                    0.1,
                    0.2 + 0.01 * (i % 7) as f32,
                ],
            })
            .collect()
    }

    #[test]
    fn copies_stay_within_their_number_their_noise_and_their_group() {
        let config = DenoisingConfig::default();
        for (count, groups, drawn) in [(0, 0, 0), (3, 5, 15), (30, 3, 90), (250, 1, 100)] {
            let objects = objects(count);
            let mut random = stream(0, Purpose::Sample, 0, count as u64);
            let found = noised(&objects, 3, &config, &mut random);
            assert_eq!(found.len(), drawn);
            let mut pairs: Vec<(usize, usize)> =
                found.iter().map(|n| (n.group, n.object)).collect();
            assert!(pairs.iter().all(|&(group, _)| group < groups));
            pairs.sort_unstable();
            pairs.dedup();
            assert_eq!(pairs.len(), drawn);
            for Noised { object, bbox, .. } in found {
                let truth = objects[object].bbox;
                for axis in 0..2 {
                    let side = truth[2 + axis];
                    assert!((bbox[axis] - truth[axis]).abs() <= 0.2 * side + 1e-6);
                    assert!((bbox[2 + axis] / side - 1.0).abs() <= 0.4 + 1e-5);
                }
            }
        }
    }

    #[test]
    fn labels_are_drawn_anew_as_often_as_asked_for() {
        let objects = objects(100);
        let wrong = |label_noise| {
            let config = DenoisingConfig {
                label_noise,
                ..DenoisingConfig::default()
            };
            (0..20)
                .flat_map(|i| noised(&objects, 3, &config, &mut stream(i, Purpose::Sample, 0, 0)))
                .filter(|noised| noised.class != objects[noised.object].class)
                .count()
        };
        assert_eq!(wrong(0.0), 0);
        // A third of those drawn are right again: 2,000 · 0.3 · 2/3.
        assert!((350..450).contains(&wrong(0.3)), "{}", wrong(0.3));
    }

    #[test]
    fn no_groups_means_no_queries() {
        let config = DenoisingConfig {
            groups: 0,
            ..DenoisingConfig::default()
        };
        let mut random = stream(0, Purpose::Sample, 0, 0);
        assert!(noised(&objects(4), 3, &config, &mut random).is_empty());
    }

    #[test]
    fn unusable_values_name_their_key() {
        let default = DenoisingConfig::default;
        for (config, key) in [
            (
                DenoisingConfig {
                    queries: 0,
                    ..default()
                },
                "denoising.queries",
            ),
            (
                DenoisingConfig {
                    label_noise: 1.5,
                    ..default()
                },
                "denoising.label_noise",
            ),
            (
                DenoisingConfig {
                    box_noise: 1.0,
                    ..default()
                },
                "denoising.box_noise",
            ),
        ] {
            let text = config.check("denoising").unwrap_err().to_string();
            assert!(text.contains(key), "{text}");
        }
        default().check("denoising").unwrap();
    }
}
