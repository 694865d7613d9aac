//! The gRPC side of the hub.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tidemark_proto::control::wire::control_server::{Control, ControlServer};
use tidemark_proto::control::{
    AgentCommand, EventBatch, Failure, FailureKind, Inventory, Register, Reply, ServerCommand, WireError, wire,
};
use tidemark_transport::{PeerIdentity, PeerInfo};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Event, Hub, Opened, PeerId, Report, Shown};

/// A stream that does not say who it is by then is dropped.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
/// A process that lives answers by then; one that does not is no second instance but the remains of a connection.
const INSTANCE_PROBE: Duration = Duration::from_secs(3);
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
        let peer = request.extensions().get::<PeerInfo>().copied();
        let (identity, certificate) = peer
            .and_then(|peer| Some((peer.identity?, peer.certificate)))
            .ok_or_else(|| Status::unauthenticated("the connection shows no certificate"))?;
        let up = request.into_inner();
        self.hub
            .clone()
            .attach(&self.name, identity, certificate, up)
            .await
            .inspect_err(|status| self.hub.note_refused(identity, status))
            .map(|down| Response::new(Box::pin(down) as Down))
    }
}

impl Hub {
    /// Takes a stream on, once it said who it is and the certificate agrees.
    pub(super) async fn attach(
        self: Arc<Self>,
        name: &str,
        identity: PeerIdentity,
        certificate: Option<[u8; 32]>,
        mut up: impl Stream<Item = Result<wire::Up, Status>> + Send + Unpin + 'static,
    ) -> Result<impl Stream<Item = Result<wire::Down, Status>> + Send + 'static, Status> {
        let first = tokio::time::timeout(REGISTER_TIMEOUT, up.next())
            .await
            .map_err(|_| Status::deadline_exceeded("the stream did not say who it is"))?
            .ok_or_else(|| Status::cancelled("the stream ended before it began"))??;
        let Some(wire::up::Body::Register(register)) = first.body else {
            return Err(Status::failed_precondition("the first message must be the registration"));
        };
        let shown: String = register.name.chars().take(64).collect();
        let register = Register::try_from(register).map_err(|error| match error {
            WireError::Version(_) => Status::failed_precondition(format!(
                "{identity} ({shown}) is refused: {error}; run versions of Tidemark that are at most two apart"
            )),
            error => Status::invalid_argument(format!("{identity} ({shown}) is refused: {error}")),
        })?;
        let peer = PeerId::from(&register.peer);
        let proven = match identity {
            PeerIdentity::Agent(id) => Some(PeerId::Agent(id)),
            PeerIdentity::ProcessServer(id) => Some(PeerId::ProcessServer(id)),
            PeerIdentity::ConfigServer(_) => None,
        };
        if proven != Some(peer) {
            return Err(Status::permission_denied(format!("the certificate is {identity}, which is not {peer}")));
        }
        let (registry, shown) = (self.registry.clone(), register.name.clone());
        blocking(move || registry.admit(identity, certificate, &shown)).await.map_err(|failure| {
            tracing::warn!(%peer, name = register.name, %failure, "refused");
            Status::permission_denied(format!("{failure}; {}", failure.help))
        })?;
        // What a host that was registered again left behind is no second instance.
        self.cut_if_denied(peer);
        if self.has_other_instance(&register) && self.answers(peer).await {
            let registry = self.registry.clone();
            let _ = blocking(move || {
                registry.fence(identity);
                Ok(())
            })
            .await;
            self.cut(peer);
            return Err(Status::permission_denied(format!(
                "two live processes show the identity of {peer}: both are refused until an administrator decides"
            )));
        }
        let (registry, noted) = (self.registry.clone(), register.clone());
        let moved = blocking(move || registry.note(&noted)).await.unwrap_or_else(|failure| {
            tracing::error!(%peer, %failure, "cannot note who connected");
            false
        });
        let shown = Shown { identity, certificate };
        let Opened { number, commands, out, ended } = self.open(&register, shown);
        // From here on who is refused is cut; whoever was in between is cut now.
        self.cut_if_denied(peer);
        if ended.is_cancelled() {
            return Err(Status::permission_denied(format!("the certificate of {identity} was refused meanwhile")));
        }
        tracing::info!(%peer, name = register.name, "connected");
        let hello = self.hello(name, peer);
        if matches!(peer, PeerId::ProcessServer(_)) {
            self.tell_neighbours(name);
        }
        // Only the reconciler can be behind, and it must hear of every connect.
        let register_name = register.name.clone();
        let _ = self.events.send(Event::Connected(register, moved)).await;
        tokio::spawn(async move {
            let reading = self.read(peer, number, shown, &register_name, out, up);
            if ended.run_until_cancelled(reading).await.is_none() {
                tracing::info!(%peer, "the control stream was cut");
            }
            if self.close(peer, number) {
                tracing::info!(%peer, "disconnected");
                let _ = self.events.send(Event::Disconnected(peer)).await;
            }
        });
        Ok(futures_util::stream::once(std::future::ready(hello)).chain(ReceiverStream::new(commands)).map(Ok))
    }

    /// Whether the process at the other end of a stream lives.
    async fn answers(&self, peer: PeerId) -> bool {
        let answer = match peer {
            PeerId::Agent(id) => self.agent(id, &AgentCommand::Status, INSTANCE_PROBE).await,
            PeerId::ProcessServer(id) => self.server(id, &ServerCommand::Status, INSTANCE_PROBE).await,
        };
        answer.is_ok()
    }

    /// Until the stream ends.
    async fn read(
        &self,
        peer: PeerId,
        number: u64,
        shown: Shown,
        name: &str,
        out: mpsc::WeakSender<wire::Down>,
        mut up: impl Stream<Item = Result<wire::Up, Status>> + Send + Unpin,
    ) {
        while let Some(message) = up.next().await {
            let taken = match message {
                Ok(wire::Up { body: Some(wire::up::Body::Events(batch)) }) => {
                    self.take_events(peer, name, batch, &out).await
                }
                Ok(wire::Up { body: Some(wire::up::Body::Renew(renew)) }) => {
                    self.renew(shown, renew, &out).await;
                    Ok(())
                }
                Ok(wire::Up { body: Some(wire::up::Body::AgentReport(report)) }) => {
                    self.take_agent_report(peer, number, report).await.map_err(|error| error.to_string())
                }
                Ok(message) => self.take(peer, number, message).map_err(|error| error.to_string()),
                Err(status) => Err(status.message().to_owned()),
            };
            if let Err(reason) = taken {
                tracing::info!(%peer, reason, "the control stream broke");
                break;
            }
        }
    }

    fn note_refused(&self, identity: PeerIdentity, status: &Status) {
        let role = identity.role().to_string();
        self.refused.add(&[("role", &role), ("reason", reason(status.code()))]);
    }

    /// With the inventory that comes with it now and then. One that cannot be stored counts until we stop.
    async fn take_agent_report(
        &self,
        peer: PeerId,
        number: u64,
        mut report: wire::AgentReport,
    ) -> Result<(), WireError> {
        if let (Some(inventory), PeerId::Agent(host)) = (report.inventory.take(), peer) {
            let (registry, inventory) = (self.registry.clone(), Inventory::try_from(inventory)?);
            let kept = blocking(move || registry.keep_inventory(host, inventory)).await;
            kept.unwrap_or_else(|failure| tracing::warn!(%peer, %failure, "what disks it has cannot be stored"));
        }
        self.keep_report(peer, number, Report::Agent(report.try_into()?));
        Ok(())
    }

    /// Events that cannot be kept now are not acknowledged: they come again with the next stream.
    async fn take_events(
        &self,
        peer: PeerId,
        name: &str,
        batch: wire::EventBatch,
        out: &mpsc::WeakSender<wire::Down>,
    ) -> Result<(), String> {
        let batch = EventBatch::try_from(batch).map_err(|error| error.to_string())?;
        let (registry, name, stream) = (self.registry.clone(), name.to_owned(), batch.stream);
        match blocking(move || registry.take_events(peer, &name, batch)).await {
            Ok(sequence) => {
                let taken = wire::EventsTaken { stream: stream.as_bytes().to_vec(), sequence };
                send(out, wire::down::Body::EventsTaken(taken));
                Ok(())
            }
            Err(failure) => Err(format!("its events cannot be kept: {failure}")),
        }
    }

    async fn renew(&self, shown: Shown, renew: wire::Renew, out: &mpsc::WeakSender<wire::Down>) {
        let Shown { identity, certificate } = shown;
        let registry = self.registry.clone();
        let renewed = match blocking(move || registry.renew(identity, certificate, &renew.request)).await {
            Ok(certificate) => wire::Renewed { certificate, failure: None },
            Err(failure) => {
                tracing::warn!(%identity, %failure, "a certificate is not renewed");
                wire::Renewed { certificate: Vec::new(), failure: Some((&failure).into()) }
            }
        };
        send(out, wire::down::Body::Renewed(renewed));
    }

    fn take(&self, peer: PeerId, number: u64, message: wire::Up) -> Result<(), WireError> {
        match message.body.ok_or(WireError::Invalid("message"))? {
            wire::up::Body::Register(_) => Err(WireError::Invalid("a second registration")),
            wire::up::Body::Reply(reply) => {
                let (request, outcome) = <(u64, Result<Reply, Failure>)>::try_from(reply)?;
                self.answer(peer, number, request, outcome);
                Ok(())
            }
            wire::up::Body::ServerReport(report) => {
                self.tell(peer, number, &report.working);
                self.keep_report(peer, number, Report::Server(report.try_into()?));
                Ok(())
            }
            // Taken before.
            wire::up::Body::AgentReport(_) | wire::up::Body::Events(_) | wire::up::Body::Renew(_) => Ok(()),
        }
    }
}

/// For figures.
fn reason(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::PermissionDenied => "not_admitted",
        tonic::Code::FailedPrecondition => "version",
        tonic::Code::InvalidArgument => "invalid",
        tonic::Code::DeadlineExceeded => "silent",
        _ => "cut",
    }
}

/// What finds no room is sent again with the next stream.
fn send(out: &mpsc::WeakSender<wire::Down>, body: wire::down::Body) {
    if let Some(out) = out.upgrade() {
        let _ = out.try_send(wire::Down { request: 0, body: Some(body) });
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Failure::new(FailureKind::Failed, format!("the configuration server failed: {error}"), "see its log"))
    })
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

    /// Admits everybody and remembers who was fenced.
    #[derive(Default)]
    struct Open(std::sync::Mutex<Vec<PeerIdentity>>);

    impl crate::hub::Registry for Open {
        fn admit(&self, _: PeerIdentity, _: Option<[u8; 32]>, _: &str) -> Result<(), Failure> {
            Ok(())
        }

        fn is_denied(&self, _: PeerIdentity, _: Option<[u8; 32]>) -> bool {
            false
        }

        fn fence(&self, identity: PeerIdentity) {
            self.0.lock().unwrap().push(identity);
        }

        fn note(&self, _: &Register) -> Result<bool, Failure> {
            Ok(false)
        }

        fn renew(&self, _: PeerIdentity, _: Option<[u8; 32]>, request: &[u8]) -> Result<Vec<u8>, Failure> {
            Ok(request.to_vec())
        }

        fn keep_inventory(&self, _: HostId, _: Inventory) -> Result<(), Failure> {
            Ok(())
        }

        fn neighbours(&self) -> Vec<tidemark_proto::control::Neighbour> {
            Vec::new()
        }

        fn take_events(&self, _: PeerId, _: &str, batch: EventBatch) -> Result<u64, Failure> {
            Ok(batch.events.len() as u64)
        }
    }

    fn hub() -> (Arc<Hub>, Arc<Open>, mpsc::Receiver<Event>) {
        let registry = Arc::new(Open::default());
        let (hub, events) = Hub::new(registry.clone());
        (hub, registry, events)
    }

    async fn connect(hub: &Arc<Hub>, id: HostId, certificate: PeerIdentity) -> Result<Stream, Status> {
        connect_as(hub, id, certificate, None).await
    }

    async fn connect_as(
        hub: &Arc<Hub>,
        id: HostId,
        certificate: PeerIdentity,
        instance: Option<uuid::Uuid>,
    ) -> Result<Stream, Status> {
        connect_with(hub, id, certificate, None, instance).await
    }

    async fn connect_with(
        hub: &Arc<Hub>,
        id: HostId,
        identity: PeerIdentity,
        certificate: Option<[u8; 32]>,
        instance: Option<uuid::Uuid>,
    ) -> Result<Stream, Status> {
        let (up, receiver) = mpsc::channel(8);
        let register = Register {
            peer: Peer::Agent { id },
            name: "h".into(),
            software: String::new(),
            boot: String::new(),
            instance,
            time: None,
        };
        up.send(Ok(wire::Up { body: Some(wire::up::Body::Register((&register).into())) })).await.unwrap();
        let mut down =
            hub.clone().attach("cs", identity, certificate, ReceiverStream::new(receiver)).await.map(Box::pin)?;
        let hello = down.next().await.unwrap().unwrap();
        assert!(matches!(hello.body, Some(wire::down::Body::Registered(_))));
        Ok(Stream { up, down })
    }

    #[tokio::test]
    async fn a_stream_is_who_its_certificate_says() {
        let (hub, _registry, _events) = hub();
        let (id, other) = (HostId::random(), HostId::random());
        let refused = connect(&hub, id, PeerIdentity::Agent(other)).await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        assert_eq!(hub.presence(PeerId::Agent(id)), Presence::NeverSeen);
        connect(&hub, id, PeerIdentity::Agent(id)).await.unwrap();
        assert!(matches!(hub.presence(PeerId::Agent(id)), Presence::Connected { .. }));
    }

    #[tokio::test]
    async fn calls_are_answered_or_end_with_their_stream() {
        let (hub, _registry, _events) = hub();
        let id = HostId::random();
        let limit = Duration::from_secs(60);
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

    #[tokio::test]
    async fn two_live_processes_of_one_identity_are_both_fenced_and_a_dead_one_is_replaced() {
        let (hub, registry, _events) = hub();
        let id = HostId::random();
        let identity = PeerIdentity::Agent(id);
        let (one, two) = (Some(uuid::Uuid::new_v4()), Some(uuid::Uuid::new_v4()));
        let mut first = connect_as(&hub, id, identity, one).await.unwrap();
        // It dials again: the same process.
        let second = connect_as(&hub, id, identity, one).await.unwrap();
        assert!(first.down.next().await.is_none() && registry.0.lock().unwrap().is_empty());
        // Another process, while the first does not answer any more: its connection is what is left of a crash.
        drop(first);
        let replaced = connect_as(&hub, id, identity, two).await.unwrap();
        assert!(registry.0.lock().unwrap().is_empty(), "nobody answered");
        drop((second, replaced));

        // Another process, while the first answers.
        let id = HostId::random();
        let identity = PeerIdentity::Agent(id);
        let Stream { up, mut down } = connect_as(&hub, id, identity, one).await.unwrap();
        let answering = tokio::spawn(async move {
            while let Some(Ok(asked)) = down.next().await {
                let reply = reply_to(asked.request, &Ok(Reply::Done));
                up.send(Ok(wire::Up { body: Some(wire::up::Body::Reply(reply)) })).await.unwrap();
            }
        });
        let refused = connect_as(&hub, id, identity, two).await.err().unwrap();
        assert!(refused.message().contains("two live processes"), "{refused}");
        assert_eq!(*registry.0.lock().unwrap(), [identity]);
        // The first is cut off as well.
        answering.await.unwrap();
        assert!(!matches!(hub.presence(PeerId::Agent(id)), Presence::Connected { .. }));
    }

    /// Answers everything that a stream is asked, until it ends; what else it was sent then.
    fn answer_all(stream: Stream) -> tokio::task::JoinHandle<Vec<wire::down::Body>> {
        let Stream { up, mut down } = stream;
        tokio::spawn(async move {
            let mut others = Vec::new();
            while let Some(Ok(sent)) = down.next().await {
                match sent.body {
                    Some(wire::down::Body::Agent(_)) => {
                        let reply = reply_to(sent.request, &Ok(Reply::Done));
                        let _ = up.send(Ok(wire::Up { body: Some(wire::up::Body::Reply(reply)) })).await;
                    }
                    Some(body) => others.push(body),
                    None => {}
                }
            }
            others
        })
    }

    #[tokio::test]
    async fn a_host_that_was_registered_again_comes_in_and_what_it_left_behind_is_cut() {
        use crate::hub::Registry;
        use crate::identity::tests::{issued, passphrase, registrar, request};
        use tidemark_transport::{KeyRequest, certificate_digest};

        let folder = tempfile::tempdir().unwrap();
        let registrar = Arc::new(registrar(folder.path()));
        let (hub, mut events) = Hub::new(registrar.clone());
        let register = |replaces: Option<String>| {
            let text = passphrase(&registrar, crate::model::PeerRole::Agent, 1, replaces);
            let asked = request(crate::model::PeerRole::Agent, &text, &KeyRequest::new().unwrap());
            let (identity, certificate) =
                issued(registrar.register(std::net::Ipv4Addr::LOCALHOST.into(), &asked).unwrap());
            let PeerIdentity::Agent(id) = identity else { panic!("{identity}") };
            (id, Some(certificate_digest(&certificate)))
        };
        let instance = || Some(uuid::Uuid::new_v4());
        let (id, old) = register(None);
        let (identity, peer) = (PeerIdentity::Agent(id), PeerId::Agent(id));

        // Nobody tells the hub: the new one finds the old one's stream, which still answers.
        let left = connect_with(&hub, id, identity, old, instance()).await.unwrap();
        let up = left.up.clone();
        let left = answer_all(left);
        let (again, new) = register(Some(id.to_string()));
        assert_eq!(again, id);
        let renew = wire::Renew { request: KeyRequest::new().unwrap().request().to_vec() };
        up.send(Ok(wire::Up { body: Some(wire::up::Body::Renew(renew)) })).await.unwrap();
        let found = connect_with(&hub, id, identity, new, instance()).await.unwrap();
        for sent in left.await.unwrap() {
            let wire::down::Body::Renewed(renewed) = sent else { panic!("{sent:?}") };
            assert!(renewed.certificate.is_empty() && renewed.failure.is_some());
        }
        tokio::time::timeout(Duration::from_secs(60), up.closed()).await.expect("nothing more is read from it");
        assert!(hub.is_connected(peer) && !registrar.is_denied(identity, new));
        assert!(registrar.renew(identity, new, KeyRequest::new().unwrap().request()).is_ok());
        let refused = connect_with(&hub, id, identity, old, instance()).await.err().unwrap();
        assert!(refused.message().contains("registered again"), "{refused}");
        assert!(hub.is_connected(peer), "whoever is refused disturbs nobody");

        // The hub is told before the new one comes.
        let found = answer_all(found);
        let (_, newest) = register(Some(id.to_string()));
        assert!(registrar.renew(identity, new, KeyRequest::new().unwrap().request()).is_err());
        hub.cut_denied();
        assert!(!hub.is_connected(peer));
        found.await.unwrap();
        while !matches!(events.recv().await, Some(Event::Disconnected(gone)) if gone == peer) {}
        let _newest = connect_with(&hub, id, identity, newest, instance()).await.unwrap();
        hub.cut_denied();
        assert!(hub.is_connected(peer));
    }
}
