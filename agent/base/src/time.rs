//! Wall clock and monotonic clock, behind one trait.
//!
//! Order is never decided by a wall clock: sequences do that. Wall times only label positions for people.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[cfg(not(feature = "simulation"))]
pub use std::time::Instant;

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

    /// The wall clock's time, of the simulation if this is one.
    pub fn now() -> Self {
        #[cfg(feature = "simulation")]
        if let Some(world) = crate::seam::current() {
            return Self::from_system(world.wall_now());
        }
        Self::from_system(SystemTime::now())
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
        // A `SystemTime` of Windows counts in 100 ns: what is smaller is read from the text itself.
        let Ok(since_epoch) = humantime::parse_rfc3339(text)?.duration_since(UNIX_EPOCH) else {
            return Ok(Self::default());
        };
        let fraction = text.trim_end_matches('Z').split_once('.').map_or("", |(_, digits)| digits);
        let nanoseconds = format!("{fraction:0<9}").parse().unwrap_or_default();
        Ok(Self(since_epoch.as_secs().saturating_mul(1_000_000_000).saturating_add(nanoseconds)))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanoseconds) = (self.0 / 1_000_000_000, self.0 % 1_000_000_000);
        let whole = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
        write!(f, "{}.{nanoseconds:09}Z", whole.trim_end_matches('Z'))
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
        Timestamp::now()
    }

    fn monotonic_now(&self) -> Duration {
        self.start.elapsed()
    }
}

#[cfg(feature = "simulation")]
pub use simulated::Instant;

#[cfg(feature = "simulation")]
mod simulated {
    use std::ops::{Add, AddAssign, Sub};
    use std::sync::OnceLock;
    use std::time::Duration;

    use crate::seam;

    /// As [`std::time::Instant`], of the simulated machine if this is one.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
    pub struct Instant(Duration);

    /// Real instants count from the first that was asked for, a day ahead so that they can be subtracted from.
    fn real_now() -> Duration {
        static START: OnceLock<std::time::Instant> = OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed() + Duration::from_secs(86_400)
    }

    impl Instant {
        pub fn now() -> Self {
            Self(seam::current().map_or_else(real_now, |world| world.now()))
        }

        pub fn elapsed(&self) -> Duration {
            Self::now().saturating_duration_since(*self)
        }

        pub fn duration_since(&self, earlier: Instant) -> Duration {
            self.saturating_duration_since(earlier)
        }

        pub fn saturating_duration_since(&self, earlier: Instant) -> Duration {
            self.0.saturating_sub(earlier.0)
        }

        pub fn checked_add(&self, duration: Duration) -> Option<Self> {
            self.0.checked_add(duration).map(Self)
        }

        pub fn checked_sub(&self, duration: Duration) -> Option<Self> {
            self.0.checked_sub(duration).map(Self)
        }
    }

    impl Add<Duration> for Instant {
        type Output = Instant;

        fn add(self, duration: Duration) -> Self {
            Self(self.0 + duration)
        }
    }

    impl AddAssign<Duration> for Instant {
        fn add_assign(&mut self, duration: Duration) {
            self.0 += duration;
        }
    }

    impl Sub<Duration> for Instant {
        type Output = Instant;

        fn sub(self, duration: Duration) -> Self {
            Self(self.0 - duration)
        }
    }

    impl Sub for Instant {
        type Output = Duration;

        fn sub(self, earlier: Instant) -> Duration {
            self.saturating_duration_since(earlier)
        }
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
        for exact in [Timestamp(1_763_000_000_123_456_789), Timestamp(1), Timestamp(u64::MAX)] {
            assert_eq!(Timestamp::parse(&exact.to_string()).unwrap(), exact);
        }
        assert_eq!(Timestamp::parse("1969-12-31T23:59:59.5Z").unwrap_or_default(), Timestamp(0));
        assert_eq!(Timestamp::parse("9999-12-31T23:59:59Z").unwrap(), Timestamp(u64::MAX), "the last there is");
    }

    #[test]
    fn hrl_times_count_from_2000() {
        assert_eq!(Timestamp::parse("2000-01-01T00:00:01Z").unwrap().hrl_seconds(), 1);
        assert_eq!(Timestamp(0).hrl_seconds(), 0);
        assert_eq!(Timestamp::from_hrl_seconds(539_842_382).to_string(), "2017-02-08T04:13:02.000000000Z");
    }
}
