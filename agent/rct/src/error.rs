//! What can go wrong between us and Hyper-V, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum RctError {
    #[error("no machine of this host has the disk {}", path.display())]
    NoMachine { path: PathBuf },
    #[error("there is no machine {machine} on this host any more")]
    Absent { machine: String },
    #[error("machine {machine} has no disk {}", path.display())]
    NoDisk { machine: String, path: PathBuf },
    #[error("disk {} of machine {machine} cannot be tracked: {reason}", path.display())]
    Kind { machine: String, path: PathBuf, reason: String },
    #[error("machine {machine} does not track changes of {}", path.display())]
    NoTracking { machine: String, path: PathBuf },
    #[error("machine {machine} has checkpoints of others ({names}): its disks cannot be read beside them")]
    HasCheckpoints { machine: String, names: String },
    #[error("only {free} bytes are left beside {}: no checkpoint is made below {wanted}", path.display())]
    NoRoom { path: PathBuf, free: u64, wanted: u64 },
    #[error("the applications of machine {machine} could not be made quiet: {reason}")]
    Quiesce { machine: String, reason: String },
    #[error("Hyper-V did not {what}: {reason}")]
    Refused { what: &'static str, reason: String },
    #[error("Hyper-V did not {what} within {limit:?}")]
    TimedOut { what: &'static str, limit: Duration },
    #[error("what Hyper-V answered to {what} is not understood: {reason}")]
    Answer { what: &'static str, reason: String },
    #[error("a checkpoint of machine {machine} failed a moment ago, and is not tried again for {wait:?}: {reason}")]
    Resting { machine: String, wait: Duration, reason: String },
    #[error("the checkpoint that machine {machine} was read from is gone")]
    CheckpointGone { machine: String },
    #[error("what changed of disk {disk} is not known: {reason}")]
    Unwitnessed { disk: String, reason: String },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("this system tracks no changes of virtual disks: {reason}")]
    NoHyperV { reason: String },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("disk {disk} is not tracked here")]
    Unknown { disk: String },
}

impl RctError {
    pub fn help(&self) -> &'static str {
        match self {
            RctError::NoMachine { .. } | RctError::NoDisk { .. } => {
                "name the .vhdx as the machine's settings do (`Get-VMHardDiskDrive`), and ask the agent of the host that the machine is on now"
            }
            RctError::Absent { .. } => {
                "it was removed, or moved to another host of its cluster: protect it there; if it comes back it goes on by itself"
            }
            RctError::Kind { .. } => {
                "disks must be .vhdx files that lie on no other disk and belong to one machine alone; leave this one out, or use `--via hrl`"
            }
            RctError::NoTracking { .. } => {
                "upgrade the machine's configuration version to 6.2 or later (`Update-VMVersion`), which tracking needs"
            }
            RctError::HasCheckpoints { .. } => {
                "delete them (`Remove-VMCheckpoint`), or wait until the backup that made them is done; it is tried again by itself"
            }
            RctError::NoRoom { .. } => {
                "make room there: a checkpoint grows while it is there, and a full volume stops its machines"
            }
            RctError::Quiesce { .. } => {
                "see whether the backup integration service runs in the machine and its VSS writers are well; crash-consistent points go on meanwhile"
            }
            RctError::Refused { .. } | RctError::TimedOut { .. } => {
                "see the Hyper-V-VMMS log of the event viewer; it is tried again by itself"
            }
            RctError::Answer { .. } | RctError::Unknown { .. } => {
                "it is tried again by itself; if it stays so, report it with the version of Windows"
            }
            RctError::Resting { .. } => "see the reason; it is tried again by itself",
            RctError::CheckpointGone { .. } => {
                "leave recovery checkpoints that this agent made alone; it is tried again by itself"
            }
            RctError::Unwitnessed { .. } => "the whole disk is compared by itself",
            RctError::Read { .. } | RctError::Io { .. } => "see the system's message",
            RctError::NoHyperV { .. } => {
                "run the agent on the Hyper-V host itself, which must be Windows Server 2016 or later, as an administrator of Hyper-V"
            }
        }
    }

    /// Whether whoever asked has to change the question.
    pub fn is_a_wrong_question(&self) -> bool {
        matches!(
            self,
            RctError::NoMachine { .. }
                | RctError::NoDisk { .. }
                | RctError::Kind { .. }
                | RctError::NoTracking { .. }
                | RctError::NoHyperV { .. }
        )
    }
}

impl From<RctError> for io::Error {
    fn from(error: RctError) -> Self {
        io::Error::other(error)
    }
}
