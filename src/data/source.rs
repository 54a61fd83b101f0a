//! Where the bytes of images lie: files of a folder, members of a tar read in place, or the built-in tar.

use std::fs::{self, File};
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use crate::error::{Error, Result};

/// The name of the data set inside the program.
pub const BUILTIN: &str = "builtin:cifar10";

static BUILTIN_TAR: &[u8] = include_bytes!("../../assets/cifar10-6000.tar");

const EXTENSIONS: &[&str] = &[
    "jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm",
];

/// An image that has not been opened yet.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Path below the data set's root, with `/` between folders.
    pub name: String,
    location: Location,
}

#[derive(Clone, Debug)]
enum Location {
    File(PathBuf),
    Range { offset: u64, bytes: u64 },
}

/// A data set's files.
pub(super) struct Source {
    path: PathBuf,
    store: Store,
    /// Images, sorted by name.
    pub entries: Vec<Entry>,
    /// Files that are no images by their extension.
    pub others: usize,
}

enum Store {
    Folder,
    Tar(Mutex<File>),
    Memory(&'static [u8]),
}

impl Source {
    /// Lists a folder, a `.tar` or [`BUILTIN`].
    pub fn open(path: &Path) -> Result<Self> {
        let mut source = if path
            .to_str()
            .is_some_and(|text| text.starts_with("builtin:"))
        {
            if path != Path::new(BUILTIN) {
                return Err(Error::Unknown {
                    what: "built-in data set",
                    given: path.display().to_string(),
                    nearest: Some(BUILTIN.into()),
                });
            }
            Self::tar(path, Cursor::new(BUILTIN_TAR), Store::Memory(BUILTIN_TAR))?
        } else if path.is_dir() {
            Self::folder(path)?
        } else if path.is_file() {
            if !extension(path).eq_ignore_ascii_case("tar") {
                return Err(Error::data(
                    path,
                    "is a single file; give a folder of images or a .tar of them",
                ));
            }
            let file = File::open(path).map_err(Error::io(path))?;
            let reader = file.try_clone().map_err(Error::io(path))?;
            Self::tar(path, reader, Store::Tar(Mutex::new(file)))?
        } else {
            return Err(Error::Missing {
                path: path.to_owned(),
                flag: "--data",
            });
        };
        if source.entries.is_empty() {
            let message = if source.others == 0 {
                "holds no files; put images into it".to_owned()
            } else {
                format!(
                    "holds {} files but no image; images end in {}",
                    source.others,
                    EXTENSIONS.join(", ")
                )
            };
            return Err(Error::data(path, message));
        }
        source.entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(source)
    }

    /// The bytes of an image.
    pub fn read(&self, entry: &Entry) -> std::io::Result<Vec<u8>> {
        match (&entry.location, &self.store) {
            (Location::File(path), _) => fs::read(path),
            (&Location::Range { offset, bytes }, Store::Tar(file)) => {
                let mut file = file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                file.seek(SeekFrom::Start(offset))?;
                let mut buffer = vec![0; bytes as usize];
                file.read_exact(&mut buffer)?;
                Ok(buffer)
            }
            (&Location::Range { offset, bytes }, Store::Memory(tar)) => {
                Ok(tar[offset as usize..(offset + bytes) as usize].to_vec())
            }
            (Location::Range { .. }, Store::Folder) => {
                Err(std::io::Error::other("a folder has no ranges"))
            }
        }
    }

    fn folder(root: &Path) -> Result<Self> {
        let mut source = Self::empty(root, Store::Folder);
        let mut pending = vec![root.to_owned()];
        while let Some(folder) = pending.pop() {
            for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
                let path = entry.map_err(Error::io(&folder))?.path();
                if path.is_dir() {
                    pending.push(path);
                } else {
                    let name = path
                        .strip_prefix(root)
                        .unwrap_or(&path)
                        .components()
                        .map(|part| part.as_os_str().to_string_lossy())
                        .collect::<Vec<_>>()
                        .join("/");
                    source.add(name, Location::File(path));
                }
            }
        }
        Ok(source)
    }

    fn tar(path: &Path, reader: impl Read + Seek, store: Store) -> Result<Self> {
        let mut source = Self::empty(path, store);
        let broken = |error: std::io::Error| {
            Error::data(
                path,
                format!("not a readable tar ({error}); is it truncated?"),
            )
        };
        let mut reader = reader;
        let length = reader.seek(SeekFrom::End(0)).map_err(broken)?;
        reader.seek(SeekFrom::Start(0)).map_err(broken)?;
        let mut archive = tar::Archive::new(reader);
        for member in archive.entries_with_seek().map_err(broken)? {
            let member = member.map_err(broken)?;
            let name = member.path().map_err(broken)?.into_owned();
            if !name
                .components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
            {
                return Err(Error::data(
                    path,
                    format!(
                        "member `{}` points outside the archive; make the tar anew with relative names",
                        name.display()
                    ),
                ));
            }
            let (offset, bytes) = (member.raw_file_position(), member.size());
            if offset.checked_add(bytes).is_none_or(|end| end > length) {
                return Err(Error::data(
                    path,
                    format!("truncated: member `{}` goes beyond its end", name.display()),
                ));
            }
            if member.header().entry_type().is_file() {
                let name = name
                    .components()
                    .filter(|part| matches!(part, Component::Normal(_)))
                    .map(|part| part.as_os_str().to_string_lossy())
                    .collect::<Vec<_>>()
                    .join("/");
                source.add(name, Location::Range { offset, bytes });
            }
        }
        Ok(source)
    }

    fn empty(path: &Path, store: Store) -> Self {
        Self {
            path: path.to_owned(),
            store,
            entries: Vec::new(),
            others: 0,
        }
    }

    fn add(&mut self, name: String, location: Location) {
        let hidden = name
            .rsplit('/')
            .next()
            .is_some_and(|file| file.starts_with('.'));
        let extension = extension(Path::new(&name)).to_ascii_lowercase();
        if !hidden && EXTENSIONS.contains(&extension.as_str()) {
            self.entries.push(Entry { name, location });
        } else if !hidden {
            self.others += 1;
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn extension(path: &Path) -> &str {
    path.extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or_default()
}
