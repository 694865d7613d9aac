//! Images of formats that are QEMU's to read and write: `qemu-nbd` serves one of them to one client of ours.
//!
//! *Cancellation.* Dropping it ends the child, whatever it does. *Crash.* The child ends when its client has gone.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tidemark_base::stop::Stop;
use tidemark_base::storage::create_private_folder;
use tidemark_base::time::Instant;

use crate::client::Client;

/// How long qemu-nbd may take to open an image, and to close it.
pub const TIME_MAX: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
const MESSAGE_BYTES_MAX: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum QemuNbdError {
    #[error("cannot run qemu-nbd")]
    Run { source: io::Error },
    #[error("qemu-nbd cannot open {}: {message}", path.display())]
    Refused { path: PathBuf, message: String },
    #[error("qemu-nbd, which opens {}, did not get ready within {TIME_MAX:?}", path.display())]
    NotReady { path: PathBuf },
    #[error("qemu-nbd did not finish {}", path.display())]
    Finish { path: PathBuf, source: io::Error },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QemuAccess {
    Read,
    /// Written through the page cache; a flush makes it durable.
    Write,
}

/// A child that serves one image.
pub struct QemuNbd {
    child: Child,
    /// Of its socket; its own, so that nobody else connects.
    folder: PathBuf,
    path: PathBuf,
}

impl QemuNbd {
    /// `format` is QEMU's name of it: the content never decides, for a guest writes the beginning of a raw image.
    pub fn start(path: &Path, format: &str, access: QemuAccess) -> Result<Self, QemuNbdError> {
        let run = |source| QemuNbdError::Run { source };
        let folder = std::env::temp_dir().join(format!("tidemark-{}", tidemark_base::random::uuid()));
        create_private_folder(&folder).map_err(run)?;
        let started = spawn(path, format, access, &folder);
        match started {
            Ok(child) => Ok(Self { child, folder, path: path.to_owned() }),
            Err(source) => {
                let _ = std::fs::remove_dir_all(&folder);
                Err(run(source))
            }
        }
    }

    /// Waits until it listens.
    pub fn connect(&mut self) -> Result<Client, QemuNbdError> {
        let deadline = Instant::now() + TIME_MAX;
        let never = Stop::new();
        loop {
            if let Ok(client) = Client::connect_unix(&self.folder.join("socket"), "") {
                return Ok(client);
            }
            if let Ok(Some(_)) = self.child.try_wait() {
                return Err(QemuNbdError::Refused { path: self.path.clone(), message: self.said() });
            }
            if Instant::now() > deadline {
                return Err(QemuNbdError::NotReady { path: self.path.clone() });
            }
            never.wait_for(LOOK_AGAIN);
        }
    }

    /// It closes the image and ends by itself once its client has gone.
    pub fn finish(mut self) -> Result<(), QemuNbdError> {
        self.ended()
            .and_then(|status| match status.success() {
                true => Ok(()),
                false => Err(io::Error::other(format!("{status}: {}", self.said()))),
            })
            .map_err(|source| QemuNbdError::Finish { path: self.path.clone(), source })
    }

    fn ended(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + TIME_MAX;
        let never = Stop::new();
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() > deadline => return Err(io::ErrorKind::TimedOut.into()),
                None => never.wait_for(LOOK_AGAIN),
            };
        }
    }

    /// What it wrote before it ended.
    fn said(&mut self) -> String {
        let mut message = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            let _ = stderr.take(MESSAGE_BYTES_MAX).read_to_string(&mut message);
        }
        message.trim().to_owned()
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // Does nothing to a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn spawn(path: &Path, format: &str, access: QemuAccess, folder: &Path) -> io::Result<Child> {
    let access: &[&str] = match access {
        QemuAccess::Read => &["--read-only"],
        QemuAccess::Write => &["--cache", "writeback", "--discard", "unmap"],
    };
    Command::new("qemu-nbd")
        .args(access)
        .args(["--format", format, "--socket"])
        .arg(folder.join("socket"))
        .arg("--")
        // An absolute path cannot be taken for an option or a protocol such as `nbd:`.
        .arg(std::path::absolute(path)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
}
