//! Checkpoints of a machine: made, opened for reading, converted, and found where somebody left them.
//!
//! 1. what is there is noted, 2. a checkpoint is made, 3. its id is noted, 4. it is read, 5. which reference points are there is noted, 6. it is converted,
//! 7. its reference point is noted, 8. those that no change id that is kept belongs to are removed.
//!
//! Crash between 1 and 3: a recovery checkpoint that was not there before is ours, whenever it comes: Hyper-V ends what it began. 3 to 6: its id is known. 5 to 7: a
//! reference point that was not there before is ours. 7 to 8: they are known. A change id is kept before the reference point of an older one goes. What Hyper-V refused
//! was not made: nothing that others make then is taken for ours.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Held, HeldDisk, IDLE, Inner, Machine};
use crate::error::RctError;
use crate::hypervisor::{Checkpoint, Found, is_same_file};
use crate::kept::{Kept, Ours};

/// After a checkpoint that failed, so that a host that cannot make any is not asked each second.
const FAILED_REST_MAX: Duration = Duration::from_secs(30);
/// Of the volume of a disk, or no checkpoint is made.
const FREE_BYTES_MIN: u64 = 4 << 30;

pub(super) fn is_ours(checkpoint: &Checkpoint, ours: &Ours) -> bool {
    let was_there = |before: &Vec<String>| before.contains(&checkpoint.id);
    ours.checkpoint.as_ref() == Some(&checkpoint.id)
        || checkpoint.is_recovery && ours.checkpoints_before.as_ref().is_some_and(|before| !was_there(before))
}

impl Machine {
    /// Beside a checkpoint of somebody else's the disks lie in several files.
    pub(super) fn refuse_others(&self, found: &Found, ours: &Ours) -> Result<(), RctError> {
        let others: Vec<&str> = found
            .checkpoints
            .iter()
            .filter(|checkpoint| !is_ours(checkpoint, ours))
            .map(|checkpoint| if checkpoint.is_recovery { "of a backup" } else { checkpoint.name.as_str() })
            .collect();
        match others.is_empty() {
            true => Ok(()),
            false => Err(RctError::HasCheckpoints { machine: found.name.clone(), names: others.join(", ") }),
        }
    }

    /// Whether something was found.
    pub(super) fn clear_leftovers(&self, inner: &mut Inner, found: &Found) -> Result<bool, RctError> {
        let current = self.held.read().expect("no panic while held").as_ref().map(|held| held.checkpoint.clone());
        let mut ours = inner.ours.clone();
        if let Some(before) = ours.reference_points_before.take() {
            let made = found.reference_points.iter().map(|point| &point.id);
            let unknown = made.filter(|id| !before.contains(id) && !ours.reference_points.contains(id));
            let unknown: Vec<String> = unknown.cloned().collect();
            ours.reference_points.extend(unknown);
        }
        let left: Vec<&Checkpoint> = found
            .checkpoints
            .iter()
            .filter(|checkpoint| is_ours(checkpoint, &ours) && Some(&checkpoint.id) != current.as_ref())
            .collect();
        if left.is_empty() {
            ours.checkpoint = ours.checkpoint.filter(|id| Some(id) == current.as_ref());
        }
        self.note(inner, ours)?;
        for checkpoint in &left {
            tracing::info!(machine = %found.name, checkpoint = %checkpoint.id, "a checkpoint that was left is converted");
            self.convert(inner, &checkpoint.id)?;
        }
        Ok(!left.is_empty())
    }

    fn note(&self, inner: &mut Inner, ours: Ours) -> Result<(), RctError> {
        if inner.ours == ours {
            return Ok(());
        }
        let path = || self.storage.path("");
        ours.store(&*self.storage).map_err(|source| RctError::Io {
            what: "note what is made in",
            path: path(),
            source,
        })?;
        inner.ours = ours;
        Ok(())
    }

    /// No disk of it is tracked any more.
    pub(super) fn clear_all(&self, inner: &mut Inner) -> Result<(), RctError> {
        let found = match self.hypervisor.look(&self.id) {
            // It took along what was made of it.
            Err(RctError::Absent { .. }) => {
                return self.note(inner, Ours { machine: self.id.clone(), ..Ours::default() });
            }
            found => found?,
        };
        self.clear_leftovers(inner, &found)?;
        self.prune(inner)
    }

    fn convert(&self, inner: &mut Inner, checkpoint: &str) -> Result<(), RctError> {
        let found = self.hypervisor.look(&self.id)?;
        if found.checkpoints.iter().any(|other| other.id == checkpoint) {
            let (was, ids) = (inner.ours.clone(), found.reference_points.into_iter().map(|point| point.id));
            let before = was.reference_points_before.clone().unwrap_or_else(|| ids.collect());
            self.note(inner, Ours { reference_points_before: Some(before), ..was.clone() })?;
            let made = self.hypervisor.convert(checkpoint);
            if matches!(made, Err(RctError::Refused { .. })) {
                self.note(inner, was)?;
            }
            let made = made?;
            let mut ours = inner.ours.clone();
            ours.reference_points.push(made.id);
            self.note(inner, ours)?;
        }
        let ours = inner.ours.clone();
        self.note(inner, Ours { checkpoints_before: None, checkpoint: None, reference_points_before: None, ..ours })
    }

    /// Removes reference points of ours that no change id needs. The newest one stays while a disk is tracked: it has tracking go on.
    pub(super) fn prune(&self, inner: &mut Inner) -> Result<(), RctError> {
        let kept = Kept::all_of(&*self.storage, &self.id).map_err(|source| RctError::Io {
            what: "read what is kept in",
            path: self.storage.path(""),
            source,
        })?;
        let found = self.hypervisor.look(&self.id)?;
        let newest = inner.ours.reference_points.last().filter(|_| !kept.is_empty()).cloned();
        // Also those that will be kept once what changed up to them is told.
        let next = inner.disks.values().filter_map(|tracked| Some(tracked.claimed.as_ref()?.until.as_str()));
        let needed: Vec<&str> = kept.iter().map(|kept| kept.change_id.as_str()).chain(next).collect();
        let mut stay = Vec::new();
        for id in &inner.ours.reference_points {
            let Some(point) = found.reference_points.iter().find(|point| point.id == *id) else { continue };
            let is_needed = point.change_ids.iter().any(|id| needed.contains(&id.as_str()));
            if is_needed || Some(id) == newest.as_ref() {
                stay.push(id.clone());
            } else if let Err(error) = self.hypervisor.remove(id) {
                tracing::warn!(machine = %inner.name, reference_point = %id, %error, "a reference point is removed later");
                stay.push(id.clone());
            }
        }
        self.note(inner, Ours { reference_points: stay, ..inner.ours.clone() })
    }

    /// Waits for whoever reads.
    pub(super) fn convert_held(&self, inner: &mut Inner) -> Result<(), RctError> {
        // Its files are closed before they are merged.
        let held = self.held.write().expect("no panic while held").take();
        let Some(checkpoint) = held.map(|held| held.checkpoint) else { return Ok(()) };
        self.convert(inner, &checkpoint)?;
        if let Err(error) = self.prune(inner) {
            tracing::warn!(machine = %inner.name, %error, "reference points are removed later");
        }
        Ok(())
    }

    /// A checkpoint that nobody reads goes.
    pub(super) fn keep(&self) {
        let is_idle = self.used.lock().expect("no panic while held").elapsed() >= IDLE;
        let is_there = || self.held.read().expect("no panic while held").is_some();
        if !is_idle || self.pinned.load(Ordering::SeqCst) > 0 || !is_there() {
            return;
        }
        let Ok(mut inner) = self.inner.try_lock() else { return };
        // An instant is made with `inner` held: none began since.
        if self.pinned.load(Ordering::SeqCst) == 0
            && let Err(error) = self.convert_held(&mut inner)
        {
            tracing::warn!(machine = %inner.name, %error, "a checkpoint is converted later");
        }
    }

    /// A new checkpoint instead of the one that there is.
    pub(super) fn replace(&self, inner: &mut Inner, quiet: bool) -> Result<(), RctError> {
        let rest = self.rest.min(FAILED_REST_MAX);
        if let (Some(reason), Some(made)) = (&inner.failed, inner.made)
            && let Some(wait) = rest.checked_sub(made.elapsed()).filter(|wait| !wait.is_zero())
        {
            let (machine, wait) = (inner.name.clone(), Duration::from_secs(wait.as_secs() + 1));
            return Err(RctError::Resting { machine, wait, reason: reason.clone() });
        }
        let made = self.replace_now(inner, quiet);
        // What was not even begun costs the machine nothing.
        let is_costly = |error: &&RctError| {
            matches!(error, RctError::Refused { .. } | RctError::TimedOut { .. } | RctError::Answer { .. })
        };
        inner.failed = made.as_ref().err().filter(is_costly).map(RctError::to_string);
        made
    }

    fn replace_now(&self, inner: &mut Inner, quiet: bool) -> Result<(), RctError> {
        self.convert_held(inner)?;
        let mut found = self.hypervisor.look(&self.id)?;
        inner.name.clone_from(&found.name);
        if self.clear_leftovers(inner, &found)? {
            found = self.hypervisor.look(&self.id)?;
        }
        self.refuse_others(&found, &inner.ours)?;
        self.look_for_room(inner)?;
        match self.make(inner, &found, quiet) {
            // Tracking begins with the first reference point, which the checkpoint became; of a machine that is off nobody has the files open.
            Err(RctError::NoTracking { .. }) => {
                if found.is_off {
                    for tracked in inner.disks.values() {
                        self.hypervisor.switch_on(&tracked.path)?;
                    }
                }
                let found = self.hypervisor.look(&self.id)?;
                self.make(inner, &found, quiet)
            }
            other => other,
        }
    }

    /// A volume that is full stops all of its machines.
    fn look_for_room(&self, inner: &Inner) -> Result<(), RctError> {
        for tracked in inner.disks.values() {
            let free = self.hypervisor.free_bytes(&tracked.path)?;
            if free < FREE_BYTES_MIN {
                return Err(RctError::NoRoom { path: tracked.path.clone(), free, wanted: FREE_BYTES_MIN });
            }
        }
        Ok(())
    }

    fn make(&self, inner: &mut Inner, found: &Found, quiet: bool) -> Result<(), RctError> {
        let (was, ids) = (inner.ours.clone(), found.checkpoints.iter().map(|checkpoint| checkpoint.id.clone()));
        let before = was.checkpoints_before.clone().unwrap_or_else(|| ids.collect());
        self.note(inner, Ours { checkpoints_before: Some(before), ..was.clone() })?;
        inner.made = Some(Instant::now());
        let made = self.hypervisor.checkpoint(&self.id, quiet);
        if matches!(made, Err(RctError::Refused { .. })) {
            self.note(inner, was)?;
        }
        let made = made?;
        let id = made.id.clone();
        self.note(inner, Ours { checkpoint: Some(id.clone()), checkpoints_before: None, ..inner.ours.clone() })?;
        inner.count += 1;
        match self.open(inner, &made) {
            Ok(held) => {
                *self.held.write().expect("no panic while held") = Some(held);
                self.touch();
                Ok(())
            }
            Err(error) => {
                if let Err(error) = self.convert(inner, &id) {
                    tracing::warn!(machine = %inner.name, %error, "a checkpoint is converted later");
                }
                Err(error)
            }
        }
    }

    fn open(&self, inner: &Inner, made: &Checkpoint) -> Result<Held, RctError> {
        let mut disks = BTreeMap::new();
        for (disk, tracked) in &inner.disks {
            let (machine, path) = (inner.name.clone(), tracked.path.clone());
            if !made.disks.iter().any(|file| is_same_file(file, &path)) {
                return Err(RctError::NoDisk { machine, path });
            }
            let image = self.hypervisor.open(&path)?;
            let facts = image.facts()?;
            let change_id = facts.change_id.filter(|id| !id.is_empty());
            let Some(change_id) = change_id else { return Err(RctError::NoTracking { machine, path }) };
            disks.insert(*disk, HeldDisk { path, bytes: facts.bytes, uuid: facts.uuid, change_id, image });
        }
        Ok(Held {
            count: inner.count,
            made: Instant::now(),
            checkpoint: made.id.clone(),
            disks,
            is_stale: AtomicBool::new(false),
        })
    }
}
