//! Layers of settings: a table of defaults, overridden key by key, each value checked for its type.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::data::ImageSize;
use crate::error::{Error, Result, one_of};

/// A key whose values are names, and those names.
pub(super) type Choice = (&'static str, Vec<String>);

/// `C`'s defaults, then `preset` (TOML), then the table of `file`, then `settings` (pairs of dotted key and value).
/// `choices` are checked, other values only for their types.
pub(super) fn layered<C: Serialize + Default>(
    preset: &str,
    file: Option<(&Path, &Table)>,
    settings: &[(String, String)],
    choices: &[Choice],
) -> Result<Table> {
    let mut table = Table::try_from(C::default()).expect("the defaults are valid TOML");
    let preset = preset.parse().expect("a preset is valid TOML");
    merge(&mut table, preset, "").expect("a preset has keys of the configuration");
    if let Some((path, layer)) = file {
        merge(&mut table, layer.clone(), "").map_err(|error| Error::Config {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
    }
    for (key, value) in settings {
        set(&mut table, key, value)?;
    }
    check_choices(&table, choices)?;
    Ok(table)
}

/// The configuration that a checked table holds.
pub(super) fn read_table<C: DeserializeOwned>(table: Table) -> Result<C> {
    table
        .try_into()
        .map_err(|error| Error::Refused(format!("the configuration: {}", error.to_string().trim())))
}

/// An error that names the key unless `holds`.
pub(crate) fn require(
    holds: bool,
    key: &str,
    value: impl std::fmt::Display,
    expected: &str,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Value {
        key: key.to_owned(),
        value: value.to_string(),
        expected: expected.to_owned(),
    })
}

/// Splits `key=value`.
pub fn parse_setting(text: &str) -> Result<(String, String)> {
    text.split_once('=')
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .ok_or_else(|| Error::Setting(text.to_owned()))
}

/// A TOML file; `flag` says where its path was given.
pub(crate) fn read_toml<T: DeserializeOwned>(path: &Path, flag: &'static str) -> Result<T> {
    let at = |message: String| Error::Config {
        path: path.to_owned(),
        message,
    };
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::Missing {
            path: path.to_owned(),
            flag,
        },
        _ => at(error.to_string()),
    })?;
    toml::from_str(&text).map_err(|error| at(error.to_string()))
}

fn merge(base: &mut Table, layer: Table, prefix: &str) -> Result<()> {
    for (name, value) in layer {
        let key = format!("{prefix}{name}");
        let Some(old) = base.get_mut(&name) else {
            let known = base.keys().map(|known| format!("{prefix}{known}"));
            return Err(Error::unknown("key", key, known));
        };
        match (old, value) {
            (Value::Table(old), Value::Table(value)) => merge(old, value, &format!("{key}."))?,
            (old, value) => *old = convert(&key, old, value)?,
        }
    }
    Ok(())
}

fn set(table: &mut Table, key: &str, text: &str) -> Result<()> {
    let parts: Vec<&str> = key.split('.').collect();
    // A name or path that looks like a number is still a name.
    let innermost = if expects_text(table, &parts) {
        Value::String(text.to_owned())
    } else {
        parse_value(text)
    };
    let nested = parts.iter().rev().fold(innermost, |value, part| {
        Value::Table(Table::from_iter([((*part).to_owned(), value)]))
    });
    let Value::Table(layer) = nested else {
        unreachable!("a key has at least one part")
    };
    merge(table, layer, "")
}

fn expects_text(table: &Table, parts: &[&str]) -> bool {
    let mut value = table.get(parts[0]);
    for part in &parts[1..] {
        value = value.and_then(|value| value.get(part));
    }
    matches!(value, Some(Value::String(_)))
}

fn parse_value(text: &str) -> Value {
    format!("value = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn convert(key: &str, old: &Value, new: Value) -> Result<Value> {
    if key == "image_size" {
        return match ImageSize::deserialize(new.clone()) {
            Ok(_) => Ok(new),
            Err(error) => Err(Error::Value {
                key: key.to_owned(),
                value: new.to_string(),
                expected: error.to_string().trim().to_owned(),
            }),
        };
    }
    match (old, new) {
        (Value::Float(_), Value::Integer(number)) => Ok(Value::Float(number as f64)),
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            let converted = old.iter().zip(new).map(|(old, new)| convert(key, old, new));
            Ok(Value::Array(converted.collect::<Result<_>>()?))
        }
        // Of any length; there are none but of whole numbers.
        (Value::Array(old), Value::Array(new)) if old.is_empty() => {
            let whole = Value::Integer(0);
            let converted = new.into_iter().map(|new| convert(key, &whole, new));
            Ok(Value::Array(converted.collect::<Result<_>>()?))
        }
        (Value::Array(old), new) => Err(Error::Value {
            key: key.to_owned(),
            value: new.to_string(),
            expected: match old.len() {
                0 => "a list of whole numbers".into(),
                length => format!("a list of {length} values"),
            },
        }),
        (Value::Integer(_), Value::Integer(number)) if number < 0 => Err(Error::Value {
            key: key.to_owned(),
            value: number.to_string(),
            expected: "a whole number from 0 up".into(),
        }),
        (old, new) if old.same_type(&new) => Ok(new),
        (old, new) => Err(Error::Value {
            key: key.to_owned(),
            value: new.to_string(),
            expected: match old {
                Value::Integer(_) => "a whole number from 0 up".into(),
                Value::Float(_) => "a number".into(),
                Value::Boolean(_) => "true or false".into(),
                Value::Table(_) => "a section of keys".into(),
                _ => "text".into(),
            },
        }),
    }
}

/// As they are written.
pub(super) fn names<T: Serialize>(variants: &[T]) -> Vec<String> {
    variants
        .iter()
        .filter_map(|variant| Value::try_from(variant).ok()?.as_str().map(str::to_owned))
        .collect()
}

fn check_choices(table: &Table, choices: &[Choice]) -> Result<()> {
    for (key, allowed) in choices {
        let mut value = &Value::Table(table.clone());
        for part in key.split('.') {
            value = &value[part];
        }
        let given = value.as_str().unwrap_or_default();
        if !allowed.iter().any(|name| name == given) {
            return Err(Error::Value {
                key: (*key).to_owned(),
                value: given.to_owned(),
                expected: one_of(allowed, given),
            });
        }
    }
    Ok(())
}
