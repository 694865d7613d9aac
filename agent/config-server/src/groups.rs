//! Groups: machines that belong together. A machine is in one group at most. [`points`] are instants of all of them.

pub mod points;
pub mod watch;

use serde::{Deserialize, Serialize};
use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, GROUP_MACHINES_MAX, HOLD_LIMIT_MAX};
use utoipa::ToSchema;

use crate::core::Core;
use crate::model::{Group, Machine, State, Wanted};
use crate::names::{Expected, bad_request, check_name};
use crate::status::{self, Health};

const GROUPS_MAX: usize = 1024;
/// All of them are held at one instant.
const MACHINES_MAX: usize = GROUP_MACHINES_MAX;
const INTERVAL_SECONDS_MAX: u64 = 86_400;
/// Less than what a disk needs to end its writes holds nobody.
const HOLD_LIMIT_MS_MIN: u64 = 10;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateGroup {
    pub name: String,
    #[serde(default)]
    pub machines: Vec<String>,
    #[serde(default)]
    pub interval_seconds: Option<u64>,
    #[serde(default)]
    pub hold_limit_ms: Option<u64>,
}

/// What is not named stays as it is.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GroupSettings {
    /// A point of all machines at one instant that often; 0: only when one is asked for.
    pub interval_seconds: Option<u64>,
    /// The longest that a write may wait for it.
    pub hold_limit_ms: Option<u64>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Group)]
pub struct ShownGroup {
    pub name: String,
    #[schema(value_type = String, format = "date-time")]
    pub created: Timestamp,
    pub machines: Vec<String>,
    /// Of the machine that does worst.
    pub health: Health,
    pub interval_seconds: u64,
    pub hold_limit_ms: u64,
}

pub fn list(core: &Core) -> Vec<ShownGroup> {
    let (state, statuses) = (core.store.state(), status::all_reported(core));
    state.groups.iter().map(|(name, group)| shown(&state, &statuses, name, group)).collect()
}

pub fn get(core: &Core, name: &str) -> Result<ShownGroup, Failure> {
    let state = core.store.state();
    let group = find(&state, name)?;
    Ok(shown(&state, &status::all_reported(core), name, group))
}

pub fn create(core: &Core, request: &CreateGroup) -> Result<ShownGroup, Failure> {
    let name = &request.name;
    check_name("group", name)?;
    if name == "none" {
        return Err(bad_request(
            "a group cannot be called \"none\"",
            "that is how `--group none` says that there is none",
        ));
    }
    let mut group = Group::new(core.clock.wall_now());
    let CreateGroup { interval_seconds, hold_limit_ms, .. } = *request;
    apply(&mut group, &GroupSettings { interval_seconds, hold_limit_ms })?;
    core.store.change(|state| {
        if state.groups.contains_key(name) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("there is a group {name:?} already"),
                "add machines to it with `tidemark group add`, or choose another name",
            ));
        }
        if state.groups.len() >= GROUPS_MAX {
            return Err(bad_request(format!("there are {GROUPS_MAX} groups, which is the limit"), "delete one"));
        }
        state.groups.insert(name.clone(), group.clone());
        request.machines.iter().try_for_each(|machine| join(state, name, machine))
    })?;
    get(core, name)
}

/// The machines of a group that are protected.
pub fn members(state: &State, name: &str) -> Vec<Machine> {
    let is_member = |machine: &&Machine| {
        machine.group.as_deref() == Some(name) && !matches!(machine.wanted, Wanted::Unprotected { .. })
    };
    state.machines.values().filter(is_member).cloned().collect()
}

pub fn set(core: &Core, name: &str, settings: &GroupSettings, expected: Expected) -> Result<ShownGroup, Failure> {
    core.store.change(|state| {
        find(state, name)?;
        expected.check(state, "machine_groups", name)?;
        state.groups.get_mut(name).map_or(Ok(()), |group| apply(group, settings))
    })?;
    get(core, name)
}

fn apply(group: &mut Group, settings: &GroupSettings) -> Result<(), Failure> {
    if let Some(seconds) = settings.interval_seconds {
        if seconds > INTERVAL_SECONDS_MAX {
            return Err(bad_request(
                format!("points of a group every {seconds} s are too far apart"),
                format!("choose at most {INTERVAL_SECONDS_MAX} s, or 0 for none by itself"),
            ));
        }
        group.interval_seconds = seconds;
    }
    if let Some(limit) = settings.hold_limit_ms {
        let most = HOLD_LIMIT_MAX.as_millis() as u64;
        if !(HOLD_LIMIT_MS_MIN..=most).contains(&limit) {
            return Err(bad_request(
                format!("writes cannot be held for at most {limit} ms"),
                format!(
                    "choose between {HOLD_LIMIT_MS_MIN} and {most} ms; guests wait for that long when a host is gone"
                ),
            ));
        }
        group.hold_limit_ms = limit;
    }
    Ok(())
}

pub fn add(core: &Core, name: &str, machine: &str) -> Result<ShownGroup, Failure> {
    core.store.change(|state| join(state, name, machine))?;
    get(core, name)
}

pub fn remove(core: &Core, name: &str, machine: &str) -> Result<ShownGroup, Failure> {
    core.store.change(|state| {
        find(state, name)?;
        match state.machines.get_mut(machine) {
            Some(member) if member.group.as_deref() == Some(name) => {
                member.group = None;
                Ok(())
            }
            _ => {
                let shown: String = machine.chars().take(80).collect();
                Err(Failure::new(
                    FailureKind::NotFound,
                    format!("group {name:?} has no machine {shown:?}"),
                    "see `tidemark group show` for those it has",
                ))
            }
        }
    })?;
    get(core, name)
}

/// Its machines stay protected, in no group.
pub fn delete(core: &Core, name: &str, expected: Expected) -> Result<(), Failure> {
    core.store.change(|state| {
        find(state, name)?;
        expected.check(state, "machine_groups", name)?;
        for machine in state.machines.values_mut().filter(|machine| machine.group.as_deref() == Some(name)) {
            machine.group = None;
        }
        state.groups.remove(name);
        Ok(())
    })
}

pub fn find<'a>(state: &'a State, name: &str) -> Result<&'a Group, Failure> {
    state.groups.get(name).ok_or_else(|| {
        let shown: String = name.chars().take(80).collect();
        Failure::new(
            FailureKind::NotFound,
            format!("there is no group {shown:?}"),
            "see `tidemark group list`, or make it with `tidemark group create`",
        )
    })
}

/// Whether one more machine may come into a group.
pub fn has_room(state: &State, name: &str) -> Result<(), Failure> {
    find(state, name)?;
    let members = state.machines.values().filter(|machine| machine.group.as_deref() == Some(name)).count();
    match members < MACHINES_MAX {
        true => Ok(()),
        false => Err(bad_request(
            format!("group {name:?} has {MACHINES_MAX} machines, which is the limit"),
            "all of them are held at one instant: make another group",
        )),
    }
}

fn join(state: &mut State, name: &str, machine: &str) -> Result<(), Failure> {
    find(state, name)?;
    let is_gone = |machine: &Machine| matches!(machine.wanted, Wanted::Unprotected { .. });
    let Some(member) = state.machines.get(machine).filter(|machine| !is_gone(machine)) else {
        let shown: String = machine.chars().take(80).collect();
        return Err(Failure::new(
            FailureKind::NotFound,
            format!("there is no machine {shown:?}"),
            "protect it first: `tidemark protect NAME --disk PATH --group GROUP`",
        ));
    };
    match member.group.as_deref() {
        Some(known) if known == name => return Ok(()),
        Some(other) => {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("machine {machine:?} is in group {other:?}"),
                "a machine is in one group at most: remove it from that one first",
            ));
        }
        None => {}
    }
    has_room(state, name)?;
    if let Some(member) = state.machines.get_mut(machine) {
        member.group = Some(name.to_owned());
    }
    Ok(())
}

fn shown(state: &State, statuses: &[status::MachineStatus], name: &str, group: &Group) -> ShownGroup {
    let machines: Vec<String> = state
        .machines
        .values()
        .filter(|machine| machine.group.as_deref() == Some(name))
        .map(|machine| machine.name.clone())
        .collect();
    let health = statuses.iter().filter(|status| machines.contains(&status.name)).map(|status| status.health).max();
    ShownGroup {
        name: name.to_owned(),
        created: group.created,
        machines,
        health: health.unwrap_or(Health::Ok),
        interval_seconds: group.interval_seconds,
        hold_limit_ms: group.hold_limit_ms,
    }
}
