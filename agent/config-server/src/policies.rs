//! Policies by name.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tidemark_base::words;
use tidemark_proto::control::{Compression, Failure, FailureKind, GRID_STEPS_MAX};

use crate::core::Core;
use crate::machines::{find_policy, settle_agent, settle_server};
use crate::model::{DEFAULT_POLICY, Policy, Wanted};
use crate::names::{Expected, bad_request, check_name};

/// Less is never enough for one rotation.
const LOG_LIMIT_BYTES_MIN: u64 = 1 << 20;
/// A chunk of a scan takes minutes at that.
pub const THROTTLE_BYTES_MIN: u64 = 1 << 10;
/// A hundred years.
const SECONDS_MAX: u64 = 100 * 365 * 24 * 3600;

pub fn show(name: &str, policy: &Policy) -> Value {
    let mut value = serde_json::to_value(policy).expect("a policy is plain data");
    value["name"] = json!(name);
    value
}

pub fn list(core: &Core) -> Vec<Value> {
    core.store.state().policies.iter().map(|(name, policy)| show(name, policy)).collect()
}

/// Settings as an event tells of them.
pub fn in_words(settings: &Map<String, Value>) -> String {
    const SHOWN_CHARS: usize = 400;
    let all: Vec<String> = settings.iter().map(|(name, value)| format!("{name} {value}")).collect();
    match all.join(", ") {
        none if none.is_empty() => "as the default is".to_owned(),
        long if long.chars().count() > SHOWN_CHARS => long.chars().take(SHOWN_CHARS).chain(['…']).collect(),
        all => all,
    }
}

pub fn create(core: &Core, name: &str, settings: Map<String, Value>) -> Result<Value, Failure> {
    check_name("policy", name)?;
    core.store.change(|state| {
        // What is not named is as in the default policy, as it is now.
        let default = state.policies.get(DEFAULT_POLICY).cloned().unwrap_or_default();
        let policy = with_settings(&default, settings)?;
        if state.policies.contains_key(name) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("there is a policy {name:?} already"),
                "change it with `tidemark policy set`, or choose another name",
            ));
        }
        state.policies.insert(name.to_owned(), policy.clone());
        Ok(show(name, &policy))
    })
}

/// Changes the named settings and tells those that they concern; who is away is told on coming back.
pub async fn set(
    core: &Arc<Core>,
    name: &str,
    settings: Map<String, Value>,
    expected: Expected,
) -> Result<Value, Failure> {
    let policy = core.store.change(|state| {
        expected.check(state, "policies", name)?;
        let policy = with_settings(find_policy(state, name)?, settings)?;
        state.policies.insert(name.to_owned(), policy.clone());
        Ok(policy)
    })?;
    let state = core.store.state();
    for machine in state.machines.values().filter(|machine| machine.policy == name) {
        if matches!(machine.wanted, Wanted::Unprotected { .. }) {
            continue;
        }
        let _lock = core.lock(&machine.name).await;
        let outcome = async {
            let machine = core.machine(&machine.name)?;
            settle_server(core, &machine).await?;
            settle_agent(core, &machine).await.map(drop)
        };
        if let Err(failure) = outcome.await {
            tracing::info!(machine = machine.name, %failure, "the changed policy is not everywhere yet");
        }
    }
    Ok(show(name, &policy))
}

pub fn delete(core: &Core, name: &str, expected: Expected) -> Result<(), Failure> {
    core.store.change(|state| {
        find_policy(state, name)?;
        expected.check(state, "policies", name)?;
        let conflict = |what: String, help: &str| Err(Failure::new(FailureKind::Conflict, what, help));
        if name == DEFAULT_POLICY {
            return conflict(format!("policy {name:?} is the default"), "change it with `tidemark policy set` instead");
        }
        if let Some(machine) = state.machines.values().find(|machine| machine.policy == name) {
            return conflict(
                format!("policy {name:?} is in use by machine {:?}", machine.name),
                "give its machines another policy first",
            );
        }
        state.policies.remove(name);
        Ok(())
    })
}

fn with_settings(policy: &Policy, settings: Map<String, Value>) -> Result<Policy, Failure> {
    let mut value = serde_json::to_value(policy).expect("a policy is plain data");
    let fields = value.as_object_mut().expect("a policy is an object");
    shorten(fields, &settings);
    lengthen(fields, &settings);
    let is_grid_named = settings.contains_key("retention_grid");
    let named = settings.clone();
    fields.extend(settings);
    let policy: Policy = serde_json::from_value(value).map_err(|error| {
        // Which one it is, the error does not say.
        let alone =
            |name: &String, value: &Value| serde_json::from_value::<Policy>(json!({ name.as_str(): value })).err();
        let wrong = named.iter().find_map(|(name, value)| Some((name, alone(name, value)?)));
        let what = wrong.map_or_else(
            || words::in_words("", &error.to_string()),
            |(name, error)| words::in_words(name, &error.to_string()),
        );
        bad_request(
            format!("not a policy: {what}"),
            "frequency is continuous, 30s, 5m or 15m; see `tidemark policy show continuous --json` for all settings",
        )
    })?;

    if let Compression::Level(level) = policy.compression
        && !(-7..=22).contains(&level)
    {
        return Err(bad_request(
            format!("compression level {level} does not exist"),
            "choose `auto`, `off`, or a zstd level from 1 to 22; negative ones down to -7 are for speed",
        ));
    }
    crate::schedule::check(&policy.throttle_schedule)?;
    contradictions(&policy)?;
    grid_contradictions(&policy, is_grid_named)?;
    Ok(policy)
}

/// Points are made at the ends of cycles: intervals that nobody named are not shorter.
fn lengthen(fields: &mut Map<String, Value>, settings: &Map<String, Value>) {
    let frequency = settings.get("frequency").and_then(|value| serde_json::from_value(value.clone()).ok());
    let cycle = frequency.and_then(|frequency| Policy { frequency, ..Policy::default() }.cycle());
    let Some(cycle) = cycle.map(|cycle| cycle.as_secs()) else { return };
    for name in ["point_interval_seconds", "app_point_interval_seconds"] {
        let is_shorter = fields[name].as_u64().is_some_and(|seconds| (1..cycle).contains(&seconds));
        if !settings.contains_key(name) && is_shorter {
            fields.insert(name.to_owned(), json!(cycle));
        }
    }
}

fn grid_contradictions(policy: &Policy, is_named: bool) -> Result<(), Failure> {
    let help = "write steps as `2h:all,1day:1h,7days:2h,rest:4h`: each reaches further back than the one before, and keeps fewer";
    let refuse = |what: String| Err(bad_request(format!("retention_grid: {what}"), help));
    if policy.retention_grid.len() > GRID_STEPS_MAX {
        return refuse(format!("{} steps are more than {GRID_STEPS_MAX}", policy.retention_grid.len()));
    }
    if policy.grid().is_none() {
        return refuse("a step reaches no further back than the one before".to_owned());
    }
    let (mut from, mut every) = (0, 0);
    for step in &policy.retention_grid {
        let reach = step.within_seconds.map_or("the rest".to_owned(), |within| format!("the step to {within} s"));
        if step.every_seconds < every {
            return refuse(format!(
                "{reach} keeps a point every {} s, more than the younger step before",
                step.every_seconds
            ));
        }
        if step.within_seconds.is_some_and(|within| step.every_seconds > within - from) {
            return refuse(format!("{reach} is shorter than its interval of {} s", step.every_seconds));
        }
        if is_named && policy.retention_seconds.is_some_and(|retention| from >= retention) && from > 0 {
            let retention = policy.retention_seconds.unwrap_or_default();
            return refuse(format!("{reach} begins at an age of {from} s, and retention_seconds is {retention}"));
        }
        (from, every) = (step.within_seconds.unwrap_or(from), step.every_seconds);
    }
    Ok(())
}

/// Who keeps history for a shorter time than before did not ask for more of anything else: what is not named follows.
fn shorten(fields: &mut Map<String, Value>, settings: &Map<String, Value>) {
    let Some(retention) = settings.get("retention_seconds").and_then(Value::as_u64).filter(|seconds| *seconds > 0)
    else {
        return;
    };
    for name in ["any_time_seconds", "point_interval_seconds", "app_point_interval_seconds"] {
        if !settings.contains_key(name) && fields[name].as_u64().is_some_and(|seconds| seconds > retention) {
            fields.insert(name.to_owned(), json!(retention));
        }
    }
}

/// A limit under which nothing arrives.
pub fn refuse_throttle(what: &str, limit: Option<u64>) -> Result<(), Failure> {
    match limit.filter(|limit| *limit < THROTTLE_BYTES_MIN) {
        Some(limit) => Err(bad_request(
            format!("{what} of {limit} bytes in a second sends next to nothing"),
            format!("give at least {THROTTLE_BYTES_MIN}, no limit (`none`), or pause the machine instead"),
        )),
        None => Ok(()),
    }
}

/// A policy that contradicts itself is refused by the names of the settings that do.
fn contradictions(policy: &Policy) -> Result<(), Failure> {
    for (name, seconds) in [
        ("any_time_seconds", policy.any_time_seconds),
        ("retention_seconds", policy.retention_seconds.unwrap_or(0)),
        ("point_interval_seconds", policy.point_interval_seconds),
        ("app_point_interval_seconds", policy.app_point_interval_seconds),
        ("alarm_rpo_seconds", policy.alarm_rpo_seconds),
        ("alarm_no_contact_seconds", policy.alarm_no_contact_seconds),
    ] {
        if seconds > SECONDS_MAX {
            return Err(bad_request(format!("{name} is {seconds}"), format!("give at most {SECONDS_MAX}")));
        }
    }
    refuse_throttle("a throttle", policy.throttle_bytes_per_second)?;
    if policy.retention_seconds == Some(0) {
        return Err(bad_request(
            "retention_seconds is 0: no point would be kept",
            "give the age at which points expire, or no limit (`--retention none`)",
        ));
    }
    if policy.retention_count == Some(0) {
        return Err(bad_request("retention_count is 0: no point would be kept", "keep at least 1"));
    }
    for (name, percent) in
        [("alarm_log_percent", policy.alarm_log_percent), ("alarm_missed_percent", policy.alarm_missed_percent)]
    {
        if percent == 0 || percent > 100 {
            return Err(bad_request(format!("{name} is {percent}"), "give a percentage from 1 to 100"));
        }
    }
    if policy.alarm_no_contact_seconds == 0 {
        return Err(bad_request(
            "alarm_no_contact_seconds is 0: everyone would be away at once",
            "give the seconds after which silence is an alarm",
        ));
    }
    if let Some(cycle) = policy.cycle().map(|cycle| cycle.as_secs()) {
        for (name, interval) in [
            ("point_interval_seconds", policy.point_interval_seconds),
            ("app_point_interval_seconds", policy.app_point_interval_seconds),
        ] {
            if (1..cycle).contains(&interval) {
                return Err(bad_request(
                    format!("{name} is {interval}, shorter than the cycle of frequency, {cycle} s"),
                    "points are made at the ends of cycles: replicate more often, or make points less often",
                ));
            }
        }
        if (1..cycle).contains(&policy.alarm_rpo_seconds) {
            return Err(bad_request(
                format!(
                    "alarm_rpo_seconds is {}, shorter than the cycle of frequency, {cycle} s: it would always ring",
                    policy.alarm_rpo_seconds
                ),
                "allow an RPO of more than one cycle, or replicate more often",
            ));
        }
    }
    if let Some(retention) = policy.retention_seconds {
        for (name, interval) in [
            ("point_interval_seconds", policy.point_interval_seconds),
            ("app_point_interval_seconds", policy.app_point_interval_seconds),
        ] {
            if interval > retention {
                return Err(bad_request(
                    format!(
                        "{name} is {interval}, longer than retention_seconds, {retention}: points expire before the next"
                    ),
                    "keep points longer, or make them more often",
                ));
            }
        }
        if policy.any_time_seconds > retention {
            return Err(bad_request(
                format!("any_time_seconds is {}, longer than retention_seconds, {retention}", policy.any_time_seconds),
                "keep history at least as long as any moment of it shall be recovered",
            ));
        }
    }
    if policy.log_limit_bytes.is_some_and(|limit| limit < LOG_LIMIT_BYTES_MIN) {
        return Err(bad_request(
            format!("a log of at most {} bytes holds nothing", policy.log_limit_bytes.unwrap_or_default()),
            format!("give at least {LOG_LIMIT_BYTES_MIN} bytes"),
        ));
    }
    Ok(())
}
