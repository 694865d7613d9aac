//! How long to wait before the next try.

use std::time::Duration;

use tidemark_base::Epoch;

pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min }
    }

    /// Something got through.
    pub fn reset(&mut self) {
        self.next = self.min;
    }

    /// The wait before the next try: between half and all of a time that doubles with each, so that hosts which lost
    /// the same server do not come back as one.
    pub fn wait(&mut self) -> Duration {
        let full = self.next;
        self.next = (self.next * 2).min(self.max);
        let random = u16::from_le_bytes([Epoch::random().0[0], Epoch::random().0[1]]);
        full / 2 + (full / 2).mul_f64(f64::from(random) / f64::from(u16::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_limit() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(10));
        let mut backoff = Backoff::new(min, max);
        let mut full = min;
        for _ in 0..20 {
            let wait = backoff.wait();
            assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
            full = (full * 2).min(max);
        }
        backoff.reset();
        assert!(backoff.wait() <= min);
    }
}
