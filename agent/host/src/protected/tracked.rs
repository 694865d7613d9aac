//! A disk that others write to: how what its tracker tells becomes records, scans and, at a settled instant, marks.
//!
//! *Consistency.* A granule is read after it was claimed and while nothing is in flight, and released once a log, the dirty bitmap or a durable
//! scan tells of it. The records of a granule may come in another order than its writes, and between two marks no cut is what the disk was at any
//! instant; that is why only marks are recovered to. At a mark nothing was dirty, claimed or in flight, so the last record of each
//! granule was read after its last write, and the log's prefix is the disk.
//!
//! Few blocks are logged, because a mark needs no scan then; many are scanned, which compares parts of 4 KiB with the replica and
//! sends what differs only.
//!
//! *Retries.* Whoever marks gathers again. *Cancellation.* What was not released is claimed still. *Crash.* The next session begins with what is claimed;
//! where the kernel did not watch on, it compares.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidemark_base::disk::Disk;
use tidemark_base::{Extent, ExtentSet};
use tidemark_hrl::Append;

use super::ProtectedDisk;
use crate::capture::tracker::{Changes, Tracker};
use crate::events::{EventKind, Severity};
use crate::log::record_parts;
use crate::source::{RECORD_BYTES_MAX, ScanReason, SourceError};
use crate::state::session::Mode;

/// What is logged while writers go on; more is scanned.
pub(crate) const LOGGED_BYTES_MAX: u64 = 1 << 20;
/// What is logged while writers stand still: they wait for it to be read.
pub(crate) const FROZEN_BYTES_MAX: u64 = 64 << 20;

/// What became of what changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Gathered {
    /// The log, or the dirty bitmap, tells of it all.
    All,
    /// Writes are in flight: nothing was read.
    InFlight,
    /// It is in the scans.
    Scanning,
}

impl ProtectedDisk {
    pub(crate) fn tracker(&self) -> Option<&Arc<dyn Tracker>> {
        self.tracker.as_ref()
    }

    /// Takes what changed, up to `logged_max` bytes of it into the log.
    pub(crate) fn gather(&self, logged_max: u64) -> Result<Gathered, SourceError> {
        let Some(tracker) = &self.tracker else { return Ok(Gathered::All) };
        let mut owes_compare = self.gathering.lock().expect("no panic while held");
        if let Some(reason) = tracker.broken() {
            // First: what is missed after this is seen by the next look.
            tracker.forgive();
            *owes_compare = true;
            let message = format!("the tracker of {} did not see every write: {reason}", self.path.display());
            self.events.publish(
                Severity::Warning,
                EventKind::DiskUnwitnessed,
                message,
                "the whole disk is compared by itself",
            );
        }
        if *owes_compare {
            let whole = ExtentSet::from_iter([Extent::new(0, self.identity.disk_bytes)]);
            self.add_for_all(&whole, ScanReason::Unclean).map_err(self.io_error("mark blocks"))?;
            *owes_compare = false;
            // From here on it is a witness again.
            tracker.arm(self.session.lock().expect("no panic while held").current().session.0);
            return Ok(Gathered::Scanning);
        }
        tracker.claim().map_err(self.io_error("claim what changed of"))?;
        if tracker.in_flight().map_err(self.io_error("count writes in flight"))? > 0 {
            return Ok(Gathered::InFlight);
        }
        let claimed = tracker.claimed();
        if claimed.is_empty() {
            return Ok(Gathered::All);
        }
        let gathered = if *self.mode.lock().expect("no panic while held") == Mode::Data {
            if claimed.total_bytes() > logged_max {
                self.add_for_all(&claimed, ScanReason::Tracked).map_err(self.io_error("mark blocks"))?;
                Gathered::Scanning
            } else {
                let read = |offset, buffer: &mut [u8]| self.disk.read_at(offset, buffer);
                claimed.iter().flat_map(record_parts).try_for_each(|part| self.log_block(part, &read))?;
                Gathered::All
            }
        } else {
            // What ends bitmap mode takes the bits while it holds admission.
            let all: Vec<Extent> = claimed.iter().collect();
            let admitted = self.admit(&[Extent::new(0, self.identity.disk_bytes)])?;
            let is_logging = *self.mode.lock().expect("no panic while held") == Mode::Data;
            if !is_logging {
                all.iter().for_each(|extent| self.dirty.mark(*extent));
            }
            self.in_flight.finish(admitted, self.clock.wall_now());
            if is_logging {
                return Ok(Gathered::InFlight);
            }
            if tracker.outlives_power_cuts() {
                self.dirty.sync().map_err(self.io_error("sync what changed of"))?;
            }
            Gathered::All
        };
        super::gap("gathered");
        tracker.release(&claimed).map_err(self.io_error("release what was claimed of"))?;
        Ok(gathered)
    }

    /// Logs what changed up to an instant, as it was then.
    pub(crate) fn log_changes(&self, changes: &dyn Changes) -> Result<(), SourceError> {
        let Some(tracker) = &self.tracker else { return Ok(()) };
        let _gathering = self.gathering.lock().expect("no panic while held");
        let changed = changes.changed(self.identity.disk);
        let read = |offset, buffer: &mut [u8]| changes.read_at(self.identity.disk, offset, buffer);
        changed.iter().flat_map(record_parts).try_for_each(|part| self.log_block(part, &read))?;
        super::gap("gathered");
        tracker.release(&changed).map_err(self.io_error("release what was claimed of"))
    }

    fn admit(&self, extents: &[Extent]) -> Result<crate::capture::in_flight::Admitted, SourceError> {
        self.in_flight.admit(extents).map_err(|_| SourceError::Closed { disk: self.identity.disk })
    }

    /// Reads a range and logs it as it is read.
    fn log_block(&self, part: Extent, read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>) -> Result<(), SourceError> {
        debug_assert!(part.length <= RECORD_BYTES_MAX);
        let extents = [part];
        let admitted = self.admit(&extents)?;
        if let Err(error) = self.intent.declare(&extents) {
            self.intent_failed(&error);
        }
        let mut data = vec![0; part.length as usize];
        let read = read(part.offset, &mut data);
        if read.is_ok() {
            let record = match data.iter().all(|byte| *byte == 0) {
                true => Append::Zeroes { extent: part },
                false => Append::Write { offset: part.offset, data: &data, hash: self.log.hasher().hash(&data) },
            };
            if let Err(reason) = self.log.append(&[record], part.length) {
                self.unlogged(&extents, &reason);
            }
        }
        self.writes.fetch_add(1, Ordering::AcqRel);
        self.intent.ended(part, self.tick_now());
        self.written_bytes.fetch_add(part.length, Ordering::Relaxed);
        self.in_flight.finish(admitted, self.clock.wall_now());
        self.watchers.changed();
        read.map_err(self.io_error("read changed blocks"))
    }

    /// Whether the log, with what is in the scans, is the disk at this instant.
    pub(crate) fn is_settled(&self) -> bool {
        self.tracker.as_ref().is_none_or(|tracker| {
            !tracker.is_dirty()
                && tracker.in_flight().is_ok_and(|writes| writes == 0)
                && tracker.claimed().is_empty()
                && tracker.broken().is_none()
        })
    }

    /// A compare of the whole disk is owed: its tracker missed something.
    pub(crate) fn is_unwitnessed(&self) -> bool {
        *self.gathering.lock().expect("no panic while held")
            || self.tracker.as_ref().is_some_and(|tracker| tracker.broken().is_some())
    }

    /// Something changed that no log and no bitmap tells of yet.
    pub(crate) fn is_dirty(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.is_dirty() || !tracker.claimed().is_empty())
    }

    /// Somebody holds it without a scan: of those that a stream is open to, if there are any.
    pub(crate) fn is_scanned(&self) -> bool {
        let consumers = self.consumers();
        let is_any_connected = consumers.iter().any(|consumer| consumer.is_connected());
        let mut there = consumers.iter().filter(|consumer| consumer.is_connected() || !is_any_connected);
        consumers.is_empty() || there.any(|consumer| consumer.progress().is_none())
    }
}
