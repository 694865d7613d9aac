//! Which points go, and how far back everything must stay.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::{MarkId, Timestamp};

use super::Point;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Retention {
    /// Within this long ago any consistent cut can be recovered.
    pub any_time_window: Duration,
    /// Older points go.
    pub point_age_max: Duration,
    /// More points go, oldest first.
    pub points_max: usize,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            any_time_window: Duration::from_secs(2 * 3600),
            point_age_max: Duration::from_secs(24 * 3600),
            points_max: 256,
        }
    }
}

fn before(now: Timestamp, age: Duration) -> Timestamp {
    Timestamp(now.0.saturating_sub(age.as_nanos().min(u128::from(u64::MAX)) as u64))
}

/// When each of the points, which are in order, was made, for telling their age: a host whose clock went back, or that
/// claims a time to come, does not make its points any older or younger than the one before them.
pub fn effective_times(points: &[Point], now: Timestamp) -> Vec<Timestamp> {
    let known = points.iter().map(|point| point.time).find(|&time| time <= now).unwrap_or(now);
    let times = points.iter().scan(known, |latest, point| {
        *latest = (*latest).max(if point.time <= now { point.time } else { *latest });
        Some(*latest)
    });
    times.collect()
}

impl Retention {
    pub fn window_start(&self, now: Timestamp) -> Timestamp {
        before(now, self.any_time_window)
    }

    /// The points to drop. `points` are complete and in order, oldest first. Locked and pinned ones stay, and the newest kept one
    /// always does; so does the newest place of any-time recovery at or before the window's start, which the window begins with.
    pub fn expired(&self, points: &[Point], now: Timestamp, is_pinned: impl Fn(&Point) -> bool) -> Vec<MarkId> {
        let oldest_kept = before(now, self.point_age_max);
        let window_start = self.window_start(now);
        let newest_kept = points.iter().rposition(|point| point.keep && !point.damaged);
        let newest = points.iter().rposition(|point| !point.damaged);
        let times = effective_times(points, now);
        let window_begin = times.iter().rposition(|&time| time <= window_start);
        let mut kept_after = points.iter().filter(|point| point.keep && !point.locked).count();
        let mut expired = Vec::new();
        for (index, point) in points.iter().enumerate() {
            let counted = point.keep && !point.locked;
            let too_many = counted && kept_after > self.points_max;
            kept_after -= usize::from(counted);
            if point.locked || Some(index) == newest_kept || Some(index) == newest || is_pinned(point) {
                continue;
            }
            let goes = if point.keep {
                times[index] < oldest_kept || too_many
            } else {
                times[index] < window_start && Some(index) != window_begin
            };
            if goes {
                expired.push(point.id);
            }
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::points::tests::point;

    #[test]
    fn age_and_count_let_points_go_and_locks_pins_and_the_newest_stay() {
        let hour = 3_600_000_000_000u64;
        let mut points: Vec<Point> = (0..6).map(|number| point(number, Timestamp(number * hour), true)).collect();
        points[0].locked = true;
        let retention = Retention {
            any_time_window: Duration::ZERO,
            point_age_max: Duration::from_secs(2 * 3600),
            points_max: 100,
        };
        let now = Timestamp(5 * hour);
        let pinned = points[2].id;
        let gone = |retention: Retention, now| retention.expired(&points, now, |point| point.id == pinned);
        assert_eq!(gone(retention, now), [points[1].id]);
        assert_eq!(gone(Retention { points_max: 2, ..retention }, now), [points[1].id, points[3].id]);
        // Long after: everything but the locked, the pinned and the newest.
        let rest = [points[1].id, points[3].id, points[4].id];
        assert_eq!(gone(Retention { points_max: 0, ..retention }, Timestamp(1000 * hour)), rest);
    }

    #[test]
    fn a_clock_that_steps_makes_no_point_older_or_younger() {
        let hour = 3_600_000_000_000u64;
        let points: Vec<Point> = [100, 101, 9999, 102, 3, 4, 103]
            .iter()
            .zip(0..)
            .map(|(&time, number)| point(number, Timestamp(time * hour), true))
            .collect();
        let hours = |now: u64| -> Vec<u64> {
            effective_times(&points, Timestamp(now * hour)).iter().map(|time| time.0 / hour).collect()
        };
        assert_eq!(hours(104), [100, 101, 101, 102, 102, 102, 103]);
        let retention = Retention {
            any_time_window: Duration::ZERO,
            point_age_max: Duration::from_secs(24 * 3600),
            points_max: 100,
        };
        assert_eq!(retention.expired(&points, Timestamp(104 * hour), |_| false), []);
        // A day later the oldest go, and those of the wrong times with their neighbours.
        let gone = retention.expired(&points, Timestamp(126 * hour), |_| false);
        assert_eq!(gone, points[..3].iter().map(|point| point.id).collect::<Vec<_>>());
    }

    #[test]
    fn a_damaged_point_does_not_count_as_the_newest() {
        let mut points: Vec<Point> = (0..3).map(|number| point(number, Timestamp(number), true)).collect();
        points[2].damaged = true;
        let retention = Retention { any_time_window: Duration::ZERO, point_age_max: Duration::ZERO, points_max: 0 };
        assert_eq!(retention.expired(&points, Timestamp(u64::MAX), |_| false), [points[0].id, points[2].id]);
    }
}
