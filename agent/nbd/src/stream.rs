//! One connection's bytes, plain or through TLS, with receiving and sending on different threads.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv, send};
use rustls::pki_types::CertificateDer;

/// Encrypted bytes are received in pieces of this size: a few TLS records.
const CIPHER_BYTES: usize = 128 << 10;

pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn fd(&self) -> RawFd {
        match self {
            Socket::Unix(socket) => socket.as_raw_fd(),
            Socket::Tcp(socket) => socket.as_raw_fd(),
        }
    }

    fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(socket) => socket.set_read_timeout(limit).and_then(|()| socket.set_write_timeout(limit)),
            Socket::Tcp(socket) => socket.set_read_timeout(limit).and_then(|()| socket.set_write_timeout(limit)),
        }
    }
}

struct Tls {
    connection: Mutex<rustls::Connection>,
    received: Mutex<Cipher>,
}

/// Encrypted bytes between the socket and TLS.
struct Cipher {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

/// A connection. One thread at a time receives; any thread may send, whole messages keep together.
pub(crate) struct Stream {
    socket: Socket,
    tls: OnceLock<Tls>,
    turn: Mutex<()>,
}

/// How the end of the other side looks.
fn closed(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Stream {
    pub fn new(socket: Socket) -> Self {
        Self { socket, tls: OnceLock::new(), turn: Mutex::new(()) }
    }

    /// Whether sending without waiting is possible: not in the middle of a TLS record.
    pub fn is_plain(&self) -> bool {
        self.tls.get().is_none()
    }

    /// Bounds every later wait for the other side; `None` ends the bound.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_timeout(limit)
    }

    pub fn shutdown(&self, how: Shutdown) {
        // An error means that the connection is gone already.
        let _ = match &self.socket {
            Socket::Unix(socket) => socket.shutdown(how),
            Socket::Tcp(socket) => socket.shutdown(how),
        };
    }

    /// Encrypts from here on. Nothing that was received in the clear is left over: both handshakes read exactly.
    pub fn start_tls(&self, connection: rustls::Connection, deadline: Instant) -> io::Result<()> {
        let received = Cipher { bytes: vec![0; CIPHER_BYTES], start: 0, end: 0 };
        let tls = Tls { connection: Mutex::new(connection), received: Mutex::new(received) };
        if self.tls.set(tls).is_err() {
            return Err(io::Error::other("TLS is on already"));
        }
        let tls = self.tls.get().expect("it was just set");
        loop {
            let shaking = tls.connection.lock().expect("no panic while held").is_handshaking();
            self.send_pending(tls)?;
            if !shaking {
                return Ok(());
            }
            self.set_deadline(deadline)?;
            let mut received = tls.received.lock().expect("no panic while held");
            if received.start == received.end && self.receive_cipher(&mut received)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let result = self.decrypt(tls, &mut received);
            drop(received);
            if let Err(error) = result {
                // The alert says to the other side what was wrong with it.
                let _ = self.send_pending(tls);
                return Err(error);
            }
        }
    }

    /// What the other side proved to be, its own certificate first.
    pub fn certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        let connection = self.tls.get()?.connection.lock().expect("no panic while held");
        connection
            .peer_certificates()
            .map(|chain| chain.iter().map(|certificate| certificate.clone().into_owned()).collect())
    }

    fn set_deadline(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { self.set_timeout(Some(left)) }
    }

    /// Receives exactly `buffer`, before `deadline`.
    pub fn receive_exact(&self, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            self.set_deadline(deadline)?;
            match self.receive(buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    /// Receives something; 0 at the end.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = self.tls.get() else { return self.receive_plain(buffer, MsgFlags::empty()) };
        let mut received = tls.received.lock().expect("no panic while held");
        let mut filled = 0;
        loop {
            match tls.connection.lock().expect("no panic while held").reader().read(&mut buffer[filled..]) {
                Ok(0) => return Ok(filled),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(filled),
                Err(error) => return Err(error),
            }
            if filled == buffer.len() {
                return Ok(filled);
            }
            if received.start == received.end {
                // One more piece only while nothing can be returned: this waits.
                if filled > 0 {
                    return Ok(filled);
                }
                if self.receive_cipher(&mut received)? == 0 {
                    return Ok(0);
                }
            }
            self.decrypt(tls, &mut received)?;
            if tls.connection.lock().expect("no panic while held").wants_write() {
                self.send_pending(tls)?;
            }
        }
    }

    fn receive_plain(&self, buffer: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        loop {
            match recv(self.socket.fd(), buffer, flags) {
                Ok(count) => return Ok(count),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(closed(error.into())),
            }
        }
    }

    fn receive_cipher(&self, received: &mut Cipher) -> io::Result<usize> {
        received.start = 0;
        received.end = 0;
        received.end = self.receive_plain(&mut received.bytes, MsgFlags::empty())?;
        Ok(received.end)
    }

    /// Gives TLS as much as it takes at once; it holds little, so the plain bytes are to be fetched in between.
    fn decrypt(&self, tls: &Tls, received: &mut Cipher) -> io::Result<()> {
        let mut connection = tls.connection.lock().expect("no panic while held");
        let taken = connection.read_tls(&mut &received.bytes[received.start..received.end])?;
        received.start += taken;
        connection.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(())
    }

    fn send_pending(&self, tls: &Tls) -> io::Result<()> {
        let _turn = self.turn.lock().expect("no panic while held");
        let mut cipher = Vec::new();
        self.take_pending(&mut tls.connection.lock().expect("no panic while held"), &mut cipher)?;
        self.send_plain(&cipher)
    }

    fn take_pending(&self, connection: &mut rustls::Connection, cipher: &mut Vec<u8>) -> io::Result<()> {
        while connection.wants_write() {
            connection.write_tls(cipher)?;
        }
        Ok(())
    }

    fn send_plain(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match send(self.socket.fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(closed(error.into())),
            }
        }
        Ok(())
    }

    /// Sends all of it.
    pub fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        let _turn = self.turn.lock().expect("no panic while held");
        let Some(tls) = self.tls.get() else { return self.send_plain(bytes) };
        let mut cipher = Vec::new();
        while !bytes.is_empty() {
            {
                let mut connection = tls.connection.lock().expect("no panic while held");
                // It takes what its own buffer holds.
                let taken = connection.writer().write(bytes)?;
                bytes = &bytes[taken..];
                self.take_pending(&mut connection, &mut cipher)?;
            }
            self.send_plain(&cipher)?;
            cipher.clear();
        }
        Ok(())
    }

    /// Sends a head and its data as one message, without copying them together.
    pub fn send_two(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        if data.is_empty() || !self.is_plain() {
            self.send(head)?;
            return self.send(data);
        }
        let _turn = self.turn.lock().expect("no panic while held");
        let parts = [io::IoSlice::new(head), io::IoSlice::new(data)];
        let sent = loop {
            match nix::sys::socket::sendmsg::<()>(self.socket.fd(), &parts, &[], MsgFlags::MSG_NOSIGNAL, None) {
                Ok(count) => break count,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(closed(error.into())),
            }
        };
        self.send_plain(&head[sent.min(head.len())..])?;
        self.send_plain(&data[sent.saturating_sub(head.len())..])
    }

    /// Sends what can be sent without waiting: how much that was. Plain connections only.
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        let Ok(_turn) = self.turn.try_lock() else { return Ok(0) };
        match send(self.socket.fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
            Ok(count) => Ok(count),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Says goodbye as TLS wants it; the other side then knows that nothing was cut off.
    pub fn close_notify(&self) {
        if let Some(tls) = self.tls.get() {
            tls.connection.lock().expect("no panic while held").send_close_notify();
            let _ = self.send_pending(tls);
        }
    }
}
