//! What is done about every second while a disk is attached, and at the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tidemark_base::{Extent, ExtentSet, Position, Sequence};

use super::{HELP_ROOM, ProtectedDisk, insert_granules};
use crate::consumer::Consumer;
use crate::events::{EventKind, Severity};
use crate::log::{Unlogged, resume_text};
use crate::source::{EpochReason, ScanReason, SourceError};
use crate::state::intent::Tick;
use crate::state::session::{CleanDetach, Mode, Session};

/// A region without writes for so long loses its intent bit.
const IDLE_TICKS: Tick = 30_000;
/// A consumer that took nothing for so long is not waited for, and not scanned for, in bitmap mode.
const CONSUMER_ACTIVE: Duration = Duration::from_secs(60);
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// What the keeper remembers from one second to the next.
#[derive(Default)]
pub(crate) struct Keeper {
    /// When the last completed sync began, and how many writes had ended by then.
    synced: Tick,
    synced_writes: Option<u64>,
    /// Of the program that has an image open.
    restarts: u64,
    /// The disk's size when it was looked at last.
    bytes: Option<u64>,
}

impl ProtectedDisk {
    /// To be called about every second: syncs, clears idle intent bits, rotates, removes, watches the disk's size, and
    /// returns to the log when it can.
    pub fn tick(&self) {
        self.watch_size();
        self.watch_image();
        self.store_owed();
        self.sync_and_clear();
        self.make_room();
        self.store_mode();
        self.return_to_log();
    }

    /// Rotates a log that is long enough and removes those that are not needed: each second, and sooner under load.
    pub fn make_room(&self) {
        let rotated = self.log.rotate_when_long();
        // What was acknowledged goes first: it must not count against the limit.
        self.store_consumers();
        self.let_laggards_go();
        if let Err(error) = rotated.and_then(|()| self.log.enforce_limits()) {
            self.step_down(&error);
        }
    }

    fn watch_size(&self) {
        let attached = self.identity.disk_bytes;
        let bytes = match self.disk.current_bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                let message = format!("disk {} cannot be examined: {error}", self.path.display());
                return self.alarm("size", true, message, "check the medium");
            }
        };
        // What lay beyond is gone, whatever size it has later: it is compared once it can be read again, and there are no points
        // until then.
        let mut lost = None;
        {
            let mut keeper = self.keeper.lock().expect("no panic while held");
            let before = keeper.bytes.replace(bytes).unwrap_or(attached);
            if bytes < before.min(attached) {
                lost = Some(Extent::new(bytes, attached - bytes));
            }
        }
        if let Some(lost) = lost {
            self.has_shrunk.store(true, Ordering::Release);
            if self.add_for_all(&ExtentSet::from_iter([lost]), ScanReason::Unclean).is_err() {
                // Survives a killed process; an attach adds it to the scans.
                self.dirty.mark(lost);
            }
        }
        if bytes != attached {
            let message = format!(
                "disk {} changed its size from {attached} to {bytes} bytes while it was attached",
                self.path.display()
            );
            let help = "one that grew is taken over by itself, or by `tidemark machine disk resize`; one that shrank needs its size back";
            return self.alarm("size", true, message, help);
        }
        if self.alarms().remove("size").is_some() && self.has_shrunk.swap(false, Ordering::AcqRel) {
            let message = format!(
                "disk {} shrank, and has its size of {attached} bytes again: what may have been lost is compared",
                self.path.display()
            );
            self.events.publish(Severity::Warning, EventKind::DiskResized, message, "find out who resized it");
        }
    }

    /// The program that has an image open ended, and nothing was lost by that; but it should not.
    fn watch_image(&self) {
        let Some(restarts) = self.disk.image().map(|image| image.restarts()) else { return };
        let before = std::mem::replace(&mut self.keeper.lock().expect("no panic while held").restarts, restarts);
        if restarts > before {
            let message = format!(
                "the program that has image {} open ended and was started again; the disk went on, nothing of it is lost",
                self.path.display()
            );
            let help = "find out why it ended: the agent's log has what it said, the system's whether it was killed for want of memory";
            self.events.publish(Severity::Warning, EventKind::ImageReopened, message, help);
        }
    }

    /// While intent bits are set, what they stand for is synced, so that they can be cleared and little is lost.
    fn sync_and_clear(&self) {
        if !self.intent.is_any_set() {
            return;
        }
        let mut keeper = self.keeper.lock().expect("no panic while held");
        let began = self.tick_now();
        let writes = self.writes.load(Ordering::Acquire);
        if keeper.synced_writes == Some(writes) {
            // Each write is counted before the time of its end is noted.
            keeper.synced = began;
        } else {
            match self.sync() {
                Ok(true) => (keeper.synced, keeper.synced_writes) = (began, Some(writes)),
                // What the log holds may be lost with the power, so the regions stay named.
                Ok(false) => {}
                Err(error) => {
                    let help = "check the medium; flushes of the guest fail until the disk is attached again";
                    self.alarm("sync", true, format!("{} cannot be synced: {error}", self.path.display()), help);
                }
            }
        }
        let logged = self.logged_all();
        let cleared = self.intent.clear_idle(self.tick_now(), keeper.synced, IDLE_TICKS, logged, |region, clear| {
            self.in_flight.if_none_in(region, clear)
        });
        if let Err(error) = cleared {
            self.intent_failed(&error);
        }
    }

    /// Up to where the log tells of every write; `None` while blocks change that it does not tell of.
    fn logged_all(&self) -> Option<Sequence> {
        let is_logging = *self.mode.lock().expect("no panic while held") == Mode::Data && self.dirty.is_empty();
        is_logging.then(|| self.log.published().logged.sequence)
    }

    /// The disk, and whatever says what was written to it. False when the log cannot be synced any more.
    fn sync(&self) -> io::Result<bool> {
        if let Err(error) = self.in_flight.sync() {
            tracing::warn!(disk = %self.identity.disk, %error, "the slots cannot be synced");
        }
        self.flush()?;
        if !self.dirty.is_empty() {
            self.dirty.sync()?;
        }
        if let Err(error) = self.log.sync() {
            // Records that may not be on the media are no proof any more: their blocks are read from the disk instead.
            self.step_down(&Unlogged::Failed(error));
            return Ok(false);
        }
        Ok(true)
    }

    fn store_consumers(&self) {
        let consumers = self.consumers();
        let mut stored = Ok(());
        for consumer in &consumers {
            stored = consumer.store().and(stored);
        }
        match stored {
            Ok(()) => drop(self.alarms().remove("cursor")),
            Err(error) => {
                let message = format!("what was acknowledged of {} cannot be stored: {error}", self.path.display());
                self.alarm("cursor", false, message, "check the medium that holds the folder beside the disk");
            }
        }
        let epoch = self.log.published().logged.epoch;
        let waited_for = consumers.iter().filter(|consumer| consumer.covered().is_none());
        let cursors: Option<Vec<Position>> = waited_for.map(|consumer| consumer.durable_cursor()).collect();
        let lowest = cursors.into_iter().flatten().min_by_key(|cursor| (cursor.epoch == epoch, cursor.sequence));
        let Some(cursor) = lowest.filter(|cursor| cursor.epoch == epoch) else { return };
        for consumer in consumers.iter().filter(|consumer| consumer.covered().is_some()) {
            if let Err(error) = self.cover(consumer, &cursor) {
                tracing::warn!(disk = %self.identity.disk, server = %consumer.server(), %error, "the log is kept");
                return;
            }
        }
        // An ended log goes only when it is known that it ended: a session in data mode misses it otherwise.
        let is_mode_stored = self.session.lock().expect("no panic while held").current().mode != Mode::Data;
        if let Err(error) = self.log.remove_before(&cursor, is_mode_stored) {
            tracing::warn!(disk = %self.identity.disk, %error, "logs that are not needed cannot be removed");
        }
        if let Err(error) = self.intent.clear_shipped(cursor.sequence) {
            self.intent_failed(&error);
        }
    }

    /// Puts what was logged for a consumer that is not waited for into its scan, up to `until`: then these logs may go.
    fn cover(&self, consumer: &Consumer, until: &Position) -> Result<(), SourceError> {
        let from = consumer.covered().filter(|from| from.epoch == until.epoch);
        if from.is_some_and(|from| from.sequence >= until.sequence) {
            return Ok(());
        }
        let mut reader = self.log.read_unacknowledged(from.as_ref())?;
        let mut changed = ExtentSet::new();
        let mut reached = from.map_or(Sequence(0), |from| from.sequence);
        while reached < until.sequence {
            let Some(record) = reader.next_record()? else { break };
            reached = record.sequence;
            if let Some(extent) = record.extent() {
                insert_granules(&mut changed, extent);
            }
        }
        if !changed.is_empty() {
            self.add_for(consumer, &changed, ScanReason::Dirty).map_err(self.io_error("mark blocks"))?;
        }
        consumer.cover(*until).map_err(self.io_error("store what is covered"))
    }

    /// A consumer that is away, or too slow, does not bring those down that keep up: before the log is at its limit it steps
    /// down alone. A new epoch begins, with what it did not take in its scan, and the log does not wait for it until it takes
    /// something again. What those that keep up did not acknowledge at this instant goes to them as blocks, once.
    fn let_laggards_go(&self) {
        let consumers = self.consumers();
        if consumers.len() < 2 || !self.log.is_almost_full() {
            return;
        }
        let is_behind = |consumer: &&Arc<Consumer>| self.log.is_far_behind(consumer.cursor().as_ref());
        let (behind, keeping_up): (Vec<_>, Vec<_>) = consumers.iter().partition(is_behind);
        let away: Vec<&Arc<Consumer>> = behind.into_iter().filter(|consumer| consumer.covered().is_none()).collect();
        if away.is_empty() || !keeping_up.iter().any(|consumer| consumer.is_active(CONSUMER_ACTIVE)) {
            return;
        }
        let start = match self.begin_epoch(EpochReason::Unclean) {
            Ok(start) => start,
            Err(error) => {
                tracing::debug!(disk = %self.identity.disk, error = %error, "the log waits for all its consumers");
                return;
            }
        };
        for consumer in away {
            if let Err(error) = consumer.cover(start) {
                tracing::warn!(disk = %self.identity.disk, %error, "a consumer that is away cannot be let go");
                continue;
            }
            let message = format!(
                "process server {} is too far behind with the changes of {}: it gets the blocks instead of their history",
                consumer.server(),
                self.path.display()
            );
            let help = "bring the process server back; others are not affected";
            self.events.publish(Severity::Warning, EventKind::ConsumerSteppedDown, message, help);
        }
    }

    fn store_mode(&self) {
        let mode = self.mode.lock().expect("no panic while held").clone();
        let mut session = self.session.lock().expect("no panic while held");
        if session.current().mode.name() != mode.name() {
            let next = Session { mode, newest: self.log.time_now(), ..session.current().clone() };
            if let Err(error) = session.store(next) {
                tracing::warn!(disk = %self.identity.disk, %error, "the mode cannot be stored");
            }
        }
    }

    /// In bitmap mode: a new epoch begins once each consumer that is there has taken what the old log holds, or has no use for
    /// it because it is being scanned. One that is away or paused finds the log as it was: what can still be sent as
    /// history is not turned into a scan for want of patience.
    fn return_to_log(&self) {
        if *self.mode.lock().expect("no panic while held") == Mode::Data {
            return;
        }
        if let Err(wanted) = self.log.has_room() {
            self.tell_no_room(wanted);
            return;
        }
        let logged = self.log.published().logged;
        let consumers = self.consumers();
        let mut active = consumers.iter().filter(|consumer| consumer.is_active(CONSUMER_ACTIVE)).peekable();
        let is_drained = active.peek().is_some() && active.all(|consumer| consumer.has_passed(&logged));
        if (is_drained || consumers.is_empty())
            && let Err(error) = self.begin_epoch(EpochReason::Unclean)
        {
            tracing::debug!(disk = %self.identity.disk, error = %error, "still no log");
        }
    }

    /// Whatever ended the log, it is room that is waited for now: the status says so, and how much.
    fn tell_no_room(&self, wanted: u64) {
        let mut mode = self.mode.lock().expect("no panic while held");
        let Mode::Bitmap { reason } = &mut *mode else { return };
        let waits_for = resume_text(wanted);
        if !reason.ends_with(&waits_for) {
            *reason = format!("the log's folder is too full for another log ({reason}); {waits_for}");
            let text = reason.clone();
            drop(mode);
            self.alarm_unlogged(&text, HELP_ROOM);
        }
    }

    /// Drains, syncs disk and log, and proves that nobody needs to look again.
    pub fn detach(&self) -> io::Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let is_drained = self.in_flight.close(DRAIN_LIMIT);
        self.watchers.changed();
        if !is_drained {
            return Err(io::Error::other(format!("writes to {} do not end", self.path.display())));
        }
        let _changing = self.changing_epoch.lock().expect("no panic while held");
        self.flush()?;
        // With its times: they are the proof.
        self.disk.finish()?;
        let is_logging = self.log.is_logging();
        let position = match self.log.close() {
            Ok(position) => position,
            Err(Unlogged::NotLogging) => self.log.published().logged,
            Err(error) => return Err(io::Error::other(error)),
        };
        self.dirty.sync()?;
        for consumer in self.consumers() {
            consumer.sync_scan()?;
            consumer.store()?;
        }
        let mut session = self.session.lock().expect("no panic while held");
        let mut last = session.current().clone();
        if last.sync_failed {
            tracing::warn!(disk = %self.identity.disk, "it could not be synced in this boot: the next one compares it");
            return Ok(());
        }
        // What was not kept names nothing in the next session either.
        last.intent_lost |= self.intent.has_given_up();
        last.newest = self.log.published().time;
        last.mode = self.mode.lock().expect("no panic while held").clone();
        // One that only grew lost nothing: the next attach looks at its new end.
        let has_grown = || self.disk.current_bytes().is_ok_and(|bytes| bytes > self.identity.disk_bytes);
        if self.alarms().contains_key("size") && (self.has_shrunk.load(Ordering::Acquire) || !has_grown()) {
            return Err(io::Error::other(format!("{} changed its size", self.path.display())));
        }
        debug_assert!(is_logging || last.mode != Mode::Data);
        last.clean = Some(CleanDetach { identity: self.disk.identity()?, position, at: self.clock.wall_now() });
        session.store(last)
    }
}
