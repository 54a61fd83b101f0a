//! Files that survive a power cut, whole or not at all. Everything a run writes goes through here.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// How names of files and folders begin that are not finished.
pub(super) const SCRATCH: &str = ".scratch-";

/// Writes `bytes` under `path`: into a scratch file beside it, flushed to the disk, then renamed. A reader sees the
/// old file or the new one, never a part.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = parent(path);
    let write = || -> std::io::Result<()> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(SCRATCH);
        // Scratch files are private by default; what is written here is a normal file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        fault::point()?;
        let mut scratch = builder.tempfile_in(folder)?;
        write_all(scratch.as_file_mut(), bytes)?;
        fault::point()?;
        scratch.as_file().sync_all()?;
        fault::point()?;
        scratch.persist(path)?;
        sync_folder(folder)
    };
    write().map_err(Error::io(path))
}

/// Appends `bytes`.
pub(super) fn write_all(file: &mut File, bytes: &[u8]) -> std::io::Result<()> {
    if let Err(error) = fault::point() {
        // What a full disk does: a part of it is written.
        file.write_all(&bytes[..bytes.len() / 2])?;
        return Err(error);
    }
    file.write_all(bytes)
}

/// Waits until a file is on the disk.
pub(super) fn sync(file: &File) -> std::io::Result<()> {
    fault::point()?;
    file.sync_all()
}

/// Makes a folder and those above it, where they are missing.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    fault::point()
        .and_then(|()| fs::create_dir_all(path))
        .map_err(Error::io(path))
}

/// Removes a folder with all that is in it, where there is one.
pub(super) fn remove_folder(path: &Path) -> Result<()> {
    match fault::point().and_then(|()| fs::remove_dir_all(path)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// Renames a folder whose files are already on the disk, and waits until the new name is.
pub(super) fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    let rename = || -> std::io::Result<()> {
        sync_folder(from)?;
        fault::point()?;
        fs::rename(from, to)?;
        sync_folder(parent(to))
    };
    rename().map_err(Error::io(to))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    fault::point()?;
    // Windows has no such call, and opening a folder fails there.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Where a test can make the disk fail.
#[cfg(not(test))]
mod fault {
    pub fn point() -> std::io::Result<()> {
        Ok(())
    }
}

/// Makes the disk fail once on this thread.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::Cell;
    use std::io::{Error, ErrorKind, Result};

    thread_local! {
        static LEFT: Cell<u64> = const { Cell::new(0) };
    }

    /// The `k`-th call from now on fails, counted from 1; 0 for none.
    pub fn fail_at(k: u64) {
        LEFT.set(k);
    }

    /// Whether the call that was to fail is still to come.
    pub fn is_pending() -> bool {
        LEFT.get() > 0
    }

    pub fn point() -> Result<()> {
        let left = LEFT.get();
        LEFT.set(left.saturating_sub(1));
        if left == 1 {
            return Err(Error::new(ErrorKind::StorageFull, "injected"));
        }
        Ok(())
    }
}
