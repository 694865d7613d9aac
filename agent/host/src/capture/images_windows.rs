//! What is named as a disk on a Windows host: a raw file alone. What is inside of an image is opened by `qemu-nbd`, on Linux; a Hyper-V
//! host's own images are read where they are imported ([`super::hrl`]), and written by nobody of ours.

use std::path::{Path, PathBuf};

use tidemark_base::disk::{Access, Disk, FileDisk};
use tidemark_base::storage::{OpenMode, RealStorage};
use tidemark_proto::control::ImageFormat;

use crate::error::HostError;

#[derive(Debug, thiserror::Error)]
pub enum DiskImageError {
    #[error("{} is named as a {format} image, which is not opened on Windows", path.display())]
    Format { path: PathBuf, format: &'static str },
}

impl DiskImageError {
    pub fn help(&self) -> &'static str {
        "protect a Hyper-V machine with `--via hrl` or `--via rct`; a plain disk is .raw or .img"
    }

    /// Another disk must be named, or this one another way.
    pub fn is_a_wrong_question(&self) -> bool {
        true
    }
}

fn refuse_images(path: &Path) -> Result<(), DiskImageError> {
    match ImageFormat::of_name(path) {
        ImageFormat::Raw => Ok(()),
        format => Err(DiskImageError::Format { path: path.to_owned(), format: format.qemu_name() }),
    }
}

/// Whether the disk could be protected, and its size. Nothing is changed.
pub fn probe(path: &Path) -> Result<u64, HostError> {
    Ok(open(path)?.bytes())
}

/// Opens it to be written, by us alone.
pub fn open(path: &Path) -> Result<FileDisk, HostError> {
    refuse_images(path)?;
    Ok(FileDisk::open(path, Access::Exclusive)?)
}

/// Makes an empty disk where there is nothing, durably.
pub fn make(path: &Path, bytes: u64) -> Result<(), HostError> {
    refuse_images(path)?;
    let failed = |source| HostError::Io { what: "make a disk", source };
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(HostError::NoName { path: path.to_owned() });
    };
    let storage = RealStorage::open_folder(folder);
    let file = storage.open(name, OpenMode::Create).map_err(failed)?;
    file.set_bytes(bytes).and_then(|()| file.sync()).and_then(|()| storage.sync_folder("")).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_disks_are_made_and_opened_and_images_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        make(&path, 1 << 20).unwrap();
        assert_eq!(probe(&path).unwrap(), 1 << 20);
        assert!(make(&path, 1 << 20).is_err(), "it is there already");
        for name in ["a.vhdx", "a.vhd", "a.qcow2", "a.vmdk"] {
            let path = folder.path().join(name);
            let refused = [probe(&path).map(drop), make(&path, 4096)].map(Result::unwrap_err);
            assert!(
                refused.iter().all(|error| matches!(error, HostError::Image(_)) && !error.help().is_empty()),
                "{name}"
            );
            assert!(!path.exists());
        }
    }
}
