//! The stream's rules, over a journal in memory whose syncs a test can hold.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tidemark_base::{DiskId, Extent, Generation, HostId, Position};
use tidemark_proto::replication::{
    Claim, Close, CutEnd, CutKind, CutOrdinal, Data, Differing, Durable, HashedRun, Hashes, Hello, HostFrame, Need,
    NeedReason, QUESTIONS_MAX, Refusal, RefusalReason, ServerFrame,
};
use tidemark_transport::PeerIdentity;

use super::authorise::Authorisation;
use super::pool::STANDING_BYTES;
use super::testing::{DISK_BYTES, TestHost, TestServer, hello};
use super::{Comparison, Held, POOL_BYTES, Store, Stores, Writer, refusal};
use crate::replica::Needs;

#[derive(Default)]
struct Memory {
    state: Mutex<MemoryState>,
    changed: Condvar,
}

#[derive(Default)]
struct MemoryState {
    disks: HashMap<DiskId, Journal>,
    /// How many syncs may go on; none: all.
    permits: Option<usize>,
    fail_syncs: bool,
    /// Syncs that are waiting.
    held: usize,
    syncs: usize,
    /// Questions are not answered.
    hold_answers: bool,
    needs: HashMap<DiskId, Arc<Needs>>,
}

#[derive(Default, Clone)]
struct Journal {
    open: Vec<u8>,
    cuts: Vec<(CutEnd, Vec<u8>)>,
    durable: usize,
    scan_open: bool,
}

impl Journal {
    fn durable(&self) -> Option<Durable> {
        let (end, _) = self.cuts[..self.durable].last()?;
        Some(Durable { cut: end.cut, position: end.to })
    }
}

struct MemoryStore {
    memory: Arc<Memory>,
    disk: DiskId,
}

struct MemoryWriter(MemoryStore);

struct MemoryStores(Arc<Memory>);

impl Stores for MemoryStores {
    fn open(&self, disk: DiskId, _: &Authorisation) -> Result<Arc<dyn Store>, Refusal> {
        Ok(Arc::new(MemoryStore { memory: self.0.clone(), disk }))
    }
}

impl MemoryStore {
    fn with<T>(&self, work: impl FnOnce(&mut Journal) -> T) -> T {
        let result = work(self.memory.state.lock().unwrap().disks.entry(self.disk).or_default());
        self.memory.changed.notify_all();
        result
    }
}

impl Store for MemoryStore {
    fn attach(&self, _: &Hello) -> Result<(Box<dyn Writer>, Held), Refusal> {
        let held = self.with(|journal| {
            assert!(journal.open.is_empty(), "the stream before this one discarded its incomplete cut");
            journal.durable = journal.cuts.len();
            Held {
                durable: journal.durable().map(|durable| durable.position),
                cut: CutOrdinal(journal.cuts.len() as u64),
                scan_open: journal.scan_open,
                comparable: journal.durable().is_some(),
            }
        });
        let store = MemoryStore { memory: self.memory.clone(), disk: self.disk };
        Ok((Box::new(MemoryWriter(store)), held))
    }

    fn sync(&self) -> Result<Option<Durable>, Refusal> {
        let mut state = self.memory.state.lock().unwrap();
        let covered = state.disks.entry(self.disk).or_default().cuts.len();
        state.held += 1;
        self.memory.changed.notify_all();
        state = self.memory.changed.wait_while(state, |state| state.permits == Some(0)).unwrap();
        state.permits = state.permits.map(|permits| permits - 1);
        state.held -= 1;
        state.syncs += 1;
        if state.fail_syncs {
            let message = format!("disk {}: the journal failed", self.disk);
            return Err(refusal(RefusalReason::StoreFailed, message, "look at the volume"));
        }
        let journal = state.disks.entry(self.disk).or_default();
        journal.durable = journal.durable.max(covered);
        Ok(journal.durable())
    }

    fn needs(&self) -> Option<Arc<Needs>> {
        self.memory.state.lock().unwrap().needs.get(&self.disk).cloned()
    }
}

impl Writer for MemoryWriter {
    fn append(&mut self, _: CutOrdinal, chunks: &[u8]) -> Result<(), Refusal> {
        self.0.with(|journal| journal.open.extend_from_slice(chunks));
        Ok(())
    }

    fn end_cut(&mut self, end: CutEnd) -> Result<(), Refusal> {
        self.0.with(|journal| {
            let data = std::mem::take(&mut journal.open);
            journal.scan_open |= end.kind == CutKind::ScanStart;
            journal.cuts.push((end, data));
        });
        Ok(())
    }
    fn compare(&mut self, hashes: Hashes) -> Result<Comparison, Refusal> {
        let memory = self.0.memory.clone();
        Ok(Box::new(move |cancelled: &dyn Fn() -> bool| {
            let mut state = memory.state.lock().unwrap();
            while state.hold_answers {
                if cancelled() {
                    return None;
                }
                state = memory.changed.wait_timeout(state, Duration::from_millis(5)).unwrap().0;
            }
            Some(nothing_differs(hashes.question))
        }))
    }
}

/// A question that is not held.
fn nothing_differs(question: u64) -> Differing {
    Differing { question, runs: Vec::new() }
}

impl Drop for MemoryWriter {
    fn drop(&mut self) {
        self.0.with(|journal| journal.open.clear());
    }
}

impl Memory {
    fn permit_syncs(&self, permits: Option<usize>) {
        self.state.lock().unwrap().permits = permits;
        self.changed.notify_all();
    }

    /// Until a condition holds.
    async fn wait_until(self: &Arc<Self>, condition: impl Fn(&mut MemoryState) -> bool + Send + 'static) {
        let memory = self.clone();
        let waited = tokio::task::spawn_blocking(move || {
            let state = memory.state.lock().unwrap();
            let limit = Duration::from_secs(60);
            !memory.changed.wait_timeout_while(state, limit, |state| !condition(state)).unwrap().1.timed_out()
        });
        assert!(waited.await.unwrap(), "the condition came in time");
    }

    fn cuts(&self, disk: DiskId) -> Vec<(CutEnd, Vec<u8>)> {
        self.state.lock().unwrap().disks.get(&disk).map(|journal| journal.cuts.clone()).unwrap_or_default()
    }
}

async fn start() -> (TestServer, Arc<Memory>) {
    start_with(POOL_BYTES).await
}

async fn start_with(pool_bytes: u64) -> (TestServer, Arc<Memory>) {
    let memory = Arc::new(Memory::default());
    let stores = Arc::new(MemoryStores(memory.clone()));
    (TestServer::start(move |_| stores, pool_bytes).await, memory)
}

#[tokio::test]
async fn cuts_arrive_in_order_and_close_with_totals() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    let mut expected = Vec::new();
    for cut in 0..20u64 {
        let mut data = Vec::new();
        for chunk in 0..cut % 4 {
            let sealed = host.sealed(chunk << 16, &[cut as u8; 65536]);
            data.extend_from_slice(&sealed);
            host.write(chunk << 16, &[cut as u8; 65536]).await;
        }
        expected.push(data);
        host.end(CutKind::Records, None).await;
        if cut % 7 == 0 {
            assert_eq!(host.durable().await.position, host.position);
        }
    }
    host.durable().await;
    host.send(HostFrame::Close(host.sent)).await;
    assert_eq!(host.next().await, Some(ServerFrame::Close(host.sent)));
    assert_eq!(host.next().await, None);
    assert_eq!(memory.cuts(disk).into_iter().map(|(_, data)| data).collect::<Vec<_>>(), expected);
    server.stop().await;
}

#[tokio::test]
async fn nothing_is_acknowledged_before_a_sync_that_covers_it() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    memory.permit_syncs(Some(0));
    host.write(0, &[1; 512]).await;
    host.end(CutKind::Records, None).await;
    memory.wait_until(|state| state.held == 1).await;
    // These end while the sync is under way, so it does not cover them.
    for _ in 0..10 {
        host.end(CutKind::Records, None).await;
    }
    memory.wait_until(move |state| state.disks[&disk].cuts.len() == 11).await;
    assert!(host.is_silent().await);
    memory.permit_syncs(Some(1));
    let first = host.next().await;
    assert!(matches!(first, Some(ServerFrame::Durable(Durable { cut: CutOrdinal(1), .. }))), "{first:?}");
    assert!(host.is_silent().await);
    memory.permit_syncs(None);
    assert_eq!(host.durable().await.cut, CutOrdinal(11));
    assert_eq!(memory.state.lock().unwrap().syncs, 2, "one sync for the ten that waited");
    server.stop().await;
}

#[tokio::test]
async fn a_failed_sync_refuses_the_stream_and_acknowledges_nothing() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    memory.state.lock().unwrap().fail_syncs = true;
    host.end(CutKind::Records, None).await;
    assert!(
        matches!(host.next().await, Some(ServerFrame::Refusal(refusal)) if refusal.reason == RefusalReason::StoreFailed)
    );
    server.stop().await;
}

#[tokio::test]
async fn a_slow_sync_of_one_disk_does_not_hold_up_another() {
    let (server, memory) = start().await;
    let (identity, slow) = server.agent_with_disk();
    let (other_identity, other) = server.agent_with_disk();
    let mut slow_host = TestHost::open(&server.endpoint, &identity, slow).await;
    let mut host = TestHost::open(&server.endpoint, &other_identity, other).await;
    memory.permit_syncs(Some(0));
    slow_host.end(CutKind::Records, None).await;
    memory.wait_until(|state| state.held == 1).await;
    host.end(CutKind::Records, None).await;
    memory.wait_until(|state| state.held == 2).await;
    memory.permit_syncs(None);
    host.durable().await;
    slow_host.durable().await;
    server.stop().await;
}

#[tokio::test]
async fn who_may_write_what() {
    let (server, _memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let (other_identity, _) = server.agent_with_disk();
    let process_server = server.authority.issue(server.endpoint.peer, &[]).unwrap();
    let unknown = DiskId::random();
    for (identity, hello, reason) in [
        (&identity, hello(unknown), RefusalReason::UnknownDisk),
        (&other_identity, hello(disk), RefusalReason::NotAuthorised),
        (&process_server, hello(disk), RefusalReason::NotAuthorised),
        (&identity, Hello { generation: Generation(2), ..hello(disk) }, RefusalReason::Generation),
        (&identity, Hello { disk_bytes: 2 * DISK_BYTES, ..hello(disk) }, RefusalReason::SizeChanged),
        (&identity, Hello { version: 9, ..hello(disk) }, RefusalReason::Version),
    ] {
        let named = hello.disk.to_string();
        let refusal = TestHost::open_with(&server.endpoint, identity, hello).await.err().expect("a refusal");
        assert_eq!(refusal.reason, reason, "{refusal:?}");
        assert!(refusal.message.contains(&named) && !refusal.help.is_empty(), "{refusal:?}");
    }
    TestHost::open(&server.endpoint, &identity, disk).await;
    server.stop().await;
}

#[tokio::test]
async fn authorisation_is_checked_again_while_a_stream_runs() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    host.end(CutKind::Records, None).await;
    host.durable().await;
    let PeerIdentity::Agent(agent) = identity.peer() else { unreachable!() };
    let newer = Authorisation { generation: Generation(2), ..server.authorisation(agent) };
    server.authorisations.authorise(disk, newer).unwrap();
    host.refused_for(RefusalReason::Generation).await;
    let newer_hello = Hello { generation: Generation(2), ..hello(disk) };
    let mut host = TestHost::open_with(&server.endpoint, &identity, newer_hello).await.unwrap();
    server.authorisations.deauthorise(disk).unwrap();
    host.end(CutKind::Records, None).await;
    host.refused_for(RefusalReason::UnknownDisk).await;
    assert_eq!(memory.cuts(disk).len(), 1, "nothing was committed after the authorisation was withdrawn");
    server.stop().await;
}

#[tokio::test]
async fn a_newer_session_fences_the_older_for_good() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let old = hello(disk);
    let mut first = TestHost::open_with(&server.endpoint, &identity, old.clone()).await.unwrap();
    first.write(0, &[1; 4096]).await;
    let mut second = TestHost::open(&server.endpoint, &identity, disk).await;
    first.refused_for(RefusalReason::Fenced).await;
    second.write(0, &[2; 512]).await;
    second.end(CutKind::Records, None).await;
    second.durable().await;
    // The incomplete cut of the first is nowhere.
    let cuts = memory.cuts(disk);
    assert_eq!((cuts.len(), cuts[0].1.len()), (1, second.sealed(0, &[2; 512]).len()));
    let refusal = TestHost::open_with(&server.endpoint, &identity, old).await.err().expect("a refusal");
    assert_eq!(refusal.reason, RefusalReason::Fenced);
    second.end(CutKind::Records, None).await;
    second.durable().await;
    server.stop().await;
}

#[tokio::test]
async fn a_session_that_lost_its_connection_comes_back() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let hello = hello(disk);
    let mut host = TestHost::open_with(&server.endpoint, &identity, hello.clone()).await.unwrap();
    host.end(CutKind::Records, None).await;
    let durable = host.durable().await;
    host.write(0, &[1; 4096]).await;
    drop(host);
    let mut host = TestHost::open_with(&server.endpoint, &identity, hello).await.unwrap();
    let welcome = host.welcome.clone().unwrap();
    assert_eq!((welcome.durable, welcome.cut), (Some(durable.position), durable.cut));
    host.end(CutKind::Records, None).await;
    host.durable().await;
    let cuts = memory.cuts(disk);
    assert_eq!((cuts.len(), cuts[1].1.len()), (2, 0), "half a cut was sent and is gone");
    server.stop().await;
}

#[tokio::test]
async fn more_than_the_credit_is_refused() {
    let (server, _memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    let data = Data { cut: host.cut, chunks: vec![0; STANDING_BYTES as usize + 1].into() };
    host.send(HostFrame::Data(data)).await;
    host.refused_for(RefusalReason::Protocol).await;
    server.stop().await;
}

#[tokio::test]
async fn a_frame_that_is_too_large_is_refused() {
    let (server, _memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    for bytes in [(1 << 20) + 1, 3 << 20] {
        let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
        host.send(HostFrame::Data(Data { cut: host.cut, chunks: vec![0; bytes].into() })).await;
        host.refused_for(RefusalReason::Protocol).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn frames_out_of_order_are_refused() {
    let (server, _memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    host.send(HostFrame::Hello(hello(disk))).await;
    host.refused_for(RefusalReason::Protocol).await;
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    host.cut = CutOrdinal(7);
    host.end(CutKind::Records, None).await;
    host.refused_for(RefusalReason::Gap).await;
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    host.send(HostFrame::Close(Close { cuts: 3, bytes: 5 })).await;
    host.refused_for(RefusalReason::Protocol).await;
    let mut host = TestHost::connect(&server.endpoint, &identity, disk).await;
    host.send(HostFrame::Want(1)).await;
    assert_eq!(host.refused().await.reason, RefusalReason::Protocol);
    server.stop().await;
}

#[tokio::test]
async fn a_cut_may_be_larger_than_the_pool() {
    let (server, memory) = start_with(2 << 20).await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    for chunk in 0..256 {
        host.write(chunk << 16, &[chunk as u8; 65536]).await;
    }
    host.end(CutKind::Records, None).await;
    host.durable().await;
    assert!(memory.cuts(disk)[0].1.len() > 16 << 20);
    // What was granted comes back: a later cut finds the same room.
    for chunk in 0..64 {
        host.write(chunk << 16, &[chunk as u8; 65536]).await;
    }
    host.end(CutKind::Records, None).await;
    host.durable().await;
    server.stop().await;
}

#[tokio::test]
async fn a_stop_refuses_streams_and_ends() {
    let (server, _memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    let stopped = tokio::spawn(server.stop());
    assert_eq!(host.refused().await.reason, RefusalReason::Stopping);
    drop(host);
    tokio::time::timeout(Duration::from_secs(60), stopped).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_hundred_idle_streams_cost_no_threads() {
    let (server, _memory) = start().await;
    let channel_agent = HostId::random();
    let identity = server.authority.issue(PeerIdentity::Agent(channel_agent), &[]).unwrap();
    let mut hosts = Vec::new();
    for _ in 0..100 {
        let disk = DiskId::random();
        server.authorisations.authorise(disk, server.authorisation(channel_agent)).unwrap();
        hosts.push(TestHost::open(&server.endpoint, &identity, disk).await);
    }
    for host in &mut hosts {
        host.end(CutKind::Records, None).await;
    }
    for host in &mut hosts {
        let position: Position = host.durable().await.position;
        assert_eq!(position, host.position);
    }
    assert_eq!(
        server.acceptor.0.workers.available_permits(),
        2 * std::thread::available_parallelism().unwrap().get().max(2)
    );
    assert_eq!(server.acceptor.0.pool.available_bytes(), POOL_BYTES as i64, "an idle stream holds nothing of the pool");
    server.stop().await;
}

fn question(number: u64) -> HostFrame {
    let run = HashedRun { extent: Extent::new(0, 65536), claim: Claim::Hashes(vec![1; 16].into()) };
    HostFrame::Hashes(Hashes { question: number, runs: vec![run] })
}

#[tokio::test]
async fn questions_hold_up_neither_cuts_nor_other_disks_and_are_bounded() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let (other_identity, other) = server.agent_with_disk();
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    memory.state.lock().unwrap().hold_answers = true;
    for number in 1..=QUESTIONS_MAX as u64 {
        host.send(question(number)).await;
    }
    host.write(0, &[1; 4096]).await;
    host.end(CutKind::Records, None).await;
    host.durable().await;
    let mut other_host = TestHost::open(&server.endpoint, &other_identity, other).await;
    other_host.end(CutKind::Records, None).await;
    other_host.durable().await;
    memory.state.lock().unwrap().hold_answers = false;
    memory.changed.notify_all();
    let mut answered = std::collections::BTreeSet::new();
    while answered.len() < QUESTIONS_MAX {
        match host.next().await {
            Some(ServerFrame::Differing(differing)) => assert!(answered.insert(differing.question)),
            frame => panic!("{frame:?}"),
        }
    }
    // There is room for as many again, and not for one more.
    memory.state.lock().unwrap().hold_answers = true;
    for number in 1..=QUESTIONS_MAX as u64 + 1 {
        host.send(question(QUESTIONS_MAX as u64 + number)).await;
    }
    host.refused_for(RefusalReason::Protocol).await;
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    host.send(question(2)).await;
    host.refused_for(RefusalReason::Protocol).await;
    server.stop().await;
}

#[tokio::test]
async fn what_a_replica_needs_is_told_to_every_stream_until_it_came() {
    let (server, memory) = start().await;
    let (identity, disk) = server.agent_with_disk();
    let needs = Needs::new(DISK_BYTES);
    memory.state.lock().unwrap().needs.insert(disk, needs.clone());
    needs.ask([Extent::new(512, 512)]);
    let need = |offset| {
        let extents = vec![Extent::new(offset, 65536)];
        Some(ServerFrame::Need(Need { extents, why: NeedReason::Damaged }))
    };
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    assert_eq!(host.next().await, need(0));
    needs.ask([Extent::new(1 << 20, 4096)]);
    assert_eq!(host.next().await, need(1 << 20));
    assert!(host.is_silent().await, "each is told once");
    needs.came(Extent::new(0, 65536));
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    assert_eq!(host.next().await, need(1 << 20));
    // The same damage again, after it was healed.
    needs.ask([Extent::new(0, 512)]);
    assert_eq!(host.next().await, need(0));
    needs.came(Extent::new(0, DISK_BYTES));
    let mut host = TestHost::open(&server.endpoint, &identity, disk).await;
    assert!(host.is_silent().await);
    server.stop().await;
}
