//! Whether what a study has kept was made with what it asks for now.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};
use toml::Table;

use crate::error::{Error, Result};

const REMEDY: &str = "choose another --out, or delete the cell's file and run to have it run again";

/// Keys that say how, not what, a run computes.
pub(super) const OF_THE_MACHINE: [&str; 10] = [
    "threads",
    "device",
    "kernels",
    "data.path",
    "data.loader_threads",
    "data.memory_mib",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.watch_every",
    "run.watch_images",
];

/// A configuration without these keys, as TOML.
pub(super) fn without<'a>(
    mut table: Table,
    keys: impl Iterator<Item = &'a &'static str>,
) -> String {
    for key in keys {
        match key.split_once('.') {
            Some((section, key)) => {
                let section = table.get_mut(section).and_then(toml::Value::as_table_mut);
                section.expect("a section of the configuration").remove(key);
            }
            None => {
                table.remove(*key);
            }
        }
    }
    toml::to_string(&table).expect("a table is valid TOML")
}

/// Refuses a cell that was made with something else than the study now has.
pub(super) fn check_equal<T: PartialEq + Serialize>(
    cell: &str,
    key: &str,
    found: &T,
    expected: &T,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let [found, expected] = [found, expected].map(|value| match json!(value) {
        Value::Null => "none".into(),
        value => value.to_string(),
    });
    let what = format!("it was made with {key} {found}, the study now has {expected}");
    Err(refused(cell, &what))
}

/// The error that a cell does not fit the study.
pub(super) fn refused(cell: &str, what: &str) -> Error {
    Error::Refused(format!("cell {cell}: {what}; {REMEDY}"))
}

/// Refuses a cell that was run with another configuration than the study now asks for.
pub(super) fn check_same(cell: &str, found: &str, expected: &str, defaults: &str) -> Result<()> {
    // A key that was not there yet had the effect of its default.
    let [found, expected, defaults] = [found, expected, defaults].map(settings_of);
    let value = |key: &String| found.get(key).or(defaults.get(key));
    let mut different = expected
        .iter()
        .filter(|(key, expected)| value(key) != Some(expected));
    let Some((key, expected)) = different.next() else {
        return Ok(());
    };
    let found = value(key).map_or("nothing", String::as_str);
    let what = format!("it was run with {key} = {found}, the study now says {expected}");
    Err(refused(cell, &what))
}

/// Dotted keys and values of a TOML text.
fn settings_of(text: &str) -> BTreeMap<String, String> {
    fn collect(table: &Table, prefix: &str, into: &mut BTreeMap<String, String>) {
        for (name, value) in table {
            let key = format!("{prefix}{name}");
            match value {
                toml::Value::Table(inner) => collect(inner, &format!("{key}."), into),
                other => {
                    into.insert(key, other.to_string());
                }
            }
        }
    }
    let mut settings = BTreeMap::new();
    collect(&text.parse().unwrap_or_default(), "", &mut settings);
    settings
}
