//! A disk inside an image of another format (qcow2, VHDX, VHD, VMDK), which a `qemu-nbd` of our own reads and writes for us.
//!
//! *Consistency.* A write that allocates leaves the place of its block in that program's memory alone, until a flush. So the first
//! write to each block is flushed before it returns, as is all zeroing; later ones are in place, and in the page cache when they
//! return, as those of a raw disk are. [`ImageDisk`]'s promise follows: whatever ends that program or this process, what was
//! acknowledged is there.
//! *Retries.* Where the program ends, it is started again and what it was asked for is asked again, [`ATTEMPTS`] times; whoever
//! asked waits meanwhile. The old one is gone for certain before that, so that no write of its own comes late. Then the
//! request fails, as on a disk that fails. *Cancellation.* None: a request runs to its end. *Crash.* The program
//! ends when its connections do, which were made before it was started: none is left behind. It inherits the lock of the file, so that
//! nobody else opens the image before it has ended.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::socket::MsgFlags;
use tidemark_base::disk::{Allocation, Disk, DiskWrite, Durability, ImageDisk};
use tidemark_base::stop::Stop;
use tidemark_base::storage::create_private_folder;
use tidemark_base::{Extent, sabotage};

use crate::client::{Client, ClientError};
use crate::qemu::{QemuNbdError, TIME_MAX};

/// Requests that are executed at the same time.
const CONNECTIONS: usize = 4;
/// How often a request is asked for.
const ATTEMPTS: u32 = 5;
/// Where it could not be started, it is not tried again before.
const START_AGAIN_AFTER: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long it is waited for before it is looked whether it ended.
const LOOK_FOR: Duration = Duration::from_millis(50);
const MESSAGE_BYTES_MAX: u64 = 4096;
/// Blocks that are remembered; those of an image that has more are flushed each time. 16 MiB of memory.
const BLOCKS_MAX: u64 = 128 << 20;
/// What one question about allocation covers.
const STATUS_BYTES: u64 = 1 << 30;
/// systemd's number of the first inherited socket.
const INHERITED: i32 = 3;

/// What is opened, and how.
#[derive(Clone)]
pub struct Opening {
    pub path: PathBuf,
    /// Everything that QEMU is told of it, in JSON: it guesses nothing.
    pub options: String,
    /// Whose locks keep others out, for as long as the program runs.
    pub locked: Arc<File>,
    /// What is allocated at once; `None` where everything is from the beginning.
    pub block_bytes: Option<u64>,
}

/// An image that is open.
pub struct QemuImage {
    opening: Opening,
    bytes: u64,
    running: Mutex<Running>,
    returned: Condvar,
    /// Blocks that were written to, and flushed since. None: each write is flushed.
    settled: Option<Settled>,
    flush_failed: AtomicBool,
    restarts: AtomicU64,
}

#[derive(Default)]
struct Running {
    program: Option<Program>,
    /// Counts starts.
    generation: u64,
    idle: Vec<Client>,
    failed_at: Option<Instant>,
    closed: bool,
}

struct Program {
    child: Child,
    said: File,
}

struct Settled {
    block_bytes: u64,
    bits: Vec<AtomicU64>,
}

impl Settled {
    fn new(block_bytes: u64, disk_bytes: u64) -> Option<Self> {
        let blocks = disk_bytes.div_ceil(block_bytes);
        (blocks <= BLOCKS_MAX).then(|| {
            let bits = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
            Self { block_bytes, bits }
        })
    }

    fn blocks(&self, extent: Extent) -> std::ops::RangeInclusive<u64> {
        extent.offset / self.block_bytes..=(extent.end() - 1) / self.block_bytes
    }

    fn covers(&self, extent: Extent) -> bool {
        let is_set = |block: u64| self.bits[(block / 64) as usize].load(Ordering::Acquire) & (1 << (block % 64)) != 0;
        self.blocks(extent).all(is_set)
    }

    fn set(&self, extent: Extent, settled: bool) {
        for block in self.blocks(extent) {
            let (word, bit) = (&self.bits[(block / 64) as usize], 1 << (block % 64));
            match settled {
                true => word.fetch_or(bit, Ordering::AcqRel),
                false => word.fetch_and(!bit, Ordering::AcqRel),
            };
        }
    }
}

impl QemuImage {
    pub fn open(opening: Opening) -> Result<Self, QemuNbdError> {
        let (program, idle) = start(&opening)?;
        let bytes = idle.first().map_or(0, Client::bytes);
        let settled = opening.block_bytes.and_then(|block_bytes| Settled::new(block_bytes, bytes));
        let running = Running { program: Some(program), generation: 1, idle, ..Running::default() };
        Ok(Self {
            opening,
            bytes,
            running: Mutex::new(running),
            returned: Condvar::new(),
            settled,
            flush_failed: AtomicBool::new(false),
            restarts: AtomicU64::new(0),
        })
    }

    /// The process that has the image open, for whoever watches or ends it.
    pub fn process(&self) -> Option<u32> {
        self.running().program.as_ref().map(|program| program.child.id())
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().expect("no panic while held")
    }

    /// A connection, and the start that it belongs to.
    fn take(&self) -> io::Result<(Client, u64)> {
        let mut running = self.running();
        loop {
            if running.closed {
                return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN));
            }
            if running.program.is_none() {
                if running.failed_at.is_some_and(|at| at.elapsed() < START_AGAIN_AFTER) {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                let started = start(&self.opening).and_then(|(program, idle)| match idle.first() {
                    Some(client) if client.bytes() == self.bytes => Ok((program, idle)),
                    _ => Err(QemuNbdError::Refused {
                        path: self.opening.path.clone(),
                        message: "its disk has another size than before".into(),
                    }),
                });
                match started {
                    Ok((program, idle)) => {
                        running.program = Some(program);
                        running.idle = idle;
                        running.generation += 1;
                        running.failed_at = None;
                        self.restarts.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(path = %self.opening.path.display(), "image was opened again");
                        self.returned.notify_all();
                    }
                    Err(error) => {
                        running.failed_at = Some(Instant::now());
                        tracing::error!(path = %self.opening.path.display(), error = %error, "image cannot be opened again");
                        return Err(io::Error::from_raw_os_error(libc::EIO));
                    }
                }
            }
            let generation = running.generation;
            if let Some(client) = running.idle.pop() {
                return Ok((client, generation));
            }
            running = self.returned.wait(running).expect("no panic while held");
        }
    }

    fn give_back(&self, client: Client, generation: u64) {
        let mut running = self.running();
        if running.generation == generation && running.program.is_some() {
            running.idle.push(client);
            self.returned.notify_one();
        }
    }

    /// Whoever comes next starts it again. It is gone when this returns: nothing that it was asked for happens later.
    fn broken(&self, generation: u64) {
        let mut running = self.running();
        if running.generation != generation {
            return;
        }
        running.idle.clear();
        if let Some(mut program) = running.program.take() {
            let _ = program.child.kill();
            let ended = program.child.wait();
            let (path, said) = (self.opening.path.display(), program.said());
            tracing::error!(%path, ?ended, %said, "the program that has an image open ended");
        }
        self.returned.notify_all();
    }

    /// Asks, and asks again where the program ended meanwhile.
    fn ask<T>(&self, mut request: impl FnMut(&mut Client) -> Result<T, ClientError>) -> io::Result<T> {
        let mut last = io::Error::from_raw_os_error(libc::EIO);
        for _ in 0..ATTEMPTS {
            let (mut client, generation) = self.take()?;
            match request(&mut client) {
                Ok(answer) => {
                    self.give_back(client, generation);
                    return Ok(answer);
                }
                Err(error @ (ClientError::Server { .. } | ClientError::Range { .. } | ClientError::Unsupported(_))) => {
                    self.give_back(client, generation);
                    return Err(error.into());
                }
                Err(error) => {
                    tracing::warn!(path = %self.opening.path.display(), error = %error, "the program that has an image open does not answer");
                    drop(client);
                    self.broken(generation);
                    last = error.into();
                }
            }
        }
        // A guest knows numbers, and this one says that its disk failed.
        tracing::error!(path = %self.opening.path.display(), error = %last, "a request to an image failed");
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    fn must_settle(&self, extent: Extent) -> bool {
        self.opening.block_bytes.is_some()
            && !sabotage::is("image-settle")
            && !self.settled.as_ref().is_some_and(|settled| settled.covers(extent))
    }

    fn set_settled(&self, extent: Extent, is_settled: bool) {
        if let Some(settled) = self.settled.as_ref().filter(|_| !extent.is_empty()) {
            settled.set(extent, is_settled);
        }
    }

    /// A flush that failed fails for ever: the page cache forgets what it could not write.
    fn flush_by(&self, client: &mut Client) -> Result<(), ClientError> {
        let flushed = client.flush();
        if let Err(ClientError::Server { .. }) = &flushed {
            self.flush_failed.store(true, Ordering::Release);
        }
        flushed
    }
}

fn failed_flush() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

fn extent_of(write: &DiskWrite<'_>) -> Extent {
    Extent::new(write.offset, write.data.len() as u64)
}

/// Each write gets a result; what fails is the connection.
fn write_each(
    client: &mut Client,
    writes: &[DiskWrite<'_>],
    results: &mut [io::Result<()>],
) -> Result<(), ClientError> {
    let together = client.write_many(writes.iter().map(|write| (write.offset, write.data)));
    if together.is_ok() {
        results.iter_mut().for_each(|result| *result = Ok(()));
        return Ok(());
    }
    if let Err(error @ (ClientError::Io(_) | ClientError::Protocol(_))) = together {
        return Err(error);
    }
    // Some failed. Again one by one, to know which: they overlap nothing that is in flight.
    for (write, result) in writes.iter().zip(results) {
        *result = match client.write(write.offset, write.data) {
            Ok(()) => Ok(()),
            Err(error @ (ClientError::Io(_) | ClientError::Protocol(_))) => return Err(error),
            Err(error) => Err(error.into()),
        };
    }
    Ok(())
}

impl ImageDisk for QemuImage {
    fn write_many(&self, writes: &[DiskWrite<'_>], results: &mut [io::Result<()>]) {
        let asked = self.ask(|client| {
            write_each(client, writes, results)?;
            let is_owed =
                |write: &DiskWrite<'_>| write.durability == Durability::Durable || self.must_settle(extent_of(write));
            let owed: Vec<usize> =
                (0..writes.len()).filter(|&at| results[at].is_ok() && is_owed(&writes[at])).collect();
            if owed.is_empty() {
                return Ok(());
            }
            match self.flush_by(client) {
                Ok(()) => owed.iter().for_each(|&at| self.set_settled(extent_of(&writes[at]), true)),
                Err(ClientError::Server { .. }) => owed.iter().for_each(|&at| results[at] = Err(failed_flush())),
                Err(error) => return Err(error),
            }
            Ok(())
        });
        if let Err(error) = asked {
            let number = error.raw_os_error().unwrap_or(libc::EIO);
            results.iter_mut().for_each(|result| *result = Err(io::Error::from_raw_os_error(number)));
        }
    }

    fn has_failed_to_sync(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    fn close(&self) -> io::Result<()> {
        let mut running = self.running();
        running.closed = true;
        self.returned.notify_all();
        running.idle.clear();
        let Some(mut program) = running.program.take() else { return Ok(()) };
        drop(running);
        let status = program.ended()?;
        match status.success() {
            true => Ok(()),
            false => Err(io::Error::other(format!("qemu-nbd, which had the image open: {status}: {}", program.said()))),
        }
    }
}

impl Disk for QemuImage {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.ask(|client| client.read(offset, buffer))
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let mut results = [Ok(())];
        self.write_many(&[DiskWrite { offset, data, durability }], &mut results);
        let [result] = results;
        result
    }

    /// Where something is discarded that is a hole already nothing is done: formats without zeroed blocks would fill it with zeroes.
    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        self.set_settled(extent, false);
        self.ask(|client| {
            match discard {
                true => {
                    let runs = client.block_status(extent)?;
                    for (run, _) in runs.into_iter().filter(|(_, kind)| *kind == Allocation::Data) {
                        client.submit_zero(run, true)?;
                    }
                }
                false => client.submit_zero(extent, false)?,
            }
            client.drain()?;
            if durability == Durability::Durable || self.opening.block_bytes.is_some() {
                self.flush_by(client)?;
            }
            Ok(())
        })
    }

    fn flush(&self) -> io::Result<()> {
        if self.has_failed_to_sync() {
            return Err(failed_flush());
        }
        self.ask(|client| self.flush_by(client))?;
        // A program that was started since passes no flush on before it wrote something itself: what the one before it wrote
        // would stay in the page cache.
        self.opening.locked.sync_data().inspect_err(|_| self.flush_failed.store(true, Ordering::Release))
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        let part = Extent::new(offset, (self.bytes - offset).min(STATUS_BYTES));
        let runs = self.ask(|client| client.block_status(part))?;
        Ok(runs.first().map_or((part.length, Allocation::Data), |(run, kind)| (run.length, *kind)))
    }
}

impl Drop for QemuImage {
    fn drop(&mut self) {
        // It ends by itself, as after a kill of this process; waiting for it leaves no dead child.
        let _ = self.close();
    }
}

impl Program {
    fn ended(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + TIME_MAX;
        let never = Stop::new();
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() > deadline => return Err(io::ErrorKind::TimedOut.into()),
                None => never.wait_for(LOOK_AGAIN),
            };
        }
    }

    /// What it wrote so far.
    fn said(&mut self) -> String {
        let mut message = Vec::new();
        let _ = self.said.rewind();
        let _ = (&self.said).take(MESSAGE_BYTES_MAX).read_to_end(&mut message);
        String::from_utf8_lossy(&message).trim().to_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Does nothing to one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the program; it listens where we are connected already.
fn start(opening: &Opening) -> Result<(Program, Vec<Client>), QemuNbdError> {
    let refused = |message: String| QemuNbdError::Refused { path: opening.path.clone(), message };
    let run = |source| QemuNbdError::Run { source };
    let (mut program, streams) = spawn(opening).map_err(run)?;
    wait_ready(&mut program, &streams[0], opening)?;
    let mut clients = Vec::new();
    for stream in streams {
        match Client::over_unix(stream, "") {
            Ok(client) => clients.push(client),
            Err(error) => return Err(refused(format!("{error}; {}", program.said()))),
        }
    }
    // It opened a path, we hold a file.
    let is_same =
        |of: &std::fs::Metadata, locked: &std::fs::Metadata| (of.dev(), of.ino()) == (locked.dev(), locked.ino());
    match (std::fs::metadata(&opening.path), opening.locked.metadata()) {
        (Ok(of), Ok(locked)) if is_same(&of, &locked) => Ok((program, clients)),
        _ => Err(refused("another file lies in its place now".into())),
    }
}

/// Its greeting says that it has the image open.
fn wait_ready(program: &mut Program, stream: &UnixStream, opening: &Opening) -> Result<(), QemuNbdError> {
    let run = |source: io::Error| QemuNbdError::Run { source };
    let deadline = Instant::now() + TIME_MAX;
    let never = Stop::new();
    stream.set_read_timeout(Some(LOOK_FOR)).map_err(run)?;
    loop {
        match nix::sys::socket::recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK) {
            Ok(1..) => return Ok(()),
            // It hung up, and is about to end.
            Ok(_) | Err(nix::Error::EINTR | nix::Error::EAGAIN | nix::Error::ECONNRESET) => {}
            Err(error) => return Err(run(error.into())),
        }
        if let Ok(Some(_)) = program.child.try_wait() {
            return Err(QemuNbdError::Refused { path: opening.path.clone(), message: program.said() });
        }
        if Instant::now() > deadline {
            return Err(QemuNbdError::NotReady { path: opening.path.clone() });
        }
        never.wait_for(LOOK_AGAIN);
    }
}

fn spawn(opening: &Opening) -> io::Result<(Program, Vec<UnixStream>)> {
    let folder = std::env::temp_dir().join(format!("tidemark-{}", tidemark_base::random::uuid()));
    create_private_folder(&folder)?;
    let spawned = spawn_in(&folder, opening);
    // Everybody who is to know the socket has it open.
    let _ = std::fs::remove_dir_all(&folder);
    spawned
}

fn spawn_in(folder: &Path, opening: &Opening) -> io::Result<(Program, Vec<UnixStream>)> {
    let listener = UnixListener::bind(folder.join("socket"))?;
    let streams =
        (0..CONNECTIONS).map(|_| UnixStream::connect(folder.join("socket"))).collect::<io::Result<Vec<_>>>()?;
    let said = File::options().read(true).write(true).create_new(true).open(folder.join("said"))?;
    let (socket, locked) = (listener.as_raw_fd(), opening.locked.as_raw_fd());
    let mut command = Command::new("sh");
    command
        // The number of the process that takes a socket over is part of what it is told.
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"])
        .args(["qemu-nbd", "--cache", "writeback", "--discard", "unmap", "--shared"])
        .arg(CONNECTIONS.to_string())
        .arg(format!("json:{}", opening.options))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone()?)
        // Who ends us by a key means us: it ends when we do.
        .process_group(0);
    // SAFETY: between fork and exec; fcntl and dup2 are async-signal-safe, nothing is allocated, and both descriptors are open.
    unsafe {
        command.pre_exec(move || {
            // Beyond the number that the socket takes; without close-on-exec: the lock lives as long as the program.
            if libc::fcntl(locked, libc::F_DUPFD, INHERITED + 1) < 0 {
                return Err(io::Error::last_os_error());
            }
            let inherited = match socket == INHERITED {
                true => libc::fcntl(socket, libc::F_SETFD, 0),
                false => libc::dup2(socket, INHERITED),
            };
            if inherited < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    Ok((Program { child: command.spawn()?, said }, streams))
}
