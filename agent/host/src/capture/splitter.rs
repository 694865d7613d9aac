//! The write path of a splitter: a provider that sees each write with its data, in order.
//!
//! *Consistency.* Admission and overlap lock → intent bit durable → slot → disk → log → slot cleared → reply; for all
//! writes that came together at once. Overlapping writes are never in flight together, so that the log has them in
//! the order of the disk. *Retries.* None: a write that fails logs nothing, its range is scanned, its client is told.
//! *Cancellation.* A write that was admitted runs to its end, whether or not its client waits. *Crash.* See
//! [`crate::attach`]: what was in flight is in the slots, what may be lost with the page cache in the intent bitmap.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tidemark_base::disk::{Allocation, Disk, DiskWrite, Durability};
use tidemark_base::error::{not_supported, shut_down};
use tidemark_base::{CHUNK_BYTES_MAX, Extent};
use tidemark_hrl::{Append, DataHash};
use tidemark_nbd::{CachedReader, Export, WriteRequest};

use super::HomeDisk;
use super::in_flight::{Admitted, Closed};
use crate::log::{DiskLog, Unlogged, record_parts};
use crate::protected::ProtectedDisk;
use crate::source::RECORD_BYTES_MAX;

/// A protected disk as its guest sees it.
pub struct Splitter {
    disk: Arc<ProtectedDisk>,
    /// `None`: the file is not the disk itself.
    reader: Option<CachedReader>,
}

/// Buffers of one thread that live on from batch to batch.
#[derive(Default)]
struct Scratch {
    extents: Vec<Extent>,
    hashes: Vec<DataHash>,
    appends: Vec<Append<'static>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl HomeDisk for Splitter {
    fn put(&self, extent: Extent, data: Option<&[u8]>) -> io::Result<()> {
        let Some(data) = data else { return self.zero(extent, true, Durability::Cached) };
        for (at, data) in (extent.offset..).step_by(CHUNK_BYTES_MAX).zip(data.chunks(CHUNK_BYTES_MAX)) {
            let mut results = [Err(io::Error::from(io::ErrorKind::Other))];
            self.write_batch(&[WriteRequest { offset: at, data, fua: false }], &mut results);
            let [result] = results;
            result?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Export::flush(self)
    }
}

impl Splitter {
    pub fn new(disk: Arc<ProtectedDisk>) -> io::Result<Self> {
        let reader = match disk.disk.image() {
            None => Some(CachedReader::new(disk.disk.file())?),
            Some(_) => None,
        };
        Ok(Self { disk, reader })
    }

    /// Runs writes that were admitted together.
    fn run(
        &self,
        admitted: Admitted,
        writes: &[WriteRequest<'_>],
        results: &mut [io::Result<()>],
        extents: &[Extent],
        hashes: &mut Vec<DataHash>,
        appends: &mut Vec<Append<'static>>,
    ) {
        let disk = &*self.disk;
        self.prepare(&admitted, extents);
        hashes.clear();
        let mut records = recycle(std::mem::take(appends));
        let mut bytes = 0;
        let durability = |write: &WriteRequest<'_>| if write.fua { Durability::Durable } else { Durability::Cached };
        let image = disk.disk.image();
        if let Some(image) = image {
            let together: Vec<DiskWrite<'_>> = writes
                .iter()
                .map(|write| DiskWrite { offset: write.offset, data: write.data, durability: durability(write) })
                .collect();
            image.write_many(&together, results);
        }
        for (write, result) in writes.iter().zip(results.iter_mut()) {
            if image.is_none() {
                *result = disk.disk.write_at(write.offset, write.data, durability(write));
            }
            super::gap("written");
            match result {
                Ok(()) => {
                    bytes += write.data.len() as u64;
                    // Outside of the appender's lock: hashing is most of the work.
                    for (part, data) in (0u64..).zip(write.data.chunks(RECORD_BYTES_MAX as usize)) {
                        let hash = disk.log.hasher().hash(data);
                        records.push(Append::Write { offset: write.offset + part * RECORD_BYTES_MAX, data, hash });
                    }
                }
                Err(error) => disk.write_failed(write.extent(), error),
            }
        }
        if !records.is_empty()
            && let Err(reason) = disk.log.append(&records, bytes)
        {
            for (extent, result) in extents.iter().zip(results.iter()) {
                if result.is_ok() {
                    disk.unlogged(&[*extent], &reason);
                }
            }
        }
        super::gap("logged");
        *appends = recycle(records);
        self.end(admitted, extents, bytes);
    }

    /// Everything that must be so before the disk is touched.
    fn prepare(&self, admitted: &Admitted, extents: &[Extent]) {
        let disk = &*self.disk;
        super::gap("admitted");
        if let Err(error) = disk.intent.declare(extents) {
            disk.intent_failed(&error);
        }
        super::gap("declared");
        if !tidemark_base::sabotage::is("slots-set") {
            disk.in_flight.publish(admitted, extents, disk.clock.wall_now());
        }
        super::gap("published");
    }

    fn end(&self, admitted: Admitted, extents: &[Extent], bytes: u64) {
        let disk = &*self.disk;
        // Counted first: where the time of its end is seen, a sync that counted fewer writes did not cover it.
        disk.writes.fetch_add(1, Ordering::AcqRel);
        let now = disk.tick_now();
        for extent in extents {
            disk.intent.ended(*extent, now);
        }
        disk.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        disk.in_flight.finish(admitted, disk.clock.wall_now());
        super::gap("finished");
        disk.watchers.changed();
    }
}

impl Export for Splitter {
    fn bytes(&self) -> u64 {
        self.disk.identity.disk_bytes
    }

    fn zeroes_fast(&self) -> bool {
        !self.disk.disk.is_block_device() && self.disk.disk.image().is_none()
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<io::Result<()>> {
        self.reader.as_ref()?.try_read(offset, buffer)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.disk.read_at(offset, buffer)
    }

    /// Those to an image wait for the program that has it open.
    fn writes_inline(&self) -> bool {
        self.disk.disk.image().is_none()
    }

    fn write_batch(&self, writes: &[WriteRequest<'_>], results: &mut [io::Result<()>]) {
        // Nobody below comes back here on this thread, so the buffers are free.
        let mut scratch = SCRATCH.with(RefCell::take);
        let Scratch { extents, hashes, appends } = &mut scratch;
        extents.clear();
        extents.extend(writes.iter().map(WriteRequest::extent));
        let mut at = 0;
        while at < writes.len() {
            let admitted = match self.disk.in_flight.admit(&extents[at..]) {
                Ok(admitted) => admitted,
                Err(Closed) => {
                    results[at..].iter_mut().for_each(|result| *result = Err(detached()));
                    break;
                }
            };
            let end = at + admitted.len();
            self.run(admitted, &writes[at..end], &mut results[at..end], &extents[at..end], hashes, appends);
            at = end;
        }
        SCRATCH.set(scratch);
    }

    /// Zeroes are logged as such. A TRIM is executed so that the range reads as zeroes afterwards, whatever the disk makes
    /// of it: [`Disk::zero`] punches a hole where that promises zeroes, and writes them otherwise.
    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        let disk = &*self.disk;
        let extents = [extent];
        let admitted = disk.in_flight.admit(&extents).map_err(|Closed| detached())?;
        self.prepare(&admitted, &extents);
        let result = disk.disk.zero(extent, discard, durability);
        super::gap("written");
        match &result {
            Ok(()) => {
                if let Err(reason) = disk.log.append(&[Append::Zeroes { extent }], 0) {
                    disk.unlogged(&extents, &reason);
                }
            }
            Err(error) => disk.write_failed(extent, error),
        }
        super::gap("logged");
        self.end(admitted, &extents, if result.is_ok() { extent.length } else { 0 });
        result
    }

    /// Changes no content, so nothing is logged; but the file's times, which must stay explained as those of a write.
    fn allocate(&self, extent: Extent) -> io::Result<()> {
        let disk = &*self.disk;
        if disk.disk.is_block_device() || disk.disk.image().is_some() {
            return Err(not_supported());
        }
        let extents = [extent];
        let admitted = disk.in_flight.admit(&extents).map_err(|Closed| detached())?;
        self.prepare(&admitted, &extents);
        let result = disk.disk.reserve(extent);
        self.end(admitted, &extents, 0);
        result
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.disk.disk.allocation(offset)
    }
}

/// Reads ranges from the disk and logs them as they are now: what was in flight when the process was killed. The disk
/// is not served yet.
pub(crate) fn log_from_disk(disk: &dyn Disk, log: &DiskLog, extents: &[Extent]) -> Result<(), Unlogged> {
    let mut buffer = vec![0; RECORD_BYTES_MAX as usize];
    for part in extents.iter().copied().flat_map(record_parts) {
        let data = &mut buffer[..part.length as usize];
        disk.read_at(part.offset, data).map_err(|source| log.failed_at_disk(source))?;
        let hash = log.hasher().hash(data);
        log.append(&[Append::Write { offset: part.offset, data, hash }], part.length)?;
    }
    Ok(())
}

fn detached() -> io::Error {
    shut_down()
}

/// The empty vector with its room, for slices of another lifetime.
fn recycle<'a>(mut appends: Vec<Append<'_>>) -> Vec<Append<'a>> {
    appends.clear();
    appends.into_iter().map(|_| Append::Mark { body: &[] }).collect()
}
