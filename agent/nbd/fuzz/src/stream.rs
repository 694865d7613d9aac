//! What a client has sent before it left, in the place of a socket. It reads all that it is sent.

use std::io;
use std::net::Shutdown;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;

pub struct Stream {
    /// What is still to be received, from its end on.
    left: Mutex<Vec<u8>>,
    /// So much comes with one receive.
    piece: usize,
    /// So much goes without waiting.
    room: usize,
    /// Nothing is received, nothing is sent any more.
    ends: [AtomicBool; 2],
}

impl Stream {
    pub fn new(mut bytes: Vec<u8>, piece: usize, room: usize) -> Self {
        bytes.reverse();
        Self { left: Mutex::new(bytes), piece, room, ends: Default::default() }
    }

    pub fn is_plain(&self) -> bool {
        true
    }

    pub fn set_timeout(&self, _limit: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    pub fn shutdown(&self, how: Shutdown) {
        self.ends[0].fetch_or(how != Shutdown::Write, Ordering::Relaxed);
        self.ends[1].fetch_or(how != Shutdown::Read, Ordering::Relaxed);
    }

    pub fn start_tls(&self, _connection: rustls::Connection, _deadline: Instant) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        None
    }

    pub fn receive_exact(&self, mut buffer: &mut [u8], _deadline: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.receive(buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ends[0].load(Ordering::Relaxed) {
            return Ok(0);
        }
        let mut left = self.left.lock().unwrap();
        let count = buffer.len().min(left.len()).min(self.piece);
        let start = left.len() - count;
        for (to, from) in buffer.iter_mut().zip(left.drain(start..).rev()) {
            *to = from;
        }
        Ok(count)
    }

    pub fn send(&self, _bytes: &[u8]) -> io::Result<()> {
        if self.ends[1].load(Ordering::Relaxed) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    pub fn send_two(&self, head: &[u8], _data: &[u8]) -> io::Result<()> {
        self.send(head)
    }

    pub fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes).map(|()| bytes.len().min(self.room))
    }

    pub fn close_notify(&self) {}
}
