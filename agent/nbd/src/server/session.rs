//! The transmission phase of one connection, from its own thread.
//!
//! A *round* is what one receive brought: all complete requests in the buffer. Cached reads are answered while the round
//! is parsed; its writes go to the export as one batch, straight from the receive buffer; then all replies leave
//! together. What may take its time becomes a [`Task`] for the worker threads and is answered when it is done. When tasks
//! carry data, they keep the receive buffer and the connection goes on with another one.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use tidemark_base::Extent;

use super::flight::{Flight, Order};
use super::negotiate::Negotiated;
use super::outlet::Outlet;
use super::task::{Action, Block, Placed, Shared, Task};
use crate::export::{Export, WriteRequest};
use crate::limits::Limits;
use crate::stream::Stream;
use crate::wire::{self, REQUEST_BYTES, Request, chunk, cmd, errno};

/// The receive buffer: some rounds of what a Unix socket holds, and it stays in the second-level cache.
const RECEIVE_BYTES: usize = 512 << 10;
/// Replies with data leave when they are this many bytes, although the round goes on.
const REPLIES_BYTES: usize = 256 << 10;
/// Longer reads go to the workers even when they are cached: copying them would hold up the connection.
const INLINE_READ_BYTES_MAX: u32 = 512 << 10;
/// Longer writes go to the workers even where the export takes them at once: copying and hashing them takes longer than
/// waking a thread, and the next request is received meanwhile.
const INLINE_WRITE_BYTES_MAX: u32 = 48 << 10;
/// Writes of one round are handed to a worker together, up to this many bytes.
const TASK_WRITE_BYTES_MAX: usize = 128 << 10;

/// How a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

/// What stands at the front of the receive buffer.
enum Front {
    /// A request and where its data is, if it has any.
    Request(Request, Range<usize>),
    /// A refused write, whose data is skipped as it comes.
    Refused(Request, u32),
    /// This many bytes are needed to go on.
    Incomplete(usize),
    Alien,
}

enum Round {
    /// All that was received is parsed.
    Done,
    /// There is more, but this much is to be executed first.
    Full,
    Disconnect,
}

pub struct Session {
    shared: Arc<Shared>,
    limits: Limits,
    ending: Arc<AtomicBool>,
    buffer: Vec<u8>,
    /// What is received and not parsed lies here in the buffer.
    filled: Range<usize>,
    /// Bytes of a refused write that are still to come.
    skip: u64,
    /// Replies of this round; used up to `replied`. Its length only grows, so that it is cleared once.
    replies: Vec<u8>,
    replied: usize,
    batch: Vec<Placed>,
    tasks: Vec<Task>,
    writer: Option<JoinHandle<()>>,
}

/// Serves the export until the client leaves or `ending` is set; whatever was received is then done.
pub fn run(
    stream: &Arc<Stream>,
    negotiated: Negotiated,
    limits: &Limits,
    ending: Arc<AtomicBool>,
) -> Result<(), SessionError> {
    // The lease outlives all that uses the export: fields are dropped in their order.
    let Negotiated { export, lease, structured, allocation, .. } = negotiated;
    let shared = Arc::new(Shared {
        export,
        structured,
        allocation,
        outlet: Outlet::new(stream.clone()),
        order: Order::default(),
        flight: Flight::new(limits),
        pool: lease.pool.clone(),
        spare: Default::default(),
    });
    let mut session = Session {
        shared,
        limits: limits.clone(),
        ending,
        buffer: vec![0; RECEIVE_BYTES],
        filled: 0..0,
        skip: 0,
        replies: Vec::new(),
        replied: 0,
        batch: Vec::new(),
        tasks: Vec::new(),
        writer: None,
    };
    let result = session.serve(stream);
    session.finish(stream);
    drop(session);
    drop(lease);
    result
}

impl Session {
    fn serve(&mut self, stream: &Stream) -> Result<(), SessionError> {
        loop {
            let round = self.parse();
            // Also when the client broke the protocol: what came before that is done and answered.
            self.execute()?;
            match round? {
                Round::Full => continue,
                Round::Disconnect => return Ok(()),
                Round::Done if self.ending.load(Ordering::Acquire) => return Ok(()),
                Round::Done => {}
            }
            let end = self.make_room();
            let count = stream.receive(&mut self.buffer[self.filled.end..end])?;
            if count == 0 {
                return Ok(());
            }
            self.filled.end += count;
        }
    }

    /// Waits until everything in flight is done, so that the export can be released.
    fn finish(&mut self, stream: &Stream) {
        if !self.shared.flight.wait_empty(Some(self.limits.stop_timeout)) {
            // A client that does not read its replies holds up nobody for longer than this.
            self.shared.outlet.break_off();
            self.shared.flight.wait_empty(None);
        }
        self.shared.outlet.close();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        stream.close_notify();
        self.shared.outlet.break_off();
    }

    fn front(&mut self) -> Front {
        let Some(head) = self.buffer[self.filled.clone()].first_chunk::<REQUEST_BYTES>() else {
            return Front::Incomplete(REQUEST_BYTES);
        };
        let Some(request) = Request::decode(head) else { return Front::Alien };
        if request.command != cmd::WRITE {
            self.filled.start += REQUEST_BYTES;
            return Front::Request(request, 0..0);
        }
        if let Err(error) = self.check(&request) {
            self.filled.start += REQUEST_BYTES;
            return Front::Refused(request, error);
        }
        let total = REQUEST_BYTES + request.length as usize;
        if self.filled.len() < total {
            return Front::Incomplete(total);
        }
        let data = self.filled.start + REQUEST_BYTES..self.filled.start + total;
        self.filled.start += total;
        Front::Request(request, data)
    }

    /// Whether the request can be executed at all. Its error number, if not.
    fn check(&self, request: &Request) -> Result<(), u32> {
        use cmd::*;
        let export = &*self.shared.export;
        let (flags, writes, payload) = match request.command {
            READ => (FLAG_DF, false, true),
            WRITE => (FLAG_FUA, true, true),
            FLUSH => (0, false, false),
            TRIM => (FLAG_FUA, true, false),
            WRITE_ZEROES => (FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO, true, false),
            BLOCK_STATUS => (FLAG_REQ_ONE, false, false),
            _ => return Err(errno::EINVAL),
        };
        if request.flags & !flags != 0 {
            return Err(errno::EINVAL);
        }
        if writes && export.is_read_only() {
            return Err(errno::EPERM);
        }
        if request.command == FLUSH {
            return Ok(());
        }
        let block = u64::from(export.block_bytes_min());
        let aligned = request.offset.is_multiple_of(block) && u64::from(request.length).is_multiple_of(block);
        if request.length == 0
            || (payload && request.length > self.limits.request_bytes_max)
            || !aligned
            || (request.command == BLOCK_STATUS && !self.shared.allocation)
            || (request.flags & FLAG_DF != 0 && !self.shared.structured)
        {
            return Err(errno::EINVAL);
        }
        match request.offset.checked_add(u64::from(request.length)) {
            Some(end) if end <= export.bytes() => Ok(()),
            _ if matches!(request.command, WRITE | WRITE_ZEROES) => Err(errno::ENOSPC),
            _ => Err(errno::EINVAL),
        }
    }

    fn parse(&mut self) -> Result<Round, SessionError> {
        loop {
            if self.skip > 0 {
                let skipped = self.skip.min(self.filled.len() as u64);
                self.filled.start += skipped as usize;
                self.skip -= skipped;
                if self.skip > 0 {
                    return Ok(Round::Done);
                }
            }
            if self.tasks.len() >= self.limits.in_flight_requests_max || self.replied >= REPLIES_BYTES {
                return Ok(Round::Full);
            }
            match self.front() {
                Front::Incomplete(_) => return Ok(Round::Done),
                Front::Alien => return Err(SessionError::Protocol("wrong magic number of a request")),
                Front::Refused(request, error) => {
                    self.skip = u64::from(request.length);
                    self.refuse(&request, error);
                }
                Front::Request(request, data) if request.command == cmd::WRITE => self.write(&request, data),
                Front::Request(request, _) if request.command == cmd::DISC => return Ok(Round::Disconnect),
                Front::Request(request, _) => match self.check(&request) {
                    Err(error) => self.refuse(&request, error),
                    Ok(()) if request.command == cmd::READ => self.read(&request),
                    Ok(()) => self.later(&request),
                },
            }
        }
    }

    fn write(&mut self, request: &Request, data: Range<usize>) {
        let fua = request.flags & cmd::FLAG_FUA != 0;
        let extent = Extent::new(request.offset, u64::from(request.length));
        let placed = Placed { cookie: request.cookie, offset: request.offset, data, fua };
        // What overlaps a write that is with the workers, or on its way to them, has to go behind it.
        let inline = !fua
            && request.length <= INLINE_WRITE_BYTES_MAX
            && self.shared.export.writes_inline()
            && !self.shared.order.overlaps(extent)
            && !self.tasks.iter().any(|task| task.writes(extent));
        if inline {
            self.batch.push(placed);
        } else if let Some(Task { action: Action::Write(writes), .. }) = self.tasks.last_mut()
            && writes[0].fua == fua
            && writes.iter().map(|write| write.data.len()).sum::<usize>() + placed.data.len() <= TASK_WRITE_BYTES_MAX
        {
            writes.push(placed);
        } else {
            self.tasks.push(Task::new(request.cookie, Action::Write(vec![placed])));
        }
    }

    fn read(&mut self, request: &Request) {
        if request.length <= INLINE_READ_BYTES_MAX {
            let head = self.shared.read_head(request);
            let head = head.as_ref();
            let (start, total) = (self.replied + head.len(), head.len() + request.length as usize);
            if self.replies.len() < self.replied + total {
                self.replies.resize(self.replied + total, 0);
            }
            let end = self.replied + total;
            match self.shared.export.try_read(request.offset, &mut self.replies[start..end]) {
                Some(Ok(())) => {
                    self.replies[self.replied..start].copy_from_slice(head);
                    self.replied = end;
                    return;
                }
                Some(Err(error)) => return self.refuse(request, wire::errno_of(&error)),
                None => {}
            }
        }
        self.later(request);
    }

    fn later(&mut self, request: &Request) {
        self.tasks.push(Task::new(request.cookie, Action::of(request)));
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.replied + bytes.len();
        if self.replies.len() < end {
            self.replies.resize(end.max(4096), 0);
        }
        self.replies[self.replied..end].copy_from_slice(bytes);
        self.replied = end;
    }

    fn refuse(&mut self, request: &Request, error: u32) {
        let structured = self.shared.structured && matches!(request.command, cmd::READ | cmd::BLOCK_STATUS);
        if structured {
            self.push(&wire::structured_reply(request.cookie, chunk::ERROR, 6));
            self.push(&error.to_be_bytes());
            self.push(&[0, 0]);
        } else {
            self.push(&wire::simple_reply(request.cookie, error));
        }
    }

    /// The batch, its replies, the tasks: in this order, so that a task that overlaps the batch comes after it.
    fn execute(&mut self) -> Result<(), SessionError> {
        if !self.batch.is_empty() {
            let batch = std::mem::take(&mut self.batch);
            let mut replies = std::mem::take(&mut self.replies);
            let end = self.replied + batch.len() * wire::SIMPLE_REPLY_BYTES;
            if replies.len() < end {
                replies.resize(end, 0);
            }
            write_batch(&*self.shared.export, &batch, &self.buffer, |cookie, error| {
                let end = self.replied + wire::SIMPLE_REPLY_BYTES;
                replies[self.replied..end].copy_from_slice(&wire::simple_reply(cookie, error));
                self.replied = end;
            });
            self.replies = replies;
            self.batch = batch;
            self.batch.clear();
        }
        let sent = if self.replied > 0 { self.shared.outlet.send(&self.replies[..self.replied]) } else { Ok(()) };
        self.replied = 0;
        if self.replies.len() > 2 * REPLIES_BYTES + INLINE_READ_BYTES_MAX as usize {
            self.replies = Vec::new();
        }
        // What was received is done even when the client cannot be told.
        if !self.tasks.is_empty() {
            self.hand_over()?;
        }
        Ok(sent?)
    }

    fn hand_over(&mut self) -> Result<(), SessionError> {
        if self.writer.is_none() {
            let shared = self.shared.clone();
            self.writer =
                Some(std::thread::Builder::new().name("nbd-write".into()).spawn(move || shared.outlet.write())?);
        }
        let block = if self.tasks.iter().any(|task| task.carries_data()) { Some(self.exchange_buffer()) } else { None };
        for task in self.tasks.drain(..) {
            self.shared.submit(task, block.as_ref());
        }
        Ok(())
    }

    /// Gives the buffer to the tasks of this round; what is not parsed yet moves to another.
    fn exchange_buffer(&mut self) -> Arc<Block> {
        let permit = self.shared.flight.acquire(0, self.buffer.len());
        let spare = self.shared.spare.lock().expect("no panic while held").pop();
        let mut fresh = spare.unwrap_or_else(|| vec![0; RECEIVE_BYTES]);
        let rest = &self.buffer[self.filled.clone()];
        if fresh.len() < rest.len() {
            fresh = vec![0; rest.len()];
        }
        fresh[..rest.len()].copy_from_slice(rest);
        self.filled = 0..rest.len();
        let full = std::mem::replace(&mut self.buffer, fresh);
        Arc::new(Block::new(full, permit, self.shared.clone(), RECEIVE_BYTES))
    }

    /// Room for the request at the front, whose length was checked, or at least for the head of one. Up to where to
    /// receive: what comes after a long write would be copied when its buffer goes to a worker, but for the next head.
    fn make_room(&mut self) -> usize {
        if self.filled.is_empty() {
            self.filled = 0..0;
            if self.buffer.len() != RECEIVE_BYTES {
                self.buffer = vec![0; RECEIVE_BYTES];
            }
            return self.buffer.len();
        }
        let Front::Incomplete(needed) = self.front() else { return self.buffer.len() };
        if self.filled.start + needed > self.buffer.len() {
            if needed <= self.buffer.len() {
                self.buffer.copy_within(self.filled.clone(), 0);
            } else {
                let mut larger = vec![0; needed];
                larger[..self.filled.len()].copy_from_slice(&self.buffer[self.filled.clone()]);
                self.buffer = larger;
            }
            self.filled = 0..self.filled.len();
        }
        match needed > INLINE_WRITE_BYTES_MAX as usize + REQUEST_BYTES {
            true => (self.filled.start + needed + REQUEST_BYTES).min(self.buffer.len()),
            false => self.buffer.len(),
        }
    }
}

impl Drop for Session {
    /// After a panic of the export: without this the writer thread would wait, and hold the export, for ever.
    fn drop(&mut self) {
        if self.writer.is_some() {
            self.shared.outlet.break_off();
            self.shared.outlet.close();
        }
    }
}

/// Hands writes to the export and gives each one's error number, 0 for none, to `done`.
pub fn write_batch(export: &dyn Export, writes: &[Placed], buffer: &[u8], mut done: impl FnMut(u64, u32)) {
    let requests: Vec<WriteRequest<'_>> = writes
        .iter()
        .map(|write| WriteRequest { offset: write.offset, data: &buffer[write.data.clone()], fua: write.fua })
        .collect();
    let unset = || Err(io::ErrorKind::Other.into());
    let mut results: Vec<io::Result<()>> = std::iter::repeat_with(unset).take(requests.len()).collect();
    export.write_batch(&requests, &mut results);
    for (write, result) in writes.iter().zip(&results) {
        done(write.cookie, result.as_ref().map_or_else(wire::errno_of, |()| 0));
    }
}
