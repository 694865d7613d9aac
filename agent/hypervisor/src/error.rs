//! What can go wrong, by what a caller can do about it.

use std::io;
use std::time::Duration;

use tidemark_qemu::QmpError;
use uuid::Uuid;

use crate::machine::InvalidMachine;

#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    #[error("{hypervisor} cannot be reached: {reason}")]
    Unreachable { hypervisor: &'static str, reason: String },
    #[error("there is no machine {id}")]
    Unknown { id: Uuid },
    #[error("a machine named {name:?} is there already, with the id {id}")]
    Exists { name: String, id: Uuid },
    #[error("machine {id} is running")]
    Running { id: Uuid },
    #[error("machine {id} is off")]
    Off { id: Uuid },
    #[error("{hypervisor} does not do this: {what}")]
    Unsupported { hypervisor: &'static str, what: &'static str },
    #[error(transparent)]
    Invalid(#[from] InvalidMachine),
    #[error("{what} was refused: {reason}")]
    Refused { what: String, reason: String },
    #[error("{what} took longer than {limit:?}")]
    TimedOut { what: String, limit: Duration },
    #[error("{what} is not installed")]
    Missing { what: String, package: &'static str },
    #[error("the guest's agent does not answer: {reason}")]
    Guest { reason: String },
    #[error("process {pid} is not machine {id}, although its files say so")]
    Stranger { id: Uuid, pid: i32 },
    #[error("the folder of machines is in use by another process")]
    InUse,
    #[error("{what}")]
    Store { what: String, source: io::Error },
}

impl From<QmpError> for HypervisorError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Unreachable { reason } => {
                HypervisorError::Unreachable { hypervisor: "the machine's QEMU", reason }
            }
            QmpError::Refused { what, reason } => HypervisorError::Refused { what, reason },
            QmpError::TimedOut { what, limit } => HypervisorError::TimedOut { what, limit },
        }
    }
}

impl HypervisorError {
    pub fn help(&self) -> String {
        match self {
            HypervisorError::Unreachable { .. } => "start it, and check its address and the rights of this user".into(),
            HypervisorError::Unknown { .. } => "it was deleted, or never defined here: list the machines".into(),
            HypervisorError::Exists { .. } => "delete or rename that machine, or choose another name".into(),
            HypervisorError::Running { .. } => "stop it first".into(),
            HypervisorError::Off { .. } => "start it first".into(),
            HypervisorError::Unsupported { .. } => "do it by hand, or use a hypervisor that can".into(),
            HypervisorError::Invalid(error) => error.help().into(),
            HypervisorError::Refused { .. } => "see the reason; the machine's log is in its folder".into(),
            HypervisorError::TimedOut { .. } => "try again; a busy host may need longer".into(),
            HypervisorError::Missing { package, .. } => format!("install it: apt-get install {package}"),
            HypervisorError::Guest { .. } => "install and start qemu-guest-agent in the guest".into(),
            HypervisorError::Stranger { .. } => "the machine has ended; delete it, then define it again".into(),
            HypervisorError::InUse => "stop the other process that uses this folder".into(),
            HypervisorError::Store { .. } => "check the volume (free room, kernel log)".into(),
        }
    }
}

/// An I/O error with what it befell.
pub(crate) fn store(what: impl Into<String>) -> impl FnOnce(io::Error) -> HypervisorError {
    move |source| HypervisorError::Store { what: format!("{}: {source}", what.into()), source }
}
