//! How far something is: told by who does it, read by who reports it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Extent;
use crate::disk::{Allocation, Disk, Durability};

/// Bytes that are done, and that there are. A guess for people: nothing depends on it.
#[derive(Default, Debug)]
pub struct Meter {
    done: AtomicU64,
    total: AtomicU64,
}

impl Meter {
    pub fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Everything before `at` is done. It never goes back.
    pub fn reach(&self, at: u64) {
        self.done.fetch_max(at, Ordering::Relaxed);
    }

    /// Done and total; `None` while it is not known how much there is.
    pub fn read(&self) -> Option<(u64, u64)> {
        let total = self.total.load(Ordering::Relaxed);
        (total > 0).then(|| (self.done.load(Ordering::Relaxed).min(total), total))
    }
}

/// A disk that is copied from its start to its end: the reads say how far that is.
pub struct Metered {
    pub disk: Arc<dyn Disk>,
    pub meter: Arc<Meter>,
    /// Where the disk begins in what is measured.
    pub from: u64,
}

impl Disk for Metered {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buffer)?;
        self.meter.reach(self.from + offset + buffer.len() as u64);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        self.disk.write_at(offset, data, durability)
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        self.disk.zero(extent, discard, durability)
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.disk.allocation(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_knows_nothing_before_the_total_and_never_goes_back() {
        let meter = Meter::default();
        meter.reach(10);
        assert_eq!(meter.read(), None);
        meter.expect(100);
        meter.reach(5);
        assert_eq!(meter.read(), Some((10, 100)));
        meter.reach(101);
        assert_eq!(meter.read(), Some((100, 100)));
    }
}
