//! Images of a machine that is off, which nobody else opens: locked as QEMU locks them, and open in a storage daemon of ours, so that what changed of them is
//! asked as it is of the machine's own QEMU. [`crate::find`] finds the daemon as it finds any QEMU.
//!
//! *Consistency.* The images are locked before the daemon opens them, and for as long as it has them open, whoever is killed. What their bitmaps say is
//! in a qcow2 image again when the daemon ended; a raw image has none, and is compared. *Retries.* None but for a lock, which a QEMU that
//! ends holds for a moment. *Cancellation.* Dropping ends the daemon. *Crash.* Of this process: the daemon ends, cleanly. Of the daemon: bitmaps are
//! inconsistent, and the disk is compared.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tidemark_base::disk::{DiskError, LockedFile};
use tidemark_base::stop::Stop;
use tidemark_base::time::Instant;

use crate::error::QemuError;

const PROGRAM: &str = "qemu-storage-daemon";
/// A QEMU that ends lets go of its images within this.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
/// How long the daemon may take to open its images, and to close them.
const TIME_MAX: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Numbers below are of standard streams and of the shell.
const INHERITED_MIN: RawFd = 10;
/// Becomes the daemon; a child of it waits for us to let go, or to die, and ends the daemon then.
const SCRIPT: &str = r#"exec 3<&0; (read -r _ <&3; kill $$) & exec "$@" 3<&- </dev/null"#;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    pub path: PathBuf,
    /// QEMU's name of its format: its content never decides.
    pub format: String,
}

pub struct Keeper {
    images: Vec<Image>,
    child: Child,
    /// Closed to end it.
    held: Option<ChildStdin>,
    _locks: Vec<LockedFile>,
    /// Its socket, the number of its process, and what it says.
    folder: PathBuf,
}

impl Keeper {
    /// `folder` is made for it, and goes with it.
    pub fn start(folder: &Path, images: Vec<Image>) -> Result<Self, QemuError> {
        let locks = images.iter().map(|image| lock(&image.path)).collect::<Result<Vec<_>, _>>()?;
        let failed = |source| QemuError::Io { what: "run qemu-storage-daemon in", path: folder.to_owned(), source };
        let _ = std::fs::remove_dir_all(folder);
        tidemark_base::storage::create_private_folder(folder).map_err(failed)?;
        let mut child = spawn(folder, &images, &locks).map_err(failed)?;
        let held = child.stdin.take();
        let mut keeper = Self { images, child, held, _locks: locks, folder: folder.to_owned() };
        keeper.wait_ready()?;
        Ok(keeper)
    }

    pub fn images(&self) -> &[Image] {
        &self.images
    }

    pub fn is_at_work(&self) -> bool {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
        // Left for `end`: until then its number is nobody else's, whom the script would end.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        matches!(waitid(Id::Pid(pid), flags), Ok(WaitStatus::StillAlive))
    }

    fn wait_ready(&mut self) -> Result<(), QemuError> {
        let (deadline, never) = (Instant::now() + TIME_MAX, Stop::new());
        // Written when everything is open.
        let ready = self.folder.join("pid");
        while !ready.exists() {
            if !self.is_at_work() || Instant::now() > deadline {
                let said = std::fs::read_to_string(self.folder.join("said")).unwrap_or_default();
                let path = self.images.first().map(|image| image.path.clone()).unwrap_or_default();
                return Err(QemuError::NotOpened { path, reason: said.trim().to_owned() });
            }
            never.wait_for(LOOK_AGAIN);
        }
        Ok(())
    }

    fn end(&mut self) {
        drop(self.held.take());
        let (deadline, never) = (Instant::now() + TIME_MAX, Stop::new());
        while self.is_at_work() && Instant::now() < deadline {
            never.wait_for(LOOK_AGAIN);
        }
        // Does nothing to a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(path: &Path) -> Result<LockedFile, QemuError> {
    let (deadline, never) = (Instant::now() + LOCK_LIMIT, Stop::new());
    loop {
        match LockedFile::open(path) {
            Err(DiskError::InUse { .. }) if Instant::now() < deadline => drop(never.wait_for(LOOK_AGAIN)),
            outcome => return outcome.map_err(|source| QemuError::NotKept { path: path.to_owned(), source }),
        }
    }
}

fn spawn(folder: &Path, images: &[Image], locks: &[LockedFile]) -> io::Result<Child> {
    let locks: Vec<RawFd> = locks.iter().map(|lock| lock.file().as_raw_fd()).collect();
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "sh", PROGRAM]).current_dir(folder);
    // By a name within its folder: paths of sockets are short.
    command.args(["--chardev", "socket,id=qmp,path=qmp,server=on,wait=off", "--monitor", "chardev=qmp"]);
    for (number, image) in images.iter().enumerate() {
        let path = std::path::absolute(&image.path)?;
        // It is we who hold the lock.
        let node = json!({ "driver": image.format, "node-name": format!("kept-{number}"),
            "file": { "driver": "file", "filename": path, "locking": "off" } });
        command.args(["--blockdev", &node.to_string()]);
    }
    command.args(["--pidfile", "pid"]);
    let said = std::fs::File::create(folder.join("said"))?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(said).env("LC_ALL", "C");
    // Who ends us by a key means us.
    command.process_group(0);
    // SAFETY: between fork and exec; fcntl is async-signal-safe, nothing is allocated, and the descriptors are open.
    unsafe {
        command.pre_exec(move || {
            for lock in &locks {
                // Without close-on-exec: the lock lives as long as the daemon.
                if libc::fcntl(*lock, libc::F_DUPFD, INHERITED_MIN) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.spawn()
}
