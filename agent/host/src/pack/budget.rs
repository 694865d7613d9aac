//! Bytes under way, limited; the permit rides with the data and returns when it is dropped.

use std::sync::Arc;

use tidemark_base::sync::Mutex;

#[derive(Clone)]
pub struct Budget(Arc<Shared>);

struct Shared {
    bytes_max: u64,
    used: Mutex<Used>,
    returned: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Used {
    bytes: u64,
    peak: u64,
}

/// The right to hold so many bytes.
pub struct Permit {
    budget: Budget,
    bytes: u64,
}

impl Budget {
    /// `returned` is called whenever bytes came back; it must not block.
    pub fn new(bytes_max: u64, returned: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared { bytes_max, used: Mutex::default(), returned: Box::new(returned) }))
    }

    /// `None` when that is more than is left. A request beyond the whole budget is granted while nothing else is held,
    /// so that no size of request waits for ever.
    pub fn take(&self, bytes: u64) -> Option<Permit> {
        let mut used = self.0.used.lock().expect("no panic while held");
        if used.bytes > 0 && used.bytes + bytes > self.0.bytes_max {
            return None;
        }
        used.bytes += bytes;
        used.peak = used.peak.max(used.bytes);
        Some(Permit { budget: self.clone(), bytes })
    }

    pub fn used(&self) -> u64 {
        self.0.used.lock().expect("no panic while held").bytes
    }

    /// The most that was ever held at once.
    pub fn peak(&self) -> u64 {
        self.0.used.lock().expect("no panic while held").peak
    }

    fn give_back(&self, bytes: u64) {
        self.0.used.lock().expect("no panic while held").bytes -= bytes;
        (self.0.returned)();
    }
}

impl Permit {
    /// Gives back what is more than `bytes`.
    pub fn shrink(&mut self, bytes: u64) {
        if bytes < self.bytes {
            self.budget.give_back(self.bytes - bytes);
            self.bytes = bytes;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_when_a_permit_shrinks_or_drops() {
        let budget = Budget::new(100, || {});
        let mut first = budget.take(80).unwrap();
        assert!(budget.take(30).is_none());
        first.shrink(10);
        let second = budget.take(30).unwrap();
        drop(first);
        assert_eq!((budget.used(), budget.peak()), (30, 80));
        assert!(budget.take(200).is_none());
        drop(second);
        assert!(budget.take(200).is_some());
    }
}
