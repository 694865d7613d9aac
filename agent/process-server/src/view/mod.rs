//! The disk as it was at one cut.
//!
//! A read asks the indexes, newest first (merged ones for many segments: [`crate::journal::merged`]), and takes from the base what none of them covers. Every byte is proven on the way:
//! chunks by their hash, index pages and base blocks by their sums.
//!
//! *Consistency.* A view is of one consistent cut and never changes; what is appended or folded meanwhile does not show.
//! It holds a pin, so that no fold passes it; dropping the view drops the pin.
//! *Retries.* None: a read that fails names the file and the place, and fails again until the replica is repaired.
//! *Cancellation.* A view can be dropped at any time. *Crash.* A view has no state on disk; its scratch layer has ([`scratch`]).

pub mod cache;
pub mod capture;
pub mod scratch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemark_base::disk::{Allocation, Disk, Durability};
use tidemark_base::sync::Mutex;
use tidemark_base::{Extent, Position, Timestamp};

use crate::fold::base::BaseStore;
use crate::journal::{Found, Layer, ReadError};
use cache::BlockCache;

/// How many neighbouring runs of one kind become one answer.
const RUNS_MAX: usize = 64;

/// Cuts that open views stand on, counted. They die with the process; durable pins are in the manifest.
#[derive(Default)]
pub struct Pins(Mutex<BTreeMap<u64, usize>>);

impl Pins {
    pub fn pin(self: &Arc<Self>, cut: u64) -> PinGuard {
        *self.0.lock().expect("no panic while held").entry(cut).or_default() += 1;
        PinGuard { pins: self.clone(), cut }
    }

    pub fn oldest(&self) -> Option<u64> {
        self.0.lock().expect("no panic while held").keys().next().copied()
    }

    pub fn cuts(&self) -> Vec<u64> {
        self.0.lock().expect("no panic while held").keys().copied().collect()
    }

    pub fn count(&self) -> usize {
        self.0.lock().expect("no panic while held").values().sum()
    }
}

pub struct PinGuard {
    pins: Arc<Pins>,
    cut: u64,
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        let mut pins = self.pins.0.lock().expect("no panic while held");
        if let Some(count) = pins.get_mut(&self.cut) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.cut);
            }
        }
    }
}

/// A file, and the part of the disk that was read, where that is known.
pub type Suspect = (String, Option<Extent>);

/// What reads found to be damaged, until somebody looks into it.
#[derive(Default)]
pub struct Suspects(Mutex<BTreeSet<Suspect>>);

impl Suspects {
    /// More are not remembered: the scrub finds them.
    const MAX: usize = 64;

    fn note(&self, file: &str, extent: Option<Extent>) {
        let mut suspects = self.0.lock().expect("no panic while held");
        if suspects.len() < Self::MAX {
            suspects.insert((file.to_owned(), extent));
        }
    }

    pub fn take(&self) -> BTreeSet<Suspect> {
        std::mem::take(&mut *self.0.lock().expect("no panic while held"))
    }
}

/// A read-only disk.
pub struct View {
    layers: Vec<Layer>,
    base: Arc<BaseStore>,
    cache: Arc<BlockCache>,
    cut: u64,
    disk_bytes: u64,
    position: Option<Position>,
    time: Timestamp,
    _pin: PinGuard,
    suspects: Arc<Suspects>,
    /// Indexes that reads asked, the base counted as one.
    look_ups: AtomicU64,
}

impl View {
    /// `layers` are newest first; the base may be of a disk that grew since.
    pub fn new(
        layers: Vec<Layer>,
        disk_bytes: u64,
        base: Arc<BaseStore>,
        cache: Arc<BlockCache>,
        at: (u64, Option<Position>, Timestamp),
        pin: PinGuard,
        suspects: Arc<Suspects>,
    ) -> Self {
        let (cut, position, time) = at;
        Self { layers, base, cache, cut, disk_bytes, position, time, _pin: pin, suspects, look_ups: AtomicU64::new(0) }
    }

    pub fn cut(&self) -> u64 {
        self.cut
    }

    pub fn position(&self) -> Option<Position> {
        self.position
    }

    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// Indexes that a read asks at most, without the base.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Indexes that reads asked since the view was opened, the base counted as one.
    pub fn look_ups(&self) -> u64 {
        self.look_ups.load(Ordering::Relaxed)
    }

    /// Fills `buffer` from `offset`; the range lies on the disk.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let result = self.read_layers(offset, buffer);
        if let Err(ReadError::Damaged { file, extent, .. }) = &result {
            self.suspects.note(file, *extent);
        }
        result
    }

    fn read_layers(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let mut gaps = vec![Extent::new(offset, buffer.len() as u64)];
        let mut pieces: Vec<Found<'_>> = Vec::new();
        let mut asked = 0;
        for layer in &self.layers {
            if gaps.is_empty() {
                break;
            }
            asked += 1;
            let mut left = Vec::new();
            for gap in gaps {
                pieces.clear();
                layer.overlapping(gap, &self.cache, &mut |found| pieces.push(found))?;
                let mut at = gap.offset;
                for Found { extent, place, segment } in &pieces {
                    if extent.offset > at {
                        left.push(Extent::new(at, extent.offset - at));
                    }
                    let part = &mut buffer[(extent.offset - offset) as usize..][..extent.length as usize];
                    segment.read_extent(*extent, place, part, &self.cache)?;
                    at = extent.end();
                }
                if at < gap.end() {
                    left.push(Extent::new(at, gap.end() - at));
                }
            }
            gaps = left;
        }
        asked += u64::from(!gaps.is_empty());
        self.look_ups.fetch_add(asked, Ordering::Relaxed);
        for gap in gaps {
            self.base.read_at(gap.offset, &mut buffer[(gap.offset - offset) as usize..][..gap.length as usize])?;
        }
        Ok(())
    }

    /// One run at `offset`, as one layer knows it.
    fn run(&self, offset: u64) -> Result<(u64, Allocation), ReadError> {
        let mut end = self.disk_bytes;
        for layer in &self.layers {
            match layer.next(offset, &self.cache)? {
                Some((extent, place)) if extent.offset == offset => {
                    let kind = if place.is_zeroes() { Allocation::Hole } else { Allocation::Data };
                    return Ok((extent.end().min(end) - offset, kind));
                }
                Some((extent, _)) => end = end.min(extent.offset),
                None => {}
            }
        }
        self.base.allocation(offset, end)
    }

    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if offset.checked_add(length).is_none_or(|end| end > self.disk_bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the range does not lie on the disk"));
        }
        Ok(())
    }
}

fn read_only<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::ReadOnlyFilesystem,
        "a recovery point is read-only; serve it with a scratch layer",
    ))
}

impl Disk for View {
    fn bytes(&self) -> u64 {
        self.disk_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check_range(offset, buffer.len() as u64)?;
        Ok(self.read(offset, buffer)?)
    }

    fn write_at(&self, _offset: u64, _data: &[u8], _durability: Durability) -> io::Result<()> {
        read_only()
    }

    fn zero(&self, _extent: Extent, _discard: bool, _durability: Durability) -> io::Result<()> {
        read_only()
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.check_range(offset, 1)?;
        let (mut length, kind) = self.run(offset)?;
        for _ in 0..RUNS_MAX {
            if offset + length >= self.bytes() {
                break;
            }
            match self.run(offset + length)? {
                (more, same) if same == kind => length += more,
                _ => break,
            }
        }
        Ok((length, kind))
    }
}
