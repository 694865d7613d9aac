//! Providers of changes: each sees what happens to a disk, in its own way.
//!
//! A *splitter* sees each write with its data, in order; the NBD front end ([`nbd`]) is the first. A *tracker* knows only
//! which blocks changed; an *importer* takes logs that someone else wrote. Whatever it is, it is told of disks to watch, and
//! says where the workload opens them from then on. [`providers`] says which of them there are on this system: what only Linux has
//! ends here, and nothing beyond this folder (but [`crate::freeze`] and [`crate::platform`]) asks which system it is.

#[cfg(unix)]
pub mod bpf;
#[cfg(unix)]
pub mod freezer;
#[cfg(unix)]
pub mod fuse;
pub mod hrl;
#[cfg(unix)]
pub mod images;
#[cfg(windows)]
#[path = "images_windows.rs"]
pub mod images;
pub mod in_flight;
#[cfg(unix)]
pub mod nbd;
pub mod providers;
#[cfg(unix)]
pub mod qemu;
pub mod rct;
pub mod splitter;
pub mod tracker;
pub mod vsphere;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_base::{DiskId, Extent, MachineId};
use tidemark_proto::control::DiskSpec;

use crate::error::HostError;
use crate::protected::ProtectedDisk;
use tracker::Tracker;

/// A place between two steps of a write, at which a test may end the process. Nothing otherwise.
#[inline(always)]
pub(crate) fn gap(name: &'static str) {
    #[cfg(test)]
    crate::tests::gaps::reach(name);
    tidemark_base::seam::observe(tidemark_base::seam::Event::Reached(name));
}

/// Where a workload opens a protected disk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Address {
    pub nbd: Option<String>,
    pub file: Option<String>,
}

/// Catches the changes of disks.
/// A home disk that is written.
pub trait HomeDisk: Send {
    /// `None`: zeroes.
    fn put(&self, extent: Extent, data: Option<&[u8]>) -> io::Result<()>;

    fn flush(&self) -> io::Result<()>;
}

pub trait CaptureProvider: Send + Sync {
    /// Whether the disk could be protected in this way, and its size. Nothing is changed. `state` is the folder of the agent's
    /// state, which must not lie on a disk that a tracker may freeze.
    fn probe(&self, path: &Path, _state: &Path) -> Result<u64, HostError> {
        images::probe(path)
    }

    /// Begins to track the disk, or goes on: before it is attached, so that what it missed is found by the attach. `None`: it is
    /// written through us.
    fn track(&self, _path: &Path, _disk: DiskId, _state: &Path) -> Result<Option<Arc<dyn Tracker>>, HostError> {
        Ok(None)
    }

    /// Whether what is kept for the disk cannot be kept on it, where the agent's state lies.
    fn wants_state_in_memory(&self, _path: &Path, _state: &Path, _memory: &Path) -> bool {
        false
    }

    /// What is attached for the disk that was named: itself, but for an importer, which keeps a copy.
    fn place(&self, path: &Path, _disk: DiskId) -> PathBuf {
        path.to_owned()
    }

    /// Makes what [`place`](Self::place) names, where it is not there.
    fn prepare(&self, _path: &Path, _disk: DiskId) -> Result<(), HostError> {
        Ok(())
    }

    /// The disk is not protected any more: nothing of it is tracked.
    fn untrack(&self, _disk: DiskId) -> io::Result<()> {
        Ok(())
    }

    /// Begins to serve or to watch the disk under a name that stays the same for as long as it is protected.
    fn attach(&self, name: &str, disk: &Arc<ProtectedDisk>) -> io::Result<Address>;

    /// Serves the attached disks of a machine over TCP with mutual TLS as well, at this address and no other from now on;
    /// `None`: not at all. Port 0 is any free one. Returns the address that was bound.
    fn listen(&self, _machine: MachineId, address: Option<SocketAddr>) -> Result<Option<SocketAddr>, HostError> {
        match address {
            None => Ok(None),
            Some(_) => Err(HostError::Io { what: "serve remote clients", source: io::ErrorKind::Unsupported.into() }),
        }
    }

    /// Where remote clients open an attached disk, while [`listen`](Self::listen) says that they may.
    fn remote(&self, _name: &str) -> Option<String> {
        None
    }

    /// The machine is not protected any more: what was kept for its remote clients goes.
    fn forget(&self, _machine: MachineId) -> io::Result<()> {
        Ok(())
    }

    /// Keeps everybody from the disks of a machine, or lets them back; from before a disk is attached, where it is asked for
    /// before. After this nothing more is written. One that does not stand in the workload's way, and finds no other, cannot.
    fn fence(&self, _machine: MachineId, _disks: &[DiskSpec], fenced: bool) -> io::Result<()> {
        let cannot = "its disks are written past the agent, which cannot keep the workload from them; shut the machine down yourself";
        if fenced { Err(io::Error::new(io::ErrorKind::Unsupported, cannot)) } else { Ok(()) }
    }

    /// Why somebody may get at a disk that is fenced all the same, where that is so. What can be mended is mended first.
    fn trespass(&self, _machine: MachineId, _disk: &DiskSpec) -> Option<String> {
        None
    }

    /// Writes to a fenced disk, whose machine is brought home: what is written is captured as the machine's own writes are.
    fn home(&self, disk: &Arc<ProtectedDisk>) -> io::Result<Box<dyn HomeDisk>> {
        Ok(Box::new(splitter::Splitter::new(disk.clone())?))
    }

    /// Whether somebody has what [`home`](Self::home) gave.
    fn is_going_home(&self, _disk: DiskId) -> bool {
        false
    }

    /// Ends it, after the requests that were received; nothing is written through this provider afterwards.
    fn detach(&self, name: &str) -> io::Result<()>;

    /// Ends all of it.
    fn stop(&self) -> io::Result<()>;
}
