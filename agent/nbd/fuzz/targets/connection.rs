//! What a client may send, from its first byte on: nothing panics, nothing hangs, and the server serves the next one.
//!
//! The first byte of the input chooses where it goes: into the handshake, or behind one that chose an export.
//!
//! `cargo +nightly fuzz run connection` in `agent/nbd`.
#![no_main]

use std::io;
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Durability};
use tidemark_nbd_fuzz::export::{Export, Exports, WriteRequest};
use tidemark_nbd_fuzz::limits::Limits;
use tidemark_nbd_fuzz::server::Server;
use tidemark_nbd_fuzz::stream::Stream;

const DISK_BYTES: usize = 64 << 10;

struct Memory {
    data: Mutex<Vec<u8>>,
    inline: bool,
}

impl Export for Memory {
    fn bytes(&self) -> u64 {
        DISK_BYTES as u64
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<io::Result<()>> {
        self.inline.then(|| self.read(offset, buffer))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.data.lock().unwrap()[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn writes_inline(&self) -> bool {
        self.inline
    }

    fn write_batch(&self, writes: &[WriteRequest<'_>], results: &mut [io::Result<()>]) {
        let mut data = self.data.lock().unwrap();
        for (write, result) in writes.iter().zip(results) {
            data[write.offset as usize..][..write.data.len()].copy_from_slice(write.data);
            *result = Ok(());
        }
    }

    fn zero(&self, extent: Extent, _discard: bool, _durability: Durability) -> io::Result<()> {
        self.data.lock().unwrap()[extent.offset as usize..extent.end() as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        Ok((DISK_BYTES as u64 - offset, Allocation::Data))
    }
}

const NAMES: [&str; 2] = ["disk", "slow"];

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    // A receive buffer is mapped, and only what is used of it is cleared; after the first one the allocator would clear all.
    // SAFETY: a number for the allocator.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
    let exports = Arc::new(Exports::new());
    for name in NAMES {
        exports.insert(name, Arc::new(Memory { data: Mutex::new(vec![0; DISK_BYTES]), inline: name == "disk" }));
    }
    Server::new(exports, Limits::default(), &NAMES)
});

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// Client flags, and all that a good client says before its first request.
fn opened(name: &[u8; 4], structured: bool) -> Vec<u8> {
    let named = [&4u32.to_be_bytes()[..], name].concat();
    let mut bytes = 3u32.to_be_bytes().to_vec();
    if structured {
        bytes.extend(option(8, &[]));
        let query = [&named[..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"].concat();
        bytes.extend(option(10, &query));
    }
    bytes.extend(option(7, &[&named[..], &[0, 0]].concat()));
    bytes
}

fuzz_target!(|input: &[u8]| {
    let Some((&mode, bytes)) = input.split_first() else { return };
    let before = match mode % 5 {
        0 => Vec::new(),
        1 => 3u32.to_be_bytes().to_vec(),
        2 => opened(b"disk", false),
        3 => opened(b"disk", true),
        _ => opened(b"slow", true),
    };
    // Mostly all at once, as a socket has it that was written to before.
    let (piece, room) = match mode / 5 % 8 {
        6 => (7, usize::MAX),
        7 => (100, 40),
        _ => (usize::MAX, usize::MAX),
    };
    SERVER.serve(Stream::new([&before[..], bytes].concat(), piece, room));
    for name in NAMES {
        assert_eq!(SERVER.connections(name), 1, "an export was not released");
    }
});
