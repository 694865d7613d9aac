//! Tells process servers and agents whom to refuse, and ends the streams of those.
//!
//! *Consistency.* The whole list each time. *Retries.* Whoever connects is told ([`crate::reconcile`]). *Cancellation.* At the
//! server's stop. *Crash.* Process servers and agents keep what they were told last.

use std::sync::Arc;

use tidemark_proto::control::{AgentCommand, DenyList, Failure, ServerCommand};

use crate::core::{Core, QUICK};
use crate::hub::PeerId;

pub async fn push(core: Arc<Core>) {
    let mut changes = core.registrar.denials();
    loop {
        tokio::select! {
            () = core.stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
        let list = core.registrar.deny_list();
        for (peer, _) in core.hub.connected() {
            if is_denied(&list, peer) {
                core.hub.cut(peer);
                continue;
            }
            if let Err(failure) = tell(&core, peer, &list).await {
                tracing::warn!(%peer, %failure, "it does not know yet whom to refuse; it is told on connecting");
            }
        }
    }
}

fn is_denied(list: &DenyList, peer: PeerId) -> bool {
    let uri = match peer {
        PeerId::Agent(id) => format!("tidemark://agent/{id}"),
        PeerId::ProcessServer(id) => format!("tidemark://process-server/{id}"),
    };
    list.identities.contains(&uri)
}

pub async fn tell(core: &Core, peer: PeerId, list: &DenyList) -> Result<(), Failure> {
    match peer {
        PeerId::Agent(id) => core.agent_does(id, &AgentCommand::Deny(list.clone()), QUICK).await,
        PeerId::ProcessServer(id) => core.server_does(id, &ServerCommand::Deny(list.clone()), QUICK).await,
    }
}
