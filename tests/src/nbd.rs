//! A small NBD client: newstyle negotiation, simple replies. It is the oracle's hand, so it shares nothing with the
//! product's own client and server.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
/// Durable before the reply.
pub const FUA: u16 = 1;

/// An address as `protect` and `point serve` print it: `nbd+unix:///NAME?socket=PATH`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    pub export: String,
    pub socket: String,
}

impl Address {
    pub fn parse(uri: &str) -> Option<Self> {
        let (export, socket) = uri.strip_prefix("nbd+unix:///")?.split_once("?socket=")?;
        Some(Self { export: unescape(export)?, socket: unescape(socket)? })
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            bytes.push(u8::from_str_radix(std::str::from_utf8(tail.get(..2)?).ok()?, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

pub struct Client {
    stream: UnixStream,
    pub bytes: u64,
    pub flags: u16,
    next_cookie: u64,
}

impl Client {
    pub fn connect(uri: &str) -> io::Result<Self> {
        let address = Address::parse(uri).ok_or_else(|| invalid(format!("{uri} is no Unix NBD address")))?;
        let mut stream = UnixStream::connect(&address.socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if &greeting[..8] != b"NBDMAGIC" || u64_at(&greeting, 8) != OPTION_MAGIC {
            return Err(invalid("the server does not speak newstyle NBD".into()));
        }
        let mut request = Vec::new();
        request.extend(3u32.to_be_bytes()); // fixed newstyle, no zeroes
        request.extend(OPTION_MAGIC.to_be_bytes());
        request.extend(OPTION_GO.to_be_bytes());
        request.extend((address.export.len() as u32 + 6).to_be_bytes());
        request.extend((address.export.len() as u32).to_be_bytes());
        request.extend(address.export.as_bytes());
        request.extend(0u16.to_be_bytes());
        stream.write_all(&request)?;
        let (mut bytes, mut flags) = (0, 0);
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let (kind, length) = (u32_at(&head, 12), u32_at(&head, 16));
            if u64_at(&head, 0) != OPTION_REPLY_MAGIC || length > 64 << 10 {
                return Err(invalid("the server's answer to GO is malformed".into()));
            }
            let mut body = vec![0; length as usize];
            stream.read_exact(&mut body)?;
            match kind {
                REPLY_ACK => return Ok(Self { stream, bytes, flags, next_cookie: 1 }),
                REPLY_INFO if length >= 12 && body[..2] == [0, 0] => {
                    bytes = u64_at(&body, 2);
                    flags = u16::from_be_bytes([body[10], body[11]]);
                }
                REPLY_INFO => {}
                _ => {
                    let text = String::from_utf8_lossy(&body);
                    return Err(invalid(format!("the server refused {:?} with {kind:#x}: {text}", address.export)));
                }
            }
        }
    }

    /// A second handle on the connection, so that one thread sends and another receives.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()?, ..*self })
    }

    /// Sends a write without waiting for the reply.
    pub fn send_write(&mut self, cookie: u64, offset: u64, data: &[u8], flags: u16) -> io::Result<()> {
        self.send(flags, COMMAND_WRITE, cookie, offset, data.len() as u32, data)
    }

    /// The next reply of a write or flush: its cookie and error number (0: done).
    pub fn receive(&mut self) -> io::Result<(u64, u32)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if u32_at(&reply, 0) != SIMPLE_REPLY_MAGIC {
            return Err(invalid("a reply does not begin with its magic".into()));
        }
        Ok((u64_at(&reply, 8), u32_at(&reply, 4)))
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_with(offset, data, 0)
    }

    pub fn write_with(&mut self, offset: u64, data: &[u8], flags: u16) -> io::Result<()> {
        let cookie = self.cookie();
        self.send_write(cookie, offset, data, flags)?;
        self.done(cookie)
    }

    pub fn flush(&mut self) -> io::Result<()> {
        let cookie = self.cookie();
        self.send(0, COMMAND_FLUSH, cookie, 0, 0, &[])?;
        self.done(cookie)
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let cookie = self.cookie();
        self.send(0, COMMAND_READ, cookie, offset, buffer.len() as u32, &[])?;
        self.done(cookie)?;
        self.stream.read_exact(buffer)
    }

    fn cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.next_cookie
    }

    fn done(&mut self, cookie: u64) -> io::Result<()> {
        match self.receive()? {
            (other, _) if other != cookie => Err(invalid(format!("reply {other} to request {cookie}"))),
            (_, 0) => Ok(()),
            (_, error) => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }

    fn send(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) -> io::Result<()> {
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)
    }

    /// Says goodbye. Without it the server sees a connection that broke.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.send(0, COMMAND_DISCONNECT, 0, 0, 0, &[])
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Owned;
    use crate::{need, tools, wait};
    use std::time::Duration;

    #[test]
    fn addresses_are_unescaped() {
        let address = Address::parse("nbd+unix:///web%2D0?socket=/run/a%20b.sock").unwrap();
        assert_eq!(address, Address { export: "web-0".into(), socket: "/run/a b.sock".into() });
        assert_eq!(Address::parse("nbd://host/web"), None);
    }

    #[test]
    fn speaks_with_a_server_of_others() {
        need!("nbdkit");
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd");
        let mut command = tools::command("nbdkit");
        command.args(["--foreground", "--unix"]).arg(&socket).args(["memory", "1M"]);
        let _server = Owned::start("nbdkit", command, None);
        wait::until("nbdkit listens", Duration::from_secs(60), || socket.exists().then_some(()));
        let mut client = Client::connect(&format!("nbd+unix:///?socket={}", socket.display())).unwrap();
        assert_eq!(client.bytes, 1 << 20);
        client.write_with(4096, &[7; 512], FUA).unwrap();
        client.flush().unwrap();
        let mut back = [0; 1024];
        client.read(4096, &mut back).unwrap();
        assert_eq!((&back[..512], &back[512..]), (&[7; 512][..], &[0; 512][..]));
        assert_eq!(client.write(1 << 20, &[1; 512]).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        client.disconnect().unwrap();
    }
}
