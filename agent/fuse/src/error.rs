//! What can be in the way of a file.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    #[error("FUSE is not to be had on this machine: {} cannot be opened", device.display())]
    NoDevice { device: PathBuf, source: io::Error },
    #[error("this process may not mount file systems")]
    NotPermitted,
    #[error("something is mounted on {} already ({kind})", path.display())]
    InUse { path: PathBuf, kind: String },
    #[error("{} is there already and is no empty file of ours", path.display())]
    Occupied { path: PathBuf },
    #[error("the kernel does not mount a disk on {}", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("requests to {} do not end", path.display())]
    Busy { path: PathBuf },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl FuseError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            FuseError::NoDevice { .. } => {
                "load the kernel's module (`modprobe fuse`) and let the agent open /dev/fuse, or protect the machine with `--via nbd`"
            }
            FuseError::NotPermitted => {
                "run the agent as root with CAP_SYS_ADMIN (under systemd with the drop-in that packaging/README.md shows), or protect the \
                 machine with `--via nbd`"
            }
            FuseError::InUse { .. } => "unmount it (`umount PATH`) when nothing needs it any more; then protect again",
            FuseError::Occupied { .. } => "move it elsewhere: disks appear at this place",
            FuseError::Mount { source, .. } if source.raw_os_error() == Some(libc::EPERM) => {
                "under systemd the agent mounts only with the drop-in that packaging/README.md shows; or protect the machine with `--via nbd`"
            }
            FuseError::Mount { .. } | FuseError::Io { .. } => "see the system's message",
            FuseError::Busy { .. } => "the medium of the disk does not answer: see the kernel's log",
        }
    }
}
