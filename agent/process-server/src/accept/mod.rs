//! The receiving end of replication: verified, authorised, appended in order, durable, acknowledged.
//!
//! One bidirectional stream per disk. Its frames are received by a task (`stream`), which never waits for the disk;
//! they are verified and appended in order on blocking threads (`lane`); complete cuts are made durable by a few
//! committer threads, one sync for all the cuts of a disk that waited (`commit`); what the streams may have in memory
//! comes from one pool (`pool`).
//!
//! *Consistency.* `Durable` is sent only after a sync that began after the cut's commit record was appended. Frames of one
//! stream are appended in the order in which they came; a stream begins only after the one before it, of the same disk,
//! appended its last byte. Authorisation is checked when a stream begins, at every change of the table, and before every
//! commit record. *Retries.* None: a refused or cut stream begins again with Hello, and Welcome says from where.
//! *Cancellation.* A stream that ends in the middle of a cut leaves that cut discarded; complete ones are made durable
//! all the same. *Crash.* What was acknowledged is in the journal; what was not is sent again.

pub mod authorise;
mod commit;
mod compare;
mod lane;
mod pool;
mod progress;
mod refused;
mod store;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_hostile;

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tidemark_base::{DiskId, Generation, Position};
use tidemark_proto::replication::{
    CutEnd, CutOrdinal, Durable, Hashes, Hello, REPLICATE, Refusal, RefusalReason, SessionId,
};
use tidemark_transport::messages::answer;
use tidemark_transport::{MESSAGE_BYTES_MAX, Message, Messages, PeerIdentity, PeerInfo};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};

use crate::replica::Needs;
use authorise::{Authorisation, Authorisations};
use commit::Committer;
pub use compare::Comparison;
use pool::CreditPool;
pub use pool::POOL_BYTES;
pub use store::ReplicaStores;

/// Streams open at once, over all connections.
const STREAMS_MAX: usize = 4096;
/// Of these, for one identity: a host has one stream a disk, and for a moment a second one while it reconnects. No host
/// keeps the others out.
const PEER_STREAMS_MAX: usize = if cfg!(test) { 128 } else { 1024 };
/// Frames that wait for a client to read them.
const OUTBOUND_FRAMES_MAX: usize = 4;
/// How long a fenced stream may take to append what it is at.
const FENCE_TIMEOUT: Duration = Duration::from_secs(10);
/// Fenced sessions that a disk remembers.
const FENCED_SESSIONS_MAX: usize = 16;

/// What a journal holds when a stream begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Held {
    pub durable: Option<Position>,
    pub cut: CutOrdinal,
    pub scan_open: bool,
    /// There is content that a scan may be compared with.
    pub comparable: bool,
}

/// One disk's journal as the receiving end sees it. Every call may block.
pub trait Store: Send + Sync + 'static {
    /// Begins a stream; whatever an earlier one left incomplete is gone.
    fn attach(&self, hello: &Hello) -> Result<(Box<dyn Writer>, Held), Refusal>;
    /// Makes every cut that ended before this call durable, and says which was the last.
    fn sync(&self) -> Result<Option<Durable>, Refusal>;
    /// What the host is to send again.
    fn needs(&self) -> Option<Arc<Needs>> {
        None
    }
}

/// Appends the frames of one stream; used by one thread at a time. Dropped in the middle of a cut, it discards the cut.
pub trait Writer: Send {
    /// Verifies whole sealed chunks and appends them.
    fn append(&mut self, cut: CutOrdinal, chunks: &[u8]) -> Result<(), Refusal>;
    fn end_cut(&mut self, end: CutEnd) -> Result<(), Refusal>;
    /// Lists what a question is about, as the cuts before it leave it; the rest is done beside the stream.
    fn compare(&mut self, hashes: Hashes) -> Result<Comparison, Refusal>;
}

/// Finds the journal of an authorised disk. May block.
pub trait Stores: Send + Sync + 'static {
    fn open(&self, disk: DiskId, authorisation: &Authorisation) -> Result<Arc<dyn Store>, Refusal>;
}

/// The gRPC service.
#[derive(Clone)]
pub struct Acceptor(Arc<Inner>);

struct Inner {
    authorisations: Arc<Authorisations>,
    stores: Arc<dyn Stores>,
    pool: Arc<CreditPool>,
    committer: Committer,
    disks: Mutex<HashMap<DiskId, Arc<Disk>>>,
    places: Arc<Semaphore>,
    /// Streams of each identity that has any.
    peers: Mutex<HashMap<Option<PeerIdentity>, usize>>,
    /// Lanes that may run at once: threads that verify and append.
    workers: Arc<Semaphore>,
    /// Questions of a compare that may be worked on at once.
    compares: Arc<Semaphore>,
    stop: CancellationToken,
    streams: TaskTracker,
    refused: refused::RefusedStreams,
}

/// One disk that had a stream since the start.
struct Disk {
    id: DiskId,
    sessions: tokio::sync::Mutex<Sessions>,
    pending: commit::Pending,
}

#[derive(Default)]
struct Sessions {
    current: Option<CurrentSession>,
    /// Runs of agents that a newer run replaced; they never come back.
    fenced: VecDeque<SessionId>,
}

struct CurrentSession {
    session: SessionId,
    fence: CancellationToken,
    /// Closed when the stream appended its last byte.
    ended: watch::Receiver<()>,
}

/// A stream's hold on its disk; dropped when its last byte is appended.
struct SessionGuard {
    fence: CancellationToken,
    _running: watch::Sender<()>,
}

impl Acceptor {
    pub fn new(authorisations: Arc<Authorisations>, stores: Arc<dyn Stores>, pool_bytes: u64) -> std::io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Self(Arc::new(Inner {
            authorisations,
            stores,
            pool: CreditPool::new(pool_bytes),
            committer: Committer::start()?,
            disks: Mutex::default(),
            places: Arc::new(Semaphore::new(STREAMS_MAX)),
            peers: Mutex::default(),
            workers: Arc::new(Semaphore::new(2 * threads.max(2))),
            compares: compare::places(),
            stop: CancellationToken::new(),
            streams: TaskTracker::new(),
            refused: refused::RefusedStreams::default(),
        })))
    }

    pub fn service(&self) -> ReplicationService {
        ReplicationService(self.clone())
    }

    /// Refuses every stream with `Stopping` and waits until all have appended their last byte.
    pub async fn stop(&self) {
        self.0.stop.cancel();
        self.0.streams.close();
        self.0.streams.wait().await;
        let inner = self.0.clone();
        // The committers finish the sync that they are at.
        let _ = tokio::task::spawn_blocking(move || inner.committer.stop()).await;
    }

    /// Streams that were refused since the start.
    pub fn refused(&self) -> &refused::RefusedStreams {
        &self.0.refused
    }

    /// Whether a stream of this disk is open.
    pub async fn is_connected(&self, disk: DiskId) -> bool {
        let disk = self.0.disks.lock().expect("no panic while held").get(&disk).cloned();
        match disk {
            Some(disk) => disk.sessions.lock().await.current.as_ref().is_some_and(CurrentSession::runs),
            None => false,
        }
    }

    /// Ends the stream of a disk, if there is one, and waits until nothing is appended any more.
    pub async fn end_stream(&self, disk: DiskId) {
        let found = self.0.disks.lock().expect("no panic while held").get(&disk).cloned();
        if let Some(found) = found {
            let mut sessions = found.sessions.lock().await;
            if let Some(current) = &mut sessions.current {
                current.fence.cancel();
                let _ = tokio::time::timeout(FENCE_TIMEOUT, current.ended.changed()).await;
            }
        }
    }
}

impl CurrentSession {
    fn runs(&self) -> bool {
        self.ended.has_changed().is_ok()
    }
}

impl Disk {
    /// Makes this the stream of its disk. The one before it is fenced and has appended its last byte when this returns.
    async fn take_over(&self, session: SessionId) -> Result<SessionGuard, Refusal> {
        let mut sessions = self.sessions.lock().await;
        if sessions.fenced.contains(&session) {
            return Err(fenced(self.id));
        }
        if let Some(mut current) = sessions.current.take() {
            current.fence.cancel();
            // An agent that lost its connection comes back with the session that it had: that is no newer run.
            if current.session != session && current.runs() {
                if sessions.fenced.len() == FENCED_SESSIONS_MAX {
                    sessions.fenced.pop_front();
                }
                sessions.fenced.push_back(current.session);
            }
            if tokio::time::timeout(FENCE_TIMEOUT, current.ended.changed()).await.is_err() {
                let refusal = refusal(
                    RefusalReason::StoreFailed,
                    format!("disk {}: the stream before this one is still being written", self.id),
                    "check whether the process server's volume answers; the host tries again by itself",
                );
                sessions.current = Some(current);
                return Err(refusal);
            }
        }
        let fence = CancellationToken::new();
        let (running, ended) = watch::channel(());
        sessions.current = Some(CurrentSession { session, fence: fence.clone(), ended });
        Ok(SessionGuard { fence, _running: running })
    }
}

impl Inner {
    /// The rules of Hello, in the order in which an operator would ask.
    fn admit(
        &self,
        peer: &PeerInfo,
        disk: DiskId,
        generation: Generation,
        disk_bytes: u64,
    ) -> Result<Authorisation, Refusal> {
        let Some(PeerIdentity::Agent(agent)) = peer.identity else {
            let who = peer.identity.map_or("nobody".to_owned(), |peer| peer.to_string());
            return Err(refusal(
                RefusalReason::NotAuthorised,
                format!("disk {disk}: {who} is no agent"),
                "only an agent's certificate may write a disk",
            ));
        };
        if self.authorisations.is_denied(peer) {
            return Err(refusal(
                RefusalReason::NotAuthorised,
                format!("disk {disk}: the certificate of agent {agent} was revoked"),
                "register the host again, with a passphrase that an administrator made for it",
            ));
        }
        let Some(known) = self.authorisations.get(disk) else {
            return Err(refusal(
                RefusalReason::UnknownDisk,
                format!("disk {disk} is not known to this process server"),
                "protect the machine with this process server, or point the agent at the one that has the disk",
            ));
        };
        if known.agent != agent {
            return Err(refusal(
                RefusalReason::NotAuthorised,
                format!("disk {disk}: agent {agent} may not write it"),
                "the disk belongs to another host; protect it from that host, or move it with `tidemark reprotect`",
            ));
        }
        if known.generation != generation {
            return Err(refusal(
                RefusalReason::Generation,
                format!("disk {disk} is at generation {}, not {generation}", known.generation),
                "this host's copy is no longer the source; reprotect the machine from where it runs now",
            ));
        }
        if known.disk_bytes != disk_bytes {
            return Err(refusal(
                RefusalReason::SizeChanged,
                format!("disk {disk} had {} bytes and has {disk_bytes} now", known.disk_bytes),
                "unprotect the disk and protect it again at its new size",
            ));
        }
        Ok(known)
    }

    fn disk(&self, disk: DiskId, store: Arc<dyn Store>) -> Arc<Disk> {
        let mut disks = self.disks.lock().expect("no panic while held");
        let known = disks.entry(disk).or_insert_with(|| {
            Arc::new(Disk { id: disk, sessions: Default::default(), pending: commit::Pending::default() })
        });
        known.pending.set_store(store);
        known.clone()
    }
}

/// `Replication` of `replication.proto`, served without a codec: chunks go from the connection to the journal without
/// being copied.
#[derive(Clone)]
pub struct ReplicationService(Acceptor);

impl Service<http::Request<Body>> for ReplicationService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        ready(Ok(self.0.replicate(request).unwrap_or_else(|status| status.into_http())))
    }
}

/// One stream's place, given back when it ends.
struct PeerPlace {
    inner: Arc<Inner>,
    peer: Option<PeerIdentity>,
    _place: OwnedSemaphorePermit,
}

impl PeerPlace {
    fn take(inner: &Arc<Inner>, peer: Option<PeerIdentity>, place: OwnedSemaphorePermit) -> Option<Self> {
        let mut peers = inner.peers.lock().expect("no panic while held");
        let count = peers.entry(peer).or_default();
        if *count == PEER_STREAMS_MAX {
            return None;
        }
        *count += 1;
        drop(peers);
        Some(Self { inner: inner.clone(), peer, _place: place })
    }
}

impl Drop for PeerPlace {
    fn drop(&mut self) {
        let mut peers = self.inner.peers.lock().expect("no panic while held");
        if let Some(count) = peers.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

impl Acceptor {
    fn replicate(&self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        if request.uri().path() != REPLICATE {
            return Err(Status::unimplemented("there is no such method here"));
        }
        let peer = *request
            .extensions()
            .get::<PeerInfo>()
            .ok_or_else(|| Status::unauthenticated("the connection has no proven identity"))?;
        let Ok(place) = self.0.places.clone().try_acquire_owned() else {
            return Err(Status::resource_exhausted(format!(
                "{STREAMS_MAX} streams are open already on this process server; protect further disks with another one"
            )));
        };
        let Some(place) = PeerPlace::take(&self.0, peer.identity, place) else {
            let who = peer.identity.map_or("this peer".to_owned(), |peer| peer.to_string());
            return Err(Status::resource_exhausted(format!(
                "{who} has {PEER_STREAMS_MAX} streams already, as many as one host may; make sure that only one agent runs \
                 with this identity"
            )));
        };
        let (sender, receiver) = mpsc::channel(OUTBOUND_FRAMES_MAX);
        let inner = self.0.clone();
        let inbound = Messages::new(request.into_body(), MESSAGE_BYTES_MAX);
        self.0.streams.spawn(async move {
            stream::run(inner, peer, inbound, sender).await;
            drop(place);
        });
        Ok(answer(ReceiverStream::new(receiver).map(Message::from)))
    }
}

fn refusal(reason: RefusalReason, message: impl Into<String>, help: &str) -> Refusal {
    Refusal { reason, message: message.into(), help: help.to_owned() }
}

fn fenced(disk: DiskId) -> Refusal {
    refusal(
        RefusalReason::Fenced,
        format!("disk {disk}: a newer run of the agent took the stream over"),
        "make sure that only one agent runs with this identity; stop the other one",
    )
}
