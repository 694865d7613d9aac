//! Disks: what is protected, and what a replica is folded onto.

#[cfg(unix)]
mod file;
#[cfg(windows)]
#[path = "disk/windows.rs"]
mod file;

use std::io;
use std::path::PathBuf;

use crate::{Extent, SECTOR_BYTES};

/// What is known of a range without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    Data,
    /// Reads as zeroes and occupies nothing.
    Hole,
}

/// Whether a write must be on stable storage when it returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    Cached,
    /// Forced unit access.
    Durable,
}

pub trait Disk: Send + Sync {
    fn bytes(&self) -> u64;
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()>;
    /// Makes a range read as zeroes; gives its room back where `discard` allows it and the disk can.
    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()>;
    /// Everything written before is on stable storage when this returns. Once it failed it fails for ever: the page
    /// cache forgets what it could not write.
    fn flush(&self) -> io::Result<()>;
    /// The run of one kind that begins at `offset` (which lies on the disk): its length and what it is.
    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)>;
}

/// A disk that another program has open and reads for us; nobody of ours writes to it.
pub trait RemoteDisk: Send + Sync {
    fn bytes(&self) -> u64;
    /// The size that it has now.
    fn current_bytes(&self) -> io::Result<u64>;
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// As [`Disk::allocation`].
    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)>;
}

/// One of several writes that go to a disk together.
#[derive(Clone, Copy, Debug)]
pub struct DiskWrite<'a> {
    pub offset: u64,
    pub data: &'a [u8],
    pub durability: Durability,
}

/// A disk inside a file of a format that another program reads and writes for us.
///
/// *Crash.* What was changed when a call returned is kept as a plain file's content is: it outlives the end of this process, and of
/// that program, however they end.
pub trait ImageDisk: Disk {
    /// Writes that do not overlap; each gets a result.
    fn write_many(&self, writes: &[DiskWrite<'_>], results: &mut [io::Result<()>]);

    /// As [`FileDisk::has_failed_to_sync`].
    fn has_failed_to_sync(&self) -> bool;

    /// How often that program ended and was started again.
    fn restarts(&self) -> u64;

    /// That program ends. When this returns nobody of ours touches the file any more, and later calls fail.
    fn close(&self) -> io::Result<()>;
}

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk {path} does not exist")]
    Absent { path: PathBuf },
    #[error("disk {path} is in use by another program")]
    InUse { path: PathBuf },
    #[error("disk {path} is read-only")]
    ReadOnly { path: PathBuf },
    #[error("disk {path} has {bytes} bytes, which is not a positive multiple of {SECTOR_BYTES}")]
    OddSize { path: PathBuf, bytes: u64 },
    #[error("{path} is neither a file nor a block device")]
    Kind { path: PathBuf },
    #[error("cannot open disk {path}")]
    Open { path: PathBuf, source: io::Error },
}

impl DiskError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            DiskError::Absent { .. } => "check the path; a disk image must exist before it is protected",
            DiskError::InUse { .. } => {
                "stop the program that has it open, or point that program at the address that Tidemark serves; it may be the agent itself, by another name of the same file (`tidemark status`)"
            }
            DiskError::ReadOnly { .. } => {
                "give the agent write access to it: a protected disk is written through the agent"
            }
            DiskError::OddSize { .. } => "grow it to a multiple of 512 bytes, for example with `truncate -s %512 FILE`",
            DiskError::Kind { .. } => "name a raw disk image or a block device",
            DiskError::Open { .. } => "see the system's message",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read,
    /// Read and write, with a lock that keeps other programs out.
    Exclusive,
    /// Read what others write meanwhile: past the page cache, which does not see writes that a mounted file system submits. Never
    /// written or synced.
    Observe,
}

/// Which file or device it is, to tell whether anyone wrote while nobody watched.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct DiskIdentity {
    pub device: u64,
    pub inode: u64,
    pub bytes: u64,
    pub changed_ns: i128,
    pub modified_ns: i128,
    /// When the file was made, where the file system remembers that: an inode number is used again.
    #[serde(default)]
    pub born_ns: Option<i128>,
    pub is_block_device: bool,
    /// Of a VHDX file: changes with the first write of each program that opens it. Its place; a raw image has none.
    #[serde(default)]
    pub data_write_guid: Option<[u8; 16]>,
}

pub use file::FileDisk;
#[cfg(unix)]
pub use file::LockedFile;

/// Whether every byte is zero. Eight bytes at a time, from both ends first: most data differs from zero early.
pub fn is_zero(data: &[u8]) -> bool {
    let (head, words, tail) = unsafe { data.align_to::<u64>() };
    // SAFETY above: any eight bytes are a valid u64.
    head.iter().chain(tail).all(|&byte| byte == 0)
        && words.chunks(64).all(|block| block.iter().fold(0, |all, word| all | word) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_told_from_data() {
        let mut data = vec![0; 70_001];
        assert!(is_zero(&data) && is_zero(&[]));
        for place in [0, 1, 7, 8, 35_000, 69_999, 70_000] {
            data[place] = 1;
            assert!(!is_zero(&data) && !is_zero(&data[place..]), "{place}");
            data[place] = 0;
        }
    }
}
