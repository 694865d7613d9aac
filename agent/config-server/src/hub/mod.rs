//! The streams of agents and process servers, and calls over them.
//!
//! *Consistency.* One stream an identity: a newer one takes the older one's place, whose calls fail. *Retries.* None here:
//! a call fails when its stream ends, and [`crate::reconcile`] says again what is wanted. *Cancellation.* Dropping a call
//! forgets its answer; the other side may still do it. *Crash.* Nothing here is durable.

mod service;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tidemark_base::tally::Tally;
use tidemark_base::{Clock, HostId, ServerId, SystemClock, Timestamp};
use tidemark_proto::control::{
    AgentCommand, AgentReport, EventBatch, Failure, FailureKind, Inventory, Neighbour, Peer, Register, Reply,
    ServerCommand, ServerReport, Whereabouts, wire,
};
use tidemark_transport::PeerIdentity;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

pub use service::{ControlService, control_server};

/// Commands that wait for one stream; more are refused.
const COMMANDS_MAX: usize = 256;
/// Events that wait for the reconciler; reports never wait, only connects do.
const EVENTS_MAX: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum PeerId {
    Agent(HostId),
    ProcessServer(ServerId),
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerId::Agent(id) => write!(f, "agent {id}"),
            PeerId::ProcessServer(id) => write!(f, "process server {id}"),
        }
    }
}

impl From<&Peer> for PeerId {
    fn from(peer: &Peer) -> Self {
        match peer {
            Peer::Agent { id } => PeerId::Agent(*id),
            Peer::ProcessServer { id, .. } => PeerId::ProcessServer(*id),
        }
    }
}

/// What the hub asks for those who connect. All of it may block.
pub trait Registry: Send + Sync + 'static {
    /// Whether this certificate may connect.
    fn admit(&self, identity: PeerIdentity, certificate: Option<[u8; 32]>, name: &str) -> Result<(), Failure>;
    /// Whether an identity is refused now, or this certificate of it. Does not block.
    fn is_denied(&self, identity: PeerIdentity, certificate: Option<[u8; 32]>) -> bool;
    /// Two live processes show this identity: neither is answered any more.
    fn fence(&self, identity: PeerIdentity);
    /// Keeps who it is, before it counts as connected; says whether a process server is at another address than before. Blocks.
    fn note(&self, register: &Register) -> Result<bool, Failure>;
    /// A new certificate, DER, for an identity that proved itself by `certificate`, by its request.
    fn renew(&self, identity: PeerIdentity, certificate: Option<[u8; 32]>, request: &[u8]) -> Result<Vec<u8>, Failure>;
    /// Keeps what a host told of its disks.
    fn keep_inventory(&self, host: HostId, inventory: Inventory) -> Result<(), Failure>;
    /// Process servers that agents can ask where we are, when we are somewhere else. Does not block.
    fn neighbours(&self) -> Vec<Neighbour>;
    /// Keeps events; answers how far the sender's stream is kept.
    fn take_events(&self, peer: PeerId, name: &str, batch: EventBatch) -> Result<u64, Failure>;
}

/// What the hub tells the reconciler.
#[derive(Debug)]
pub enum Event {
    /// And whether it is a process server at another address than before.
    Connected(Register, bool),
    Disconnected(PeerId),
}

pub struct Hub {
    inner: Mutex<Inner>,
    events: mpsc::Sender<Event>,
    registry: Arc<dyn Registry>,
    clock: SystemClock,
    /// Streams that were not taken, by role and reason.
    refused: Tally,
    /// What those who connect are told of us.
    whereabouts: OnceLock<Whereabouts>,
    /// What agents were told of process servers.
    neighbours: Mutex<Vec<Neighbour>>,
}

#[derive(Default)]
struct Inner {
    sessions: HashMap<PeerId, Session>,
    /// Name and time of those that went.
    gone: HashMap<PeerId, (String, Timestamp)>,
    last_session: u64,
}

struct Session {
    number: u64,
    name: String,
    since: Timestamp,
    commands: mpsc::Sender<wire::Down>,
    waiting: HashMap<u64, Waiting>,
    last_request: u64,
    report: Option<Report>,
    /// Which process it is, where it says.
    instance: Option<Uuid>,
    software: String,
    /// Its clock less ours, in seconds, when it connected.
    clock_ahead_seconds: i64,
    /// What it proved itself by.
    shown: Shown,
    /// Nothing more is read from the stream once this is dropped.
    _reading: DropGuard,
}

/// What the other end of a stream showed.
#[derive(Clone, Copy, Debug)]
struct Shown {
    identity: PeerIdentity,
    /// Its digest.
    certificate: Option<[u8; 32]>,
}

/// The hub's side of a new stream.
struct Opened {
    number: u64,
    commands: mpsc::Receiver<wire::Down>,
    /// Sends others than commands while the stream lasts.
    out: mpsc::WeakSender<wire::Down>,
    /// The stream was cut, or another took its place.
    ended: CancellationToken,
}

/// Somebody waits for the answer to a request.
struct Waiting {
    answer: oneshot::Sender<Result<Reply, Failure>>,
    /// How far the peer is with it: bytes that are done, and that there are.
    told: watch::Sender<(u64, u64)>,
}

#[derive(Clone, Debug)]
pub enum Report {
    Agent(AgentReport),
    Server(ServerReport),
}

/// What is known of a peer's connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Presence {
    Connected { name: String, since: Timestamp },
    Gone { name: String, since: Timestamp },
    NeverSeen,
}

impl Hub {
    pub fn new(registry: Arc<dyn Registry>) -> (Arc<Self>, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let (inner, whereabouts) = (Mutex::default(), OnceLock::new());
        (
            Arc::new(Self {
                inner,
                events,
                registry,
                clock: SystemClock::new(),
                refused: Tally::default(),
                whereabouts,
                neighbours: Mutex::default(),
            }),
            receiver,
        )
    }

    /// Where we are, once that is known.
    pub fn set_whereabouts(&self, whereabouts: Whereabouts) {
        // Said once, at the start.
        let _ = self.whereabouts.set(whereabouts);
    }

    pub fn whereabouts(&self) -> &Whereabouts {
        self.whereabouts.get_or_init(|| Whereabouts {
            incarnation: 1,
            server: ServerId::random(),
            addresses: Vec::new(),
        })
    }

    /// What a stream begins with; agents hear of process servers as well.
    fn hello(&self, name: &str, peer: PeerId) -> wire::Down {
        let whereabouts = wire::Whereabouts::from(self.whereabouts());
        let neighbours = match peer {
            PeerId::Agent(_) => self.registry.neighbours(),
            PeerId::ProcessServer(_) => Vec::new(),
        };
        let registered = wire::Registered {
            name: name.to_owned(),
            time_ns: self.clock.wall_now().0,
            addresses: whereabouts.addresses,
            incarnation: whereabouts.incarnation,
            server: whereabouts.server,
            process_servers: neighbours.iter().map(Into::into).collect(),
        };
        wire::Down { request: 0, body: Some(wire::down::Body::Registered(registered)) }
    }

    /// Tells agents that are connected of process servers that came, went or moved since they were told last. One whose stream has no
    /// room hears of it when it connects again.
    fn tell_neighbours(&self, name: &str) {
        let now = self.registry.neighbours();
        if std::mem::replace(&mut *self.neighbours.lock().expect("no panic while held"), now.clone()) == now {
            return;
        }
        for (peer, _) in self.connected().into_iter().filter(|(peer, _)| matches!(peer, PeerId::Agent(_))) {
            let hello = self.hello(name, peer);
            let inner = self.inner.lock().expect("no panic while held");
            if let Some(session) = inner.sessions.get(&peer) {
                let _ = session.commands.try_send(hello);
            }
        }
    }

    /// Streams that were not taken since we started, by role and reason.
    pub fn refused(&self) -> &Tally {
        &self.refused
    }

    /// Asks an agent; waits at most `limit` for the answer.
    pub async fn agent(&self, id: HostId, command: &AgentCommand, limit: Duration) -> Result<Reply, Failure> {
        self.call(PeerId::Agent(id), wire::down::Body::Agent(command.into()), limit, &|_, _| ()).await
    }

    /// Asks a process server; waits at most `limit` for the answer.
    pub async fn server(&self, id: ServerId, command: &ServerCommand, limit: Duration) -> Result<Reply, Failure> {
        self.server_telling(id, command, limit, &|_, _| ()).await
    }

    /// The same; `tell` hears how many bytes of how many are done, where the process server says so.
    pub async fn server_telling(
        &self,
        id: ServerId,
        command: &ServerCommand,
        limit: Duration,
        tell: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Reply, Failure> {
        self.call(PeerId::ProcessServer(id), wire::down::Body::Server(command.into()), limit, tell).await
    }

    async fn call(
        &self,
        peer: PeerId,
        body: wire::down::Body,
        limit: Duration,
        tell: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Reply, Failure> {
        let (request, number, mut answer, mut told) = {
            let mut inner = self.inner.lock().expect("no panic while held");
            let Some(session) = inner.sessions.get_mut(&peer) else {
                return Err(not_connected(peer, &inner.gone));
            };
            session.last_request += 1;
            let request = session.last_request;
            let down = wire::Down { request, body: Some(body) };
            session.commands.try_send(down).map_err(|_| {
                Failure::new(
                    FailureKind::Unavailable,
                    format!("{} {} does not take commands", kind(peer), session.name),
                    "it is overloaded or about to disconnect; try again",
                )
            })?;
            let (sender, answer) = oneshot::channel();
            let (telling, told) = watch::channel((0, 0));
            session.waiting.insert(request, Waiting { answer: sender, told: telling });
            (request, session.number, answer, told)
        };
        let _forget = Forget { hub: self, peer, number, request };
        let answered = async {
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut answer => return outcome,
                    Ok(()) = told.changed() => {
                        let (done, total) = *told.borrow_and_update();
                        tell(done, total);
                    }
                }
            }
        };
        match tokio::time::timeout(limit, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => {
                let inner = self.inner.lock().expect("no panic while held");
                Err(Failure::new(
                    FailureKind::Unavailable,
                    format!("{} {} disconnected before it answered", kind(peer), inner.name(peer)),
                    "it may still have done it; look at `tidemark status`, and repeat the command when it is back",
                ))
            }
            Err(_) => {
                let inner = self.inner.lock().expect("no panic while held");
                Err(Failure::new(
                    FailureKind::TimedOut,
                    format!("{} {} did not answer within {} s", kind(peer), inner.name(peer), limit.as_secs_f32()),
                    "it may still do it; look at `tidemark status` before you repeat the command",
                ))
            }
        }
    }

    pub fn presence(&self, peer: PeerId) -> Presence {
        let inner = self.inner.lock().expect("no panic while held");
        match (inner.sessions.get(&peer), inner.gone.get(&peer)) {
            (Some(session), _) => Presence::Connected { name: session.name.clone(), since: session.since },
            (None, Some((name, since))) => Presence::Gone { name: name.clone(), since: *since },
            (None, None) => Presence::NeverSeen,
        }
    }

    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.inner.lock().expect("no panic while held").sessions.contains_key(&peer)
    }

    /// Who is connected now, with their names, sorted.
    pub fn connected(&self) -> Vec<(PeerId, String)> {
        let inner = self.inner.lock().expect("no panic while held");
        let mut peers: Vec<_> = inner.sessions.iter().map(|(peer, session)| (*peer, session.name.clone())).collect();
        peers.sort();
        peers
    }

    /// How far the clock of a peer that is connected was ahead of ours, in seconds.
    pub fn clock_ahead_seconds(&self, peer: PeerId) -> i64 {
        let inner = self.inner.lock().expect("no panic while held");
        inner.sessions.get(&peer).map_or(0, |session| session.clock_ahead_seconds)
    }

    /// The version of a peer that is connected.
    pub fn software(&self, peer: PeerId) -> Option<String> {
        let inner = self.inner.lock().expect("no panic while held");
        inner.sessions.get(&peer).map(|session| session.software.clone())
    }

    /// Ends the stream of a peer, if it has one.
    pub fn cut(&self, peer: PeerId) {
        let mut inner = self.inner.lock().expect("no panic while held");
        if let Some(session) = inner.sessions.remove(&peer) {
            inner.gone.insert(peer, (session.name, self.clock.wall_now()));
        }
    }

    /// Ends the streams of those who are refused by now: by their identity, or because their certificate is.
    pub fn cut_denied(&self) {
        self.cut_denied_of(|_| true);
    }

    /// The same of one peer.
    fn cut_if_denied(&self, peer: PeerId) {
        self.cut_denied_of(|known| known == peer);
    }

    fn cut_denied_of(&self, is_meant: impl Fn(PeerId) -> bool) {
        let mut shown: Vec<(PeerId, u64, Shown)> = {
            let inner = self.inner.lock().expect("no panic while held");
            let meant = inner.sessions.iter().filter(|(peer, _)| is_meant(**peer));
            meant.map(|(peer, session)| (*peer, session.number, session.shown)).collect()
        };
        // The registry has a lock of its own, under which the hub may be asked: never both.
        shown.retain(|(_, _, shown)| self.registry.is_denied(shown.identity, shown.certificate));
        let mut inner = self.inner.lock().expect("no panic while held");
        let now = self.clock.wall_now();
        for (peer, number, _) in shown {
            if inner.sessions.get(&peer).is_none_or(|session| session.number != number) {
                continue;
            }
            let Some(session) = inner.sessions.remove(&peer) else { continue };
            tracing::warn!(%peer, name = session.name, "its certificate is refused from now on: its stream is cut");
            inner.gone.insert(peer, (session.name, now));
        }
    }

    /// Whether another process of the same identity has a stream that may be alive.
    fn has_other_instance(&self, register: &Register) -> bool {
        let inner = self.inner.lock().expect("no panic while held");
        let known = inner.sessions.get(&PeerId::from(&register.peer)).and_then(|session| session.instance);
        matches!((known, register.instance), (Some(known), Some(new)) if known != new)
    }

    /// The last report of a peer that is connected.
    pub fn report(&self, peer: PeerId) -> Option<Report> {
        self.inner.lock().expect("no panic while held").sessions.get(&peer)?.report.clone()
    }

    /// A new stream.
    fn open(&self, register: &Register, shown: Shown) -> Opened {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let peer = PeerId::from(&register.peer);
        let (out, ended) = (commands.downgrade(), CancellationToken::new());
        let mut inner = self.inner.lock().expect("no panic while held");
        inner.last_session += 1;
        let number = inner.last_session;
        let session = Session {
            number,
            name: register.name.clone(),
            since: self.clock.wall_now(),
            commands,
            waiting: HashMap::new(),
            last_request: 0,
            report: None,
            instance: register.instance,
            software: register.software.clone(),
            clock_ahead_seconds: register.time.map_or(0, |time| {
                let seconds = |time: Timestamp| (time.0 / 1_000_000_000) as i64;
                seconds(time) - seconds(self.clock.wall_now())
            }),
            shown,
            _reading: ended.clone().drop_guard(),
        };
        // The older stream's commands end with its session, and so does the stream.
        if inner.sessions.insert(peer, session).is_some() {
            tracing::warn!(%peer, "a newer stream takes the place of an older one of the same identity");
        }
        Opened { number, commands: receiver, out, ended }
    }

    fn close(&self, peer: PeerId, number: u64) -> bool {
        let mut inner = self.inner.lock().expect("no panic while held");
        // One that was cut is gone already, and is told now.
        if inner.sessions.get(&peer).is_some_and(|session| session.number != number) {
            return false;
        }
        if let Some(session) = inner.sessions.remove(&peer) {
            inner.gone.insert(peer, (session.name, self.clock.wall_now()));
        }
        true
    }

    fn answer(&self, peer: PeerId, number: u64, request: u64, outcome: Result<Reply, Failure>) {
        let mut inner = self.inner.lock().expect("no panic while held");
        if let Some(session) = inner.sessions.get_mut(&peer).filter(|session| session.number == number)
            && let Some(waiting) = session.waiting.remove(&request)
        {
            // Whoever asked may have gone.
            let _ = waiting.answer.send(outcome);
        }
    }

    fn tell(&self, peer: PeerId, number: u64, working: &[wire::Working]) {
        let inner = self.inner.lock().expect("no panic while held");
        let Some(session) = inner.sessions.get(&peer).filter(|session| session.number == number) else { return };
        for of in working {
            if let Some(waiting) = session.waiting.get(&of.request) {
                waiting.told.send_replace((of.done_bytes.min(of.total_bytes), of.total_bytes));
            }
        }
    }

    fn keep_report(&self, peer: PeerId, number: u64, report: Report) {
        let mut inner = self.inner.lock().expect("no panic while held");
        if let Some(session) = inner.sessions.get_mut(&peer).filter(|session| session.number == number) {
            session.report = Some(report);
        }
    }
}

impl Inner {
    fn name(&self, peer: PeerId) -> String {
        self.sessions
            .get(&peer)
            .map(|session| session.name.clone())
            .or_else(|| self.gone.get(&peer).map(|(name, _)| name.clone()))
            .unwrap_or_default()
    }
}

/// Takes a request out of its session's table when its caller is done with it, however that came.
struct Forget<'a> {
    hub: &'a Hub,
    peer: PeerId,
    number: u64,
    request: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let mut inner = self.hub.inner.lock().expect("no panic while held");
        if let Some(session) = inner.sessions.get_mut(&self.peer).filter(|session| session.number == self.number) {
            session.waiting.remove(&self.request);
        }
    }
}

pub fn kind(peer: PeerId) -> &'static str {
    match peer {
        PeerId::Agent(_) => "agent",
        PeerId::ProcessServer(_) => "process server",
    }
}

fn not_connected(peer: PeerId, gone: &HashMap<PeerId, (String, Timestamp)>) -> Failure {
    let message = match gone.get(&peer) {
        Some((name, since)) => format!("{} {name} is not connected since {since}", kind(peer)),
        None => format!("{peer} has not connected since the configuration server started"),
    };
    Failure::new(
        FailureKind::Unavailable,
        message,
        "check that it runs and reaches the configuration server; replication goes on without this connection",
    )
}

/// The answer was of another kind than asked for: the other side is of another version.
pub fn unexpected(peer: PeerId, reply: &Reply) -> Failure {
    Failure::new(
        FailureKind::Failed,
        format!("{peer} answered with {}, which was not asked for", reply.kind()),
        "run the same version of Tidemark everywhere",
    )
}
