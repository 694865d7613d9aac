//! One stream, from Hello to Close or Refusal.
//!
//! The task never waits for a disk and never waits for its client to read: frames go to the lane, replies leave when
//! there is room for them. So what was sent within the credit is always taken off the connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tidemark_base::DiskId;
use tidemark_proto::replication::{
    Close, Credit, CutOrdinal, Data, Durable, Hashes, Hello, HostFrame, NEED_EXTENTS_MAX, Need, NeedReason,
    PROTOCOL_VERSION, QUESTIONS_MAX, Refusal, RefusalReason, ServerFrame, Welcome,
};
use tidemark_transport::messages::Pieces;
use tidemark_transport::{Messages, PeerInfo};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::compare::{Compares, Comparison};
use super::lane::{CutGate, Lane, Work};
use super::pool::{STANDING_BYTES, Share};
use super::progress::Progress;
use super::{Disk, Inner, SessionGuard, fenced, refusal};
use crate::replica::Needs;

/// A stream whose first frame is not there by then is ended.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last frame may wait for the client to read it.
const LAST_FRAME_TIMEOUT: Duration = Duration::from_secs(5);
/// Cuts received and not durable, after which frames are left on the connection until some are.
pub const CUTS_PENDING_MAX: u64 = 256;
/// Replies that are made before the ones before them left.
const OUTBOX_FRAMES_MAX: usize = 8;

/// Of encoded frames.
type Outbound = mpsc::Sender<Bytes>;

/// How a stream ended.
enum End {
    /// Both sides said Close.
    Closed(Close),
    /// The connection went away.
    Cut(String),
    Refused(Refusal),
}

pub async fn run(inner: Arc<Inner>, peer: PeerInfo, mut inbound: Messages, outbound: Outbound) {
    let end = match first_frame(&inner, &peer, &mut inbound).await {
        Ok(hello) => {
            let disk = hello.disk;
            let end = match Stream::begin(&inner, peer, hello, outbound.clone()).await {
                Ok(mut stream) => {
                    tracing::info!(%disk, peer = %peer.address, "replication stream begins");
                    let end = stream.serve(&mut inbound).await;
                    stream.finish().await;
                    end
                }
                Err(refusal) => End::Refused(refusal),
            };
            match &end {
                End::Closed(_) => tracing::info!(%disk, "replication stream closed"),
                End::Cut(reason) => tracing::info!(%disk, reason, "replication stream was cut"),
                End::Refused(refusal) if refusal.reason == RefusalReason::Stopping => {}
                End::Refused(refusal) => {
                    inner.refused.add(disk, refusal.reason);
                    tracing::warn!(%disk, peer = %peer.address, reason = ?refusal.reason, message = refusal.message, "replication stream refused");
                }
            }
            end
        }
        Err(end) => end,
    };
    let last = match end {
        End::Closed(close) => ServerFrame::Close(close),
        End::Refused(refusal) => ServerFrame::Refusal(refusal),
        End::Cut(_) => return,
    };
    let _ = tokio::time::timeout(LAST_FRAME_TIMEOUT, outbound.send(last.encode())).await;
}

async fn first_frame(inner: &Inner, peer: &PeerInfo, inbound: &mut Messages) -> Result<Hello, End> {
    let protocol = |message: String| {
        tracing::warn!(peer = %peer.address, message, "replication stream refused");
        End::Refused(refusal(RefusalReason::Protocol, message, "use the same version of tidemark on both ends"))
    };
    let frame = tokio::select! {
        () = inner.stop.cancelled() => return Err(End::Refused(stopping())),
        frame = tokio::time::timeout(HELLO_TIMEOUT, inbound.next()) => frame,
    };
    match frame {
        Err(_) => Err(protocol(format!("no hello within {} s", HELLO_TIMEOUT.as_secs()))),
        Ok(Err(status)) => Err(End::Cut(status.to_string())),
        Ok(Ok(None)) => Err(End::Cut("it ended before hello".to_owned())),
        Ok(Ok(Some(frame))) => match HostFrame::decode(frame) {
            Ok(HostFrame::Hello(hello)) => Ok(hello),
            Ok(_) => Err(protocol("the first frame is no hello".to_owned())),
            Err(error) => Err(protocol(format!("the first frame is no hello: {error}"))),
        },
    }
}

struct Stream {
    inner: Arc<Inner>,
    peer: PeerInfo,
    hello: Hello,
    disk: Arc<Disk>,
    needs: Option<Arc<Needs>>,
    lane: Lane,
    progress: Arc<Progress>,
    session: SessionGuard,
    credit: Credit,
    share: Share,
    /// As [`Credit`] counts it, for what the pool gets back.
    granted_until: u64,
    acknowledged_bytes: u64,
    /// The cut that data belongs to.
    cut: CutOrdinal,
    compares: Compares,
    /// The last question, and how many wait for an answer.
    question: u64,
    unanswered: usize,
    received: Close,
    closing: bool,
    outbound: Outbound,
    /// Filled only when it is empty, so it holds a few frames at most.
    outbox: VecDeque<ServerFrame>,
}

impl Stream {
    async fn begin(inner: &Arc<Inner>, peer: PeerInfo, hello: Hello, outbound: Outbound) -> Result<Self, Refusal> {
        if hello.version != PROTOCOL_VERSION {
            return Err(refusal(
                RefusalReason::Version,
                format!("disk {}: version {} of the protocol is not spoken here", hello.disk, hello.version),
                "use the same version of tidemark on both ends",
            ));
        }
        let authorisation = inner.admit(&peer, hello.disk, hello.generation, hello.disk_bytes)?;
        let store = blocking(hello.disk, {
            let (stores, disk) = (inner.stores.clone(), hello.disk);
            move || stores.open(disk, &authorisation)
        })
        .await?;
        let disk = inner.disk(hello.disk, store.clone());
        let session = disk.take_over(hello.session).await?;
        // Asked again: the table may have changed while the stream before this one ended.
        inner.admit(&peer, hello.disk, hello.generation, hello.disk_bytes)?;
        let needs = store.needs();
        let (writer, held) = blocking(hello.disk, {
            let hello = hello.clone();
            move || store.attach(&hello)
        })
        .await?;
        let progress = Arc::new(Progress::default());
        disk.pending.set_listener(Some(progress.clone()));
        if let Some(needs) = &needs {
            let notify = progress.notify.clone();
            needs.begin(Arc::new(move || notify.notify_one()));
        }
        let compares = Compares::new(inner.compares.clone(), progress.clone());
        let gate =
            Gate { inner: inner.clone(), peer, hello: hello.clone(), disk: disk.clone(), compares: compares.clone() };
        let welcome = Welcome {
            durable: held.durable,
            scan_open: held.scan_open,
            credit_bytes: STANDING_BYTES,
            cut: held.cut,
            comparable: held.comparable,
        };
        Ok(Self {
            inner: inner.clone(),
            peer,
            needs,
            lane: Lane::new(writer, progress.clone(), Box::new(gate), inner.workers.clone()),
            share: inner.pool.join(peer.address, progress.notify.clone()),
            progress,
            session,
            credit: Credit::new(STANDING_BYTES),
            granted_until: 0,
            acknowledged_bytes: 0,
            cut: held.cut.next(),
            compares,
            question: 0,
            unanswered: 0,
            received: Close::default(),
            closing: false,
            outbound,
            outbox: VecDeque::from([ServerFrame::Welcome(welcome)]),
            hello,
            disk,
        })
    }

    async fn serve(&mut self, inbound: &mut Messages) -> End {
        let mut authorisations = self.inner.authorisations.changes();
        let stop = self.inner.stop.clone();
        let notify = self.progress.notify.clone();
        let outbound = self.outbound.clone();
        loop {
            if let Some(end) = self.collect() {
                return end;
            }
            let may_read = !self.closing && self.received.cuts - self.progress.acknowledged().0 < CUTS_PENDING_MAX;
            tokio::select! {
                biased;
                () = self.session.fence.cancelled() => {
                    // Ended because the table changed, or by a newer stream: the host acts on which of them it was.
                    return End::Refused(self.admit().err().unwrap_or_else(|| fenced(self.hello.disk)));
                }
                () = stop.cancelled() => return End::Refused(stopping()),
                Ok(()) = authorisations.changed() => {
                    if let Err(refusal) = self.admit() {
                        return End::Refused(refusal);
                    }
                }
                permit = outbound.reserve(), if !self.outbox.is_empty() => {
                    let Ok(permit) = permit else { return End::Cut("the host left".to_owned()) };
                    if let Some(frame) = self.outbox.pop_front() {
                        permit.send(frame.encode());
                    }
                }
                () = notify.notified() => {}
                frame = inbound.next(), if may_read => {
                    if let Err(end) = self.receive(frame) {
                        return end;
                    }
                }
            }
        }
    }

    fn admit(&self) -> Result<(), Refusal> {
        self.inner.admit(&self.peer, self.hello.disk, self.hello.generation, self.hello.disk_bytes).map(drop)
    }

    /// Turns progress into frames, and says when there is nothing more to wait for.
    fn collect(&mut self) -> Option<End> {
        if let Some(refusal) = self.progress.take_refusal() {
            return Some(End::Refused(refusal));
        }
        let appended = self.progress.appended_bytes();
        self.share.keep(self.granted_until.saturating_sub(appended));
        if !self.outbox.is_empty() {
            return None;
        }
        // Grants first, then acknowledgements, and the credit is moved as the host will move its own.
        let granted = self.share.take_assigned();
        if granted > 0 {
            self.credit.grant(granted);
            self.granted_until = self.granted_until.max(self.acknowledged_bytes) + granted;
            self.outbox.push_back(ServerFrame::Grant(granted));
        }
        if let Some(acknowledgement) = self.progress.acknowledge() {
            self.credit.acknowledge(acknowledgement.bytes);
            self.acknowledged_bytes += acknowledgement.bytes;
            let Durable { cut, position } = acknowledgement.durable;
            self.outbox.push_back(ServerFrame::Durable(Durable { cut, position }));
        }
        while self.outbox.len() < OUTBOX_FRAMES_MAX
            && let Some(answer) = self.progress.take_answer()
        {
            self.unanswered -= 1;
            self.outbox.push_back(ServerFrame::Differing(answer));
        }
        let needed = self.needs.as_ref().map(|needs| needs.take(NEED_EXTENTS_MAX)).unwrap_or_default();
        if !needed.is_empty() {
            self.outbox.push_back(ServerFrame::Need(Need { extents: needed, why: NeedReason::Damaged }));
        }
        let done = self.closing && self.outbox.is_empty() && self.lane.is_idle();
        let (cuts, bytes) = self.progress.acknowledged();
        (done && cuts == self.received.cuts).then_some(End::Closed(Close { cuts, bytes }))
    }

    fn receive(&mut self, frame: Result<Option<Pieces>, Status>) -> Result<(), End> {
        let frame = match frame {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(End::Cut("it ended without close".to_owned())),
            // A message above the limit.
            Err(status) if status.code() == Code::OutOfRange => {
                return Err(self.protocol(format!("a frame is too large: {}", status.message())));
            }
            Err(status) => return Err(End::Cut(status.to_string())),
        };
        match HostFrame::decode(frame).map_err(|error| self.protocol(error.to_string()))? {
            HostFrame::Data(data) => self.receive_data(data),
            HostFrame::CutEnd(end) => {
                if end.cut != self.cut {
                    return Err(self.gap(end.cut));
                }
                self.cut = end.cut.next();
                self.received.cuts += 1;
                self.lane.push(Work::CutEnd(Box::new(end)));
                Ok(())
            }
            HostFrame::Want(bytes) => {
                self.share.want(bytes);
                Ok(())
            }
            HostFrame::Close(close) if close == self.received => {
                self.closing = true;
                Ok(())
            }
            HostFrame::Close(close) => Err(self.protocol(format!(
                "the host sent {} cuts and {} bytes, {} and {} came",
                close.cuts, close.bytes, self.received.cuts, self.received.bytes
            ))),
            HostFrame::Hello(_) => Err(self.protocol("a second hello".to_owned())),
            HostFrame::Hashes(hashes) => self.receive_question(hashes),
        }
    }

    fn receive_data(&mut self, data: Data) -> Result<(), End> {
        if data.cut != self.cut {
            return Err(self.gap(data.cut));
        }
        let bytes = data.chunks.len() as u64;
        if !self.credit.take(bytes) {
            return Err(self.protocol(format!("{bytes} bytes of data exceed the credit of {}", self.credit.room())));
        }
        self.received.bytes += bytes;
        self.lane.push(Work::Data { cut: data.cut, chunks: data.chunks });
        Ok(())
    }

    fn receive_question(&mut self, hashes: Hashes) -> Result<(), End> {
        if hashes.question != self.question + 1 {
            return Err(self.protocol(format!("question {} came after question {}", hashes.question, self.question)));
        }
        if self.unanswered == QUESTIONS_MAX {
            return Err(self.protocol(format!("more than {QUESTIONS_MAX} questions are under way")));
        }
        self.question = hashes.question;
        self.unanswered += 1;
        self.lane.push(Work::Compare(hashes));
        Ok(())
    }

    fn protocol(&self, message: String) -> End {
        End::Refused(refusal(
            RefusalReason::Protocol,
            format!("disk {}: {message}", self.hello.disk),
            "use the same version of tidemark on both ends",
        ))
    }

    fn gap(&self, cut: CutOrdinal) -> End {
        End::Refused(refusal(
            RefusalReason::Gap,
            format!("disk {}: a frame of cut {cut} came where cut {} is expected", self.hello.disk, self.cut),
            "the host connects again and continues from what is durable here",
        ))
    }

    /// Nothing of this stream is appended after this.
    async fn finish(self) {
        self.lane.close().await;
        self.compares.end().await;
        self.disk.pending.set_listener(None);
        if let Some(needs) = &self.needs {
            needs.end();
        }
    }
}

/// Asked by the lane before each commit record.
struct Gate {
    inner: Arc<Inner>,
    peer: PeerInfo,
    hello: Hello,
    disk: Arc<Disk>,
    compares: Compares,
}

impl CutGate for Gate {
    fn may_commit(&self) -> Result<(), Refusal> {
        self.inner.admit(&self.peer, self.hello.disk, self.hello.generation, self.hello.disk_bytes).map(drop)
    }

    fn ended(&self) {
        self.inner.committer.request(&self.disk);
    }

    fn compare(&self, comparison: Comparison) {
        self.compares.start(comparison);
    }
}

fn stopping() -> Refusal {
    refusal(RefusalReason::Stopping, "the process server stops", "the host connects again by itself")
}

async fn blocking<T: Send + 'static>(
    disk: DiskId,
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(refusal(
            RefusalReason::StoreFailed,
            format!("disk {disk}: opening its journal failed: {error}"),
            "report this, with the process server's log",
        ))
    })
}
