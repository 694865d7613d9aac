//! A client of hand-made bytes, and exports that can be held.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Durability};
use tidemark_nbd::{Export, Exports, Limits, Server, WriteRequest};

pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// A test that waits longer than this failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Raw(pub UnixStream);

/// A reply to an option: its kind and data.
pub type OptionReply = (u32, Vec<u8>);

impl Raw {
    /// Connected, greeted, client flags sent.
    pub fn connect(server: &Server) -> Self {
        let mut raw = Self::silent(server);
        let mut greeting = [0; 18];
        raw.0.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        assert_eq!(&greeting[8..16], b"IHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        raw.send(&3u32.to_be_bytes());
        raw
    }

    /// Connected, and nothing said yet.
    pub fn silent(server: &Server) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        server.serve_stream(theirs).unwrap();
        Raw(ours)
    }

    /// In the transmission phase of export `name`, with or without structured replies and block status.
    pub fn open(server: &Server, name: &str, structured: bool) -> Self {
        let mut raw = Self::connect(server);
        if structured {
            assert_eq!(raw.ask(8, &[]), [(1, vec![])]);
            let mut query = named(name);
            query.extend([0, 0, 0, 1]);
            query.extend(named("base:allocation"));
            let replies = raw.ask(10, &query);
            assert_eq!(replies[0].1, [&[0, 0, 0, 1], &b"base:allocation"[..]].concat());
        }
        assert_eq!(raw.go(name).last().unwrap().0, 1);
        raw
    }

    pub fn go(&mut self, name: &str) -> Vec<OptionReply> {
        let mut data = named(name);
        data.extend([0, 0]);
        self.ask(7, &data)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn ask(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send(&option_bytes(option, data.len() as u32, data));
        let mut replies = Vec::new();
        loop {
            let mut head = [0; 20];
            self.0.read_exact(&mut head).unwrap();
            assert_eq!(u64::from_be_bytes(head[..8].try_into().unwrap()), 0x0003_e889_0455_65a9);
            assert_eq!(u32::from_be_bytes(head[8..12].try_into().unwrap()), option);
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let data = self.take(u32::from_be_bytes(head[16..].try_into().unwrap()) as usize);
            replies.push((kind, data));
            if kind == 1 || kind & 1 << 31 != 0 {
                return replies;
            }
        }
    }

    pub fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    /// Whether the server closed the connection, everything it sent having been read.
    pub fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0; 1]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    pub fn simple_reply(&mut self) -> (u64, u32) {
        let reply = self.take(16);
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        (u64::from_be_bytes(reply[8..].try_into().unwrap()), u32::from_be_bytes(reply[4..8].try_into().unwrap()))
    }

    /// Kind, cookie and payload of a structured reply in one chunk.
    pub fn structured_reply(&mut self) -> (u16, u64, Vec<u8>) {
        let head = self.take(20);
        assert_eq!(head[..6], [0x66, 0x8e, 0x33, 0xef, 0, 1]);
        let payload = self.take(u32::from_be_bytes(head[16..].try_into().unwrap()) as usize);
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        (u16::from_be_bytes(head[6..8].try_into().unwrap()), cookie, payload)
    }
}

pub fn named(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
}

/// An option whose data may be shorter than it says.
pub fn option_bytes(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Something that can be shut and opened; whoever comes while it is shut waits.
#[derive(Default)]
pub struct Barrier(Mutex<(bool, usize)>, Condvar);

impl Barrier {
    pub fn set(&self, shut: bool) {
        self.0.lock().unwrap().0 = shut;
        self.1.notify_all();
    }

    fn pass(&self) {
        let mut state = self.0.lock().unwrap();
        state.1 += 1;
        self.1.notify_all();
        while state.0 {
            state = self.1.wait(state).unwrap();
        }
        state.1 -= 1;
    }

    pub fn waiting(&self) -> usize {
        self.0.lock().unwrap().1
    }

    /// Until this many wait.
    pub fn wait_for(&self, waiting: usize) {
        let state = self.0.lock().unwrap();
        let (_state, result) = self.1.wait_timeout_while(state, PATIENCE, |state| state.1 < waiting).unwrap();
        assert!(!result.timed_out());
    }
}

/// A disk in memory.
pub struct Memory {
    pub data: Mutex<Vec<u8>>,
    pub inline: bool,
    pub read_only: bool,
    pub flushing: Barrier,
    pub reading: Barrier,
    pub largest_batch: AtomicUsize,
    /// Written pieces that begin with this fail; with this less one they panic.
    pub poison: u8,
}

impl Memory {
    pub fn new(bytes: usize) -> Self {
        Self {
            data: Mutex::new(vec![0; bytes]),
            inline: true,
            read_only: false,
            flushing: Barrier::default(),
            reading: Barrier::default(),
            largest_batch: AtomicUsize::new(0),
            poison: 0xff,
        }
    }
}

impl Export for Memory {
    fn bytes(&self) -> u64 {
        self.data.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<io::Result<()>> {
        self.inline.then(|| {
            buffer.copy_from_slice(&self.data.lock().unwrap()[offset as usize..][..buffer.len()]);
            Ok(())
        })
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reading.pass();
        buffer.copy_from_slice(&self.data.lock().unwrap()[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn writes_inline(&self) -> bool {
        self.inline
    }

    fn write_batch(&self, writes: &[WriteRequest<'_>], results: &mut [io::Result<()>]) {
        self.largest_batch.fetch_max(writes.len(), Ordering::Relaxed);
        if writes.iter().any(|write| write.fua) {
            // Gives another worker the time to go first, if it were allowed to.
            std::thread::yield_now();
        }
        let mut data = self.data.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (write, result) in writes.iter().zip(results) {
            if write.data[0] == self.poison {
                continue;
            }
            assert!(write.data[0] != self.poison - 1, "this export is broken");
            data[write.offset as usize..][..write.data.len()].copy_from_slice(write.data);
            *result = Ok(());
        }
    }

    fn zero(&self, extent: Extent, _discard: bool, _durability: Durability) -> io::Result<()> {
        std::thread::yield_now();
        self.data.lock().unwrap()[extent.offset as usize..extent.end() as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flushing.pass();
        Ok(())
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        // Every second MiB is a hole.
        let kind = if (offset >> 20).is_multiple_of(2) { Allocation::Data } else { Allocation::Hole };
        Ok(((1 << 20) - offset % (1 << 20), kind))
    }
}

/// A server of one export, named `disk`.
pub fn serve(export: Memory, limits: Limits) -> (Server, Arc<Memory>) {
    let export = Arc::new(export);
    let exports = Arc::new(Exports::new());
    exports.insert("disk", export.clone());
    (Server::new(exports, limits), export)
}
