//! Figures for Prometheus, as they were reported last.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::core::Core;
use crate::hub::PeerId;
use crate::status::{self, Health};

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type Counters = Family<Labels, Counter>;

pub fn text(core: &Core) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("tidemark");
    let gauges = |registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>| {
        let family = Gauges::default();
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
            None => registry.register(name, help, family.clone()),
        }
        family
    };
    let rpo = gauges(&mut registry, "rpo", "Age of the oldest write that is not durable", Some(Unit::Seconds));
    let pending = gauges(&mut registry, "pending", "Written and not durable yet", Some(Unit::Bytes));
    let log = gauges(&mut registry, "log", "What the logs of a machine take", Some(Unit::Bytes));
    let stored = gauges(&mut registry, "stored", "What the replica of a machine takes", Some(Unit::Bytes));
    let points = gauges(&mut registry, "recovery_points", "Listed recovery points", None);
    let health = gauges(&mut registry, "health", "0 ok, 1 warning, 2 critical", None);
    let mode = gauges(&mut registry, "mode", "1 for the mode of a machine", None);
    let state = gauges(&mut registry, "state", "1 for the state of a machine", None);
    let connected = gauges(&mut registry, "connected", "1 while a host or process server is connected", None);
    let alerts = gauges(&mut registry, "alerts", "Alerts that last, by severity", None);
    let running = gauges(&mut registry, "jobs_running", "Jobs that run", None);
    let machine_alerts =
        gauges(&mut registry, "machine_alerts", "Alerts of a machine that last, by rule and severity", None);
    let (written, sent) = (Counters::default(), Counters::default());
    registry.register_with_unit(
        "written",
        "Written by a machine since its agent started",
        Unit::Bytes,
        written.clone(),
    );
    registry.register_with_unit("sent", "Sent for a machine since its agent started", Unit::Bytes, sent.clone());

    for machine in status::all_reported(core) {
        let labels = vec![("machine", machine.name.clone())];
        if let Some(seconds) = machine.rpo_seconds {
            rpo.get_or_create(&labels).set(seconds);
        }
        // What nobody told is not said: a counter that falls to zero would be a reset.
        let told = [
            (&pending, machine.pending_bytes),
            (&log, machine.log_bytes),
            (&stored, machine.stored_bytes),
            (&points, machine.points),
        ];
        for (gauge, value) in told {
            if let Some(value) = value {
                gauge.get_or_create(&labels).set(value as f64);
            }
        }
        let level = match machine.health {
            Health::Ok => 0.0,
            Health::Warning => 1.0,
            Health::Critical => 2.0,
        };
        health.get_or_create(&labels).set(level);
        let with = |label: &'static str, value: String| {
            let mut labels = labels.clone();
            labels.push((label, value));
            labels
        };
        if let Some(of) = machine.mode {
            mode.get_or_create(&with("mode", name(&of))).set(1.0);
        }
        state.get_or_create(&with("state", name(&machine.state))).set(1.0);
        for (counter, value) in [(&written, machine.written_bytes), (&sent, machine.sent_bytes)] {
            if let Some(value) = value {
                counter.get_or_create(&labels).inc_by(value);
            }
        }
    }
    let counted = [
        ("errors", "Events that are warnings or worse, since the start", core.history.errors()),
        ("control_streams_refused", "Control streams that were not taken, since the start", core.hub.refused()),
    ];
    for (name, help, tally) in counted {
        let family = Counters::default();
        registry.register(name, help, family.clone());
        for (labels, count) in tally.all() {
            family.get_or_create(&labels).inc_by(count);
        }
    }
    let store = core.store.state();
    let present: Vec<PeerId> = core.hub.connected().into_iter().map(|(peer, _)| peer).collect();
    let is_connected = |peer: PeerId| if present.contains(&peer) { 1.0 } else { 0.0 };
    for (id, host) in &store.hosts {
        let labels = vec![("role", "agent".to_owned()), ("name", host.name.clone()), ("id", id.to_string())];
        connected.get_or_create(&labels).set(is_connected(PeerId::Agent(*id)));
    }
    for (id, server) in &store.servers {
        let labels = vec![("role", "process-server".to_owned()), ("name", server.name.clone()), ("id", id.to_string())];
        connected.get_or_create(&labels).set(is_connected(PeerId::ProcessServer(*id)));
    }
    for alert in store.alerts.values() {
        let severity = crate::history::severity_name(alert.severity);
        for machine in &alert.machines {
            let labels =
                vec![("machine", machine.clone()), ("kind", alert.kind.clone()), ("severity", severity.to_owned())];
            machine_alerts.get_or_create(&labels).inc();
        }
    }
    for severity in ["warning", "critical"] {
        let count = store.alerts.values().filter(|alert| crate::history::severity_name(alert.severity) == severity);
        alerts.get_or_create(&vec![("severity", severity.to_owned())]).set(count.count() as f64);
    }
    let count = core.jobs.list().iter().filter(|job| job.state == crate::jobs::JobState::Running).count();
    running.get_or_create(&Vec::new()).set(count as f64);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

/// A state or a mode as in JSON.
fn name(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
