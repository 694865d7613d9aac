//! Making the application quiet for a mark.
//!
//! *Cancellation.* A [`Frozen`] thaws when it is dropped, whatever happened in between. The scripts themselves are told
//! their limit and killed when it is over. *Retries.* None: a mark that could not be made app-consistent says why.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

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
}

/// Writers that keep still.
pub trait Frozen: Send {
    /// Lets them go on. An error means that this could not be confirmed.
    fn thaw(self: Box<Self>) -> Result<(), FreezeError>;
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

    fn script(&self, machine: &str, name: &str) -> Result<PathBuf, FreezeError> {
        let not_configured = || FreezeError::NotConfigured { machine: machine.to_owned() };
        let is_plain = !machine.is_empty() && !machine.starts_with('.') && !machine.contains(['/', '\0']);
        if !is_plain {
            return Err(not_configured());
        }
        let folder = self.folder.join(machine);
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
fn check_owner(path: &Path) -> Result<(), FreezeError> {
    let metadata = path.metadata().map_err(|source| FreezeError::Run { path: path.to_owned(), source })?;
    let refuse = |reason| Err(FreezeError::Unsafe { path: path.to_owned(), reason });
    if metadata.uid() != 0 && metadata.uid() != nix::unistd::geteuid().as_raw() {
        return refuse("it belongs to another user");
    }
    if metadata.mode() & 0o022 != 0 {
        return refuse("others may write it");
    }
    Ok(())
}

impl Freezer for ScriptFreezer {
    fn freeze(&self, machine: &str, limit: Duration) -> Result<Box<dyn Frozen>, FreezeError> {
        let freeze = self.script(machine, "freeze")?;
        let thaw = self.script(machine, "thaw")?;
        // From here on the application may be frozen, however the script ends.
        let frozen = Box::new(ScriptFrozen { thaw, limit, is_thawed: false });
        run(&freeze, limit)?;
        Ok(frozen)
    }
}

struct ScriptFrozen {
    thaw: PathBuf,
    limit: Duration,
    is_thawed: bool,
}

impl Frozen for ScriptFrozen {
    fn thaw(mut self: Box<Self>) -> Result<(), FreezeError> {
        self.is_thawed = true;
        run(&self.thaw, self.limit)
    }
}

impl Drop for ScriptFrozen {
    fn drop(&mut self) {
        if !self.is_thawed
            && let Err(error) = run(&self.thaw, self.limit)
        {
            tracing::error!(error = %error, help = error.help(), "thawing failed");
        }
    }
}

fn run(path: &Path, limit: Duration) -> Result<(), FreezeError> {
    let named = || path.to_owned();
    let mut child = Command::new(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env("TIDEMARK_LIMIT_SECONDS", limit.as_secs().to_string())
        .process_group(0)
        .spawn()
        .map_err(|source| FreezeError::Run { path: named(), source })?;
    let status = wait(&mut child, limit).map_err(|source| FreezeError::Run { path: named(), source })?;
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(FreezeError::Failed { path: named(), status: status.to_string() }),
        None => Err(FreezeError::TimedOut { path: named(), limit }),
    }
}

/// Waits for the child, and kills it with everything it started when `limit` is over. `None`: it was killed.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<std::process::ExitStatus>> {
    let group = nix::unistd::Pid::from_raw(child.id() as i32);
    let (finished, watch) = mpsc::channel::<()>();
    let deadline = Instant::now() + limit;
    std::thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            let left = deadline.saturating_duration_since(Instant::now());
            let is_late = watch.recv_timeout(left) == Err(mpsc::RecvTimeoutError::Timeout);
            if is_late {
                // The child was not waited for yet, so its id, which is the group's, cannot be another's.
                let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
            }
            is_late
        });
        // Seen without reaping: the watcher may still want to kill the group.
        let seen = nix::sys::wait::waitid(
            nix::sys::wait::Id::Pid(group),
            nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
        );
        drop(finished);
        let was_killed = watcher.join().expect("the watcher does not panic");
        let status = child.wait()?;
        seen.map_err(io::Error::from)?;
        Ok((!was_killed).then_some(status))
    })
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
