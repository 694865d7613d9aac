//! A writable layer over a view: a test failover boots from it, and nothing of it reaches the replica.
//!
//! Two files: `scratch.data`, sparse, as long as the disk, and `scratch.map`, one bit a block of 4 KiB that says whether the block is in the data file.
//!
//! *Consistency.* A block is taken over from the view before a part of it is written. Writes to one disk are serialised where they touch the map.
//! *Crash.* FLUSH: 1. data synced, 2. map synced. The map is written at FLUSH only, after the data: a bit never points at data that is not there. What was written after the last
//! FLUSH may be lost, as on any disk: a block that had no bit then shows the view's content or the new.
//! *Retries.* A failed FLUSH fails for ever. *Cancellation.* Removing the folder drops the layer.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Disk, Durability};
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::sync::RwLock;

use super::View;

const BLOCK: u64 = 4096;

pub struct ScratchDisk {
    below: Arc<View>,
    data: Arc<dyn StorageFile>,
    map_file: Arc<dyn StorageFile>,
    map: RwLock<Bitmap>,
    flush_failed: AtomicBool,
}

#[derive(Default)]
struct Bitmap {
    bits: Vec<u8>,
    /// Pages of 4 KiB of the map that differ from the file.
    dirty: std::collections::BTreeSet<usize>,
}

impl Bitmap {
    fn get(&self, block: u64) -> bool {
        self.bits[(block / 8) as usize] & (1 << (block % 8)) != 0
    }

    fn set(&mut self, block: u64) {
        let byte = (block / 8) as usize;
        self.bits[byte] |= 1 << (block % 8);
        self.dirty.insert(byte / 4096);
    }
}

impl ScratchDisk {
    /// Opens the layer in `storage`, or makes it. The map of a 1 TiB disk takes 32 MiB of memory.
    pub fn open(below: Arc<View>, storage: &dyn Storage) -> io::Result<Self> {
        let data = storage.open("scratch.data", OpenMode::OpenOrCreate)?;
        let map_file = storage.open("scratch.map", OpenMode::OpenOrCreate)?;
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
        let mut bits = vec![0; map_bytes as usize];
        map_file.read_at(0, &mut bits)?;
        let map = RwLock::new(Bitmap { bits, dirty: Default::default() });
        Ok(Self { below, data, map_file, map, flush_failed: AtomicBool::new(false) })
    }

    /// Bytes that the layer occupies.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.data.allocated_bytes()
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
        map.set(block);
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

    fn mark(map: &mut Bitmap, extent: Extent) {
        (extent.offset / BLOCK..=(extent.end() - 1) / BLOCK).for_each(|block| map.set(block));
    }

    /// The end of the run of blocks whose bit is as that of the block at `offset`, up to `end`.
    fn run_end(map: &Bitmap, offset: u64, end: u64) -> (u64, bool) {
        let ours = map.get(offset / BLOCK);
        let mut block = offset / BLOCK + 1;
        let last = (end - 1) / BLOCK;
        let whole = if ours { 0xff } else { 0 };
        while block <= last {
            if block.is_multiple_of(8) && block + 8 <= last && map.bits[(block / 8) as usize] == whole {
                block += 8;
            } else if map.get(block) == ours {
                block += 1;
            } else {
                break;
            }
        }
        ((block * BLOCK).min(end), ours)
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
        let end = offset + buffer.len() as u64;
        let map = self.map.read().expect("no panic while held");
        let mut at = offset;
        while at < end {
            let (until, ours) = Self::run_end(&map, at, end);
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

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        self.check_range(offset, data.len() as u64)?;
        if !data.is_empty() {
            let extent = Extent::new(offset, data.len() as u64);
            let mut map = self.map.write().expect("no panic while held");
            self.prepare(&mut map, extent)?;
            self.data.write_at(offset, data)?;
            Self::mark(&mut map, extent);
        }
        self.make_durable(durability)
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        self.check_range(extent.offset, extent.length)?;
        if !extent.is_empty() {
            let mut map = self.map.write().expect("no panic while held");
            self.prepare(&mut map, extent)?;
            self.data.punch_hole(extent.offset, extent.length)?;
            if !discard {
                self.data.reserve(extent.offset, extent.length)?;
            }
            Self::mark(&mut map, extent);
        }
        self.make_durable(durability)
    }

    fn flush(&self) -> io::Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        // Writers wait: a bit set after the data was synced must not reach the map file with this flush.
        let mut map = self.map.write().expect("no panic while held");
        let result = self.data.sync().and_then(|()| {
            for page in std::mem::take(&mut map.dirty) {
                let from = page * 4096;
                let to = (from + 4096).min(map.bits.len());
                self.map_file.write_at(from as u64, &map.bits[from..to])?;
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
        let map = self.map.read().expect("no panic while held");
        let (until, ours) = Self::run_end(&map, offset, self.bytes());
        if ours {
            return Ok((until - offset, Allocation::Data));
        }
        let (length, kind) = self.below.allocation(offset)?;
        Ok((length.min(until - offset), kind))
    }
}
