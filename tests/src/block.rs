//! Block devices and file systems that go with their test: loop devices, mounts, small file systems in memory, and
//! programs that show something of theirs as a file (nbdfuse, qemu-storage-daemon).
//!
//! Everything is mounted in a mount namespace of the test's own thread, and loop devices detach themselves when their
//! last user goes: also a test that is killed leaves nothing behind.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::Owned;
use crate::{tools, wait};

/// How long a mount may stay busy, or a program may take to show its file.
const LIMIT: Duration = Duration::from_secs(30);

/// Gives the calling thread, and whatever it starts from now on, mounts of its own.
pub fn private_mounts() {
    // SAFETY: unshare takes no pointers. CLONE_NEWNS parts this thread from its siblings' mounts alone.
    let outcome = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(outcome, 0, "unshare: {}", std::io::Error::last_os_error());
    tools::run("mount", &["--make-rprivate", "/"]);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// Takes away what is still mounted in a folder: a killed process leaves the files that it showed behind.
pub fn unmount_beneath(folder: &Path) {
    let Ok(folder) = folder.canonicalize() else { return };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The last one mounted first: one may lie in the other.
    for place in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
        if Path::new(place).starts_with(&folder) {
            tools::outcome("umount", &["-l", place]);
        }
    }
}

/// A mounted file system. Unmounted on drop.
pub struct Mount {
    path: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts the file system in a file over a loop device, at a new folder.
    #[track_caller]
    pub fn image(image: &Path, at: &Path) -> Self {
        Self::image_with(image, at, "noatime")
    }

    #[track_caller]
    pub fn image_with(image: &Path, at: &Path, options: &str) -> Self {
        Self::device(Loop::attach(image), at, options)
    }

    /// Mounts what is on a loop device, which from here on goes with its last user: the mount.
    #[track_caller]
    pub fn device(device: Loop, at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).expect("a mount point can be made");
        tools::run("mount", &["-o", options, text(&device.path), text(at)]);
        Self { path: at.to_owned(), mounted: true }
    }

    /// Mounts what a power cut left on a loop device. ext4's own superblock may be torn, which only e2fsck can help.
    #[track_caller]
    pub fn device_after_a_cut(device: Loop, at: &Path) -> Self {
        std::fs::create_dir_all(at).expect("a mount point can be made");
        if !tools::outcome("mount", &["-o", "noatime", text(&device.path), text(at)]).status.success() {
            tools::outcome("e2fsck", &["-f", "-y", text(&device.path)]);
            return Self::device(device, at, "noatime");
        }
        Self { path: at.to_owned(), mounted: true }
    }

    /// The same file or folder at a second place.
    #[track_caller]
    pub fn bind(from: &Path, at: &Path) -> Self {
        tools::run("mount", &["--bind", text(from), text(at)]);
        Self { path: at.to_owned(), mounted: true }
    }

    /// A file system in memory.
    #[track_caller]
    pub fn memory(at: &Path, bytes: u64) -> Self {
        std::fs::create_dir_all(at).expect("a mount point can be made");
        tools::run("mount", &["-t", "tmpfs", "-o", &format!("size={bytes},mode=0700"), "tidemark-test", text(at)]);
        Self { path: at.to_owned(), mounted: true }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the size of a file system in memory.
    #[track_caller]
    pub fn resize(&self, bytes: u64) {
        tools::run("mount", &["-o", &format!("remount,size={bytes}"), text(&self.path)]);
    }

    /// Waits until nobody uses it and unmounts it.
    #[track_caller]
    pub fn unmount(mut self) {
        wait::until(&format!("{} can be unmounted", self.path.display()), LIMIT, || {
            tools::outcome("umount", &[text(&self.path)]).status.success().then_some(())
        });
        self.mounted = false;
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            // Lazily: on this way out nobody waits for those who still use it, and they end with the test.
            tools::outcome("umount", &["--lazy", text(&self.path)]);
        }
    }
}

/// A loop device on a file.
pub struct Loop {
    path: PathBuf,
}

impl Loop {
    #[track_caller]
    pub fn attach(image: &Path) -> Self {
        let device = tools::run("losetup", &["--find", "--show", text(image)]);
        Self { path: PathBuf::from(device.trim()) }
    }

    /// On this device and no other: file systems on it look the same as last time.
    #[track_caller]
    pub fn attach_at(device: &Path, image: &Path) -> Self {
        // Its last user may be on its way out.
        wait::until(&format!("{} is free", device.display()), LIMIT, || {
            tools::outcome("losetup", &[text(device), text(image)]).status.success().then_some(())
        });
        Self { path: device.to_owned() }
    }

    /// `None`: no loop device can be made here.
    pub fn attach_read_only(image: &Path) -> Option<Self> {
        let output = tools::outcome("losetup", &["--read-only", "--find", "--show", text(image)]);
        output.status.success().then(|| Self { path: String::from_utf8_lossy(&output.stdout).trim().into() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // While it is in use this makes the kernel detach it with its last user.
        tools::outcome("losetup", &["--detach", text(&self.path)]);
    }
}

/// An NBD export as a file, by libnbd's nbdfuse.
pub struct NbdFile {
    path: PathBuf,
    process: Owned,
}

impl NbdFile {
    #[track_caller]
    pub fn mount(uri: &str, folder: &Path) -> Self {
        std::fs::create_dir_all(folder).expect("a folder can be made");
        let path = folder.join("disk");
        File::create(&path).expect("a file can be made");
        let mut command = tools::command("nbdfuse");
        command.arg(&path).arg(uri).stdin(Stdio::null()).stdout(Stdio::null());
        let process = Owned::start("nbdfuse", command, Some(&folder.join("nbdfuse.log")));
        let mut file = Self { path, process };
        wait::until("nbdfuse shows the disk", LIMIT, || {
            assert!(file.process.is_running(), "nbdfuse ended: {}", file.process.log_tail());
            (std::fs::metadata(&file.path).ok()?.len() > 0).then_some(())
        });
        file
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        tools::outcome("umount", &["--lazy", text(&self.path)]);
    }
}

/// A disk image that QEMU shows as a file, through block drivers that record or fail what goes through them.
pub struct StorageDaemon {
    file: PathBuf,
    socket: PathBuf,
    process: Owned,
}

impl StorageDaemon {
    /// Shows `image` as a file. `nodes` lie over the node `image`, lowest first; the last is shown. A node is what
    /// QEMU's `--blockdev` takes.
    #[track_caller]
    pub fn start(image: &Path, folder: &Path, nodes: &[Value]) -> Self {
        std::fs::create_dir_all(folder).expect("a folder can be made");
        let (file, socket) = (folder.join("disk"), folder.join("qmp"));
        File::create(&file).expect("a file can be made");
        let lowest = json!({"driver": "file", "node-name": "image", "filename": text(image)});
        let shown = nodes.last().map_or("image", |node| node["node-name"].as_str().expect("a node has a name"));
        let export = json!({"type": "fuse", "id": "shown", "node-name": shown, "mountpoint": text(&file),
                            "writable": true, "growable": false, "allow-other": "on"});
        let mut command = tools::command("qemu-storage-daemon");
        for node in std::iter::once(&lowest).chain(nodes) {
            command.args(["--blockdev", &node.to_string()]);
        }
        command.args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", text(&socket))]);
        command.args(["--monitor", "chardev=qmp", "--export", &export.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let process = Owned::start("qemu-storage-daemon", command, Some(&folder.join("qemu-storage-daemon.log")));
        let mut daemon = Self { file, socket, process };
        wait::until("qemu-storage-daemon shows the disk", LIMIT, || {
            assert!(daemon.process.is_running(), "it ended: {}", daemon.process.log_tail());
            (std::fs::metadata(&daemon.file).ok()?.len() > 0).then_some(())
        });
        daemon
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// One command of QEMU's machine protocol.
    #[track_caller]
    pub fn ask(&self, command: &str, arguments: &Value) -> Value {
        use std::io::{BufRead, BufReader, Write};
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).expect("qemu-storage-daemon listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a socket option");
        let mut lines = BufReader::new(stream.try_clone().expect("a socket can be shared")).lines();
        let mut answer = || -> Value {
            loop {
                let line = lines.next().expect("it answers").expect("in time");
                let value: Value = serde_json::from_str(&line).expect("its answers are JSON");
                if value.get("event").is_none() {
                    return value;
                }
            }
        };
        answer();
        let mut returned = Value::Null;
        for request in [json!({"execute": "qmp_capabilities"}), json!({"execute": command, "arguments": arguments})] {
            (&stream).write_all(format!("{request}\n").as_bytes()).expect("it takes a command");
            returned = answer();
            assert!(returned.get("error").is_none(), "{request}: {returned}");
        }
        returned["return"].clone()
    }

    /// Unmounts the file, waits until everything is in the image, and ends.
    #[track_caller]
    pub fn stop(mut self) {
        let status = self.process.stop(LIMIT);
        assert!(status.success(), "qemu-storage-daemon ended with {status}: {}", self.process.log_tail());
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        tools::outcome("umount", &["--lazy", text(&self.file)]);
    }
}

/// A new ext4 file system in a new file. `features` as `mke2fs -O` takes them.
#[track_caller]
pub fn make_ext4(image: &Path, bytes: u64, features: &str) {
    File::create(image).and_then(|file| file.set_len(bytes)).expect("an image can be made");
    format_ext4(image, features);
}

/// A new ext4 file system on what is there.
#[track_caller]
pub fn format_ext4(image: &Path, features: &str) {
    // No lazy initialisation: the kernel would go on writing long after the mount.
    let extended = "lazy_itable_init=0,lazy_journal_init=0";
    tools::run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-O", features, "-E", extended, text(image)]);
}

/// A file system as a crash left it must be made sound by its journal alone, without repairs: nothing but the totals of
/// free blocks and inodes, which are only written at a clean end, may be set right.
#[track_caller]
pub fn assert_sound_ext4(image: &Path) {
    let replayed = tools::outcome("e2fsck", &["-f", "-y", text(image)]);
    let said = tools::describe("e2fsck", &["-f", "-y"], &replayed);
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{said}");
    let output = String::from_utf8_lossy(&replayed.stdout);
    let mut lines = output.lines().peekable();
    while let Some(line) = lines.next() {
        let repaired = line.contains("? yes") || lines.peek().is_some_and(|next| next.starts_with("Fix? yes"));
        let of_totals = line.starts_with("Free blocks count wrong (")
            || line.starts_with("Free inodes count wrong (")
            || line.starts_with("Fix? yes");
        assert!(!repaired || of_totals, "{line:?} was repaired: {said}");
    }
    assert!(!said.contains("INCONSISTENCY"), "{said}");
    tools::run("e2fsck", &["-f", "-n", text(image)]);
}

/// Whether a path is a block device.
pub fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
