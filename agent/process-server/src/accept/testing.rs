//! A host written by hand, as little of one as a test needs.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{
    DiskId, Epoch, Extent, Generation, HistoryHash, HostId, MachineId, Position, Sequence, ServerId, Timestamp,
};
use tidemark_proto::replication::wire::replication_client::ReplicationClient;
use tidemark_proto::replication::{
    Close, Credit, CutEnd, CutKind, CutOrdinal, Data, Durable, Hello, HostFrame, Mark, PROTOCOL_VERSION, Refusal,
    RefusalReason, ServerFrame, SessionId, Welcome, wire,
};
use tidemark_transport::{Authority, Identity, PeerIdentity, TlsListener, connect, serve, tls};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::authorise::{Authorisation, Authorisations};
use super::{Acceptor, Stores};

pub const DISK_BYTES: u64 = 64 << 20;

/// Where a host connects, and whom it expects there.
pub struct Endpoint {
    pub address: String,
    pub peer: PeerIdentity,
}

/// Everything between a host and the journals, over real TLS on loopback.
pub struct TestServer {
    _folder: tempfile::TempDir,
    pub authority: Authority,
    pub authorisations: Arc<Authorisations>,
    pub acceptor: Acceptor,
    pub endpoint: Endpoint,
    pub machine: MachineId,
    stop: tokio_util::sync::CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl TestServer {
    pub async fn start(stores: impl FnOnce(Arc<dyn Storage>) -> Arc<dyn Stores>, pool_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let authority = Authority::open_or_create(&*storage).unwrap();
        let peer = PeerIdentity::ProcessServer(ServerId::random());
        let identity = authority.issue(peer, &[]).unwrap();
        let authorisations = Arc::new(Authorisations::open(storage.clone()).unwrap());
        let acceptor = Acceptor::new(authorisations.clone(), stores(storage), pool_bytes).unwrap();
        let listener = TlsListener::bind("127.0.0.1:0", tls::mutual_server(&identity).unwrap()).await.unwrap();
        let address = listener.local_address().to_string();
        let stop = tokio_util::sync::CancellationToken::new();
        let serving = tokio::spawn({
            let (service, stop) = (acceptor.service(), stop.clone());
            async move { serve(listener, service, stop.cancelled_owned()).await.unwrap() }
        });
        let machine = MachineId::random();
        let endpoint = Endpoint { address, peer };
        Self { _folder: folder, authority, authorisations, acceptor, endpoint, machine, stop, serving }
    }

    /// An agent with a new identity, and a disk that it may write.
    pub fn agent_with_disk(&self) -> (Identity, DiskId) {
        let agent = HostId::random();
        let disk = DiskId::random();
        self.authorisations.authorise(disk, self.authorisation(agent)).unwrap();
        (self.authority.issue(PeerIdentity::Agent(agent), &[]).unwrap(), disk)
    }

    pub fn authorisation(&self, agent: HostId) -> Authorisation {
        Authorisation { machine: self.machine, agent, generation: Generation::FIRST, disk_bytes: DISK_BYTES }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        self.acceptor.stop().await;
        self.serving.await.unwrap();
    }
}

pub fn hello(disk: DiskId) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        disk,
        generation: Generation::FIRST,
        disk_bytes: DISK_BYTES,
        session: SessionId::random(),
        acknowledged: None,
    }
}

/// One stream.
pub struct TestHost {
    pub sender: mpsc::Sender<wire::HostFrame>,
    frames: Streaming<wire::ServerFrame>,
    pub credit: Credit,
    pub cut: CutOrdinal,
    pub position: Position,
    pub welcome: Option<Welcome>,
    disk: DiskId,
    chunks: (u64, u64, Vec<u8>),
    pub sent: Close,
    ended: Vec<(CutOrdinal, u64)>,
    acknowledged: u64,
    durable: Option<Durable>,
}

impl TestHost {
    /// Connects and says nothing.
    pub async fn connect(endpoint: &Endpoint, identity: &Identity, disk: DiskId) -> Self {
        let channel = connect(&endpoint.address, endpoint.peer, identity).await.unwrap();
        let (sender, receiver) = mpsc::channel(64);
        let frames =
            ReplicationClient::new(channel).replicate(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self {
            sender,
            frames,
            credit: Credit::new(0),
            cut: CutOrdinal(1),
            position: Epoch::random().start(),
            welcome: None,
            disk,
            chunks: Default::default(),
            sent: Close::default(),
            ended: Vec::new(),
            acknowledged: 0,
            durable: None,
        }
    }

    /// Connects and is welcome.
    pub async fn open(endpoint: &Endpoint, identity: &Identity, disk: DiskId) -> Self {
        Self::open_with(endpoint, identity, hello(disk)).await.unwrap()
    }

    pub async fn open_with(endpoint: &Endpoint, identity: &Identity, hello: Hello) -> Result<Self, Refusal> {
        let mut host = Self::connect(endpoint, identity, hello.disk).await;
        host.send(HostFrame::Hello(hello)).await;
        match host.next().await {
            Some(ServerFrame::Welcome(welcome)) => {
                host.credit = Credit::new(welcome.credit_bytes);
                host.cut = welcome.cut.next();
                host.position = welcome.durable.unwrap_or(host.position);
                host.welcome = Some(welcome);
                Ok(host)
            }
            Some(ServerFrame::Refusal(refusal)) => Err(refusal),
            other => panic!("neither welcome nor refusal: {other:?}"),
        }
    }

    pub async fn send(&self, frame: HostFrame) {
        // A stream that was refused takes no more; what it says is what tests look at.
        let _ = self.sender.send(frame.into()).await;
    }

    /// The next frame; none when the stream ended.
    pub async fn next(&mut self) -> Option<ServerFrame> {
        let frame =
            tokio::time::timeout(Duration::from_secs(60), self.frames.message()).await.expect("an answer in time");
        let frame = ServerFrame::try_from(frame.ok()??).unwrap();
        match &frame {
            ServerFrame::Grant(bytes) => self.credit.grant(*bytes),
            ServerFrame::Durable(durable) => {
                let covered = self.ended.iter().take_while(|(cut, _)| *cut <= durable.cut).count();
                if let Some((_, bytes)) = self.ended.drain(..covered).next_back() {
                    self.credit.acknowledge(bytes - self.acknowledged);
                    self.acknowledged = bytes;
                }
                self.durable = Some(*durable);
            }
            _ => {}
        }
        Some(frame)
    }

    /// Whether nothing comes for a moment.
    pub async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(100), self.frames.message()).await.is_err()
    }

    pub async fn refused(&mut self) -> Refusal {
        loop {
            match self.next().await {
                Some(ServerFrame::Refusal(refusal)) => return refusal,
                Some(_) => {}
                None => panic!("the stream ended without a refusal"),
            }
        }
    }

    pub async fn refused_for(&mut self, reason: RefusalReason) {
        let refusal = self.refused().await;
        assert_eq!(refusal.reason, reason, "{refusal:?}");
        assert!(refusal.message.contains(&self.disk.to_string()), "{refusal:?}");
        assert!(!refusal.help.is_empty());
    }

    pub fn sealed(&self, offset: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let extent = Extent::new(offset, data.len() as u64);
        Sealer::new(ChunkKey::new(self.disk, Generation::FIRST), Compression::Off).seal(&[extent], data, &mut bytes);
        bytes
    }

    /// Sends one sealed chunk of the present cut, within the credit.
    pub async fn write(&mut self, offset: u64, data: &[u8]) {
        let sealed = self.sealed(offset, data);
        let bytes = sealed.len() as u64;
        while self.credit.room() < bytes {
            self.send(HostFrame::Want(bytes - self.credit.room())).await;
            let frame = self.next().await;
            assert!(matches!(frame, Some(ServerFrame::Grant(_) | ServerFrame::Durable(_))), "{frame:?}");
        }
        self.write_sealed(sealed).await;
    }

    /// Sends what claims to be chunks, and counts it.
    pub async fn write_sealed(&mut self, sealed: Vec<u8>) {
        assert!(self.credit.take(sealed.len() as u64));
        self.chunks.0 += 1;
        self.chunks.1 += sealed.len() as u64;
        if let Some(hash) = sealed.get(16..48) {
            self.chunks.2.extend_from_slice(hash);
        }
        self.sent.bytes += sealed.len() as u64;
        self.send(HostFrame::Data(Data { cut: self.cut, chunks: Bytes::from(sealed) })).await;
    }

    pub async fn end(&mut self, kind: CutKind, mark: Option<Mark>) {
        let end = self.cut_end(kind, mark);
        self.end_with(end).await;
    }

    pub async fn end_with(&mut self, end: CutEnd) {
        self.position = end.to;
        self.cut = self.cut.next();
        self.sent.cuts += 1;
        self.chunks = Default::default();
        self.ended.push((end.cut, self.sent.bytes));
        self.send(HostFrame::CutEnd(end)).await;
    }

    /// The end of the present cut. Its position moves on by one record where it may.
    pub fn cut_end(&self, kind: CutKind, mark: Option<Mark>) -> CutEnd {
        let moves = matches!(kind, CutKind::Records | CutKind::ScanEnd);
        let from = self.position;
        let to = Position {
            epoch: from.epoch,
            sequence: Sequence(from.sequence.0 + 1),
            hash: HistoryHash(*blake3::hash(&from.hash.0).as_bytes()),
        };
        CutEnd {
            cut: self.cut,
            kind,
            from,
            to: if moves { to } else { from },
            time: Timestamp(1_000_000_000 * self.cut.0),
            clock_stepped: false,
            chunks: self.chunks.0,
            chunk_bytes: self.chunks.1,
            chunks_hash: *blake3::hash(&self.chunks.2).as_bytes(),
            written_bytes: self.chunks.1,
            mark,
        }
    }

    /// Waits until everything sent so far is acknowledged.
    pub async fn durable(&mut self) -> Durable {
        let last = self.cut.0 - 1;
        loop {
            if let Some(durable) = self.durable.filter(|durable| durable.cut.0 >= last) {
                return durable;
            }
            let frame = self.next().await;
            assert!(matches!(frame, Some(ServerFrame::Durable(_) | ServerFrame::Grant(_))), "{frame:?}");
        }
    }

    pub fn mark(&self, machine: MachineId, disks: Vec<DiskId>, keep: bool) -> Mark {
        Mark {
            id: tidemark_base::MarkId::random(),
            machine,
            disks,
            consistency: tidemark_proto::replication::Consistency::Crash,
            label: String::new(),
            keep,
            time: Timestamp(1_000_000_000 * self.cut.0),
            group: false,
        }
    }
}
