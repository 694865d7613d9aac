//! How hard to compress, adapted to where the time goes.
//!
//! Scans begin at level 2: on chunks of 256 KiB it saves as many bytes as level 1 does on a whole stream, which is what a
//! user compares with, and costs a quarter more than level 1 does on chunks. Live changes begin at level 1: on scattered
//! blocks it saves nearly as much. When the link is what is waited for, harder compression is free. When sealing is what is waited for *and* live changes fall behind,
//! less compression gives a better RPO. A scan is never in such a hurry that it would send more bytes.

use std::time::Duration;

use tidemark_base::chunk::Compression;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompressionPolicy {
    Off,
    #[default]
    Auto,
    /// A zstd level.
    Level(i32),
}

const LEVELS: [i32; 7] = [-5, -1, 1, 2, 4, 6, 9];
/// Where live changes, and where scans begin.
const START_LIVE: usize = 2;
const START_SCAN: usize = 3;

/// How much is looked at before the level moves by one.
const WINDOW: Duration = Duration::from_secs(1);

/// Where an emitter's time went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Waits {
    pub sealing: Duration,
    /// For credit, for the link, for the throttle.
    pub link: Duration,
}

pub struct Level {
    policy: CompressionPolicy,
    start: usize,
    index: usize,
    waits: Waits,
}

impl Level {
    pub fn live(policy: CompressionPolicy) -> Self {
        Self { policy, start: START_LIVE, index: START_LIVE, waits: Waits::default() }
    }

    pub fn scan(policy: CompressionPolicy) -> Self {
        Self { policy, start: START_SCAN, index: START_SCAN, waits: Waits::default() }
    }

    pub fn set_policy(&mut self, policy: CompressionPolicy) {
        if self.policy != policy {
            (self.policy, self.index, self.waits) = (policy, self.start, Waits::default());
        }
    }

    pub fn compression(&self) -> Compression {
        match self.policy {
            CompressionPolicy::Off => Compression::Off,
            CompressionPolicy::Level(level) => Compression::Level(level),
            CompressionPolicy::Auto => Compression::Level(LEVELS[self.index]),
        }
    }

    /// Takes note of waits. `behind`: live changes fall behind.
    pub fn observe(&mut self, waits: Waits, behind: bool) {
        self.waits.sealing += waits.sealing;
        self.waits.link += waits.link;
        let Waits { sealing, link } = self.waits;
        if sealing + link < WINDOW {
            return;
        }
        self.waits = Waits::default();
        if sealing > 2 * link {
            if behind {
                self.index = self.index.saturating_sub(1);
            } else if self.index > self.start {
                self.index -= 1;
            }
        } else if link > 2 * sealing {
            self.index = (self.index + 1).min(LEVELS.len() - 1);
        } else if !behind && self.index < self.start {
            self.index += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEALING: Waits = Waits { sealing: WINDOW, link: Duration::ZERO };
    const LINK: Waits = Waits { sealing: Duration::ZERO, link: WINDOW };

    fn levels(level: &mut Level, waits: Waits, behind: bool, steps: usize) -> Vec<Compression> {
        (0..steps)
            .map(|_| {
                level.observe(waits, behind);
                level.compression()
            })
            .collect()
    }

    #[test]
    fn a_slow_link_raises_the_level_and_a_backlog_lowers_it() {
        let mut level = Level::scan(CompressionPolicy::Auto);
        assert_eq!(level.compression(), Compression::Level(2));
        assert_eq!(levels(&mut level, LINK, false, 3), [4, 6, 9].map(Compression::Level));
        assert_eq!(levels(&mut level, SEALING, false, 4), [6, 4, 2, 2].map(Compression::Level));
        assert_eq!(levels(&mut level, SEALING, true, 4), [1, -1, -5, -5].map(Compression::Level));
        let mixed = Waits { sealing: WINDOW / 2, link: WINDOW / 2 };
        assert_eq!(levels(&mut level, mixed, false, 4), [-1, 1, 2, 2].map(Compression::Level));
    }

    #[test]
    fn live_changes_begin_with_less() {
        let mut level = Level::live(CompressionPolicy::Auto);
        assert_eq!(level.compression(), Compression::Level(1));
        assert_eq!(levels(&mut level, SEALING, false, 2), [1, 1].map(Compression::Level));
    }

    #[test]
    fn a_fixed_level_stays() {
        for (policy, expected) in
            [(CompressionPolicy::Off, Compression::Off), (CompressionPolicy::Level(7), Compression::Level(7))]
        {
            let mut level = Level::live(policy);
            assert_eq!(levels(&mut level, LINK, false, 2), [expected; 2]);
        }
    }
}
