//! A process server in memory: cuts are applied to an image when they are durable, and only then.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tidemark_base::chunk::{ChunkKey, Opener, UnverifiedChunk};
use tidemark_base::compare::{BLOCK_BYTES, BLOCK_HASH_BYTES, CompareKey, PART_BYTES, pieces};
use tidemark_base::disk::is_zero;
use tidemark_base::{Extent, ExtentSet, MarkId, Position, Timestamp};
use tidemark_proto::replication::*;

use super::Random;
use crate::pack::Permit;
use crate::send::link::{Link, LinkError, LinkEvents, LinkStream, Traffic};
use crate::source::SourceIdentity;

type Part = (Extent, Option<Vec<u8>>);

struct Cut {
    end: CutEnd,
    parts: Vec<Part>,
}

/// What a test may make the server do.
pub struct Behaviour {
    pub random: Random,
    /// Each stream is cut after so many frames, at random up to this.
    pub cut_after_frames: Option<u64>,
    /// What was not durable when a stream was cut may be lost.
    pub lose_tail: bool,
    pub standing_credit: u64,
    /// At most this is granted at once; 0 grants nothing.
    pub grant_max: u64,
    /// Frames are kept, with their permits, as a slow network does.
    pub stalled: bool,
    pub refusal: Option<Refusal>,
    /// Nothing becomes durable.
    pub hold_acknowledgements: bool,
    /// Questions are answered later, in any order.
    pub delay_answers: bool,
    pub hold_answers: bool,
    /// From so many bytes on that were asked about, answers are held.
    pub hold_answers_from: Option<u64>,
    /// It says that it holds something, and not what.
    pub lost_cuts: bool,
}

pub struct State {
    identity: SourceIdentity,
    key: ChunkKey,
    pub behaviour: Behaviour,
    stream: u64,
    /// The state at the last durable cut.
    pub image: Vec<u8>,
    pub durable: Option<Position>,
    durable_cut: CutOrdinal,
    durable_time: Timestamp,
    pub scan_open: bool,
    pending: VecDeque<Cut>,
    /// The image at each mark outside scans.
    pub points: HashMap<MarkId, Vec<u8>>,
    pub cuts: Vec<CutEnd>,
    pub received: Option<Position>,
    pub frames_in_open_cut: u64,
    pub data_bytes: u64,
    pub raw_bytes: u64,
    pub zero_bytes: u64,
    pub streams: Vec<Traffic>,
    pub incomplete_cuts: u64,
    pub violations: Vec<String>,
    pub queued_bytes: u64,
    pub queued_bytes_max: u64,
    pub closes: u64,
    pub questions: u64,
    pub asked_bytes: u64,
    /// What cannot be read.
    pub damaged: ExtentSet,
    /// Of the present stream.
    events: Option<Arc<dyn LinkEvents>>,
}

#[derive(Clone)]
pub struct MemoryServer(Arc<(Mutex<State>, Condvar)>);

impl MemoryServer {
    pub fn new(identity: SourceIdentity, seed: u64) -> Self {
        let state = State {
            identity,
            key: ChunkKey::new(identity.disk, identity.generation),
            behaviour: Behaviour {
                random: Random(seed),
                cut_after_frames: None,
                lose_tail: false,
                standing_credit: 64 << 10,
                grant_max: u64::MAX,
                stalled: false,
                refusal: None,
                hold_acknowledgements: false,
                delay_answers: false,
                hold_answers: false,
                hold_answers_from: None,
                lost_cuts: false,
            },
            stream: 0,
            image: vec![0; identity.disk_bytes as usize],
            durable: None,
            durable_cut: CutOrdinal(0),
            durable_time: Timestamp(0),
            scan_open: false,
            pending: VecDeque::new(),
            points: HashMap::new(),
            cuts: Vec::new(),
            received: None,
            frames_in_open_cut: 0,
            data_bytes: 0,
            raw_bytes: 0,
            zero_bytes: 0,
            streams: Vec::new(),
            incomplete_cuts: 0,
            violations: Vec::new(),
            queued_bytes: 0,
            queued_bytes_max: 0,
            closes: 0,
            questions: 0,
            asked_bytes: 0,
            damaged: ExtentSet::new(),
            events: None,
        };
        Self(Arc::new((Mutex::new(state), Condvar::new())))
    }

    pub fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        let result = look(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
        result
    }

    pub fn wait_until(&self, limit: Duration, mut is: impl FnMut(&State) -> bool) -> bool {
        let state = self.0.0.lock().unwrap();
        let (_state, result) = self.0.1.wait_timeout_while(state, limit, |state| !is(state)).unwrap();
        !result.timed_out()
    }

    /// Asks the host for blocks, as a server does that cannot read them; what it has there is gone.
    pub fn lose(&self, extents: &[Extent]) {
        self.with(|state| {
            for extent in extents {
                state.image[extent.offset as usize..extent.end() as usize].fill(0xEE);
                state.damaged.insert(*extent);
            }
            let need = Need { extents: extents.to_vec(), why: NeedReason::Damaged };
            if let Some(events) = &state.events {
                events.frame(ServerFrame::Need(need));
            }
        });
    }

    /// Forgets everything: as if restored from nothing.
    pub fn wipe(&self) {
        self.with(|state| {
            state.image.fill(0);
            state.durable = None;
            state.durable_cut = CutOrdinal(0);
            state.durable_time = Timestamp(0);
            state.scan_open = false;
            state.pending.clear();
            state.points.clear();
        });
    }
}

impl Link for MemoryServer {
    fn open(&self, traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream> {
        let (id, frames_left) = self.with(|state| {
            state.stream += 1;
            state.streams.push(traffic);
            state.events = Some(events.clone());
            let frames = state.behaviour.cut_after_frames.map(|max| state.behaviour.random.below(max) + 3);
            (state.stream, frames)
        });
        Box::new(MemoryStream {
            server: self.clone(),
            id,
            events,
            frames_left,
            credit: Credit::new(0),
            unacknowledged: VecDeque::new(),
            wanted: 0,
            open: None,
            last: None,
            stalled: Vec::new(),
            key: None,
            question: 0,
            answers: Vec::new(),
        })
    }
}

struct MemoryStream {
    server: MemoryServer,
    id: u64,
    events: Arc<dyn LinkEvents>,
    frames_left: Option<u64>,
    credit: Credit,
    unacknowledged: VecDeque<(CutOrdinal, u64)>,
    wanted: u64,
    open: Option<Open>,
    /// Where the last cut of this stream, or the journal, ends.
    last: Option<(CutOrdinal, Option<Position>)>,
    stalled: Vec<(HostFrame, Option<Permit>)>,
    key: Option<CompareKey>,
    question: u64,
    /// Made when their questions came.
    answers: Vec<Differing>,
}

#[derive(Default)]
struct Open {
    parts: Vec<Part>,
    covered: ExtentSet,
    chunks: u64,
    bytes: u64,
    hasher: blake3::Hasher,
}

impl LinkStream for MemoryStream {
    fn send(&mut self, frame: HostFrame, permit: Option<Permit>) -> Result<(), LinkError> {
        let server = self.server.clone();
        server.with(|state| {
            if state.stream != self.id {
                return Err(LinkError::Cut { reason: "superseded".into() });
            }
            if let Some(left) = &mut self.frames_left {
                *left -= 1;
                if *left == 0 {
                    self.server_lost(state);
                    return Err(LinkError::Cut { reason: "the test cut it".into() });
                }
            }
            if state.behaviour.stalled && !matches!(frame, HostFrame::Want(_)) {
                if let HostFrame::Data(data) = &frame {
                    state.queued_bytes += data.chunks.len() as u64;
                    state.queued_bytes_max = state.queued_bytes_max.max(state.queued_bytes);
                }
                self.stalled.push((frame, permit));
                return Ok(());
            }
            if !state.behaviour.stalled {
                for (frame, _permit) in std::mem::take(&mut self.stalled) {
                    self.receive(state, frame);
                }
            }
            self.receive(state, frame);
            self.answer(state);
            Ok(())
        })
    }

    fn finish(&mut self) {
        self.server.clone().with(|state| {
            if state.stream == self.id {
                self.make_durable(state);
                self.events.frame(ServerFrame::Close(Close::default()));
            }
        });
    }
}

impl Drop for MemoryStream {
    fn drop(&mut self) {
        self.server.clone().with(|state| {
            if state.stream == self.id {
                self.server_lost(state);
            }
        });
    }
}

impl MemoryStream {
    /// The stream ended: an open cut never was; what was not durable may be lost.
    fn server_lost(&mut self, state: &mut State) {
        state.stream += 1;
        if self.open.take().is_some() {
            state.incomplete_cuts += 1;
        }
        state.frames_in_open_cut = 0;
        if state.behaviour.lose_tail && state.behaviour.random.below(2) == 0 {
            let keep = state.behaviour.random.below(state.pending.len() as u64 + 1) as usize;
            state.pending.truncate(keep);
        }
        apply(state);
        state.received = state.durable;
    }

    fn violation(&self, state: &mut State, what: String) {
        state.violations.push(what);
        state.stream += 1;
        self.events.closed(LinkError::Protocol { reason: "see the violations".into() });
    }

    fn receive(&mut self, state: &mut State, frame: HostFrame) {
        match frame {
            HostFrame::Hello(hello) => {
                self.key = Some(CompareKey::new(hello.disk, hello.generation, hello.session.0));
                if let Some(refusal) = state.behaviour.refusal.clone() {
                    self.events.frame(ServerFrame::Refusal(refusal));
                    return;
                }
                self.credit = Credit::new(state.behaviour.standing_credit);
                self.last = Some((state.durable_cut, state.durable));
                self.events.frame(ServerFrame::Welcome(Welcome {
                    durable: state.durable.filter(|_| !state.behaviour.lost_cuts),
                    scan_open: state.scan_open,
                    credit_bytes: state.behaviour.standing_credit,
                    cut: state.durable_cut,
                    comparable: state.durable_cut > CutOrdinal(0),
                }));
                // Each stream is told again: one that just ended may have been told last.
                if !state.damaged.is_empty() {
                    let need = Need { extents: state.damaged.iter().collect(), why: NeedReason::Damaged };
                    self.events.frame(ServerFrame::Need(need));
                }
            }
            HostFrame::Want(bytes) => {
                self.wanted = bytes;
                self.grant(state);
            }
            HostFrame::Hashes(hashes) => self.compare(state, hashes),
            HostFrame::Data(data) => self.data(state, data),
            HostFrame::CutEnd(end) => self.cut_end(state, end),
            HostFrame::Close(close) => {
                state.closes += 1;
                if close.cuts == 0 && close.bytes > 0 {
                    self.violation(state, "totals without cuts".into());
                }
            }
        }
    }

    /// The answer is made at once, of everything that came before, and told when it pleases.
    fn compare(&mut self, state: &mut State, hashes: Hashes) {
        // As it would arrive.
        let hashes = Hashes::try_from(wire::Hashes::from(hashes)).unwrap();
        let scan_open = state.pending.iter().fold(state.scan_open, |open, cut| after(open, &cut.end));
        if !scan_open || self.open.is_some() || hashes.question != self.question + 1 {
            return self.violation(state, format!("question {} out of place", hashes.question));
        }
        self.question = hashes.question;
        state.questions += 1;
        state.behaviour.hold_answers |= state.behaviour.hold_answers_from.is_some_and(|from| state.asked_bytes >= from);
        let key = self.key.clone().unwrap();
        let mut head = state.image.clone();
        state.pending.iter().flat_map(|cut| &cut.parts).for_each(|part| write(&mut head, part));
        let of = |extent: Extent| &head[extent.offset as usize..extent.end() as usize];
        let mut runs = Vec::new();
        for run in &hashes.runs {
            state.asked_bytes += run.extent.length;
            let size = if run.claim == Claim::Zeroes { PART_BYTES } else { BLOCK_BYTES };
            for (index, extent) in pieces(run.extent, size).enumerate() {
                let found = match &run.claim {
                    _ if state.damaged.overlapping(extent).next().is_some() => Found::Unknown,
                    Claim::Zeroes if is_zero(of(extent)) => continue,
                    Claim::Zeroes => Found::Unknown,
                    Claim::Hashes(hashes)
                        if hashes[index * BLOCK_HASH_BYTES..][..16] == key.hash(extent, of(extent)) =>
                    {
                        continue;
                    }
                    Claim::Hashes(_) if is_zero(of(extent)) => Found::Zeroes,
                    Claim::Hashes(_) => {
                        let parts = pieces(extent, PART_BYTES).flat_map(|part| key.hash(part, of(part)));
                        Found::Parts(parts.collect::<Vec<u8>>().into())
                    }
                };
                runs.push(DifferingRun { extent, found });
            }
        }
        let answer = Differing { question: hashes.question, runs };
        self.answers.push(Differing::try_from(wire::Differing::from(answer)).unwrap());
        if self.answers.len() > QUESTIONS_MAX {
            self.violation(state, "too many questions".into());
        }
    }

    fn answer(&mut self, state: &mut State) {
        while !state.behaviour.hold_answers && !self.answers.is_empty() {
            let delay = state.behaviour.delay_answers;
            if delay && state.behaviour.random.below(3) == 0 {
                return;
            }
            let index = if delay { state.behaviour.random.below(self.answers.len() as u64) as usize } else { 0 };
            let answer = self.answers.remove(index);
            self.events.frame(ServerFrame::Differing(answer));
        }
    }

    fn grant(&mut self, state: &mut State) {
        while self.wanted > 0 && state.behaviour.grant_max > 0 {
            let grant = self.wanted.min(state.behaviour.grant_max);
            self.wanted -= grant;
            self.credit.grant(grant);
            self.events.frame(ServerFrame::Grant(grant));
        }
    }

    fn data(&mut self, state: &mut State, data: Data) {
        let bytes = data.chunks.len() as u64;
        let next = self.last.map(|(cut, _)| cut.next());
        if !self.credit.take(bytes) || Some(data.cut) != next {
            return self.violation(state, format!("data beyond credit, or of cut {} instead of {next:?}", data.cut));
        }
        state.data_bytes += bytes;
        state.frames_in_open_cut += 1;
        let open = self.open.get_or_insert_default();
        open.bytes += bytes;
        let mut rest = &data.chunks[..];
        let mut opener = Opener::new();
        let mut failed = None;
        while !rest.is_empty() {
            let (chunk, behind) = UnverifiedChunk::split(rest).unwrap();
            rest = behind;
            let chunk = chunk.verify(&state.key, state.identity.disk_bytes, &mut opener).unwrap();
            open.chunks += 1;
            open.hasher.update(&chunk.hash);
            for (extent, data) in chunk.parts() {
                if open.covered.overlapping(extent).next().is_some() {
                    failed = Some(format!("extents of cut {:?} overlap at {extent}", next));
                }
                open.covered.insert(extent);
                match data {
                    Some(data) => state.raw_bytes += data.len() as u64,
                    None => state.zero_bytes += extent.length,
                }
                open.parts.push((extent, data.map(<[u8]>::to_vec)));
            }
        }
        if let Some(failed) = failed {
            self.violation(state, failed);
        }
    }

    fn cut_end(&mut self, state: &mut State, end: CutEnd) {
        // As it would arrive.
        let end = CutEnd::try_from(wire::CutEnd::from(end)).unwrap();
        let open = self.open.take().unwrap_or_default();
        state.frames_in_open_cut = 0;
        let (cut, position) = self.last.unwrap();
        let scan_open = state.pending.iter().fold(state.scan_open, |open, cut| after(open, &cut.end));
        let new_epoch = end.kind == CutKind::ScanStart && end.from == end.from.epoch.start();
        let lost = std::mem::take(&mut state.behaviour.lost_cuts) && end.kind == CutKind::ScanStart;
        if lost {
            // The host may begin with records of long ago; a journal holds their times back.
            state.durable_time = Timestamp(0);
        }
        let follows =
            lost || position == Some(end.from) || (new_epoch && position.is_none_or(|p| p.epoch != end.from.epoch));
        let last_time = state.pending.back().map_or(state.durable_time, |cut| cut.end.time);
        let problem = if end.cut != cut.next() {
            Some("ordinal")
        } else if !follows {
            Some("position")
        } else if (end.chunks, end.chunk_bytes) != (open.chunks, open.bytes) {
            Some("totals")
        } else if end.chunks_hash != *open.hasher.finalize().as_bytes() {
            Some("hash")
        } else if matches!(end.kind, CutKind::Scan | CutKind::ScanEnd) && !scan_open {
            Some("scan without a start")
        } else if end.time < last_time {
            Some("time")
        } else {
            None
        };
        if let Some(problem) = problem {
            return self.violation(state, format!("{problem} of {end:?} after {:?}", self.last));
        }
        self.last = Some((end.cut, Some(end.to)));
        self.unacknowledged.push_back((end.cut, end.chunk_bytes));
        state.received = Some(end.to);
        state.cuts.push(end.clone());
        state.pending.push_back(Cut { end, parts: open.parts });
        if !state.behaviour.hold_acknowledgements && state.behaviour.random.below(3) > 0 {
            self.make_durable(state);
        }
    }

    fn make_durable(&mut self, state: &mut State) {
        if state.pending.is_empty() {
            return;
        }
        apply(state);
        while let Some((_, bytes)) = self.unacknowledged.pop_front_if(|(cut, _)| *cut <= state.durable_cut) {
            self.credit.acknowledge(bytes);
        }
        let position = state.durable.unwrap();
        self.events.frame(ServerFrame::Durable(Durable { cut: state.durable_cut, position }));
        self.grant(state);
    }
}

fn after(scan_open: bool, end: &CutEnd) -> bool {
    match end.kind {
        CutKind::ScanStart => true,
        CutKind::ScanEnd => false,
        CutKind::Records | CutKind::Scan => scan_open,
    }
}

fn write(image: &mut [u8], (extent, data): &Part) {
    let target = &mut image[extent.offset as usize..extent.end() as usize];
    match data {
        Some(data) => target.copy_from_slice(data),
        None => target.fill(0),
    }
}

fn apply(state: &mut State) {
    while let Some(Cut { end, parts }) = state.pending.pop_front() {
        for part in &parts {
            write(&mut state.image, part);
            state.damaged.remove(part.0);
        }
        state.scan_open = after(state.scan_open, &end);
        state.durable = Some(end.to);
        state.durable_cut = end.cut;
        state.durable_time = end.time;
        if let Some(mark) = end.mark
            && !state.scan_open
        {
            state.points.insert(mark.id, state.image.clone());
        }
    }
}

/// Waits for a condition that no one signals, in steps of a condition variable's timeout.
pub fn eventually(limit: Duration, mut is: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    let pair = (Mutex::new(()), Condvar::new());
    while !is() {
        if Instant::now() >= deadline {
            return false;
        }
        let guard = pair.0.lock().unwrap();
        drop(pair.1.wait_timeout(guard, Duration::from_millis(2)).unwrap());
    }
    true
}
