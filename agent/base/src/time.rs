//! Wall clock and monotonic clock, behind one trait.
//!
//! Order is never decided by a wall clock: sequences do that. Wall times only label positions for people.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize, de::Error};

/// Wall-clock time in nanoseconds since 1970-01-01 00:00:00 UTC. JSON and people see RFC 3339 with sub-seconds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp(pub u64);

/// 2000-01-01 00:00:00 UTC in seconds since 1970: where times in HRL files begin.
const HRL_EPOCH_SECONDS: u64 = 946_684_800;

impl Timestamp {
    pub fn from_system(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64)
    }

    pub fn to_system(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.0)
    }

    /// Whole seconds since 2000-01-01, as HRL files count; clamped to what they can hold.
    pub fn hrl_seconds(self) -> u32 {
        (self.0 / 1_000_000_000).saturating_sub(HRL_EPOCH_SECONDS).min(u64::from(u32::MAX)) as u32
    }

    pub fn from_hrl_seconds(seconds: u32) -> Self {
        Self((u64::from(seconds) + HRL_EPOCH_SECONDS) * 1_000_000_000)
    }

    pub fn saturating_since(self, earlier: Timestamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Parses RFC 3339, with or without sub-seconds; a time zone other than `Z` is refused.
    pub fn parse(text: &str) -> Result<Self, humantime::TimestampError> {
        humantime::parse_rfc3339(text).map(Self::from_system)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_nanos(self.to_system()).fmt(f)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timestamp({self})")
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

pub trait Clock: Send + Sync {
    fn wall_now(&self) -> Timestamp;

    /// Time since some fixed moment; never steps back.
    fn monotonic_now(&self) -> Duration;
}

/// The machine's own clocks.
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn wall_now(&self) -> Timestamp {
        Timestamp::from_system(SystemTime::now())
    }

    fn monotonic_now(&self) -> Duration {
        self.start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_with_sub_seconds() {
        let time = Timestamp::parse("2026-11-21T10:04:05.250Z").unwrap();
        assert_eq!(time.to_string(), "2026-11-21T10:04:05.250000000Z");
        assert!(Timestamp::parse("yesterday").is_err());
    }

    #[test]
    fn hrl_times_count_from_2000() {
        assert_eq!(Timestamp::parse("2000-01-01T00:00:01Z").unwrap().hrl_seconds(), 1);
        assert_eq!(Timestamp(0).hrl_seconds(), 0);
        assert_eq!(Timestamp::from_hrl_seconds(539_842_382).to_string(), "2017-02-08T04:13:02.000000000Z");
    }
}
