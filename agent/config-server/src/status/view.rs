//! A machine as it is at one of its process servers, and which of them it is judged by.

use std::time::Duration;

use tidemark_base::{ServerId, Timestamp};
use tidemark_proto::control::{
    AgentReport, ReplicaDisk, ReplicaMachine, ServerReport, SourceDisk, SourceMode, SourceState,
};

use super::{
    Health, PeerStatus, ProcessServerStatus, Progress, Reason, peer_status, progress, replica, rpo, source, state_of,
};
use crate::core::Core;
use crate::hub::PeerId;
use crate::model::Machine;

/// A machine as it is at one of its process servers.
pub(super) struct View<'a> {
    pub server: ServerId,
    pub peer: PeerStatus,
    pub report: Option<&'a ServerReport>,
    pub sources: Vec<Option<&'a SourceDisk>>,
    pub replicas: Vec<Option<&'a ReplicaDisk>>,
}

impl<'a> View<'a> {
    pub fn of(
        core: &Core,
        machine: &Machine,
        agent: Option<&'a AgentReport>,
        server: &'a (ServerId, Option<ServerReport>),
    ) -> Self {
        let (server, report) = (server.0, server.1.as_ref());
        let name = core.store.state().server_name(server);
        Self {
            server,
            peer: peer_status(core, PeerId::ProcessServer(server), server.to_string(), name),
            report,
            sources: machine.disks.iter().map(|disk| source(agent, server, disk)).collect(),
            replicas: machine.disks.iter().map(|disk| replica(report, disk)).collect(),
        }
    }

    pub fn keeps_up(&self) -> bool {
        let is_live = |disk: &Option<&SourceDisk>| disk.is_some_and(|disk| disk.state == SourceState::Replicating);
        self.sources.iter().all(is_live)
    }

    pub fn rpo(&self) -> Option<Duration> {
        self.sources
            .iter()
            .map(|disk| rpo((*disk)?))
            .collect::<Option<Vec<_>>>()
            .map(|all| all.into_iter().max().unwrap_or_default())
    }

    /// How old the oldest of what its replicas hold is; none while one of them is not consistent.
    pub fn age(&self, now: Timestamp) -> Option<Duration> {
        let ages = self.replicas.iter().map(|replica| {
            let time = replica.filter(|replica| replica.consistent)?.durable_time?;
            Some(now.saturating_since(time))
        });
        ages.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// `None`: the host told nothing of any of its disks.
    pub fn sum(&self, figure: fn(&SourceDisk) -> u64) -> Option<u64> {
        self.sources.iter().flatten().map(|disk| figure(disk)).reduce(u64::saturating_add)
    }

    pub fn mode(&self) -> Option<SourceMode> {
        self.sources.iter().flatten().map(|disk| disk.mode).max_by_key(|mode| *mode as u8)
    }

    pub fn mode_reason(&self) -> Option<String> {
        self.sources.iter().flatten().map(|disk| &disk.mode_reason).find(|reason| !reason.is_empty()).cloned()
    }

    pub fn stored_bytes(&self) -> Option<u64> {
        self.replicas.iter().flatten().map(|disk| disk.stored_bytes).reduce(u64::saturating_add)
    }

    /// `None`: the process server told nothing.
    pub fn points(&self, machine: &Machine) -> Option<u64> {
        self.report?;
        Some(self.replicated(machine).map_or(0, |replicated| replicated.points))
    }

    pub fn replicated(&self, machine: &Machine) -> Option<&'a ReplicaMachine> {
        self.report?.machines.iter().find(|replicated| replicated.machine == machine.id)
    }

    pub fn progress(&self) -> Option<Progress> {
        let scans: Vec<(u64, u64)> = self.sources.iter().flatten().filter_map(|disk| disk.scan).collect();
        let sum = |which: fn(&(u64, u64)) -> u64| scans.iter().map(which).sum();
        (!scans.is_empty()).then(|| progress(sum(|(done, _)| *done), sum(|(_, total)| *total)))
    }

    pub fn status(&self, machine: &Machine, is_agent_connected: bool) -> ProcessServerStatus {
        let replicated = self.replicated(machine);
        ProcessServerStatus {
            peer: self.peer.clone(),
            state: state_of(machine, &self.sources, is_agent_connected),
            mode: self.mode(),
            mode_reason: self.mode_reason(),
            rpo_seconds: self.rpo().map(|rpo| rpo.as_secs_f64()),
            pending_bytes: self.sum(|disk| disk.pending_bytes),
            sent_bytes: self.sum(|disk| disk.sent_bytes),
            stored_bytes: self.stored_bytes(),
            points: self.points(machine),
            last_point: replicated.and_then(|replicated| replicated.latest.clone()),
            progress: self.progress(),
        }
    }

    /// What is wrong here and not at the one that the machine is judged by: no more than a warning, unless somebody must act.
    pub fn reasons(&self, rpo_limit: Duration, best: &View<'_>) -> Vec<Reason> {
        let (name, of) = (&self.peer.name, Some(self.server));
        let mut reasons = Vec::new();
        let mut add = |health, kind, message: String, help: &str, is_absence| {
            reasons.push(Reason { of, ..Reason::new(health, kind, message, help, is_absence) });
        };
        let is = |state| self.sources.iter().flatten().any(|disk| disk.state == state);
        if is(SourceState::Failed) {
            let message = format!("replication to process server {name} failed");
            add(Health::Critical, "failed", message, "see the problems; the others are not affected", false);
        } else if is(SourceState::Connecting) {
            let message = format!("the host has no stream to process server {name}");
            let help = "check that it runs and that the host reaches it; the others are not affected";
            add(Health::Warning, "disconnected", message, help, true);
        }
        // While it is scanned it has no consistent replica, and no RPO to keep.
        let is_scanned = is(SourceState::InitialReplication) || is(SourceState::Resynchronising);
        if let Some(rpo) = self.rpo().filter(|rpo| !is_scanned && *rpo > rpo_limit) {
            let (seconds, limit) = (rpo.as_secs_f64(), rpo_limit.as_secs());
            let message = format!("the RPO at process server {name} is {seconds:.1} s, over the limit of {limit} s");
            add(Health::Warning, "rpo", message, "check the link and its volume; the others are not affected", false);
        }
        if let Some(reason) = self.mode_reason().filter(|reason| best.mode_reason().as_ref() != Some(reason)) {
            let message = format!("process server {name} gets blocks instead of their history: {reason}");
            add(Health::Warning, "stepped_down", message, "bring it back; the others are not affected", false);
        }
        reasons
    }
}

/// The one that others are judged by: where it runs, or the first that keeps up, or else the one that lost least.
pub(super) fn best<'v, 'a>(machine: &Machine, views: &'v [View<'a>]) -> &'v View<'a> {
    let least = || views.iter().min_by_key(|view| view.rpo().unwrap_or(Duration::MAX));
    let keeping_up = views.iter().find(|view| view.keeps_up() || machine.failover.is_some());
    keeping_up.or_else(least).unwrap_or(&views[0])
}
