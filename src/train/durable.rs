//! Files that survive a power cut, whole or not at all.

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
        let mut scratch = builder.tempfile_in(folder)?;
        scratch.write_all(bytes)?;
        scratch.as_file().sync_all()?;
        scratch.persist(path)?;
        sync_folder(folder)
    };
    write().map_err(Error::io(path))
}

/// Renames a folder whose files are already on the disk, and waits until the new name is.
pub(super) fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    let rename = || -> std::io::Result<()> {
        sync_folder(from)?;
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
    // Windows has no such call, and opening a folder fails there.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}
