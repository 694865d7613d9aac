//! Making the application quiet for a mark.
//!
//! *Cancellation.* A [`Frozen`] thaws when it is dropped, whatever happened in between. The scripts themselves are told
//! their limit and killed when it is over. *Retries.* None: a mark that could not be made app-consistent says why. *Crash.* What was frozen
//! thaws without the agent: [`guard`].

pub mod guard;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tidemark_base::trust::{distrust, folder_of};

use guard::{Commands, Guard, Limits};

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

impl Frozen for Guard {
    fn thaw(self: Box<Self>) -> Result<(), FreezeError> {
        Guard::thaw(*self)
    }

    fn is_quiet(&self) -> bool {
        Guard::is_quiet(self)
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

/// Scripts `freeze` and `thaw` in `<folder>/<machine's name>/`, pre-installed by an administrator. Nothing that comes from
/// the network is ever run: only the machine's name is looked up, and a name that is not a plain file name finds nothing.
pub struct ScriptFreezer {
    folder: PathBuf,
}

impl ScriptFreezer {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Where what a machine has lies; `None`: its name is not a plain file name.
    pub fn folder_of(&self, machine: &str) -> Option<PathBuf> {
        folder_of(&self.folder, machine)
    }

    fn script(&self, machine: &str, name: &str) -> Result<PathBuf, FreezeError> {
        let not_configured = || FreezeError::NotConfigured { machine: machine.to_owned() };
        let folder = self.folder_of(machine).ok_or_else(not_configured)?;
        let path = folder.join(name);
        if !path.exists() {
            return Err(not_configured());
        }
        for path in [&self.folder, &folder, &path] {
            check_owner(path)?;
        }
        Ok(path)
    }
}

/// Whoever can change a script (or swap it) can run what they like as the agent.
pub fn check_owner(path: &Path) -> Result<(), FreezeError> {
    match distrust(path).map_err(|source| FreezeError::Run { path: path.to_owned(), source })? {
        None => Ok(()),
        Some(reason) => Err(FreezeError::Unsafe { path: path.to_owned(), reason }),
    }
}

impl Freezer for ScriptFreezer {
    fn freeze(&self, machine: &str, limit: Duration) -> Result<Box<dyn Frozen>, FreezeError> {
        let freeze = self.script(machine, "freeze")?;
        let thaw = self.script(machine, "thaw")?;
        let environment =
            [("TIDEMARK_LIMIT_SECONDS", limit.as_secs().to_string()), ("TIDEMARK_MACHINE", machine.to_owned())];
        let environment = environment.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let commands = Commands { freeze: vec![freeze.into()], thaw: vec![thaw.into()], environment };
        Ok(Box::new(Guard::freeze(&commands, limits(limit))?))
    }
}

/// Of a program that may take so long; a mark has its own time, and a little is left to say that it was made.
pub fn limits(program: Duration) -> Limits {
    Limits { freeze: program, frozen: crate::mark::FROZEN_MAX + Duration::from_secs(1), thaw: program }
}

pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 writes two descriptors to the address that it is given.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new, and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn scripts(freeze: &str, thaw: &str) -> (tempfile::TempDir, ScriptFreezer) {
        let folder = tempfile::tempdir().unwrap();
        let machine = folder.path().join("web");
        std::fs::create_dir(&machine).unwrap();
        for (name, body) in [("freeze", freeze), ("thaw", thaw)] {
            let path = machine.join(name);
            let body = format!("#!/bin/sh\ncd {}\n{body}\n", folder.path().display());
            std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), body.as_bytes()).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        let freezer = ScriptFreezer::new(folder.path());
        (folder, freezer)
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn it_freezes_and_thaws_even_when_dropped() {
        let (folder, freezer) = scripts("touch frozen", "rm frozen; echo >> thawed");
        let frozen = freezer.freeze("web", LIMIT).unwrap();
        assert!(folder.path().join("frozen").exists());
        frozen.thaw().unwrap();
        assert!(!folder.path().join("frozen").exists());
        drop(freezer.freeze("web", LIMIT).unwrap());
        assert_eq!(std::fs::read(folder.path().join("thawed")).unwrap(), b"\n\n");
    }

    #[test]
    fn a_script_that_fails_or_hangs_is_thawed_all_the_same() {
        let (folder, freezer) = scripts("exit 3", "touch thawed");
        assert!(matches!(freezer.freeze("web", LIMIT), Err(FreezeError::Failed { .. })));
        assert!(folder.path().join("thawed").exists());
        let (folder, freezer) = scripts("sleep 1000 & wait", "touch thawed");
        let result = freezer.freeze("web", Duration::from_millis(100));
        assert!(matches!(result, Err(FreezeError::TimedOut { .. })));
        // The thaw script has the same short limit; on a loaded machine it may not have made it.
        drop(folder);
    }

    #[test]
    fn unsafe_or_absent_scripts_are_not_run() {
        let (folder, freezer) = scripts("true", "true");
        for name in ["db", "../web", "", ".", "a/b"] {
            assert!(matches!(freezer.freeze(name, LIMIT), Err(FreezeError::NotConfigured { .. })), "{name}");
        }
        let path = folder.path().join("web/thaw");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o722)).unwrap();
        assert!(matches!(freezer.freeze("web", LIMIT), Err(FreezeError::Unsafe { .. })));
    }
}
