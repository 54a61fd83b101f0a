//! `qbheat check`

use std::path::PathBuf;

use clap::Args;
use qbheat::data::{self, ClassCount, DataConfig, OddImage, SizeCount};
use qbheat::error::Result;
use serde_json::to_value;

use super::progress::Progress;
use super::{Answer, use_threads};

/// Names of a list that are printed for people; `--json` gives all.
const LISTED: usize = 20;

#[derive(Args)]
pub struct Check {
    /// A folder of images, a .tar of them, shards as in 'shard-{000..009}.tar', or builtin:cifar10.
    #[arg(long)]
    data: PathBuf,
    /// Print one JSON object on stdout and nothing else there.
    #[arg(long)]
    pub json: bool,
    /// Threads [default: all cores].
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
}

impl Check {
    pub fn run(&self, progress: &Progress) -> Result<Answer> {
        // Rayon, too, takes 0 for all cores.
        use_threads(self.threads)?;
        let config = DataConfig {
            path: self.data.clone(),
            ..DataConfig::default()
        };
        let check = data::check(&config, progress)?;
        Ok(Answer {
            exit_code: u8::from(!check.unreadable.is_empty()),
            text: describe(&check),
            json: to_value(check).expect("a check is valid JSON"),
        })
    }
}

fn describe(check: &data::Check) -> String {
    let formats = check.formats.iter();
    let sizes = check.sizes.iter();
    let classes = check.classes.iter();
    let mut text = format!(
        "{} images are readable, {} are not; {} other files",
        check.readable,
        check.unreadable.len(),
        check.others
    );
    let tables = [
        table(
            "format",
            formats.map(|(format, n)| ((*format).to_owned(), *n)),
        ),
        table(
            "size",
            sizes.map(
                |SizeCount {
                     width,
                     height,
                     images,
                 }| (format!("{width}×{height}"), *images),
            ),
        ),
        table(
            "class",
            classes.map(|ClassCount { class, images }| (class.clone(), *images)),
        ),
        list(
            "unreadable",
            check
                .unreadable
                .iter()
                .map(|bad| format!("{}: {}", bad.name, bad.reason)),
        ),
        list(
            "odd",
            check
                .odd
                .iter()
                .map(|OddImage { name, odd }| format!("{name}: {}", odd.join(", "))),
        ),
        list(
            "the same bytes",
            check.same_bytes.iter().map(|names| names.join(" = ")),
        ),
        list(
            "the same pixels",
            check.same_pixels.iter().map(|names| names.join(" = ")),
        ),
        list("labels not understood", check.bad_labels.iter().cloned()),
    ];
    for table in tables {
        text += &table;
    }
    text
}

fn table(title: &str, rows: impl ExactSizeIterator<Item = (String, usize)>) -> String {
    section(
        title,
        rows.map(|(name, images)| format!("{images:>9}  {name}")),
    )
}

fn list(title: &str, lines: impl ExactSizeIterator<Item = String>) -> String {
    section(title, lines.map(|line| format!("  {line}")))
}

/// A title with the number of lines below it, then the first of them; nothing where there is none.
fn section(title: &str, lines: impl ExactSizeIterator<Item = String>) -> String {
    let count = lines.len();
    if count == 0 {
        return String::new();
    }
    let mut text = format!("\n{title}: {count}");
    for line in lines.take(LISTED) {
        text += "\n";
        text += &line;
    }
    if count > LISTED {
        text += &format!("\n  … and {} more", count - LISTED);
    }
    text
}
