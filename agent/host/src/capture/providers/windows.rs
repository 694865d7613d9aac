//! Windows: what needs no kernel, socket or file system of Linux's.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tidemark_proto::control::{FailureKind, Via};
use tidemark_rct::windows::HyperV;

use super::Providers;
use super::elsewhere::Elsewhere;
use crate::HostConfig;
use crate::capture::CaptureProvider;
use crate::capture::hrl::HrlImporter;
use crate::capture::rct::{REST, RctTracker};
use crate::capture::vsphere::VsphereTracker;
use crate::error::HostError;
use crate::freeze::Freezer;

#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    #[error("nothing is protected via {} on Windows", via.name())]
    Elsewhere { via: Via },
}

impl ProviderError {
    pub fn help(&self) -> &str {
        "protect a Hyper-V machine with `--via hrl` or `--via rct`, or this disk on a Linux host"
    }

    pub fn kind(&self) -> FailureKind {
        FailureKind::BadRequest
    }
}

/// What to do about an error of one of them that came as the system's.
pub fn help_within(_source: &io::Error) -> Option<String> {
    None
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
                (Via::Rct, Arc::new(RctTracker::new(state, Arc::new(HyperV::new()), REST))),
            ],
        }
    }
}
