//! Where the configuration server is, for agents that do not find it: see `Directory` in `control.proto`.
//!
//! *Consistency.* What is kept is the embedder's matter ([`Directory`]). *Retries.* The callers'. *Cancellation*, *Crash*:
//! nothing is kept here.

use std::sync::Arc;

use tidemark_proto::control::wire::directory_server::{Directory as DirectoryRpc, DirectoryServer};
use tidemark_proto::control::{Whereabouts, wire};
use tidemark_transport::{PeerIdentity, peer_of};
use tonic::{Request, Response, Status};

/// What a process server knows of its configuration server. May block.
pub trait Directory: Send + Sync + 'static {
    fn locate(&self) -> Option<Whereabouts>;
    /// `Err`: another one is known to be the right one.
    fn announce(&self, whereabouts: Whereabouts) -> Result<(), String>;
}

/// Knows nothing, and takes nothing.
pub struct NoDirectory;

impl Directory for NoDirectory {
    fn locate(&self) -> Option<Whereabouts> {
        None
    }

    fn announce(&self, _: Whereabouts) -> Result<(), String> {
        Ok(())
    }
}

#[derive(Clone)]
pub struct DirectoryService(Arc<dyn Directory>);

pub fn directory_server(directory: Arc<dyn Directory>) -> DirectoryServer<DirectoryService> {
    DirectoryServer::new(DirectoryService(directory))
}

#[tonic::async_trait]
impl DirectoryRpc for DirectoryService {
    async fn announce(&self, request: Request<wire::Whereabouts>) -> Result<Response<wire::Empty>, Status> {
        let Some(PeerIdentity::ConfigServer(id)) = peer_of(&request) else {
            return Err(Status::permission_denied("only a configuration server says where it is"));
        };
        let whereabouts =
            Whereabouts::try_from(request.into_inner()).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if whereabouts.server != id {
            return Err(Status::permission_denied("a configuration server speaks for itself alone"));
        }
        let directory = self.0.clone();
        tokio::task::spawn_blocking(move || directory.announce(whereabouts))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(Status::failed_precondition)?;
        Ok(Response::new(wire::Empty {}))
    }

    async fn locate(&self, request: Request<wire::Empty>) -> Result<Response<wire::Whereabouts>, Status> {
        if peer_of(&request).is_none() {
            return Err(Status::unauthenticated("the connection shows no certificate"));
        }
        let directory = self.0.clone();
        let known = tokio::task::spawn_blocking(move || directory.locate()).await;
        let known = known.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(known.as_ref().map(wire::Whereabouts::from).unwrap_or_default()))
    }
}
