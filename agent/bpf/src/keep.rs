//! A block device that nobody writes to: claimed alone, read-only, and with nobody who had it open for writing before.
//!
//! | what | keeps away |
//! |---|---|
//! | opened with O_EXCL | mounts, swap, LVM, RAID and whoever else asks for a device alone, of the disk and its partitions |
//! | read-only (`BLKROSET`) | programs that open it like a file, a QEMU among them: their writes fail |
//! | nobody has it open for writing | whoever mapped it into memory before: what they write goes past the two above |
//!
//! *Consistency.* What lies in the page cache is submitted before [`Kept`] is there, so a tracker has seen it. *Retries.* None; trying twice
//! changes nothing. *Cancellation.* One that fails leaves the device as it was. *Crash.* Of this process: the device stays read-only and is not claimed. Of
//! the system: neither stays.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::device::{Device, DeviceError};

/// `linux/fs.h`: `_IO(0x12, 93)`, `_IO(0x12, 94)`
const BLKROSET: libc::Ioctl = 0x125d;
const BLKROGET: libc::Ioctl = 0x125e;

#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{path} is in use: it is mounted, or part of another device")]
    Claimed { path: PathBuf },
    #[error("{path} is open for writing in process {pid} ({program})")]
    Open { path: PathBuf, pid: i32, program: String },
    #[error("who has {path} open cannot be seen")]
    Unseen { path: PathBuf, source: io::Error },
    #[error("cannot {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl KeepError {
    pub fn help(&self) -> &'static str {
        match self {
            KeepError::Device(error) => error.help(),
            KeepError::Claimed { .. } => {
                "unmount what is on it, or take the device apart that it is part of (`lsblk` shows both), then try again"
            }
            KeepError::Open { .. } => "end that process, or have it close the device, then try again",
            KeepError::Unseen { .. } => "run the agent as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH as well",
            KeepError::Io { .. } => "see the system's message; the agent needs CAP_SYS_ADMIN for this",
        }
    }
}

/// For as long as it is there. The device stays read-only when it goes: [`let_go`] makes it what it was.
#[derive(Debug)]
pub struct Kept {
    file: File,
}

impl Kept {
    /// Whether nobody made it writable since.
    pub fn is_whole(&self) -> bool {
        is_read_only(&self.file).unwrap_or(false)
    }
}

pub fn keep(path: &Path) -> Result<Kept, KeepError> {
    let device = Device::examine(path)?;
    let mut options = File::options();
    let file =
        options.read(true).custom_flags(libc::O_EXCL).open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => KeepError::Claimed { path: path.to_owned() },
            _ => failed("open", path)(source),
        })?;
    refuse_writers(&device, path)?;
    file.sync_all().map_err(failed("flush", path))?;
    let was_read_only = is_read_only(&file).map_err(failed("look at", path))?;
    set_read_only(&file, true).map_err(failed("make read-only", path))?;
    // Who opened it between the two looks can have written until now, and not since.
    let outcome = refuse_writers(&device, path).and_then(|()| file.sync_all().map_err(failed("flush", path)));
    if let Err(error) = outcome {
        if !was_read_only {
            set_read_only(&file, false).map_err(failed("make writable", path))?;
        }
        return Err(error);
    }
    Ok(Kept { file })
}

/// The device takes writes again.
pub fn let_go(path: &Path) -> Result<(), KeepError> {
    let file = File::open(path).map_err(failed("open", path))?;
    set_read_only(&file, false).map_err(failed("make writable", path))
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> KeepError {
    let path = path.to_owned();
    move |source| KeepError::Io { what, path: path.clone(), source }
}

fn set_read_only(file: &File, is_read_only: bool) -> io::Result<()> {
    let flag = libc::c_int::from(is_read_only);
    // SAFETY: the descriptor is open, and the kernel reads one int at the address of one.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKROSET, &raw const flag) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_read_only(file: &File) -> io::Result<bool> {
    let mut flag: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int at the address of one.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut flag) } {
        0 => Ok(flag != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Also through a partition of it, or what is made of it.
fn refuse_writers(device: &Device, path: &Path) -> Result<(), KeepError> {
    let unseen = |source| KeepError::Unseen { path: path.to_owned(), source };
    for process in std::fs::read_dir("/proc").map_err(unseen)?.filter_map(Result::ok) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let open = match std::fs::read_dir(process.path().join("fd")) {
            Ok(open) => open,
            // It has ended.
            Err(error) if is_gone(&error) => continue,
            Err(source) => return Err(unseen(source)),
        };
        for descriptor in open.filter_map(Result::ok) {
            let Ok(of) = std::fs::metadata(descriptor.path()) else { continue };
            if !of.file_type().is_block_device() || !device.holds(of.rdev()) {
                continue;
            }
            let about = process.path().join("fdinfo").join(descriptor.file_name());
            let Ok(about) = std::fs::read_to_string(about) else { continue };
            if is_for_writing(&about) {
                let program = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Err(KeepError::Open { path: path.to_owned(), pid, program: program.trim().to_owned() });
            }
        }
    }
    Ok(())
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// What `/proc/PID/fdinfo/N` says of how it was opened, in octal.
fn is_for_writing(about: &str) -> bool {
    let flags = about.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    // What is not understood counts.
    flags.is_none_or(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_file_was_opened_is_told_in_octal() {
        assert!(!is_for_writing("pos:\t0\nflags:\t0100000\nmnt_id:\t29\n"));
        assert!(is_for_writing("pos:\t0\nflags:\t0100001\n"));
        assert!(is_for_writing("pos:\t0\nflags:\t02100002\n"));
        assert!(is_for_writing("pos:\t0\n"), "who knows");
    }

    #[test]
    fn what_is_no_block_device_cannot_be_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap();
        assert!(matches!(keep(&path), Err(KeepError::Device(DeviceError::NotADevice { .. }))));
    }
}
