//! What of a replica is known to be damaged, what has to come again from the source, and what was healed.
//!
//! | found | by | what becomes of it |
//! |---|---|---|
//! | a chunk of a segment, or a block of the base | a read, or the scrub | the places are *needed* as far as they are still the newest content; points that show them are flagged; the host sends the newest content again |
//! | an index: of a segment, or a merged one | a read, the scrub, or opening | made again from the frames; nothing is lost |
//! | a segment's header, a segment, a cut that was not sealed | opening | every later cut is not consistent until a whole scan ended that began after this was found ([`crate::journal::Loss`], in the manifest): what is missing is not known |
//! | manifest | opening, the scrub | written again from its copy, or from memory |
//! | header of an open segment, table of damage | the scrub; the header also when its segment is sealed, and the next scrub says so | written again from memory |
//!
//! *Quarantine.* A damaged place is never shown: each read proves what it returns, and fails there. The file stays as it is, because its other places are
//! whole. Older content that a point needs exists here alone: it cannot be healed, the point stays flagged until it expires.
//! *Healing.* A needed place is whole again from the cut on that writes it anew, whoever sent it: the guest, a scan, or a compare that was asked for. A fold past that cut
//! replaces damaged blocks of the base.
//!
//! *Consistency.* Marks between the damage and the cut that heals it are flagged when they become points. *Retries.* Finding the same damage again changes nothing.
//! *Crash.* What is known is in a [`crate::table`]; what a crash loses of it the next scrub finds again.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::{Extent, ExtentSet, Timestamp};

use super::manifest::Loaded;
use super::{Replica, ReplicaError, State};
use crate::fold::base::BLOCK_BYTES;
use crate::journal::{Part, ReadError, Sealed};
use crate::scrub::Finding;
use crate::view::cache::BlockCache;

pub const NAME: &str = "damage";
/// Older damage that was healed is forgotten first.
const DAMAGES_MAX: usize = 1000;
const CACHE_BYTES: usize = 4 << 20;

/// One damaged place.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Damage {
    pub file: String,
    pub what: String,
    /// The first cut that it can show in.
    pub from_cut: u64,
    /// The parts of the disk that it touches; all of it where that is not known.
    pub extents: Vec<Extent>,
    pub found: Timestamp,
    /// From this cut on it does not show any more.
    pub healed_at: Option<u64>,
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct Known {
    pub damages: Vec<Damage>,
    /// What is to come again, when it was last stored. It may have come since.
    pub need: Vec<Extent>,
}

impl State {
    /// Takes what the cuts that became durable wrote out of what is needed. The cut at which nothing was needed any more, when
    /// there was one.
    pub(super) fn heal(&mut self) -> Option<u64> {
        let durable = self.journal.durable().cut;
        // Sealing makes a cut durable as well, so the last sync is not where this ended.
        let before = std::mem::replace(&mut self.healed_to, durable);
        for cut in before + 1..=durable {
            if self.need.is_empty() {
                break;
            }
            for extent in self.journal.extents_of(cut).unwrap_or_default() {
                self.need.remove(extent);
            }
            if self.need.is_empty() {
                return Some(cut);
            }
        }
        None
    }
}

impl Replica {
    /// The parts of the disk whose newest content cannot be read here, in whole blocks, ascending: the source is to send
    /// them again, in any cut that follows. Cuts that were lost are another matter: see [`super::DurableState::needs_scan`].
    pub fn need(&self) -> Vec<Extent> {
        self.state().need.iter().collect()
    }

    /// The active segment ends when damage was found in it: after a restart its index tells which blocks that touched.
    pub(crate) fn end_segment_of(&self, findings: &[Finding]) {
        let mut state = self.state();
        let Some(name) = state.journal.active_file().map(|(segment, ..)| segment.name.clone()) else { return };
        if findings.iter().any(|finding| finding.file == name)
            && let Err(error) = state.journal.end_segment()
        {
            tracing::warn!(disk = %self.disk, %error, "the active segment stays as it is");
        }
    }

    pub(crate) fn end_segment(&self) -> Result<(), crate::journal::JournalError> {
        let mut state = self.state();
        state.journal.discard_open()?;
        state.journal.end_segment()
    }

    /// What is known to be damaged, healed or not.
    pub fn damages(&self) -> Vec<Damage> {
        self.damage.read(|known| known.damages.clone())
    }

    /// Whether a damage may show at this cut.
    pub(crate) fn is_touched(&self, cut: u64) -> bool {
        self.damage.read(|known| {
            known
                .damages
                .iter()
                .any(|damage| damage.from_cut <= cut && damage.healed_at.is_none_or(|healed| cut < healed))
        })
    }

    /// Notes damage of data, and what of it is needed. Returns what was not known before.
    pub(crate) fn note_damage(&self, findings: &[Finding], now: Timestamp) -> Vec<Damage> {
        let new: Vec<Damage> = findings
            .iter()
            .filter(|finding| finding.from_cut != u64::MAX)
            .map(|finding| self.damage_of(finding, now))
            .filter(|damage| !damage.extents.is_empty() && !self.is_known(damage))
            .collect();
        if new.is_empty() {
            return new;
        }
        let touched: ExtentSet = new.iter().flat_map(|damage| damage.extents.iter().copied()).collect();
        let needed = self.add_need(&touched);
        let tip = self.durable().cut;
        let result = self.damage.change(|known| {
            for damage in &new {
                let healed_at = if needed { None } else { Some(tip) };
                known.damages.push(Damage { healed_at, ..damage.clone() });
            }
            while known.damages.len() > DAMAGES_MAX {
                let oldest = known.damages.iter().position(|damage| damage.healed_at.is_some()).unwrap_or(0);
                known.damages.remove(oldest);
            }
            known.need = self.need();
            Ok::<(), crate::table::TableError>(())
        });
        if let Err(error) = result {
            tracing::warn!(disk = %self.disk, %error, "known damage cannot be stored; a restart finds it again");
        }
        new
    }

    fn damage_of(&self, finding: &Finding, now: Timestamp) -> Damage {
        let extents = self.extents_of_finding(finding);
        let (file, what, from_cut) = (finding.file.clone(), finding.what.clone(), finding.from_cut);
        Damage { file, what, from_cut, extents, found: now, healed_at: None }
    }

    /// The parts of the disk that a finding touches.
    pub(crate) fn extents_of_finding(&self, finding: &Finding) -> Vec<Extent> {
        let whole = || vec![Extent::new(0, self.disk_bytes())];
        match (&finding.extents, finding.extent) {
            (Some(extents), _) => extents.clone(),
            (None, Some(extent)) => vec![extent],
            (None, None) if finding.one_cut => self.cut_extents(finding.from_cut).unwrap_or_else(whole),
            (None, None) => whole(),
        }
    }

    fn is_known(&self, damage: &Damage) -> bool {
        let same = |known: &Damage| {
            known.file == damage.file && known.from_cut == damage.from_cut && known.extents == damage.extents
        };
        self.damage.read(|known| known.damages.iter().any(same))
    }

    /// Adds what of `places` cannot be read now to what is needed; whether there was any.
    fn add_need(&self, places: &ExtentSet) -> bool {
        let (unreadable, cut) = self.unreadable_now(places);
        let mut state = self.state();
        // What was needed before is healed by what came until now; what is added was read after that.
        let healed = state.heal();
        let mut need = unreadable;
        // What came since the places were read has healed them.
        for later in cut + 1..=state.journal.durable().cut {
            for extent in state.journal.extents_of(later).unwrap_or_default() {
                need.remove(extent);
            }
        }
        self.needs.ask(need.iter());
        let any = !need.is_empty();
        need.iter().for_each(|extent| state.need.insert(extent));
        drop(state);
        if let Some(cut) = healed.filter(|_| !any) {
            self.note_healed(cut);
        }
        any
    }

    /// What of `places`, in whole blocks, cannot be read, and at which cut that was.
    fn unreadable_now(&self, places: &ExtentSet) -> (ExtentSet, u64) {
        let mut unreadable = ExtentSet::new();
        let view = match self.view_now(&BlockCache::new(CACHE_BYTES)) {
            Ok(view) => view,
            Err(_) => return (ExtentSet::from_iter([Extent::new(0, self.disk_bytes())]), 0),
        };
        let mut block = vec![0; BLOCK_BYTES as usize];
        for place in places.iter() {
            let mut at = place.offset / BLOCK_BYTES * BLOCK_BYTES;
            while at < place.end().min(self.disk_bytes()) {
                let length = BLOCK_BYTES.min(self.disk_bytes() - at);
                if matches!(view.read(at, &mut block[..length as usize]), Err(ReadError::Damaged { .. })) {
                    unreadable.insert(Extent::new(at, length));
                }
                at += BLOCK_BYTES;
            }
        }
        (unreadable, view.cut())
    }

    /// Reads what is needed again: after a restart it may have come, after a fold it may be whole.
    pub(crate) fn check_need(&self) {
        let before: ExtentSet = self.need().into_iter().collect();
        if before.is_empty() {
            return;
        }
        let (still, cut) = self.unreadable_now(&before);
        let healed = {
            let mut state = self.state();
            for extent in before.iter() {
                if !still.iter().any(|left| left.overlaps(&extent)) {
                    state.need.remove(extent);
                }
            }
            state.need.is_empty()
        };
        if healed {
            self.note_healed(cut);
        }
    }

    pub(super) fn note_healed(&self, cut: u64) {
        tracing::info!(disk = %self.disk, cut, "damaged places were written anew: the replica is whole again from this cut on");
        let result = self.damage.change(|known| {
            for damage in &mut known.damages {
                damage.healed_at.get_or_insert(cut);
            }
            known.need.clear();
            Ok::<(), crate::table::TableError>(())
        });
        if let Err(error) = result {
            tracing::warn!(disk = %self.disk, %error, "what was healed cannot be stored; it is read again after a restart");
        }
    }

    /// Forgets damage that nothing can show any more: the base is past the cut that healed it.
    pub(crate) fn forget_damage(&self) {
        let base = self.manifest().base.cut;
        let result = self.damage.change(|known| {
            known.damages.retain(|damage| damage.healed_at.is_none_or(|healed| healed > base));
            Ok::<(), crate::table::TableError>(())
        });
        if let Err(error) = result {
            tracing::warn!(disk = %self.disk, %error, "damage that is gone cannot be forgotten");
        }
    }

    /// Reads the small files and the open segment's header again; a damaged one is named, and written again from memory.
    pub(crate) fn check_files(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        if !self.write {
            // They were read when it was opened, and nothing is written again.
            let named = self.open_report.rebuilt.iter();
            return named
                .map(|what| {
                    Finding::of_file(self.storage.path(super::manifest::NAME).display().to_string(), what.clone())
                })
                .collect();
        }
        {
            let mut state = self.state();
            let mended = state.journal.take_mended().into_iter().chain(state.journal.check_header());
            found.extend(mended.map(|(file, what)| Finding::of_file(file, what)));
            match super::Manifest::load(&*self.storage) {
                // Pins that were taken while there was no room are in memory alone.
                Ok(Loaded { manifest, is_stale, damaged: None })
                    if super::Manifest { pins: state.manifest.pins.clone(), ..manifest.clone() } == state.manifest =>
                {
                    if (is_stale || manifest != state.manifest)
                        && let Err(error) = state.manifest.store(&*self.storage)
                    {
                        tracing::warn!(disk = %self.disk, %error, "pins cannot be made durable");
                    }
                }
                outcome => {
                    let what = match outcome {
                        Ok(Loaded { damaged: Some(what), .. }) => what,
                        Ok(_) => "it does not hold what was written to it".to_owned(),
                        Err(error) => error.to_string(),
                    };
                    found.push(Finding::of_file(self.storage.path(super::manifest::NAME).display().to_string(), what));
                    if let Err(error) = state.manifest.store(&*self.storage) {
                        tracing::error!(disk = %self.disk, %error, "a damaged manifest cannot be written again");
                    }
                }
            }
        }
        if let Err(error) = self.damage.check() {
            found.push(Finding::of_file(self.damage.path(), error.to_string()));
        }
        found
    }

    /// Writes a segment whose index is damaged again, from its frames. False: the frames are damaged, too, or it is gone.
    pub fn repair_segment(&self, first: u64) -> Result<bool, ReplicaError> {
        let _one = self.merging.lock().expect("no panic while held");
        let found = self.parts().into_iter().find_map(|part| match part {
            Part::Sealed(sealed) if sealed.first_cut() == first => Some(sealed),
            _ => None,
        });
        let Some(old) = found else { return Ok(false) };
        let new = Sealed::rebuild(&*self.storage, first, old.last_cut, Some(&old));
        let Some(new) = new.map_err(|error| self.read_error(error))? else { return Ok(false) };
        let replaced = self.state().journal.replace(&old, Arc::new(new));
        tracing::warn!(disk = %self.disk, segment = old.segment.name, "a segment's index was made again from its frames");
        Ok(replaced)
    }
}
