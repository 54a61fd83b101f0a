//! The page of the hypothesis test.

use std::path::Path;

use askama::Template;
use burn::tensor::Tensor;

use super::{MEMORY_MIB, pictures, plots, principal_components};
use crate::error::Result;
use crate::heat::{Derivative, Difference, Law};
use crate::invariance::{Invariance, LawResult, Learned, Measured, Parts};
use crate::observe::Silent;
use crate::probe::{Part, ProbeConfig, extract, whole_images};
use crate::train::write_durably;
use crate::weights::Weights;

/// Images that the principal components are taken from.
const GALLERY: usize = 256;
/// A residual that is this many times the mean of `‖z_x‖²` has the full colour.
const FULL_COLOUR: f64 = 2.0;
/// R² has to be higher than a control by this much to count. About as much do controls change with another permutation
/// (0.21 to 0.33 at lag 1 for one encoder) or another untrained network (0.10 to 0.17 without a shared position).
const MARGIN: f64 = 0.05;

#[derive(Template)]
#[template(path = "invariance.html")]
struct Page {
    facts: Vec<(&'static str, String)>,
    forward: bool,
    sentences: Vec<String>,
    margin: f64,
    tables: Vec<Table>,
    rank_plots: Vec<(String, String)>,
    planes: Vec<Planes>,
    learned: Vec<(String, String)>,
    full_colour: f64,
    pictures: Vec<Pictures>,
}

/// One law, a line for each encoder.
struct Table {
    law: String,
    meaning: String,
    has_learned: bool,
    lines: Vec<Line>,
}

struct Line {
    weights: String,
    r2: String,
    shuffled: String,
    scalar: String,
    channel_means: [String; 2],
    raw: [String; 2],
    as_learned: Option<[String; 2]>,
}

/// Eigenvalues of one encoder: of T and S, and of A and B.
struct Planes {
    weights: String,
    fitted: String,
    learned: Option<String>,
}

/// One image; all but the names are data URLs.
struct Pictures {
    name: String,
    original: String,
    overlays: Vec<(String, String)>,
}

/// Writes the page to `path`: what was `found` for `weights`, in the same order, on the images of `parts`.
pub fn write_invariance(
    path: &Path,
    found: &Invariance,
    weights: &[Weights],
    parts: &Parts,
) -> Result<()> {
    let rank_plots = law_names(found)
        .into_iter()
        .map(|name| Ok((name.clone(), rank_plot(found, &name)?)))
        .collect::<Result<_>>()?;
    let learned = found.encoders.iter().filter_map(|encoder| {
        let learned = encoder.learned.as_ref()?;
        Some((encoder.weights.clone(), describe(learned, encoder.channels)))
    });
    let page = Page {
        facts: facts(found),
        forward: found.difference == Difference::Forward,
        sentences: sentences(found),
        margin: MARGIN,
        tables: law_names(found)
            .iter()
            .map(|name| table(found, name))
            .collect(),
        rank_plots,
        planes: found.encoders.iter().map(planes).collect::<Result<_>>()?,
        learned: learned.collect(),
        full_colour: FULL_COLOUR,
        pictures: picture_rows(found, weights, parts)?,
    };
    let html = page.render().map_err(plots::failed)?;
    write_durably(path, html.as_bytes())
}

/// Names of all laws, each once: maps of different sizes have different ones.
fn law_names(found: &Invariance) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for law in found.encoders.iter().flat_map(|encoder| &encoder.laws) {
        if !names.contains(&law.name) {
            names.push(law.name.clone());
        }
    }
    names
}

/// The encoders for which a law was tested, and how well it holds.
fn tested<'a>(
    found: &'a Invariance,
    name: &str,
) -> impl Iterator<Item = (&'a Measured, &'a LawResult)> {
    found.encoders.iter().filter_map(move |encoder| {
        let law = encoder.laws.iter().find(|law| law.name == name)?;
        Some((encoder, law))
    })
}

fn facts(found: &Invariance) -> Vec<(&'static str, String)> {
    let scored = if found.scored_drawn {
        "images of the same folder, drawn with the seed because none are held out: pre-training may have seen them"
    } else {
        "held-out images"
    };
    let seen: Vec<&str> = found
        .encoders
        .iter()
        .filter(|encoder| encoder.may_have_seen_scored)
        .map(|encoder| &encoder.weights[..])
        .collect();
    let mut facts = vec![
        (
            "data",
            format!("{}, {} px images", found.data.display(), found.image_size),
        ),
        ("fitted on", format!("{} images", found.fitted_images)),
        ("scored with", format!("{} {scored}", found.scored_images)),
        (
            "derivatives",
            match found.difference {
                Difference::Forward => "forward differences".into(),
                Difference::Sobel => "Sobel's central differences".into(),
            },
        ),
        ("seed", found.seed.to_string()),
    ];
    if !seen.is_empty() {
        facts.push((
            "not held out for",
            format!(
                "{}, if trained on these images: other ones were held out then",
                seen.join(", ")
            ),
        ));
    }
    facts
}

/// The verdict for each trained encoder, beside its controls.
fn sentences(found: &Invariance) -> Vec<String> {
    let trained = found
        .encoders
        .iter()
        .filter(|encoder| encoder.method != "none");
    trained
        .flat_map(|encoder| {
            let untrained = found.encoders.iter().find(|other| {
                other.method == "none"
                    && other.encoder == encoder.encoder
                    && other.stride == encoder.stride
            });
            let half = Law::over_half(encoder.grid);
            let of_interest = move |law: &Law| {
                *law == half || (law.derivative == Derivative::First && !law.shared)
            };
            let laws = encoder
                .laws
                .iter()
                .filter(move |result| of_interest(&result.law));
            laws.map(move |result| {
                let r2 = result.r2.position_means_removed;
                let shuffled = result.shuffled.position_means_removed;
                let floor = untrained
                    .and_then(|other| other.laws.iter().find(|law| law.law == result.law))
                    .map(|law| law.r2.position_means_removed);
                let of_untrained = floor.map_or(String::new(), |floor| {
                    format!(", {} for the untrained network", figure(floor))
                });
                format!(
                    "{}, {}: R² {}{of_untrained}, {} with positions shuffled: {}.",
                    encoder.weights,
                    result.name,
                    figure(r2),
                    figure(shuffled),
                    verdict(r2, floor, shuffled)
                )
            })
        })
        .collect()
}

/// What R² says beside that of the untrained network and that of shuffled positions.
fn verdict(r2: f64, untrained: Option<f64>, shuffled: f64) -> &'static str {
    let above = |control: f64| r2 > control + MARGIN;
    match (untrained.is_none_or(above), above(shuffled)) {
        (true, true) => "clearly above its controls, which speaks for the law",
        (true, false) => "not clearly above shuffled positions, so it does not speak for the law",
        (false, true) => {
            "not clearly above the untrained network, so it does not speak for pre-training"
        }
        (false, false) => "clearly above neither control, so it does not speak for the law",
    }
}

/// What a law relates, in plain words.
fn meaning(found: &Invariance, name: &str) -> String {
    let mut places: Vec<usize> = tested(found, name)
        .map(|(_, result)| result.samples / found.fitted_images)
        .collect();
    places.sort_unstable();
    places.dedup();
    let places: Vec<String> = places.iter().map(usize::to_string).collect();
    let over_half =
        tested(found, name).all(|(encoder, result)| result.law == Law::over_half(encoder.grid));
    let Some((_, result)) = tested(found, name).next() else {
        return String::new();
    };
    let distance = match result.law.lag {
        _ if over_half => "over half the map, the step of pre-training".to_owned(),
        [1, 1] => "between neighbours".to_owned(),
        [down, right] if down == right => format!("over {down} positions"),
        [down, right] => format!("over {down} positions down and {right} to the right"),
    };
    let order = match result.law.derivative {
        Derivative::First => "First",
        Derivative::Second => "Second",
    };
    let apart = if result.law.shared {
        ""
    } else {
        "; the one along y is taken further right, so that the two have no position in common"
    };
    format!(
        "{order} derivatives {distance}, at {} places of a map{apart}.",
        places.join(" or ")
    )
}

fn table(found: &Invariance, name: &str) -> Table {
    let lines: Vec<Line> = tested(found, name)
        .map(|(encoder, law)| Line {
            weights: encoder.weights.clone(),
            r2: figure(law.r2.position_means_removed),
            shuffled: figure(law.shuffled.position_means_removed),
            scalar: figure(law.r2_of_scalar),
            channel_means: [&law.r2, &law.shuffled].map(|r2| figure(r2.channel_means_removed)),
            raw: [&law.r2, &law.shuffled].map(|r2| figure(r2.raw)),
            as_learned: law.learned.as_ref().map(|learned| {
                let r2 = learned.r2.position_means_removed;
                [r2, learned.distance].map(figure)
            }),
        })
        .collect();
    Table {
        law: name.to_owned(),
        meaning: meaning(found, name),
        has_learned: lines.iter().any(|line| line.as_learned.is_some()),
        lines,
    }
}

/// Three decimals, unless the number is so large that they mean nothing.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size < 100.0 => format!("{value:.3}"),
        size if size < 1e5 => format!("{value:.0}"),
        _ => format!("{value:.1e}"),
    }
}

fn rank_plot(found: &Invariance, name: &str) -> Result<String> {
    let curves: Vec<plots::Named> = tested(found, name)
        .map(|(encoder, law)| {
            let points = law.by_rank.iter();
            let points = points.map(|point| ((point.rank as f64).log2(), point.r2));
            (encoder.weights.clone(), points.collect())
        })
        .collect();
    plots::curves(&curves, "logarithm of the rank to base 2", "R²")
}

fn planes(encoder: &Measured) -> Result<Planes> {
    let fitted = [
        ("T", &encoder.t_eigenvalues[..]),
        ("S", &encoder.s_eigenvalues[..]),
    ];
    let learned = encoder.learned.as_ref().map(|learned| {
        let sets = [
            ("A", &learned.a_eigenvalues[..]),
            ("B", &learned.b_eigenvalues[..]),
        ];
        plots::complex_plane(&sets, 0.0)
    });
    Ok(Planes {
        weights: encoder.weights.clone(),
        fitted: plots::complex_plane(&fitted, 1.0)?,
        learned: learned.transpose()?,
    })
}

fn describe(learned: &Learned, channels: usize) -> String {
    let inverse = if learned.rank_of_b < channels {
        format!(
            "B is singular (rank {} of {channels}), so its pseudo-inverse stands for B⁻¹",
            learned.rank_of_b
        )
    } else {
        format!(
            "B has full rank, its condition number is {:.1e}",
            learned.condition_of_b
        )
    };
    let normalised = if learned.steps_from_normalised_features {
        "; A and B step from layer-normalised features, T is fitted to those before the norm"
    } else {
        ""
    };
    format!(
        "‖AB − BA‖/(‖A‖‖B‖) = {:.3}; {inverse}{normalised}",
        learned.commutator
    )
}

/// For each shown image and encoder: principal components of the map, then the residuals of each law.
fn picture_rows(found: &Invariance, weights: &[Weights], parts: &Parts) -> Result<Vec<Pictures>> {
    let shown = parts.shown();
    let images = whole_images(parts.dataset, shown, found.image_size)?;
    let one = |i: usize| -> Tensor<4> { images.clone().slice_dim(0, i..i + 1) };
    let mut rows = shown
        .iter()
        .enumerate()
        .map(|(i, &index)| {
            Ok(Pictures {
                name: parts.dataset.images.name(index).to_owned(),
                original: pictures::image(one(i))?,
                overlays: Vec::new(),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let gallery = Part {
        dataset: parts.dataset,
        indices: parts.scored.iter().copied().take(GALLERY).collect(),
        labels: Vec::new(),
    };
    for (encoder, weights) in found.encoders.iter().zip(weights) {
        let config = ProbeConfig {
            memory_mib: MEMORY_MIB,
            ..ProbeConfig::new(found.image_size, found.seed)
        };
        let features = extract(&weights.encoder, &gallery, &config, true, &Silent)?;
        let components = principal_components(&features, shown.len())?;
        for (i, row) in rows.iter_mut().enumerate() {
            let picture = pictures::colours(&components[i], features.grid)?;
            row.overlays
                .push((format!("{}: components", encoder.weights), picture));
            for residuals in &encoder.residuals {
                let values: Vec<f64> = residuals.images[i]
                    .iter()
                    .map(|residual| residual / FULL_COLOUR)
                    .collect();
                let caption = format!("{}: {}", encoder.weights, residuals.law);
                let picture = pictures::overlay(one(i), &values, residuals.places, encoder.stride)?;
                row.overlays.push((caption, picture));
            }
        }
    }
    Ok(rows)
}
