//! Pins, and the manifest's part in moving the base forward.

use std::io::ErrorKind;

use tidemark_base::Timestamp;
use tidemark_base::sync::MutexGuard;

use super::manifest::{Manifest, Pin};
use super::{Replica, ReplicaError, State};
use crate::journal::{ReadError, Source};

impl Replica {
    /// Holds a cut against folding until [`Replica::unpin`], across restarts.
    pub fn pin(&self, holder: &str, cut: u64, now: Timestamp) -> Result<(), ReplicaError> {
        let mut state = self.state();
        if cut < state.manifest.floor() {
            let what = format!("the replica begins at cut {}", state.manifest.floor());
            return Err(ReplicaError::NotViewable { disk: self.disk, cut, what });
        }
        let pin = Pin { holder: holder.to_owned(), cut, since: now };
        self.change_pins(&mut state, |pins| {
            pins.retain(|pin| pin.holder != holder);
            pins.push(pin);
        })
    }

    /// Gives a holder's pin back; one that is not there is fine.
    pub fn unpin(&self, holder: &str) -> Result<(), ReplicaError> {
        let mut state = self.state();
        self.change_pins(&mut state, |pins| pins.retain(|pin| pin.holder != holder))
    }

    /// A volume without room keeps nobody from what is on it: pins are kept in memory then, and are durable with the next
    /// manifest that can be stored. Nothing folds past them meanwhile; whoever holds one across a restart pins again.
    fn change_pins(
        &self,
        state: &mut MutexGuard<'_, State>,
        change: impl FnOnce(&mut Vec<Pin>),
    ) -> Result<(), ReplicaError> {
        let mut next = state.manifest.clone();
        change(&mut next.pins);
        if next == state.manifest {
            return Ok(());
        }
        match next.store(&*self.storage) {
            Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                tracing::warn!(disk = %self.disk, %error, "no room to make pins durable");
            }
            outcome => outcome.map_err(|error| self.write_error(error))?,
        }
        state.manifest = next;
        Ok(())
    }

    /// Gives back the pins of everything whose name begins so.
    pub fn unpin_all(&self, prefixes: &[&str]) -> Result<(), ReplicaError> {
        let stale = self.durable_pins().into_iter().map(|pin| pin.holder);
        let stale: Vec<String> =
            stale.filter(|holder| prefixes.iter().any(|prefix| holder.starts_with(prefix))).collect();
        stale.iter().try_for_each(|holder| self.unpin(holder))
    }

    pub fn durable_pins(&self) -> Vec<Pin> {
        self.state().manifest.pins.clone()
    }
}

/// What a fold asks.
impl Replica {
    /// The oldest cut that a pin or an open view stands on.
    pub(crate) fn oldest_pin(&self) -> Option<u64> {
        let state = self.state();
        let durable = state.manifest.pins.iter().map(|pin| pin.cut).min();
        durable.into_iter().chain(self.pins.oldest()).min()
    }

    /// Every cut that a durable pin or an open view stands on.
    pub(crate) fn pinned_cuts(&self) -> Vec<u64> {
        let mut cuts: Vec<u64> = self.state().manifest.pins.iter().map(|pin| pin.cut).collect();
        cuts.extend(self.pins.cuts());
        cuts
    }

    /// What covers the cuts of a step that was begun; nothing when none was.
    pub(crate) fn fold_sources(&self) -> Result<Vec<Source>, ReplicaError> {
        let state = self.state();
        let Some(step) = state.manifest.fold_step else { return Ok(Vec::new()) };
        state.journal.sources(state.manifest.base.cut, step).map_err(|error| self.read_error(error))
    }

    /// The newest consistent durable cut at or before `cut`.
    pub(crate) fn consistent_at_or_before(&self, cut: u64) -> u64 {
        let state = self.state();
        state.journal.history().consistent_at_or_before(cut.min(state.journal.durable().cut))
    }

    /// Declares a fold to `target`, durably: no older view opens from now on. The target is lowered to the oldest pin, but
    /// not below what was declared before. `None`: nothing to do.
    pub(crate) fn declare_fold(&self, target: u64) -> Result<Option<u64>, ReplicaError> {
        let mut state = self.state();
        let pinned = state.manifest.pins.iter().map(|pin| pin.cut).chain(self.pins.oldest()).min();
        let target = pinned.map_or(target, |pinned| pinned.min(target)).max(state.manifest.floor());
        if state.journal.durable().cut < target {
            let what = format!("it ends at cut {}, a fold to {target} was begun", state.journal.durable().cut);
            return Err(self.read_error(ReadError::damaged(self.storage.path("segments").display().to_string(), what)));
        }
        // A segment that was lost after the fold was declared is not in its layers: it waits for the scan that repairs that.
        if target <= state.manifest.base.cut || !state.journal.history().is_consistent(target) {
            return Ok(None);
        }
        self.change_manifest(&mut state, |manifest| manifest.fold_to = Some(target))?;
        Ok(Some(target))
    }

    /// Begins a step of the declared fold; what an earlier try of it wrote is whole and synced.
    pub(crate) fn declare_step(&self, step: u64) -> Result<Vec<Source>, ReplicaError> {
        let mut state = self.state();
        let sources = state.journal.sources(state.manifest.base.cut, step).map_err(|error| self.read_error(error))?;
        self.change_manifest(&mut state, |manifest| manifest.fold_step = Some(step))?;
        Ok(sources)
    }

    /// The base is at `step`: records that, then removes the segments that nothing needs any more.
    pub(crate) fn finish_step(&self, step: u64) -> Result<(), ReplicaError> {
        let mut state = self.state();
        let commit = state.journal.commit(step).map_err(|error| self.read_error(error))?;
        let Some(commit) = commit else {
            return Err(self.read_error(ReadError::damaged("segments", format!("cut {step} has no commit record"))));
        };
        let base = crate::journal::Tip {
            cut: step,
            position: Some(commit.end.to),
            time: commit.end.time,
            commit: commit.hash,
        };
        let losses = state.journal.losses_after(step);
        self.change_manifest(&mut state, |manifest| {
            manifest.losses = losses;
            manifest.base = base.into();
            manifest.fold_step = None;
            manifest.fold_to = manifest.fold_to.filter(|&to| to > step);
        })?;
        state.journal.drop_up_to(step).map_err(|error| self.write_error(error))
    }

    /// The file first, then memory.
    fn change_manifest(
        &self,
        state: &mut MutexGuard<'_, State>,
        change: impl FnOnce(&mut Manifest),
    ) -> Result<(), ReplicaError> {
        let mut next = state.manifest.clone();
        change(&mut next);
        if next != state.manifest {
            next.store(&*self.storage).map_err(|error| self.write_error(error))?;
            state.manifest = next;
        }
        Ok(())
    }
}
