//! Cells to rows: mean and deviation over seeds, difference to MoCo-v2, the paper's figures beside them.

use std::fmt::Write;

use statrs::distribution::{ContinuousCDF, StudentsT};

use super::minutes::{MINUTES, Minutes};
use super::{Cell, Score};
use crate::config::{LATENT, Method};
use crate::probe::{Protocol, UNTRAINED};

/// A difference with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The difference of the means.
    pub difference: f64,
    /// Half the interval's length, where both sides have seeds that differ (Welch).
    pub margin: Option<f64>,
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// Name of the encoder.
    pub encoder: String,
    /// As the study calls it.
    pub method: String,
    /// How it was scored.
    pub protocol: Protocol,
    /// Share of the labels.
    pub labels: f64,
    /// Top-1 accuracy of each seed, in percent.
    pub top1: Vec<f64>,
    /// Images that the probe was trained on.
    pub images: usize,
    /// Minutes of pre-training, averaged over seeds.
    pub minutes: Minutes,
    /// Epochs of pre-training, averaged over seeds.
    pub epochs: f64,
    /// Against MoCo-v2 of the same encoder, protocol and labels.
    pub against_moco: Option<Interval>,
    /// The paper's figure for this method and protocol, on ImageNet-1K with a 5.8M-parameter Mobile-Former.
    pub paper: Option<&'static str>,
}

impl Row {
    /// Mean over seeds.
    pub fn mean(&self) -> f64 {
        mean(&self.top1)
    }

    /// Sample deviation over seeds, where there are two and more.
    pub fn deviation(&self) -> Option<f64> {
        deviation(&self.top1)
    }

    /// `12.3 ± 0.4` or `12.3`.
    pub fn figure(&self) -> String {
        figure(&self.top1)
    }

    /// The difference to MoCo-v2: `+1.2 [+0.3, +2.1]` or `+1.2`.
    pub fn difference(&self) -> String {
        difference(self.against_moco)
    }

    /// The share of the labels and the images that have them: `10 % (2500)`.
    pub fn share(&self) -> String {
        format!("{} % ({})", (self.labels * 1e4).round() / 1e2, self.images)
    }

    /// What the method is called before a reader.
    pub fn title(&self) -> String {
        title(&self.method)
    }
}

/// One row for each encoder, protocol, share of the labels and method, in the order in which cells have them.
pub fn rows(cells: &[Cell]) -> Vec<Row> {
    let mut keys: Vec<(&str, Protocol, f64, &str)> = Vec::new();
    for cell in cells {
        for score in &cell.scores {
            let key = (&*cell.encoder, score.protocol, score.labels, &*cell.method);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    }
    let first = |name: &str| cells.iter().position(|cell| cell.encoder == name);
    let place = |name: &str| cells.iter().position(|cell| cell.method == name);
    keys.sort_by(|a, b| {
        (first(a.0), a.1)
            .cmp(&(first(b.0), b.1))
            .then(b.2.total_cmp(&a.2))
            .then(place(a.3).cmp(&place(b.3)))
    });
    let row = |&(encoder, protocol, labels, method): &(&str, Protocol, f64, &str)| {
        let of = |method: &str| -> Vec<(&Cell, &Score)> {
            cells
                .iter()
                .filter(|cell| cell.encoder == encoder && cell.method == method)
                .filter_map(|cell| Some((cell, cell.score(protocol, labels)?)))
                .collect()
        };
        let top1 = |scored: &[(&Cell, &Score)]| -> Vec<f64> {
            scored.iter().map(|(_, score)| score.top1).collect()
        };
        let scored = of(method);
        let (own, moco) = (top1(&scored), top1(&of(Method::MocoV2.name())));
        let epochs: Vec<f64> = scored.iter().map(|(cell, _)| cell.epochs as f64).collect();
        let minutes: Vec<Minutes> = scored.iter().map(|(cell, _)| cell.minutes()).collect();
        Row {
            encoder: encoder.to_owned(),
            method: method.to_owned(),
            protocol,
            labels,
            against_moco: (method != Method::MocoV2.name() && !moco.is_empty())
                .then(|| interval(&own, &moco)),
            top1: own,
            minutes: Minutes::mean(&minutes),
            epochs: mean(&epochs),
            images: scored.first().map_or(0, |(_, score)| score.images[0]),
            paper: paper(method, protocol, labels),
        }
    };
    keys.iter().map(row).collect()
}

/// The figures of arXiv 2211.13228 that are known here.
fn paper(method: &str, protocol: Protocol, labels: f64) -> Option<&'static str> {
    match (method, protocol) {
        _ if labels < 1.0 => None,
        ("qb-heat", Protocol::Tran1) => Some("65.6"),
        ("moco-v2", Protocol::Tran1) => Some("52.9"),
        _ => None,
    }
}

/// `12.3 ± 0.4`, `12.3`, or a dash for nothing.
pub(super) fn figure(values: &[f64]) -> String {
    match deviation(values) {
        Some(deviation) => format!("{:.1} ± {deviation:.1}", mean(values)),
        None if values.is_empty() => "–".into(),
        None => format!("{:.1}", mean(values)),
    }
}

/// `+1.2 [+0.3, +2.1]`, `+1.2`, or a dash for nothing.
pub(super) fn difference(found: Option<Interval>) -> String {
    match found {
        None => "–".into(),
        Some(Interval {
            difference,
            margin: None,
        }) => format!("{difference:+.1}"),
        Some(Interval {
            difference,
            margin: Some(margin),
        }) => format!(
            "{difference:+.1} [{:+.1}, {:+.1}]",
            difference - margin,
            difference + margin
        ),
    }
}

/// Sample deviation, where there are two values and more.
pub(super) fn deviation(values: &[f64]) -> Option<f64> {
    (values.len() > 1).then(|| variance(values).sqrt())
}

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    squares / (values.len() - 1) as f64
}

/// Difference of two means with Welch's 95 % confidence interval.
pub(super) fn interval(own: &[f64], other: &[f64]) -> Interval {
    let spread = |values: &[f64]| values.len() > 1 && variance(values) > 0.0;
    let margin = (spread(own) && spread(other)).then(|| {
        let [a, b] = [own, other].map(|values| variance(values) / values.len() as f64);
        let freedom = (a + b).powi(2)
            / (a.powi(2) / (own.len() - 1) as f64 + b.powi(2) / (other.len() - 1) as f64);
        t95(freedom) * (a + b).sqrt()
    });
    Interval {
        difference: mean(own) - mean(other),
        margin,
    }
}

/// Two-sided 95 % quantile of Student's t; `freedom` need not be a whole number.
fn t95(freedom: f64) -> f64 {
    StudentsT::new(0.0, 1.0, freedom)
        .expect("degrees of freedom above zero")
        .inverse_cdf(0.975)
}

/// What a method is called before a reader.
pub(crate) fn title(method: &str) -> String {
    match method {
        "qb-heat" => "QB-Heat".into(),
        LATENT => "QB-Heat latent".into(),
        "moco-v2" => "MoCo-v2".into(),
        "supervised" => "supervised".into(),
        UNTRAINED => "untrained".into(),
        other => other.into(),
    }
}

/// The table as Markdown, and below it what failed: name and reason.
pub fn to_markdown(rows: &[Row], failed: &[(String, String)]) -> String {
    let mut text = String::from(
        "| encoder | protocol | labels (images) | method | top-1, % | seeds | difference to MoCo-v2 | epochs | minutes | paper |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {:.0} | {} | {} |",
            row.encoder,
            row.protocol.name(),
            row.share(),
            plain(&row.title()),
            row.figure(),
            row.top1.len(),
            row.difference(),
            row.epochs,
            row.minutes.figure(),
            row.paper.unwrap_or("–"),
        );
    }
    let _ = writeln!(
        text,
        "\nMean ± deviation over seeds; differences with 95 % intervals (Welch) where seeds differ. {MINUTES} Paper: \
         ImageNet-1K, a Mobile-Former of 5.8 M parameters."
    );
    text + &failures(failed)
}

/// What failed, a paragraph each.
pub(super) fn failures(failed: &[(String, String)]) -> String {
    let failed = failed.iter();
    failed
        .map(|(cell, reason)| format!("\nFailed: {cell}: {reason}\n"))
        .collect()
}

/// A field of a table in Markdown.
pub(super) fn plain(field: &str) -> String {
    field.replace('|', "\\|")
}

/// A field of text in CSV.
pub(super) fn quoted(field: &str) -> String {
    format!("\"{}\"", field.replace('"', "\"\""))
}

/// A number in CSV.
pub(super) fn or_empty(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| format!("{value:.4}"))
}

/// The table as CSV, a line a row, and what failed in lines of cell and reason.
pub fn to_csv(rows: &[Row], failed: &[(String, String)]) -> String {
    let mut text = String::from(
        "encoder,protocol,labels,images,method,seeds,top1_mean,top1_deviation,difference_to_moco,margin95,epochs,minutes,minutes_counted,paper,failed\n",
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{:.4},{},{},{},{:.1},{:.2},{},{},",
            row.encoder,
            row.protocol.name(),
            row.labels,
            row.images,
            quoted(&row.method),
            row.top1.len(),
            row.mean(),
            or_empty(row.deviation()),
            or_empty(row.against_moco.map(|interval| interval.difference)),
            or_empty(row.against_moco.and_then(|interval| interval.margin)),
            row.epochs,
            row.minutes.taken,
            or_empty(row.minutes.counted),
            row.paper.unwrap_or(""),
        );
    }
    for (cell, reason) in failed {
        let _ = writeln!(text, ",,,,{},,,,,,,,,,{}", quoted(cell), quoted(reason));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_t_are_those_of_scipy() {
        // scipy.stats.t.ppf(0.975, freedom)
        for (freedom, expected) in [
            (1.0, 12.706204736174694),
            (1.2, 8.648826510748867),
            (2.57, 3.5059480780806807),
            (4.0, 2.7764451051977934),
            (31.7, 2.0376896343317954),
            (200.0, 1.9718962236339088),
        ] {
            assert!((t95(freedom) / expected - 1.0).abs() < 1e-9, "{freedom}");
        }
    }

    #[test]
    fn intervals_are_those_of_scipy() {
        // scipy.stats.ttest_ind(own, other, equal_var=False).confidence_interval()
        let equal = (
            interval(&[2.0, 3.0, 4.0], &[4.0, 6.0, 8.0]),
            [-7.1553995031825055, 1.1553995031825055],
        );
        let unequal = (
            interval(&[1.0, 1.5], &[3.0, 3.7, 9.1]),
            [-12.125230992071167, 4.091897658737833],
        );
        for (found, [low, high]) in [equal, unequal] {
            let margin = found.margin.unwrap();
            assert!((found.difference - margin - low).abs() < 1e-8);
            assert!((found.difference + margin - high).abs() < 1e-8);
        }
        assert_eq!(interval(&[1.0], &[2.0, 3.0]).margin, None);
        assert_eq!(interval(&[1.0, 1.0], &[2.0, 3.0]).margin, None);
    }
}
