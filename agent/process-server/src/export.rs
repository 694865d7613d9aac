//! A recovery point as a plain disk image.
//!
//! *Consistency.* The image is written under a temporary name beside its place, synced, and renamed: under its own name
//! there is a whole image or none. Every byte is read through the point's view, which verifies it. *Retries.* None: the
//! operator repeats the export. *Cancellation.* Dropping the future of a conversion ends `qemu-img`; a raw copy ends at
//! its next batch when `stop` says so. Both remove what they began. *Crash.* A temporary file `.NAME.<id>.partial` stays and
//! may be removed.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use tidemark_base::disk::{Allocation, Disk, is_zero};
use tidemark_base::stop::Stop;
use tidemark_base::storage::{OpenMode, RealStorage, Storage, os_error};
use tidemark_base::{DiskId, MarkId};
use tidemark_proto::control::{Failure, FailureKind, ImageFormat};
use tokio::process::Command;

/// What is read and written at once.
const BATCH_BYTES: u64 = 4 << 20;
/// Zeroes inside data become holes in this unit.
const HOLE_BYTES: usize = 64 << 10;
/// What is kept of what qemu-img says.
const MESSAGE_BYTES_MAX: usize = 2000;

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{path} exists already")]
    Exists { path: PathBuf },
    #[error("{path} cannot be an image's name")]
    Name { path: PathBuf },
    #[error("the machine has {disks} disks, and {path} is one file")]
    ManyDisks { path: PathBuf, disks: usize },
    #[error("the point cannot be read")]
    Read { source: io::Error },
    #[error("{path} cannot be written")]
    Write { path: PathBuf, source: io::Error },
    #[error("no room for {path}")]
    NoRoom { path: PathBuf, source: io::Error },
    #[error("qemu-img is not installed, and only it can write {format} images")]
    QemuImgMissing { format: &'static str },
    #[error("qemu-img failed to write {path}: {message}")]
    QemuImg { path: PathBuf, message: String },
    #[error("the export was stopped; nothing of it was kept")]
    Stopped,
}

impl ExportError {
    pub fn help(&self) -> &'static str {
        match self {
            ExportError::Exists { .. } => "choose another name, or remove the file first",
            ExportError::Name { .. } => "give the path of a file, or of a folder that exists",
            ExportError::ManyDisks { .. } => "give a folder that exists; each disk becomes a file in it",
            ExportError::Read { .. } => "choose another recovery point, and run `tidemark point verify` on this one",
            ExportError::Write { .. } => "check that the folder exists and that the process server may write there",
            ExportError::NoRoom { .. } => "free some room, or give a place on another volume",
            ExportError::QemuImgMissing { .. } => {
                "install it (`apt install qemu-utils`), or export with `--format raw`, which needs nothing"
            }
            ExportError::QemuImg { .. } => "see its message; `--format raw` needs no qemu-img",
            ExportError::Stopped => "export again",
        }
    }

    fn kind(&self) -> FailureKind {
        match self {
            ExportError::Exists { .. } => FailureKind::Conflict,
            ExportError::Name { .. } | ExportError::ManyDisks { .. } => FailureKind::BadRequest,
            ExportError::Read { source } if source.kind() == io::ErrorKind::InvalidData => FailureKind::Damaged,
            ExportError::Stopped => FailureKind::Unavailable,
            _ => FailureKind::Failed,
        }
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        Failure::from_error(error.kind(), &error, error.help())
    }
}

/// Where each disk's image goes: `to` itself for one disk, or files named by disk in the folder `to`.
pub fn targets(to: &Path, disks: &[DiskId], format: ImageFormat) -> Result<Vec<PathBuf>, ExportError> {
    if to.is_dir() {
        return Ok(disks.iter().map(|disk| to.join(format!("{disk}.{}", format.ending()))).collect());
    }
    match disks {
        [_] => Ok(vec![to.to_owned()]),
        _ => Err(ExportError::ManyDisks { path: to.to_owned(), disks: disks.len() }),
    }
}

/// Whether images could be written there now: what is made for it goes again.
pub fn try_targets(to: &Path, disks: &[DiskId]) -> Result<(), ExportError> {
    for path in targets(to, disks, ImageFormat::Raw)? {
        let partial = Partial::new(&path)?;
        partial.folder.open(&partial.partial, OpenMode::Create).map_err(|error| partial.failed(error))?;
    }
    Ok(())
}

/// An image that was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    pub path: PathBuf,
    pub bytes: u64,
}

/// A file that is being made; removed unless it is finished.
struct Partial {
    folder: Arc<dyn Storage>,
    path: PathBuf,
    name: String,
    partial: String,
    finished: bool,
}

impl Partial {
    fn new(path: &Path) -> Result<Self, ExportError> {
        let invalid = || ExportError::Name { path: path.to_owned() };
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(invalid)?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = RealStorage::open_folder(parent);
        match path.symlink_metadata() {
            Ok(_) => return Err(ExportError::Exists { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ExportError::Write { path: path.to_owned(), source }),
        }
        let partial = format!(".{name}.{}.partial", MarkId::random());
        Ok(Self { folder, path: path.to_owned(), name, partial, finished: false })
    }

    fn partial_path(&self) -> PathBuf {
        self.folder.path(&self.partial)
    }

    fn failed(&self, source: io::Error) -> ExportError {
        let path = self.path.clone();
        match os_error(&source) {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ExportError::NoRoom { path, source },
            _ => ExportError::Write { path, source },
        }
    }

    /// Synced and under its own name when this returns. What appeared under that name meanwhile is not replaced.
    fn finish(mut self) -> Result<u64, ExportError> {
        let file = self.folder.open(&self.partial, OpenMode::ReadWrite).map_err(|error| self.failed(error))?;
        file.sync().map_err(|error| self.failed(error))?;
        let bytes = file.bytes().map_err(|error| self.failed(error))?;
        drop(file);
        match std::fs::hard_link(self.partial_path(), &self.path) {
            // The temporary name goes with `self`.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(ExportError::Exists { path: self.path.clone() });
            }
            // A file system without hard links.
            Err(_) if self.path.symlink_metadata().is_ok() => {
                return Err(ExportError::Exists { path: self.path.clone() });
            }
            Err(_) => {
                self.folder.rename(&self.partial, &self.name).map_err(|error| self.failed(error))?;
                self.finished = true;
            }
        }
        self.folder.sync_folder("").map_err(|error| self.failed(error))?;
        Ok(bytes)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished {
            // It may never have been made.
            let _ = self.folder.remove(&self.partial);
        }
    }
}

/// Copies a disk to a sparse raw image, in time that its allocated parts take. Blocks.
pub fn export_raw(disk: &dyn Disk, path: &Path, stop: &Stop) -> Result<Image, ExportError> {
    let partial = Partial::new(path)?;
    let file = partial.folder.open(&partial.partial, OpenMode::Create).map_err(|error| partial.failed(error))?;
    file.set_bytes(disk.bytes()).map_err(|error| partial.failed(error))?;
    let mut buffer = vec![0; BATCH_BYTES as usize];
    let mut at = 0;
    while at < disk.bytes() {
        if stop.is_stopped() {
            return Err(ExportError::Stopped);
        }
        let (run, kind) = disk.allocation(at).map_err(|source| ExportError::Read { source })?;
        if kind == Allocation::Hole {
            at += run;
            continue;
        }
        let batch = &mut buffer[..run.min(BATCH_BYTES) as usize];
        disk.read_at(at, batch).map_err(|source| ExportError::Read { source })?;
        for (index, part) in batch.chunks(HOLE_BYTES).enumerate() {
            if !is_zero(part) {
                let offset = at + (index * HOLE_BYTES) as u64;
                file.write_at(offset, part).map_err(|error| partial.failed(error))?;
            }
        }
        at += batch.len() as u64;
    }
    drop(file);
    let bytes = partial.finish()?;
    Ok(Image { path: path.to_owned(), bytes })
}

/// Has `qemu-img` copy what is served at `nbd` into an image of its formats.
pub async fn export_with_qemu(
    qemu_img: &Path,
    nbd: &str,
    format: ImageFormat,
    path: &Path,
) -> Result<Image, ExportError> {
    let partial = Partial::new(path)?;
    let output = Command::new(qemu_img)
        .args(["convert", "-f", "raw", "-t", "writeback", "-O", format.qemu_name()])
        .args(format.qemu_options().into_iter().flat_map(|options| ["-o", options]))
        .arg(nbd)
        .arg(partial.partial_path())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output()
        .await;
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let message: String = said.trim().chars().take(MESSAGE_BYTES_MAX).collect();
            let message = if message.is_empty() { output.status.to_string() } else { message };
            return Err(ExportError::QemuImg { path: path.to_owned(), message });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ExportError::QemuImgMissing { format: format.name() });
        }
        Err(error) => {
            return Err(ExportError::QemuImg { path: path.to_owned(), message: error.to_string() });
        }
    }
    // Its caches were written back; whether they are on the disk only a sync says.
    let finishing = tokio::task::spawn_blocking(move || partial.finish());
    let bytes = finishing
        .await
        .unwrap_or_else(|error| Err(ExportError::Write { path: path.to_owned(), source: io::Error::other(error) }))?;
    Ok(Image { path: path.to_owned(), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use tidemark_base::disk::{Access, FileDisk};

    fn source(folder: &Path) -> FileDisk {
        let path = folder.join("source.img");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 70_000], 1 << 20).unwrap();
        file.write_all_at(&vec![0; 8 << 20], 16 << 20).unwrap();
        file.write_all_at(&[9; 512], (64 << 20) - 512).unwrap();
        FileDisk::open(&path, Access::Read).unwrap()
    }

    #[test]
    fn a_raw_image_is_equal_and_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let disk = source(folder.path());
        let path = folder.path().join("out.raw");
        let image = export_raw(&disk, &path, &Stop::new()).unwrap();
        let (expected, found) = (std::fs::read(disk.path()).unwrap(), std::fs::read(&path).unwrap());
        assert!(expected == found);
        assert_eq!(image.bytes, expected.len() as u64);
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 2 << 20, "zeroes take no room");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
        // What is there is never overwritten.
        assert!(matches!(export_raw(&disk, &path, &Stop::new()), Err(ExportError::Exists { .. })));
    }

    #[test]
    fn what_appears_under_the_name_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.raw");
        let partial = Partial::new(&path).unwrap();
        let put = |name: &str, content: &[u8]| {
            partial.folder.open(name, OpenMode::Create).unwrap().write_at(0, content).unwrap();
        };
        put(&partial.partial, b"image");
        put("out.raw", b"somebody's");
        assert!(matches!(partial.finish(), Err(ExportError::Exists { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[test]
    fn what_fails_or_stops_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let disk = source(folder.path());
        let stop = Stop::new();
        stop.stop();
        let stopped = export_raw(&disk, &folder.path().join("out.raw"), &stop);
        assert!(matches!(stopped, Err(ExportError::Stopped)));
        let nowhere = export_raw(&disk, &folder.path().join("absent/out.raw"), &Stop::new());
        assert!(matches!(nowhere, Err(ExportError::Write { .. })), "{nowhere:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn without_qemu_img_it_says_what_to_install() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.qcow2");
        let absent = Path::new("/nonexistent/qemu-img");
        let error = export_with_qemu(absent, "nbd://nowhere", ImageFormat::Qcow2, &path).await.unwrap_err();
        assert!(matches!(error, ExportError::QemuImgMissing { .. }) && error.help().contains("qemu-utils"));
        if let Ok(found) =
            export_with_qemu(Path::new("qemu-img"), "nbd+unix:///x?socket=/nonexistent", ImageFormat::Qcow2, &path)
                .await
        {
            panic!("nothing is served there: {found:?}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn several_disks_need_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let disks = [DiskId::random(), DiskId::random()];
        let files = targets(folder.path(), &disks, ImageFormat::Vhdx).unwrap();
        assert_eq!(files[1], folder.path().join(format!("{}.vhdx", disks[1])));
        assert!(targets(&folder.path().join("one"), &disks, ImageFormat::Raw).is_err());
        assert_eq!(targets(Path::new("one"), &disks[..1], ImageFormat::Raw).unwrap(), [PathBuf::from("one")]);
    }
}
