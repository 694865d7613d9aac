//! The network between host and server, and the server's end of a stream.
//!
//! Frames take their time, connections are cut at any frame, the two ends learn of it at different times: a server may
//! still be working on frames of a stream whose host is long on the next one. The stores behind a stream are the
//! product's own ([`tidemark_process_server::accept::ReplicaStores`]); what stands here in for its asynchronous part is
//! the order of calls.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::DiskId;
use tidemark_base::seam::{self, World};
use tidemark_host::pack::Permit;
use tidemark_host::send::link::{Link, LinkError, LinkEvents, LinkStream, Traffic};
use tidemark_process_server::accept::{Store, Writer};
use tidemark_process_server::replica::Needs;
use tidemark_proto::replication::{
    Close, Credit, CutOrdinal, Durable, Hashes, Hello, HostFrame, NEED_EXTENTS_MAX, Need, NeedReason, QUESTIONS_MAX,
    Refusal, RefusalReason, ServerFrame, SessionId, Welcome,
};

use crate::counts::Kind;
use crate::server::ServerState;
use crate::world::{Process, Sim};

/// As the product's.
const STANDING_BYTES: u64 = 256 << 10;

/// What the network is like now.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    pub is_down: bool,
    /// One frame in so many is the last of its connection; 0 is never.
    pub cut_one_in: u64,
    pub delay_ms_max: u64,
}

/// Nothing goes wrong.
pub const CALM: Weather = Weather { is_down: false, cut_one_in: 0, delay_ms_max: 5 };

/// Both ends of the network between the host and one process server.
pub struct Network {
    pub sim: Rc<Sim>,
    pub weather: Cell<Weather>,
    pub server: Rc<ServerState>,
    connections: RefCell<Vec<Rc<Connection>>>,
    numbers: Cell<u64>,
}

/// One stream's connection.
pub struct Connection {
    number: u64,
    /// Frames on their way to the server, with when they are there.
    to_server: RefCell<VecDeque<(Duration, HostFrame, Option<Permit>)>>,
    to_host: RefCell<VecDeque<(Duration, ServerFrame)>>,
    /// Frames that arrived at the server.
    arrived: RefCell<VecDeque<HostFrame>>,
    events: Arc<dyn LinkEvents>,
    /// The host's end is closed: it dropped the stream, or was told of a cut.
    is_host_gone: Cell<bool>,
    /// The server's end knows that nothing more comes.
    is_server_told: Cell<bool>,
    is_cut: Cell<bool>,
    is_finished: Cell<bool>,
}

impl Connection {
    fn key(&self) -> usize {
        // Odd, and far from the others that are made up.
        0x4000_0000_0000_0001 + (self.number as usize) * 4
    }

    fn server_key(&self) -> usize {
        self.key() + 2
    }
}

impl Network {
    pub fn new(sim: Rc<Sim>, server: Rc<ServerState>) -> Rc<Self> {
        Rc::new(Self {
            sim,
            weather: Cell::new(CALM),
            numbers: Cell::new((server.process as u64) << 32),
            server,
            connections: RefCell::default(),
        })
    }

    /// Every connection is cut, as when a cable is.
    pub fn cut_all(&self) {
        for connection in self.connections.borrow().iter() {
            if !connection.is_cut.replace(true) {
                self.sim.count(Kind::LinkCut);
            }
            self.sim.wake_key(connection.key(), true);
        }
    }

    fn delay(&self) -> Duration {
        let max = self.weather.get().delay_ms_max;
        if max > 50 && self.sim.one_in(16) {
            self.sim.count(Kind::LinkDelay);
            return Duration::from_millis(self.sim.below(max * 10));
        }
        Duration::from_micros(self.sim.below(max * 1000 + 1))
    }

    fn open(self: &Rc<Self>, events: Arc<dyn LinkEvents>) -> Rc<Connection> {
        let number = self.numbers.get() + 1;
        self.numbers.set(number);
        let connection = Rc::new(Connection {
            number,
            to_server: RefCell::default(),
            to_host: RefCell::default(),
            arrived: RefCell::default(),
            events,
            is_host_gone: Cell::new(false),
            is_server_told: Cell::new(false),
            is_cut: Cell::new(false),
            is_finished: Cell::new(false),
        });
        {
            let mut connections = self.connections.borrow_mut();
            if connections.iter().any(|other| !other.is_server_told.get()) {
                self.sim.count(Kind::DuplicateStream);
            }
            connections.push(connection.clone());
        }
        let network = self.clone();
        let wire = connection.clone();
        self.sim.start(Process::Outside, "wire", Box::new(move || network.carry(&wire)));
        connection
    }

    /// The wire: brings frames to either end when it is time, until both are gone.
    fn carry(self: &Rc<Self>, connection: &Rc<Connection>) {
        let sim = &self.sim;
        if self.weather.get().is_down || !self.server.is_up.get() {
            sim.sleep(Duration::from_millis(1 + sim.below(50)));
            connection.is_server_told.set(true);
            let reason = "nobody answers".to_owned();
            connection.events.closed(LinkError::Unreachable { reason, help: "wait".to_owned() });
            self.forget(connection);
            return;
        }
        let run = self.server.run.get();
        let (network, stream) = (self.clone(), connection.clone());
        sim.start(self.server.process, "stream", Box::new(move || network.serve(&stream)));
        let mut is_server_dead = false;
        loop {
            let now = sim.now();
            if self.server.run.get() != run || !self.server.is_up.get() {
                is_server_dead = true;
                connection.is_cut.set(true);
            }
            if self.weather.get().is_down && !connection.is_cut.replace(true) {
                sim.count(Kind::LinkCut);
            }
            if connection.is_cut.get() {
                break;
            }
            let due = connection.to_server.borrow().front().is_some_and(|(at, ..)| *at <= now);
            if due {
                let Some((_, frame, permit)) = connection.to_server.borrow_mut().pop_front() else { continue };
                drop(permit);
                if sim.one_in(self.weather.get().cut_one_in) {
                    sim.count(Kind::LinkCut);
                    connection.is_cut.set(true);
                    continue;
                }
                connection.arrived.borrow_mut().push_back(frame);
                sim.wake_key(connection.server_key(), true);
                continue;
            }
            let due = connection.to_host.borrow().front().is_some_and(|(at, _)| *at <= now);
            if due {
                let Some((_, frame)) = connection.to_host.borrow_mut().pop_front() else { continue };
                if !connection.is_host_gone.get() && !connection.events.frame(frame) {
                    connection.is_cut.set(true);
                }
                continue;
            }
            let is_over = connection.is_host_gone.get() && connection.to_server.borrow().is_empty();
            if is_over {
                connection.is_cut.set(true);
                continue;
            }
            let next = [
                connection.to_server.borrow().front().map(|(at, ..)| *at),
                connection.to_host.borrow().front().map(|(at, _)| *at),
            ];
            let next = next.into_iter().flatten().min().unwrap_or(now + Duration::from_secs(5));
            sim.wait_own(connection.key(), next.saturating_sub(now));
        }
        // Each end learns of it in its own time. What is under way to the server may still arrive.
        if sim.one_in(2) && !is_server_dead {
            let late: Vec<HostFrame> = connection.to_server.borrow_mut().drain(..).map(|(_, frame, _)| frame).collect();
            if !late.is_empty() {
                let keep = sim.below(late.len() as u64 + 1) as usize;
                if keep > 0 {
                    sim.count(Kind::LateStream);
                }
                connection.arrived.borrow_mut().extend(late.into_iter().take(keep));
                sim.wake_key(connection.server_key(), true);
            }
        }
        let mut ends = [true, false];
        if sim.one_in(2) {
            ends.reverse();
        }
        for is_host in ends {
            if is_host {
                if !connection.is_host_gone.replace(true) {
                    connection.events.closed(LinkError::Cut { reason: "the network".to_owned() });
                }
            } else {
                connection.is_server_told.set(true);
                sim.wake_key(connection.server_key(), true);
            }
            let wait = if sim.one_in(8) { sim.below(5000) } else { sim.below(20) };
            sim.sleep(Duration::from_millis(wait));
        }
        connection.to_server.borrow_mut().clear();
        self.forget(connection);
    }

    fn forget(&self, connection: &Rc<Connection>) {
        self.connections.borrow_mut().retain(|other| other.number != connection.number);
    }

    fn answer(&self, connection: &Connection, frame: ServerFrame) {
        let at = self.sim.now() + self.delay();
        let mut queue = connection.to_host.borrow_mut();
        // One connection keeps its order.
        let at = queue.back().map_or(at, |(last, _)| at.max(*last));
        queue.push_back((at, frame));
        drop(queue);
        self.sim.wake_key(connection.key(), true);
    }

    /// The server's end of one stream, from Hello to its end.
    fn serve(self: &Rc<Self>, connection: &Rc<Connection>) {
        let Some(HostFrame::Hello(hello)) = self.receive(connection) else { return };
        let disk = hello.disk;
        let end = self.serve_disk(connection, hello);
        match end {
            Ok(Some(close)) => self.answer(connection, ServerFrame::Close(close)),
            Ok(None) => {}
            Err(refusal) => {
                self.sim.note(|| format!("stream {} of {disk} refused: {refusal:?}", connection.number));
                self.answer(connection, ServerFrame::Refusal(refusal));
            }
        }
    }

    /// The next frame; `None` when nothing more comes.
    fn receive(&self, connection: &Connection) -> Option<HostFrame> {
        loop {
            if let Some(frame) = connection.arrived.borrow_mut().pop_front() {
                return Some(frame);
            }
            if connection.is_server_told.get() {
                return None;
            }
            self.sim.wait_own(connection.server_key(), Duration::from_secs(60));
        }
    }

    fn serve_disk(self: &Rc<Self>, connection: &Rc<Connection>, hello: Hello) -> Result<Option<Close>, Refusal> {
        let server = &self.server;
        server.admit(&hello)?;
        let stores = server.stores();
        let known = server.authorisation(hello.disk)?;
        let store = stores.open(hello.disk, &known)?;
        let place = server.take_over(&self.sim, hello.disk, hello.session)?;
        let (mut writer, held) = store.attach(&hello)?;
        let welcome = Welcome {
            durable: held.durable,
            scan_open: held.scan_open,
            credit_bytes: STANDING_BYTES,
            cut: held.cut,
            comparable: held.comparable,
        };
        self.sim.note(|| format!("stream {} of {} begins: {welcome:?}", connection.number, hello.disk));
        if welcome.scan_open {
            self.sim.count(Kind::NewEpoch);
        }
        self.answer(connection, ServerFrame::Welcome(welcome));
        let needs = store.needs();
        if let Some(needs) = &needs {
            let key = connection.server_key();
            needs.begin(Arc::new(move || {
                if let Some(world) = seam::current() {
                    world.wake(key, true);
                }
            }));
        }
        let shared = Rc::new(Shared { needs: needs.clone(), ..Shared::default() });
        let disk = hello.disk;
        let (network, stream, syncer, gone) = (self.clone(), connection.clone(), store.clone(), shared.clone());
        self.sim.start(self.server.process, "commit", Box::new(move || network.commit(disk, &stream, &*syncer, &gone)));
        let result = self.receive_cuts(connection, &hello, &mut *writer, held.cut, &shared, &place);
        drop(writer);
        shared.is_over.set(true);
        self.sim.wake_key(shared.key(), true);
        // Nothing is read for this stream any more when the next one begins.
        while shared.comparing.get() > 0 {
            self.sim.wait_own(connection.server_key(), Duration::from_millis(50));
        }
        if let Some(needs) = needs {
            needs.end();
        }
        drop(place);
        result
    }

    fn receive_cuts(
        self: &Rc<Self>,
        connection: &Rc<Connection>,
        hello: &Hello,
        writer: &mut dyn Writer,
        held: CutOrdinal,
        shared: &Rc<Shared>,
        place: &Place,
    ) -> Result<Option<Close>, Refusal> {
        let mut credit = Credit::new(STANDING_BYTES);
        let mut cut = held.next();
        let mut received = Close::default();
        let mut question = 0;
        loop {
            if place.is_fenced() {
                return Err(refusal(RefusalReason::Fenced, "a newer stream took over"));
            }
            if let Some(refusal) = shared.refused.borrow_mut().take() {
                return Err(refusal);
            }
            let Some(frame) = self.receive_or(connection, shared, place) else {
                if connection.is_server_told.get() && connection.arrived.borrow().is_empty() {
                    return Ok(None);
                }
                continue;
            };
            for bytes in shared.settled.borrow_mut().drain(..) {
                credit.acknowledge(bytes);
            }
            match frame {
                HostFrame::Data(data) => {
                    if data.cut != cut {
                        return Err(refusal(RefusalReason::Gap, "a frame of another cut"));
                    }
                    let bytes = data.chunks.len() as u64;
                    // Shared that the host did not hear of yet only make its own credit smaller.
                    if !credit.take(bytes) {
                        return Err(refusal(RefusalReason::Protocol, "data beyond the credit"));
                    }
                    received.bytes += bytes;
                    writer.append(cut, &data.chunks)?;
                }
                HostFrame::CutEnd(end) => {
                    if end.cut != cut {
                        return Err(refusal(RefusalReason::Gap, "the end of another cut"));
                    }
                    self.server.admit(hello)?;
                    cut = cut.next();
                    received.cuts += 1;
                    self.sim.note(|| format!("cut {} {:?} {} → {}", end.cut, end.kind, end.from, end.to));
                    let number = end.cut;
                    writer.end_cut(end)?;
                    shared.ended.borrow_mut().push_back((number, received.bytes));
                    self.sim.wake_key(shared.key(), true);
                }
                HostFrame::Want(bytes) => {
                    let granted = bytes.clamp(1, 1 << 20);
                    credit.grant(granted);
                    self.answer(connection, ServerFrame::Grant(granted));
                }
                HostFrame::Close(close) => {
                    if close != received {
                        return Err(refusal(RefusalReason::Protocol, "other totals than came"));
                    }
                    while !shared.ended.borrow().is_empty() {
                        if let Some(refusal) = shared.refused.borrow_mut().take() {
                            return Err(refusal);
                        }
                        if connection.is_server_told.get() {
                            return Ok(None);
                        }
                        self.sim.wait_own(connection.server_key(), Duration::from_millis(50));
                    }
                    return Ok(Some(close));
                }
                HostFrame::Hello(_) => return Err(refusal(RefusalReason::Protocol, "a second hello")),
                HostFrame::Hashes(hashes) => {
                    if hashes.question != question + 1 {
                        return Err(refusal(RefusalReason::Protocol, "another question than the next one"));
                    }
                    if shared.comparing.get() == QUESTIONS_MAX {
                        return Err(refusal(RefusalReason::Protocol, "more questions than may be under way"));
                    }
                    question = hashes.question;
                    self.compare(connection, hashes, writer, shared)?;
                }
            }
        }
    }

    /// Answers a question beside the stream; answers may overtake each other.
    fn compare(
        self: &Rc<Self>,
        connection: &Rc<Connection>,
        hashes: Hashes,
        writer: &mut dyn Writer,
        shared: &Rc<Shared>,
    ) -> Result<(), Refusal> {
        self.sim.count(Kind::Question);
        let comparison = writer.compare(hashes)?;
        shared.comparing.set(shared.comparing.get() + 1);
        let (network, connection, shared) = (self.clone(), connection.clone(), shared.clone());
        let answer = move || {
            if network.sim.one_in(4) {
                network.sim.sleep(Duration::from_millis(network.sim.below(500)));
            }
            let answer = comparison(&|| shared.is_over.get());
            shared.comparing.set(shared.comparing.get() - 1);
            if let Some(answer) = answer.filter(|_| !shared.is_over.get()) {
                network.sim.count(Kind::Answer);
                network.answer(&connection, ServerFrame::Differing(answer));
            }
            network.sim.wake_key(connection.server_key(), true);
        };
        self.sim.start(self.server.process, "compare", Box::new(answer));
        Ok(())
    }

    fn receive_or(&self, connection: &Connection, shared: &Shared, place: &Place) -> Option<HostFrame> {
        loop {
            if place.is_fenced() || shared.refused.borrow().is_some() {
                return None;
            }
            let extents = shared.needs.as_ref().map(|needs| needs.take(NEED_EXTENTS_MAX)).unwrap_or_default();
            if !extents.is_empty() {
                self.sim.count(Kind::Needed);
                self.sim.note(|| format!("the replica needs {extents:?}"));
                self.answer(connection, ServerFrame::Need(Need { extents, why: NeedReason::Damaged }));
            }
            if let Some(frame) = connection.arrived.borrow_mut().pop_front() {
                return Some(frame);
            }
            if connection.is_server_told.get() {
                return None;
            }
            self.sim.wait_own(connection.server_key(), Duration::from_secs(60));
        }
    }

    /// Makes cuts durable, and says so.
    fn commit(&self, disk: DiskId, connection: &Rc<Connection>, store: &dyn Store, shared: &Shared) {
        let mut acknowledged = 0;
        loop {
            if shared.ended.borrow().is_empty() {
                if shared.is_over.get() {
                    return;
                }
                self.sim.wait_own(shared.key(), Duration::from_secs(60));
                continue;
            }
            match store.sync() {
                Ok(Some(durable)) => {
                    let mut bytes = None;
                    let mut ended = shared.ended.borrow_mut();
                    while ended.front().is_some_and(|(cut, _)| *cut <= durable.cut) {
                        bytes = ended.pop_front().map(|(_, bytes)| bytes);
                    }
                    drop(ended);
                    if let Some(bytes) = bytes {
                        shared.settled.borrow_mut().push_back(bytes - acknowledged);
                        acknowledged = bytes;
                        self.server.acknowledged(disk, &durable);
                        let Durable { cut, position } = durable;
                        self.answer(connection, ServerFrame::Durable(Durable { cut, position }));
                    }
                }
                Ok(None) => {}
                Err(refusal) => {
                    *shared.refused.borrow_mut() = Some(refusal);
                    self.sim.wake_key(connection.server_key(), true);
                    return;
                }
            }
            self.sim.wake_key(connection.server_key(), true);
        }
    }
}

/// What the threads of one stream share.
#[derive(Default)]
struct Shared {
    /// Cuts that ended and are not durable, with the bytes of chunks until then.
    ended: RefCell<VecDeque<(CutOrdinal, u64)>>,
    settled: RefCell<VecDeque<u64>>,
    refused: RefCell<Option<Refusal>>,
    is_over: Cell<bool>,
    /// Questions that are being answered.
    comparing: Cell<usize>,
    /// What the replica asks for again.
    needs: Option<Arc<Needs>>,
}

impl Shared {
    fn key(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

pub fn refusal(reason: RefusalReason, message: &str) -> Refusal {
    Refusal { reason, message: message.to_owned(), help: "in a simulation: none".to_owned() }
}

/// One disk's stream at the server, as the product's `accept` keeps it: one at a time.
#[derive(Default)]
pub struct Places(RefCell<BTreeMap<DiskId, Sessions>>);

#[derive(Default)]
struct Sessions {
    current: Option<(SessionId, Rc<PlaceState>)>,
    fenced: Vec<SessionId>,
}

#[derive(Default)]
struct PlaceState {
    is_fenced: Cell<bool>,
    has_ended: Cell<bool>,
}

pub struct Place(Rc<PlaceState>);

impl Place {
    fn is_fenced(&self) -> bool {
        self.0.is_fenced.get()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.has_ended.set(true);
    }
}

impl Places {
    pub fn take_over(&self, sim: &Sim, disk: DiskId, session: SessionId, wake: &dyn Fn()) -> Result<Place, Refusal> {
        let before = {
            let mut all = self.0.borrow_mut();
            let sessions = all.entry(disk).or_default();
            if sessions.fenced.contains(&session) {
                return Err(refusal(RefusalReason::Fenced, "a newer run of the agent took the stream over"));
            }
            let before = sessions.current.take();
            if let Some((other, state)) = &before {
                state.is_fenced.set(true);
                if *other != session && !state.has_ended.get() {
                    sessions.fenced.push(*other);
                }
            }
            let state = Rc::new(PlaceState::default());
            sessions.current = Some((session, state.clone()));
            (before.map(|(_, state)| state), state)
        };
        wake();
        let (before, state) = before;
        if let Some(before) = before {
            let mut tries = 0;
            while !before.has_ended.get() {
                sim.sleep(Duration::from_millis(10));
                wake();
                tries += 1;
                if tries > 1000 {
                    state.has_ended.set(true);
                    return Err(refusal(
                        RefusalReason::StoreFailed,
                        "the stream before this one is still being written",
                    ));
                }
            }
        }
        Ok(Place(state))
    }
}

impl Network {
    /// Streams look whether they were fenced.
    pub fn wake_streams(&self) {
        for connection in self.connections.borrow().iter() {
            self.sim.wake_key(connection.server_key(), true);
        }
    }
}

/// The host's way into the network.
pub struct SimLink(pub Rc<Network>);

// SAFETY: everything of a simulation is reached by the one real thread that runs it.
unsafe impl Send for SimLink {}
unsafe impl Sync for SimLink {}

struct SimStream {
    network: Rc<Network>,
    connection: Rc<Connection>,
}

// SAFETY: as for [`SimLink`].
unsafe impl Send for SimStream {}

impl Link for SimLink {
    fn open(&self, _traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream> {
        let connection = self.0.open(events);
        Box::new(SimStream { network: self.0.clone(), connection })
    }
}

impl LinkStream for SimStream {
    fn send(&mut self, frame: HostFrame, permit: Option<Permit>) -> Result<(), LinkError> {
        if self.connection.is_cut.get() {
            return Err(LinkError::Cut { reason: "the network".to_owned() });
        }
        let at = self.network.sim.now() + self.network.delay();
        let mut queue = self.connection.to_server.borrow_mut();
        let at = queue.back().map_or(at, |(last, ..)| at.max(*last));
        queue.push_back((at, frame, permit));
        drop(queue);
        self.network.sim.wake_key(self.connection.key(), true);
        Ok(())
    }

    fn finish(&mut self) {
        self.connection.is_finished.set(true);
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.connection.is_host_gone.set(true);
        if !self.connection.is_finished.get() {
            self.connection.to_server.borrow_mut().clear();
        }
        self.network.sim.wake_key(self.connection.key(), true);
    }
}
