//! Alerts: what lasts and needs someone. They are looked for again and again in what agents and process servers reported
//! last; one that begins or ends is an event.
//!
//! *Consistency.* An alert is stored before it is told as an event. *Retries.* The next look. *Cancellation.* At the
//! server's stop. *Crash.* Alerts are in the state with the time when they began, and go on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::{Clock, MachineId, Timestamp};
use tidemark_proto::control::Severity;
use tidemark_transport::PeerIdentity;

use crate::core::Core;
use crate::history::{AlertNote, AlertState, News, severity_name};
use crate::hub::{PeerId, Presence};
use crate::model::{Alert, IdentityRecord, Machine, Policy, Standing, State};
use crate::status::{self, Health, Reason};

const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A start is no alarm: agents and process servers need a moment to connect.
const GRACE: Duration = Duration::from_secs(30);
/// Of an agent or process server that no machine needs.
const IDLE_SILENCE: Duration = Duration::from_secs(900);
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
            let alert = Alert::new(severity, reason.kind, reason.message.clone(), &*reason.help, now);
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
    for (id, alert) in idle_and_silent(&state, now, |peer| core.hub.presence(peer)) {
        found.insert(format!("peer/{id}/absence"), Found { alert, is_absence: true });
    }
    for (name, ids) in shared_names(&state) {
        let message = format!("{} hosts call themselves {name}: {}", ids.len(), ids.join(", "));
        let help = "give each a `name` of its own in its tidemark.toml: until then commands must name them by id";
        let alert = Alert::new(Severity::Warning, "name_shared", message, help, now);
        found.insert(format!("name/{name}"), certain(alert));
    }
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

/// Whoever is not heard of and has no machine whose health would tell.
fn idle_and_silent(state: &State, now: Timestamp, presence: impl Fn(PeerId) -> Presence) -> Vec<(String, Alert)> {
    let busy_hosts: BTreeSet<_> = state.machines.values().map(|machine| machine.host).collect();
    let busy_servers: BTreeSet<_> = state.machines.values().flat_map(Machine::servers).collect();
    let hosts =
        state.hosts.iter().filter(|(id, _)| !busy_hosts.contains(*id)).map(|(id, host)| {
            (PeerIdentity::Agent(*id), PeerId::Agent(*id), id.to_string(), &host.name, host.last_seen)
        });
    let servers = state.servers.iter().filter(|(id, _)| !busy_servers.contains(*id)).map(|(id, of)| {
        (PeerIdentity::ProcessServer(*id), PeerId::ProcessServer(*id), id.to_string(), &of.name, of.last_seen)
    });
    let mut found = Vec::new();
    for (identity, peer, id, name, last_seen) in hosts.chain(servers) {
        let since = match presence(peer) {
            Presence::Connected { .. } => continue,
            Presence::Gone { since, .. } => since,
            Presence::NeverSeen => last_seen,
        };
        if is_taken(state, identity) && now.saturating_since(since) > IDLE_SILENCE {
            let what = if matches!(peer, PeerId::Agent(_)) { "agent" } else { "process server" };
            let message = format!("nothing was heard of {what} {name} since {since}; it has no machines");
            let help = "check that it runs, and that its `config-server` names this one; delete one that is gone for good: `tidemark host delete`, `tidemark process-server delete`";
            found.push((id, Alert::new(Severity::Warning, "no_contact", message, help, now)));
        }
    }
    found
}

/// Names that several hosts have, with their ids.
fn shared_names(state: &State) -> BTreeMap<&str, Vec<String>> {
    let mut ids: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (id, host) in state.hosts.iter().filter(|(id, _)| is_taken(state, PeerIdentity::Agent(**id))) {
        ids.entry(&host.name).or_default().push(id.to_string());
    }
    ids.retain(|_, ids| ids.len() > 1);
    ids
}

/// Nobody revoked or fenced it.
fn is_taken(state: &State, identity: PeerIdentity) -> bool {
    state.identities.get(&identity.to_string()).is_none_or(|record| record.standing == Standing::Good)
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
    (!machines.is_empty()).then(|| {
        let message = format!("{} {what}; not protected meanwhile: {}", record.name, listed(&machines));
        Alert { machines, ..Alert::new(Severity::Critical, "identity_refused", message, help, now) }
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
    // One machine more or less is shown, and not told again.
    let has_same_machines =
        |key: &String, alert: &Alert| before.alerts.get(key).is_some_and(|known| known.machines == alert.machines);
    let changed: Vec<(&String, &Alert)> =
        found.iter().filter(|(key, alert)| !same(key, alert) || !has_same_machines(key, alert)).collect();
    let ended: Vec<String> = before.alerts.keys().filter(|key| !found.contains_key(*key)).cloned().collect();
    if changed.is_empty() && ended.is_empty() {
        return Ok(());
    }
    core.store.change(|state| {
        for (key, alert) in &changed {
            let since = state.alerts.get(*key).map_or(alert.since, |known| known.since);
            state.alerts.insert((*key).clone(), Alert { since, ..(*alert).clone() });
        }
        for key in &ended {
            state.alerts.remove(key);
        }
        Ok(())
    })?;
    for (key, alert) in changed.iter().filter(|(key, alert)| !same(key, alert)) {
        let since = before.alerts.get(*key).map_or(alert.since, |known| known.since);
        let Alert { severity, machine, message, help, .. } = (*alert).clone();
        let news = News { severity, kind: "alert_raised", machine, message, help };
        core.history.note_alert(noted(key, alert, since, AlertState::Raised), news);
    }
    for key in ended {
        let Some(alert) = before.alerts.get(&key) else { continue };
        let message = format!("no more: {}", alert.message);
        let (machine, help) = (alert.machine.clone(), String::new());
        let news = News { severity: Severity::Info, kind: "alert_cleared", machine, message, help };
        core.history.note_alert(noted(&key, alert, alert.since, AlertState::Cleared), news);
    }
    Ok(())
}

/// What names an alert to whoever is told of it.
fn noted(key: &str, alert: &Alert, since: Timestamp, state: AlertState) -> AlertNote {
    let (kind, severity) = (alert.kind.clone(), severity_name(alert.severity).to_owned());
    AlertNote { id: key.to_owned(), kind, state, severity, since }
}

#[cfg(test)]
mod tests {
    use tidemark_base::HostId;

    use super::*;
    use crate::model::Host;

    fn with_hosts(names: &[&str]) -> State {
        let mut state = State::default();
        for (number, name) in (1u8..).zip(names) {
            let host = Host { name: (*name).to_owned(), last_seen: Timestamp(5) };
            state.hosts.insert(HostId::from_bytes([number; 16]), host);
        }
        state
    }

    fn revoke(state: &mut State, number: u8) {
        let standing = Standing::Revoked { reason: String::new(), since: Timestamp(6) };
        let record = IdentityRecord {
            name: String::new(),
            registered: Timestamp(1),
            certificates: Vec::new(),
            standing,
            deleted: false,
        };
        state.identities.insert(PeerIdentity::Agent(HostId::from_bytes([number; 16])).to_string(), record);
    }

    #[test]
    fn hosts_that_share_a_name_are_told_but_for_those_that_were_revoked() {
        let mut state = with_hosts(&["web", "db", "web"]);
        let shared = shared_names(&state);
        assert_eq!(shared.keys().collect::<Vec<_>>(), [&"web"]);
        assert_eq!(shared["web"].len(), 2);
        revoke(&mut state, 3);
        assert!(shared_names(&state).is_empty(), "one was revoked");
    }

    #[test]
    fn whoever_is_silent_is_told_also_without_machines() {
        let mut state = with_hosts(&["web", "db", "old"]);
        revoke(&mut state, 3);
        let now = Timestamp(5 + 2 * IDLE_SILENCE.as_nanos() as u64);
        let presence = |peer| match peer {
            PeerId::Agent(id) if id == HostId::from_bytes([2; 16]) => {
                Presence::Connected { name: "db".to_owned(), since: Timestamp(5) }
            }
            _ => Presence::NeverSeen,
        };
        let found = idle_and_silent(&state, now, presence);
        let messages: Vec<&str> = found.iter().map(|(_, alert)| &*alert.message).collect();
        assert!(messages.len() == 1 && messages[0].contains("agent web"), "{messages:?}");
        assert!(idle_and_silent(&state, Timestamp(6), presence).is_empty(), "it may be back in a moment");
    }
}
