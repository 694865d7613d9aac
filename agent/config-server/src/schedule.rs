//! Schedules of limits, as they are checked. Agents follow them by their own clock, also while this server is away.

use tidemark_proto::control::{DAY_MINUTES, Failure, Network, THROTTLE_RULES_MAX, ThrottleRule};

use crate::model::{ThrottleWindow, minutes};
use crate::names::bad_request;
use crate::policies::refuse_throttle;

/// Refuses a schedule that makes no sense, by name.
pub fn check(schedule: &[ThrottleWindow]) -> Result<(), Failure> {
    if schedule.len() > THROTTLE_RULES_MAX {
        return Err(bad_request(
            format!("throttle_schedule has {} windows", schedule.len()),
            format!("give at most {THROTTLE_RULES_MAX}"),
        ));
    }
    let mut before: Vec<ThrottleRule> = Vec::new();
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
        if let Some(Err(reason)) = window.network.as_ref().map(|text| text.parse::<Network>()) {
            return Err(bad_request(reason, "name the addresses of process servers that the limit is for"));
        }
        refuse_throttle("a window's limit", window.bytes_per_second)?;
        let Some(rule) = window.rule() else { return wrong("a window of throttle_schedule makes no sense".to_owned()) };
        if is_hidden(&rule, &before) {
            let to = window.network.as_ref().map_or(String::new(), |network| format!(" for {network}"));
            return Err(bad_request(
                format!(
                    "the window from {} to {}{to} never counts: those before it hold all of it",
                    window.from, window.to
                ),
                "the first window that fits counts: put the narrower one first",
            ));
        }
        before.push(rule);
    }
    Ok(())
}

/// Whether at every minute of the week an earlier window fits wherever this one does.
fn is_hidden(rule: &ThrottleRule, before: &[ThrottleRule]) -> bool {
    let covers = |earlier: &&ThrottleRule| match (earlier.network, rule.network) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(wide), Some(narrow)) => wide.covers(&narrow),
    };
    let covering: Vec<&ThrottleRule> = before.iter().filter(covers).collect();
    (0..7).all(|day| {
        (0..DAY_MINUTES)
            .filter(|minute| rule.holds_minute(day, *minute))
            .all(|minute| covering.iter().any(|earlier| earlier.holds_minute(day, minute)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(days: &[u8], from: &str, to: &str, limit: u64) -> ThrottleWindow {
        ThrottleWindow {
            days: days.to_vec(),
            from: from.into(),
            to: to.into(),
            network: None,
            bytes_per_second: Some(limit << 10),
        }
    }

    fn of(network: &str, window: ThrottleWindow) -> ThrottleWindow {
        ThrottleWindow { network: Some(network.into()), ..window }
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
            of("10.0.0.0/33", window(&[], "08:00", "18:00", 1)),
        ] {
            assert!(!check(std::slice::from_ref(&wrong)).unwrap_err().help.is_empty(), "{wrong:?}");
        }
    }

    #[test]
    fn a_window_that_never_counts_is_refused() {
        let (night, day) = (window(&[], "18:00", "08:00", 1), window(&[], "08:00", "18:00", 2));
        let monday = window(&[1], "06:00", "20:00", 3);
        check(&[monday.clone(), night.clone(), day.clone()]).unwrap();
        let hidden = check(&[night.clone(), day.clone(), monday.clone()]).unwrap_err();
        assert!(hidden.message.contains("06:00") && hidden.message.contains("never counts"), "{hidden:?}");
        // One address range does not hide what is for all.
        check(&[of("10.0.0.0/8", night.clone()), of("10.0.0.0/8", day.clone()), monday.clone()]).unwrap();
        let narrow = of("10.1.0.0/16", monday);
        check(&[of("10.0.0.0/8", night), of("10.0.0.0/8", day), narrow]).unwrap_err();
    }
}
