//! The work of a master target: passes, rounds, the undo.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tidemark_base::bits::PART_BYTES;
use tidemark_base::chunk::{ChunkKey, Compression, Opener, SEALED_BYTES_MAX, Sealer, UnverifiedChunk};
use tidemark_base::compare::{CompareKey, pieces};
use tidemark_base::disk::{Allocation, Disk, is_zero};
use tidemark_base::storage::{OpenMode, StorageFile};
use tidemark_base::sync::{Condvar, Mutex};
use tidemark_base::{DiskId, Extent, Generation, ServerId, Timestamp};

use tidemark_proto::failback::wire::{BeginRound, BlocksRequest, EndRound, Round, RoundDisk, RunsRequest, Scope};
use tidemark_proto::failback::{BLOCKS_BYTES_MAX, Method, Stage};
use tidemark_proto::replication::SessionId;

use super::source::{Source, SourceFactory};
use super::undo::{Undo, damaged};
use super::{Spool, Target, Wanted};
use crate::Host;
use crate::capture::HomeDisk;
use crate::protected::ProtectedDisk;

/// How far the home disks are behind a machine that writes.
const ROUND_INTERVAL: Duration = Duration::from_secs(5);
/// After what did not work.
const RETRY: Duration = Duration::from_secs(3);
/// Questions under way: a MiB each.
const PIPELINE: usize = 8;
/// While more than that is missing, passes go on without freezing the machine's disks, so many times.
const UNFROZEN_BYTES: u64 = 64 << 20;
const UNFROZEN_PASSES_MAX: u32 = 4;
const SPOOL: &str = "round";
/// How often a first pass notes how far it is: each note syncs the disks.
const NOTES_A_PASS: u64 = 16;
const NOTE_BYTES_MIN: u64 = 1 << 20;
const NOTE_BYTES_MAX: u64 = 64 << 20;

/// Rings when there is something new to do.
#[derive(Default)]
pub struct Wake {
    rung: Mutex<bool>,
    changed: Condvar,
    stopped: AtomicBool,
}

impl Wake {
    pub fn ring(&self) {
        *self.rung.lock().expect("no panic while held") = true;
        self.changed.notify_all();
    }

    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.ring();
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Waits until it rings, at most for `limit`.
    fn wait(&self, limit: Option<Duration>) {
        let rung = self.rung.lock().expect("no panic while held");
        let mut rung = match limit {
            Some(limit) => self.changed.wait_timeout_while(rung, limit, |rung| !*rung).expect("no panic while held").0,
            None => self.changed.wait_while(rung, |rung| !*rung).expect("no panic while held"),
        };
        *rung = false;
    }
}

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error("{message}")]
    Said { message: String, help: String },
    #[error("the process server does not answer: {0}")]
    Source(String),
    #[error("what came from the process server does not hold: {0}")]
    Content(String),
    #[error("{what}: {source}")]
    Disk { what: &'static str, source: io::Error },
    /// Stopped, or something else is wanted.
    #[error("it was interrupted")]
    Interrupted,
}

impl StepError {
    fn help(&self) -> &str {
        match self {
            StepError::Said { help, .. } => help,
            StepError::Source(_) => {
                "it is tried again every few seconds; see that the process server runs and can be reached"
            }
            StepError::Content(_) => {
                "it is tried again; if it stays so, look at the network and at both ends' versions"
            }
            StepError::Disk { .. } => "look at the medium and its free room; it goes on by itself",
            StepError::Interrupted => "",
        }
    }
}

fn disk_error(what: &'static str) -> impl Fn(io::Error) -> StepError {
    move |source| StepError::Disk { what, source }
}

/// What comes after a step.
enum Next {
    Again,
    Wait(Option<Duration>),
}

/// A home disk that is written.
struct Home {
    disk: Arc<ProtectedDisk>,
    writer: Box<dyn HomeDisk>,
    undo: Undo,
}

/// Content for a home disk; `None`: zeroes.
type Change = (Extent, Option<Vec<u8>>);

pub struct Worker {
    target: Arc<Target>,
    host: Arc<Host>,
    factory: SourceFactory,
    source: Option<(ServerId, String, Arc<dyn Source>)>,
    homes: Vec<Home>,
    session: [u8; 16],
    unfrozen_passes: u32,
}

impl Worker {
    pub fn new(target: Arc<Target>, host: Arc<Host>, factory: SourceFactory) -> Self {
        let session = SessionId::random().0;
        Self { target, host, factory, source: None, homes: Vec::new(), session, unfrozen_passes: 0 }
    }

    pub fn run(mut self) {
        while !self.target.wake.is_stopped() {
            let step = self.step();
            let problem = match &step {
                Ok(_) | Err(StepError::Interrupted) => None,
                Err(error) => Some((error.to_string(), error.help().to_owned())),
            };
            {
                let mut progress = self.target.progress.lock().expect("no panic while held");
                if let (Some((problem, help)), true) = (&problem, progress.problem != problem) {
                    tracing::warn!(machine = %self.target.machine, problem, help, "the home disks do not follow");
                }
                progress.problem = problem;
            }
            match step {
                Ok(Next::Again) | Err(StepError::Interrupted) => {}
                Ok(Next::Wait(limit)) => self.target.wake.wait(limit),
                Err(_) => {
                    // The disks may be attached anew, the connection made anew.
                    self.homes.clear();
                    self.target.wake.wait(Some(RETRY));
                }
            }
        }
    }

    fn step(&mut self) -> Result<Next, StepError> {
        let state = self.target.state();
        match state.stage {
            Stage::Idle | Stage::Undone | Stage::Finished => {
                self.homes.clear();
                return Ok(Next::Wait(None));
            }
            Stage::Undoing => {
                self.open_homes()?;
                return self.undo();
            }
            Stage::Syncing | Stage::Consistent => self.open_homes()?,
        }
        if let Some(spool) = &state.spool {
            self.apply_spool(spool)?;
            return Ok(Next::Again);
        }
        if (state.stage, state.wanted) == (Stage::Consistent, Wanted::TakeOver) {
            self.change(|state| state.stage = Stage::Finished)?;
            return Ok(Next::Again);
        }
        self.round()?;
        let state = self.target.state();
        Ok(match (state.stage, state.wanted) {
            (Stage::Consistent, Wanted::Sync) => Next::Wait(Some(ROUND_INTERVAL)),
            (Stage::Consistent, _) => Next::Wait(Some(RETRY)),
            _ => Next::Again,
        })
    }

    fn open_homes(&mut self) -> Result<(), StepError> {
        let said = |message: String, help: &str| StepError::Said { message, help: help.to_owned() };
        let machine = self.host.machine(self.target.machine).map_err(|_| {
            said("the home disks are not attached".to_owned(), "see `tidemark status`, and the agent's log for why")
        })?;
        let spec = machine.spec();
        if !spec.fenced || !spec.paused {
            return Err(said(
                format!("machine {} may be on at home", spec.name),
                "it is kept from its disks when its agent is told so; ask for the reprotect again",
            ));
        }
        if self
            .source
            .as_ref()
            .is_none_or(|(id, address, _)| *id != spec.server.server || *address != spec.server.address)
        {
            let source = (self.factory)(spec.server.server, &spec.server.address);
            self.source = Some((spec.server.server, spec.server.address.clone(), source));
        }
        let disks: Vec<Arc<ProtectedDisk>> = machine.disks().collect();
        if disks.len() != spec.disks.len() {
            return Err(said("not all home disks are attached".to_owned(), "see the agent's log for why"));
        }
        let is_open = self.homes.len() == disks.len()
            && self.homes.iter().zip(&disks).all(|(home, disk)| Arc::ptr_eq(&home.disk, disk));
        if !is_open {
            let durable = self.target.state().undo;
            self.homes.clear();
            for disk in disks {
                let (id, bytes) = (disk.identity.disk, disk.identity.disk_bytes);
                let synced = durable.get(&id).copied().unwrap_or(0);
                let undo = Undo::open(&*self.target.storage, id, bytes, synced);
                let undo = undo.map_err(disk_error("what the home disks had cannot be kept"))?;
                let writer = machine.home(&disk).map_err(disk_error("a home disk cannot be opened"))?;
                self.homes.push(Home { disk, writer, undo });
            }
            self.note_kept();
        }
        Ok(())
    }

    fn note_kept(&self) {
        let kept = self.homes.iter().map(|home| home.undo.kept_bytes()).sum();
        self.target.progress.lock().expect("no panic while held").kept_bytes = kept;
    }

    fn check_wanted(&self) -> Result<(), StepError> {
        let state = self.target.state();
        let is_over = state.stage == Stage::Undoing || state.wanted == Wanted::TakeOver;
        match self.target.wake.is_stopped() || is_over {
            true => Err(StepError::Interrupted),
            false => Ok(()),
        }
    }

    fn source(&self) -> Arc<dyn Source> {
        self.source.as_ref().expect("homes are open").2.clone()
    }

    // ---- rounds

    fn round(&mut self) -> Result<(), StepError> {
        let state = self.target.state();
        let source = self.source();
        let behind = self.target.progress.lock().expect("no panic while held").behind_bytes;
        let is_first = !state.whole;
        let is_spooled = state.stage == Stage::Consistent && !is_first;
        let is_unfrozen = !is_spooled && behind > UNFROZEN_BYTES && self.unfrozen_passes < UNFROZEN_PASSES_MAX;
        let frozen = !is_first && !is_unfrozen;
        let scope = match state.method {
            _ if !is_first => Scope::Behind,
            Method::Delta => Scope::Changed,
            Method::Compare | Method::Full => Scope::All,
        };
        if is_first && state.stage == Stage::Consistent {
            self.change(|state| state.stage = Stage::Syncing)?;
        }
        let nothing = BTreeMap::new();
        let done = if is_first { &state.done } else { &nothing };
        let begin = BeginRound {
            machine: self.target.machine.to_vec(),
            failover: state.failover.as_bytes().to_vec(),
            disks: self.homes.iter().map(|home| round_disk(home, done)).collect(),
            session: self.session.to_vec(),
            scope: scope.into(),
            frozen,
        };
        let round = source.begin(begin).map_err(StepError::Source)?;
        {
            let mut progress = self.target.progress.lock().expect("no panic while held");
            progress.total_bytes = round.disks.iter().map(|disk| disk.bytes).sum();
            progress.done_bytes = 0;
        }
        let compares = !(is_first && state.method == Method::Full);
        let worked = match is_spooled {
            true => self.spool(&round, compares),
            false => self.pass(&round, compares, frozen, is_first),
        };
        let end =
            EndRound { round: round.round, failover: state.failover.as_bytes().to_vec(), durable: worked.is_ok() };
        // One that is not ended is given up by the next.
        let ended = source.end(end);
        worked?;
        let ended = ended.map_err(StepError::Source)?;
        self.unfrozen_passes = if frozen { 0 } else { self.unfrozen_passes + 1 };
        self.target.progress.lock().expect("no panic while held").behind_bytes = ended.behind_bytes;
        Ok(())
    }

    /// Straight onto the disks, which are a mix until a pass of one instant ends.
    fn pass(&mut self, round: &Round, compares: bool, frozen: bool, is_first: bool) -> Result<(), StepError> {
        let total: u64 = round.disks.iter().map(|disk| disk.bytes).sum();
        let note_every = is_first.then(|| (total / NOTES_A_PASS).clamp(NOTE_BYTES_MIN, NOTE_BYTES_MAX));
        let counts = self.pull(round, compares, &mut Sink::Disks, note_every)?;
        self.flush()?;
        let undo = self.homes.iter().map(|home| (home.disk.identity.disk, home.undo.bytes())).collect();
        self.change(|state| {
            counts.add_to(state);
            state.whole = true;
            state.done.clear();
            state.undo = undo;
            if frozen || round.stopped {
                state.stage = stage_after(state.wanted, round.stopped);
                state.consistent_at = Some(Timestamp(round.time_ns));
            }
        })
    }

    /// The round as a whole first, so that the disks are at one instant or at the next.
    fn spool(&mut self, round: &Round, compares: bool) -> Result<(), StepError> {
        if round.disks.iter().all(|disk| disk.bytes == 0) {
            return self.change(|state| {
                state.consistent_at = Some(Timestamp(round.time_ns));
                state.stage = stage_after(state.wanted, round.stopped);
            });
        }
        let failed = disk_error("a round cannot be spooled");
        let file = self.target.storage.open(SPOOL, OpenMode::OpenOrCreate).map_err(&failed)?;
        file.set_bytes(0).and_then(|()| self.target.storage.sync_folder("")).map_err(&failed)?;
        let mut sink = Sink::Spool { file, bytes: 0 };
        let counts = self.pull(round, compares, &mut sink, None)?;
        let Sink::Spool { file, bytes } = sink else { unreachable!("it was made one") };
        file.sync().map_err(failed)?;
        let generations = self.homes.iter().map(|home| (home.disk.identity.disk, home.disk.identity.generation));
        let spool =
            Spool { bytes, at: Timestamp(round.time_ns), generations: generations.collect(), last: round.stopped };
        self.change(|state| {
            counts.add_to(state);
            state.spool = Some(spool.clone());
        })?;
        self.apply_spool(&spool)
    }

    fn apply_spool(&mut self, spool: &Spool) -> Result<(), StepError> {
        let failed = disk_error("a spooled round cannot be read");
        let file = self.target.storage.open(SPOOL, OpenMode::Read).map_err(&failed)?;
        let (mut at, mut buffer) = (0, vec![0; 16 + SEALED_BYTES_MAX]);
        let (mut changes, mut waiting): (Vec<Change>, Option<DiskId>) = (Vec::new(), None);
        let mut opener = Opener::new();
        while at < spool.bytes {
            let length = ((spool.bytes - at) as usize).min(buffer.len());
            file.read_at(at, &mut buffer[..length]).map_err(&failed)?;
            let not_whole = || failed(damaged(SPOOL, at));
            let (disk, chunk) = buffer[..length].split_first_chunk::<16>().ok_or_else(not_whole)?;
            let disk = DiskId::from_bytes(*disk);
            let (chunk, _) = UnverifiedChunk::split(chunk).map_err(|_| not_whole())?;
            let bytes = 16 + chunk.sealed_bytes() as u64;
            let disk_bytes = self.home(disk)?.disk.identity.disk_bytes;
            let generation = *spool.generations.get(&disk).ok_or_else(not_whole)?;
            let chunk =
                chunk.verify(&ChunkKey::new(disk, generation), disk_bytes, &mut opener).map_err(|_| not_whole())?;
            if waiting.is_some_and(|waiting| waiting != disk)
                || batch_bytes(&changes) >= PIPELINE as u64 * BLOCKS_BYTES_MAX
            {
                self.write(waiting.unwrap_or(disk), std::mem::take(&mut changes))?;
            }
            waiting = Some(disk);
            changes.extend(chunk.parts().map(|(extent, data)| (extent, data.map(<[u8]>::to_vec))));
            at += bytes;
        }
        if let Some(disk) = waiting {
            self.write(disk, changes)?;
        }
        self.flush()?;
        let undo = self.homes.iter().map(|home| (home.disk.identity.disk, home.undo.bytes())).collect();
        self.change(|state| {
            state.undo = undo;
            state.spool = None;
            state.consistent_at = Some(spool.at);
            state.stage = stage_after(state.wanted, spool.last);
        })
    }

    /// Everything of a round that is not the same here. After each `note_every` bytes it is noted how far that is.
    fn pull(
        &mut self,
        round: &Round,
        compares: bool,
        sink: &mut Sink,
        note_every: Option<u64>,
    ) -> Result<Counts, StepError> {
        let mut unnoted = 0;
        let mut counts = Counts { rounds: 1, ..Counts::default() };
        let (source, failover) = (self.source(), self.target.state().failover.as_bytes().to_vec());
        let disks: Vec<DiskId> = self.homes.iter().map(|home| home.disk.identity.disk).collect();
        for disk in disks {
            let mut from = 0;
            loop {
                self.check_wanted()?;
                let asked = RunsRequest { round: round.round, failover: failover.clone(), disk: disk.to_vec(), from };
                let reply = source.runs(asked).map_err(StepError::Source)?;
                let disk_bytes = self.home(disk)?.disk.identity.disk_bytes;
                let (mut windows, mut reached) = (Vec::new(), 0);
                for run in reply.runs {
                    reached = run.offset.saturating_add(run.length);
                    let extent = Extent::new(run.offset, run.length);
                    if extent.is_empty() || run.offset.checked_add(run.length).is_none_or(|end| end > disk_bytes) {
                        return Err(StepError::Content(format!("a run of {extent} on a disk of {disk_bytes} bytes")));
                    }
                    for window in pieces(extent, BLOCKS_BYTES_MAX) {
                        unnoted += window.length;
                        if run.zeroes {
                            self.zeroes(disk, window, sink)?;
                            self.done(window.length);
                        } else {
                            windows.push(window);
                        }
                        if windows.len() == PIPELINE {
                            self.exchange(round, disk, std::mem::take(&mut windows), compares, sink, &mut counts)?;
                        }
                        // Zeroes overtake the blocks that were not asked for yet.
                        if windows.is_empty() && note_every.is_some_and(|every| unnoted >= every) {
                            self.note_done(disk, window.end())?;
                            unnoted = 0;
                        }
                    }
                }
                self.exchange(round, disk, windows, compares, sink, &mut counts)?;
                if note_every.is_some_and(|every| unnoted >= every) {
                    self.note_done(disk, reached)?;
                    unnoted = 0;
                }
                match reply.next {
                    0 => break,
                    next if next > from => from = next,
                    next => return Err(StepError::Content(format!("runs go on at {next} after {from}"))),
                }
            }
            if note_every.is_some() {
                self.note_done(disk, self.home(disk)?.disk.identity.disk_bytes)?;
            }
        }
        Ok(counts)
    }

    /// A first pass that is interrupted goes on here. What the machine wrote since the failover comes again whatever is noted.
    fn note_done(&mut self, disk: DiskId, until: u64) -> Result<(), StepError> {
        self.flush()?;
        let undo = self.homes.iter().map(|home| (home.disk.identity.disk, home.undo.bytes())).collect();
        self.change(|state| {
            let done = state.done.entry(disk).or_default();
            *done = (*done).max(until / PART_BYTES * PART_BYTES);
            state.undo = undo;
        })
    }

    fn done(&self, bytes: u64) {
        self.target.progress.lock().expect("no panic while held").done_bytes += bytes;
    }

    /// What reads as zeroes there: nothing crosses.
    fn zeroes(&mut self, disk: DiskId, window: Extent, sink: &mut Sink) -> Result<(), StepError> {
        let home = self.home(disk)?;
        let failed = disk_error("a home disk cannot be read");
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = window.offset;
        while at < window.end() {
            let (length, kind) = home.disk.disk.allocation(at).map_err(&failed)?;
            let found = Extent::new(at, length.min(window.end() - at));
            at = found.end();
            if kind == Allocation::Hole {
                continue;
            }
            let mut content = vec![0; found.length as usize];
            home.disk.disk.read_at(found.offset, &mut content).map_err(&failed)?;
            for part in pieces(found, PART_BYTES) {
                if is_zero(&content[(part.offset - found.offset) as usize..][..part.length as usize]) {
                    continue;
                }
                match extents.last_mut() {
                    Some(last) if last.end() == part.offset => last.length += part.length,
                    _ => extents.push(part),
                }
            }
        }
        match sink {
            Sink::Disks => self.write(disk, extents.into_iter().map(|extent| (extent, None)).collect()),
            Sink::Spool { .. } => {
                let generation = home.disk.identity.generation;
                let mut sealer = Sealer::new(ChunkKey::new(disk, generation), Compression::Off);
                for extent in extents {
                    let mut chunk = Vec::new();
                    sealer.seal_zeroes(&[extent], &mut chunk);
                    sink.append(disk, &chunk)?;
                }
                Ok(())
            }
        }
    }

    /// Asks for windows of a disk, and takes what is different.
    fn exchange(
        &mut self,
        round: &Round,
        disk: DiskId,
        windows: Vec<Extent>,
        compares: bool,
        sink: &mut Sink,
        counts: &mut Counts,
    ) -> Result<(), StepError> {
        if windows.is_empty() {
            return Ok(());
        }
        self.check_wanted()?;
        let failover = self.target.state().failover;
        let home = self.home(disk)?;
        let generation = home.disk.identity.generation;
        let disk_bytes = home.disk.identity.disk_bytes;
        let key = CompareKey::new(disk, generation, self.session);
        let mut asked = Vec::new();
        for window in &windows {
            let mut hashes = Vec::new();
            if compares {
                let mut content = vec![0; window.length as usize];
                let read = home.disk.disk.read_at(window.offset, &mut content);
                read.map_err(disk_error("a home disk cannot be read"))?;
                for part in pieces(*window, PART_BYTES) {
                    let data = &content[(part.offset - window.offset) as usize..][..part.length as usize];
                    hashes.extend_from_slice(&key.hash(part, data));
                }
                counts.compared_bytes += window.length;
            }
            asked.push(BlocksRequest {
                round: round.round,
                failover: failover.as_bytes().to_vec(),
                disk: disk.to_vec(),
                offset: window.offset,
                length: window.length,
                hashes,
            });
        }
        let answers = self.source().blocks(asked).map_err(StepError::Source)?;
        let chunk_key = ChunkKey::new(disk, generation);
        let mut opener = Opener::new();
        let mut changes: Vec<Change> = Vec::new();
        for (window, answer) in windows.iter().zip(&answers) {
            let mut rest = &answer.chunks[..];
            counts.wire_bytes += rest.len() as u64;
            while !rest.is_empty() {
                let of = |error: tidemark_base::chunk::ChunkError| StepError::Content(format!("at {window}: {error}"));
                let (chunk, behind) = UnverifiedChunk::split(rest).map_err(of)?;
                let chunk = chunk.verify(&chunk_key, disk_bytes, &mut opener).map_err(of)?;
                for (extent, data) in chunk.parts() {
                    if !window.contains(&extent) {
                        return Err(StepError::Content(format!("{extent} came for {window}")));
                    }
                    counts.received_bytes += data.map_or(0, |data| data.len() as u64);
                    if matches!(sink, Sink::Disks) {
                        changes.push((extent, data.map(<[u8]>::to_vec)));
                    }
                }
                sink.append(disk, &rest[..rest.len() - behind.len()])?;
                rest = behind;
            }
        }
        self.write(disk, changes)?;
        self.done(windows.iter().map(|window| window.length).sum());
        Ok(())
    }

    // ---- the home disks

    fn home(&self, disk: DiskId) -> Result<&Home, StepError> {
        self.homes.iter().find(|home| home.disk.identity.disk == disk).ok_or_else(|| not_home(disk))
    }

    /// One batch: kept, synced, written.
    fn write(&mut self, disk: DiskId, changes: Vec<Change>) -> Result<(), StepError> {
        if changes.is_empty() {
            return Ok(());
        }
        let home = self.homes.iter_mut().find(|home| home.disk.identity.disk == disk).ok_or_else(|| not_home(disk))?;
        let failed = disk_error("what the home disk had cannot be kept");
        for (extent, _) in &changes {
            home.undo.keep(&*home.disk.disk, *extent).map_err(&failed)?;
        }
        if !tidemark_base::sabotage::is("undo-sync") {
            home.undo.sync().map_err(failed)?;
        }
        for (extent, data) in &changes {
            home.writer.put(*extent, data.as_deref()).map_err(disk_error("a home disk cannot be written"))?;
        }
        self.note_kept();
        Ok(())
    }

    fn flush(&self) -> Result<(), StepError> {
        let flush = |home: &Home| home.writer.flush().map_err(disk_error("a home disk cannot be synced"));
        self.homes.iter().try_for_each(flush)
    }

    fn undo(&mut self) -> Result<Next, StepError> {
        let total = self.homes.iter().map(|home| home.undo.kept_bytes()).sum();
        {
            let mut progress = self.target.progress.lock().expect("no panic while held");
            (progress.done_bytes, progress.total_bytes) = (0, total);
        }
        let stopped = || io::Error::from(io::ErrorKind::Interrupted);
        for home in &self.homes {
            let replayed = home.undo.replay(|extent, data| {
                if self.target.wake.is_stopped() {
                    return Err(stopped());
                }
                home.writer.put(extent, data)?;
                self.done(extent.length);
                Ok(())
            });
            match replayed {
                Err(_) if self.target.wake.is_stopped() => return Err(StepError::Interrupted),
                other => other.map_err(disk_error("what the home disks had cannot be given back"))?,
            }
        }
        self.flush()?;
        self.change(|state| state.stage = Stage::Undone)?;
        tracing::info!(machine = %self.target.machine, "the home disks have what they had");
        Ok(Next::Again)
    }

    fn change(&self, change: impl FnOnce(&mut super::State)) -> Result<(), StepError> {
        self.target
            .change_state(|state| {
                let undoing = state.stage == Stage::Undoing;
                change(state);
                // Asked for meanwhile.
                if undoing && state.stage != Stage::Undone {
                    state.stage = Stage::Undoing;
                }
            })
            .map_err(disk_error("what the master target does cannot be stored"))
    }
}

/// Where a round goes.
enum Sink {
    Disks,
    Spool { file: Arc<dyn StorageFile>, bytes: u64 },
}

impl Sink {
    fn append(&mut self, disk: DiskId, chunk: &[u8]) -> Result<(), StepError> {
        if let Sink::Spool { file, bytes } = self {
            let content = [disk.as_bytes().as_slice(), chunk].concat();
            file.write_at(*bytes, &content).map_err(disk_error("a round cannot be spooled"))?;
            *bytes += content.len() as u64;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Default)]
struct Counts {
    rounds: u64,
    compared_bytes: u64,
    received_bytes: u64,
    wire_bytes: u64,
}

impl Counts {
    fn add_to(self, state: &mut super::State) {
        state.rounds += self.rounds;
        state.compared_bytes += self.compared_bytes;
        state.received_bytes += self.received_bytes;
        state.wire_bytes += self.wire_bytes;
    }
}

fn stage_after(wanted: Wanted, stopped: bool) -> Stage {
    if wanted == Wanted::Finish && stopped { Stage::Finished } else { Stage::Consistent }
}

fn round_disk(home: &Home, done: &BTreeMap<DiskId, u64>) -> RoundDisk {
    let Generation(generation) = home.disk.identity.generation;
    let disk = home.disk.identity.disk;
    let done = done.get(&disk).copied().unwrap_or(0);
    RoundDisk { disk: disk.to_vec(), generation, bytes: home.disk.identity.disk_bytes, done }
}

fn batch_bytes(changes: &[Change]) -> u64 {
    changes.iter().map(|(extent, _)| extent.length).sum()
}

fn not_home(disk: DiskId) -> StepError {
    StepError::Content(format!("disk {disk} is none of the home disks"))
}
