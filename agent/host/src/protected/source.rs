//! A protected disk as senders see it.

use std::sync::Weak;
use std::sync::atomic::Ordering;

use tidemark_base::disk::Disk;
use tidemark_base::{Epoch, Extent, ExtentSet, Position, ServerId};

use super::ProtectedDisk;
use crate::source::{
    DataRef, EpochReason, Located, LogState, PendingScan, PendingWindow, ReadDataError, RecordReader, ScanReason,
    ScanRevision, Source, SourceError, SourceIdentity, Watcher,
};
use crate::state::session::Mode;

impl Source for ProtectedDisk {
    fn identity(&self) -> SourceIdentity {
        self.identity
    }

    fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    fn state(&self) -> LogState {
        // In this order: an addition that was made before the mark that we see is then seen, too.
        let logged = self.log.published();
        let scan_revision = ScanRevision(self.revision.load(Ordering::Acquire));
        let is_logging = *self.mode.lock().expect("no panic while held") == Mode::Data;
        LogState {
            logged: logged.logged,
            marked: logged.marked,
            time: logged.time,
            scan_revision,
            is_logging,
            closed: self.closed.load(Ordering::Acquire),
        }
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.session.lock().expect("no panic while held").current().epochs.clone()
    }

    fn watch(&self, watcher: Weak<Watcher>) {
        self.watchers.add(watcher);
    }

    fn locate(&self, position: &Position) -> Result<Located, SourceError> {
        let found = self.log.locate(position).map_err(|error| {
            tracing::error!(disk = %self.identity.disk, error = %error, "log cannot be read back");
            SourceError::History { disk: self.identity.disk, after: *position }
        })?;
        Ok(match found {
            Located::Unknown if self.epochs().contains(&position.epoch) => Located::Earlier,
            found => found,
        })
    }

    fn read_after(&self, position: &Position) -> Result<Box<dyn RecordReader>, SourceError> {
        Ok(Box::new(self.log.read_after(position)?))
    }

    fn read_data(&self, data: &[DataRef], buffer: &mut [u8]) -> Result<(), ReadDataError> {
        self.log.read_data(data, buffer)
    }

    fn cursor(&self, consumer: ServerId) -> Option<Position> {
        self.consumer(consumer)?.cursor()
    }

    fn acknowledged(&self, consumer: ServerId, position: Position) -> Result<(), SourceError> {
        if let Err(error) = self.known_consumer(consumer, "move the cursor")?.acknowledged(position) {
            // The keeper tries again within a second, and tells of it.
            tracing::debug!(disk = %self.identity.disk, %error, "what was acknowledged is not stored yet");
        }
        Ok(())
    }

    fn pending_scan(&self, consumer: ServerId, newer_than: ScanRevision) -> Result<PendingScan, SourceError> {
        let consumer = self.known_consumer(consumer, "read the scan bitmap")?;
        let _adding = self.adding.lock().expect("no panic while held");
        Ok(consumer.pending(newer_than, ScanRevision(self.revision.load(Ordering::Acquire))))
    }

    fn pending_window(
        &self,
        consumer: ServerId,
        newer_than: ScanRevision,
        from: u64,
    ) -> Result<PendingWindow, SourceError> {
        let consumer = self.known_consumer(consumer, "read the scan bitmap")?;
        let _adding = self.adding.lock().expect("no panic while held");
        Ok(consumer.window(newer_than, from, ScanRevision(self.revision.load(Ordering::Acquire))))
    }

    fn pending_bytes(&self, consumer: ServerId) -> Result<u64, SourceError> {
        Ok(self.known_consumer(consumer, "read the scan bitmap")?.scan_bytes())
    }

    fn require_scan(&self, consumer: ServerId, extents: &ExtentSet, reason: ScanReason) -> Result<(), SourceError> {
        let consumer = self.known_consumer(consumer, "mark blocks")?;
        self.add_for(&consumer, extents, reason).map_err(self.io_error("mark blocks"))
    }

    fn scanned(&self, consumer: ServerId, extent: Extent, seen: ScanRevision) -> Result<(), SourceError> {
        self.known_consumer(consumer, "clear blocks")?.scanned(extent, seen);
        Ok(())
    }

    fn is_complete(&self) -> bool {
        !self.is_dirty()
    }

    fn barrier(&self) -> Result<Position, SourceError> {
        let barrier = self.barrier.get().and_then(Weak::upgrade);
        let barrier = barrier.ok_or(SourceError::Closed { disk: self.identity.disk })?;
        let positions = barrier.barrier()?;
        let own = positions.into_iter().find(|(disk, _)| *disk == self.identity.disk);
        own.map(|(_, position)| position).ok_or(SourceError::Closed { disk: self.identity.disk })
    }

    fn new_epoch(&self, reason: EpochReason) -> Result<Position, SourceError> {
        self.begin_epoch(reason)
    }
}
