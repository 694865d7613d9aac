//! A blocking NBD client: reads served points, writes to `qemu-nbd` for exports to other image formats.
//!
//! Requests are pipelined: large reads and writes are cut into requests of which a limited number is in flight.
//! [`Client::submit_write`] and [`Client::submit_zero`] return while the server still works;
//! [`Client::drain`] waits for them and tells of the first failure. Writes in flight together must not overlap.

mod negotiate;

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use tidemark_base::Extent;
use tidemark_base::disk::Allocation;

use crate::stream::{Socket, Stream};
use crate::wire::{self, Request, chunk, cmd, flag};
use negotiate::{Handshake, TlsTo};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What every server takes (the specification's default).
const REQUEST_BYTES_DEFAULT: u32 = 32 << 20;
/// Larger transfers are cut into requests of this size, so that both ends work at the same time.
const PIECE_BYTES: u32 = 256 << 10;
/// Requests in flight. Their replies without data fit into any socket's buffer, so that nobody waits for the other.
const IN_FLIGHT_MAX: usize = 16;
/// The most that one BLOCK_STATUS asks about, and the longest answer to it.
const STATUS_BYTES_MAX: u64 = 1 << 30;
const STATUS_REPLY_BYTES_MAX: u32 = 1 << 20;
/// One TRIM or WRITE_ZEROES: these are 32-bit on the wire, and this is a multiple of every block size.
const ZERO_BYTES_MAX: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to the NBD server at {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("the NBD server refused export {name:?}: {reason}")]
    Refused { name: String, reason: String },
    #[error("TLS with the NBD server failed")]
    Tls(#[source] io::Error),
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the NBD server failed a {operation} at {extent}: {}", io::Error::from_raw_os_error(*errno as i32))]
    Server { operation: &'static str, extent: Extent, errno: u32 },
    #[error("{extent} is not on the export, which has {bytes} bytes in blocks of {block_bytes}")]
    Range { extent: Extent, bytes: u64, block_bytes: u32 },
    #[error("the NBD server does not offer {0} for this export")]
    Unsupported(&'static str),
    #[error("the connection to the NBD server failed")]
    Io(#[from] io::Error),
}

impl From<ClientError> for io::Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Io(error) => error,
            ClientError::Server { errno, .. } => io::Error::from_raw_os_error(errno as i32),
            error => io::Error::other(error),
        }
    }
}

/// What the server said of the export.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExportInfo {
    pub bytes: u64,
    flags: u16,
    pub block_bytes_min: u32,
    pub block_bytes_preferred: u32,
    pub request_bytes_max: u32,
}

impl ExportInfo {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub fn is_read_only(&self) -> bool {
        self.has(flag::READ_ONLY)
    }

    pub fn can_flush(&self) -> bool {
        self.has(flag::SEND_FLUSH)
    }

    pub fn can_fua(&self) -> bool {
        self.has(flag::SEND_FUA)
    }

    pub fn can_trim(&self) -> bool {
        self.has(flag::SEND_TRIM)
    }

    pub fn can_zero(&self) -> bool {
        self.has(flag::SEND_WRITE_ZEROES)
    }

    pub fn zeroes_fast(&self) -> bool {
        self.has(flag::SEND_FAST_ZERO)
    }

    pub fn multi_conn(&self) -> bool {
        self.has(flag::CAN_MULTI_CONN)
    }
}

pub struct Client {
    stream: Stream,
    info: ExportInfo,
    structured: bool,
    allocation: Option<u32>,
    /// The number of the context that was asked for by name.
    context: Option<u32>,
    cookie: u64,
    received: Vec<u8>,
    filled: std::ops::Range<usize>,
    /// Writes that were submitted and not answered.
    writes: HashMap<u64, Pending<'static>>,
    failed: Option<ClientError>,
}

/// A request that waits for its reply.
struct Pending<'a> {
    operation: &'static str,
    extent: Extent,
    answer: Answer<'a>,
    errno: u32,
}

enum Answer<'a> {
    Nothing,
    Data {
        buffer: &'a mut [u8],
        covered: usize,
    },
    /// Of one context: lengths and flags.
    Status {
        context: u32,
        runs: Vec<(u32, u32)>,
    },
}

impl Client {
    pub fn connect_unix(path: &Path, name: &str) -> Result<Self, ClientError> {
        let socket =
            UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Self::over_unix(socket, name)
    }

    pub fn over_unix(socket: UnixStream, name: &str) -> Result<Self, ClientError> {
        Self::start(Socket::Unix(socket), name, None, None)
    }

    /// Asks for one metadata context more, such as `qemu:allocation-depth`: see [`context_status`](Self::context_status).
    pub fn connect_unix_for(path: &Path, name: &str, context: &str) -> Result<Self, ClientError> {
        let socket =
            UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Self::start(Socket::Unix(socket), name, None, Some(context))
    }

    /// Through TLS, which is the only way over TCP. `config` holds this end's certificate and whom it trusts.
    pub fn over_tls(
        socket: TcpStream,
        server: ServerName<'static>,
        config: Arc<rustls::ClientConfig>,
        name: &str,
    ) -> Result<Self, ClientError> {
        socket.set_nodelay(true)?;
        Self::start(Socket::Tcp(socket), name, Some(TlsTo { name: server, config }), None)
    }

    fn start(socket: Socket, name: &str, tls: Option<TlsTo>, context: Option<&str>) -> Result<Self, ClientError> {
        if name.len() > wire::NAME_BYTES_MAX {
            return Err(ClientError::Refused { name: name.to_owned(), reason: "the name is too long".into() });
        }
        let stream = Stream::new(socket);
        stream.set_timeout(Some(HANDSHAKE_TIMEOUT))?;
        let handshake = Handshake { stream: &stream, deadline: Instant::now() + HANDSHAKE_TIMEOUT };
        let agreed = handshake.run(name, tls, context)?;
        stream.set_timeout(None)?;
        Ok(Self {
            stream,
            info: agreed.info,
            structured: agreed.structured,
            allocation: agreed.allocation,
            context: agreed.context,
            cookie: 0,
            received: vec![0; 64 << 10],
            filled: 0..0,
            writes: HashMap::new(),
            failed: None,
        })
    }

    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    pub fn bytes(&self) -> u64 {
        self.info.bytes
    }

    /// Bounds the wait for each answer; after a time-out the connection is of no use any more.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.set_timeout(limit)
    }

    /// Fills `buffer`.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        self.check(Extent::new(offset, buffer.len() as u64))?;
        self.drain()?;
        let mut at = offset;
        let mut pending = HashMap::new();
        let mut failed = None;
        for piece in buffer.chunks_mut(self.piece_bytes()) {
            let extent = Extent::new(at, piece.len() as u64);
            let cookie = self.send(cmd::READ, 0, extent, &[])?;
            at = extent.end();
            let answer = Answer::Data { buffer: piece, covered: 0 };
            pending.insert(cookie, Pending { operation: "read", extent, answer, errno: 0 });
            if pending.len() == IN_FLIGHT_MAX {
                failed = failed.or(self.finish_one(&mut pending)?.err());
            }
        }
        while !pending.is_empty() {
            failed = failed.or(self.finish_one(&mut pending)?.err());
        }
        failed.map_or(Ok(()), Err)
    }

    /// Writes and waits for the answer.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.submit_write(offset, data)?;
        self.drain()
    }

    /// Writes; on stable storage when this returns.
    pub fn write_durable(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        if !self.info.can_fua() {
            self.write(offset, data)?;
            return self.flush();
        }
        self.submit(offset, data, cmd::FLAG_FUA)?;
        self.drain()
    }

    /// Writes many places, a limited number of requests at a time, and waits for all.
    pub fn write_many<'a>(&mut self, writes: impl IntoIterator<Item = (u64, &'a [u8])>) -> Result<(), ClientError> {
        for (offset, data) in writes {
            self.submit_write(offset, data)?;
        }
        self.drain()
    }

    /// Sends a write; waits only when too many are in flight. Its failure is told by a later call.
    pub fn submit_write(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.submit(offset, data, 0)
    }

    fn submit(&mut self, offset: u64, data: &[u8], flags: u16) -> Result<(), ClientError> {
        self.check(Extent::new(offset, data.len() as u64))?;
        let mut at = offset;
        for piece in data.chunks(self.piece_bytes()) {
            let extent = Extent::new(at, piece.len() as u64);
            self.submit_request("write", cmd::WRITE, flags, extent, piece)?;
            at = extent.end();
        }
        Ok(())
    }

    /// Makes a range read as zeroes, as [`submit_write`](Self::submit_write) writes. `discard` allows holes.
    pub fn submit_zero(&mut self, extent: Extent, discard: bool) -> Result<(), ClientError> {
        self.check(extent)?;
        if !self.info.can_zero() {
            return Err(ClientError::Unsupported("WRITE_ZEROES"));
        }
        let flags = if discard { 0 } else { cmd::FLAG_NO_HOLE };
        self.submit_parts("zeroing", cmd::WRITE_ZEROES, flags, extent)
    }

    fn submit_parts(
        &mut self,
        operation: &'static str,
        command: u16,
        flags: u16,
        extent: Extent,
    ) -> Result<(), ClientError> {
        let mut at = extent.offset;
        while at < extent.end() {
            let part = Extent::new(at, (extent.end() - at).min(ZERO_BYTES_MAX));
            self.submit_request(operation, command, flags, part, &[])?;
            at = part.end();
        }
        Ok(())
    }

    fn submit_request(
        &mut self,
        operation: &'static str,
        command: u16,
        flags: u16,
        extent: Extent,
        data: &[u8],
    ) -> Result<(), ClientError> {
        while self.writes.len() >= IN_FLIGHT_MAX {
            self.finish_write()?;
        }
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let cookie = self.send(command, flags, extent, data)?;
        self.writes.insert(cookie, Pending { operation, extent, answer: Answer::Nothing, errno: 0 });
        Ok(())
    }

    fn finish_write(&mut self) -> Result<(), ClientError> {
        let mut writes = std::mem::take(&mut self.writes);
        let finished = self.finish_one(&mut writes);
        self.writes = writes;
        if let Err(error) = finished? {
            self.failed.get_or_insert(error);
        }
        Ok(())
    }

    /// Waits for everything submitted; the first failure since the last call.
    pub fn drain(&mut self) -> Result<(), ClientError> {
        while !self.writes.is_empty() {
            self.finish_write()?;
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    pub fn zero(&mut self, extent: Extent, discard: bool) -> Result<(), ClientError> {
        self.submit_zero(extent, discard)?;
        self.drain()
    }

    /// The range is not needed any more; what it reads as afterwards is the server's choice.
    pub fn trim(&mut self, extent: Extent) -> Result<(), ClientError> {
        self.check(extent)?;
        if !self.info.can_trim() {
            return Err(ClientError::Unsupported("TRIM"));
        }
        self.submit_parts("trim", cmd::TRIM, 0, extent)?;
        self.drain()
    }

    /// Everything written before is on stable storage when this returns.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.drain()?;
        if !self.info.can_flush() {
            return Err(ClientError::Unsupported("FLUSH"));
        }
        self.submit_request("flush", cmd::FLUSH, 0, Extent::new(0, 0), &[])?;
        self.drain()
    }

    /// The runs of data and holes that make up `extent`, neighbours of one kind joined.
    pub fn block_status(&mut self, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ClientError> {
        let context = self.allocation.ok_or(ClientError::Unsupported("base:allocation"))?;
        // A hole that does not read as zeroes is data to whoever copies the disk.
        let kind = |flags| if flags & wire::STATE_ZERO != 0 { Allocation::Hole } else { Allocation::Data };
        self.status(context, extent, kind)
    }

    /// The runs of `extent` with their flags in the context that was asked for.
    pub fn context_status(&mut self, extent: Extent) -> Result<Vec<(Extent, u32)>, ClientError> {
        let context = self.context.ok_or(ClientError::Unsupported("the metadata context that was asked for"))?;
        self.status(context, extent, |flags| flags)
    }

    fn status<K: PartialEq>(
        &mut self,
        context: u32,
        extent: Extent,
        kind_of: impl Fn(u32) -> K,
    ) -> Result<Vec<(Extent, K)>, ClientError> {
        self.check(extent)?;
        self.drain()?;
        let mut runs: Vec<(Extent, K)> = Vec::new();
        let mut at = extent.offset;
        while at < extent.end() {
            let part = Extent::new(at, (extent.end() - at).min(STATUS_BYTES_MAX));
            let cookie = self.send(cmd::BLOCK_STATUS, 0, part, &[])?;
            let answer = Answer::Status { context, runs: Vec::new() };
            let mut pending =
                HashMap::from([(cookie, Pending { operation: "status", extent: part, answer, errno: 0 })]);
            let Answer::Status { runs: found, .. } = self.finish_one(&mut pending)?? else { continue };
            let before = at;
            for (length, flags) in found {
                // A server may say more than it was asked.
                let run = Extent::new(at, u64::from(length).min(extent.end() - at));
                if run.is_empty() {
                    break;
                }
                at = run.end();
                let kind = kind_of(flags);
                match runs.last_mut() {
                    Some((last, same)) if *same == kind => last.length += run.length,
                    _ => runs.push((run, kind)),
                }
            }
            if at == before {
                return Err(ClientError::Protocol("an empty answer to BLOCK_STATUS"));
            }
        }
        Ok(runs)
    }

    /// Waits for everything submitted and says goodbye.
    pub fn close(mut self) -> Result<(), ClientError> {
        self.drain()?;
        self.send(cmd::DISC, 0, Extent::new(0, 0), &[])?;
        self.stream.close_notify();
        Ok(())
    }

    fn piece_bytes(&self) -> usize {
        let block = self.info.block_bytes_min.max(1);
        let most = PIECE_BYTES.min(self.info.request_bytes_max);
        (most - most % block).max(block) as usize
    }

    fn check(&self, extent: Extent) -> Result<(), ClientError> {
        let block = u64::from(self.info.block_bytes_min.max(1));
        let fits = extent.offset.checked_add(extent.length).is_some_and(|end| end <= self.info.bytes);
        if fits && extent.offset.is_multiple_of(block) && extent.length.is_multiple_of(block) {
            return Ok(());
        }
        Err(ClientError::Range { extent, bytes: self.info.bytes, block_bytes: self.info.block_bytes_min })
    }

    fn send(&mut self, command: u16, flags: u16, extent: Extent, data: &[u8]) -> Result<u64, ClientError> {
        self.cookie += 1;
        let length = u32::try_from(extent.length).map_err(|_| ClientError::Protocol("a request of 4 GiB"))?;
        let request = Request { flags, command, cookie: self.cookie, offset: extent.offset, length };
        self.stream.send_two(&request.encode(), data)?;
        Ok(self.cookie)
    }

    /// Receives until one of `pending` is answered completely, and takes it out. The outer error is the connection's.
    fn finish_one<'a>(
        &mut self,
        pending: &mut HashMap<u64, Pending<'a>>,
    ) -> Result<Result<Answer<'a>, ClientError>, ClientError> {
        loop {
            let magic = self.receive_u32()?;
            let (cookie, done) = match magic {
                wire::SIMPLE_REPLY_MAGIC => {
                    let mut head = [0; 12];
                    self.receive(&mut head)?;
                    let (errno, cookie) = (wire::u32_at(&head, 0), wire::u64_at(&head, 4));
                    let request = pending.get_mut(&cookie).ok_or(ClientError::Protocol("a reply to nothing"))?;
                    request.errno = errno;
                    if let Answer::Data { buffer, covered } = &mut request.answer
                        && errno == 0
                    {
                        if self.structured {
                            return Err(ClientError::Protocol("a simple reply to READ"));
                        }
                        self.receive(buffer)?;
                        *covered = buffer.len();
                    }
                    (cookie, true)
                }
                wire::STRUCTURED_REPLY_MAGIC => {
                    let mut head = [0; 16];
                    self.receive(&mut head)?;
                    let (flags, kind) = (wire::u16_at(&head, 0), wire::u16_at(&head, 2));
                    let (cookie, length) = (wire::u64_at(&head, 4), wire::u32_at(&head, 12));
                    let request = pending.get_mut(&cookie).ok_or(ClientError::Protocol("a reply to nothing"))?;
                    self.receive_chunk(request, kind, length)?;
                    (cookie, flags & chunk::FLAG_DONE != 0)
                }
                _ => return Err(ClientError::Protocol("wrong magic number of a reply")),
            };
            if !done {
                continue;
            }
            let Some(Pending { operation, extent, answer, errno }) = pending.remove(&cookie) else { continue };
            if errno != 0 {
                return Ok(Err(ClientError::Server { operation, extent, errno }));
            }
            if let Answer::Data { buffer, covered } = &answer
                && *covered != buffer.len()
            {
                return Err(ClientError::Protocol("a READ was answered in part"));
            }
            return Ok(Ok(answer));
        }
    }

    fn receive_chunk(&mut self, request: &mut Pending<'_>, kind: u16, length: u32) -> Result<(), ClientError> {
        const MALFORMED: ClientError = ClientError::Protocol("a malformed chunk");
        match (kind, &mut request.answer) {
            (chunk::NONE, _) if length == 0 => Ok(()),
            (chunk::OFFSET_DATA | chunk::OFFSET_HOLE, Answer::Data { buffer, covered }) => {
                let mut at = [0; 8];
                self.receive(&mut at)?;
                let is_hole = kind == chunk::OFFSET_HOLE;
                let bytes = if is_hole { self.receive_u32()? } else { length.checked_sub(8).ok_or(MALFORMED)? };
                if is_hole && length != 12 {
                    return Err(MALFORMED);
                }
                let place = u64::from_be_bytes(at)
                    .checked_sub(request.extent.offset)
                    .and_then(|start| usize::try_from(start).ok())
                    .and_then(|start| buffer.get_mut(start..start.checked_add(bytes as usize)?))
                    .ok_or(MALFORMED)?;
                *covered += place.len();
                if is_hole {
                    place.fill(0);
                    return Ok(());
                }
                self.receive(place)
            }
            (chunk::BLOCK_STATUS, Answer::Status { context, runs }) => {
                if length < 4 || length % 8 != 4 || length > STATUS_REPLY_BYTES_MAX {
                    return Err(MALFORMED);
                }
                let mut data = vec![0; length as usize];
                self.receive(&mut data)?;
                if wire::u32_at(&data, 0) == *context {
                    let run = |run: &[u8]| (wire::u32_at(run, 0), wire::u32_at(run, 4));
                    runs.extend(data[4..].chunks_exact(8).map(run));
                }
                Ok(())
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 && (4..=8192).contains(&length) => {
                let mut data = vec![0; length as usize];
                self.receive(&mut data)?;
                // An error without a number is an error all the same.
                request.errno = wire::u32_at(&data, 0).max(1);
                Ok(())
            }
            _ => Err(ClientError::Protocol("a chunk that was not asked for")),
        }
    }

    fn receive_u32(&mut self) -> Result<u32, ClientError> {
        let mut bytes = [0; 4];
        self.receive(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// Receives exactly `target`, through the buffer unless it is large.
    fn receive(&mut self, mut target: &mut [u8]) -> Result<(), ClientError> {
        while !target.is_empty() {
            if self.filled.is_empty() && target.len() >= self.received.len() {
                let count = self.stream.receive(target)?;
                if count == 0 {
                    return Err(ClientError::Io(io::ErrorKind::UnexpectedEof.into()));
                }
                target = &mut target[count..];
                continue;
            }
            if self.filled.is_empty() {
                let count = self.stream.receive(&mut self.received)?;
                if count == 0 {
                    return Err(ClientError::Io(io::ErrorKind::UnexpectedEof.into()));
                }
                self.filled = 0..count;
            }
            let count = target.len().min(self.filled.len());
            target[..count].copy_from_slice(&self.received[self.filled.start..self.filled.start + count]);
            self.filled.start += count;
            target = &mut target[count..];
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server notices at once, also where it holds a duplicate of the socket.
        self.stream.shutdown(Shutdown::Write);
    }
}
