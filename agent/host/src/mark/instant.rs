//! Marks of a machine whose hypervisor makes instants of all its disks while it writes to them.
//!
//! *Consistency.* What changed up to the instant is read as it was then, and logged; the mark follows it. What changes meanwhile is in the next one. *Retries.*
//! Whoever marks tries again. *Cancellation.* Dropping the changes releases nothing: they are claimed again. *Crash.* The same.

use std::sync::Arc;
use std::time::Duration;

use tidemark_proto::replication::Consistency;

use super::{Asked, MarkOutcome, Marker, PASSES_MAX, Quiet, hold_all, not_logging, time_of};
use crate::capture::tracker::Instants;
use crate::error::HostError;
use crate::log::Unlogged;
use crate::protected::ProtectedDisk;
use crate::protected::tracked::{FROZEN_BYTES_MAX, Gathered, LOGGED_BYTES_MAX};

/// What is logged of an instant once several passes, each of which found more than [`FROZEN_BYTES_MAX`], did not come to an end.
const LAST_BYTES_MAX: u64 = 1 << 30;

impl Marker {
    /// How far apart marks are that nobody asked for.
    pub fn rest(&self) -> Duration {
        let instants = self.all().iter().find_map(|disk| disk.tracker()?.instants());
        instants.map_or(Duration::ZERO, |instants| instants.rest())
    }

    /// Where nobody wrote down how, and the hypervisor can.
    pub(super) fn is_made_quiet_by(&self, instants: &dyn Instants) -> bool {
        instants.makes_quiet() && !self.freezer.as_ref().is_some_and(|freezer| freezer.is_set_up(&self.name))
    }

    /// Much that changed is scanned first, while the machine goes on: what is left for the instant is little then.
    pub(super) fn mark_instant(
        &self,
        disks: &[Arc<ProtectedDisk>],
        instants: &dyn Instants,
        asked: &mut Asked<'_>,
        quiet: Quiet<'_>,
    ) -> Result<MarkOutcome, HostError> {
        let mut settling = self.settling.lock().expect("no panic while held");
        if let Some(disk) = disks.iter().find(|disk| !disk.log.is_logging()) {
            return Err(not_logging(disk, &Unlogged::NotLogging));
        }
        for disk in disks.iter().filter(|disk| disk.is_unwitnessed()) {
            scan(disk)?;
        }
        let bytes_max = if settling.passes < PASSES_MAX { FROZEN_BYTES_MAX } else { LAST_BYTES_MAX };
        let ids: Vec<_> = disks.iter().map(|disk| disk.identity.disk).collect();
        let time = time_of(disks);
        let taken = match asked.consistency == Consistency::Application && self.is_made_quiet_by(instants) {
            true => instants.take_quiet(&ids, bytes_max),
            false => instants.take(&ids, bytes_max),
        };
        let taken = match taken {
            Ok(taken) => taken,
            Err(source) => {
                // What was missed may have been found out just now.
                for disk in disks.iter().filter(|disk| disk.is_unwitnessed()) {
                    scan(disk)?;
                }
                return Err(HostError::Instant { source });
            }
        };
        let Some(changes) = taken else {
            settling.passes += 1;
            let mut scanned = Ok(());
            for disk in disks {
                scanned = scanned.and(scan(disk));
            }
            return Err(scanned.err().unwrap_or(HostError::Busy { disk: ids[0] }));
        };
        quiet()?;
        for disk in disks {
            let logged = disk.log_changes(&*changes);
            logged.map_err(|error| HostError::Instant { source: std::io::Error::other(error) })?;
        }
        changes.still_holds().map_err(|source| HostError::Instant { source })?;
        drop(changes);
        let holds = hold_all(disks).map_err(|disk| HostError::Busy { disk })?;
        let outcome = self.append(disks, time, asked)?;
        (asked.held)(&outcome);
        drop(holds);
        settling.passes = 0;
        Ok(outcome)
    }
}

/// Takes what changed, without an instant. Fails with what is scanned then, if it is.
fn scan(disk: &ProtectedDisk) -> Result<(), HostError> {
    match disk.gather(LOGGED_BYTES_MAX) {
        Ok(Gathered::All) => Ok(()),
        Ok(Gathered::InFlight) => Err(HostError::Busy { disk: disk.identity.disk }),
        Ok(Gathered::Scanning) => {
            let total = disk.consumers().iter().map(|consumer| consumer.scan_bytes()).max().unwrap_or(0);
            Err(HostError::Scanning { disk: disk.identity.disk, done: 0, total })
        }
        Err(error) => Err(HostError::Io { what: "read what changed", source: std::io::Error::other(error) }),
    }
}
