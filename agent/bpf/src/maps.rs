//! Maps of the kernel as memory.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;
use memmap2::{MmapOptions, MmapRaw};

/// An array of u64 that programs of the kernel change while we look.
pub struct Words {
    map: MmapRaw,
    count: usize,
}

impl Words {
    pub fn map(data: &MapData, count: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(count * 8).map_raw(data.fd().as_fd().as_raw_fd())?;
        Ok(Self { map, count })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "outside the map");
        // SAFETY: inside the mapping, which is aligned to a page, lives as long as `self`, and is only ever used as atomics.
        unsafe { &*self.map.as_ptr().cast::<AtomicU64>().add(index) }
    }

    pub fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    pub fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }
}
