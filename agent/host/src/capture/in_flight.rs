//! Which writes of a disk are in flight: admission, the overlap lock and the slot table in one.
//!
//! *Consistency.* Two writes that overlap are never in flight together, so that their order on the disk is their order in
//! the log. While a hold is in force nobody is admitted and nobody's finished write is acknowledged. *Retries.* None.
//! *Cancellation.* A hold that is dropped lets everybody go on. *Crash.* The slots name what was in flight.

use std::time::Duration;

use tidemark_base::sync::{Condvar, Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{Extent, Timestamp};

use crate::state::slots::{SLOTS, SlotTable};

/// The most writes that are taken in one batch. Half of the slots, so that one connection cannot take them all.
pub const BATCH_MAX: usize = SLOTS / 2;

pub struct InFlight {
    table: Mutex<Table>,
    /// For writers that wait for room, for an overlapping write, or for a hold to end.
    changed: Condvar,
    /// For a hold that waits for writes in flight.
    drained: Condvar,
    slots: SlotTable,
}

struct Table {
    extents: [Extent; SLOTS],
    used: [u64; SLOTS / 64],
    count: usize,
    held: bool,
    closed: bool,
    /// Writers at `changed`: waking nobody costs a system call.
    waiting: usize,
}

/// Slots of writes that were admitted together. Given back by [`InFlight::finish`].
#[must_use = "the writes stay in flight until finish"]
pub struct Admitted {
    slots: [u16; BATCH_MAX],
    count: usize,
}

impl Admitted {
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// The disk is being detached: no more writes.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed;

impl InFlight {
    pub fn new(slots: SlotTable) -> Self {
        let table = Table {
            extents: [Extent { offset: 0, length: 0 }; SLOTS],
            used: [0; SLOTS / 64],
            count: 0,
            held: false,
            closed: false,
            waiting: 0,
        };
        Self { table: Mutex::new(table), changed: Condvar::new(), drained: Condvar::new(), slots }
    }

    /// Admits as many of the writes, from the first, as can run together now; waits while that is none.
    ///
    /// Whoever holds nothing waits, and whoever holds something does not, so that no two can wait for each other.
    pub fn admit(&self, writes: &[Extent]) -> Result<Admitted, Closed> {
        let mut admitted = Admitted { slots: [0; BATCH_MAX], count: 0 };
        let mut table = self.table();
        loop {
            if table.closed {
                return Err(Closed);
            }
            if !table.held {
                for write in writes.iter().take(BATCH_MAX) {
                    let Some(slot) = table.take(*write) else { break };
                    admitted.slots[admitted.count] = slot as u16;
                    admitted.count += 1;
                }
                if admitted.count > 0 || writes.is_empty() {
                    return Ok(admitted);
                }
            }
            table.waiting += 1;
            table = self.changed.wait(table).expect("no panic while held");
            table.waiting -= 1;
        }
    }

    /// Stores the writes in the slot table: from here on a killed process leaves their ranges behind.
    pub fn publish(&self, admitted: &Admitted, writes: &[Extent], now: Timestamp) {
        self.slots.touch(now);
        for (slot, write) in admitted.slots[..admitted.count].iter().zip(writes) {
            self.slots.set(usize::from(*slot), *write);
        }
    }

    /// Makes what [`Self::publish`] and [`Self::finish`] said of the time durable: after a power loss it tells our own writes
    /// from those of someone else.
    pub fn sync(&self) -> std::io::Result<()> {
        self.slots.sync()
    }

    /// The writes are in the log, or marked dirty: frees their slots, and returns when they may be acknowledged.
    pub fn finish(&self, admitted: Admitted, now: Timestamp) {
        self.slots.touch(now);
        for slot in &admitted.slots[..admitted.count] {
            self.slots.clear(usize::from(*slot));
        }
        let mut table = self.table();
        for slot in &admitted.slots[..admitted.count] {
            table.free(usize::from(*slot));
        }
        if table.waiting > 0 {
            self.changed.notify_all();
        }
        if table.count == 0 && (table.held || table.closed) {
            self.drained.notify_all();
        }
        while table.held {
            table.waiting += 1;
            table = self.changed.wait(table).expect("no panic while held");
            table.waiting -= 1;
        }
    }

    /// Runs `action` under the lock if nothing in flight overlaps `region`.
    pub fn if_none_in(&self, region: Extent, action: &mut dyn FnMut()) {
        let table = self.table();
        if !table.overlaps(region) {
            action();
        }
    }

    /// Admits and acknowledges nothing from now on, until the hold is dropped. A second hold waits for the first to end;
    /// whoever holds several disks takes them in the order of their ids.
    pub fn hold(&self) -> Hold<'_> {
        let mut table = self.table();
        while table.held {
            table.waiting += 1;
            table = self.changed.wait(table).expect("no panic while held");
            table.waiting -= 1;
        }
        table.held = true;
        Hold { of: self }
    }

    /// Refuses every further write, and waits for those in flight. False when some are still there at the end of `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        let mut table = self.table();
        table.closed = true;
        self.changed.notify_all();
        self.wait_empty(table, Instant::now() + limit)
    }

    fn wait_empty(&self, mut table: MutexGuard<'_, Table>, deadline: Instant) -> bool {
        while table.count > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            table = self.drained.wait_timeout(table, left).expect("no panic while held").0;
        }
        true
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while held")
    }
}

impl Table {
    fn overlaps(&self, write: Extent) -> bool {
        self.used.iter().enumerate().any(|(word, &used)| {
            let mut bits = used;
            while bits != 0 {
                let slot = word * 64 + bits.trailing_zeros() as usize;
                if self.extents[slot].overlaps(&write) {
                    return true;
                }
                bits &= bits - 1;
            }
            false
        })
    }

    fn take(&mut self, write: Extent) -> Option<usize> {
        if self.overlaps(write) {
            return None;
        }
        let word = self.used.iter().position(|used| *used != u64::MAX)?;
        let slot = word * 64 + self.used[word].trailing_ones() as usize;
        self.used[word] |= 1 << (slot % 64);
        self.extents[slot] = write;
        self.count += 1;
        Some(slot)
    }

    fn free(&mut self, slot: usize) {
        self.used[slot / 64] &= !(1 << (slot % 64));
        self.count -= 1;
    }
}

/// A disk held at an instant. Dropping it releases the disk.
pub struct Hold<'a> {
    of: &'a InFlight,
}

impl Hold<'_> {
    /// Waits for the writes that were admitted before the hold. True: the disk equals the log's prefix, and stays so.
    pub fn wait_drained(&self, deadline: Instant) -> bool {
        if tidemark_base::sabotage::is("mark-hold") {
            return true;
        }
        self.of.wait_empty(self.of.table(), deadline)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut table = self.of.table();
        table.held = false;
        if table.waiting > 0 {
            self.of.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::session::SessionId;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn in_flight() -> (std::fs::File, Arc<InFlight>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(crate::state::slots::FILE_BYTES).unwrap();
        let slots = SlotTable::start(&file, SessionId::random(), Timestamp(0)).unwrap();
        (file, Arc::new(InFlight::new(slots)))
    }

    const A: Extent = Extent { offset: 0, length: 4096 };
    const B: Extent = Extent { offset: 4096, length: 4096 };
    const OVER_BOTH: Extent = Extent { offset: 2048, length: 4096 };

    #[test]
    fn a_batch_ends_before_a_write_that_overlaps() {
        let (_file, table) = in_flight();
        let admitted = table.admit(&[A, B, OVER_BOTH]).unwrap();
        assert_eq!(admitted.len(), 2);
        table.finish(admitted, Timestamp(0));
        let admitted = table.admit(&[OVER_BOTH]).unwrap();
        table.finish(admitted, Timestamp(0));
        let many: Vec<Extent> = (0..500).map(|n| Extent::new(n * 512, 512)).collect();
        let first = table.admit(&many).unwrap();
        assert_eq!(first.len(), BATCH_MAX);
        let second = table.admit(&many[BATCH_MAX..]).unwrap();
        assert_eq!(second.len(), BATCH_MAX);
        table.finish(first, Timestamp(0));
        table.finish(second, Timestamp(0));
    }

    #[test]
    fn an_overlapping_write_waits_and_the_slots_name_it() {
        let (file, table) = in_flight();
        let first = table.admit(&[A]).unwrap();
        table.publish(&first, &[A], Timestamp(5));
        assert_eq!(SlotTable::read(&file).unwrap().unwrap().in_flight, [A]);
        let finished = Arc::new(AtomicBool::new(false));
        let waiter = std::thread::spawn({
            let (table, finished) = (table.clone(), finished.clone());
            move || {
                let second = table.admit(&[OVER_BOTH]).unwrap();
                assert!(finished.load(Ordering::SeqCst), "admitted beside a write that it overlaps");
                table.finish(second, Timestamp(0));
            }
        });
        while table.table().waiting == 0 {
            std::thread::yield_now();
        }
        finished.store(true, Ordering::SeqCst);
        table.finish(first, Timestamp(9));
        waiter.join().unwrap();
        let found = SlotTable::read(&file).unwrap().unwrap();
        assert!(found.in_flight.is_empty());
    }

    #[test]
    fn a_hold_waits_for_writes_and_keeps_back_their_acknowledgement() {
        let (_file, table) = in_flight();
        let first = table.admit(&[A]).unwrap();
        let hold = table.hold();
        assert!(!hold.wait_drained(Instant::now()), "a write is in flight");
        let acknowledged = Arc::new(AtomicBool::new(false));
        let writer = std::thread::spawn({
            let (table, acknowledged) = (table.clone(), acknowledged.clone());
            move || {
                table.finish(first, Timestamp(0));
                acknowledged.store(true, Ordering::SeqCst);
                let next = table.admit(&[B]).unwrap();
                table.finish(next, Timestamp(0));
            }
        });
        assert!(hold.wait_drained(Instant::now() + Duration::from_secs(60)));
        while table.table().waiting == 0 {
            std::thread::yield_now();
        }
        assert!(!acknowledged.load(Ordering::SeqCst) && table.table().count == 0);
        drop(hold);
        writer.join().unwrap();
    }

    #[test]
    fn a_closed_disk_admits_nothing() {
        let (_file, table) = in_flight();
        let first = table.admit(&[A]).unwrap();
        assert!(!table.close(Duration::ZERO));
        assert_eq!(table.admit(&[B]).err(), Some(Closed));
        table.finish(first, Timestamp(0));
        assert!(table.close(Duration::ZERO));
    }
}
