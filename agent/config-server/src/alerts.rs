//! Alerts: what lasts and needs someone. They are looked for again and again in what agents and process servers reported
//! last; one that begins or ends is an event.
//!
//! *Consistency.* An alert is stored before it is told as an event. *Retries.* The next look. *Cancellation.* At the
//! server's stop. *Crash.* Alerts are in the state with the time when they began, and go on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::{Clock, MachineId, Timestamp};
use tidemark_proto::control::Severity;
use tidemark_transport::PeerIdentity;

use crate::core::Core;
use crate::history::News;
use crate::model::{Alert, IdentityRecord, Machine, Policy, Standing, State};
use crate::status::{self, Health, Reason};

const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A start is no alarm: agents and process servers need a moment to connect.
const GRACE: Duration = Duration::from_secs(30);
/// Machines that a message names.
const NAMED_MAX: usize = 10;
/// Nor is somebody else's: who comes back within this time was hardly away.
const ABSENCE: Duration = Duration::from_secs(15);

pub async fn watch(core: Arc<Core>) {
    let started = core.clock.monotonic_now();
    let mut absent = BTreeMap::new();
    while tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_err() {
        let now = core.clock.monotonic_now();
        let is_settled = now - started > GRACE;
        if let Err(failure) = crate::failover::elsewhere::watch(&core) {
            tracing::warn!(%failure, "that a machine arrived at its new home cannot be stored");
        }
        let mut found = find(&core);
        absent.retain(|key, _| found.contains_key(key));
        let known = core.store.state();
        found.retain(|key, found| {
            let since = *absent.entry(key.clone()).or_insert(now);
            let has_lasted = is_settled && now.saturating_sub(since) >= ABSENCE;
            // An alert that is told already goes on: a restart of ours is no all-clear.
            !found.is_absence || has_lasted || known.alerts.contains_key(key)
        });
        let found = found.into_iter().map(|(key, found)| (key, found.alert)).collect();
        if let Err(failure) = take(&core, found) {
            tracing::warn!(%failure, "alerts cannot be stored");
        }
    }
}

struct Found {
    alert: Alert,
    /// Somebody is not there, and may be back in a moment.
    is_absence: bool,
}

/// What is wrong now, by a key that stays the same while it lasts.
fn find(core: &Core) -> BTreeMap<String, Found> {
    let now = core.clock.wall_now();
    let mut found = BTreeMap::new();
    let (state, statuses) = (core.store.state(), status::all_reported(core));
    core.cycles.retain(|machine| statuses.iter().any(|status| status.id == machine));
    for machine in &statuses {
        let is_told = machine.state == status::State::Protected;
        let rpo = machine.rpo_seconds.filter(|_| is_told).map(Duration::from_secs_f64);
        let cycle = state.policies.get(&machine.policy).and_then(Policy::cycle);
        core.cycles.note(machine.id, core.clock.monotonic_now(), cycle, rpo);
    }
    for machine in statuses {
        for reason in &machine.reasons {
            let severity = if reason.health == Health::Critical { Severity::Critical } else { Severity::Warning };
            let alert = Alert {
                severity,
                kind: reason.kind.to_owned(),
                machine: None,
                machines: Vec::new(),
                message: reason.message.clone(),
                help: reason.help.clone(),
                since: now,
            };
            let of = found.entry(key(machine.id, reason)).or_insert(Found { alert, is_absence: reason.is_absence });
            of.alert.severity = of.alert.severity.max(severity);
            if of.alert.machines.last() != Some(&machine.name) {
                of.alert.machines.push(machine.name.clone());
            }
        }
        // What they said last still holds while they are not heard of: silence is not an all-clear.
        if !machine.host.connected || machine.process_servers.iter().any(|server| !server.peer.connected) {
            let of = format!("{}/problem/", machine.id);
            for (key, alert) in state.alerts.range(of.clone()..).take_while(|(key, _)| key.starts_with(&of)) {
                if alert.severity == Severity::Critical {
                    let alert = alert.clone();
                    found.entry(key.clone()).or_insert(Found { alert, is_absence: false });
                }
            }
        }
    }
    for Found { alert, .. } in found.values_mut() {
        match &alert.machines[..] {
            [] => {}
            [only] => alert.machine = Some(only.clone()),
            several => alert.message = format!("{}; machines: {}", alert.message, listed(several)),
        }
    }
    let certain = |alert| Found { alert, is_absence: false };
    if let Some(alert) = core.backups.alert(&state) {
        found.insert("configuration/backup".to_owned(), certain(alert));
    }
    for (uri, record) in &state.identities {
        if let Ok(identity) = uri.parse()
            && let Some(alert) = refused(&state, identity, record, now)
        {
            found.insert(format!("identity/{uri}"), certain(alert));
        }
    }
    found
}

/// Stays the same while it lasts. What is about an agent or a process server is one alert for all of its machines.
fn key(machine: MachineId, reason: &Reason) -> String {
    if let Some(peer) = &reason.peer {
        // One that is away and then silent for too long is the same that got worse, and no end of the first.
        return format!("peer/{peer}/{}", if reason.is_absence { "absence" } else { reason.kind });
    }
    let told = blake3::hash(without_figures(&reason.message).as_bytes()).to_hex();
    let of = reason.of.map_or_else(String::new, |server| format!("/{server}"));
    format!("{machine}/{}/{}{of}", reason.kind, &told[..16])
}

fn listed(machines: &[String]) -> String {
    let named = machines.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    match machines.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Of an identity that is refused while machines depend on it.
fn refused(state: &State, identity: PeerIdentity, record: &IdentityRecord, now: Timestamp) -> Option<Alert> {
    let (what, help) = match &record.standing {
        Standing::Good => return None,
        Standing::Fenced { .. } => (
            "was used by two live processes, and both are refused",
            "stop the copy, then `tidemark identity restore`, or register one of them again",
        ),
        Standing::Revoked { .. } => (
            "was revoked",
            "unprotect its machines or register it again; `tidemark identity restore` takes the revocation back",
        ),
    };
    let depends = |machine: &&Machine| match identity {
        PeerIdentity::Agent(host) => machine.host == host,
        PeerIdentity::ProcessServer(server) => machine.servers().any(|of| of == server),
        _ => false,
    };
    let machines: Vec<String> = state.machines.values().filter(depends).map(|machine| machine.name.clone()).collect();
    (!machines.is_empty()).then(|| Alert {
        severity: Severity::Critical,
        kind: "identity_refused".to_owned(),
        machine: None,
        message: format!("{} {what}; not protected meanwhile: {}", record.name, listed(&machines)),
        machines,
        help: help.to_owned(),
        since: now,
    })
}

/// Problems of one kind are told apart by their text without its figures, which change all the time.
pub fn without_figures(message: &str) -> String {
    message.chars().filter(|letter| !letter.is_ascii_digit()).collect()
}

fn take(core: &Core, found: BTreeMap<String, Alert>) -> Result<(), tidemark_proto::control::Failure> {
    let before = core.store.state();
    // The figures in a text may change; that is no new alert and not written each time.
    let same = |key: &String, alert: &Alert| {
        before.alerts.get(key).is_some_and(|known| known.severity == alert.severity && known.kind == alert.kind)
    };
    let has_other_machines =
        |key: &String, alert: &Alert| before.alerts.get(key).is_some_and(|known| known.machines != alert.machines);
    let begun: Vec<(String, Alert)> = found
        .iter()
        .filter(|(key, alert)| !same(key, alert))
        .map(|(key, alert)| (key.clone(), alert.clone()))
        .collect();
    // One machine more or less is shown, and not told again.
    let changed: Vec<(String, Alert)> = found
        .iter()
        .filter(|(key, alert)| same(key, alert) && has_other_machines(key, alert))
        .map(|(key, alert)| (key.clone(), alert.clone()))
        .collect();
    let ended: Vec<String> = before.alerts.keys().filter(|key| !found.contains_key(*key)).cloned().collect();
    if begun.is_empty() && changed.is_empty() && ended.is_empty() {
        return Ok(());
    }
    core.store.change(|state| {
        for (key, alert) in begun.iter().chain(&changed) {
            let since = state.alerts.get(key).map_or(alert.since, |known| known.since);
            state.alerts.insert(key.clone(), Alert { since, ..alert.clone() });
        }
        for key in &ended {
            state.alerts.remove(key);
        }
        Ok(())
    })?;
    for (_, alert) in begun {
        let Alert { severity, machine, message, help, .. } = alert;
        core.history.note(News { severity, kind: "alert_raised", machine, message, help });
    }
    for key in ended {
        let Some(alert) = before.alerts.get(&key) else { continue };
        let message = format!("no more: {}", alert.message);
        let machine = alert.machine.clone();
        core.history.note(News {
            severity: Severity::Info,
            kind: "alert_cleared",
            machine,
            message,
            help: String::new(),
        });
    }
    Ok(())
}
