//! Mounting, and taking away what a process left that is gone.

use std::ffi::CString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use tidemark_nbd::Export;

use crate::FuseError;
use crate::file::{Node, Served};

const DEVICE: &str = "/dev/fuse";
/// What our mounts are called in the list of mounts.
const KIND: &str = "fuse.tidemark";
/// Requests of one file at the same time: as many may wait for its medium, or for a mark, before the next one waits as well.
const THREADS: usize = 8;
/// How long the requests that were received may take when a file is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// Bit of CAP_SYS_ADMIN in the set that is in force.
const SYS_ADMIN: u64 = 1 << 21;
/// `PR_SET_IO_FLUSHER` of linux/prctl.h.
const SET_IO_FLUSHER: libc::c_int = 57;

/// A file that shows an export, until it is closed or dropped.
pub struct FuseFile {
    path: PathBuf,
    served: Arc<Served>,
    session: Mutex<Option<JoinHandle<()>>>,
}

/// Whether files could be served by this process at all.
pub fn probe() -> Result<(), FuseError> {
    open_device(Path::new(DEVICE))?;
    match may_mount() {
        Ok(false) => Err(FuseError::NotPermitted),
        // Where the system does not say, mounting will.
        Ok(true) | Err(_) => Ok(()),
    }
}

fn may_mount() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    effective.map(|set| set & SYS_ADMIN != 0).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn open_device(device: &Path) -> Result<File, FuseError> {
    let opened = OpenOptions::new().read(true).write(true).open(device);
    opened.map_err(|source| FuseError::NoDevice { device: device.to_owned(), source })
}

/// Takes a mount of ours away whose process is gone; true if there was one.
pub fn clear_dead(path: &Path) -> Result<bool, FuseError> {
    let failed = |what| move |source| FuseError::Io { what, path: path.to_owned(), source };
    let mut found = false;
    while mounted_on(path).map_err(failed("look for mounts on"))?.is_some_and(|kind| kind == KIND) && is_dead(path) {
        unmount(path).map_err(failed("unmount"))?;
        found = true;
    }
    Ok(found)
}

fn is_dead(path: &Path) -> bool {
    matches!(nix::sys::stat::stat(path), Err(nix::Error::ENOTCONN | nix::Error::ECONNABORTED))
}

/// What is mounted on exactly this path, last.
fn mounted_on(path: &Path) -> io::Result<Option<String>> {
    let Some(name) = path.file_name() else { return Ok(None) };
    // The path itself may not be asked: nobody would answer for a dead mount.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = match folder.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        folder => folder?,
    };
    let wanted = folder.join(name);
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let last = text.lines().rev().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let place = before.split(' ').nth(4)?;
        (unescaped(place) == wanted.as_os_str().as_bytes()).then(|| after.split(' ').next().unwrap_or_default())
    });
    Ok(last.map(str::to_owned))
}

/// Blanks and the like are octal there.
fn unescaped(text: &str) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let code = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok());
        plain.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    plain
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Ends whoever has it open, and takes it out of the tree at once.
fn unmount(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let flags = libc::MNT_FORCE | libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW;
    // SAFETY: a string that ends in zero.
    match unsafe { libc::umount2(path.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mount(path: &Path, device: &File) -> io::Result<()> {
    let target = c_path(path)?;
    let kind = c_path(Path::new(KIND))?;
    // The root of this file system is a regular file, and so is what it is mounted on. Others get as far as our own look at who they are.
    let options = format!(
        "fd={},rootmode=100000,user_id={},group_id={},allow_other",
        device.as_raw_fd(),
        nix::unistd::geteuid(),
        nix::unistd::getegid()
    );
    let options = CString::new(options).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOATIME;
    // SAFETY: strings that end in zero.
    let result =
        unsafe { libc::mount(c"tidemark".as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An empty file to mount on. One that an agent left that was killed is taken.
fn place(path: &Path) -> Result<(), FuseError> {
    let failed = |source| FuseError::Io { what: "make the file", path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        // Who may open a file in it is looked at for each one; the folder above is who lets anybody come here.
        match DirBuilder::new().mode(0o711).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
    }
    match OpenOptions::new().write(true).create_new(true).mode(0o400).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
            let is_ours =
                metadata.is_file() && metadata.len() == 0 && metadata.uid() == nix::unistd::geteuid().as_raw();
            if is_ours { Ok(()) } else { Err(FuseError::Occupied { path: path.to_owned() }) }
        }
        Err(error) => Err(failed(error)),
    }
}

impl FuseFile {
    /// Shows the export at `path` from now on, to root, to our own user and to those that are named. The folder of the path is made
    /// where it is missing; a dead mount of ours is taken away.
    pub fn serve(path: &Path, export: Arc<dyn Export>, allowed_uids: &[u32]) -> Result<Self, FuseError> {
        let device = open_device(Path::new(DEVICE))?;
        let failed = |what| move |source| FuseError::Io { what, path: path.to_owned(), source };
        if clear_dead(path)? {
            tracing::warn!(path = %path.display(), "the mount of a process that is gone was taken away");
        }
        if let Some(kind) = mounted_on(path).map_err(failed("look for mounts on"))? {
            return Err(FuseError::InUse { path: path.to_owned(), kind });
        }
        place(path)?;
        let served = Arc::new(Served::new(export, allowed_uids));
        mount(path, &device).map_err(|source| {
            let _ = std::fs::remove_file(path);
            FuseError::Mount { path: path.to_owned(), source }
        })?;
        // From here on whatever fails unmounts.
        let mut this = Self { path: path.to_owned(), served, session: Mutex::default() };
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let node = Node(this.served.clone());
        let session = Session::from_fd(node, device.into(), SessionACL::All, config)
            .map_err(|source| FuseError::Mount { path: path.to_owned(), source })?;
        let (served, shown) = (this.served.clone(), path.to_owned());
        let thread = std::thread::Builder::new().name("fuse".to_owned()).spawn(move || {
            // Inherited by the threads of the session: memory that they need is not made free by writing to the very disk that they
            // serve. Needs CAP_SYS_RESOURCE; without it that stays possible when all memory is dirty.
            // SAFETY: five integers.
            if unsafe { libc::prctl(SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
                tracing::debug!("threads of a file are no I/O flushers");
            }
            let ended = session.run();
            if !served.door.is_closed() {
                tracing::error!(
                    path = %shown.display(),
                    outcome = ?ended,
                    help = "do not unmount it: pause the workload, then start the agent again",
                    "the file of a disk was unmounted by somebody else"
                );
            }
        });
        this.session = Mutex::new(Some(thread.map_err(failed("start threads for"))?));
        // It answers; and the kernel knows the size from here on, which it takes for zero until somebody asks.
        std::fs::metadata(path).map_err(failed("look at"))?;
        Ok(this)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends it, after the requests that were received. Afterwards nothing reaches the export, also when this fails.
    pub fn close(&self) -> Result<(), FuseError> {
        let mut session = self.session.lock().expect("no panic while held");
        let failed = |what| move |source| FuseError::Io { what, path: self.path.clone(), source };
        let is_over = self.served.door.close(CLOSE_LIMIT);
        let Some(thread) = session.take() else { return Ok(()) };
        if mounted_on(&self.path).map_err(failed("look for mounts on"))?.is_some_and(|kind| kind == KIND) {
            unmount(&self.path).map_err(failed("unmount"))?;
        }
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(failed("remove")(error));
        }
        if !is_over {
            return Err(FuseError::Busy { path: self.path.clone() });
        }
        if thread.join().is_err() {
            tracing::error!(path = %self.path.display(), "a thread of a file panicked");
        }
        Ok(())
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        if self.session.get_mut().expect("no panic while held").is_none() && !self.served.door.is_closed() {
            // Mounted, and never came to serve.
            let _ = unmount(&self.path);
            let _ = std::fs::remove_file(&self.path);
            return;
        }
        if let Err(error) = self.close() {
            tracing::warn!(path = %self.path.display(), %error, "a file does not end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_device_is_told_of_it() {
        let error = open_device(Path::new("/nonexistent/fuse")).unwrap_err();
        assert!(matches!(error, FuseError::NoDevice { .. }) && error.help().contains("modprobe fuse"), "{error}");
    }

    #[test]
    fn octal_codes_of_the_list_of_mounts_are_read() {
        assert_eq!(unescaped("/a\\040b\\134c\\"), b"/a b\\c\\");
        assert_eq!(mounted_on(Path::new("/proc")).unwrap().as_deref(), Some("proc"));
        assert_eq!(mounted_on(Path::new("/nonexistent/place")).unwrap(), None);
    }
}
