//! A `tidemark up` of the demonstration's own, as a process of its own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tidemark_base::stop::Stop;

use super::disks::failed;
use crate::cli::CliError;

const READY_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(30);

pub struct Site {
    child: Child,
    pub ready: Value,
}

impl Site {
    pub fn start(folder: &Path, log: &Path) -> Result<Self, CliError> {
        let unable = |error: std::io::Error| CliError::new(format!("cannot start `tidemark up`: {error}"), "");
        let program = std::env::current_exe().map_err(unable)?;
        let log_file = File::create(log).map_err(|error| failed(log, error))?;
        let mut command = Command::new(program);
        command
            .args(["up", "--listen", "127.0.0.1:0", "--dir"])
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file);
        // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
        unsafe {
            // A demonstration that is killed leaves no roles behind.
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let mut child = command.spawn().map_err(unable)?;
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut site = Self { child, ready: Value::Null };
        let (sender, receiver) = mpsc::channel();
        // Ends with the child's stdout.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let line = receiver.recv_timeout(READY_LIMIT).map_err(|_| {
            CliError::new("`tidemark up` did not become ready", "its log is shown above; --keep leaves it")
        })?;
        site.ready =
            line.strip_prefix("ready ").and_then(|ready| serde_json::from_str(ready).ok()).ok_or_else(|| {
                CliError::new(format!("`tidemark up` said {line:?} instead of being ready"), "please report it")
            })?;
        Ok(site)
    }

    /// SIGTERM, and its exit status.
    pub fn stop(mut self) -> Result<(), CliError> {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        match self.wait() {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(CliError::new(format!("`tidemark up` ended with {status}"), "see its log")),
            None => Err(CliError::new(
                format!("`tidemark up` did not end within {} s of SIGTERM", STOP_LIMIT.as_secs()),
                "see its log",
            )),
        }
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + STOP_LIMIT;
        let never = Stop::new();
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            never.wait_for(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
