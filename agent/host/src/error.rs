//! What can go wrong when a machine is protected, and what to do about it.

use std::io;
use std::path::PathBuf;

use tidemark_base::disk::DiskError;
use tidemark_base::{DiskId, MachineId, storage};
use tidemark_hrl::LogError;
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_rct::RctError;
use tidemark_transport::ExportTlsError;
use tidemark_vsphere::VsphereError;

use crate::capture::providers::{ProviderError, help_within};
use crate::freeze::FreezeError;

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The folder beside the disk, or the configured one of a block device.
    #[error("cannot {what} in {folder}")]
    State { what: &'static str, folder: PathBuf, source: io::Error },
    #[error("cannot keep a log beside the disk")]
    Log(#[from] LogError),
    #[error("disk {path} is named twice")]
    DuplicateDisk { path: PathBuf },
    #[error("disk {path} is already protected as a disk of machine {machine}")]
    AlreadyProtected { path: PathBuf, machine: String },
    #[error("a disk of machine {machine} cannot be moved to another place")]
    OtherDisks { machine: String },
    #[error("{path} has no folder and file name that state could be kept beside")]
    NoName { path: PathBuf },
    #[error("machine {machine} is not protected by this host")]
    UnknownMachine { machine: MachineId },
    #[error("no mark can be made: writes to disk {disk} stay in flight for too long")]
    Busy { disk: DiskId },
    /// Of a tracked machine: some instant must be without writes.
    #[error("no mark can be made: disk {disk} is written to all the time")]
    Unsettled { disk: DiskId, frozen: bool },
    #[error("the agent's state in {state} lies on disk {path} itself")]
    StateOnDisk { path: PathBuf, state: PathBuf },
    #[error(transparent)]
    Image(#[from] crate::capture::images::DiskImageError),
    #[error(transparent)]
    Provider(#[from] ProviderError),
    #[error(transparent)]
    Import(#[from] crate::capture::hrl::ImportError),
    #[error("machine {machine} has several disks, and Hyper-V's logs can be followed for one")]
    OneDisk { machine: String },
    #[error("no mark can be made: a log of disk {disk}'s host is being replayed")]
    Replaying { disk: DiskId },
    #[error(transparent)]
    Vsphere(#[from] VsphereError),
    #[error(transparent)]
    Rct(#[from] RctError),
    #[error("no mark can be made: the hypervisor made no instant of the machine's disks")]
    Instant { source: io::Error },
    #[error("machine {machine} is protected in another way ({before})")]
    OtherWay { machine: String, before: &'static str },
    #[error("no mark can be made: the changes of disk {disk} are not logged now ({reason})")]
    NotLogging { disk: DiskId, reason: String },
    #[error("no recovery point can be made: disk {disk} is being replicated ({done} of {total} bytes)")]
    Scanning { disk: DiskId, done: u64, total: u64 },
    /// Its writes do not pass through here, so nothing can hold them.
    #[error(
        "the writes of machine {machine} do not pass through its agent: they cannot be held at one instant with those of others"
    )]
    NotHeld { machine: String },
    #[error("there is no barrier {round} here")]
    NoBarrier { round: tidemark_base::MarkId },
    #[error("{most} barriers are under way here, which is the limit")]
    Barriers { most: usize },
    #[error("machine {machine} cannot be made quiet")]
    Freeze { machine: String, source: FreezeError },
    #[error("cannot make certificates for remote clients")]
    Certificates(#[from] ExportTlsError),
    /// Its workload, or anybody else.
    #[error("somebody may still write to the disks of machine {machine}")]
    NotKept { machine: String, source: io::Error },
    #[error("cannot {what}")]
    Io { what: &'static str, source: io::Error },
    #[error("the host is stopping")]
    Stopping,
}

impl HostError {
    /// What an operator should do.
    pub fn help(&self) -> String {
        match self {
            HostError::Disk(error) => error.help().to_owned(),
            HostError::State { source, folder, .. } if storage::is_full(source) => {
                format!("make room in {}: the log and its bitmaps are kept there", folder.display())
            }
            HostError::State { source, folder, .. } if storage::is_denied(source) => {
                format!("let the agent write to {}: the log and its bitmaps are kept there", folder.display())
            }
            HostError::State { folder, .. } => {
                format!("see the system's message; {} must be a usable folder", folder.display())
            }
            HostError::Log(error) if error.is_full() => {
                "make room in the folder of the disk: its log is kept there".into()
            }
            HostError::Log(error) => error.help().to_owned(),
            HostError::DuplicateDisk { .. } => "name each disk once".into(),
            HostError::AlreadyProtected { machine, .. } => format!("unprotect {machine} first, or leave this disk out"),
            HostError::OtherDisks { machine } => {
                format!("take the disk out of {machine} and add it at its new place: `tidemark machine disk remove`, `tidemark machine disk add`")
            }
            HostError::NoName { .. } => "name a disk image or a block device".into(),
            HostError::UnknownMachine { .. } => "see `tidemark status` for what is protected".into(),
            HostError::Busy { .. } => "try again; if it stays so, the disk's medium is too slow for its writes".into(),
            HostError::Unsettled { frozen: true, .. } => {
                "something writes to the device beside its file systems, or more than can be read while they are frozen: install freeze \
                 scripts for the machine, or protect it with `--via nbd`"
                    .into()
            }
            HostError::Unsettled { frozen: false, .. } => {
                "no mounted file system was found that could be frozen: install freeze scripts for the machine, or protect it with `--via nbd`"
                    .into()
            }
            HostError::StateOnDisk { .. } => {
                "keep the agent's state on another disk (`dir`): it must go on while this one is frozen, and /run is not in memory here".into()
            }
            HostError::Image(error) => error.help().into(),
            HostError::Provider(error) => error.help().into(),
            HostError::Import(error) => error.help().into(),
            HostError::Vsphere(error) => error.help(),
            HostError::Rct(error) => error.help().into(),
            HostError::Instant { source } => {
                let inner = source.get_ref();
                let of_vsphere = inner.and_then(|inner| inner.downcast_ref::<VsphereError>()).map(VsphereError::help);
                let of_rct = || crate::capture::rct::help_within(source).map(str::to_owned);
                of_vsphere.or_else(of_rct).or_else(|| help_within(source)).unwrap_or_else(|| "see the system's message".into())
            }
            HostError::OneDisk { .. } => "protect each disk as a machine of its own: marks are made where its host switches logs".into(),
            HostError::Replaying { .. } => "wait until its host closed the next log and that was replayed".into(),
            HostError::OtherWay { machine, .. } => format!("unprotect {machine} first, then protect it in the other way"),
            HostError::NotLogging { .. } => {
                "try again when the mode of the disk is `data` (see `tidemark status`)".into()
            }
            HostError::Scanning { .. } => {
                "wait until `tidemark status` says that the machine is protected, and check that its process server runs"
                    .into()
            }
            HostError::NotHeld { .. } => {
                "protect it with `--via nbd` or `--via fuse`, or take it out of the group: it has points of its own".into()
            }
            HostError::NoBarrier { .. } => "it was ended long ago, or the agent was started since; the next one will do".into(),
            HostError::Barriers { .. } => "give groups longer intervals".into(),
            HostError::Freeze { source, .. } => source.help().to_owned(),
            HostError::Certificates(error) => error.help().into(),
            HostError::NotKept { source, .. } => {
                help_within(source).unwrap_or_else(|| "shut the machine down, then try again".into())
            }
            HostError::Io { source, .. } => help_within(source).unwrap_or_else(|| "see the system's message".into()),
            HostError::Stopping => "start the agent again".into(),
        }
    }

    pub fn kind(&self) -> FailureKind {
        match self {
            HostError::Disk(DiskError::Absent { .. })
            | HostError::UnknownMachine { .. }
            | HostError::NoBarrier { .. } => FailureKind::NotFound,
            HostError::Disk(DiskError::InUse { .. })
            | HostError::AlreadyProtected { .. }
            | HostError::OtherWay { .. }
            | HostError::StateOnDisk { .. }
            | HostError::NotHeld { .. }
            | HostError::NotKept { .. }
            | HostError::OtherDisks { .. } => FailureKind::Conflict,
            HostError::Image(error) if error.is_a_wrong_question() => FailureKind::BadRequest,
            HostError::Disk(_)
            | HostError::DuplicateDisk { .. }
            | HostError::OneDisk { .. }
            | HostError::NoName { .. } => FailureKind::BadRequest,
            HostError::Provider(error) => error.kind(),
            HostError::Vsphere(error) if error.is_a_wrong_question() => FailureKind::BadRequest,
            HostError::Rct(error) if error.is_a_wrong_question() => FailureKind::BadRequest,
            HostError::Busy { .. }
            | HostError::Unsettled { .. }
            | HostError::Replaying { .. }
            | HostError::NotLogging { .. }
            | HostError::Scanning { .. }
            | HostError::Barriers { .. }
            | HostError::Instant { .. }
            | HostError::Stopping => FailureKind::Unavailable,
            _ => FailureKind::Failed,
        }
    }
}

impl From<&HostError> for Failure {
    fn from(error: &HostError) -> Self {
        Failure::from_error(error.kind(), error, error.help())
    }
}
