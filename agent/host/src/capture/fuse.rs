//! The FUSE front end: each protected disk is a file in a folder beside the NBD socket, which any program opens ([`tidemark_fuse`]).
//!
//! *Consistency.* The same write path as over NBD ([`super::splitter`]). *Retries.* None here: the host tries again to attach.
//! *Cancellation.* Detaching and fencing end whoever has the file open, after the requests that were received. *Crash.* The mount of a process that is
//! gone answers nobody (ENOTCONN) and hides the place from writers, until the next attach mounts anew at the same path; what was acknowledged
//! is in the disk and in the log as after any other kill.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_base::MachineId;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_fuse::{FuseError, FuseFile};
use tidemark_proto::control::DiskSpec;

use super::splitter::Splitter;
use super::{Address, CaptureProvider};
use crate::error::HostError;
use crate::protected::ProtectedDisk;

/// The folder of files, in the run folder.
pub const FOLDER: &str = "disks";

pub struct FuseSplitter {
    folder: PathBuf,
    allowed_uids: Vec<u32>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    attached: BTreeMap<String, Attached>,
    /// Files that nobody may open.
    fenced: BTreeSet<String>,
}

struct Attached {
    splitter: Arc<Splitter>,
    /// `None` while it is fenced.
    file: Option<FuseFile>,
}

impl FuseSplitter {
    /// Makes and mounts nothing before a disk is attached.
    pub fn new(run_folder: &Path, allowed_uids: &[u32]) -> Self {
        Self { folder: run_folder.join(FOLDER), allowed_uids: allowed_uids.to_vec(), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// The name came over the network: it leads nowhere but into our folder.
    fn path(&self, name: &str) -> io::Result<PathBuf> {
        let is_sound = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
        let refused = || io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} can be no name of a file"));
        is_sound.then(|| self.folder.join(name)).ok_or_else(refused)
    }

    fn serve(&self, name: &str, splitter: &Arc<Splitter>) -> io::Result<FuseFile> {
        FuseFile::serve(&self.path(name)?, splitter.clone(), &self.allowed_uids).map_err(io::Error::other)
    }

    fn fence_file(&self, name: &str, fenced: bool) -> io::Result<()> {
        let mut state = self.state();
        if !fenced {
            state.fenced.remove(name);
            if let Some(Attached { splitter, file: None }) = state.attached.get(name) {
                let file = self.serve(name, &splitter.clone())?;
                if let Some(attached) = state.attached.get_mut(name) {
                    attached.file = Some(file);
                }
            }
            return Ok(());
        }
        state.fenced.insert(name.to_owned());
        let file = state.attached.get_mut(name).and_then(|attached| attached.file.take());
        drop(state);
        close(file).map_err(io::Error::other)
    }
}

fn close(file: Option<FuseFile>) -> Result<(), FuseError> {
    file.map_or(Ok(()), |file| file.close())
}

impl CaptureProvider for FuseSplitter {
    fn probe(&self, path: &Path, _state: &Path) -> Result<u64, HostError> {
        tidemark_fuse::probe()?;
        super::images::probe(path)
    }

    fn attach(&self, name: &str, disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        let path = self.path(name)?;
        let splitter = Arc::new(Splitter::new(disk.clone())?);
        let mut state = self.state();
        let file = match state.fenced.contains(name) {
            true => {
                // What a killed agent left is no way to the disk, but looks like one.
                tidemark_fuse::clear_dead(&path).map_err(io::Error::other)?;
                None
            }
            false => Some(self.serve(name, &splitter)?),
        };
        state.attached.insert(name.to_owned(), Attached { splitter, file });
        Ok(Address { nbd: None, file: Some(path.to_string_lossy().into_owned()) })
    }

    fn fence(&self, _machine: MachineId, disks: &[DiskSpec], fenced: bool) -> io::Result<()> {
        disks.iter().map(|disk| self.fence_file(&disk.export, fenced)).fold(Ok(()), Result::and)
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        let attached = {
            let mut state = self.state();
            state.fenced.remove(name);
            state.attached.remove(name)
        };
        close(attached.and_then(|attached| attached.file)).map_err(io::Error::other)
    }

    fn stop(&self) -> io::Result<()> {
        let attached = std::mem::take(&mut self.state().attached);
        let closed = attached.into_values().map(|attached| close(attached.file));
        closed.fold(Ok(()), Result::and).map_err(io::Error::other)
    }
}
