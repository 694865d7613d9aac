//! A machine's process: found again by its pid file, never mistaken for another.
//!
//! QEMU holds a lock on its pid file as long as it lives. So: read the pid, open a descriptor of that process, and only then
//! ask whether the file is locked. If it is, the process that wrote the pid lived when the descriptor was opened, and the
//! descriptor names it and nothing else for ever, whatever becomes of the number.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub struct Process {
    pub pid: i32,
    descriptor: OwnedFd,
}

/// The process that holds the pid file, when one does.
pub fn find(pid_file: &Path) -> io::Result<Option<Process>> {
    let file = match File::open(pid_file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let Some(pid) = std::fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok()) else {
        return Ok(None);
    };
    let descriptor = match open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        other => other?,
    };
    Ok(is_locked(&file)?.then_some(Process { pid, descriptor }))
}

fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock =
        libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as i16)
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1; it touches no memory of ours.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

impl Process {
    /// `kill -9` of exactly this process.
    pub fn kill(&self) -> io::Result<()> {
        let descriptor = self.descriptor.as_raw_fd();
        let nothing = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open; no signal information is given, so the kernel reads no memory of ours.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, descriptor, libc::SIGKILL, nothing, 0) };
        match io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        }
    }

    /// Returns when it has ended.
    pub async fn ended(&self) -> io::Result<()> {
        // SAFETY: the descriptor is ours, and stays open and the same as long as it is borrowed.
        let descriptor = unsafe { AsyncFd::register_with_interest(self.descriptor.as_fd(), Interest::READABLE) }?;
        descriptor.readable().await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        use std::io::Write;
        File::create(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn a_pid_counts_only_while_its_file_is_locked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        assert!(find(&path).unwrap().is_none());
        let mut child = tokio::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        // The process lives, but did not write this file: its number was given again.
        write(&path, &child.id().unwrap().to_string());
        assert!(find(&path).unwrap().is_none());
        // Locked by another description, as QEMU's.
        let holder = File::options().write(true).open(&path).unwrap();
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&holder, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        let found = find(&path).unwrap().expect("it is locked and lives");
        assert_eq!(found.pid as u32, child.id().unwrap());
        found.kill().unwrap();
        found.ended().await.unwrap();
        child.wait().await.unwrap();
        found.kill().unwrap();
        assert!(find(&path).unwrap().is_none(), "it was waited for, so the number is free");
    }
}
