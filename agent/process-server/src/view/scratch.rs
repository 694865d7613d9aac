//! A writable layer over a view: a failover boots from it, and nothing of it reaches the replica.
//!
//! Two files: `scratch.data`, sparse, as long as the disk, and `scratch.map`, one bit a block of 4 KiB that says whether the block is in the data file.
//! A layer that lasts ([`ScratchDisk::open_lasting`]) is a machine's disk: its machine goes on while this process is started again, so that nothing
//! acknowledged may end with the process. Its files are `disk.raw`, `disk.map` and `disk.live`, the map as it is now: a header of 4 KiB (`TMLIVE01`, then
//! the boot's id, then zeroes), then the bits. It counts in the boot that its header names, and only there: it is never synced, so after a power cut
//! a bit of it may point at data that is not there. When every block was taken over ([`ScratchDisk::fill`]) `disk.raw` is a plain disk image.
//! What its machine wrote is noted for the way home: [`super::capture`].
//!
//! *Consistency.* A block is taken over from the view before a part of it is written. Writes to one disk are serialised where they touch the map.
//! *Crash.* FLUSH: 1. data synced, 2. map synced. The map is written at FLUSH only, after the data: a bit never points at data that is not there. What was written after the last
//! FLUSH may be lost, as on any disk: a block that had no bit then shows the view's content or the new.
//! A layer that lasts, after `kill -9`: the live map has the bits of every write that was acknowledged, and the page cache the data. Its first open in a
//! boot: 1. the live map becomes the durable one, 2. its header names this boot; a crash between the two leaves a header that does not count.
//! *Retries.* A failed FLUSH fails for ever. *Cancellation.* Removing the folder drops the layer.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_base::bits::PAGE_BYTES;
use tidemark_base::disk::{Allocation, Disk, Durability, is_zero};
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::sync::RwLock;
use tidemark_base::{Bits, Extent};

use super::View;
use super::capture::{Capture, Claim, Frozen};

const BLOCK: u64 = 4096;
// The map of a layer is a set of parts, as it is stored.
const _: () = assert!(BLOCK == tidemark_base::bits::PART_BYTES);
const LIVE_MAGIC: &[u8; 8] = b"TMLIVE01";
const LIVE_HEADER: u64 = 4096;
/// What is taken over under one lock: a guest's write waits for so much at most.
const FILL_BYTES: u64 = 256 << 10;
/// Of zeroes, which cost little.
const FILL_HOLE_BYTES: u64 = 256 << 20;
/// The plain image that a layer that lasts becomes.
pub const PLAIN: &str = "disk.raw";
/// What the machine of a layer that lasts wrote.
pub const WITNESS: &str = "written.live";

pub struct ScratchDisk {
    below: Arc<View>,
    data: Arc<dyn StorageFile>,
    map_file: Arc<dyn StorageFile>,
    live: Option<Arc<dyn StorageFile>>,
    map: RwLock<Layered>,
    flush_failed: AtomicBool,
}

/// What one lock is over.
struct Layered {
    bitmap: Bitmap,
    capture: Capture,
}

struct Bitmap {
    bits: Bits,
    /// Bytes of the map's files.
    bytes: u64,
    /// Pages of the map that differ from the file.
    dirty: BTreeSet<usize>,
    /// The first and the last byte that differ from the live map.
    touched: Option<(u64, u64)>,
}

impl Bitmap {
    fn get(&self, block: u64) -> bool {
        self.bits.contains(block * BLOCK)
    }

    fn set(&mut self, extent: Extent) {
        self.bits.insert(extent);
        let (first, last) = (extent.offset / BLOCK / 8, (extent.end() - 1) / BLOCK / 8);
        self.dirty.extend(first as usize / PAGE_BYTES..=last as usize / PAGE_BYTES);
        let (from, to) = self.touched.unwrap_or((first, last));
        self.touched = Some((from.min(first), to.max(last)));
    }

    /// A page as its file has it; the last one may be shorter.
    fn page(&self, page: usize) -> (u64, Vec<u8>) {
        stored_page(&self.bits, self.bytes, page)
    }
}

fn stored_page(bits: &Bits, bytes: u64, page: usize) -> (u64, Vec<u8>) {
    let from = (page * PAGE_BYTES) as u64;
    let mut stored = vec![0; bytes.saturating_sub(from).min(PAGE_BYTES as u64) as usize];
    bits.read_stored(from, &mut stored);
    (from, stored)
}

/// A run of what a round is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClaimedRun {
    pub extent: Extent,
    pub zeroes: bool,
}

/// What [`ScratchDisk::fill`] took over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Filled {
    /// Where to go on.
    pub next: u64,
    /// Read and written; zeroes are neither.
    pub bytes: u64,
}

impl ScratchDisk {
    /// Opens the layer in `storage`, or makes it. What nobody wrote of a large disk's map is neither read nor in memory.
    pub fn open(below: Arc<View>, storage: &dyn Storage) -> io::Result<Self> {
        Self::open_files(below, storage, "scratch.data", "scratch.map")
    }

    /// The same, for a disk whose machine outlives this process. `boot` is this boot's id.
    pub fn open_lasting(below: Arc<View>, storage: &dyn Storage, boot: &str) -> io::Result<Self> {
        let mut disk = Self::open_files(below, storage, PLAIN, "disk.map")?;
        let Layered { bitmap: map, capture } = disk.map.get_mut().expect("no panic while held");
        let (live, found) = Self::open_live(storage, "disk.live", boot, &map.bits, map.bytes)?;
        if let Some(bits) = found {
            map.dirty = bits.differing_pages(&map.bits).collect();
            map.bits = bits;
        }
        disk.live = Some(live);
        let (live, found) = Self::open_live(storage, WITNESS, boot, &map.bits, map.bits.stored_bytes())?;
        // Without a witness of this boot everything in the layer may have been written.
        capture.written = found.unwrap_or_else(|| map.bits.clone());
        (capture.written_live, capture.live_at) = (Some(live), LIVE_HEADER);
        Ok(disk)
    }

    /// A file of `stored` bytes of bits that count in this boot alone, and what it holds; one that does not count becomes `initial`.
    fn open_live(
        storage: &dyn Storage,
        name: &str,
        boot: &str,
        initial: &Bits,
        stored: u64,
    ) -> io::Result<(Arc<dyn StorageFile>, Option<Bits>)> {
        let live = storage.open(name, OpenMode::OpenOrCreate)?;
        let bytes = LIVE_HEADER + stored;
        let mut header = vec![0; LIVE_HEADER as usize];
        header[..LIVE_MAGIC.len()].copy_from_slice(LIVE_MAGIC);
        let id = &boot.as_bytes()[..boot.len().min(64)];
        header[LIVE_MAGIC.len()..][..id.len()].copy_from_slice(id);
        let mut found = vec![0; LIVE_HEADER as usize];
        if live.bytes()? == bytes {
            live.read_at(0, &mut found)?;
        }
        if found == header && !id.is_empty() {
            return Ok((live.clone(), Some(Bits::load(initial.disk_bytes(), &*live, LIVE_HEADER, stored)?)));
        }
        // Its header goes first; and a machine's start waits for no zeroes of a large disk's map.
        live.set_bytes(0)?;
        live.set_bytes(bytes)?;
        // Room that is there now cannot be missing when the guest writes.
        live.reserve(0, bytes)?;
        for page in initial.filled_pages() {
            let (at, content) = stored_page(initial, stored, page);
            live.write_at(LIVE_HEADER + at, &content)?;
        }
        live.write_at(0, &header)?;
        storage.sync_folder("")?;
        Ok((live, None))
    }

    fn open_files(below: Arc<View>, storage: &dyn Storage, data: &str, map: &str) -> io::Result<Self> {
        let data = storage.open(data, OpenMode::OpenOrCreate)?;
        let map_file = storage.open(map, OpenMode::OpenOrCreate)?;
        let map_bytes = below.bytes().div_ceil(BLOCK).div_ceil(8);
        if data.bytes()? != below.bytes() {
            data.set_bytes(below.bytes())?;
        }
        if map_file.bytes()? != map_bytes {
            map_file.set_bytes(map_bytes)?;
        }
        data.sync()?;
        map_file.sync()?;
        storage.sync_folder("")?;
        let bits = Bits::load(below.bytes(), &*map_file, 0, map_bytes)?;
        let bitmap = Bitmap { bits, bytes: map_bytes, dirty: BTreeSet::new(), touched: None };
        let map = RwLock::new(Layered { bitmap, capture: Capture::new(below.bytes()) });
        Ok(Self { below, data, map_file, live: None, map, flush_failed: AtomicBool::new(false) })
    }

    /// Makes what was touched outlive this process, before it is acknowledged.
    fn keep_live(&self, map: &mut Bitmap) -> io::Result<()> {
        let (Some(live), Some((first, last))) = (&self.live, map.touched) else { return Ok(()) };
        let mut bytes = vec![0; (last - first + 1) as usize];
        map.bits.read_stored(first, &mut bytes);
        live.write_at(LIVE_HEADER + first, &bytes)?;
        map.touched = None;
        Ok(())
    }

    /// Takes over the next blocks from `from` on that are still below. `None`: there are none. Not durable before a FLUSH.
    pub fn fill(&self, from: u64) -> io::Result<Option<Filled>> {
        let end = self.bytes();
        if from >= end {
            return Ok(None);
        }
        let start = {
            let map = &self.map.read().expect("no panic while held").bitmap;
            let mut at = from / BLOCK * BLOCK;
            loop {
                if at >= end {
                    return Ok(None);
                }
                let (until, ours) = Self::run_end(map, at, end);
                if !ours {
                    break at;
                }
                at = until;
            }
        };
        let (length, kind) = self.below.allocation(start)?;
        let is_hole = kind == Allocation::Hole;
        // Only whole blocks can be holes: one that begins as a hole and goes on as data is read.
        let length = if start + length == end { length } else { length / BLOCK * BLOCK };
        let (is_hole, until) = match is_hole && length > 0 {
            true => (true, start + length.min(FILL_HOLE_BYTES)),
            false => (false, (start + length.clamp(BLOCK, FILL_BYTES)).next_multiple_of(BLOCK).min(end)),
        };
        let mut layered = self.map.write().expect("no panic while held");
        let map = &mut layered.bitmap;
        let (mut at, mut bytes) = (start, 0);
        let mut content = Vec::new();
        while at < until {
            let (to, ours) = Self::run_end(map, at, until);
            if !ours {
                let run = Extent::new(at, to - at);
                content.clear();
                if !is_hole {
                    content.resize(run.length as usize, 0);
                    self.below.read_at(at, &mut content)?;
                }
                if is_zero(&content) {
                    // A write that failed half way may have left something there.
                    self.data.punch_hole(run.offset, run.length)?;
                } else {
                    self.data.write_at(at, &content)?;
                    bytes += run.length;
                }
                map.set(run);
            }
            at = to;
        }
        self.keep_live(map)?;
        Ok(Some(Filled { next: until, bytes }))
    }

    /// Bytes of the disk that are in the layer.
    pub fn taken_bytes(&self) -> u64 {
        self.map.read().expect("no panic while held").bitmap.bits.bytes()
    }

    /// Bytes of data that are only below.
    pub fn missing_data_bytes(&self) -> io::Result<u64> {
        let (mut at, mut missing) = (0, 0);
        while at < self.bytes() {
            let (until, ours) = Self::run_end(&self.map.read().expect("no panic while held").bitmap, at, self.bytes());
            while !ours && at < until {
                let (length, kind) = self.below.allocation(at)?;
                let length = length.min(until - at);
                missing += if kind == Allocation::Hole { 0 } else { length };
                at += length;
            }
            at = until;
        }
        Ok(missing)
    }

    /// What a plain image of the disk occupies, at most.
    pub fn data_bytes(&self) -> io::Result<u64> {
        Ok((self.allocated_bytes()? + self.missing_data_bytes()?).min(self.bytes()))
    }

    /// Bytes that the layer occupies.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.data.allocated_bytes()
    }

    /// Bytes that the machine wrote since the failover; at least.
    pub fn written(&self) -> Bits {
        self.map.read().expect("no panic while held").capture.written.clone()
    }

    /// What home does not have, where that is known.
    pub fn behind_bytes(&self) -> Option<u64> {
        let layered = self.map.read().expect("no panic while held");
        let claimed = layered.capture.claim.as_ref().map_or(0, |claim| claim.parts.bytes());
        Some(layered.capture.behind.as_ref()?.bytes() + claimed)
    }

    /// Says what home does not have: `parts` from `done` on, and whatever the machine wrote since the failover, up to now.
    /// What was known of it before is forgotten.
    pub fn set_behind(&self, mut parts: Bits, done: u64) {
        parts.remove(Extent::new(0, done / BLOCK * BLOCK));
        // Under one lock: a write that is noted before it is in `written`, one after it in what is behind.
        let capture = &mut self.map.write().expect("no panic while held").capture;
        parts.unite(&capture.written);
        capture.claim = None;
        capture.behind = Some(parts);
    }

    /// Begins a round over what home does not have, on all disks of a machine at one instant. With a file the disk is frozen:
    /// what the round is about reads as it was now. A round that was not ended is given up.
    pub fn claim(round: u64, disks: &[(&ScratchDisk, Option<Arc<dyn StorageFile>>)]) {
        let mut all: Vec<_> = disks.iter().map(|(disk, _)| disk.map.write().expect("no panic while held")).collect();
        for (layered, (disk, file)) in all.iter_mut().zip(disks) {
            let capture = &mut layered.capture;
            capture.end(false);
            let nothing = Bits::new(disk.bytes());
            let parts = capture.behind.replace(nothing.clone()).unwrap_or_else(|| Bits::all(disk.bytes()));
            let frozen = file.clone().map(|file| Frozen { file, saved: nothing, failed: None });
            capture.claim = Some(Claim { round, parts, frozen });
        }
    }

    /// What a round is about; nothing once it is over.
    pub fn claimed_bytes(&self, round: u64) -> u64 {
        let layered = self.map.read().expect("no panic while held");
        claim_of(&layered.capture, round).map_or(0, |claim| claim.parts.bytes())
    }

    /// Ends a round, unless another one began. What it was about is at home, or still missing there.
    pub fn end_claim(&self, round: u64, is_durable: bool) {
        let capture = &mut self.map.write().expect("no panic while held").capture;
        if capture.claim.as_ref().is_some_and(|claim| claim.round == round) {
            capture.end(is_durable);
        }
    }

    /// Up to `most` runs of what a round is about, from `from` on, and where to go on.
    pub fn claimed_runs(&self, round: u64, from: u64, most: usize) -> io::Result<(Vec<ClaimedRun>, Option<u64>)> {
        let layered = self.map.read().expect("no panic while held");
        let claim = claim_of(&layered.capture, round)?;
        let (mut runs, mut at) = (Vec::<ClaimedRun>::new(), from);
        while let Some(run) = claim.parts.next_run(at) {
            at = run.offset;
            while at < run.end() {
                if runs.len() == most {
                    return Ok((runs, Some(at)));
                }
                let saved = claim.frozen.as_ref().map(|frozen| &frozen.saved);
                let (until, zeroes) = match saved.and_then(|saved| saved.next_run(at)) {
                    Some(saved) if saved.offset == at => (saved.end().min(run.end()), false),
                    next => {
                        let end = next.map_or(run.end(), |next| next.offset.min(run.end()));
                        let (length, kind) = self.allocation_in(&layered.bitmap, at)?;
                        // Whole parts only: a part that begins as a hole may go on as data.
                        let whole = if at + length >= end { end - at } else { length / BLOCK * BLOCK };
                        match kind {
                            Allocation::Hole if whole > 0 => (at + whole, true),
                            Allocation::Hole => ((at + BLOCK).min(end), false),
                            Allocation::Data => ((at + length).next_multiple_of(BLOCK).min(end), false),
                        }
                    }
                };
                let extent = Extent::new(at, until - at);
                match runs.last_mut() {
                    Some(last) if last.extent.end() == at && last.zeroes == zeroes => {
                        last.extent.length += extent.length
                    }
                    _ => runs.push(ClaimedRun { extent, zeroes }),
                }
                at = until;
            }
        }
        Ok((runs, None))
    }

    /// Reads what a round is about: as it was when the round began, where it is frozen.
    pub fn read_claimed(&self, round: u64, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check_range(offset, buffer.len() as u64)?;
        let layered = self.map.read().expect("no panic while held");
        let claim = claim_of(&layered.capture, round)?;
        let Some(frozen) = &claim.frozen else { return self.read_in(&layered.bitmap, offset, buffer) };
        if let Some(failed) = &frozen.failed {
            return Err(io::Error::other(format!("what the machine overwrote could not be kept: {failed}")));
        }
        let (mut at, end) = (offset, offset + buffer.len() as u64);
        while at < end {
            let saved = frozen.saved.next_run(at).unwrap_or(Extent::new(end, 0));
            let (until, is_saved) =
                if saved.offset <= at { (saved.end().min(end), true) } else { (saved.offset.min(end), false) };
            let part = &mut buffer[(at - offset) as usize..(until - offset) as usize];
            if is_saved {
                frozen.file.read_at(at, part)?;
            } else {
                self.read_in(&layered.bitmap, at, part)?;
            }
            at = until;
        }
        Ok(())
    }

    fn read_in(&self, map: &Bitmap, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            let (until, ours) = Self::run_end(map, at, end);
            let part = &mut buffer[(at - offset) as usize..(until - offset) as usize];
            if ours {
                self.data.read_at(at, part)?;
            } else {
                self.below.read_at(at, part)?;
            }
            at = until;
        }
        Ok(())
    }

    fn allocation_in(&self, map: &Bitmap, offset: u64) -> io::Result<(u64, Allocation)> {
        let (until, ours) = Self::run_end(map, offset, self.bytes());
        if ours {
            return Ok((until - offset, Allocation::Data));
        }
        let (length, kind) = self.below.allocation(offset)?;
        Ok((length.min(until - offset), kind))
    }

    /// Everything that is done before the machine's bytes reach the layer.
    fn before_write(&self, layered: &mut Layered, extent: Extent) -> io::Result<()> {
        for part in layered.capture.unsaved(extent) {
            let mut content = vec![0; part.length as usize];
            let content = self.read_in(&layered.bitmap, part.offset, &mut content).map(|()| content);
            layered.capture.saved(part, content);
        }
        layered.capture.note(extent)?;
        self.prepare(&mut layered.bitmap, extent)
    }

    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        self.below.check_range(offset, length)
    }

    /// Takes the block over from below, so that a part of it can be written.
    fn take_over(&self, map: &mut Bitmap, block: u64) -> io::Result<()> {
        if map.get(block) {
            return Ok(());
        }
        let length = (self.bytes() - block * BLOCK).min(BLOCK);
        let mut content = vec![0; length as usize];
        self.below.read_at(block * BLOCK, &mut content)?;
        self.data.write_at(block * BLOCK, &content)?;
        map.set(Extent::new(block * BLOCK, length));
        Ok(())
    }

    /// Blocks that `extent` covers wholly get their bit; those at its edges are taken over first.
    fn prepare(&self, map: &mut Bitmap, extent: Extent) -> io::Result<()> {
        let (first, last) = (extent.offset / BLOCK, (extent.end() - 1) / BLOCK);
        for edge in [first, last] {
            let block_end = ((edge + 1) * BLOCK).min(self.bytes());
            if extent.offset > edge * BLOCK || extent.end() < block_end {
                self.take_over(map, edge)?;
            }
        }
        Ok(())
    }

    /// The end of the run of blocks whose bit is as that of the block at `offset`, up to `end`.
    fn run_end(map: &Bitmap, offset: u64, end: u64) -> (u64, bool) {
        map.bits.run_end(offset, end)
    }

    fn make_durable(&self, durability: Durability) -> io::Result<()> {
        if durability == Durability::Durable { self.flush() } else { Ok(()) }
    }
}

impl Disk for ScratchDisk {
    fn bytes(&self) -> u64 {
        self.below.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check_range(offset, buffer.len() as u64)?;
        self.read_in(&self.map.read().expect("no panic while held").bitmap, offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        self.check_range(offset, data.len() as u64)?;
        if !data.is_empty() {
            let extent = Extent::new(offset, data.len() as u64);
            let mut layered = self.map.write().expect("no panic while held");
            self.before_write(&mut layered, extent)?;
            self.data.write_at(offset, data)?;
            layered.bitmap.set(extent);
            self.keep_live(&mut layered.bitmap)?;
        }
        self.make_durable(durability)
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        self.check_range(extent.offset, extent.length)?;
        if !extent.is_empty() {
            let mut layered = self.map.write().expect("no panic while held");
            self.before_write(&mut layered, extent)?;
            self.data.punch_hole(extent.offset, extent.length)?;
            if !discard {
                self.data.reserve(extent.offset, extent.length)?;
            }
            layered.bitmap.set(extent);
            self.keep_live(&mut layered.bitmap)?;
        }
        self.make_durable(durability)
    }

    fn flush(&self) -> io::Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // Writers wait: a bit set after the data was synced must not reach the map file with this flush.
        let map = &mut self.map.write().expect("no panic while held").bitmap;
        let result = self.data.sync().and_then(|()| {
            for page in std::mem::take(&mut map.dirty) {
                let (at, content) = map.page(page);
                self.map_file.write_at(at, &content)?;
            }
            self.map_file.sync()
        });
        if result.is_err() {
            self.flush_failed.store(true, Ordering::Release);
        }
        result
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.check_range(offset, 1)?;
        self.allocation_in(&self.map.read().expect("no panic while held").bitmap, offset)
    }
}

fn claim_of(capture: &Capture, round: u64) -> io::Result<&Claim> {
    let claim = capture.claim.as_ref().filter(|claim| claim.round == round);
    claim.ok_or_else(|| io::Error::other(format!("round {round} is over")))
}
