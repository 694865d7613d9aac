//! How an epoch of a disk ends and the next one begins, while it is attached.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidemark_base::{Epoch, ExtentSet, Position};

use super::{ProtectedDisk, insert_granules, push_epoch};
use crate::capture::in_flight::Hold;
use crate::consumer::Consumer;
use crate::events::{EventKind, Severity};
use crate::log::{ChainReader, DiskLog};
use crate::source::{EpochReason, ScanReason, SourceError};
use crate::state::session::Mode;

impl ProtectedDisk {
    /// Ends the epoch: see [`Source::new_epoch`]. Also the way back from bitmap mode.
    ///
    /// 1. a new log is made and synced
    /// 2. the disk is held
    /// 3. what the old log holds and nobody acknowledged, and the dirty bitmap, are added to each consumer's scan, durably
    /// 4. the session names the new epoch, durably
    /// 5. the new log takes over and the disk is released
    /// 6. the old logs and the dirty bits go
    ///
    /// Failure before 4: the new log is removed again. Crash between 1 and 4: the old epoch stands; the log of one that did not
    /// begin is removed. After 4: the new one stands, what the old logs held is in the scans, and they are removed.
    pub(super) fn begin_epoch(&self, reason: EpochReason) -> Result<Position, SourceError> {
        let _changing = self.changing_epoch.lock().expect("no panic while held");
        if self.closed.load(Ordering::Acquire) {
            return Err(SourceError::Closed { disk: self.identity.disk });
        }
        // Most of it is gathered before the new log is made and the disk is held.
        let mut behind: Vec<Behind> =
            self.consumers().iter().map(|consumer| Behind::of(&self.log, consumer.clone())).collect();
        behind.iter_mut().for_each(Behind::gather);
        let new = self.log.create_epoch(Epoch::random()).map_err(|error| {
            let source = io::Error::other(format!("{error}: {}", source_of(&error)));
            SourceError::Io { disk: self.identity.disk, what: "begin a log", source }
        })?;
        let start = new.position();
        let hold = match self.announce_epoch(start.epoch, reason, &mut behind) {
            Ok(hold) => hold,
            Err(error) => {
                self.log.discard(new);
                return Err(error);
            }
        };
        // Whoever ends the new log at once steps down after us, not before.
        let mut mode = self.mode.lock().expect("no panic while held");
        let old = self.log.install(new);
        self.dirty.clear_all();
        self.intent.forget_sequences();
        *mode = Mode::Data;
        drop(mode);
        drop(hold);
        if let Err(error) = self.log.remove(&old) {
            tracing::warn!(disk = %self.identity.disk, %error, "an old log could not be removed");
        }
        if self.alarms().remove("log").is_some() {
            let message =
                format!("the changes of {} are logged again; what was not is read from the disk", self.path.display());
            self.events.publish(Severity::Information, EventKind::SteppedUp, message, "");
        }
        tracing::info!(disk = %self.identity.disk, epoch = %start.epoch, ?reason, "new epoch");
        self.watchers.changed();
        Ok(start)
    }

    /// Steps 2 to 4 of [`Self::begin_epoch`].
    fn announce_epoch(
        &self,
        epoch: Epoch,
        reason: EpochReason,
        behind: &mut [Behind],
    ) -> Result<Hold<'_>, SourceError> {
        let hold = self.hold_drained()?;
        let dirty = self.dirty.extents();
        for behind in behind {
            behind.gather();
            for extent in dirty.iter() {
                behind.changed.insert(extent);
            }
            if !behind.is_readable || reason == EpochReason::LogDamaged {
                // Not the whole disk: what it may lack lies in these regions, whatever the log says.
                let unshipped = self.intent.unshipped();
                unshipped.iter().for_each(|extent| behind.changed.insert(extent));
                let message = format!(
                    "the log of {} cannot be read back: {} bytes that it may have held are compared",
                    self.path.display(),
                    unshipped.total_bytes()
                );
                let help = "check the medium that holds the folder beside the disk";
                self.events.publish(Severity::Warning, EventKind::LogDamaged, message, help);
            }
            let reason = match reason {
                _ if !behind.is_readable => ScanReason::LogDamaged,
                _ if !dirty.is_empty() => ScanReason::Dirty,
                EpochReason::Diverged => ScanReason::Diverged,
                EpochReason::LogDamaged => ScanReason::LogDamaged,
                // The log tells what changed: it is sent, not compared.
                EpochReason::NewConsumer | EpochReason::Unclean => ScanReason::Dirty,
            };
            // Also for one that is to be scanned whole already: a scan that runs has read some of it before it changed, and what
            // it was sent as records does not read as zeroes there any more.
            if !behind.changed.is_empty() && !tidemark_base::sabotage::is("epoch-scan") {
                self.add_for(&behind.consumer, &behind.changed, reason).map_err(self.io_error("mark blocks"))?;
            }
        }
        let mut session = self.session.lock().expect("no panic while held");
        let mut next = session.current().clone();
        let held: Vec<Epoch> = self.consumers().iter().filter_map(|consumer| Some(consumer.cursor()?.epoch)).collect();
        push_epoch(&mut next.epochs, epoch, &held);
        next.mode = Mode::Data;
        next.newest = self.log.time_now();
        session.store(next).map_err(self.io_error("store the session"))?;
        Ok(hold)
    }
}

/// What a consumer did not acknowledge of the current epoch.
struct Behind {
    consumer: Arc<Consumer>,
    reader: Option<ChainReader>,
    changed: ExtentSet,
    is_readable: bool,
}

impl Behind {
    fn of(log: &Arc<DiskLog>, consumer: Arc<Consumer>) -> Self {
        let reader = log.read_unacknowledged(consumer.cursor().as_ref()).ok();
        Self { consumer, is_readable: reader.is_some(), reader, changed: ExtentSet::new() }
    }

    fn gather(&mut self) {
        let Some(reader) = &mut self.reader else { return };
        self.is_readable = self.is_readable
            && (|| -> Result<(), SourceError> {
                while let Some(record) = reader.next_record()? {
                    if let Some(extent) = record.extent() {
                        insert_granules(&mut self.changed, extent);
                    }
                }
                Ok(())
            })()
            .is_ok();
    }
}

fn source_of(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}
