//! Counts who is inside, at the price of two atomic additions, and can be closed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

const CLOSED: usize = 1 << (usize::BITS - 1);

#[derive(Default)]
pub struct Door {
    /// How many are inside, and whether it is closed.
    state: AtomicUsize,
    lock: Mutex<()>,
    left: Condvar,
}

pub struct Inside<'a>(&'a Door);

impl Door {
    /// `None` once it is closed.
    pub fn enter(&self) -> Option<Inside<'_>> {
        let inside = Inside(self);
        match self.state.fetch_add(1, Ordering::AcqRel) & CLOSED {
            0 => Some(inside),
            _ => None,
        }
    }

    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Lets nobody in any more; true when everybody left within `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let lock = self.lock.lock().expect("no panic while held");
        let is_inside = |(): &mut ()| self.state.load(Ordering::Acquire) != CLOSED;
        !self.left.wait_timeout_while(lock, limit, is_inside).expect("no panic while held").1.timed_out()
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(1, Ordering::AcqRel) == CLOSED + 1 {
            // Under the lock: whoever closes looked at the count before and does not wait yet, or waits.
            let _lock = self.0.lock.lock().expect("no panic while held");
            self.0.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_door_waits_for_who_is_inside() {
        let door = Door::default();
        let inside = door.enter().unwrap();
        assert!(!door.close(Duration::from_millis(1)));
        assert!(door.enter().is_none() && door.is_closed());
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| door.close(Duration::from_secs(60)));
            drop(inside);
            assert!(closing.join().unwrap());
        });
    }
}
