//! Linux: all of them, but for what only a Hyper-V host has.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tidemark_bpf::{KeepError, TrackerError};
use tidemark_fuse::FuseError;
use tidemark_nbd::ListenError;
use tidemark_proto::control::{FailureKind, Via};
use tidemark_qemu::QemuError;

use super::Providers;
use super::elsewhere::Elsewhere;
use crate::HostConfig;
use crate::capture::CaptureProvider;
use crate::capture::bpf::BpfTracker;
use crate::capture::fuse::FuseSplitter;
use crate::capture::hrl::HrlImporter;
use crate::capture::nbd::NbdSplitter;
use crate::capture::qemu::QemuTracker;
use crate::capture::vsphere::VsphereTracker;
use crate::error::HostError;
use crate::freeze::{Freezer, ScriptFreezer};

#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    File(#[from] FuseError),
    #[error("cannot serve disks")]
    Listen(#[from] ListenError),
    #[error("nothing is protected via {} on Linux", via.name())]
    Elsewhere { via: Via },
}

impl ProviderError {
    pub fn help(&self) -> &str {
        match self {
            ProviderError::Tracker(error) => error.help(),
            ProviderError::Qemu(error) => error.help(),
            ProviderError::File(error) => error.help(),
            ProviderError::Listen(ListenError::Tcp { .. }) => {
                "choose an address of this machine and a port that is free, or 0 for any: `tidemark protect … --listen IP:PORT`"
            }
            ProviderError::Listen(error) => error.help(),
            ProviderError::Elsewhere { .. } => {
                "run the agent on the Hyper-V host itself (tidemark.exe), and name that one: `tidemark protect … --host HOST`"
            }
        }
    }

    pub fn kind(&self) -> FailureKind {
        match self {
            ProviderError::Elsewhere { .. }
            | ProviderError::Tracker(TrackerError::Device(_))
            | ProviderError::Qemu(
                QemuError::Absent { .. }
                | QemuError::NoNode { .. }
                | QemuError::NotTheRoot { .. }
                | QemuError::ReadOnly { .. }
                | QemuError::OddSize { .. }
                | QemuError::TwoMachines { .. },
            ) => FailureKind::BadRequest,
            _ => FailureKind::Failed,
        }
    }
}

/// What to do about an error of one of them that came as the system's.
pub fn help_within(source: &io::Error) -> Option<String> {
    let inner = source.get_ref()?;
    let of_qemu = inner.downcast_ref::<QemuError>().map(|error| error.help().to_owned());
    let of_device = inner.downcast_ref::<KeepError>().map(|error| error.help().to_owned());
    of_qemu.or(of_device).or_else(|| inner.downcast_ref::<FuseError>().map(|error| error.help().to_owned()))
}

impl From<TrackerError> for HostError {
    fn from(error: TrackerError) -> Self {
        ProviderError::from(error).into()
    }
}

impl From<QemuError> for HostError {
    fn from(error: QemuError) -> Self {
        ProviderError::from(error).into()
    }
}

impl From<FuseError> for HostError {
    fn from(error: FuseError) -> Self {
        ProviderError::from(error).into()
    }
}

impl From<ListenError> for HostError {
    fn from(error: ListenError) -> Self {
        ProviderError::from(error).into()
    }
}

/// The one that workloads write through where nothing else is said.
pub fn splitter(config: &HostConfig) -> Result<Arc<dyn CaptureProvider>, HostError> {
    Ok(Arc::new(NbdSplitter::start(&config.run_folder, &config.allowed_uids, config.storage()?)?))
}

/// What an administrator installs for each machine in this folder makes it quiet.
pub fn freezer(folder: PathBuf) -> Option<Arc<dyn Freezer>> {
    Some(Arc::new(ScriptFreezer::new(folder)))
}

impl Providers {
    pub fn new(config: &HostConfig, splitter: Arc<dyn CaptureProvider>) -> Self {
        let state = &config.state_folder;
        Self {
            all: vec![
                (Via::Nbd, splitter),
                (Via::Bpf, Arc::new(BpfTracker::new(state))),
                (Via::Fuse, Arc::new(FuseSplitter::new(&config.run_folder, &config.allowed_uids))),
                (Via::Hrl, Arc::new(HrlImporter::new(state))),
                (Via::Qemu, Arc::new(QemuTracker::new(state))),
                (Via::Vsphere, Arc::new(VsphereTracker::new(state))),
                (Via::Rct, Arc::new(Elsewhere { via: Via::Rct })),
            ],
        }
    }
}
