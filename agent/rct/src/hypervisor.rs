//! What is asked of the Hyper-V host that the agent runs on. All that is decided is decided elsewhere, so that a simulator can answer in
//! its place.
//!
//! *Consistency.* Each call says what it promises. *Retries.* None. *Cancellation.* A call runs to its end or to a limit of its own. *Crash.* What a call
//! began, Hyper-V ends by itself: a checkpoint may be there that nobody heard of.

use std::io;
use std::path::{Path, PathBuf};

use tidemark_base::Extent;

use crate::error::RctError;

pub trait Hypervisor: Send + Sync {
    /// The machine that has this file for a disk, now or in one of its checkpoints.
    fn find(&self, disk: &Path) -> Result<Found, RctError>;

    /// A machine by its id.
    fn look(&self, machine: &str) -> Result<Found, RctError>;

    /// What can still be written beside a disk: there a checkpoint grows.
    fn free_bytes(&self, disk: &Path) -> Result<u64, RctError>;

    /// Makes a recovery checkpoint: one instant of all disks of the machine. From then on what it writes goes into other files, and those that
    /// the disks were in stand still. `quiet`: applications in the machine are made quiet for it.
    fn checkpoint(&self, machine: &str, quiet: bool) -> Result<Checkpoint, RctError>;

    /// Makes a reference point of a checkpoint, which is gone then: what the machine wrote since is merged into its disks. What changes is tracked
    /// from the checkpoint on, for as long as the reference point is there.
    fn convert(&self, checkpoint: &str) -> Result<ReferencePoint, RctError>;

    fn remove(&self, reference_point: &str) -> Result<(), RctError>;

    /// Has tracking begin, of a disk that nobody has open.
    fn switch_on(&self, file: &Path) -> Result<(), RctError>;

    /// Opens a file that stands still.
    fn open(&self, file: &Path) -> Result<Box<dyn Image>, RctError>;
}

/// A machine, as it is now.
#[derive(Clone, Debug)]
pub struct Found {
    pub id: String,
    pub name: String,
    pub is_off: bool,
    pub disks: Vec<Disk>,
    pub checkpoints: Vec<Checkpoint>,
    pub reference_points: Vec<ReferencePoint>,
}

#[derive(Clone, Debug)]
pub struct Disk {
    /// The file that is written to now.
    pub path: PathBuf,
    pub bytes: u64,
    /// The file below it.
    pub parent: Option<PathBuf>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    pub id: String,
    pub name: String,
    /// Made by a program that saves the machine, not by a person.
    pub is_recovery: bool,
    /// The files that hold its disks.
    pub disks: Vec<PathBuf>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReferencePoint {
    pub id: String,
    pub change_ids: Vec<String>,
}

/// A file that stands still, as far as the disk in it goes.
pub trait Image: Send + Sync {
    fn facts(&self) -> Result<Facts, RctError>;

    /// What changed since a change id, from `from` on, within `length` bytes of the disk.
    fn query(&self, since: &str, from: u64, length: u64) -> Result<Part, String>;

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    pub uuid: String,
    pub bytes: u64,
    /// The newest state that changes can be told since: this one, or an older one. `None`: nothing is tracked.
    pub change_id: Option<String>,
}

/// An answer, which may be of less than was asked: as much as fits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    pub areas: Vec<Extent>,
    /// Of how many bytes of the disk it tells, from where it was asked on.
    pub processed: u64,
}

/// Whether two names of files on a Windows host mean the same one, whatever their case.
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    let plain = |path: &Path| {
        let text = path.to_string_lossy().replace('/', "\\").to_lowercase();
        text.strip_prefix(r"\\?\").unwrap_or(&text).to_owned()
    };
    plain(one) == plain(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_file_are_the_same() {
        let same = |one: &str, other: &str| is_same_file(one.as_ref(), other.as_ref());
        assert!(same(r"D:\Machines\Web.vhdx", r"d:\machines\web.VHDX"));
        assert!(same(r"\\?\D:\Machines\web.vhdx", "D:/Machines/web.vhdx"));
        assert!(!same(r"D:\Machines\web.vhdx", r"D:\Machines\web2.vhdx"));
    }
}
