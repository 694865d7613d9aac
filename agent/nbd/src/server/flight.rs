//! What one connection may have in flight, counted in requests and bytes; and the order of what overlaps.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tidemark_base::Extent;

use crate::limits::Limits;

pub struct Flight {
    used: Mutex<Used>,
    changed: Condvar,
    requests_max: usize,
    bytes_max: usize,
}

#[derive(Clone, Copy, Default)]
struct Used {
    requests: usize,
    bytes: usize,
}

/// A share of the limits; returns when dropped.
pub struct Permit {
    flight: Arc<Flight>,
    requests: usize,
    bytes: usize,
}

impl Flight {
    pub fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            used: Mutex::default(),
            changed: Condvar::new(),
            requests_max: limits.in_flight_requests_max.max(1),
            bytes_max: limits.in_flight_bytes_max,
        })
    }

    /// Waits until there is room. What is larger than the limit is let in alone.
    pub fn acquire(self: &Arc<Self>, requests: usize, bytes: usize) -> Permit {
        let mut used = self.used.lock().expect("no panic while held");
        while (used.requests > 0 && used.requests + requests > self.requests_max)
            || (used.bytes > 0 && used.bytes + bytes > self.bytes_max)
        {
            used = self.changed.wait(used).expect("no panic while held");
        }
        used.requests += requests;
        used.bytes += bytes;
        Permit { flight: self.clone(), requests, bytes }
    }

    /// Waits until nothing is in flight; false when `limit` is over before that.
    pub fn wait_empty(&self, limit: Option<Duration>) -> bool {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut used = self.used.lock().expect("no panic while held");
        while used.requests > 0 || used.bytes > 0 {
            used = match deadline {
                None => self.changed.wait(used).expect("no panic while held"),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed.wait_timeout(used, left).expect("no panic while held").0
                }
            };
        }
        true
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut used = self.flight.used.lock().expect("no panic while held");
        used.requests -= self.requests;
        used.bytes -= self.bytes;
        drop(used);
        self.flight.changed.notify_all();
    }
}

/// Writes that are with the workers, in the order of the client. One that overlaps an earlier one is held back until
/// that is done, so that the worker threads cannot exchange them.
pub struct Order<T> {
    entries: Mutex<Entries<T>>,
    /// Only the connection's thread adds, so that it may trust a zero without the lock.
    count: AtomicUsize,
}

struct Entries<T> {
    numbers: u64,
    list: Vec<Entry<T>>,
}

struct Entry<T> {
    number: u64,
    extents: Vec<Extent>,
    held: Option<T>,
}

impl<T> Entry<T> {
    fn overlaps(&self, extents: &[Extent]) -> bool {
        extents.iter().any(|extent| self.extents.iter().any(|own| own.overlaps(extent)))
    }
}

impl<T> Default for Order<T> {
    fn default() -> Self {
        Self { entries: Mutex::new(Entries { numbers: 0, list: Vec::new() }), count: AtomicUsize::new(0) }
    }
}

impl<T> Order<T> {
    /// Whether a write of `extent` must wait for one of these.
    pub fn overlaps(&self, extent: Extent) -> bool {
        self.count.load(Ordering::Acquire) > 0 && {
            let entries = self.entries.lock().expect("no panic while held");
            entries.list.iter().any(|entry| entry.overlaps(&[extent]))
        }
    }

    /// Enters a write. `make` gets the number under which it will [`leave`](Self::leave); the write comes back if it
    /// may go now, otherwise it is held.
    pub fn enter(&self, extents: Vec<Extent>, make: impl FnOnce(u64) -> T) -> Option<T> {
        let mut entries = self.entries.lock().expect("no panic while held");
        entries.numbers += 1;
        let number = entries.numbers;
        let task = make(number);
        let waits = entries.list.iter().any(|entry| entry.overlaps(&extents));
        let (held, free) = if waits { (Some(task), None) } else { (None, Some(task)) };
        entries.list.push(Entry { number, extents, held });
        self.count.store(entries.list.len(), Ordering::Release);
        free
    }

    /// A write is done: which held ones may go now.
    pub fn leave(&self, number: u64) -> Vec<T> {
        let mut entries = self.entries.lock().expect("no panic while held");
        entries.list.retain(|entry| entry.number != number);
        let mut free = Vec::new();
        for index in 0..entries.list.len() {
            let (earlier, rest) = entries.list.split_at_mut(index);
            let entry = &mut rest[0];
            if entry.held.is_some() && !earlier.iter().any(|before| before.overlaps(&entry.extents)) {
                free.extend(entry.held.take());
            }
        }
        self.count.store(entries.list.len(), Ordering::Release);
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_leaves_in_its_order() {
        let order = Order::default();
        let enter = |offset, length| order.enter(vec![Extent::new(offset, length)], |number| number);
        assert_eq!(enter(0, 8), Some(1));
        assert_eq!(enter(4, 8), None);
        assert_eq!(enter(8, 8), None, "it overlaps a held one");
        assert_eq!(enter(100, 1), Some(4));
        assert!(order.overlaps(Extent::new(15, 1)) && !order.overlaps(Extent::new(16, 1)));
        assert_eq!(order.leave(4), Vec::<u64>::new());
        assert_eq!(order.leave(1), [2]);
        assert_eq!(order.leave(2), [3]);
        assert_eq!(order.leave(3), Vec::<u64>::new());
        assert!(!order.overlaps(Extent::new(0, 1000)));
    }

    #[test]
    fn a_full_flight_makes_the_next_wait() {
        let limits = Limits { in_flight_bytes_max: 100, in_flight_requests_max: 2, ..Limits::default() };
        let flight = Flight::new(&limits);
        let large = flight.acquire(1, 1000);
        assert!(!flight.wait_empty(Some(Duration::from_millis(1))));
        let next = std::thread::spawn({
            let flight = flight.clone();
            move || drop(flight.acquire(1, 1))
        });
        assert!(!flight.wait_empty(Some(Duration::from_millis(20))));
        assert!(!next.is_finished());
        drop(large);
        next.join().unwrap();
        assert!(flight.wait_empty(None));
    }
}
