//! The parts of a policy that agents and process servers follow by themselves, also while nobody tells them anything.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tidemark_base::Timestamp;

/// The most rules of one throttle.
pub const THROTTLE_RULES_MAX: usize = 64;
/// The most steps of one grid.
pub const GRID_STEPS_MAX: usize = 8;
pub const DAY_MINUTES: u16 = 24 * 60;
/// The first of January 1970 was a Thursday; Monday is 0 here.
const FIRST_DAY: u64 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    Off,
    /// As link and processors allow.
    #[default]
    Auto,
    /// Of zstd.
    Level(i32),
}

/// In JSON `auto`, `off`, or a number.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum CompressionText {
    Level(i32),
    Word(CompressionWord),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CompressionWord {
    Auto,
    Off,
}

impl Serialize for Compression {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Compression::Off => CompressionText::Word(CompressionWord::Off),
            Compression::Auto => CompressionText::Word(CompressionWord::Auto),
            Compression::Level(level) => CompressionText::Level(*level),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Compression {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = |_| serde::de::Error::custom("compression is `auto`, `off`, or a level of zstd");
        Ok(match CompressionText::deserialize(deserializer).map_err(wrong)? {
            CompressionText::Word(CompressionWord::Off) | CompressionText::Level(0) => Compression::Off,
            CompressionText::Word(CompressionWord::Auto) => Compression::Auto,
            CompressionText::Level(level) => Compression::Level(level),
        })
    }
}

/// What may be sent in a second.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Throttle {
    /// Where no rule fits; `None`: no limit.
    pub bytes_per_second: Option<u64>,
    /// The first that fits counts.
    pub rules: Vec<ThrottleRule>,
}

impl Throttle {
    /// The limit at a time, for what is sent to an address.
    pub fn limit(&self, now: Timestamp, to: Option<IpAddr>) -> Option<u64> {
        let rule = self.rules.iter().find(|rule| rule.fits(now, to));
        rule.map_or(self.bytes_per_second, |rule| rule.bytes_per_second)
    }
}

/// A limit for some hours of the week, in UTC, and some addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ThrottleRule {
    /// Bit 0 is Monday; 0: every day.
    pub days: u8,
    pub from_minute: u16,
    /// Not above `from_minute`: on the day after.
    pub to_minute: u16,
    /// Of the process server; `None`: any.
    pub network: Option<Network>,
    /// `None`: no limit.
    pub bytes_per_second: Option<u64>,
}

impl ThrottleRule {
    pub fn fits(&self, now: Timestamp, to: Option<IpAddr>) -> bool {
        let minutes = now.0 / 60_000_000_000;
        let (day, minute) = ((minutes / u64::from(DAY_MINUTES) + FIRST_DAY) % 7, minutes % u64::from(DAY_MINUTES));
        let is_there = self.network.is_none_or(|network| to.is_some_and(|to| network.holds(to)));
        is_there && self.holds_minute(day as u8, minute as u16)
    }

    /// `day` 0 is Monday.
    pub fn holds_minute(&self, day: u8, minute: u16) -> bool {
        let on = |day: u8| self.days == 0 || self.days & 1 << (day % 7) != 0;
        match self.from_minute < self.to_minute {
            true => on(day) && (self.from_minute..self.to_minute).contains(&minute),
            // Over midnight: what began yesterday lasts until `to_minute`.
            false => (on(day) && minute >= self.from_minute) || (on(day + 6) && minute < self.to_minute),
        }
    }
}

/// Addresses that begin with the same bits: `10.1.0.0/16`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    pub address: IpAddr,
    pub prefix_bits: u8,
}

fn bits(address: IpAddr) -> (u128, u8) {
    match address.to_canonical() {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

impl Network {
    /// `None`: an address of that kind has not so many bits.
    pub fn new(address: IpAddr, prefix_bits: u8) -> Option<Self> {
        let address = address.to_canonical();
        (prefix_bits <= bits(address).1).then_some(Self { address, prefix_bits })
    }

    pub fn holds(&self, address: IpAddr) -> bool {
        let ((ours, width), (theirs, their_width)) = (bits(self.address), bits(address));
        width == their_width && (ours ^ theirs).leading_zeros() >= u32::from(self.prefix_bits)
    }

    /// Whether every address of the other is one of this.
    pub fn covers(&self, other: &Network) -> bool {
        self.prefix_bits <= other.prefix_bits && self.holds(other.address)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

impl FromStr for Network {
    type Err = String;

    /// `10.1.0.0/16`, or one address.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let shown: String = text.chars().take(60).collect();
            format!("{shown:?} is no range of addresses: 10.1.0.0/16, fd00::/8, or one address")
        };
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix_bits = match prefix {
            Some(prefix) => prefix.parse().map_err(|_| wrong())?,
            None => bits(address).1,
        };
        Network::new(address, prefix_bits).ok_or_else(wrong)
    }
}

/// Which points stay as they grow older.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Grid([Option<GridStep>; GRID_STEPS_MAX]);

/// Of points no older than `within`, one stays for each `every`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GridStep {
    /// `None`: however old.
    pub within: Option<Duration>,
    /// Zero: all stay.
    pub every: Duration,
}

impl Grid {
    /// `None`: too many steps, or they do not ascend.
    pub fn new(steps: impl IntoIterator<Item = GridStep>) -> Option<Self> {
        let mut grid = Self::default();
        for (at, step) in steps.into_iter().enumerate() {
            let before = at.checked_sub(1).and_then(|last| grid.0[last].as_ref());
            let ascends = before.is_none_or(|before| match (before.within, step.within) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(before), Some(within)) => before < within,
            });
            if !ascends {
                return None;
            }
            *grid.0.get_mut(at)? = Some(step);
        }
        Some(grid)
    }

    pub fn steps(&self) -> impl Iterator<Item = &GridStep> {
        self.0.iter().flatten()
    }

    /// The interval of which one point stays at an age; the last step goes on. Zero: all stay.
    pub fn every(&self, age: Duration) -> Duration {
        let holds = |step: &&GridStep| step.within.is_none_or(|within| age <= within);
        self.steps().find(holds).or(self.steps().last()).map_or(Duration::ZERO, |step| step.every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str) -> Timestamp {
        Timestamp::parse(time).unwrap()
    }

    fn rule(days: u8, from: u16, to: u16, limit: u64) -> ThrottleRule {
        ThrottleRule { days, from_minute: from, to_minute: to, network: None, bytes_per_second: Some(limit) }
    }

    #[test]
    fn the_limit_follows_days_and_hours_also_over_midnight() {
        let rules = vec![rule(0b1_0001, 8 * 60, 18 * 60, 1), rule(0b100_0000, 22 * 60, 6 * 60, 2)];
        let throttle = Throttle { bytes_per_second: Some(9), rules };
        // 2026-11-23 is a Monday.
        for (time, limit) in [
            ("2026-11-23T07:59:59Z", 9),
            ("2026-11-23T08:00:00Z", 1),
            ("2026-11-23T17:59:59Z", 1),
            ("2026-11-23T18:00:00Z", 9),
            ("2026-11-24T10:00:00Z", 9),
            ("2026-11-27T10:00:00Z", 1),
            ("2026-11-22T23:00:00Z", 2),
            ("2026-11-23T05:59:00Z", 2),
            ("2026-11-24T05:59:00Z", 9),
        ] {
            assert_eq!(throttle.limit(at(time), None), Some(limit), "{time}");
        }
    }

    #[test]
    fn the_limit_follows_the_address() {
        let near = ThrottleRule { network: Some("10.1.0.0/16".parse().unwrap()), ..rule(0, 0, DAY_MINUTES, 5) };
        let other = ThrottleRule { network: Some("fd00::/8".parse().unwrap()), ..rule(0, 0, DAY_MINUTES, 6) };
        let throttle = Throttle { bytes_per_second: None, rules: vec![near, other] };
        let now = at("2026-11-23T07:59:59Z");
        for (address, limit) in [
            ("10.1.255.9", Some(5)),
            ("::ffff:10.1.0.9", Some(5)),
            ("10.2.0.1", None),
            ("fd12::1", Some(6)),
            ("fe80::1", None),
        ] {
            assert_eq!(throttle.limit(now, Some(address.parse().unwrap())), limit, "{address}");
        }
        assert_eq!(throttle.limit(now, None), None);
    }

    #[test]
    fn ranges_of_addresses_are_read_and_compared() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "fd00::/8", "::/0"] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), text);
        }
        assert_eq!("10.0.0.1".parse::<Network>().unwrap().prefix_bits, 32);
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "10.0.0.0/", "web/8"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
        let wide: Network = "10.0.0.0/8".parse().unwrap();
        assert!(wide.covers(&"10.9.0.0/16".parse().unwrap()) && !wide.covers(&"0.0.0.0/0".parse().unwrap()));
        assert!(!"0.0.0.0/0".parse::<Network>().unwrap().holds("::1".parse().unwrap()));
    }

    #[test]
    fn a_grid_ascends_and_its_last_step_goes_on() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let step = |within: u64, every: u64| GridStep { within: Some(hours(within)), every: hours(every) };
        let grid = Grid::new([step(2, 0), step(24, 1)]).unwrap();
        for (age, every) in [(0, 0), (2, 0), (3, 1), (24, 1), (1000, 1)] {
            assert_eq!(grid.every(hours(age)), hours(every), "{age}");
        }
        assert_eq!(Grid::default().every(hours(9)), Duration::ZERO);
        assert_eq!(Grid::new([step(2, 0), step(2, 1)]), None);
        assert_eq!(Grid::new([GridStep { within: None, every: hours(1) }, step(2, 1)]), None);
        assert_eq!(Grid::new((1..10).map(|hours| step(hours, hours))), None);
    }
}
