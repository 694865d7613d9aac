//! Telling process servers that do not find us where we are: after a restore at another address they dial the old one.
//!
//! *Consistency.* The process server compares incarnations: one that knows of a higher one refuses us, and we say so.
//! *Retries.* Every few seconds while a process server is not connected, for ever. *Cancellation.* At the server's stop.
//! *Crash.* Nothing is kept here.

use std::sync::Arc;
use std::time::Duration;

use tidemark_base::ServerId;
use tidemark_proto::control::wire::directory_client::DirectoryClient;
use tidemark_proto::control::{Severity, wire};
use tidemark_transport::{Identity, PeerIdentity};
use tonic::Code;

use crate::core::Core;
use crate::history::News;
use crate::hub::PeerId;

const EVERY: Duration = Duration::from_secs(2);
/// Dialled at once.
const DIALS_MAX: usize = 16;

pub async fn run(core: Arc<Core>, identity: Identity) {
    let mut is_told = false;
    while tokio::time::timeout(EVERY, core.stop.cancelled()).await.is_err() {
        let servers = core.store.state().servers.clone();
        let away: Vec<(ServerId, String)> = servers
            .into_iter()
            .filter(|(id, _)| !core.hub.is_connected(PeerId::ProcessServer(*id)))
            .map(|(id, server)| (id, server.address))
            .collect();
        for some in away.chunks(DIALS_MAX) {
            let telling = some.iter().map(|(id, address)| tell(&core, &identity, *id, address));
            let told = tokio::select! {
                told = futures_util::future::join_all(telling) => told,
                () = core.stop.cancelled() => return,
            };
            for refusal in told.into_iter().flatten() {
                tracing::error!(refusal, "this configuration server was superseded");
                if !is_told {
                    is_told = true;
                    core.history.note(News {
                        severity: Severity::Critical,
                        kind: "superseded",
                        machine: None,
                        message: format!(
                            "a process server takes another configuration server for the right one: {refusal}"
                        ),
                        help: "stop this one if the other was restored from its backup".to_owned(),
                    });
                }
            }
        }
    }
}

/// What a process server has against us, if it answers and has something.
async fn tell(core: &Core, identity: &Identity, id: ServerId, address: &str) -> Option<String> {
    let channel = match tidemark_transport::connect(address, PeerIdentity::ProcessServer(id), identity).await {
        Ok(channel) => channel,
        Err(error) => {
            tracing::debug!(server = %id, %error, "a process server is not there to be told");
            return None;
        }
    };
    let told = DirectoryClient::new(channel).announce(wire::Whereabouts::from(core.hub.whereabouts())).await;
    match told {
        Ok(_) => {
            tracing::info!(server = %id, address, "a process server was told where we are");
            None
        }
        Err(status) if status.code() == Code::FailedPrecondition => Some(status.message().to_owned()),
        Err(status) => {
            tracing::debug!(server = %id, reason = status.message(), "a process server was not told where we are");
            None
        }
    }
}
