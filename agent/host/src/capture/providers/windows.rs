//! Windows: what needs no kernel, socket or file system of Linux's.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_proto::control::{FailureKind, Via};

use super::Providers;
use crate::HostConfig;
use crate::capture::hrl::HrlImporter;
use crate::capture::vsphere::VsphereTracker;
use crate::capture::{Address, CaptureProvider};
use crate::error::HostError;
use crate::freeze::Freezer;
use crate::protected::ProtectedDisk;

#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    #[error("nothing is protected via {} on Windows", via.name())]
    Elsewhere { via: Via },
}

impl ProviderError {
    pub fn help(&self) -> &str {
        "protect a Hyper-V machine with `--via hrl`, or this disk on a Linux host"
    }

    pub fn kind(&self) -> FailureKind {
        FailureKind::BadRequest
    }
}

/// What to do about an error of one of them that came as the system's.
pub fn help_within(_source: &io::Error) -> Option<String> {
    None
}

/// In the place of what is on Linux alone: says so.
struct Elsewhere {
    via: Via,
}

impl Elsewhere {
    fn refuse<T>(&self) -> Result<T, HostError> {
        Err(ProviderError::Elsewhere { via: self.via }.into())
    }
}

impl CaptureProvider for Elsewhere {
    fn probe(&self, _path: &Path, _state: &Path) -> Result<u64, HostError> {
        self.refuse()
    }

    fn prepare(&self, _path: &Path, _disk: tidemark_base::DiskId) -> Result<(), HostError> {
        self.refuse()
    }

    fn attach(&self, _name: &str, _disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn detach(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

pub fn splitter(_config: &HostConfig) -> Result<Arc<dyn CaptureProvider>, HostError> {
    Ok(Arc::new(Elsewhere { via: Via::Nbd }))
}

/// Nothing is frozen on Windows.
pub fn freezer(_folder: PathBuf) -> Option<Arc<dyn Freezer>> {
    None
}

impl Providers {
    pub fn new(config: &HostConfig, splitter: Arc<dyn CaptureProvider>) -> Self {
        let state = &config.state_folder;
        let elsewhere = |via| -> Arc<dyn CaptureProvider> { Arc::new(Elsewhere { via }) };
        Self {
            all: vec![
                (Via::Nbd, splitter),
                (Via::Bpf, elsewhere(Via::Bpf)),
                (Via::Fuse, elsewhere(Via::Fuse)),
                (Via::Hrl, Arc::new(HrlImporter::new(state))),
                (Via::Qemu, elsewhere(Via::Qemu)),
                (Via::Vsphere, Arc::new(VsphereTracker::new(state))),
            ],
        }
    }
}
