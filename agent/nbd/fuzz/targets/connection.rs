//! What a client may send, from its first byte on: nothing panics, nothing hangs, and the server serves the next one.
//!
//! The first byte of the input chooses where it goes: into the handshake, or behind one that chose an export.
//!
//! `cargo +nightly fuzz run connection` in `agent/nbd`.
#![no_main]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Durability};
use tidemark_nbd::{Export, Exports, Limits, Server, WriteRequest};

const DISK_BYTES: usize = 64 << 10;
/// A server that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

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

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let exports = Arc::new(Exports::new());
        for (name, inline) in [("disk", true), ("slow", false)] {
            exports.insert(name, Arc::new(Memory { data: Mutex::new(vec![0; DISK_BYTES]), inline }));
        }
        // Connections of inputs before may still be ending.
        Server::new(exports, Limits { connections_per_export_max: 4096, ..Limits::default() })
    })
}

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
    // The server runs on this thread; another one is the client, which wakes when there is something to read.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(&[&before[..], bytes].concat()).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let (client, read) = client();
    client.send(ours).unwrap();
    server().serve_stream_here(theirs).unwrap();
    if let Err(error) = read.lock().unwrap().recv_timeout(PATIENCE).expect("the server neither answers nor hangs up") {
        panic!("{error}");
    }
});

type Client = (Sender<UnixStream>, Mutex<Receiver<io::Result<()>>>);

/// Reads what comes on each connection that it is given, to its end.
fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        // As long as a connection has an export open, its worker threads stay.
        for name in [b"disk", b"slow"] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            server().serve_stream(theirs).unwrap();
            ours.write_all(&opened(name, false)).unwrap();
            ours.read_exact(&mut [0; 18 + 20 + 12 + 20]).unwrap();
            std::mem::forget(ours);
        }
        let (streams, next) = channel::<UnixStream>();
        let (results, read) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            for mut stream in next {
                let result = loop {
                    match stream.read(&mut buffer) {
                        Ok(0) => break Ok(()),
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break Ok(()),
                        Err(error) => break Err(error),
                    }
                };
                results.send(result).unwrap();
            }
        });
        (streams, Mutex::new(read))
    })
}
