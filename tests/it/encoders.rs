//! Every encoder by name: published counts, shapes, gradients, files.

use burn::module::Module;
use burn::tensor::Tensor;
use qbheat::data::ImageSize;
use qbheat::encoder::{self, Build, Encoder, EncoderSpec};
use qbheat::nn::{Init, StateDict, use_batch_statistics};
use qbheat::train::{AdamW, AdamWConfig};

use crate::support::{difference, gradients, json, qbheat, tensor, values, wave};

fn build(spec: &EncoderSpec, stride: usize) -> Encoder {
    let build = Build { stride, inputs: 3 };
    spec.build(build, &mut Init::new(0, &qbheat::device().autodiff()))
        .unwrap()
}

fn image(height: usize, width: usize) -> Tensor<4> {
    tensor(&wave(&[2, 3, height, width], 0.5, 1.0))
}

/// Parameters in thousands and strict multiply-adds in 0.1 M, counted in PyTorch from the same tables; those of the
/// published networks with a head agree with their papers to the digit (see below).
const COUNTS: [(&str, usize, u64); 11] = [
    ("mf-26m", 1431, 210),
    ("mf-52m", 1626, 447),
    ("mf-96m", 2004, 845),
    ("mf-151m", 4908, 1384),
    ("mf-214m", 5728, 1968),
    ("mf-294m", 6580, 2706),
    ("mf-508m", 8429, 4755),
    ("mf-w720", 5779, 2774),
    ("mf-w1440", 14509, 9880),
    ("mf-w2880", 44394, 37288),
    ("mf-tiny", 420, 291),
];

#[test]
fn mobile_formers_have_the_counts_of_their_tables() {
    for (name, parameters, multiply_adds) in COUNTS {
        let spec = encoder::find(name).unwrap();
        let counts = spec
            .counts(spec.strides[0], ImageSize::square(spec.image_size))
            .unwrap();
        assert_eq!((counts.parameters + 500) / 1000, parameters, "{name}");
        assert_eq!(
            (counts.multiply_adds + 50_000) / 100_000,
            multiply_adds,
            "{name}"
        );
    }
    let tiny = encoder::find("mf-tiny").unwrap();
    assert_eq!(
        tiny.counts(4, ImageSize::square(32)).unwrap(),
        tiny.counts(8, ImageSize::square(64)).unwrap(),
        "stride 4 at 32 px is the same network at the same cost"
    );
}

#[test]
fn with_its_head_each_mobile_former_has_the_published_number_of_parameters() {
    // Parameters in 0.1 M (arXiv 2108.05895's code), the head's hidden width, groups of its 1×1 convolution.
    for (name, published, hidden, groups) in [
        ("mf-508m", 140, 1920, 1),
        ("mf-294m", 114, 1920, 1),
        ("mf-214m", 94, 1600, 1),
        ("mf-151m", 76, 1280, 1),
        ("mf-96m", 46, 1280, 1),
        ("mf-52m", 35, 1024, 1),
        ("mf-26m", 32, 1024, 4),
    ] {
        let spec = encoder::find(name).unwrap();
        let counts = spec.counts(32, ImageSize::square(32)).unwrap();
        let (c, d) = (counts.channels, spec.tokens);
        let linear = |inputs: usize, outputs: usize| inputs * outputs + outputs;
        let bridge = 2 * linear(d, c) + linear(c, d) + 2 * d;
        let convolution = 6 * c * c / groups + 12 * c;
        let classifier = linear(6 * c + d, hidden) + 2 * hidden + linear(hidden, 1000);
        let all = counts.parameters + bridge + convolution + classifier;
        assert_eq!((all + 50_000) / 100_000, published, "{name}: {all}");
    }
}

#[test]
fn mobilenet_v2_has_the_published_counts() {
    let counts = encoder::find("mobilenet-v2")
        .unwrap()
        .counts(32, ImageSize::square(224))
        .unwrap();
    // torchvision's mobilenet_v2, 3,504,872 with its classifier.
    assert_eq!(counts.parameters + 1280 * 1000 + 1000, 3_504_872);
    // arXiv 1801.04381, table 4: 300 M.
    let all = counts.multiply_adds + 1280 * 1000;
    assert_eq!((all + 5_000_000) / 10_000_000, 30, "{all}");
}

#[test]
fn resnets_have_the_published_counts() {
    // torchvision's resnet18 and resnet50 with their classifiers: parameters, 10⁹ multiply-adds.
    for (name, parameters, multiply_adds) in [
        ("resnet-18", 11_689_512, 1.81),
        ("resnet-50", 25_557_032, 4.09),
    ] {
        let counts = encoder::find(name)
            .unwrap()
            .counts(32, ImageSize::square(224))
            .unwrap();
        let classifier = (counts.channels + 1) * 1000;
        assert_eq!(counts.parameters + classifier, parameters, "{name}");
        let all = counts.multiply_adds as f64 + counts.channels as f64 * 1000.0;
        assert!(
            (all / 1e9 / multiply_adds - 1.0).abs() < 0.01,
            "{name}: {all}"
        );
    }
}

#[test]
fn every_encoder_maps_whole_images_quarters_and_odd_sizes_at_every_stride() {
    for spec in encoder::all() {
        for &stride in spec.strides {
            assert_eq!(spec.default_stride(8 * stride), stride, "{}", spec.name);
            let encoder = build(spec, stride).valid();
            // At most the 8×8 map of the method, so that small strides cost no more than large ones.
            let side = (8 * stride).min(64);
            for [height, width] in [
                [side, side],
                [side / 2, side / 2],
                [side + side / 2, side / 2],
                [side - 23, side + 6],
            ] {
                let map = encoder.forward(image(height, width).inner());
                assert_eq!(
                    map.dims(),
                    [
                        2,
                        encoder.channels(),
                        height.div_ceil(stride),
                        width.div_ceil(stride)
                    ],
                    "{} at stride {stride}",
                    spec.name
                );
                assert!(values(map).iter().all(|v| v.is_finite()), "{}", spec.name);
            }
        }
        assert!(spec.check_stride(3).is_err());
    }
}

#[test]
fn maps_of_finer_strides_have_the_published_channels_and_end_in_the_feature_map() {
    // C3, C4 and C5 of the papers' tables.
    let published = [
        ("resnet-18", [128, 256, 512]),
        ("resnet-50", [512, 1024, 2048]),
        ("mobilenet-v2", [32, 96, 1280]),
        ("mobilenet-v2-320", [32, 96, 320]),
    ];
    for spec in encoder::all() {
        let own = spec.strides[0];
        let finer: &[usize] = if own == 32 { &[8, 16] } else { &[4] };
        let encoder = build(spec, own).valid();
        let channels = encoder.map_channels(3, finer);
        if let Some((_, known)) = published.iter().find(|(name, _)| *name == spec.name) {
            assert_eq!(channels, known, "{}", spec.name);
        }
        let [height, width] = [2 * own + 1, 3 * own - 5];
        let image = image(height, width).inner();
        let maps = encoder.maps(image.clone(), finer);
        let strides = finer.iter().chain([&own]);
        for ((map, stride), channels) in maps.iter().zip(strides).zip(&channels) {
            let sides = [height.div_ceil(*stride), width.div_ceil(*stride)];
            assert_eq!(
                map.dims(),
                [2, sides[0], sides[1], *channels],
                "{}",
                spec.name
            );
        }
        assert_eq!(maps.len(), finer.len() + 1, "{}", spec.name);
        let last = values(maps.last().unwrap().clone());
        assert!(
            last == values(encoder.channels_last(image)),
            "{}",
            spec.name
        );
    }
}

#[test]
fn the_layer_before_the_end_of_mobilenet_v2_is_the_map_of_its_other_form() {
    let [whole, cut] = ["mobilenet-v2", "mobilenet-v2-320"].map(|name| {
        let spec = encoder::find(name).unwrap();
        build(spec, 32).valid()
    });
    let mut weights = StateDict::of(&whole);
    let names = StateDict::of(&cut).0;
    weights.0.retain(|name, _| names.contains_key(name));
    let cut = weights.load_into(cut).unwrap();
    let image = image(64, 96).inner();
    let found = whole.layer(image.clone(), 1).unwrap();
    assert!(values(found) == values(cut.forward(image.clone())));
    let map = whole.layer(image.clone(), 0).unwrap();
    assert!(values(map) == values(whole.forward(image.clone())));
    assert!(whole.layer(image, 99).is_err());
}

#[test]
fn every_parameter_of_every_encoder_learns_from_the_map_alone_at_every_stride() {
    for spec in encoder::all() {
        for &stride in spec.strides {
            let case = format!("{} at stride {stride}", spec.name);
            let encoder = build(spec, stride);
            let side = (2 * stride).max(32);
            let map = encoder.forward(image(side, side));
            let weights: Tensor<4> = tensor(&wave(&map.dims(), 1.0, 1.0));
            let grads = (map * weights).sum().backward();
            let before = StateDict::of(&encoder).0;
            let found = gradients(&encoder, &grads);
            let parameters = before.keys().filter(|name| !name.contains("running_"));
            assert_eq!(found.len(), parameters.count(), "{case}");
            for (name, gradient) in &found {
                assert!(
                    gradient.iter().all(|v| v.is_finite()) && gradient.iter().any(|&v| v != 0.0),
                    "{case}: {name}"
                );
            }

            let norm = AdamW::gradient_norm(&encoder, &grads);
            let mut optimizer = AdamW::new(AdamWConfig {
                betas: [0.9, 0.95],
                weight_decay: 0.0,
                clip_norm: 3.0,
                encoder_rate: 1.0,
            });
            let after = StateDict::of(&optimizer.step(encoder, grads, norm, 1e-3)).0;
            assert!(after != before, "{case}");
            for (name, tensor) in after {
                assert!(
                    tensor.values.iter().all(|v| v.is_finite()),
                    "{case}: {name} after a step"
                );
            }
        }
    }
}

#[test]
fn every_encoder_survives_the_way_through_a_file() {
    for spec in encoder::all() {
        let encoder = build(spec, spec.strides[0]);
        // A step in training mode moves the running statistics off their start.
        let _ = encoder.forward(image(64, 64));
        let bytes = StateDict::of(&encoder).to_bytes("").unwrap();
        let other = spec
            .build(
                Build {
                    stride: spec.strides[0],
                    inputs: 3,
                },
                &mut Init::new(1, &qbheat::device().autodiff()),
            )
            .unwrap();
        let back = StateDict::from_bytes(&bytes)
            .unwrap()
            .0
            .load_into(other)
            .unwrap();
        let map = |encoder: Encoder| values(encoder.valid().forward(image(64, 64).inner()));
        assert!(map(encoder) == map(back), "{}", spec.name);
    }
}

#[test]
fn grey_images_are_taken_by_encoders_built_for_them() {
    for spec in encoder::all() {
        let build = Build {
            stride: spec.strides[0],
            inputs: 1,
        };
        let encoder = spec
            .build(build, &mut Init::new(0, &qbheat::device()))
            .unwrap();
        let grey = image(32, 32).inner().slice_dim(1, 0..1);
        assert_eq!(encoder.forward(grey).dims()[0], 2, "{}", spec.name);
    }
}

#[test]
fn only_the_first_token_has_a_place_of_its_own() {
    let spec = encoder::find("mf-tiny").unwrap();
    let encoder = use_batch_statistics(build(spec, 8), false);
    let map = |rows: [usize; 4]| {
        let mut state = StateDict::of(&encoder);
        // Fresh linear layers are so small that gates and dynamic ReLUs hardly hear the tokens.
        for (name, tensor) in &mut state.0 {
            if tensor.shape.len() == 2 && name != "tokens" {
                tensor.values.iter_mut().for_each(|v| *v *= 30.0);
            }
        }
        let tokens = state.0.get_mut("tokens").unwrap();
        let width = tokens.shape[1];
        let old = tokens.values.clone();
        tokens.values = rows
            .iter()
            .flat_map(|&row| old[row * width..(row + 1) * width].to_vec())
            .collect();
        let moved = state.load_into(encoder.clone()).unwrap();
        values(moved.forward(image(64, 64)))
    };
    let reference = map([0, 1, 2, 3]);
    assert!(difference(&map([0, 3, 1, 2]), &reference) < 1e-4);
    assert!(difference(&map([1, 0, 2, 3]), &reference) > 1e-2);
}

#[test]
fn the_list_of_encoders_names_all_of_them() {
    let answer = json(&qbheat(&["encoders", "--image-size", "32", "--json"]));
    let listed: Vec<&str> = answer["encoders"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    let known: Vec<&str> = encoder::all().map(|spec| spec.name).collect();
    assert_eq!(listed, known);
    let at_four = json(&qbheat(&[
        "encoders",
        "--image-size",
        "32",
        "--stride",
        "4",
        "--json",
    ]));
    for row in at_four["encoders"].as_array().unwrap() {
        assert_eq!(row["stride"], 4);
    }
    assert_eq!(
        qbheat(&["encoders", "--stride", "5"]).status.code(),
        Some(2)
    );
}

#[test]
fn reestimated_statistics_are_those_of_the_batches() {
    use qbheat::data::{BUILTIN, DataConfig, Dataset};
    use qbheat::observe::Silent;
    use qbheat::probe::{Part, ProbeConfig, reestimate_batch_norm, whole_images};

    let data = DataConfig {
        path: BUILTIN.into(),
        ..DataConfig::default()
    };
    let dataset = Dataset::open(&data, 0, &Silent).unwrap();
    let size = ImageSize::square(32);
    let config = ProbeConfig::new(size, 0);
    // All batches are the same 16 images, so the statistics of the first layer are known.
    let part = Part {
        dataset: &dataset,
        indices: dataset.train[..16].to_vec(),
        labels: vec![0; 16],
    };
    let encoder = build(encoder::find("mf-tiny").unwrap(), 4);
    let found = StateDict::of(&reestimate_batch_norm(&encoder, &part, &config, &Silent).unwrap());
    let images = whole_images(&dataset, &part.indices, size).unwrap();
    let kernel = StateDict::of(&encoder).0["stem.conv.weight"].clone();
    let stem = burn::tensor::module::conv2d(
        images,
        kernel.tensor::<4>(&qbheat::device()).unwrap(),
        None,
        burn::tensor::ops::ConvOptions::new([1, 1], [1, 1], [1, 1], 1),
    );
    let [n, c, h, w] = stem.dims();
    let stem = values(stem);
    for channel in 0..c {
        let of_channel = (0..n).flat_map(|i| {
            let start = (i * c + channel) * h * w;
            stem[start..start + h * w].iter().map(|&v| f64::from(v))
        });
        let count = (n * h * w) as f64;
        let mean = of_channel.clone().sum::<f64>() / count;
        let variance = of_channel.map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let statistic = |name: &str| f64::from(found.0[name].values[channel]);
        assert!((statistic("stem.bn.running_mean") - mean).abs() < 1e-3);
        assert!((statistic("stem.bn.running_var") / variance - 1.0).abs() < 1e-3);
    }
    assert_eq!(found.0["tokens"], StateDict::of(&encoder).0["tokens"]);
}
