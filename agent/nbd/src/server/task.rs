//! Requests that worker threads execute, and what they share with their connection.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Durability};

use super::flight::{Flight, Order, Permit};
use super::outlet::{Outlet, Reply};
use super::pool::Pool;
use super::session::write_batch;
use crate::export::Export;
use crate::wire::{self, Request, chunk, cmd};

/// Extents in one answer to BLOCK_STATUS; the client asks again for what follows.
const STATUS_EXTENTS_MAX: usize = 4096;
/// Receive buffers that are kept for the next round.
const SPARE_BUFFERS_MAX: usize = 8;

/// A connection, as its requests see it.
pub struct Shared {
    pub export: Arc<dyn Export>,
    pub structured: bool,
    pub allocation: bool,
    pub outlet: Outlet,
    pub order: Order<Flying>,
    pub flight: Arc<Flight>,
    pub pool: Arc<Pool>,
    pub spare: Mutex<Vec<Vec<u8>>>,
}

/// A receive buffer that tasks of one round keep.
pub struct Block {
    bytes: Vec<u8>,
    shared: Arc<Shared>,
    spare_bytes: usize,
    _permit: Permit,
}

impl Block {
    pub fn new(bytes: Vec<u8>, permit: Permit, shared: Arc<Shared>, spare_bytes: usize) -> Self {
        Self { bytes, shared, spare_bytes, _permit: permit }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut spare = self.shared.spare.lock().expect("no panic while held");
        if self.bytes.len() == self.spare_bytes && spare.len() < SPARE_BUFFERS_MAX {
            spare.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// A write and where its data lies in the receive buffer.
pub struct Placed {
    pub cookie: u64,
    pub offset: u64,
    pub data: Range<usize>,
    pub fua: bool,
}

impl Placed {
    fn extent(&self) -> Extent {
        Extent::new(self.offset, self.data.len() as u64)
    }
}

pub enum Action {
    Read {
        offset: u64,
        length: u32,
    },
    /// Executed in their order, by one call; never empty.
    Write(Vec<Placed>),
    Zero {
        extent: Extent,
        discard: bool,
        fast: bool,
        durability: Durability,
    },
    Flush,
    Status {
        extent: Extent,
        one: bool,
    },
}

impl Action {
    /// What a checked request other than WRITE wants.
    pub fn of(request: &Request) -> Self {
        let extent = Extent::new(request.offset, u64::from(request.length));
        let has = |flag| request.flags & flag != 0;
        let durability = if has(cmd::FLAG_FUA) { Durability::Durable } else { Durability::Cached };
        match request.command {
            cmd::READ => Action::Read { offset: request.offset, length: request.length },
            cmd::TRIM => Action::Zero { extent, discard: true, fast: false, durability },
            cmd::WRITE_ZEROES => {
                Action::Zero { extent, discard: !has(cmd::FLAG_NO_HOLE), fast: has(cmd::FLAG_FAST_ZERO), durability }
            }
            cmd::BLOCK_STATUS => Action::Status { extent, one: has(cmd::FLAG_REQ_ONE) },
            _ => Action::Flush,
        }
    }
}

pub struct Task {
    cookie: u64,
    pub action: Action,
}

impl Task {
    pub fn new(cookie: u64, action: Action) -> Self {
        Self { cookie, action }
    }

    pub fn carries_data(&self) -> bool {
        matches!(self.action, Action::Write(_))
    }

    fn changes(&self) -> Vec<Extent> {
        match &self.action {
            Action::Write(writes) => writes.iter().map(Placed::extent).collect(),
            Action::Zero { extent, .. } => vec![*extent],
            _ => Vec::new(),
        }
    }

    /// Whether it changes a part of `extent`.
    pub fn writes(&self, extent: Extent) -> bool {
        match &self.action {
            Action::Write(writes) => writes.iter().any(|write| write.extent().overlaps(&extent)),
            Action::Zero { extent: own, .. } => own.overlaps(&extent),
            _ => false,
        }
    }
}

/// A task between its submission and its reply.
pub struct Flying {
    shared: Arc<Shared>,
    task: Task,
    block: Option<Arc<Block>>,
    permit: Option<Permit>,
    /// Its place in the order of writes.
    number: Option<u64>,
}

impl Shared {
    /// Waits for room in the limits, then leaves the task to the workers.
    pub fn submit(self: &Arc<Self>, task: Task, block: Option<&Arc<Block>>) {
        // Data of writes is accounted for with its buffer.
        let (requests, bytes) = match &task.action {
            Action::Read { length, .. } => (1, *length as usize),
            Action::Write(writes) => (1, writes.len() * wire::SIMPLE_REPLY_BYTES),
            _ => (1, 0),
        };
        let permit = self.flight.acquire(requests, bytes);
        let changes = task.changes();
        let block = task.carries_data().then(|| block.cloned()).flatten();
        let flying = |number| Flying { shared: self.clone(), task, block, permit: Some(permit), number };
        let free = if changes.is_empty() {
            Some(flying(None))
        } else {
            self.order.enter(changes, |number| flying(Some(number)))
        };
        if let Some(flying) = free {
            self.pool.submit(Box::new(move || flying.run()));
        }
    }

    /// The head of a successful answer to READ; its data follows.
    pub fn read_head(&self, request: &Request) -> ReadHead {
        let mut head = ReadHead { bytes: [0; 28], length: 0 };
        if self.structured {
            head.length = 28;
            head.bytes[..20].copy_from_slice(&wire::structured_reply(
                request.cookie,
                chunk::OFFSET_DATA,
                // The limit on requests is far below 4 GiB.
                request.length + 8,
            ));
            head.bytes[20..].copy_from_slice(&request.offset.to_be_bytes());
        } else {
            head.length = wire::SIMPLE_REPLY_BYTES;
            head.bytes[..16].copy_from_slice(&wire::simple_reply(request.cookie, 0));
        }
        head
    }
}

pub struct ReadHead {
    bytes: [u8; 28],
    length: usize,
}

impl AsRef<[u8]> for ReadHead {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Flying {
    fn run(mut self) {
        let bytes = self.execute();
        self.block = None;
        // Before the reply: a client that then writes to the same place finds nothing in its way.
        self.leave();
        if let Some(permit) = self.permit.take() {
            self.shared.outlet.deliver(Reply { bytes, sent: 0, _permit: permit });
        }
    }

    /// Makes way for the writes that wait for this one.
    fn leave(&mut self) {
        let Some(number) = self.number.take() else { return };
        for flying in self.shared.order.leave(number) {
            self.shared.pool.submit(Box::new(move || flying.run()));
        }
    }

    /// The complete reply.
    fn execute(&self) -> Vec<u8> {
        let (shared, cookie) = (&self.shared, self.task.cookie);
        let export = &*shared.export;
        let done = |result: std::io::Result<()>| {
            wire::simple_reply(cookie, result.as_ref().map_or_else(wire::errno_of, |()| 0)).to_vec()
        };
        match &self.task.action {
            Action::Read { offset, length } => {
                let request = Request { flags: 0, command: cmd::READ, cookie, offset: *offset, length: *length };
                let head = shared.read_head(&request);
                let head = head.as_ref();
                let mut reply = vec![0; head.len() + *length as usize];
                reply[..head.len()].copy_from_slice(head);
                match export.read(*offset, &mut reply[head.len()..]) {
                    Ok(()) => reply,
                    Err(error) => self.refused(&error),
                }
            }
            Action::Write(writes) => {
                let Some(block) = &self.block else { return Vec::new() };
                let mut replies = Vec::with_capacity(writes.len() * wire::SIMPLE_REPLY_BYTES);
                write_batch(export, writes, &block.bytes, |cookie, error| {
                    replies.extend(wire::simple_reply(cookie, error));
                });
                replies
            }
            Action::Zero { fast: true, .. } if !export.zeroes_fast() => {
                done(Err(std::io::ErrorKind::Unsupported.into()))
            }
            Action::Zero { extent, discard, durability, .. } => done(export.zero(*extent, *discard, *durability)),
            Action::Flush => done(export.flush()),
            Action::Status { extent, one } => match allocation(export, *extent, *one) {
                Ok(runs) => {
                    let mut reply =
                        wire::structured_reply(cookie, chunk::BLOCK_STATUS, 4 + 8 * runs.len() as u32).to_vec();
                    reply.extend(wire::BASE_ALLOCATION_ID.to_be_bytes());
                    for (length, kind) in runs {
                        let flags = match kind {
                            Allocation::Data => 0,
                            Allocation::Hole => wire::STATE_HOLE | wire::STATE_ZERO,
                        };
                        reply.extend(length.to_be_bytes());
                        reply.extend(flags.to_be_bytes());
                    }
                    reply
                }
                Err(error) => self.refused(&error),
            },
        }
    }

    /// A failed READ or BLOCK_STATUS.
    fn refused(&self, error: &std::io::Error) -> Vec<u8> {
        let number = wire::errno_of(error);
        if !self.shared.structured {
            return wire::simple_reply(self.task.cookie, number).to_vec();
        }
        let mut reply = wire::structured_reply(self.task.cookie, chunk::ERROR, 6).to_vec();
        reply.extend(number.to_be_bytes());
        reply.extend([0, 0]);
        reply
    }
}

impl Drop for Flying {
    fn drop(&mut self) {
        if self.permit.is_some() {
            // Only after a panic: a client that waited for this reply would wait for ever.
            self.shared.outlet.break_off();
        }
        self.leave();
    }
}

/// The runs that make up `extent`; its first one, if only that is wanted. The last ones may be missing.
fn allocation(export: &dyn Export, extent: Extent, one: bool) -> std::io::Result<Vec<(u32, Allocation)>> {
    let mut runs: Vec<(u32, Allocation)> = Vec::new();
    let mut at = extent.offset;
    while at < extent.end() && runs.len() < STATUS_EXTENTS_MAX {
        let (length, kind) = export.allocation(at)?;
        // The extent's length is a u32, so is that of its parts.
        let length = length.clamp(1, extent.end() - at) as u32;
        at += u64::from(length);
        match runs.last_mut() {
            Some((before, same)) if *same == kind => *before += length,
            Some(_) if one => break,
            _ => runs.push((length, kind)),
        }
    }
    Ok(runs)
}
