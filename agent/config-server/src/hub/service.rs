//! The gRPC side of the hub.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tidemark_base::Clock;
use tidemark_proto::control::wire::control_server::{Control, ControlServer};
use tidemark_proto::control::{Failure, Register, Reply, WireError, wire};
use tidemark_transport::PeerIdentity;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Event, Hub, PeerId, Report};

/// A stream that does not say who it is by then is dropped.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
/// Reports of a large process server are the longest messages.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

pub struct ControlService {
    hub: Arc<Hub>,
    name: String,
}

/// The service, for `tidemark_transport::serve`.
pub fn control_server(hub: Arc<Hub>, name: String) -> ControlServer<ControlService> {
    ControlServer::new(ControlService { hub, name }).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

type Down = Pin<Box<dyn Stream<Item = Result<wire::Down, Status>> + Send>>;

#[tonic::async_trait]
impl Control for ControlService {
    type ConnectStream = Down;

    async fn connect(&self, request: Request<Streaming<wire::Up>>) -> Result<Response<Down>, Status> {
        let identity = tidemark_transport::peer_of(&request)
            .ok_or_else(|| Status::unauthenticated("the connection shows no certificate"))?;
        let up = request.into_inner();
        self.hub.clone().attach(&self.name, identity, up).await.map(|down| Response::new(Box::pin(down) as Down))
    }
}

impl Hub {
    /// Takes a stream on, once it said who it is and the certificate agrees.
    pub(super) async fn attach(
        self: Arc<Self>,
        name: &str,
        identity: PeerIdentity,
        mut up: impl Stream<Item = Result<wire::Up, Status>> + Send + Unpin + 'static,
    ) -> Result<impl Stream<Item = Result<wire::Down, Status>> + Send + 'static, Status> {
        let first = tokio::time::timeout(REGISTER_TIMEOUT, up.next())
            .await
            .map_err(|_| Status::deadline_exceeded("the stream did not say who it is"))?
            .ok_or_else(|| Status::cancelled("the stream ended before it began"))??;
        let Some(wire::up::Body::Register(register)) = first.body else {
            return Err(Status::failed_precondition("the first message must be the registration"));
        };
        let register = Register::try_from(register).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let peer = PeerId::from(&register.peer);
        let proven = match identity {
            PeerIdentity::Agent(id) => Some(PeerId::Agent(id)),
            PeerIdentity::ProcessServer(id) => Some(PeerId::ProcessServer(id)),
            PeerIdentity::ConfigServer(_) => None,
        };
        if proven != Some(peer) {
            return Err(Status::permission_denied(format!("the certificate is {identity}, which is not {peer}")));
        }
        let (number, commands) = self.open(&register);
        tracing::info!(%peer, name = register.name, "connected");
        let registered = wire::Registered { name: name.to_owned(), time_ns: self.clock.wall_now().0 };
        let hello = wire::Down { request: 0, body: Some(wire::down::Body::Registered(registered)) };
        // Only the reconciler can be behind, and it must hear of every connect.
        let _ = self.events.send(Event::Connected(register)).await;
        tokio::spawn(self.read(peer, number, up));
        Ok(futures_util::stream::once(std::future::ready(hello)).chain(ReceiverStream::new(commands)).map(Ok))
    }

    async fn read(
        self: Arc<Self>,
        peer: PeerId,
        number: u64,
        mut up: impl Stream<Item = Result<wire::Up, Status>> + Send + Unpin,
    ) {
        while let Some(message) = up.next().await {
            let taken = match message {
                Ok(message) => self.take(peer, number, message).map_err(|error| error.to_string()),
                Err(status) => Err(status.message().to_owned()),
            };
            if let Err(reason) = taken {
                tracing::info!(%peer, reason, "the control stream broke");
                break;
            }
        }
        if self.close(peer, number) {
            tracing::info!(%peer, "disconnected");
            let _ = self.events.send(Event::Disconnected(peer)).await;
        }
    }

    fn take(&self, peer: PeerId, number: u64, message: wire::Up) -> Result<(), WireError> {
        match message.body.ok_or(WireError::Invalid("message"))? {
            wire::up::Body::Register(_) => Err(WireError::Invalid("a second registration")),
            wire::up::Body::Reply(reply) => {
                let (request, outcome) = <(u64, Result<Reply, Failure>)>::try_from(reply)?;
                self.answer(peer, number, request, outcome);
                Ok(())
            }
            wire::up::Body::AgentReport(report) => {
                self.keep_report(peer, number, Report::Agent(report.try_into()?));
                Ok(())
            }
            wire::up::Body::ServerReport(report) => {
                self.keep_report(peer, number, Report::Server(report.try_into()?));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::HostId;
    use tidemark_proto::control::{AgentCommand, FailureKind, Peer, reply_to};
    use tokio::sync::mpsc;

    use crate::hub::Presence;

    struct Stream {
        up: mpsc::Sender<Result<wire::Up, Status>>,
        down: Pin<Box<dyn futures_util::Stream<Item = Result<wire::Down, Status>> + Send>>,
    }

    async fn connect(hub: &Arc<Hub>, id: HostId, certificate: PeerIdentity) -> Result<Stream, Status> {
        let (up, receiver) = mpsc::channel(8);
        let register =
            Register { peer: Peer::Agent { id }, name: "h".into(), software: String::new(), boot: String::new() };
        up.send(Ok(wire::Up { body: Some(wire::up::Body::Register((&register).into())) })).await.unwrap();
        let mut down = hub.clone().attach("cs", certificate, ReceiverStream::new(receiver)).await.map(Box::pin)?;
        let hello = down.next().await.unwrap().unwrap();
        assert!(matches!(hello.body, Some(wire::down::Body::Registered(_))));
        Ok(Stream { up, down })
    }

    #[tokio::test]
    async fn a_stream_is_who_its_certificate_says() {
        let (hub, _events) = Hub::new();
        let (id, other) = (HostId::random(), HostId::random());
        let refused = connect(&hub, id, PeerIdentity::Agent(other)).await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        assert_eq!(hub.presence(PeerId::Agent(id)), Presence::NeverSeen);
        connect(&hub, id, PeerIdentity::Agent(id)).await.unwrap();
        assert!(matches!(hub.presence(PeerId::Agent(id)), Presence::Connected { .. }));
    }

    #[tokio::test]
    async fn calls_are_answered_or_end_with_their_stream() {
        let (hub, _events) = Hub::new();
        let id = HostId::random();
        let limit = Duration::from_secs(10);
        let mut first = connect(&hub, id, PeerIdentity::Agent(id)).await.unwrap();
        let call = |limit| {
            let hub = hub.clone();
            tokio::spawn(async move { hub.agent(id, &AgentCommand::Status, limit).await })
        };
        let answered = call(limit);
        let asked = first.down.next().await.unwrap().unwrap();
        let reply = reply_to(asked.request, &Ok(Reply::Done));
        first.up.send(Ok(wire::Up { body: Some(wire::up::Body::Reply(reply)) })).await.unwrap();
        assert_eq!(answered.await.unwrap(), Ok(Reply::Done));

        let late = call(Duration::from_millis(10)).await.unwrap().unwrap_err();
        assert_eq!(late.kind, FailureKind::TimedOut);

        // A newer stream of the same identity ends the older one, and with it what waits on it.
        let hanging = call(limit);
        while first.down.next().await.unwrap().unwrap().request < 3 {}
        let _second = connect(&hub, id, PeerIdentity::Agent(id)).await.unwrap();
        assert_eq!(hanging.await.unwrap().unwrap_err().kind, FailureKind::Unavailable);
        assert!(first.down.next().await.is_none());
        // Its end says nothing of the newer one.
        drop(first);
        tokio::task::yield_now().await;
        assert!(matches!(hub.presence(PeerId::Agent(id)), Presence::Connected { .. }));
    }
}
