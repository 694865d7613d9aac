//! Disks of a Windows host: files alone. What a Hyper-V host's disks are is read from its VHDX and `.hrl` files; the raw copy that
//! its logs are replayed onto is such a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::windows::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Access, Allocation, Disk, DiskError, DiskIdentity, Durability, ImageDisk, RemoteDisk};
use crate::platform;
use crate::{Extent, SECTOR_BYTES};

/// Who removes the file is not held up, as elsewhere.
const SHARE_READ_AND_DELETE: u32 = 5;
const SHARE_ALL: u32 = 7;
const ERROR_ACCESS_DENIED: i32 = 5;
const ERROR_WRITE_PROTECT: i32 = 19;
const ERROR_SHARING_VIOLATION: i32 = 32;
const ERROR_LOCK_VIOLATION: i32 = 33;

/// A raw disk image; or what another program reads for us, which proves as little of itself as a block device elsewhere.
pub struct FileDisk {
    file: File,
    path: PathBuf,
    bytes: u64,
    is_observed: bool,
    flush_failed: AtomicBool,
    remote: Option<Arc<dyn RemoteDisk>>,
}

/// Where nothing is, and what is written goes nowhere.
const NULL_DEVICE: &str = r"\\.\NUL";

impl FileDisk {
    /// Who writes to it shares it with readers alone: others cannot open it to write, and it cannot be opened to be written while they
    /// have it open so.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let named = || path.to_owned();
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Err(DiskError::Kind { path: named() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(DiskError::Absent { path: named() }),
            Err(source) => return Err(DiskError::Open { path: named(), source }),
        }
        let is_writer = access == Access::Exclusive;
        let mut options = OpenOptions::new();
        options.read(true).write(is_writer).share_mode(if is_writer { SHARE_READ_AND_DELETE } else { SHARE_ALL });
        let file = options.open(path).map_err(|source| match source.raw_os_error() {
            Some(ERROR_SHARING_VIOLATION | ERROR_LOCK_VIOLATION) => DiskError::InUse { path: named() },
            Some(ERROR_ACCESS_DENIED | ERROR_WRITE_PROTECT) if is_writer => DiskError::ReadOnly { path: named() },
            _ => DiskError::Open { path: named(), source },
        })?;
        let bytes = file.metadata().map_err(|source| DiskError::Open { path: named(), source })?.len();
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::OddSize { path: named(), bytes });
        }
        let (is_observed, flush_failed) = (access == Access::Observe, AtomicBool::new(false));
        Ok(Self { file, path: named(), bytes, is_observed, flush_failed, remote: None })
    }

    /// A disk that another program reads for us, under the name that it has here.
    pub fn through(path: &Path, remote: Arc<dyn RemoteDisk>) -> Result<Self, DiskError> {
        let open = |source| DiskError::Open { path: path.to_owned(), source };
        Ok(Self {
            // Not opened for writing: whoever tries is refused.
            file: File::open(NULL_DEVICE).map_err(open)?,
            path: path.to_owned(),
            bytes: remote.bytes(),
            is_observed: true,
            flush_failed: AtomicBool::new(false),
            remote: Some(remote),
        })
    }

    /// Images of other formats are not opened here.
    pub fn image(&self) -> Option<&dyn ImageDisk> {
        None
    }

    /// Nothing is written to it any more: its content and its times are on the media when this returns, and stay as they are.
    pub fn finish(&self) -> io::Result<()> {
        if self.is_observed { Ok(()) } else { self.file.sync_all() }
    }

    /// Others write to it: see [`Access::Observe`].
    pub fn is_observed(&self) -> bool {
        self.is_observed
    }

    /// Takes the room for a range now, and leaves what it reads as.
    pub fn reserve(&self, extent: Extent) -> io::Result<()> {
        platform::reserve(&self.file, extent.offset, extent.length)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size as the system says it now; differs from [`Disk::bytes`] once someone resized the disk.
    pub fn current_bytes(&self) -> io::Result<u64> {
        match &self.remote {
            Some(remote) => remote.current_bytes(),
            None => Ok(self.file.metadata()?.len()),
        }
    }

    pub fn identity(&self) -> io::Result<DiskIdentity> {
        let Some(remote) = &self.remote else { return platform::identity(&self.file) };
        Ok(DiskIdentity {
            device: 0,
            inode: 0,
            bytes: remote.current_bytes()?,
            changed_ns: 0,
            modified_ns: 0,
            born_ns: None,
            is_block_device: true,
            data_write_guid: None,
        })
    }

    /// What others read for us has no folder of its own either, and no times.
    pub fn is_block_device(&self) -> bool {
        self.remote.is_some()
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether what was written before may never reach the medium: see [`Disk::flush`].
    pub fn has_failed_to_sync(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    fn make_durable(&self, durability: Durability) -> io::Result<()> {
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.flush(),
        }
    }
}

impl Disk for FileDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match &self.remote {
            Some(remote) => remote.read_at(offset, buffer),
            None => platform::read_exact_at(&self.file, buffer, offset),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        platform::write_all_at(&self.file, data, offset)?;
        self.make_durable(durability)
    }

    fn zero(&self, extent: Extent, _discard: bool, durability: Durability) -> io::Result<()> {
        platform::zero(&self.file, extent.offset, extent.length)?;
        self.make_durable(durability)
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_observed {
            return Ok(());
        }
        if self.has_failed_to_sync() {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.file.sync_data().inspect_err(|_| self.flush_failed.store(true, Ordering::Release))
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        match &self.remote {
            Some(remote) => remote.allocation(offset),
            None => platform::allocation(&self.file, offset, self.bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_writer_is_kept_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        assert!(matches!(FileDisk::open(&path, Access::Read), Err(DiskError::Absent { .. })));
        File::create(&path).unwrap().set_len(4096).unwrap();
        let first = FileDisk::open(&path, Access::Exclusive).unwrap();
        assert!(matches!(FileDisk::open(&path, Access::Exclusive), Err(DiskError::InUse { .. })));
        assert!(File::options().write(true).open(&path).is_err());
        FileDisk::open(&path, Access::Read).unwrap();
        drop(first);
        FileDisk::open(&path, Access::Exclusive).unwrap();
    }

    #[test]
    fn what_is_written_and_zeroed_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let disk = FileDisk::open(&path, Access::Exclusive).unwrap();
        let before = disk.identity().unwrap();
        assert_eq!((before.bytes, &before), (1 << 20, &disk.identity().unwrap()));
        disk.write_at(4096, &[7; 8192], Durability::Durable).unwrap();
        disk.zero(Extent::new(8192, 512), true, Durability::Cached).unwrap();
        disk.flush().unwrap();
        let mut read = vec![1; 1 << 20];
        disk.read_at(0, &mut read).unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[4096..12288].fill(7);
        expected[8192..8704].fill(0);
        assert!(read == expected);
        let (mut at, mut data) = (0, 0);
        while at < disk.bytes() {
            let (length, kind) = disk.allocation(at).unwrap();
            let run = &expected[at as usize..(at + length) as usize];
            assert!(length > 0 && (kind == Allocation::Data || run.iter().all(|byte| *byte == 0)));
            data += if kind == Allocation::Data { length } else { 0 };
            at += length;
        }
        assert!(at == disk.bytes() && data >= 8192 - 512);
        assert_eq!(disk.read_at((1 << 20) - 10, &mut [0; 11]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
