//! Snapshots of a machine: made, opened for reading, removed, and found where somebody left them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemark_base::DiskId;

use super::{Held, HeldDisk, Inner, Machine};
use crate::changes::ChangeId;
use crate::error::VsphereError;
use crate::flat::Flat;
use crate::inventory::{self, Found, PREFIX, Snapshot};
use crate::soap::{Reference, argument};

/// After a snapshot that failed, so that a vCenter that cannot make any is not asked each second.
const FAILED_REST_MAX: Duration = Duration::from_secs(30);
const CREATE_LIMIT: Duration = Duration::from_secs(15 * 60);
const REMOVE_LIMIT: Duration = Duration::from_secs(4 * 3600);
const RECONFIGURE_LIMIT: Duration = Duration::from_secs(10 * 60);

impl Machine {
    /// Beside a snapshot of somebody else's the disks cannot be read.
    pub(super) fn refuse_others(&self, found: &Found, ours: &[DiskId]) -> Result<(), VsphereError> {
        let others: Vec<&str> = found
            .snapshots
            .iter()
            // Whose those of our kind are is not known before a disk is protected.
            .filter(|snapshot| !is_ours(snapshot, ours) && (!ours.is_empty() || !snapshot.name.starts_with(PREFIX)))
            .map(|snapshot| snapshot.name.as_str())
            .collect();
        match others.is_empty() {
            true => Ok(()),
            false => Err(VsphereError::HasSnapshots { machine: found.name.clone(), names: others.join(", ") }),
        }
    }

    pub(super) fn clear_leftovers(&self, inner: &Inner, found: &Found) -> Result<(), VsphereError> {
        let ours: Vec<DiskId> = inner.disks.keys().copied().collect();
        let current = self.held().map(|held| held.snapshot.clone());
        let left = found.snapshots.iter().filter(|snapshot| is_ours(snapshot, &ours));
        for snapshot in left.filter(|snapshot| Some(&snapshot.reference) != current.as_ref()) {
            tracing::info!(machine = %found.name, snapshot = %snapshot.name, "a snapshot that was left is removed");
            self.remove_snapshot(&snapshot.reference, &found.host)?;
        }
        Ok(())
    }

    fn remove_snapshot(&self, snapshot: &Reference, host: &str) -> Result<(), VsphereError> {
        let permits = self.session.permits_of(host)?;
        let _permit = permits.take();
        let arguments = argument("removeChildren", "false") + &argument("consolidate", "true");
        let what = "RemoveSnapshot_Task";
        let removed = self
            .session
            .begin(what, snapshot, &arguments)
            .and_then(|task| self.session.wait_for(what, &task, REMOVE_LIMIT));
        match removed {
            Err(error) if error.is_fault(&["ManagedObjectNotFound"]) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Waits for whoever reads.
    pub(super) fn remove_held(&self, inner: &Inner) -> Result<(), VsphereError> {
        let Some(held) = self.held.write().expect("no panic while held").take() else { return Ok(()) };
        self.remove_snapshot(&held.snapshot, &held.host)?;
        if held.was_off {
            self.note_off(inner, &held);
        }
        Ok(())
    }

    /// A machine that was off at an instant and is off since did not write. Should it have been on in between for a moment, the next instant still tells what it
    /// wrote: only the age of the replica is shown too small until then.
    fn note_off(&self, inner: &Inner, held: &Held) {
        let Ok(found) = self.look(&held.machine) else { return };
        for (disk, tracked) in inner.disks.iter().filter(|_| found.is_off) {
            let part = held.disks.get(disk);
            let is_told = part.is_some_and(|part| tracked.kept.change_id().as_ref() == Some(&part.change_id));
            if let Some(facts) = self.facts().get_mut(disk).filter(|_| is_told) {
                facts.off = Some(found.trace.clone());
                facts.looked = None;
            }
        }
    }

    /// A new snapshot instead of the one that there is.
    pub(super) fn replace(&self, inner: &mut Inner, quiet: bool) -> Result<Arc<Held>, VsphereError> {
        let rest = self.rest().min(FAILED_REST_MAX);
        if let (Some(reason), Some(made)) = (&inner.failed, inner.made)
            && let Some(wait) = rest.checked_sub(made.elapsed()).filter(|wait| !wait.is_zero())
        {
            let (machine, wait) = (self.name.to_string(), Duration::from_secs(wait.as_secs() + 1));
            return Err(VsphereError::Resting { machine, wait, reason: reason.clone() });
        }
        let made = self.replace_now(inner, quiet);
        // What was not even begun costs the machine nothing.
        let is_costly = |error: &VsphereError| {
            matches!(
                error,
                VsphereError::Fault { .. } | VsphereError::TaskTimedOut { .. } | VsphereError::Answer { .. }
            )
        };
        inner.failed = made.as_ref().err().filter(|error| is_costly(error)).map(VsphereError::to_string);
        made
    }

    fn replace_now(&self, inner: &mut Inner, quiet: bool) -> Result<Arc<Held>, VsphereError> {
        self.remove_held(inner)?;
        let (machine, found) = self.find(inner)?;
        self.clear_leftovers(inner, &found)?;
        let ours: Vec<DiskId> = inner.disks.keys().copied().collect();
        self.refuse_others(&found, &ours)?;
        let mut is_switched_on = false;
        if !found.tracks {
            let spec = format!("<spec>{}</spec>", argument("changeTrackingEnabled", "true"));
            let what = "ReconfigVM_Task";
            let task = self.session.begin(what, &machine, &spec)?;
            self.session.wait_for(what, &task, RECONFIGURE_LIMIT)?;
            is_switched_on = true;
        }
        self.look_for_room(inner, &found)?;
        let held = match self.make(inner, &machine, &found, quiet) {
            // Tracking begins with the first snapshot after it was switched on, in machines that run sometimes with the second.
            Err(VsphereError::NoTracking { .. }) if is_switched_on => self.make(inner, &machine, &found, quiet)?,
            other => other?,
        };
        let held = Arc::new(held);
        *self.held.write().expect("no panic while held") = Some(held.clone());
        self.touch();
        Ok(held)
    }

    /// A datastore that is full stops all of its machines.
    fn look_for_room(&self, inner: &Inner, found: &Found) -> Result<(), VsphereError> {
        let wanted = self.session.settings()?.free_bytes_min;
        let mut looked: Vec<&Reference> = Vec::new();
        for tracked in inner.disks.values() {
            let Some(datastore) = found.disk(&tracked.name)?.datastore.as_ref() else { continue };
            if looked.contains(&datastore) {
                continue;
            }
            looked.push(datastore);
            let seen = inventory::look_at_datastore(&self.session, datastore)?;
            if seen.free_bytes < wanted {
                let (machine, datastore, free) = (found.name.clone(), seen.name, seen.free_bytes);
                return Err(VsphereError::NoRoom { machine, datastore, free, wanted });
            }
        }
        Ok(())
    }

    fn make(&self, inner: &mut Inner, machine: &Reference, found: &Found, quiet: bool) -> Result<Held, VsphereError> {
        let ids: Vec<String> = inner.disks.keys().map(DiskId::to_string).collect();
        let first = ids.first().cloned().unwrap_or_default();
        let arguments = argument("name", &format!("{PREFIX}{first}"))
            + &argument(
                "description",
                &format!("Made by Tidemark, which removes it by itself. Disks: {}", ids.join(" ")),
            )
            + &argument("memory", "false")
            + &argument("quiesce", if quiet { "true" } else { "false" });
        let what = "CreateSnapshot_Task";
        inner.made = Some(Instant::now());
        let made = {
            let permits = self.session.permits_of(&found.host)?;
            let _permit = permits.take();
            let task = self.session.begin(what, machine, &arguments)?;
            self.session.wait_for(what, &task, CREATE_LIMIT)
        };
        let made = match made {
            Err(VsphereError::Fault { fault, message, .. }) if quiet && is_about_quiet(&fault) => {
                let reason = format!("{fault}: {message}");
                return Err(VsphereError::Quiesce { machine: found.name.clone(), reason });
            }
            other => other?,
        };
        let snapshot = made.ok_or_else(|| VsphereError::Answer {
            what: what.to_owned(),
            reason: "the task names no snapshot".to_owned(),
        })?;
        inner.count += 1;
        let held = self.open(inner, machine, found, snapshot.clone());
        if held.is_err()
            && let Err(error) = self.remove_snapshot(&snapshot, &found.host)
        {
            tracing::warn!(machine = %found.name, %error, "a snapshot is removed later");
        }
        held
    }

    fn open(
        &self,
        inner: &Inner,
        machine: &Reference,
        found: &Found,
        snapshot: Reference,
    ) -> Result<Held, VsphereError> {
        let then = inventory::look_at_snapshot(&self.session, &snapshot)?;
        let then = Found { disks: then, ..found.clone() };
        let mut disks = BTreeMap::new();
        for (disk, tracked) in &inner.disks {
            let part = self.examine(&then, &tracked.name)?;
            let change_id = part.change_id.as_deref().and_then(ChangeId::parse);
            let change_id = change_id.ok_or_else(|| VsphereError::NoTracking {
                machine: found.name.clone(),
                reason: format!("a snapshot of disk {} has no change id", tracked.name),
            })?;
            let datastore = part.datastore.as_ref().ok_or_else(|| VsphereError::Kind {
                machine: found.name.clone(),
                disk: tracked.name.to_string(),
                reason: "it lies on no datastore".to_owned(),
            })?;
            let datastore = inventory::look_at_datastore(&self.session, datastore)?;
            let flat = Flat::find(&self.session, &part.file, &datastore, part.bytes)?;
            let uuid = part.uuid.clone();
            disks.insert(*disk, HeldDisk { key: part.key, bytes: part.bytes, uuid, change_id, flat });
        }
        Ok(Held {
            count: inner.count,
            made: Instant::now(),
            machine: machine.clone(),
            host: found.host.clone(),
            snapshot,
            disks,
            was_off: found.is_off,
            is_stale: false.into(),
        })
    }
}

/// By the ids of disks in its name and description.
fn is_ours(snapshot: &Snapshot, ours: &[DiskId]) -> bool {
    let Some(first) = snapshot.name.strip_prefix(PREFIX) else { return false };
    let mut named = snapshot.description.split_whitespace().chain([first]);
    named.any(|word| ours.iter().any(|disk| disk.to_string() == word))
}

fn is_about_quiet(fault: &str) -> bool {
    [
        "ApplicationQuiesceFault",
        "FilesystemQuiesceFault",
        "ToolsUnavailable",
        "SnapshotFault",
        "QuiesceDatastoreIOForHAFailed",
    ]
    .contains(&fault)
}
