//! How often wrong passphrases may be shown: guessing must not be worth trying, and hashing must not eat the processor.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// Wrong ones of one address within [`WINDOW`].
const WRONG_MAX: u32 = 5;
/// Wrong ones of all addresses together within it.
const WRONG_MAX_TOTAL: u32 = 100;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses that are remembered at once.
const ADDRESSES_MAX: usize = 4096;

#[derive(Default)]
pub struct Limiter {
    addresses: HashMap<IpAddr, Count>,
    total: Count,
}

#[derive(Clone, Copy, Default)]
struct Count {
    /// On the monotonic clock.
    since: Duration,
    wrong: u32,
}

impl Count {
    fn at(&mut self, now: Duration) -> &mut Self {
        if now.saturating_sub(self.since) >= WINDOW {
            *self = Self { since: now, wrong: 0 };
        }
        self
    }
}

/// Try again after so long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooMany {
    pub wait: Duration,
}

impl Limiter {
    pub fn check(&mut self, from: IpAddr, now: Duration) -> Result<(), TooMany> {
        let refuse = |count: &Count| Err(TooMany { wait: WINDOW.saturating_sub(now.saturating_sub(count.since)) });
        let total = self.total.at(now);
        if total.wrong >= WRONG_MAX_TOTAL {
            return refuse(total);
        }
        match self.addresses.get_mut(&from).map(|count| count.at(now)) {
            Some(count) if count.wrong >= WRONG_MAX => refuse(count),
            _ => Ok(()),
        }
    }

    pub fn failed(&mut self, from: IpAddr, now: Duration) {
        if self.addresses.len() >= ADDRESSES_MAX {
            self.addresses.retain(|_, count| now.saturating_sub(count.since) < WINDOW);
        }
        self.total.at(now).wrong += 1;
        // Where there is no room the total still counts.
        if self.addresses.len() < ADDRESSES_MAX || self.addresses.contains_key(&from) {
            self.addresses.entry(from).or_insert(Count { since: now, wrong: 0 }).at(now).wrong += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_ones_are_counted_by_address_and_together_and_forgotten_after_a_while() {
        let mut limiter = Limiter::default();
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let at = Duration::from_secs;
        for second in 0..5 {
            limiter.check(address(1), at(second)).unwrap();
            limiter.failed(address(1), at(second));
        }
        assert_eq!(limiter.check(address(1), at(10)), Err(TooMany { wait: at(50) }));
        limiter.check(address(2), at(10)).unwrap();
        limiter.check(address(1), at(60)).unwrap();
        for last in 0..100 {
            limiter.failed(address(last), at(70));
        }
        assert!(limiter.check(address(200), at(71)).is_err(), "many addresses together");
        limiter.check(address(200), at(200)).unwrap();
    }
}
