//! The detector's head, its matching and its loss: against PyTorch and SciPy (`tools/make_detection_fixtures.py`), and
//! what must hold of them whatever the weights.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use qbheat::data::ImageSize;
use qbheat::detect::{
    Answers, DenoisingConfig, DetectionHead, Group, HeadConfig, Level, LossConfig, Noised,
    Placement, ViewBox, detections, focal, losses, noised, overlaps,
};
use qbheat::nn::{StateDict, multiply_adds};
use qbheat::random::{Purpose, stream};
use qbheat::train::{
    AdamW, AdamWConfig, LearningRate, Schedule, Stop, TrainState, give_up, settled, train,
};

use crate::support::{
    BACKWARD, FORWARD, assert_close, difference, fixture, gradients, init, tensor, values, wave,
};

fn fixtures() -> StateDict {
    fixture("detection.safetensors")
}

fn placement(width: u32, height: u32, frame: [usize; 2]) -> Placement {
    let [height_of_frame, width_of_frame] = frame;
    let frame = ImageSize {
        height: height_of_frame,
        width: width_of_frame,
    };
    let placement = Placement::whole(width, height, frame);
    let content = placement.content;
    assert_eq!(
        [content.width, content.height],
        [width as usize, height as usize]
    );
    placement
}

/// `FRAME`, `CONTENTS`, `LEVELS` and the sizes of the script's head.
fn small_placements() -> Vec<Placement> {
    [[48, 33], [29, 40], [48, 34]]
        .map(|[width, height]| placement(width, height, [40, 48]))
        .to_vec()
}

fn small_maps() -> [Tensor<4>; 2] {
    [
        tensor(&wave(&[3, 10, 12, 5], 0.5, 1.0)),
        tensor(&wave(&[3, 5, 6, 7], 0.8, 1.0)),
    ]
}

fn small_head(fixtures: &StateDict) -> DetectionHead {
    let config = HeadConfig {
        width: 16,
        heads: 2,
        encoder_layers: 1,
        decoder_layers: 2,
        queries: 6,
        feed_forward: 12,
    };
    let levels = [(5, 4), (7, 8)].map(|(channels, stride)| Level { channels, stride });
    let head = DetectionHead::new(&config, &levels, 3, &mut init());
    fixtures.under("weights/").load_into(head).unwrap()
}

/// A table's rows by the image that stands in front of each.
fn by_image<T>(fixtures: &StateDict, name: &str, row: impl Fn(&[f32]) -> T) -> Vec<Vec<T>> {
    let table = &fixtures.0[name];
    let mut images = vec![Vec::new(), Vec::new(), Vec::new()];
    for entries in table.values.chunks_exact(table.shape[1]) {
        images[entries[0] as usize].push(row(&entries[1..]));
    }
    images
}

fn small_objects(fixtures: &StateDict) -> Vec<Vec<ViewBox>> {
    by_image(fixtures, "objects", |row| ViewBox {
        class: row[0] as usize,
        bbox: row[1..].try_into().unwrap(),
    })
}

fn small_noised(fixtures: &StateDict) -> Vec<Vec<Noised>> {
    by_image(fixtures, "noised", |row| Noised {
        group: row[0] as usize,
        object: row[1] as usize,
        class: row[2] as usize,
        bbox: row[3..].try_into().unwrap(),
    })
}

#[test]
fn overlaps_and_focal_loss_equal_pytorch() {
    let fixtures = fixtures();
    let [a, b] = ["a", "b"].map(|name| tensor::<2>(&fixtures.0[&format!("overlaps/{name}")]));
    let a = a.require_grad();
    let found = overlaps(a.clone(), b);
    for (name, tensor) in [("iou", &found.iou), ("generalised", &found.generalised)] {
        let name = format!("overlaps/{name}");
        assert_close(&fixtures, &name, &values(tensor.clone()), FORWARD);
    }
    let weights = |phase| tensor::<1>(&wave(&[7], phase, 1.0));
    let loss = (found.iou * weights(1.0) + found.generalised * weights(2.0)).sum();
    let gradient = values(a.grad(&loss.backward()).unwrap());
    assert_close(&fixtures, "overlaps/gradient/a", &gradient, BACKWARD);

    let logits = tensor::<2>(&wave(&[6, 4], 0.3, 3.0)).require_grad();
    let loss = focal(logits.clone(), tensor(&fixtures.0["focal/truth"]));
    assert_close(&fixtures, "focal/output", &values(loss.clone()), FORWARD);
    let gradient = values(logits.grad(&loss.backward()).unwrap());
    assert_close(&fixtures, "focal/gradient/logits", &gradient, BACKWARD);
}

fn assert_answers(fixtures: &StateDict, name: &str, group: &Group, answers: &Answers) {
    for (sample, image) in group.images.iter().enumerate() {
        for (kind, all) in [("logits", &answers.logits), ("boxes", &answers.boxes)] {
            let name = format!("{name}/{image}/{kind}");
            let expected = &fixtures.0[&name];
            let own = all.clone().slice_dim(0, sample..sample + 1);
            let found = values(own.slice_dim(1, 0..expected.shape[0]));
            assert_close(fixtures, &name, &found, FORWARD);
        }
    }
}

fn assert_head(case: &str, noised: &[Vec<Noised>]) {
    let fixtures = fixtures();
    let head = small_head(&fixtures);
    let maps = small_maps().map(|map| map.require_grad());
    let spoilt = (!noised.is_empty()).then_some(noised);
    let groups = head.forward(&maps, &small_placements(), spoilt);
    let images: Vec<&[usize]> = groups.iter().map(|group| &group.images[..]).collect();
    assert_eq!(images, [&[0, 2][..], &[1]]);
    for group in &groups {
        let positions = group.proposals.logits.dims()[1];
        let expected = &fixtures.0[&format!("{case}/proposals/{}/logits", group.images[0])];
        assert_eq!(positions, expected.shape[0]);
        assert_answers(
            &fixtures,
            &format!("{case}/proposals"),
            group,
            &group.proposals,
        );
        for (i, answers) in group.layers.iter().enumerate() {
            assert_answers(&fixtures, &format!("{case}/layer{i}"), group, answers);
        }
        for (i, answers) in group.denoised.iter().enumerate() {
            assert_answers(&fixtures, &format!("{case}/denoised{i}"), group, answers);
        }
    }
    let denoised: Vec<usize> = groups.iter().map(|group| group.denoised.len()).collect();
    assert_eq!(denoised, if noised.is_empty() { [0, 0] } else { [2, 0] });

    let objects = small_objects(&fixtures);
    let found = losses(&groups, &objects, noised, &LossConfig::default());
    let total = values(found.total.clone());
    assert_close(&fixtures, &format!("{case}/total"), &total, FORWARD);
    let terms = found.figures.terms;
    let terms = [
        terms.class,
        terms.l1,
        terms.giou,
        terms.earlier,
        terms.proposals,
        terms.denoising,
    ]
    .map(|term| term as f32);
    assert_close(&fixtures, &format!("{case}/terms"), &terms, FORWARD);
    assert_eq!([found.figures.matched, found.figures.objects], [5, 5]);
    assert!(found.figures.iou() > 0.0 && found.figures.iou() < 1.0);

    let gradients_found = found.total.backward();
    for (i, map) in maps.iter().enumerate() {
        let gradient = values(map.grad(&gradients_found).unwrap());
        assert_close(&fixtures, &format!("{case}/input{i}"), &gradient, BACKWARD);
    }
    let found = gradients(&head, &gradients_found);
    let expected = fixtures.under(&format!("{case}/gradient/"));
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.0.keys().collect::<Vec<_>>()
    );
    let largest = found
        .values()
        .flatten()
        .fold(0f32, |largest, v| largest.max(v.abs()));
    for (name, found) in found {
        let off = found
            .iter()
            .zip(&expected.0[&name].values)
            .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(
            off <= BACKWARD * largest,
            "{case}: gradient of {name} off by {off:e} of {largest}"
        );
    }
}

#[test]
fn a_small_head_equals_pytorch_padding_included() {
    assert_head("head", &[]);
}

#[test]
fn a_small_head_with_denoising_equals_pytorch() {
    assert_head("denoising", &small_noised(&fixtures()));
}

/// All answers of all groups, with a name each.
fn all_answers(groups: &[Group]) -> Vec<(String, Vec<f32>)> {
    let named = |group: &Group| {
        let layers = group.layers.iter().enumerate();
        std::iter::once(("proposals".to_owned(), group.proposals.clone()))
            .chain(layers.map(|(i, answers)| (format!("layer {i}"), answers.clone())))
            .map(|(name, answers)| {
                let mut all = values(answers.logits);
                all.extend(values(answers.boxes));
                (format!("{:?} {name}", group.images), all)
            })
            .collect::<Vec<_>>()
    };
    groups.iter().flat_map(named).collect()
}

fn assert_alike(a: &[Group], b: &[Group], tolerance: f32) {
    for ((name, a), (_, b)) in all_answers(a).into_iter().zip(all_answers(b)) {
        let off = difference(&a, &b);
        assert!(off <= tolerance, "{name}: off by {off:e}");
    }
}

#[test]
fn what_is_in_the_padding_changes_nothing() {
    let head = small_head(&fixtures());
    let placements = small_placements();
    let maps = small_maps();
    let as_is = head.forward(&maps, &placements, None);
    let spoilt = [4, 8].into_iter().zip(maps).map(|(stride, map)| {
        let [n, rows, columns, channels] = map.dims();
        let mut numbers = values(map);
        for (image, placement) in placements.iter().enumerate() {
            let content = placement.content;
            for row in 0..rows {
                for column in 0..columns {
                    if row * stride >= content.height || column * stride >= content.width {
                        let start = ((image * rows + row) * columns + column) * channels;
                        numbers[start..start + channels].fill(f32::NAN);
                    }
                }
            }
        }
        let data = TensorData::new(numbers, [n, rows, columns, channels]);
        Tensor::from_data(data, &qbheat::device().autodiff())
    });
    let spoilt: Vec<Tensor<4>> = spoilt.collect();
    let found = head.forward(&spoilt, &placements, None);
    assert_eq!(all_answers(&found), all_answers(&as_is));
}

#[test]
fn an_image_has_the_same_answers_alone_and_in_company() {
    let head = small_head(&fixtures());
    let placements = small_placements();
    let maps = small_maps();
    let found = detections(&head.forward(&maps, &placements, None), 10);
    for image in 0..3 {
        let maps = maps.clone().map(|map| map.slice_dim(0, image..image + 1));
        let alone = head.forward(&maps, &placements[image..=image], None);
        let alone = &detections(&alone, 10)[0];
        assert_eq!(alone.len(), 10);
        for (alone, found) in alone.iter().zip(&found[image]) {
            assert_eq!(alone.class, found.class);
            assert!((alone.score - found.score).abs() < 1e-5);
            assert!(difference(&alone.bbox, &found.bbox) < 1e-4);
        }
    }
}

#[test]
fn denoising_queries_are_seen_by_their_own_group_only() {
    let fixtures = fixtures();
    let head = small_head(&fixtures);
    let (maps, placements) = (small_maps(), small_placements());
    let noised = small_noised(&fixtures);
    let as_is = head.forward(&maps, &placements, Some(&noised));
    // The queries that find boxes see none of them; they only take another way to the same sums.
    assert_alike(&head.forward(&maps, &placements, None), &as_is, 1e-4);

    let mut changed = noised.clone();
    changed[0][3].bbox = [0.2, 0.8, 0.1, 0.1];
    changed[0][3].class = 0;
    let found = head.forward(&maps, &placements, Some(&changed));
    assert_alike(&found, &as_is, 1e-6);
    let boxes = |groups: &[Group], group: usize| {
        let last = groups[0].denoised.last().unwrap().boxes.clone();
        values(last.slice([0..1, 2 * group..2 * group + 1, 0..4]))
    };
    assert!(difference(&boxes(&found, 0), &boxes(&as_is, 0)) < 1e-6);
    assert!(difference(&boxes(&found, 1), &boxes(&as_is, 1)) > 1e-4);
}

fn default_head(levels: &[Level], classes: usize) -> DetectionHead {
    DetectionHead::new(&HeadConfig::default(), levels, classes, &mut init())
}

const TINY: Level = Level {
    channels: 192,
    stride: 8,
};

#[test]
fn the_default_head_is_small_and_usable_on_a_processor() {
    let three = [8, 16, 32].map(|stride| Level {
        channels: 512,
        stride,
    });
    let parameters = StateDict::of(&default_head(&three, 80)).parameters();
    assert!(parameters < 3_000_000, "{parameters}");

    let head = default_head(&[TINY], 3).valid();
    let maps = [Tensor::<4>::zeros([1, 32, 32, 192], &qbheat::device())];
    let cost = |height| {
        let placements = [placement(256, height, [256, 256])];
        multiply_adds(|| {
            head.forward(&maps, &placements, None);
        })
    };
    let (whole, cut) = (cost(256), cost(192));
    assert!(cut < 650_000_000 && cut < whole, "{cut} {whole}");
}

#[test]
fn a_fresh_head_says_nothing_is_there_and_proposes_squares_around_positions() {
    let head = default_head(&[TINY], 3);
    let maps = [tensor(&wave(&[2, 8, 8, 192], 0.3, 1.0))];
    let placements = vec![placement(64, 64, [64, 64]); 2];
    let groups = head.forward(&maps, &placements, None);
    let [group] = &groups[..] else {
        panic!("one group of {}", groups.len())
    };
    let proposals = values(group.proposals.boxes.clone());
    for (place, bbox) in proposals.as_chunks::<4>().0.iter().enumerate() {
        let (row, column) = (place / 8 % 8, place % 8);
        let expected = [
            (column as f32 + 0.5) / 8.0,
            (row as f32 + 0.5) / 8.0,
            0.5,
            0.5,
        ];
        assert!(difference(bbox, &expected) < 1e-5, "{place}: {bbox:?}");
    }
    // 64 positions are fewer than 100 queries: each is one.
    let mut order = values(group.layers[2].boxes.clone().slice([0..1, 0..64, 0..4]))
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&[x, y, ..]| ((8.0 * y) as usize, (8.0 * x) as usize))
        .collect::<Vec<_>>();
    order.sort_unstable();
    let all: Vec<(usize, usize)> = (0..64).map(|place| (place / 8, place % 8)).collect();
    assert_eq!(order, all);
    for found in detections(&groups, 5) {
        assert_eq!(found.len(), 5);
        assert!(found.iter().all(|found| found.score < 0.2));
    }
}

#[test]
fn predictions_that_are_not_finite_make_the_loss_nan_and_nothing_panics() {
    let fixtures = fixtures();
    let head = small_head(&fixtures);
    let maps = small_maps().map(|map| map * f32::NAN);
    let noised = small_noised(&fixtures);
    let groups = head.forward(&maps, &small_placements(), Some(&noised));
    let objects = small_objects(&fixtures);
    let found = losses(&groups, &objects, &noised, &LossConfig::default());
    assert!(values(found.total.clone())[0].is_nan());
    assert_eq!((found.figures.matched, found.figures.iou()), (0, 0.0));
    found.total.backward();
    assert_eq!(detections(&groups, 7).len(), 3);
}

#[test]
fn batches_without_boxes_and_with_more_boxes_than_queries_have_a_loss() {
    let head = small_head(&fixtures());
    let maps = small_maps();
    let many: Vec<ViewBox> = (0..300)
        .map(|i| ViewBox {
            class: i % 3,
            bbox: [0.1 + 0.8 * (i as f32 / 300.0), 0.5, 0.05, 0.1],
        })
        .collect();
    for (objects, matched) in [
        (vec![Vec::new(); 3], 0),
        (vec![many.clone(), Vec::new(), many[..2].to_vec()], 8),
    ] {
        let config = DenoisingConfig::default();
        let noised: Vec<Vec<Noised>> = objects
            .iter()
            .map(|objects| noised(objects, 3, &config, &mut stream(0, Purpose::Sample, 0, 0)))
            .collect();
        let groups = head.forward(&maps, &small_placements(), Some(&noised));
        let found = losses(&groups, &objects, &noised, &LossConfig::default());
        assert!(values(found.total.clone())[0].is_finite());
        assert_eq!(found.figures.matched, matched);
        let gradients = gradients(&head, &found.total.backward());
        assert!(gradients.values().flatten().all(|v| v.is_finite()));
    }
}

#[test]
fn a_hundred_steps_teach_a_small_head_three_boxes() {
    let config = HeadConfig {
        width: 32,
        decoder_layers: 2,
        queries: 10,
        feed_forward: 64,
        ..HeadConfig::default()
    };
    let level = Level {
        channels: 8,
        stride: 8,
    };
    let maps = [tensor(&wave(&[2, 8, 8, 8], 0.5, 1.0))];
    let placements = [[64, 64], [64, 48]].map(|[width, height]| placement(width, height, [64; 2]));
    let object = |class, bbox| ViewBox { class, bbox };
    let objects = [
        vec![
            object(0, [0.3, 0.4, 0.25, 0.3]),
            object(1, [0.7, 0.6, 0.4, 0.2]),
        ],
        vec![object(1, [0.5, 0.3, 0.3, 0.45])],
    ];
    let denoising = DenoisingConfig::default();
    let spoilt = |step: u64| -> Vec<Vec<Noised>> {
        (0..)
            .zip(&objects)
            .map(|(image, objects)| {
                let mut random = stream(0, Purpose::Sample, step, image);
                noised(objects, 2, &denoising, &mut random)
            })
            .collect()
    };
    let state = TrainState {
        model: DetectionHead::new(&config, &[level], 2, &mut init()),
        optimizer: AdamW::new(AdamWConfig {
            betas: [0.9, 0.999],
            weight_decay: 0.0,
            clip_norm: 0.0,
            encoder_rate: 1.0,
        }),
        step: 0,
    };
    let rate = LearningRate {
        peak: 3e-3,
        warmup_steps: 1,
        total_steps: 100,
        schedule: Schedule::Constant,
    };
    let mut step = 0;
    let weights = LossConfig::default();
    let state = train(
        state,
        &rate,
        || {
            step += 1;
            Ok(spoilt(step))
        },
        |head: &DetectionHead, spoilt: Vec<Vec<Noised>>| {
            let groups = head.forward(&maps, &placements, Some(&spoilt));
            losses(&groups, &objects, &spoilt, &weights).total
        },
        settled,
        give_up,
        |_, _| Ok(Stop::No),
    )
    .unwrap();
    let groups = state.model.forward(&maps, &placements, None);
    let found = losses(&groups, &objects, &[], &weights);
    assert!(found.figures.iou() > 0.7, "{}", found.figures.iou());
    let found = detections(&groups, 10);
    for (objects, found) in objects.iter().zip(&found) {
        let best: Vec<usize> = found[..objects.len()].iter().map(|d| d.class).collect();
        for object in objects {
            assert!(best.contains(&object.class), "{best:?}");
        }
    }
}

#[test]
fn sizes_that_do_not_fit_name_their_key() {
    let default = HeadConfig::default;
    for (config, key) in [
        (
            HeadConfig {
                width: 126,
                ..default()
            },
            "head.width",
        ),
        (
            HeadConfig {
                width: 16,
                ..default()
            },
            "head.width",
        ),
        (
            HeadConfig {
                heads: 0,
                ..default()
            },
            "head.heads",
        ),
        (
            HeadConfig {
                queries: 0,
                ..default()
            },
            "head.queries",
        ),
    ] {
        let text = config.check("head").unwrap_err().to_string();
        assert!(text.contains(key), "{text}");
    }
    default().check("head").unwrap();
}
