//! Children that end with their test, also when the test panics or its process is killed.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// A running child. Dropping it kills it and waits for it.
pub struct Owned {
    pub name: String,
    child: Child,
    ended: bool,
    log: Option<PathBuf>,
}

impl Owned {
    /// Starts `command`; what it writes to stderr goes to `log`.
    pub fn start(name: &str, mut command: Command, log: Option<&Path>) -> Self {
        if let Some(log) = log {
            let file = File::options().create(true).append(true).open(log).expect("the log of a child can be opened");
            command.stderr(Stdio::from(file));
        }
        // SAFETY: prctl is async-signal-safe and touches no memory of ours; nothing else runs between fork and exec.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { name: name.to_owned(), child, ended: false, log: log.map(Path::to_owned) }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn is_running(&mut self) -> bool {
        !self.ended && matches!(self.child.try_wait(), Ok(None))
    }

    /// How it ended, when it did.
    pub fn ending(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().ok().flatten();
        self.ended |= status.is_some();
        status
    }

    /// `kill -9`, then waits for the end.
    pub fn kill_9(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    pub fn signal(&self, signal: Signal) {
        if !self.ended {
            kill(Pid::from_raw(self.pid()), signal)
                .unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
        }
    }

    /// SIGTERM, and the exit status when the child obeys within `limit`.
    #[track_caller]
    pub fn stop(&mut self, limit: Duration) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        let name = self.name.clone();
        let status = wait::until(&format!("{name} ends after SIGTERM"), limit, || {
            self.child.try_wait().expect("a child can be waited for")
        });
        self.ended = true;
        status
    }

    /// Waits for its end.
    pub fn wait(&mut self) {
        self.child.wait().expect("a child can be waited for");
        self.ended = true;
    }

    /// The end of what the child wrote to stderr, for a message.
    pub fn log_tail(&self) -> String {
        let text = self.log.as_ref().and_then(|log| std::fs::read_to_string(log).ok()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Kills the QEMUs whose command line names this folder, which is a test's own.
pub fn end_guests_of(folder: &Path) {
    let folder = folder.to_str().expect("folders of tests are text");
    let numbers = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        let Ok(line) = std::fs::read(format!("/proc/{process}/cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line);
        let program = line.split('\0').next().unwrap_or_default();
        if program.contains("qemu-system-") && line.contains(folder) {
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
    }
}
