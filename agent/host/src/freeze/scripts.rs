//! Scripts that make applications quiet, run by a process that outlives us ([`super::guard`]).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use tidemark_base::trust::folder_of;

use super::guard::{Commands, Guard, Limits};
use super::{FreezeError, Freezer, Frozen, check_owner};

impl Frozen for Guard {
    fn thaw(self: Box<Self>) -> Result<(), FreezeError> {
        Guard::thaw(*self)
    }

    fn is_quiet(&self) -> bool {
        Guard::is_quiet(self)
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
