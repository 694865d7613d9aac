//! What can go wrong between us and a QEMU, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tidemark_base::disk::DiskError;
use tidemark_nbd::ClientError;

/// Of the machine protocol itself.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU cannot be reached: {reason}")]
    Unreachable { reason: String },
    #[error("{what} was refused: {reason}")]
    Refused { what: String, reason: String },
    #[error("{what} took longer than {limit:?}")]
    TimedOut { what: String, limit: Duration },
}

#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{} is neither an image nor a node of a QEMU (SOCKET/NODE)", path.display())]
    Absent { path: PathBuf },
    #[error("no QEMU has {} open", path.display())]
    NotRunning { path: PathBuf },
    #[error("the QEMU that has {} open (process {pid}) has no QMP socket that others can connect to", path.display())]
    NoMonitor { path: PathBuf, pid: i32 },
    #[error("QEMU at {monitor} has no node for {}", path.display())]
    NoNode { monitor: String, path: PathBuf },
    #[error("{} is not what the machine's disk is now: it is below a snapshot, or the disk was changed", path.display())]
    NotTheRoot { path: PathBuf },
    #[error("{} is read-only in its QEMU: it never changes", path.display())]
    ReadOnly { path: PathBuf },
    #[error("{} has {bytes} bytes, which is not a positive multiple of 512", path.display())]
    OddSize { path: PathBuf, bytes: u64 },
    #[error("disks of one machine belong to two QEMUs ({first}, {second})")]
    TwoMachines { first: String, second: String },
    #[error("the machine has moved to another QEMU (its state is {state:?})")]
    Migrated { state: String },
    #[error("what changed of disk {disk} is not known: {reason}")]
    Unwitnessed { disk: String, reason: String },
    #[error("QEMU's NBD server is in use by somebody else")]
    ServerInUse { reason: String },
    #[error("the copy of what changed of {disk} failed: {reason}")]
    Copy { disk: String, reason: String },
    #[error("{} has too little room for a copy of {bytes} bytes", folder.display())]
    NoRoom { folder: PathBuf, bytes: u64 },
    #[error("QEMU runs as user {uid}, and the agent may not give it a folder")]
    User { uid: u32, source: io::Error },
    #[error("cannot read what QEMU exports")]
    Nbd(#[from] ClientError),
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("QEMU's answer to {command} is not understood")]
    Answer { command: &'static str },
    #[error("{} may be written to by somebody else", path.display())]
    NotKept { path: PathBuf, source: DiskError },
    #[error("{} is a node of a QEMU and no image: nobody can be kept from it once its machine is off", path.display())]
    NotAnImage { path: PathBuf },
    #[error("{} is of a format ({format}) whose machine cannot be kept off", path.display())]
    Format { path: PathBuf, format: String },
    #[error("qemu-storage-daemon does not open {}: {reason}", path.display())]
    NotOpened { path: PathBuf, reason: String },
    #[error("disk {disk} is not tracked here")]
    Unknown { disk: String },
}

impl QemuError {
    pub fn help(&self) -> &'static str {
        match self {
            QemuError::Qmp(QmpError::Unreachable { .. }) => {
                "start the machine; if it runs, check that nobody else is connected to its QMP socket (only one can be) and that the agent may open it: \
                 a second one is `-qmp unix:PATH,server=on,wait=off`"
            }
            QemuError::Qmp(QmpError::Refused { .. }) | QemuError::Copy { .. } => {
                "see QEMU's reason: a block job, a snapshot or a backup of another program may be under way; SELinux or AppArmor may keep \
                 QEMU from the agent's folder"
            }
            QemuError::Qmp(QmpError::TimedOut { .. }) => "see whether the machine's storage answers",
            QemuError::Absent { .. } => {
                "name the machine's image as it is on this host, or its QMP socket and the node behind it: `--disk /run/web.qmp/drive0`"
            }
            QemuError::NotRunning { .. } => {
                "start the machine; where it does not run on this host but its QMP socket is here, name that: `--disk SOCKET/NODE`"
            }
            QemuError::NoMonitor { .. } => "start the machine with `-qmp unix:PATH,server=on,wait=off` as well",
            QemuError::NoNode { .. } => "see `query-block` of this machine for the names of its nodes",
            QemuError::NotTheRoot { .. } => {
                "name the image that the disk is now (`query-block`); after a snapshot was committed, it is this one again"
            }
            QemuError::ReadOnly { .. } => "leave it out",
            QemuError::OddSize { .. } => "resize it to whole sectors",
            QemuError::TwoMachines { .. } => "protect the disks of each QEMU as a machine of its own",
            QemuError::Migrated { .. } => {
                "protect it on the host where it runs now; where that is this host, unprotect it and protect it again"
            }
            QemuError::Unwitnessed { .. } => "the whole disk is compared by itself",
            QemuError::ServerInUse { .. } => {
                "wait until the other backup or migration of this machine has ended: QEMU has one NBD server; it is tried again by itself"
            }
            QemuError::NoRoom { .. } => "make room there: what changed is copied there for a moment",
            QemuError::User { .. } => "run the agent as root, or as the user that QEMU runs as",
            QemuError::Nbd(_) => "see whether the machine still runs; it is tried again by itself",
            QemuError::Io { .. } => "see the system's message",
            QemuError::Answer { .. } => "check QEMU's version: 6.0 or newer is needed",
            QemuError::NotKept { source: DiskError::Kind { .. }, .. } => {
                "an image on a block device is kept by nobody: protect the device with `--via bpf`"
            }
            QemuError::NotKept { .. } => {
                "end the QEMU that has it open (one that was started with `-no-shutdown` stays when its guest is off), then try again"
            }
            QemuError::NotAnImage { .. } => "protect the machine by its image: `--disk /path/to/its/image`",
            QemuError::Format { .. } => "convert it to qcow2 or raw",
            QemuError::NotOpened { .. } => {
                "see its reason; it comes with `qemu-utils` (Debian), and must be of a version that reads the image"
            }
            QemuError::Unknown { .. } => "protect the machine again",
        }
    }
}

impl From<QemuError> for io::Error {
    fn from(error: QemuError) -> Self {
        io::Error::other(error)
    }
}
