//! The NBD front end: one Unix socket for each host, an export for each protected disk; and over TCP, for a machine whose
//! hypervisor is elsewhere, a listener of its own with mutual TLS.
//!
//! *Consistency.* Both ways lead to the same splitter, so a disk may be open on both. A machine's listener knows that
//! machine's exports alone, and lets in whom that machine's own authority gave a certificate. *Retries.* None here: the host
//! tries again to listen. *Cancellation.* Detaching ends connections after the requests that were received. *Crash.* The
//! authority and the client's files stay in the state folder, so that an address works on after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use tidemark_base::MachineId;
use tidemark_base::storage::Storage;
use tidemark_nbd::{Exports, Limits, ListenError, Remote, Server, address};
use tidemark_proto::control::DiskSpec;
use tidemark_transport::ExportAuthority;

use super::splitter::Splitter;
use super::{Address, CaptureProvider};
use crate::error::HostError;
use crate::protected::ProtectedDisk;

/// The socket in the run folder.
pub const SOCKET: &str = "nbd.sock";
/// A folder for each machine that is served over TCP, in the state folder.
const CERTIFICATES: &str = "nbd-tls";

pub struct NbdSplitter {
    exports: Arc<Exports>,
    server: Server,
    socket: PathBuf,
    storage: Arc<dyn Storage>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    attached: BTreeMap<String, (MachineId, Arc<Splitter>)>,
    /// Each machine's own listener.
    remote: BTreeMap<MachineId, Arc<Remote>>,
    /// Exports that nobody may open.
    fenced: BTreeSet<String>,
}

impl NbdSplitter {
    /// Listens in the run folder. Disks that are attached before are served from the first connection on. `storage` is
    /// the state folder.
    pub fn start(run_folder: &Path, allowed_uids: &[u32], storage: Arc<dyn Storage>) -> Result<Self, ListenError> {
        let exports = Arc::new(Exports::new());
        let server = Server::new(exports.clone(), Limits::default());
        let socket = run_folder.join(SOCKET);
        server.listen_unix(&socket, allowed_uids)?;
        Ok(Self { exports, server, socket, storage, state: Mutex::default() })
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// Opens the machine's authority, and makes it at the first time.
    fn authority(&self, machine: MachineId) -> Result<Arc<ExportAuthority>, HostError> {
        let failed = |source| HostError::Io { what: "make a folder for certificates", source };
        let name = format!("{CERTIFICATES}/{machine}");
        for folder in [CERTIFICATES, &name] {
            if !self.storage.exists(folder).map_err(failed)? {
                self.storage.create_folder(folder).map_err(failed)?;
            }
        }
        let authority = ExportAuthority::open_or_create(self.storage.folder(&name));
        Ok(Arc::new(authority.map_err(|error| HostError::Certificates(error.into()))?))
    }

    /// Ends an export here and for remote clients, who may take their time.
    fn close(&self, name: &str, remote: Option<&Remote>) -> io::Result<()> {
        self.exports.remove(name);
        let here = self.server.close_export(name);
        let there = remote.map_or(Ok(()), |remote| {
            remote.exports.remove(name);
            remote.server.close_export(name)
        });
        here.and(there).map_err(io::Error::other)
    }

    fn fence_export(&self, name: &str, fenced: bool) -> io::Result<()> {
        let remote = {
            let mut state = self.state();
            if fenced {
                state.fenced.insert(name.to_owned());
            } else {
                state.fenced.remove(name);
            }
            let attached = state.attached.get(name).cloned();
            let remote = attached.as_ref().and_then(|(machine, _)| state.remote.get(machine).cloned());
            if let (false, Some((_, splitter))) = (fenced, attached) {
                self.exports.insert(name, splitter.clone());
                if let Some(remote) = &remote {
                    remote.exports.insert(name, splitter);
                }
            }
            remote
        };
        if !fenced {
            return Ok(());
        }
        // Not under the lock: a client may take its time.
        self.close(name, remote.as_deref())
    }
}

impl CaptureProvider for NbdSplitter {
    fn attach(&self, name: &str, disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        let splitter = Arc::new(Splitter::new(disk.clone())?);
        let machine = disk.identity.machine;
        let mut state = self.state();
        if !state.fenced.contains(name) {
            self.exports.insert(name, splitter.clone());
            if let Some(remote) = state.remote.get(&machine) {
                remote.exports.insert(name, splitter.clone());
            }
        }
        state.attached.insert(name.to_owned(), (machine, splitter));
        Ok(Address { nbd: Some(address::unix_uri(name, &self.socket)), file: None })
    }

    fn remote(&self, name: &str) -> Option<String> {
        let state = self.state();
        let (machine, _) = state.attached.get(name)?;
        Some(state.remote.get(machine)?.uri(name))
    }

    fn listen(&self, machine: MachineId, address: Option<SocketAddr>) -> Result<Option<SocketAddr>, HostError> {
        let mut state = self.state();
        if let (Some(remote), Some(address)) = (state.remote.get(&machine), address) {
            let is_same = remote.address.ip() == address.ip() && [0, remote.address.port()].contains(&address.port());
            if is_same {
                return Ok(Some(remote.address));
            }
        }
        let old = state.remote.remove(&machine);
        drop(state);
        if let Some(old) = old
            && let Err(error) = old.server.stop()
        {
            tracing::warn!(address = %old.address, %error, "remote clients of a disk do not end");
        }
        let Some(address) = address else { return Ok(None) };
        let authority = self.authority(machine)?;
        let config = authority.server(address::certificate_names(address.ip()))?;
        let remote = Remote::listen(address, config, authority.client_folder())?;
        let mut state = self.state();
        let is_served = |name: &str, of: MachineId| of == machine && !state.fenced.contains(name);
        for (name, (_, splitter)) in state.attached.iter().filter(|(name, (of, _))| is_served(name, *of)) {
            remote.exports.insert(name.as_str(), splitter.clone());
        }
        let address = remote.address;
        state.remote.insert(machine, Arc::new(remote));
        Ok(Some(address))
    }

    fn fence(&self, _machine: MachineId, disks: &[DiskSpec], fenced: bool) -> io::Result<()> {
        disks.iter().map(|disk| self.fence_export(&disk.export, fenced)).fold(Ok(()), Result::and)
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        // Not under the lock: a client may take its time.
        let remote = {
            let mut state = self.state();
            let attached = state.attached.remove(name);
            state.fenced.remove(name);
            let machine = attached.map(|(machine, _)| machine);
            let is_last = machine.is_some_and(|machine| !state.attached.values().any(|(of, _)| *of == machine));
            machine.and_then(|machine| match is_last {
                true => state.remote.remove(&machine),
                false => state.remote.get(&machine).cloned(),
            })
        };
        self.close(name, remote.as_deref())
    }

    fn forget(&self, machine: MachineId) -> io::Result<()> {
        let name = format!("{CERTIFICATES}/{machine}");
        if self.storage.exists(&name)? {
            self.storage.remove_folder(&name)?;
            self.storage.sync_folder(CERTIFICATES)?;
        }
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let remote = std::mem::take(&mut self.state().remote);
        let there: Result<Vec<()>, _> = remote.into_values().map(|remote| remote.server.stop()).collect();
        self.server.stop().map_err(io::Error::other)?;
        there.map(drop).map_err(io::Error::other)
    }
}
