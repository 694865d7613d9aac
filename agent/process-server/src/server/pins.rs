//! Durable pins of what is served and exported: the points in use are not folded over, whoever else lets go of them.
//!
//! *Crash.* Serves and exports end with the process; the next start gives their pins back.

use std::sync::Arc;

use tidemark_base::DiskId;

use super::now;
use crate::replica::{Place, ReplicaSet, SetError};

const SERVE: &str = "serve ";
const EXPORT: &str = "export ";

/// Given back when it is dropped, which waits for the disk.
pub struct DurablePins {
    set: Arc<ReplicaSet>,
    holder: String,
    disks: Vec<DiskId>,
}

impl DurablePins {
    pub fn of_serve(set: &Arc<ReplicaSet>, id: impl std::fmt::Display, place: &Place) -> Result<Self, SetError> {
        Self::hold(set, format!("{SERVE}{id}"), place)
    }

    pub fn of_export(set: &Arc<ReplicaSet>, id: impl std::fmt::Display, place: &Place) -> Result<Self, SetError> {
        Self::hold(set, format!("{EXPORT}{id}"), place)
    }

    /// Call it while views hold the place, so that nothing is folded before it is done.
    fn hold(set: &Arc<ReplicaSet>, holder: String, place: &Place) -> Result<Self, SetError> {
        let mut pins = Self { set: set.clone(), holder, disks: Vec::new() };
        for &(disk, cut) in &place.cuts {
            set.get(disk)?.pin(&pins.holder, cut, now())?;
            pins.disks.push(disk);
        }
        Ok(pins)
    }
}

impl Drop for DurablePins {
    fn drop(&mut self) {
        for &disk in &self.disks {
            // A replica that was removed meanwhile took its pins with it.
            if let Ok(replica) = self.set.get(disk)
                && let Err(error) = replica.unpin(&self.holder)
            {
                tracing::warn!(%disk, holder = self.holder, %error, "a pin stays until the next start");
            }
        }
    }
}

/// Pins that an earlier process left.
pub fn release_stale(set: &ReplicaSet) {
    for replica in set.replicas() {
        if let Err(error) = replica.unpin_all(&[SERVE, EXPORT]) {
            tracing::warn!(disk = %replica.disk(), %error, "pins of ended serves and exports cannot be given back");
        }
    }
}
