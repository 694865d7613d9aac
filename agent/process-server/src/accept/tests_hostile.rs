//! A host that was taken over: it may write one disk, and says whatever it likes. Over real replicas: each frame is
//! refused by name or changes nothing, what was durable stays, and an honest stream goes on behind it.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_base::chunk::{ChunkKey, Compression, HEADER_BYTES, Sealer};
use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::{DiskId, Extent, Generation, Position, Timestamp};
use tidemark_proto::replication::{
    Claim, CutEnd, CutKind, CutOrdinal, Data, HashedRun, Hashes, HostFrame, QUESTION_BLOCKS_MAX, QUESTION_RUNS_MAX,
    RefusalReason, ServerFrame, wire,
};
use tidemark_transport::{Identity, STREAM_WINDOW_BYTES};
use tokio::sync::watch;

use super::pool::STANDING_BYTES;
use super::testing::{DISK_BYTES, TestHost, TestServer, hello};
use super::{POOL_BYTES, ReplicaStores};
use crate::journal::Limits;
use crate::points::Retention;
use crate::replica::{ReplicaInfo, ReplicaSet};

const FIRST: [u8; 4096] = [1; 4096];

/// A process server with one replica, which holds a scanned disk.
struct Rig {
    server: TestServer,
    set: Arc<ReplicaSet>,
    identity: Identity,
    disk: DiskId,
    durable: (CutOrdinal, Position),
}

impl Rig {
    async fn start() -> Self {
        let mut made = None;
        let server = TestServer::start(
            |storage| {
                let limits = Limits { reserve_bytes: 0, ..Limits::default() };
                let set = Arc::new(ReplicaSet::open(storage, limits).unwrap().0);
                made = Some(set.clone());
                ReplicaStores::new(set, Arc::new(watch::channel(0).0))
            },
            POOL_BYTES,
        )
        .await;
        let set = made.unwrap();
        let (identity, disk) = server.agent_with_disk();
        let (machine, generation) = (server.machine, Generation::FIRST);
        set.create(ReplicaInfo { disk, machine, generation, disk_bytes: DISK_BYTES }).unwrap();
        let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
        host.end(CutKind::ScanStart, None).await;
        host.write(0, &FIRST).await;
        let mark = host.mark(server.machine, vec![disk], true);
        host.end(CutKind::ScanEnd, Some(mark)).await;
        let durable = host.durable().await;
        Self { server, set, identity, disk, durable: (durable.cut, durable.position) }
    }

    async fn host(&self) -> TestHost {
        let host = TestHost::open(&self.server.endpoint, &self.identity, self.disk).await;
        let welcome = host.welcome.clone().unwrap();
        assert_eq!((welcome.cut, welcome.durable), (self.durable.0, Some(self.durable.1)), "what was durable stays");
        host
    }

    /// What the newest cut shows at the front of the disk.
    fn front(&self) -> Vec<u8> {
        let replica = self.set.get(self.disk).unwrap();
        let mut read = vec![0; 2 * FIRST.len()];
        replica.view(replica.durable().cut).unwrap().read_at(0, &mut read).unwrap();
        read
    }

    fn shows(&self, second: u8) {
        assert!(self.front() == [FIRST, [second; 4096]].concat(), "the newest cut shows what was sent to stay");
    }

    /// The stream is refused for this, and then nothing is lost and an honest stream goes on.
    async fn refused(&mut self, host: &mut TestHost, reason: RefusalReason) {
        host.refused_for(reason).await;
        self.goes_on().await;
    }

    async fn goes_on(&mut self) {
        let mut host = self.host().await;
        self.shows(0);
        host.end(CutKind::Records, None).await;
        let durable = host.durable().await;
        assert_eq!(durable.cut, self.durable.0.next());
        self.durable = (durable.cut, durable.position);
    }
}

fn sealed_for(key: ChunkKey, compression: Compression, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::new();
    Sealer::new(key, compression).seal(&[Extent::new(offset, data.len() as u64)], data, &mut sealed);
    sealed
}

fn own_key(rig: &Rig) -> ChunkKey {
    ChunkKey::new(rig.disk, Generation::FIRST)
}

#[tokio::test]
async fn data_that_comes_twice_is_caught_by_the_totals() {
    let mut rig = Rig::start().await;
    let mut host = rig.host().await;
    let sealed = host.sealed(4096, &[2; 4096]);
    host.write_sealed(sealed.clone()).await;
    // Once more, and the end of the cut counts it once.
    host.send(HostFrame::Data(Data { cut: host.cut, chunks: sealed.into() })).await;
    host.end(CutKind::Records, None).await;
    rig.refused(&mut host, RefusalReason::Damaged).await;
    // A host that counts both sent the same twice: the disk is the same.
    let mut host = rig.host().await;
    for _ in 0..2 {
        host.write(4096, &[2; 4096]).await;
    }
    host.end(CutKind::Records, None).await;
    host.durable().await;
    rig.shows(2);
    rig.server.stop().await;
}

#[tokio::test]
async fn chunks_in_another_order_than_the_cut_says_are_refused() {
    let mut rig = Rig::start().await;
    let mut host = rig.host().await;
    let (first, second) = (host.sealed(4096, &[2; 4096]), host.sealed(4096, &[3; 4096]));
    let mut hashes = blake3::Hasher::new();
    for sealed in [&second, &first] {
        hashes.update(&sealed[16..48]);
    }
    host.write_sealed(first).await;
    host.write_sealed(second).await;
    let end = host.cut_end(CutKind::Records, None);
    host.end_with(CutEnd { chunks_hash: *hashes.finalize().as_bytes(), ..end }).await;
    rig.refused(&mut host, RefusalReason::Damaged).await;
    // The end of a cut before its data: the data is of no cut that is open.
    let mut host = rig.host().await;
    let cut = host.cut;
    host.end(CutKind::Records, None).await;
    let late = host.sealed(4096, &[2; 4096]);
    host.send(HostFrame::Data(Data { cut, chunks: late.into() })).await;
    host.refused_for(RefusalReason::Gap).await;
    let welcome = TestHost::open(&rig.server.endpoint, &rig.identity, rig.disk).await.welcome.unwrap();
    assert!(welcome.cut == cut || welcome.cut == rig.durable.0, "the cut that ended is whole or not there");
    rig.shows(0);
    rig.server.stop().await;
}

#[tokio::test]
async fn the_end_of_a_cut_that_comes_twice_is_refused() {
    let mut rig = Rig::start().await;
    let mut host = rig.host().await;
    let end = host.cut_end(CutKind::Records, None);
    host.end_with(end.clone()).await;
    let durable = host.durable().await;
    rig.durable = (durable.cut, durable.position);
    host.send(HostFrame::CutEnd(end)).await;
    rig.refused(&mut host, RefusalReason::Gap).await;
    rig.server.stop().await;
}

#[tokio::test]
async fn a_cut_that_was_made_is_not_made_again() {
    let mut rig = Rig::start().await;
    let (old_cut, old_position) = rig.durable;
    rig.goes_on().await;
    // As it was on the wire, in a new stream …
    let mut host = rig.host().await;
    host.cut = old_cut;
    host.write(4096, &[9; 4096]).await;
    host.end(CutKind::Records, None).await;
    rig.refused(&mut host, RefusalReason::Gap).await;
    // … and with a new number and the old position.
    let mut host = rig.host().await;
    host.write(4096, &[9; 4096]).await;
    let end = host.cut_end(CutKind::Records, None);
    host.end_with(CutEnd { from: old_position, ..end }).await;
    rig.refused(&mut host, RefusalReason::Gap).await;
    rig.server.stop().await;
}

#[tokio::test]
async fn chunks_of_another_disk_or_generation_are_refused() {
    let mut rig = Rig::start().await;
    let (_, other) = rig.server.agent_with_disk();
    for key in [ChunkKey::new(other, Generation::FIRST), ChunkKey::new(rig.disk, Generation(2))] {
        let mut host = rig.host().await;
        host.write_sealed(sealed_for(key, Compression::Off, 4096, &[9; 4096])).await;
        host.end(CutKind::Records, None).await;
        rig.refused(&mut host, RefusalReason::Damaged).await;
    }
    // A mark that does not name the disk that carries it.
    let mut host = rig.host().await;
    let mark = host.mark(rig.server.machine, vec![other], true);
    host.end(CutKind::Records, Some(mark)).await;
    rig.refused(&mut host, RefusalReason::Protocol).await;
    rig.server.stop().await;
}

#[tokio::test]
async fn a_chunk_that_lies_about_its_size_unfolds_to_nothing() {
    let mut rig = Rig::start().await;
    let whole = vec![0x55; 64 << 10];
    let sectors_at = HEADER_BYTES + 8;
    for (raw_bytes, sectors) in [
        // It unfolds to more than it says, to less, and to more than there is.
        (512u32, 1u32),
        (256 << 10, 512),
        (u32::MAX, 128),
        (!511, u32::MAX),
    ] {
        let mut sealed = sealed_for(own_key(&rig), Compression::Level(1), 0, &whole);
        assert!(sealed.len() < 4096);
        sealed[4..8].copy_from_slice(&raw_bytes.to_le_bytes());
        sealed[sectors_at..sectors_at + 4].copy_from_slice(&sectors.to_le_bytes());
        let mut host = rig.host().await;
        host.write_sealed(sealed).await;
        host.end(CutKind::Records, None).await;
        rig.refused(&mut host, RefusalReason::Damaged).await;
    }
    // Beyond the end of the disk, and where the end of an extent has no number.
    for offset in [DISK_BYTES, u64::MAX - 511 - 4096, u64::MAX - 511] {
        let mut sealed = sealed_for(own_key(&rig), Compression::Off, 0, &[9; 4096]);
        sealed[HEADER_BYTES..sectors_at].copy_from_slice(&offset.to_le_bytes());
        let mut host = rig.host().await;
        host.write_sealed(sealed).await;
        rig.refused(&mut host, RefusalReason::Damaged).await;
    }
    rig.server.stop().await;
}

#[tokio::test]
async fn the_end_of_a_cut_that_lies_about_its_chunks_is_refused() {
    let mut rig = Rig::start().await;
    let lies: [fn(CutEnd) -> CutEnd; 7] = [
        |end| CutEnd { chunks: end.chunks + 1, ..end },
        |end| CutEnd { chunks: u64::MAX, ..end },
        |end| CutEnd { chunk_bytes: end.chunk_bytes - 1, ..end },
        |end| CutEnd { chunk_bytes: u64::MAX, ..end },
        |end| CutEnd { chunks_hash: [7; 32], ..end },
        |end| CutEnd { chunks: 0, chunk_bytes: 0, ..end },
        |end| CutEnd { chunks: 0, chunk_bytes: 0, chunks_hash: *blake3::hash(&[]).as_bytes(), ..end },
    ];
    for lie in lies {
        let mut host = rig.host().await;
        host.write(4096, &[9; 4096]).await;
        let end = lie(host.cut_end(CutKind::Records, None));
        host.end_with(end).await;
        rig.refused(&mut host, RefusalReason::Damaged).await;
    }
    rig.server.stop().await;
}

#[tokio::test]
async fn figures_and_times_without_sense_harm_nothing() {
    let mut rig = Rig::start().await;
    for _ in 0..3 {
        let mut host = rig.host().await;
        let mut mark = host.mark(rig.server.machine, vec![rig.disk], false);
        mark.time = Timestamp(u64::MAX);
        let end = host.cut_end(CutKind::Records, Some(mark));
        host.end_with(CutEnd { written_bytes: u64::MAX, time: Timestamp(u64::MAX), ..end }).await;
        let durable = host.durable().await;
        rig.durable = (durable.cut, durable.position);
    }
    let now = Timestamp::now();
    rig.set.maintain(rig.server.machine, &Retention::default(), now, &Stop::new()).unwrap();
    assert!(!rig.set.points(rig.server.machine).unwrap().all().is_empty());
    rig.goes_on().await;
    // Found again as well: the figures are read from the journal.
    let (set, failures) = ReplicaSet::open(rig.set.storage().clone(), Limits::default()).unwrap();
    assert!(failures.is_empty());
    assert_eq!(set.get(rig.disk).unwrap().durable().cut, rig.durable.0.0);
    rig.server.stop().await;
}

#[tokio::test]
async fn questions_without_sense_are_refused() {
    let mut rig = Rig::start().await;
    let run = |offset, length, hashes: usize| wire::HashedRun { offset, length, hashes: vec![1; hashes].into() };
    let blocks = QUESTION_BLOCKS_MAX as u64 + 1;
    for runs in [
        vec![],
        (0..=QUESTION_RUNS_MAX as u64).map(|at| run(at << 17, 512, 0)).collect(),
        vec![run(0, blocks << 16, blocks as usize * 16)],
        // Hashes for more, and for less, than is asked about; and nearly a whole frame of them.
        vec![run(0, 65536, 32)],
        vec![run(0, 65536, 15)],
        vec![run(0, 65536, 1 << 20)],
        vec![run(0, !511, 16)],
        vec![run(!511, 65536, 16)],
        vec![run(0, 0, 0)],
        vec![run(65536, 65536, 16), run(0, 65536, 16)],
    ] {
        let mut host = rig.host().await;
        let body = Some(wire::host_frame::Body::Hashes(wire::Hashes { question: 1, runs }));
        host.sender.send(wire::HostFrame { body }).await.unwrap();
        rig.refused(&mut host, RefusalReason::Protocol).await;
    }
    // One that could be, but no scan is open.
    let question = |extent| {
        let claim = Claim::Hashes(Bytes::from(vec![1; 16]));
        HostFrame::Hashes(Hashes { question: 1, runs: vec![HashedRun { extent, claim }] })
    };
    let mut host = rig.host().await;
    host.send(question(Extent::new(0, 65536))).await;
    rig.refused(&mut host, RefusalReason::Protocol).await;
    // In a scan, beyond the end of the disk.
    let mut host = rig.host().await;
    host.end(CutKind::ScanStart, None).await;
    host.durable().await;
    host.send(question(Extent::new(DISK_BYTES, 65536))).await;
    host.refused_for(RefusalReason::Protocol).await;
    rig.server.stop().await;
}

#[tokio::test]
async fn two_streams_of_one_session_do_not_write_together() {
    let mut rig = Rig::start().await;
    let hello = hello(rig.disk);
    let open = async |rig: &Rig| TestHost::open_with(&rig.server.endpoint, &rig.identity, hello.clone()).await.unwrap();
    let mut first = open(&rig).await;
    first.write(4096, &[8; 4096]).await;
    let mut second = open(&rig).await;
    // What the first sends now goes nowhere, whatever it is.
    first.end(CutKind::Records, None).await;
    first.refused_for(RefusalReason::Fenced).await;
    assert_eq!(second.welcome.clone().unwrap().cut, rig.durable.0, "half a cut was sent and is gone");
    second.write(0, &FIRST).await;
    second.end(CutKind::Records, None).await;
    let durable = second.durable().await;
    rig.durable = (durable.cut, durable.position);
    rig.goes_on().await;
    rig.server.stop().await;
}

#[tokio::test]
async fn many_small_frames_do_not_get_past_the_credit() {
    let mut rig = Rig::start().await;
    let mut host = rig.host().await;
    let sealed = host.sealed(4096, &[9; 4096]);
    let frames = STANDING_BYTES as usize / sealed.len() + 1;
    for _ in 0..frames {
        host.send(HostFrame::Data(Data { cut: host.cut, chunks: sealed.clone().into() })).await;
    }
    rig.refused(&mut host, RefusalReason::Protocol).await;
    rig.server.stop().await;
}

#[tokio::test]
async fn who_wants_everything_gets_no_more_than_a_window() {
    let mut rig = Rig::start().await;
    let mut host = rig.host().await;
    for _ in 0..100 {
        host.send(HostFrame::Want(u64::MAX)).await;
    }
    let mut granted = 0;
    while let Ok(Some(frame)) = tokio::time::timeout(std::time::Duration::from_millis(200), host.next()).await {
        let ServerFrame::Grant(bytes) = frame else { panic!("{frame:?}") };
        granted += bytes;
    }
    assert!(granted > 0 && granted + STANDING_BYTES <= u64::from(STREAM_WINDOW_BYTES), "{granted}");
    drop(host);
    rig.goes_on().await;
    rig.server.stop().await;
}

/// Streams that say nothing, as many as they let a host have: the next one is told why not, another host is let in, and one
/// that ended makes room.
#[tokio::test]
async fn a_host_that_opens_streams_without_end_keeps_only_itself_out() {
    let rig = Rig::start().await;
    let endpoint = &rig.server.endpoint;
    let channel = tidemark_transport::connect(&endpoint.address, endpoint.peer, &rig.identity).await.unwrap();
    let open = || {
        let mut client = wire::replication_client::ReplicationClient::new(channel.clone());
        async move {
            let (sender, receiver) = tokio::sync::mpsc::channel(1);
            let frames = client.replicate(tokio_stream::wrappers::ReceiverStream::new(receiver)).await?;
            Ok::<_, tonic::Status>((sender, frames.into_inner()))
        }
    };
    let mut streams = Vec::new();
    let refusal = loop {
        match open().await {
            Ok(stream) => streams.push(stream),
            Err(refusal) => break refusal,
        }
        assert!(streams.len() <= super::PEER_STREAMS_MAX, "nobody counts");
    };
    assert_eq!(refusal.code(), tonic::Code::ResourceExhausted);
    assert!(refusal.message().contains("only one agent"), "{refusal}");
    let (other, disk) = rig.server.agent_with_disk();
    rig.set
        .create(ReplicaInfo {
            disk,
            machine: rig.server.machine,
            generation: Generation::FIRST,
            disk_bytes: DISK_BYTES,
        })
        .unwrap();
    let mut host = TestHost::open(endpoint, &other, disk).await;
    host.end(CutKind::ScanStart, None).await;
    host.durable().await;
    // The server ends a stream whose host is gone; until it saw that, the next one may be refused once more.
    streams.truncate(streams.len() / 2);
    let room = tokio::time::timeout(std::time::Duration::from_secs(60), async {
        while open().await.is_err() {
            tokio::task::yield_now().await;
        }
    });
    assert!(room.await.is_ok(), "a stream that ended gives its place back");
}
