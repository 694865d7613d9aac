//! Makes what is, what is wanted: whenever an agent or a process server connects it is told everything that concerns it.
//!
//! *Consistency.* One machine at a time, under its lock, from the state as it is then. *Retries.* With growing pauses while
//! the peer stays connected. *Cancellation.* At the server's stop, between machines. *Crash.* Connecting again begins again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::Clock;
use tidemark_proto::control::{Failure, FailureKind, Peer, Register, Severity};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::denials;
use crate::history::News;
use crate::hub::{Event, PeerId, Presence, kind};
use crate::machines::{settle_agent, settle_server, settle_unprotected};
use crate::model::{Host, Machine, Server, Wanted};

const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

pub async fn run(core: Arc<Core>, mut events: mpsc::Receiver<Event>) {
    let mut settling: HashMap<PeerId, CancellationToken> = HashMap::new();
    loop {
        let event = tokio::select! {
            () = core.stop.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            None => return,
            Some(Event::Connected(register)) => {
                let peer = PeerId::from(&register.peer);
                core.history.note(News {
                    severity: Severity::Info,
                    kind: "connected",
                    machine: None,
                    message: format!("{} {} connected", kind(peer), register.name),
                    help: String::new(),
                });
                let moved = match note(&core, &register) {
                    Ok(moved) => moved,
                    Err(failure) => {
                        tracing::error!(%peer, %failure, "cannot note who connected");
                        false
                    }
                };
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

/// Keeps who it is; says whether a process server is at another address than before.
fn note(core: &Core, register: &Register) -> Result<bool, Failure> {
    let last_seen = core.clock.wall_now();
    core.store.change(|state| match &register.peer {
        Peer::Agent { id } => {
            state.hosts.insert(*id, Host { name: register.name.clone(), last_seen });
            Ok(false)
        }
        Peer::ProcessServer { id, address } => {
            let server = Server { name: register.name.clone(), address: address.clone(), last_seen };
            let before = state.servers.insert(*id, server);
            Ok(before.is_some_and(|before| before.address != *address))
        }
    })
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

async fn settle(core: Arc<Core>, peer: PeerId, moved: bool, stop: CancellationToken) {
    let mut pause = PAUSE_MIN;
    loop {
        let pass = async {
            let mut all_settled = true;
            // Whom to refuse comes first.
            if let Err(failure) = denials::tell(&core, peer, &core.registrar.deny_list()).await {
                tracing::info!(%peer, %failure, "it does not know yet whom to refuse");
                all_settled = false;
            }
            let names: Vec<String> = core.store.state().machines.keys().cloned().collect();
            for name in names {
                if let Err(failure) = settle_machine(&core, peer, moved, &name).await {
                    tracing::info!(%peer, machine = name, %failure, "what is wanted cannot be done yet");
                    all_settled = false;
                }
            }
            all_settled
        };
        tokio::select! {
            () = stop.cancelled() => return,
            all_settled = pass => {
                // The first pass told everything, whether or not all of it could be done.
                core.settled_peers.send_modify(|settled| {
                    settled.insert(peer);
                });
                if all_settled { return }
            }
        }
        if tokio::time::timeout(pause, stop.cancelled()).await.is_ok() {
            return;
        }
        pause = (pause * 2).min(PAUSE_MAX);
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
        PeerId::Agent(_) => settle_agent(core, &machine).await.map(drop),
        PeerId::ProcessServer(_) => {
            settle_server(core, &machine).await?;
            if moved {
                // Its agent must dial the new address; when it is away it is told on coming back.
                if let Err(failure) = settle_agent(core, &machine).await {
                    tracing::info!(machine = name, %failure, "the agent does not know the new address yet");
                }
            }
            Ok(())
        }
    }
}

fn concerns(peer: PeerId, machine: &Machine) -> bool {
    match peer {
        PeerId::Agent(id) => machine.host == id,
        PeerId::ProcessServer(id) => machine.server == id,
    }
}
