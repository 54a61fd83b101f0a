//! Where images with boxes lie, and which file is meant by the name that an annotation file gives it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::{Entry, Source};
use crate::error::{Error, Result};

/// Names that a message lists.
const LISTED: usize = 5;

/// Where images with boxes come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Origin {
    /// A COCO JSON file, or a `.tar` or folder that holds it.
    pub path: PathBuf,
    /// A folder or `.tar` of the images. Empty: `path` itself, or for a JSON file its folder, or the one above where
    /// that is called `annotations`.
    pub images: PathBuf,
    /// A piece of the annotation file's name, such as `val`, where `path` holds several; of a JSON file its own name has
    /// it.
    pub part: String,
}

impl Origin {
    /// Where the images to score lie that go with those of `self`: at `path`, else in another `part` of it, else nowhere.
    pub fn to_score(&self, path: &Path, images: &Path, part: &str) -> Self {
        if path.as_os_str().is_empty() && part.is_empty() {
            return Self::default();
        }
        let or_own = |given: &Path, own: &Path| match given.as_os_str().is_empty() {
            true => own.to_owned(),
            false => given.to_owned(),
        };
        Self {
            path: or_own(path, &self.path),
            images: or_own(images, &self.images),
            part: part.to_owned(),
        }
    }

    /// As settings in `section`; what is empty is left as it is there.
    pub fn settings(&self, section: &str) -> Vec<(String, String)> {
        let fields = [
            ("path", self.path.display().to_string()),
            ("images", self.images.display().to_string()),
            ("part", self.part.clone()),
        ];
        let given = fields.into_iter().filter(|(_, value)| !value.is_empty());
        given
            .map(|(key, value)| (format!("{section}.{key}"), value))
            .collect()
    }

    /// Names of the annotation files: the JSON file itself, or every `.json` in the `.tar` or folder.
    pub fn annotation_files(&self) -> Result<Vec<String>> {
        if is_json(&self.path) {
            return Ok(vec![self.path.display().to_string()]);
        }
        let documents = self.source()?.documents;
        Ok(documents.iter().map(|d| d.name.to_string()).collect())
    }

    /// An error where the path is a `.json` that is not the part asked for.
    pub(super) fn check_part(&self) -> Result<()> {
        let name = self.path.file_name().unwrap_or_default();
        if !is_json(&self.path) || name.to_string_lossy().contains(&self.part) {
            return Ok(());
        }
        let message = format!(
            "has no `{}` in its name, and a .json is one part only; give the .json that is meant (with --val where it \
             is to be scored in training), or a .tar or folder that holds all parts",
            self.part
        );
        Err(Error::data(&self.path, message))
    }

    /// Reads the annotation file and lists the images.
    pub(super) fn load(&self) -> Result<Loaded> {
        self.check_part()?;
        let elsewhere = !self.images.as_os_str().is_empty();
        if elsewhere && !self.images.exists() {
            return Err(Error::Missing {
                path: self.images.clone(),
                flag: "--images",
            });
        }
        if is_json(&self.path) {
            let bytes = fs::read(&self.path).map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::Missing {
                    path: self.path.clone(),
                    flag: "--data",
                },
                _ => Error::io(&self.path)(error),
            })?;
            let images = match elsewhere {
                true => self.images.clone(),
                false => images_beside(&self.path),
            };
            return Ok(Loaded {
                path: self.path.clone(),
                bytes,
                source: Source::open(&images)?,
                folders: vec![String::new()],
            });
        }
        let source = self.source()?;
        let document = self.choose(&source.documents)?;
        let path = self.path.join(&*document.name);
        let bytes = source
            .read(document)
            .map_err(|reason| Error::data(&path, reason))?;
        let folders = match elsewhere {
            true => vec![String::new()],
            false => folders_above(&document.name),
        };
        let source = match elsewhere {
            true => Source::open(&self.images)?,
            false => source,
        };
        Ok(Loaded {
            path,
            bytes,
            source,
            folders,
        })
    }

    /// What lies at the path; images have to be there where they are not elsewhere.
    fn source(&self) -> Result<Source> {
        match self.images.as_os_str().is_empty() {
            true => Source::open(&self.path),
            false => Source::list(&self.path),
        }
    }

    fn choose<'a>(&self, documents: &'a [Entry]) -> Result<&'a Entry> {
        let fitting: Vec<&Entry> = documents
            .iter()
            .filter(|document| document.name.contains(&self.part))
            .collect();
        let message = match fitting[..] {
            [only] => return Ok(only),
            [] if documents.is_empty() => "holds no annotation file; give COCO's .json".to_owned(),
            [] => format!(
                "no annotation file has `{}` in its name; there are {}",
                self.part,
                first_names(documents.iter())
            ),
            _ => format!(
                "several annotation files fit: {}; say which by a piece of its name, such as train or val",
                first_names(fitting.iter().copied())
            ),
        };
        Err(Error::data(&self.path, message))
    }
}

fn first_names<'a>(documents: impl Iterator<Item = &'a Entry>) -> String {
    let names: Vec<&str> = documents
        .take(LISTED)
        .map(|document| &*document.name)
        .collect();
    names.join(", ")
}

/// An annotation file, and where its images are looked for.
pub(super) struct Loaded {
    /// The annotation file; of a `.tar` or folder, with the name it has in there.
    pub path: PathBuf,
    /// What it says.
    pub bytes: Vec<u8>,
    /// The images.
    pub source: Source,
    /// Where file names may begin, the most likely first; each empty or with a `/` at its end.
    folders: Vec<String>,
}

impl Loaded {
    /// Numbers of the images with these names, or why there is none; other images are forgotten.
    pub fn keep_only<'a>(
        &mut self,
        names: impl Iterator<Item = &'a str>,
    ) -> Vec<Result<usize, String>> {
        let mut wanted: Vec<Result<usize, String>> = {
            let files = Names::new(&self.source, &self.folders);
            names.map(|name| files.find(name)).collect()
        };
        let mut numbers = vec![None; self.source.entries.len()];
        for &entry in wanted.iter().flatten() {
            numbers[entry] = Some(0);
        }
        for (number, next) in numbers.iter_mut().flatten().zip(0..) {
            *number = next;
        }
        let mut of_entry = numbers.iter();
        let is_wanted = |_: &Entry| of_entry.next().is_some_and(Option::is_some);
        self.source.entries.retain(is_wanted);
        for entry in wanted.iter_mut().flatten() {
            *entry = numbers[*entry].expect("it is wanted");
        }
        wanted
    }
}

fn is_json(path: &Path) -> bool {
    let json = |extension: &OsStr| extension.eq_ignore_ascii_case("json");
    path.extension().is_some_and(json) && !path.is_dir()
}

fn images_beside(json: &Path) -> PathBuf {
    let above = |path: &Path| match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    let folder = above(json);
    match folder.file_name() {
        Some(name) if name == "annotations" => above(&folder),
        _ => folder,
    }
}

/// `a/b/c.json` to `a/b/`, `a/` and nothing.
fn folders_above(name: &str) -> Vec<String> {
    let ends = name.rmatch_indices('/').map(|(at, _)| at + 1);
    ends.chain([0]).map(|end| name[..end].to_owned()).collect()
}

/// Finds files by the names that annotations give them.
struct Names<'a> {
    source: &'a Source,
    folders: &'a [String],
    of_file: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Names<'a> {
    fn new(source: &'a Source, folders: &'a [String]) -> Self {
        let mut of_file: HashMap<&str, Vec<usize>> = HashMap::new();
        for (number, entry) in source.entries.iter().enumerate() {
            of_file
                .entry(file_of(&entry.name))
                .or_default()
                .push(number);
        }
        Self {
            source,
            folders,
            of_file,
        }
    }

    /// The image below one of the folders; else the only one whose path ends in `name`, or whose path `name` ends in.
    fn find(&self, name: &str) -> Result<usize, String> {
        let name = name.replace('\\', "/");
        let name = name.trim_start_matches("./");
        let same_file = self
            .of_file
            .get(file_of(name))
            .map_or(&[][..], Vec::as_slice);
        let path = |number: usize| &*self.source.entries[number].name;
        for folder in self.folders {
            let exact =
                |number: &&usize| path(**number).strip_prefix(folder.as_str()) == Some(name);
            if let Some(&number) = same_file.iter().find(exact) {
                return Ok(number);
            }
        }
        let ends_in = |long: &str, short: &str| {
            long.strip_suffix(short)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        };
        let fitting: Vec<usize> = same_file
            .iter()
            .copied()
            .filter(|&number| ends_in(path(number), name) || ends_in(name, path(number)))
            .collect();
        match fitting[..] {
            [only] => Ok(only),
            [] => Err(format!(
                "there is no such image below {}",
                self.source.path().display()
            )),
            [first, second, ..] => Err(format!(
                "several images may be meant, {} and {} among them",
                path(first),
                path(second)
            )),
        }
    }
}

fn file_of(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_looked_for_beside_the_annotations_and_above() {
        assert_eq!(folders_above("a/b/c.json"), ["a/b/", "a/", ""]);
        assert_eq!(folders_above("c.json"), [""]);
        assert_eq!(
            images_beside(Path::new("x/annotations/y.json")),
            Path::new("x")
        );
        assert_eq!(images_beside(Path::new("x/y.json")), Path::new("x"));
        assert_eq!(
            images_beside(Path::new("annotations/y.json")),
            Path::new(".")
        );
        assert_eq!(images_beside(Path::new("y.json")), Path::new("."));
    }
}
