//! The NBD front end: one Unix socket for each host, an export for each protected disk.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_nbd::{Exports, Limits, ListenError, Server};

use super::splitter::Splitter;
use super::{Address, CaptureProvider};
use crate::protected::ProtectedDisk;

/// The socket in the run folder.
pub const SOCKET: &str = "nbd.sock";

pub struct NbdSplitter {
    exports: Arc<Exports>,
    server: Server,
    socket: PathBuf,
}

impl NbdSplitter {
    /// Listens in the run folder. Disks that are attached before are served from the first connection on.
    pub fn start(run_folder: &Path, allowed_uids: &[u32]) -> Result<Self, ListenError> {
        let exports = Arc::new(Exports::new());
        let server = Server::new(exports.clone(), Limits::default());
        let socket = run_folder.join(SOCKET);
        server.listen_unix(&socket, allowed_uids)?;
        Ok(Self { exports, server, socket })
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{}?socket={}", encode(name), encode(&self.socket.to_string_lossy()))
    }
}

/// Percent-encodes what does not belong into a URI's path or query; a path stays readable.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => encoded.push(byte as char),
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

impl CaptureProvider for NbdSplitter {
    fn attach(&self, name: &str, disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        self.exports.insert(name, Arc::new(Splitter::new(disk.clone())?));
        Ok(Address { nbd: Some(self.uri(name)), file: None })
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        self.exports.remove(name);
        self.server.close_export(name).map_err(io::Error::other)
    }

    fn stop(&self) -> io::Result<()> {
        self.server.stop().map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_encoded() {
        assert_eq!(encode("web 1-0"), "web%201-0");
        assert_eq!(encode("/run/a&b/nbd.sock"), "/run/a%26b/nbd.sock");
    }
}
