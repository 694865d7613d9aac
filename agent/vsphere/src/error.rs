//! What can go wrong between us and a vCenter, and what to do about it. Nothing here holds a password.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum VsphereError {
    #[error("{address:?} names no disk of a machine on vSphere")]
    Address { address: String },
    #[error("cannot read {}", path.display())]
    Settings { path: PathBuf, source: io::Error },
    #[error("{} is not understood: {reason}", path.display())]
    WrongSettings { path: PathBuf, reason: String },
    #[error("{} is not to be trusted: {reason}", path.display())]
    Unsafe { path: PathBuf, reason: String },
    #[error("{server} cannot be reached: {reason}")]
    Unreachable { server: String, reason: String },
    #[error("{server} shows a certificate that nobody vouches for ({reason}); its SHA-256 thumbprint is {thumbprint}")]
    Certificate { server: String, thumbprint: String, reason: String },
    #[error("{server} did not answer {what} within {limit:?}")]
    TimedOut { server: String, what: String, limit: Duration },
    #[error("the connection to {server} was cut in the middle of {what}")]
    Cut { server: String, what: String },
    #[error("{server} refuses user {user}")]
    Login { server: String, user: String },
    #[error(
        "{server} refused user {user} a moment ago, and is not asked again for {wait:?}: accounts are locked after a few wrong passwords"
    )]
    LoginPaused { server: String, user: String, wait: Duration },
    #[error("{what} was refused: {fault}: {message}")]
    Fault { what: String, fault: String, message: String },
    #[error("{what} of {server} was answered with status {status}")]
    Status { server: String, what: String, status: u16 },
    #[error("the answer to {what} is not understood: {reason}")]
    Answer { what: String, reason: String },
    #[error("there is no machine {machine} at {server}")]
    NoMachine { server: String, machine: String },
    #[error("machine {machine} has no disk {disk}; it has {found}")]
    NoDisk { machine: String, disk: String, found: String },
    #[error("disk {disk} of machine {machine} cannot be tracked: {reason}")]
    Kind { machine: String, disk: String, reason: String },
    #[error("machine {machine} cannot track changes: {reason}")]
    NoTracking { machine: String, reason: String },
    #[error("machine {machine} has snapshots of others ({names}): its disks cannot be read beside them")]
    HasSnapshots { machine: String, names: String },
    #[error(
        "datastore {datastore} of machine {machine} has only {free} bytes left: no snapshot is made below {wanted}"
    )]
    NoRoom { machine: String, datastore: String, free: u64, wanted: u64 },
    #[error("the file systems of machine {machine} could not be made quiet: {reason}")]
    Quiesce { machine: String, reason: String },
    #[error("{what} took longer than {limit:?}")]
    TaskTimedOut { what: String, limit: Duration },
    #[error("a snapshot of machine {machine} failed a moment ago, and is not tried again for {wait:?}: {reason}")]
    Resting { machine: String, wait: Duration, reason: String },
    #[error("the snapshot that machine {machine} was read from is gone")]
    SnapshotGone { machine: String },
    #[error("what changed of disk {disk} is not known: {reason}")]
    Unwitnessed { disk: String, reason: String },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("disk {disk} is not tracked here")]
    Unknown { disk: String },
    #[error("the agent is being stopped")]
    Stopping,
}

impl VsphereError {
    pub fn help(&self) -> String {
        match self {
            VsphereError::Address { .. } => {
                "name it as vsphere:CONNECTION/MACHINE/DISK, for example `vsphere:lab/DC0/vm/web/scsi0:0`: CONNECTION.toml is in the agent's vsphere.d, \
                 MACHINE is an inventory path, uuid=… or moref=…"
                    .into()
            }
            VsphereError::Settings { .. } | VsphereError::WrongSettings { .. } => {
                "write `url`, `user`, `password-file` and `thumbprint` (or `ca-file`) there".into()
            }
            VsphereError::Unsafe { path, .. } => {
                format!("let it belong to root or the agent's user, and nobody else read a password: `chmod 600 {}`", path.display())
            }
            VsphereError::Unreachable { .. } | VsphereError::TimedOut { .. } | VsphereError::Cut { .. } => {
                "see whether it answers in a browser from this host; it is tried again by itself".into()
            }
            VsphereError::Certificate { thumbprint, .. } => format!(
                "compare that with what the server itself shows, then write `thumbprint = \"{thumbprint}\"` into the connection's file"
            ),
            VsphereError::Login { .. } => "check user and password of the connection; after they were changed it is tried again by itself".into(),
            VsphereError::LoginPaused { .. } => "correct user or password of the connection: then it is tried at once".into(),
            VsphereError::Fault { fault, .. } if fault == "NoPermission" => {
                "give the account the rights that the documentation of `--via vsphere` names".into()
            }
            VsphereError::Fault { .. } | VsphereError::Status { .. } => {
                "see the machine's tasks and events in the vSphere client; it is tried again by itself".into()
            }
            VsphereError::Answer { .. } | VsphereError::Unknown { .. } => {
                "it is tried again by itself; if it stays so, report it with the version of the vCenter".into()
            }
            VsphereError::NoMachine { .. } => {
                "name its inventory path (DATACENTER/vm/FOLDER/NAME), uuid=… or moref=…, and give the account the right to see it".into()
            }
            VsphereError::NoDisk { .. } => "name one of these".into(),
            VsphereError::Kind { .. } => {
                "disks must be dependent, persistent VMDK files of VMFS or NFS datastores; leave this one out, or protect it from inside the machine".into()
            }
            VsphereError::NoTracking { .. } => {
                "upgrade its virtual hardware to version 7 or later, and remove its snapshots before tracking is switched on".into()
            }
            VsphereError::HasSnapshots { .. } => {
                "delete them in the vSphere client, or wait until the backup that made them is done; it is tried again by itself".into()
            }
            VsphereError::NoRoom { .. } => {
                "make room there, or set `free-bytes-min` of the connection lower: a snapshot grows while it is there, and a full datastore stops its machines".into()
            }
            VsphereError::Quiesce { .. } => {
                "see whether VMware Tools run in the machine and its VSS writers or freeze scripts end; or install freeze scripts at the agent; \
                 crash-consistent points go on meanwhile"
                    .into()
            }
            VsphereError::TaskTimedOut { .. } => "see the machine's tasks in the vSphere client; its datastore may be slow".into(),
            VsphereError::Resting { .. } => "see the reason; it is tried again by itself".into(),
            VsphereError::SnapshotGone { .. } => "leave snapshots called `tidemark-…` alone; it is tried again by itself".into(),
            VsphereError::Unwitnessed { .. } => "the whole disk is compared by itself".into(),
            VsphereError::Io { .. } => "see the system's message".into(),
            VsphereError::Stopping => "start it again".into(),
        }
    }

    /// Whether whoever asked has to change the question.
    pub fn is_a_wrong_question(&self) -> bool {
        matches!(
            self,
            VsphereError::Address { .. }
                | VsphereError::NoMachine { .. }
                | VsphereError::NoDisk { .. }
                | VsphereError::Kind { .. }
                | VsphereError::NoTracking { .. }
                | VsphereError::WrongSettings { .. }
                | VsphereError::Unsafe { .. }
        )
    }

    pub(crate) fn is_fault(&self, names: &[&str]) -> bool {
        matches!(self, VsphereError::Fault { fault, .. } if names.contains(&fault.as_str()))
    }
}

impl From<VsphereError> for io::Error {
    fn from(error: VsphereError) -> Self {
        io::Error::other(error)
    }
}
