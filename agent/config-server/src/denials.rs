//! Tells process servers and agents whom to refuse, and ends the streams of those.
//!
//! *Consistency.* The whole list each time. *Retries.* Whoever connects is told ([`crate::reconcile`]). *Cancellation.* At the
//! server's stop. *Crash.* Process servers and agents keep what they were told last.

use std::sync::Arc;

use futures_util::future::join_all;
use tidemark_proto::control::{AgentCommand, DenyList, Failure, ServerCommand};

use crate::core::{Core, QUICK};
use crate::hub::PeerId;

pub async fn push(core: Arc<Core>) {
    let mut changes = core.registrar.denials();
    // Those who connect are told, so that there is nothing to tell at first.
    let mut is_told = true;
    loop {
        let telling = async {
            match is_told {
                true => std::future::pending().await,
                false => tell_all(&core).await,
            }
        };
        tokio::select! {
            () = core.stop.cancelled() => return,
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                // At once, however long others take to be told.
                core.hub.cut_denied();
                is_told = false;
            }
            () = telling => is_told = true,
        }
    }
}

async fn tell_all(core: &Core) {
    let list = &core.registrar.deny_list();
    join_all(core.hub.connected().into_iter().map(|(peer, _)| async move {
        if let Err(failure) = tell(core, peer, list).await {
            tracing::warn!(%peer, %failure, "it does not know yet whom to refuse; it is told on connecting");
        }
    }))
    .await;
}

pub async fn tell(core: &Core, peer: PeerId, list: &DenyList) -> Result<(), Failure> {
    match peer {
        PeerId::Agent(id) => core.agent_does(id, &AgentCommand::Deny(list.clone()), QUICK).await,
        PeerId::ProcessServer(id) => core.server_does(id, &ServerCommand::Deny(list.clone()), QUICK).await,
    }
}
