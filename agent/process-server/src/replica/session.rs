//! Appending: one stream's cuts, and what makes them durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidemark_base::Generation;
use tidemark_base::sync::MutexGuard;
use tidemark_proto::replication::CutEnd;

use super::{DurableState, Replica, State};
use crate::journal::JournalError;
use crate::points::{HeldMark, PointDisk};

/// What a sync brought about.
#[derive(Clone, Debug)]
pub struct Synced {
    pub durable: DurableState,
    /// Marks that this disk now holds, for the machine's [`crate::points::PointStore`].
    pub marks: Vec<HeldMark>,
}

/// One stream's right to append. A newer session of the disk takes it away.
pub struct Session {
    replica: Arc<Replica>,
    number: u64,
}

impl Session {
    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    pub(super) fn state(&self) -> Result<MutexGuard<'_, State>, JournalError> {
        let state = self.replica.state();
        if state.session != self.number || state.removed {
            return Err(JournalError::Fenced { disk: self.replica.disk });
        }
        Ok(state)
    }

    /// Appends chunks of the cut after the last one; every chunk is verified first, and none is kept if one fails.
    pub fn append_chunks(&self, cut: u64, chunks: &[u8]) -> Result<(), JournalError> {
        self.state()?.journal.append_chunks(cut, chunks)?;
        self.replica.appended_bytes.fetch_add(chunks.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Ends a cut. It exists from now on, and is durable after the next [`Replica::sync`].
    pub fn end_cut(&self, end: &CutEnd) -> Result<(), JournalError> {
        let mut state = self.state()?;
        let needs = &self.replica.needs;
        let came = if needs.is_empty() { Vec::new() } else { state.journal.open_extents() };
        state.journal.end_cut(end)?;
        came.into_iter().for_each(|extent| needs.came(extent));
        // A figure that the host chose.
        state.changed_bytes = state.changed_bytes.saturating_add(end.written_bytes);
        if let Some(mark) = &end.mark {
            let changed_bytes = state.changed_bytes;
            if mark.keep {
                state.changed_bytes = 0;
            }
            let held = PointDisk { disk: self.replica.disk, cut: end.cut.0, position: end.to, changed_bytes };
            // Whether it is whole is seen when it is durable.
            state.marks.push_back((end.cut.0, HeldMark { mark: mark.clone(), held, whole: true }));
        }
        Ok(())
    }

    pub fn sync(&self) -> Result<Synced, JournalError> {
        drop(self.state()?);
        self.replica.sync()
    }
}

impl Drop for Session {
    /// The cut that did not end is gone, unless a newer session has begun.
    fn drop(&mut self) {
        if let Ok(mut state) = self.state() {
            // A failure latches in the journal, and the next session says so.
            let _ = state.journal.discard_open();
        }
    }
}

impl Replica {
    /// Begins a session for a host that says this generation and size; fences the session before it and discards its incomplete cut.
    pub fn begin_session(self: &Arc<Self>, generation: Generation, disk_bytes: u64) -> Result<Session, JournalError> {
        let mut state = self.state();
        let current = state.manifest.generation;
        if state.removed {
            return Err(JournalError::Fenced { disk: self.disk });
        }
        if generation != current {
            return Err(JournalError::Generation { disk: self.disk, asked: generation, current });
        }
        if disk_bytes != self.disk_bytes() {
            return Err(JournalError::SizeChanged { disk: self.disk, known: self.disk_bytes(), asked: disk_bytes });
        }
        if state.journal.failure().is_some() {
            self.reopen_journal(&mut state)?;
        }
        let stored = state.store_losses(&*self.storage);
        stored.map_err(|error| JournalError::StoreFailed { disk: self.disk, source: Some(error) })?;
        state.journal.discard_open()?;
        state.session += 1;
        state.journal.check_room()?;
        Ok(Session { number: state.session, replica: self.clone() })
    }

    /// Makes every committed cut durable: one `fdatasync` for all that waited.
    pub fn sync(&self) -> Result<Synced, JournalError> {
        let _one = self.syncing.lock().expect("no panic while held");
        let handle = self.state().journal.begin_sync()?;
        let outcome = handle.sync();
        let mut state = self.state();
        state.journal.finish_sync(handle, outcome)?;
        let durable = state.durable();
        let healed = state.heal();
        let mut marks = Vec::new();
        while let Some((cut, _)) = state.marks.front() {
            if *cut > durable.cut {
                break;
            }
            let (cut, mark) = state.marks.pop_front().expect("just seen");
            if state.journal.history().is_consistent(cut) {
                marks.push((cut, mark));
            }
        }
        drop(state);
        if let Some(cut) = healed {
            self.note_healed(cut);
        }
        let whole = |(cut, mark): (u64, HeldMark)| HeldMark { whole: !self.is_touched(cut), ..mark };
        Ok(Synced { durable, marks: marks.into_iter().map(whole).collect() })
    }

    /// After a failure the journal begins again at its durable end. What was appended behind it was not acknowledged, and
    /// comes again.
    fn reopen_journal(&self, state: &mut State) -> Result<(), JournalError> {
        let failed = state.journal.failure().unwrap_or_default().to_owned();
        let (durable, base) = (state.journal.durable().cut, (&state.manifest.base).into());
        let store_failed = |what: String| {
            let source = Some(std::io::Error::other(what));
            JournalError::StoreFailed { disk: self.disk, source }
        };
        let report = state.journal.reopen(base).map_err(|error| {
            store_failed(format!("it failed before ({failed}), and cannot be opened again: {error}"))
        })?;
        state.marks.clear();
        {
            // Whoever asks learns of it until the next start, which finds it itself.
            let mut known = self.reopened.lock().expect("no panic while held");
            let new: Vec<String> = report.damage.iter().filter(|what| !known.contains(what)).cloned().collect();
            known.extend(new);
        }
        if state.journal.durable().cut < durable || !report.damage.is_empty() {
            tracing::error!(disk = %self.disk, cut = durable, found = state.journal.durable().cut, damage = ?report.damage, "the journal lost acknowledged cuts");
        }
        tracing::warn!(disk = %self.disk, failed, cut = state.journal.durable().cut, "the journal was opened again at its durable end");
        Ok(())
    }
}
