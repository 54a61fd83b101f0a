//! What a run was started on, so that a later command can tell whether it is still there.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::source::{Entry, Source};

const FORMAT: u32 = 1;
const LISTED: usize = 5;

/// Names and sizes of a data set's images in the order of their numbers, which of them were readable, and the classes that
/// stand beside them. A file whose content changes and whose size does not goes unnoticed.
pub struct Index {
    /// One record a line.
    records: Vec<u8>,
    /// Whether a record without a class says that none stood beside the image.
    tells_classes: bool,
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: u32,
    blake3: String,
    /// Older records leave all classes out.
    #[serde(default)]
    tells_classes: bool,
}

/// Name, bytes, whether it was readable, and the class that stands beside it, if any.
#[derive(Serialize, Deserialize)]
struct Record<'a>(
    Cow<'a, str>,
    u64,
    bool,
    #[serde(default, skip_serializing_if = "Option::is_none")] Option<Cow<'a, str>>,
);

/// How the images of an index differ from those that are there.
#[derive(Default)]
pub(super) struct Changes {
    added: Few,
    gone: Few,
    changed: Few,
    relabelled: Few,
}

#[derive(Default)]
struct Few {
    count: usize,
    first: Vec<String>,
}

impl Index {
    pub(super) fn of(source: &Source, readable: impl Iterator<Item = bool>) -> Self {
        let classes = source.classes_beside();
        let mut records = Vec::new();
        for (entry, readable) in source.entries.iter().zip(readable) {
            let class = entry.label.map(|label| classes[&label].into());
            let record = Record((*entry.name).into(), entry.bytes, readable, class);
            serde_json::to_writer(&mut records, &record).expect("a record is valid JSON");
            records.push(b'\n');
        }
        Self {
            records,
            tells_classes: true,
        }
    }

    /// As a file: a line with a hash of the others, then the records.
    pub fn to_bytes(&self) -> Vec<u8> {
        let head = Head {
            format: FORMAT,
            blake3: self.fingerprint(),
            tells_classes: self.tells_classes,
        };
        let mut bytes = serde_json::to_vec(&head).expect("a head is valid JSON");
        bytes.push(b'\n');
        bytes.extend(&self.records);
        bytes
    }

    /// From the bytes of a file; an error where they are not whole.
    pub fn from_bytes(mut bytes: Vec<u8>) -> Result<Self, String> {
        let head_length = bytes
            .iter()
            .position(|&byte| byte == b'\n')
            .ok_or("its first line is not whole")?;
        let records = bytes.split_off(head_length + 1);
        let head: Head = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        if head.format != FORMAT {
            return Err(format!(
                "it has format {}, this program reads {FORMAT}",
                head.format
            ));
        }
        let index = Self {
            records,
            tells_classes: head.tells_classes,
        };
        if index.fingerprint() != head.blake3 {
            return Err("it is not what its hash says".into());
        }
        Ok(index)
    }

    /// BLAKE3 of the records.
    pub fn fingerprint(&self) -> String {
        blake3::hash(&self.records).to_hex().to_string()
    }

    /// Which of the images of `source` were readable, or what has changed. Both are sorted by name.
    pub(super) fn compare(
        &self,
        source: &Source,
    ) -> Result<Result<Vec<bool>, Changes>, serde_json::Error> {
        let classes = source.classes_beside();
        let class_of = |entry: &Entry| entry.label.map(|label| classes[&label]);
        let mut changes = Changes::default();
        let mut readable = Vec::with_capacity(source.entries.len());
        let mut found = source.entries.iter().peekable();
        let lines = self.records.split(|&byte| byte == b'\n');
        for line in lines.filter(|line| !line.is_empty()) {
            let Record(name, bytes, was_readable, class) = serde_json::from_slice(line)?;
            while let Some(entry) = found.next_if(|entry| *entry.name < *name) {
                changes.added.add(&entry.name);
            }
            match found.next_if(|entry| *entry.name == *name) {
                None => changes.gone.add(&name),
                Some(entry) if entry.bytes != bytes => changes.changed.add(&name),
                Some(entry)
                    if (self.tells_classes || class.is_some())
                        && class.as_deref() != class_of(entry) =>
                {
                    changes.relabelled.add(&name);
                }
                Some(_) => readable.push(was_readable),
            }
        }
        for entry in found {
            changes.added.add(&entry.name);
        }
        let Changes {
            added,
            gone,
            changed,
            relabelled,
        } = &changes;
        let kinds = [added, gone, changed, relabelled];
        Ok(if kinds.iter().all(|kind| kind.count == 0) {
            Ok(readable)
        } else {
            Err(changes)
        })
    }
}

impl Few {
    fn add(&mut self, name: &str) {
        self.count += 1;
        if self.first.len() < LISTED {
            self.first.push(name.to_owned());
        }
    }
}

impl std::fmt::Display for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let kinds = [
            (&self.added, "added"),
            (&self.gone, "gone"),
            (&self.changed, "of another size"),
            (&self.relabelled, "of another class"),
        ];
        let parts: Vec<String> = kinds
            .iter()
            .filter(|(few, _)| few.count > 0)
            .map(|(few, kind)| {
                let more = if few.count > LISTED { ", …" } else { "" };
                format!("{} {kind} ({}{more})", few.count, few.first.join(", "))
            })
            .collect();
        f.write_str(&parts.join(", "))
    }
}
