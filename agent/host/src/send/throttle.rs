//! A limit on bytes per second.

use std::time::Duration;

use tidemark_base::time::Instant;

/// What may leave at once after a pause.
const BURST: Duration = Duration::from_millis(250);

/// A bucket of bytes. It may be overdrawn by one frame and then refuses until that is made good, so that no frame is too
/// large to leave.
pub struct Throttle {
    bytes_per_second: Option<u64>,
    balance: f64,
    at: Instant,
}

impl Throttle {
    pub fn new(bytes_per_second: Option<u64>, now: Instant) -> Self {
        Self { bytes_per_second, balance: 0.0, at: now }
    }

    pub fn set_limit(&mut self, bytes_per_second: Option<u64>) {
        self.bytes_per_second = bytes_per_second;
    }

    /// How long to wait before the next frame may leave.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let Some(rate) = self.bytes_per_second.map(|rate| rate.max(1) as f64) else {
            (self.balance, self.at) = (0.0, now);
            return Duration::ZERO;
        };
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.balance = (self.balance + earned).min(rate * BURST.as_secs_f64());
        self.at = now;
        if self.balance >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.balance / rate) }
    }

    /// A frame left.
    pub fn spend(&mut self, bytes: u64) {
        if self.bytes_per_second.is_some() {
            self.balance -= bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_at_the_rate() {
        let start = Instant::now();
        let mut now = start;
        let mut throttle = Throttle::new(Some(1_000_000), start);
        for _ in 0..100 {
            now += throttle.wait(now);
            throttle.spend(100_000);
        }
        let taken = now - start;
        assert!(taken > Duration::from_millis(9_500) && taken < Duration::from_millis(10_100), "{taken:?}");
        throttle.set_limit(None);
        assert_eq!(throttle.wait(now), Duration::ZERO);
    }
}
