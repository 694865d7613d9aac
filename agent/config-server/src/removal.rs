//! Hosts and process servers that are gone for good leave the inventory, and their identity is refused from then on.
//!
//! *Consistency.* One change of the state; who is refused is told after it. *Retries.* None: asking again finds nothing. *Cancellation.* None.
//! *Crash.* As [`crate::store`]. What a machine whose protection was ended waited for at the other end is not waited for any more.

use std::collections::BTreeSet;

use tidemark_base::{Clock, HostId, ServerId};
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_transport::PeerIdentity;

use crate::core::Core;
use crate::failover::elsewhere::original;
use crate::hub::PeerId;
use crate::identity::forget;
use crate::machines::settle_unprotected;
use crate::model::{Machine, State, Wanted};

const NAMED_MAX: usize = 10;

fn conflict(message: String, help: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Conflict, message, help)
}

fn listed(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let named = names.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

fn is_ending(machine: &Machine) -> bool {
    matches!(machine.wanted, Wanted::Unprotected { .. })
}

/// Nobody who is there is forgotten by mistake.
fn refuse_connected(core: &Core, peer: PeerId, what: &str, name: &str) -> Result<(), Failure> {
    match core.hub.is_connected(peer) {
        false => Ok(()),
        true => Err(conflict(
            format!("{what} {name} is connected: it is not gone"),
            format!("stop its service there, or refuse it first: `tidemark identity revoke {name}`"),
        )),
    }
}

/// Also of machines whose protection was ended and that only wait for the host to hear of it.
pub async fn host(core: &Core, id: HostId, name: &str) -> Result<(), Failure> {
    refuse_connected(core, PeerId::Agent(id), "host", name)?;
    let now = core.clock.wall_now();
    let ending = core.store.change(|state| {
        let is_of = |machine: &Machine| machine.host == id || original(machine).is_some_and(|from| from.host == id);
        let held = names_of(state, |machine| is_of(machine) && !is_ending(machine));
        if !held.is_empty() {
            return Err(conflict(
                format!("host {name} has machines: {}", listed(&held)),
                "end their protection first (`tidemark unprotect NAME`, also while the host is away), or bring them home elsewhere \
                 (`tidemark reprotect NAME --to HOST`)",
            ));
        }
        let ending = names_of(state, is_of);
        for machine in state.machines.values_mut() {
            machine.left.retain(|left| *left != id);
            if let Wanted::Unprotected { agent_done, .. } = &mut machine.wanted
                && machine.host == id
            {
                *agent_done = true;
            }
        }
        state.hosts.remove(&id);
        forget(state, PeerIdentity::Agent(id), name, now);
        Ok(ending)
    })?;
    if let Err(error) = core.store.inventories().forget(id) {
        tracing::warn!(host = name, %error, "what disks it had cannot be forgotten");
    }
    finish(core, ending).await;
    Ok(())
}

/// `force`: with the replicas that only it keeps of machines that nobody protects any more.
pub async fn server(core: &Core, id: ServerId, name: &str, force: bool) -> Result<(), Failure> {
    refuse_connected(core, PeerId::ProcessServer(id), "process server", name)?;
    let now = core.clock.wall_now();
    let ending = core.store.change(|state| {
        let is_of = |machine: &Machine| machine.servers().any(|server| server == id);
        let held = names_of(state, |machine| is_of(machine) && !is_ending(machine));
        if !held.is_empty() {
            return Err(conflict(
                format!("machines are replicated to process server {name}: {}", listed(&held)),
                "let them feed another one and then no longer this one (`tidemark machine process-server`), or end their protection \
                 (`tidemark unprotect NAME`)",
            ));
        }
        let kept: Vec<String> =
            state.kept.values().filter(|kept| is_of(&kept.machine)).map(|kept| kept.machine.name.clone()).collect();
        if !kept.is_empty() && !force {
            return Err(conflict(
                format!("process server {name} keeps the replicas of {}", listed(&kept)),
                "delete them first (`tidemark replica delete ID`), or give them up with it: --force",
            ));
        }
        state.kept.retain(|_, kept| drop_server(&mut kept.machine, id));
        let ending = names_of(state, is_of);
        for machine in state.machines.values_mut() {
            machine.leaving.retain(|leaving| leaving.server != id);
            if !drop_server(machine, id)
                && let Wanted::Unprotected { delete_replica, server_done, .. } = &mut machine.wanted
            {
                // Nothing is kept where nobody is.
                (*delete_replica, *server_done) = (true, true);
            }
        }
        state.servers.remove(&id);
        forget(state, PeerIdentity::ProcessServer(id), name, now);
        Ok(ending)
    })?;
    finish(core, ending).await;
    Ok(())
}

fn names_of(state: &State, is: impl Fn(&Machine) -> bool) -> Vec<String> {
    let names: BTreeSet<String> =
        state.machines.values().filter(|machine| is(machine)).map(|machine| machine.name.clone()).collect();
    names.into_iter().collect()
}

/// `false`: it had no other.
fn drop_server(machine: &mut Machine, id: ServerId) -> bool {
    machine.others.retain(|other| *other != id);
    if machine.server != id {
        return true;
    }
    if machine.others.is_empty() {
        return false;
    }
    machine.server = machine.others.remove(0);
    true
}

/// Those that waited for the one that is gone may be done now.
async fn finish(core: &Core, names: Vec<String>) {
    core.registrar.tell_denials();
    for name in names {
        let _lock = core.lock(&name).await;
        if let Err(failure) = settle_unprotected(core, None, &name).await {
            tracing::info!(machine = name, %failure, "not everyone has let go of it yet");
        }
    }
}
