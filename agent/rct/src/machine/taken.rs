//! One instant of several disks of a machine: a checkpoint, and what changed up to it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidemark_base::{DiskId, ExtentSet};

use super::Machine;
use crate::error::RctError;

/// To be dropped as soon as what changed was read: the checkpoint goes then.
pub struct Taken {
    machine: Arc<Machine>,
    count: u64,
    checkpoint: String,
    changed: Vec<(DiskId, ExtentSet)>,
}

impl Machine {
    /// An instant of these disks; `None` where more than `bytes_max` of one changed. `quiet`: applications in the machine are made
    /// quiet for it.
    pub fn take(self: &Arc<Self>, disks: &[DiskId], bytes_max: u64, quiet: bool) -> Result<Option<Taken>, RctError> {
        let mut inner = self.lock();
        for disk in disks {
            inner.disk(*disk)?;
            self.must_be_whole(*disk)?;
        }
        let made = self.replace(&mut inner, quiet);
        match made {
            Err(RctError::Refused { reason, .. }) if quiet => {
                return Err(RctError::Quiesce { machine: inner.name.clone(), reason });
            }
            other => other?,
        }
        // Every disk is asked for: one that is broken must not hide another one.
        for disk in disks {
            self.ask(&mut inner, *disk)?;
        }
        let mut changed = Vec::new();
        for disk in disks {
            self.must_be_whole(*disk)?;
            changed.push((*disk, self.claimed(*disk)));
        }
        if changed.iter().any(|(_, areas)| areas.total_bytes() > bytes_max) {
            return Ok(None);
        }
        let (count, checkpoint) = (inner.count, inner.ours.checkpoint.clone().unwrap_or_default());
        self.pinned.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Taken { machine: self.clone(), count, checkpoint, changed }))
    }
}

impl Taken {
    /// What changed of a disk since the instant before.
    pub fn changed(&self, disk: DiskId) -> ExtentSet {
        self.changed.iter().find(|(id, _)| *id == disk).map(|(_, areas)| areas.clone()).unwrap_or_default()
    }

    /// Reads a part of what changed as it was at the instant.
    pub fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), RctError> {
        let read = self.machine.read_held(disk, Some(self.count), offset, buffer);
        read.unwrap_or_else(|| Err(self.gone()))
    }

    /// Once everything was read: was all of it of the instant? The files of a checkpoint that somebody else removed are written to again.
    pub fn still_holds(&self) -> Result<(), RctError> {
        let found = self.machine.hypervisor.look(&self.machine.id)?;
        if found.checkpoints.iter().any(|checkpoint| checkpoint.id == self.checkpoint) {
            return Ok(());
        }
        if let Some(held) = self.machine.held.read().expect("no panic while held").as_ref() {
            held.is_stale.store(true, Ordering::SeqCst);
        }
        Err(self.gone())
    }

    fn gone(&self) -> RctError {
        RctError::CheckpointGone { machine: self.machine.lock().name.clone() }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.machine.touch();
        self.machine.pinned.fetch_sub(1, Ordering::SeqCst);
    }
}
