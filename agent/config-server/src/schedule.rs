//! Limits that follow the clock: agents are told again whenever another window of a policy's schedule begins.
//!
//! *Consistency.* An agent is told the limit of the moment with everything else that is wanted. *Retries.* One that is away is
//! told on connecting. *Cancellation.* At the server's stop. *Crash.* Nothing is kept.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, MarkRequest, Reply};

use crate::core::{Core, QUICK};
use crate::machines::settle_agent;
use crate::model::{Machine, Policy, ThrottleWindow, Wanted};
use crate::names::bad_request;

const LOOK_EVERY: Duration = Duration::from_secs(5);
const DAY_SECONDS: u64 = 86_400;
/// The first of January 1970 was a Thursday; Monday is 0 here.
const FIRST_DAY: u64 = 3;

pub async fn run(core: Arc<Core>) {
    let mut told: BTreeMap<String, Option<u64>> = BTreeMap::new();
    // App-consistent points are counted from the server's start.
    let mut app_points: BTreeMap<String, Duration> = BTreeMap::new();
    while tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_err() {
        let state = core.store.state();
        told.retain(|name, _| state.machines.contains_key(name));
        app_points.retain(|name, _| state.machines.contains_key(name));
        for machine in state.machines.values().filter(|machine| machine.wanted == Wanted::Protected) {
            let Some(policy) = state.policies.get(&machine.policy) else { continue };
            let limit = throttle(policy, core.clock.wall_now());
            let before = told.insert(machine.name.clone(), limit);
            if before.is_some_and(|before| before != limit) {
                let _lock = core.lock(&machine.name).await;
                if let Err(failure) = tell(&core, &machine.name).await {
                    tracing::info!(machine = machine.name, %failure, "the agent does not know its new limit yet");
                }
            }
            let every = Duration::from_secs(policy.app_point_interval_seconds);
            let now = core.clock.monotonic_now();
            let since = *app_points.entry(machine.name.clone()).or_insert(now);
            if !every.is_zero() && now - since >= every {
                app_points.insert(machine.name.clone(), now);
                if let Err(failure) = app_point(&core, machine).await {
                    tracing::warn!(machine = machine.name, %failure, "no app-consistent point was made");
                }
            }
        }
    }
}

async fn tell(core: &Core, name: &str) -> Result<(), Failure> {
    settle_agent(core, &core.machine(name)?).await.map(drop)
}

async fn app_point(core: &Core, machine: &Machine) -> Result<(), Failure> {
    use tidemark_proto::control::{AgentCommand, Consistency};
    let request = MarkRequest { machine: machine.id, consistency: Consistency::App, label: String::new(), keep: true };
    match core.agent(machine.host, &AgentCommand::Mark(request), QUICK).await? {
        Reply::Marked { .. } => Ok(()),
        other => Err(crate::hub::unexpected(crate::hub::PeerId::Agent(machine.host), &other)),
    }
}

/// The limit that counts at a time.
pub fn throttle(policy: &Policy, now: Timestamp) -> Option<u64> {
    let seconds = now.0 / 1_000_000_000;
    let (day, minute) = ((seconds / DAY_SECONDS + FIRST_DAY) % 7, seconds % DAY_SECONDS / 60);
    let fits = |window: &&ThrottleWindow| {
        let (Some(from), Some(to)) = (minutes(&window.from), minutes(&window.to)) else { return false };
        let on = |day: u64| window.days.is_empty() || window.days.iter().any(|known| u64::from(*known) == day % 7 + 1);
        match from < to {
            true => on(day) && (from..to).contains(&minute),
            // Over midnight: what began yesterday lasts until `to`.
            false => (on(day) && minute >= from) || (on(day + 6) && minute < to),
        }
    };
    match policy.throttle_schedule.iter().find(fits) {
        Some(window) => window.bytes_per_second,
        None => policy.throttle_bytes_per_second,
    }
}

/// Refuses a schedule that makes no sense, by name.
pub fn check(schedule: &[ThrottleWindow]) -> Result<(), Failure> {
    for window in schedule {
        let wrong = |what: String| Err(bad_request(what, "give times as HH:MM, days from 1 (Monday) to 7, in UTC"));
        for time in [&window.from, &window.to] {
            if minutes(time).is_none() {
                return wrong(format!("{:?} is no time of a day", time.chars().take(20).collect::<String>()));
            }
        }
        if window.from == window.to {
            return wrong(format!("a window from {} to {} is empty", window.from, window.to));
        }
        if let Some(day) = window.days.iter().find(|day| !(1..=7).contains(*day)) {
            return wrong(format!("{day} is no day of the week"));
        }
        if window.bytes_per_second == Some(0) {
            return Err(bad_request("a limit of 0 bytes in a second sends nothing", "pause the machine instead"));
        }
    }
    Ok(())
}

fn minutes(time: &str) -> Option<u64> {
    let (hours, minutes) = time.split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes): (u64, u64) = (hours.parse().ok()?, minutes.parse().ok()?);
    let all = hours * 60 + minutes;
    (minutes < 60 && all <= 24 * 60).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str) -> Timestamp {
        Timestamp::parse(time).unwrap()
    }

    fn window(days: &[u8], from: &str, to: &str, limit: u64) -> ThrottleWindow {
        ThrottleWindow { days: days.to_vec(), from: from.into(), to: to.into(), bytes_per_second: Some(limit) }
    }

    #[test]
    fn the_limit_follows_days_and_hours_also_over_midnight() {
        let policy = Policy {
            throttle_bytes_per_second: Some(9),
            throttle_schedule: vec![window(&[1, 5], "08:00", "18:00", 1), window(&[7], "22:00", "06:00", 2)],
            ..Policy::default()
        };
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
            assert_eq!(throttle(&policy, at(time)), Some(limit), "{time}");
        }
    }

    #[test]
    fn schedules_that_make_no_sense_are_refused() {
        check(&[window(&[], "00:00", "24:00", 1)]).unwrap();
        for wrong in [
            window(&[], "8:00", "18:00", 1),
            window(&[], "08:00", "24:01", 1),
            window(&[], "08:60", "18:00", 1),
            window(&[], "08:00", "08:00", 1),
            window(&[0], "08:00", "18:00", 1),
            window(&[8], "08:00", "18:00", 1),
            window(&[], "08:00", "18:00", 0),
        ] {
            assert!(!check(std::slice::from_ref(&wrong)).unwrap_err().help.is_empty(), "{wrong:?}");
        }
    }
}
