//! When something that failed is tried again: soon at first, then ever more rarely. What is told of a connection itself has
//! nothing to do with it: that is dialled again at once.

use std::collections::BTreeMap;
use std::time::Duration;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Pauses after the first failure of one item, the second, …; the last one stays. The first three are for whoever has just
/// connected and is not ready yet.
pub const PAUSES: [Duration; 8] =
    [seconds(1), seconds(5), seconds(15), seconds(60), seconds(120), seconds(240), seconds(480), seconds(600)];

/// What failed, and when it is due again; by monotonic times of whoever asks.
#[derive(Debug)]
pub struct Retries<K> {
    failing: BTreeMap<K, Failing>,
}

#[derive(Debug)]
struct Failing {
    failures: usize,
    due: Duration,
    /// Which version of the item failed: a newer one is tried at once.
    revision: u64,
}

impl<K: Ord> Default for Retries<K> {
    fn default() -> Self {
        Self { failing: BTreeMap::new() }
    }
}

impl<K: Ord> Retries<K> {
    /// Whether to try an item, which has this revision, now.
    pub fn is_due(&self, item: &K, revision: u64, now: Duration) -> bool {
        self.failing.get(item).is_none_or(|failing| failing.revision != revision || failing.due <= now)
    }

    /// It failed; says how long to wait.
    pub fn failed(&mut self, item: K, revision: u64, now: Duration) -> Duration {
        let failing = self.failing.entry(item).or_insert(Failing { failures: 0, due: now, revision });
        if failing.revision != revision {
            *failing = Failing { failures: 0, due: now, revision };
        }
        let pause = PAUSES[failing.failures.min(PAUSES.len() - 1)];
        failing.failures += 1;
        failing.due = now + pause;
        pause
    }

    pub fn succeeded(&mut self, item: &K) {
        self.failing.remove(item);
    }

    /// Forgets items that are not there any more.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.failing.retain(|item, _| keep(item));
    }

    pub fn is_failing(&self, item: &K) -> bool {
        self.failing.contains_key(item)
    }

    /// When the next one is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.failing.values().map(|failing| failing.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tidemark_base::{Clock, Timestamp};

    /// Stands where it is put.
    #[derive(Default)]
    struct StandingClock(Mutex<Duration>);

    impl StandingClock {
        fn forward(&self, by: Duration) {
            *self.0.lock().unwrap() += by;
        }
    }

    impl Clock for StandingClock {
        fn wall_now(&self) -> Timestamp {
            Timestamp(self.monotonic_now().as_nanos() as u64)
        }

        fn monotonic_now(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }

    #[test]
    fn one_item_that_goes_on_failing_is_tried_after_1_2_4_8_and_10_minutes() {
        let (clock, mut retries) = (StandingClock::default(), Retries::default());
        let mut tried = Vec::new();
        // A day, second by second: what a loop would see that looks every second.
        for second in 0..86_400_u64 {
            if retries.is_due(&"web", 1, clock.monotonic_now()) {
                tried.push(second);
                retries.failed("web", 1, clock.monotonic_now());
            }
            clock.forward(Duration::from_secs(1));
        }
        let pauses: Vec<u64> = tried.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(pauses[..8], [1, 5, 15, 60, 120, 240, 480, 600]);
        assert!(pauses[8..].iter().all(|pause| *pause == 600), "{pauses:?}");
        assert_eq!(tried.len(), 3 + 4 + (86_400 - 921 - 1) / 600 + 1);
    }

    #[test]
    fn items_do_not_wait_for_each_other_and_a_change_is_tried_at_once() {
        let (clock, mut retries) = (StandingClock::default(), Retries::default());
        for _ in 0..6 {
            retries.failed("web", 1, clock.monotonic_now());
        }
        assert!(!retries.is_due(&"web", 1, clock.monotonic_now()) && retries.is_due(&"db", 1, clock.monotonic_now()));
        assert_eq!(retries.next_due(), Some(Duration::from_secs(240)));
        assert!(retries.is_due(&"web", 2, clock.monotonic_now()), "somebody changed it");
        assert_eq!(retries.failed("web", 2, clock.monotonic_now()), Duration::from_secs(1), "and it begins anew");
        clock.forward(Duration::from_secs(1));
        assert!(retries.is_due(&"web", 2, clock.monotonic_now()));
        retries.succeeded(&"web");
        assert!(!retries.is_failing(&"web") && retries.next_due().is_none());
        retries.failed("gone", 1, clock.monotonic_now());
        retries.retain(|item| *item == "web");
        assert!(!retries.is_failing(&"gone"));
    }
}
