//! One instant of several disks of a machine: a snapshot, and what changed up to it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidemark_base::{DiskId, ExtentSet};

use super::{Held, Machine};
use crate::error::VsphereError;
use crate::inventory;

/// To be dropped as soon as what changed was read: the snapshot goes then.
pub struct Taken {
    machine: Arc<Machine>,
    held: Arc<Held>,
    changed: Vec<(DiskId, ExtentSet)>,
}

impl Machine {
    /// An instant of these disks; `None` where more than `bytes_max` of one changed. `quiet`: VMware Tools make the file systems and
    /// applications in the machine quiet for it.
    pub fn take(
        self: &Arc<Self>,
        disks: &[DiskId],
        bytes_max: u64,
        quiet: bool,
    ) -> Result<Option<Taken>, VsphereError> {
        let mut inner = self.lock();
        for disk in disks {
            inner.disk(*disk)?;
            self.must_be_whole(*disk)?;
        }
        let held = self.replace(&mut inner, quiet)?;
        // Every disk is asked for: one that is broken must not hide another one.
        for disk in disks {
            self.ask(&mut inner, *disk, &held)?;
        }
        let mut changed = Vec::new();
        for disk in disks {
            self.must_be_whole(*disk)?;
            changed.push((*disk, self.claimed(*disk)));
        }
        if changed.iter().any(|(_, areas)| areas.total_bytes() > bytes_max) {
            return Ok(None);
        }
        self.pinned.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Taken { machine: self.clone(), held, changed }))
    }
}

impl Taken {
    /// What changed of a disk since the instant before.
    pub fn changed(&self, disk: DiskId) -> ExtentSet {
        self.changed.iter().find(|(id, _)| *id == disk).map(|(_, areas)| areas.clone()).unwrap_or_default()
    }

    /// Reads a part of what changed as it was at the instant.
    pub fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), VsphereError> {
        let read = self.machine.read_held(disk, Some(self.held.count), offset, buffer);
        read.unwrap_or_else(|| Err(self.gone()))
    }

    /// Once everything was read: was all of it of the instant? A snapshot that somebody else removed leads to a disk that the machine writes to again.
    pub fn still_holds(&self) -> Result<(), VsphereError> {
        let found = inventory::look(&self.machine.session, &self.held.machine)?;
        match found.snapshots.iter().any(|snapshot| snapshot.reference == self.held.snapshot) {
            true => Ok(()),
            false => {
                self.held.is_stale.store(true, Ordering::SeqCst);
                Err(self.gone())
            }
        }
    }

    fn gone(&self) -> VsphereError {
        VsphereError::SnapshotGone { machine: self.machine.name.to_string() }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.machine.touch();
        self.machine.pinned.fetch_sub(1, Ordering::SeqCst);
    }
}
