//! Cells of detectors to rows: mean and deviation over seeds, difference to MoCo-v2, the paper's beside it.

use std::fmt::Write;

use super::DetectionCell;
use crate::config::Method;
use crate::detect::Figures;
use crate::study::minutes::{MINUTES, Minutes};
use crate::study::table::{
    Interval, deviation, difference, failures, figure, interval, mean, or_empty, plain, quoted,
    title,
};

/// A line of the table.
#[derive(Clone, Debug)]
pub struct DetectionRow {
    /// Name of the encoder; a dash for predictors that have none.
    pub encoder: String,
    /// As the study calls it.
    pub method: String,
    /// AP, AP50 and AP75 of each seed, in percent.
    pub val: [Vec<f64>; 3],
    /// Those on the test part.
    pub test: [Vec<f64>; 3],
    /// Seeds.
    pub seeds: usize,
    /// Difference of AP to MoCo-v2 of the same encoder.
    pub against_moco: Option<Interval>,
    /// Nothing for what is not trained.
    pub costs: Option<Costs>,
    /// The paper's differences of AP for these weights: COCO 2017, a frozen Mobile-Former.
    pub paper: Option<&'static str>,
}

/// What a detector takes, averaged over seeds.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Epochs of training.
    pub epochs: f64,
    /// Minutes of training.
    pub minutes: Minutes,
    /// Milliseconds an image.
    pub ms_per_image: f64,
}

/// One row for each encoder and method, in the order in which cells have them, then predictors that look at no picture.
pub fn detection_rows(cells: &[DetectionCell]) -> Vec<DetectionRow> {
    let moco = Method::MocoV2.name();
    let mut keys: Vec<(&str, &str)> = Vec::new();
    for cell in cells {
        let key = (&*cell.encoder, &*cell.method);
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.sort_by_key(|key| cells.iter().position(|cell| cell.encoder == key.0));
    let of = |encoder: &str, method: &str| -> Vec<&DetectionCell> {
        let cells = cells.iter();
        let own = cells.filter(|cell| cell.encoder == encoder && cell.method == method);
        own.collect()
    };
    let trained = keys.iter().map(|&(encoder, method)| {
        let own = of(encoder, method);
        let val = percents(own.iter().map(|cell| &cell.val));
        let [rival, ..] = percents(of(encoder, moco).iter().map(|cell| &cell.val));
        let comparable = method != moco && !val[0].is_empty() && !rival.is_empty();
        let average = |cost: fn(&DetectionCell) -> f64| {
            let costs: Vec<f64> = own.iter().map(|cell| cost(cell)).collect();
            mean(&costs)
        };
        let minutes: Vec<Minutes> = own.iter().map(|cell| cell.minutes()).collect();
        DetectionRow {
            encoder: encoder.to_owned(),
            method: method.to_owned(),
            test: percents(own.iter().filter_map(|cell| cell.test.as_ref())),
            seeds: own.len(),
            against_moco: comparable.then(|| interval(&val[0], &rival)),
            val,
            costs: Some(Costs {
                epochs: average(|cell| cell.epochs as f64),
                minutes: Minutes::mean(&minutes),
                ms_per_image: average(|cell| cell.ms_per_image),
            }),
            paper: (method == Method::QbHeat.name())
                .then_some("+7.9 over MoCo-v2, +4.5 over supervised"),
        }
    });
    let mut rows: Vec<DetectionRow> = trained.collect();
    // The same for all rows of a seed, which share their images.
    let mut seeds: Vec<&DetectionCell> = Vec::new();
    for cell in cells {
        if !seeds.iter().any(|other| other.seed == cell.seed) {
            seeds.push(cell);
        }
    }
    type Floor = fn(&DetectionCell) -> &Figures;
    let floors: [(&str, Floor); 2] = [
        ("mean boxes", |cell| &cell.mean_boxes),
        ("chance", |cell| &cell.chance),
    ];
    for (name, of) in floors.into_iter().filter(|_| !seeds.is_empty()) {
        rows.push(DetectionRow {
            encoder: "–".into(),
            method: name.into(),
            val: percents(seeds.iter().map(|cell| of(cell))),
            test: Default::default(),
            seeds: seeds.len(),
            against_moco: None,
            costs: None,
            paper: None,
        });
    }
    rows
}

fn percents<'a>(figures: impl Iterator<Item = &'a Figures>) -> [Vec<f64>; 3] {
    let mut percents = <[Vec<f64>; 3]>::default();
    for &Figures { ap, ap50, ap75 } in figures {
        for (values, figure) in percents.iter_mut().zip([ap, ap50, ap75]) {
            values.extend(figure.map(|figure| 100.0 * figure));
        }
    }
    percents
}

/// The table as a person reads it.
pub struct DetectionTable {
    /// What stands above the columns.
    pub columns: Vec<&'static str>,
    /// The fields of each row.
    pub lines: Vec<Vec<String>>,
}

impl DetectionTable {
    /// Of these rows; with columns for the test part where one of them was scored on it.
    pub fn of(rows: &[DetectionRow]) -> Self {
        let has_test = rows.iter().any(|row| !row.test[0].is_empty());
        let mut columns = vec!["encoder", "weights", "AP, %", "AP50, %", "AP75, %"];
        if has_test {
            columns.extend(["test AP, %", "test AP50, %"]);
        }
        columns.extend([
            "seeds",
            "AP against MoCo-v2",
            "epochs",
            "minutes",
            "ms an image",
            "paper: AP",
        ]);
        let line = |row: &DetectionRow| {
            let mut fields = vec![row.encoder.clone(), title(&row.method)];
            fields.extend(row.val.iter().map(|values| figure(values)));
            if has_test {
                fields.extend(row.test[..2].iter().map(|values| figure(values)));
            }
            fields.extend([row.seeds.to_string(), difference(row.against_moco)]);
            fields.extend(match row.costs {
                Some(costs) => [
                    format!("{:.0}", costs.epochs),
                    costs.minutes.figure(),
                    format!("{:.1}", costs.ms_per_image),
                ],
                None => ["–"; 3].map(String::from),
            });
            fields.push(row.paper.unwrap_or("–").into());
            fields
        };
        Self {
            lines: rows.iter().map(line).collect(),
            columns,
        }
    }
}

/// The table as Markdown, and below it what failed: name and reason.
pub fn detection_markdown(rows: &[DetectionRow], failed: &[(String, String)]) -> String {
    let DetectionTable { columns, lines } = DetectionTable::of(rows);
    let mut text = format!(
        "| {} |\n|{}\n",
        columns.join(" | "),
        "---|".repeat(columns.len())
    );
    for fields in lines {
        let fields: Vec<String> = fields.iter().map(|field| plain(field)).collect();
        let _ = writeln!(text, "| {} |", fields.join(" | "));
    }
    let _ = writeln!(
        text,
        "\nMean ± deviation over seeds; differences with 95 % intervals (Welch) where seeds differ. {MINUTES} Paper: COCO \
         2017, a frozen Mobile-Former."
    );
    text + &failures(failed)
}

/// The table as CSV, a line a row, figures in percent, and what failed in lines of cell and reason.
pub fn detection_csv(rows: &[DetectionRow], failed: &[(String, String)]) -> String {
    let mut text = String::from(
        "encoder,weights,seeds,ap_mean,ap_deviation,ap50_mean,ap75_mean,test_ap_mean,test_ap_deviation,test_ap50_mean,\
         difference_to_moco,margin95,epochs,minutes,minutes_counted,ms_per_image,paper,failed\n",
    );
    for row in rows {
        let average = |values: &[f64]| (!values.is_empty()).then(|| mean(values));
        let [ap, ap50, ap75] = &row.val;
        let [test_ap, test_ap50, _] = &row.test;
        let numbers = [
            average(ap),
            deviation(ap),
            average(ap50),
            average(ap75),
            average(test_ap),
            deviation(test_ap),
            average(test_ap50),
            row.against_moco.map(|interval| interval.difference),
            row.against_moco.and_then(|interval| interval.margin),
            row.costs.map(|costs| costs.epochs),
            row.costs.map(|costs| costs.minutes.taken),
            row.costs.and_then(|costs| costs.minutes.counted),
            row.costs.map(|costs| costs.ms_per_image),
        ];
        let _ = writeln!(
            text,
            "{},{},{},{},{},",
            row.encoder,
            quoted(&row.method),
            row.seeds,
            numbers.map(or_empty).join(","),
            quoted(row.paper.unwrap_or(""))
        );
    }
    for (cell, reason) in failed {
        let _ = writeln!(
            text,
            ",{}{}{}",
            quoted(cell),
            ",".repeat(16),
            quoted(reason)
        );
    }
    text
}
