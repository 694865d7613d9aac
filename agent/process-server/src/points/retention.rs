//! Which points go, and how far back everything must stay.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::{MarkId, Timestamp};
use tidemark_proto::control::Grid;

use super::{Point, PointConsistency};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Retention {
    /// Within this long ago any consistent cut can be recovered.
    pub any_time_window: Duration,
    /// Older points go.
    pub point_age_max: Duration,
    /// More points go, oldest first.
    pub points_max: usize,
    /// The older they are, the fewer stay.
    #[serde(default)]
    pub grid: Grid,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            any_time_window: Duration::from_secs(2 * 3600),
            point_age_max: Duration::from_secs(24 * 3600),
            points_max: 256,
            grid: Grid::default(),
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
    /// always does, and the newest that its group has as well; so does the newest place of any-time recovery at or before the window's start, which the window begins with.
    pub fn expired(&self, points: &[Point], now: Timestamp, is_pinned: impl Fn(&Point) -> bool) -> Vec<MarkId> {
        let oldest_kept = before(now, self.point_age_max);
        let window_start = self.window_start(now);
        let newest_kept = points.iter().rposition(|point| point.keep && !point.damaged);
        let newest = points.iter().rposition(|point| !point.damaged);
        let newest_of_group = points.iter().rposition(|point| point.confirmed && !point.damaged);
        let times = effective_times(points, now);
        let window_begin = times.iter().rposition(|&time| time <= window_start);
        let thinned = self.thinned(points, &times, now);
        let counts = |index: usize| points[index].keep && !points[index].locked && !thinned.contains(&index);
        let mut kept_after = (0..points.len()).filter(|index| counts(*index)).count();
        let mut expired = Vec::new();
        for (index, point) in points.iter().enumerate() {
            let counted = counts(index);
            let too_many = counted && kept_after > self.points_max;
            kept_after -= usize::from(counted);
            let is_newest = [newest_kept, newest, newest_of_group].contains(&Some(index));
            if point.locked || is_newest || is_pinned(point) {
                continue;
            }
            let goes = if point.keep {
                times[index] < oldest_kept || too_many || thinned.contains(&index)
            } else {
                times[index] < window_start && Some(index) != window_begin
            };
            if goes {
                expired.push(point.id);
            }
        }
        expired
    }

    /// The kept points of which the grid has another one for their interval. Intervals begin at whole multiples since 1970,
    /// not at the points' ages, so that the same one stays however often this is asked: the oldest app-consistent one, or
    /// the oldest where there is none. Damaged ones stand for no interval, locked ones are apart.
    fn thinned(&self, points: &[Point], times: &[Timestamp], now: Timestamp) -> HashSet<usize> {
        let mut thinned = HashSet::new();
        let mut stays: HashMap<(u128, u128), usize> = HashMap::new();
        for (index, point) in points.iter().enumerate().filter(|(_, point)| point.keep && !point.locked) {
            let every = self.grid.every(now.saturating_since(times[index])).as_nanos();
            if every == 0 {
                continue;
            }
            let rank = |point: &Point| (!point.damaged, point.consistency == PointConsistency::Application);
            match stays.entry((every, u128::from(times[index].0) / every)) {
                Entry::Vacant(entry) => drop(entry.insert(index)),
                Entry::Occupied(mut entry) if rank(point) > rank(&points[*entry.get()]) => {
                    thinned.insert(entry.insert(index));
                }
                Entry::Occupied(_) => drop(thinned.insert(index)),
            }
        }
        thinned
    }
}

#[cfg(test)]
mod tests {
    use tidemark_proto::control::GridStep;

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
            ..Retention::default()
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
    fn the_newest_point_that_the_whole_group_has_stays() {
        let hour = 3_600_000_000_000u64;
        let mut points: Vec<Point> = (0..6).map(|number| point(number, Timestamp(number * hour), true)).collect();
        // One that the others of the group do not have yet, or never will, does not stand for it.
        points[1..5].iter_mut().for_each(|point| point.group = true);
        points[1..4].iter_mut().for_each(|point| point.confirmed = true);
        let retention = Retention {
            any_time_window: Duration::ZERO,
            point_age_max: Duration::ZERO,
            points_max: 0,
            ..Retention::default()
        };
        let gone = retention.expired(&points, Timestamp(1000 * hour), |_| false);
        assert_eq!(gone, [points[0].id, points[1].id, points[2].id, points[4].id]);
        points[3].damaged = true;
        let gone = retention.expired(&points, Timestamp(1000 * hour), |_| false);
        assert_eq!(gone, [points[0].id, points[1].id, points[3].id, points[4].id]);
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
            ..Retention::default()
        };
        assert_eq!(retention.expired(&points, Timestamp(104 * hour), |_| false), []);
        // A day later the oldest go, and those of the wrong times with their neighbours.
        let gone = retention.expired(&points, Timestamp(126 * hour), |_| false);
        assert_eq!(gone, points[..3].iter().map(|point| point.id).collect::<Vec<_>>());
    }

    const HOUR: u64 = 3_600_000_000_000;

    /// The field's grid: all for 2 h, hourly for a day, two-hourly for a week, four-hourly after.
    fn grid() -> Retention {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let steps = [(Some(2), 0), (Some(24), 1), (Some(168), 2), (None, 4)]
            .map(|(within, every)| GridStep { within: within.map(hours), every: hours(every) });
        Retention {
            any_time_window: Duration::ZERO,
            point_age_max: hours(15 * 24),
            points_max: usize::MAX,
            grid: Grid::new(steps).unwrap(),
        }
    }

    #[test]
    fn the_grid_keeps_fewer_points_the_older_they_are_and_the_same_however_often_it_is_asked() {
        let retention = grid();
        let mut points: Vec<Point> = Vec::new();
        // A point every 5 minutes for 20 days, thinned after each, as the maintenance does.
        let every = HOUR / 12;
        let mut now = 0;
        for number in 1..=20 * 24 * 12u64 {
            now = number * every;
            points.push(point(number, Timestamp(now), true));
            let gone: HashSet<MarkId> = retention.expired(&points, Timestamp(now), |_| false).into_iter().collect();
            points.retain(|point| !gone.contains(&point.id));
        }
        let ages: Vec<u64> = points.iter().map(|point| now - point.time.0).collect();
        let between = |from: u64, to: u64| ages.iter().filter(|age| (from * HOUR..to * HOUR).contains(age)).count();
        assert_eq!((between(0, 2), between(2, 24), between(24, 168), between(168, 360)), (24, 22, 72, 48));
        // No gap is longer than two intervals of its age.
        for pair in points.windows(2) {
            let age = Duration::from_nanos(now - pair[0].time.0);
            let gap = pair[1].time.saturating_since(pair[0].time);
            let allowed = 2 * retention.grid.every(age).max(Duration::from_nanos(every));
            assert!(gap <= allowed, "{gap:?} at an age of {age:?}");
        }
    }

    #[test]
    fn of_an_interval_the_app_consistent_point_stays_and_no_damaged_one() {
        let retention = grid();
        let mut points: Vec<Point> =
            (0..5).map(|number| point(number, Timestamp(10 * HOUR + number * HOUR / 10), true)).collect();
        points.push(point(9, Timestamp(40 * HOUR), true));
        let now = Timestamp(20 * HOUR + HOUR / 2);
        let stays = |points: &[Point]| -> Vec<usize> {
            let gone = retention.expired(points, now, |_| false);
            (0..5).filter(|index| !gone.contains(&points[*index].id)).collect()
        };
        assert_eq!(stays(&points), [0]);
        points[0].damaged = true;
        assert_eq!(stays(&points), [1]);
        points[3].consistency = PointConsistency::Application;
        assert_eq!(stays(&points), [3]);
        points[4].locked = true;
        assert_eq!(stays(&points), [3, 4]);
    }

    #[test]
    fn a_damaged_point_does_not_count_as_the_newest() {
        let mut points: Vec<Point> = (0..3).map(|number| point(number, Timestamp(number), true)).collect();
        points[2].damaged = true;
        let retention = Retention {
            any_time_window: Duration::ZERO,
            point_age_max: Duration::ZERO,
            points_max: 0,
            ..Retention::default()
        };
        assert_eq!(retention.expired(&points, Timestamp(u64::MAX), |_| false), [points[0].id, points[2].id]);
    }
}
