//! Making the application quiet for a mark.
//!
//! *Cancellation.* A [`Frozen`] thaws when it is dropped, whatever happened in between. The scripts themselves are told
//! their limit and killed when it is over. *Retries.* None: a mark that could not be made app-consistent says why. *Crash.* What was frozen
//! thaws without the agent: `guard`. It is a process of its own, as Linux forks them; on Windows nothing is frozen.

#[cfg(unix)]
pub mod guard;
#[cfg(unix)]
mod scripts;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tidemark_base::trust::distrust;

#[cfg(unix)]
pub(crate) use scripts::pipe;
#[cfg(unix)]
pub use scripts::{ScriptFreezer, limits};

#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("no freeze scripts are configured for machine {machine}")]
    NotConfigured { machine: String },
    #[error("{path} is not safe to run: {reason}")]
    Unsafe { path: PathBuf, reason: &'static str },
    #[error("cannot run {path}")]
    Run { path: PathBuf, source: io::Error },
    #[error("{path} failed with {status}")]
    Failed { path: PathBuf, status: String },
    #[error("{path} did not finish within {} s", limit.as_secs_f32())]
    TimedOut { path: PathBuf, limit: Duration },
    #[error("the application did not stay quiet until the mark: its time was over, and {path} was run")]
    Outlasted { path: PathBuf },
    #[error("{path} cannot be used: {reason}")]
    Settings { path: PathBuf, reason: String },
    #[error("the file system at {path} cannot be frozen, or did not stay so")]
    FileSystem { path: PathBuf, source: io::Error },
}

impl FreezeError {
    pub fn help(&self) -> &'static str {
        match self {
            FreezeError::NotConfigured { .. } => {
                "install executable scripts `freeze` and `thaw` in a folder named after the machine, beneath the agent's folder of freeze scripts"
            }
            FreezeError::Unsafe { .. } => {
                "let it belong to root (or to the agent's user) and be writable to its owner alone"
            }
            FreezeError::Run { .. } => "make it executable, with a valid first line",
            FreezeError::Outlasted { .. } => {
                "see what kept the agent from making its mark in time; a crash-consistent point is still possible"
            }
            FreezeError::Settings { .. } => "write it as the documentation of app-consistent points shows",
            FreezeError::FileSystem { .. } => {
                "try `fsfreeze` by hand to see what is in its way; no point is made while it is written to"
            }
            FreezeError::Failed { .. } | FreezeError::TimedOut { .. } => {
                "run it by hand to see what it does; a crash-consistent point is still possible"
            }
        }
    }
}

/// Something that can make the writers of a machine put their data in order and keep still.
pub trait Freezer: Send + Sync {
    /// Returns once everything is quiet. What it returns thaws on drop.
    fn freeze(&self, machine: &str, limit: Duration) -> Result<Box<dyn Frozen>, FreezeError>;

    /// Whether somebody set it up for this machine. Where nobody did, no app-consistent point is made unasked: it would be called
    /// what it is not.
    fn is_set_up(&self, _machine: &str) -> bool {
        true
    }
}

/// Writers that keep still.
pub trait Frozen: Send {
    /// Lets them go on. An error means that this could not be confirmed.
    fn thaw(self: Box<Self>) -> Result<(), FreezeError>;

    /// Whether they were kept still until now. What outlasts its limit is let go on by itself.
    fn is_quiet(&self) -> bool {
        true
    }
}

/// Several that were made quiet one after another; they go on in the opposite order.
#[derive(Default)]
pub struct AllFrozen(Vec<Box<dyn Frozen>>);

impl AllFrozen {
    pub fn push(&mut self, frozen: Box<dyn Frozen>) {
        self.0.push(frozen);
    }
}

impl Frozen for AllFrozen {
    fn thaw(mut self: Box<Self>) -> Result<(), FreezeError> {
        let mut outcome = Ok(());
        while let Some(frozen) = self.0.pop() {
            outcome = outcome.and(frozen.thaw());
        }
        outcome
    }

    fn is_quiet(&self) -> bool {
        self.0.iter().all(|frozen| frozen.is_quiet())
    }
}

impl Drop for AllFrozen {
    fn drop(&mut self) {
        while let Some(frozen) = self.0.pop() {
            drop(frozen);
        }
    }
}

/// Whoever can change a script (or swap it) can run what they like as the agent.
pub fn check_owner(path: &Path) -> Result<(), FreezeError> {
    match distrust(path).map_err(|source| FreezeError::Run { path: path.to_owned(), source })? {
        None => Ok(()),
        Some(reason) => Err(FreezeError::Unsafe { path: path.to_owned(), reason }),
    }
}
