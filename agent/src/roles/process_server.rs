//! The process server as a process runs it.

use std::net::SocketAddr;
use std::sync::Arc;

use tidemark_process_server::{ProcessServer, ProcessServerConfig};
use tidemark_proto::control::{Failure, Peer, Register, Reply};
use tidemark_transport::PeerIdentity;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::link::{self, Command, Handler, not_mine};
use super::place::Place;
use super::{RoleError, boot_id, host_name};

pub struct RunningProcessServer {
    server: ProcessServer,
    stop: CancellationToken,
    link: JoinHandle<()>,
    _place: Place,
}

pub async fn start(place: Place) -> Result<RunningProcessServer, RoleError> {
    let server = match open(&place, place.listen).await {
        // Someone else took the port meanwhile: agents are told the new one.
        Err(_) if place.may_move() => open(&place, SocketAddr::new(place.listen.ip(), 0)).await?,
        other => other?,
    };
    place.note_process_server(server.address())?;
    let stop = CancellationToken::new();
    let handler = Arc::new(ServerHandler { server: server.clone(), peer: peer(&place, server.address())? });
    let link = tokio::spawn(link::run(place.identity.clone(), place.config_server.clone(), handler, stop.clone()));
    Ok(RunningProcessServer { server, stop, link, _place: place })
}

async fn open(place: &Place, listen: SocketAddr) -> Result<ProcessServer, Failure> {
    let mut config = ProcessServerConfig::new(&place.state, listen, place.identity.clone());
    config.socket = place.run.join("points.sock");
    ProcessServer::start(config).await
}

/// Where agents reach it: an address that is everywhere is told by the host's name.
fn peer(place: &Place, address: SocketAddr) -> Result<Peer, RoleError> {
    let PeerIdentity::ProcessServer(id) = place.identity.peer() else {
        return Err(RoleError {
            message: format!("{} is no process server", place.identity.peer()),
            help: "give each role an identity of its own".to_owned(),
        });
    };
    let address = match address.ip().is_unspecified() {
        true => format!("{}:{}", host_name(), address.port()),
        false => address.to_string(),
    };
    Ok(Peer::ProcessServer { id, address })
}

impl RunningProcessServer {
    pub async fn stop(self) {
        self.stop.cancel();
        self.server.stop().await;
        let _ = self.link.await;
    }
}

struct ServerHandler {
    server: ProcessServer,
    peer: Peer,
}

#[tonic::async_trait]
impl Handler for ServerHandler {
    fn register(&self) -> Register {
        Register {
            peer: self.peer.clone(),
            name: host_name(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            boot: boot_id(),
        }
    }

    async fn execute(&self, command: Command) -> Result<Reply, Failure> {
        match command {
            Command::Server(command) => self.server.execute(command).await,
            Command::Agent(_) => Err(not_mine()),
        }
    }
}
