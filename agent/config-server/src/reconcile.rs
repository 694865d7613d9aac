//! Makes what is, what is wanted: whenever an agent or a process server connects it is told everything that concerns it.
//!
//! *Consistency.* One machine at a time, under its lock, from the state as it is then. *Retries.* Each item by itself, as
//! [`crate::retry`] says, while the peer stays connected; one that connects again begins anew. *Cancellation.* At the server's stop, between machines. *Crash.* Connecting again begins again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::Clock;
use tidemark_proto::control::{Failure, FailureKind, Severity};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::consumers;
use crate::core::{Core, Side};
use crate::denials;
use crate::failover::elsewhere::{leave_one, original, settle_original};
use crate::failover::taken;
use crate::history::News;
use crate::hub::{Event, PeerId, Presence, kind};
use crate::machines::{settle_agent, settle_server, settle_unprotected};
use crate::model::{Machine, Wanted};
use crate::retry::Retries;

/// How often it is looked whether something that failed was changed, and is to be tried at once.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The same, where nothing failed.
const LOOK_RARELY: Duration = Duration::from_secs(3_600);

pub async fn run(core: Arc<Core>, mut events: mpsc::Receiver<Event>) {
    let mut settling: HashMap<PeerId, CancellationToken> = HashMap::new();
    loop {
        let event = tokio::select! {
            () = core.stop.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            None => return,
            Some(Event::Connected(register, moved)) => {
                let peer = PeerId::from(&register.peer);
                core.history.note(News {
                    severity: Severity::Info,
                    kind: "connected",
                    machine: None,
                    message: format!("{} {} connected", kind(peer), register.name),
                    help: String::new(),
                });
                let token = core.stop.child_token();
                if let Some(before) = settling.insert(peer, token.clone()) {
                    before.cancel();
                }
                tokio::spawn(settle(core.clone(), peer, moved, token));
            }
            Some(Event::Disconnected(peer)) => {
                if let Presence::Gone { name, .. } = core.hub.presence(peer) {
                    core.history.note(News {
                        severity: Severity::Warning,
                        kind: "disconnected",
                        machine: None,
                        message: format!("{} {name} disconnected", kind(peer)),
                        help: "replication goes on without this connection".to_owned(),
                    });
                }
                if let Some(token) = settling.remove(&peer) {
                    token.cancel();
                }
                core.settled_peers.send_modify(|settled| {
                    settled.remove(&peer);
                });
                let _ = note_gone(&core, peer);
            }
        }
    }
}

fn note_gone(core: &Core, peer: PeerId) -> Result<(), Failure> {
    let now = core.clock.wall_now();
    core.store.change(|state| {
        match peer {
            PeerId::Agent(id) => {
                if let Some(host) = state.hosts.get_mut(&id) {
                    host.last_seen = now;
                }
            }
            PeerId::ProcessServer(id) => {
                if let Some(server) = state.servers.get_mut(&id) {
                    server.last_seen = now;
                }
            }
        }
        Ok(())
    })
}

/// What one peer is told.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Item {
    /// Whom to refuse: comes first.
    DenyList,
    Machine(String),
}

async fn settle(core: Arc<Core>, peer: PeerId, moved: bool, stop: CancellationToken) {
    let mut retries: Retries<Item> = Retries::default();
    let mut failed = core.failed.subscribe();
    let mut is_first = true;
    loop {
        let pass = async {
            let state = core.store.state();
            let revision = |name: &str| state.revisions.get(&("machines", name.to_owned())).copied().unwrap_or(0);
            let machines = state.machines.keys().map(|name| (Item::Machine(name.clone()), revision(name)));
            let items: Vec<(Item, u64)> = [(Item::DenyList, 0)].into_iter().chain(machines).collect();
            retries.retain(|item| items.iter().any(|(known, _)| known == item));
            for (item, revision) in items {
                // Once everything; after that what failed.
                let is_to_do = is_first
                    || (retries.is_failing(&item) && retries.is_due(&item, revision, core.clock.monotonic_now()));
                if !is_to_do {
                    continue;
                }
                let outcome = match &item {
                    Item::DenyList => denials::tell(&core, peer, &core.registrar.deny_list()).await,
                    Item::Machine(name) => settle_machine(&core, peer, moved, name).await,
                };
                match outcome {
                    Ok(()) => retries.succeeded(&item),
                    Err(failure) => {
                        let pause = retries.failed(item.clone(), revision, core.clock.monotonic_now());
                        let again_in = pause.as_secs();
                        tracing::info!(%peer, ?item, %failure, again_in, "what is wanted cannot be done yet");
                    }
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = pass => {}
        }
        // The first pass told everything, whether or not all of it could be done.
        core.settled_peers.send_modify(|settled| {
            settled.insert(peer);
        });
        is_first = false;
        let until_due = |due: Duration| due.saturating_sub(core.clock.monotonic_now()).min(LOOK_EVERY);
        let pause = retries.next_due().map(until_due);
        let waiting = async {
            tokio::select! {
                () = stop.cancelled() => true,
                // What a job could not do is tried again as well.
                changed = failed.changed() => changed.is_err(),
            }
        };
        if matches!(tokio::time::timeout(pause.unwrap_or(LOOK_RARELY), waiting).await, Ok(true)) {
            return;
        }
        note_failed(&core, peer, &mut retries);
    }
}

/// Machines of which this side could not do what is wanted, whoever asked.
fn note_failed(core: &Core, peer: PeerId, retries: &mut Retries<Item>) {
    let state = core.store.state();
    let side = match peer {
        PeerId::Agent(_) => Side::Agent,
        PeerId::ProcessServer(_) => Side::Server,
    };
    for machine in state.machines.values().filter(|machine| concerns(peer, machine)) {
        let item = Item::Machine(machine.name.clone());
        if core.is_unsettled(machine.id, side) && !retries.is_failing(&item) {
            let revision = state.revisions.get(&("machines", machine.name.clone())).copied().unwrap_or(0);
            retries.failed(item, revision, core.clock.monotonic_now());
        }
    }
}

async fn settle_machine(core: &Core, peer: PeerId, moved: bool, name: &str) -> Result<(), Failure> {
    let _lock = core.lock(name).await;
    let machine = match core.machine(name) {
        Ok(machine) if concerns(peer, &machine) => machine,
        _ => return Ok(()),
    };
    if let Wanted::Unprotected { agent_done, server_done, .. } = machine.wanted {
        let done = match peer {
            PeerId::Agent(_) => agent_done,
            PeerId::ProcessServer(_) => server_done,
        };
        // The other side being away is its own affair: it is told when it comes back.
        return match settle_unprotected(core, None, name).await {
            Err(failure) if done || failure.kind == FailureKind::Unavailable => {
                tracing::debug!(machine = name, %failure, "not everyone has let go of it yet");
                Ok(())
            }
            other => other,
        };
    }
    match peer {
        PeerId::Agent(id) if machine.host != id && machine.left.contains(&id) => leave_one(core, &machine, id).await,
        PeerId::Agent(id) if machine.host != id => settle_original(core, &machine).await,
        PeerId::Agent(_) => settle_agent(core, &machine).await.map(drop),
        PeerId::ProcessServer(_) => {
            consumers::settle_leaving(core, &machine).await?;
            settle_server(core, &machine).await?;
            taken::settle(core, &machine).await?;
            // Its agent must dial the new address. One of several may have missed a new generation, and refused the agent for it, while
            // the others took it: the agent tries again. When it is away it is told on coming back.
            if (moved || !machine.others.is_empty())
                && let Err(failure) = settle_agent(core, &machine).await
            {
                tracing::info!(machine = name, %failure, "the agent does not know yet that a process server is back");
            }
            Ok(())
        }
    }
}

fn concerns(peer: PeerId, machine: &Machine) -> bool {
    match peer {
        PeerId::Agent(id) => {
            let is_original = original(machine).is_some_and(|from| from.host == id);
            machine.host == id || is_original || machine.left.contains(&id)
        }
        PeerId::ProcessServer(id) => {
            machine.servers().chain(machine.leaving.iter().map(|leaving| leaving.server)).any(|server| server == id)
        }
    }
}
