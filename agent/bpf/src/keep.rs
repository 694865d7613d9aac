//! A block device that nobody writes to: claimed alone, read-only, and with nobody who had it open for writing before.
//!
//! | what | keeps away |
//! |---|---|
//! | opened with O_EXCL | mounts, swap, LVM, RAID and whoever else asks for a device alone, of the disk and its partitions |
//! | read-only (`BLKROSET`) | programs that open it like a file, a QEMU among them: their writes fail |
//! | nobody has it open for writing | whoever mapped it into memory before: what they write goes past the two above |
//!
//! *Consistency.* What lies in the page cache is submitted before [`Kept`] is there, so a tracker has seen it. *Retries.* None; trying twice
//! changes nothing. While a machine is brought home its device is written, by a [`Writer`] alone: the device stays claimed, and who else opens it for
//! writing is told of. *Cancellation.* One that fails leaves the device as it was. *Crash.* Of this process: the device stays read-only and is not claimed. Of
//! the system: neither stays.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use crate::device::{Device, DeviceError};

/// `linux/fs.h`: `_IO(0x12, 93)`, `_IO(0x12, 94)`
const BLKROSET: libc::Ioctl = 0x125d;
const BLKROGET: libc::Ioctl = 0x125e;
/// Written at once where a device does not make zeroes itself.
const ZEROES_BYTES: u64 = 1 << 20;

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
    path: PathBuf,
    claim: Arc<Mutex<Claim>>,
}

#[derive(Debug)]
struct Claim {
    /// Open alone. `None`: it was let go of.
    file: Option<File>,
    writers: usize,
}

impl Claim {
    fn is_read_only(&self) -> bool {
        self.file.as_ref().is_some_and(|file| is_read_only(file).unwrap_or(false))
    }

    /// Writable while somebody of us writes.
    fn settle(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| set_read_only(file, self.writers == 0))
    }
}

impl Kept {
    /// Whether nobody made it writable since.
    pub fn is_whole(&self) -> bool {
        self.is_written() || self.claim().is_read_only()
    }

    /// Whether it is writable because of a [`Writer`].
    pub fn is_written(&self) -> bool {
        self.claim().writers > 0
    }

    /// Whether nobody but this process has it open for writing.
    pub fn check_alone(&self) -> Result<(), KeepError> {
        refuse_writers(&Device::examine(&self.path)?, &self.path, Some(std::process::id()))
    }

    /// Writes to it, while everybody else is kept away.
    pub fn writer(&self) -> Result<Writer, KeepError> {
        let mut claim = self.claim();
        claim.writers += 1;
        let opened = claim.settle().and_then(|()| File::options().read(true).write(true).open(&self.path));
        match opened {
            Ok(file) => Ok(Writer { file, claim: self.claim.clone() }),
            Err(error) => {
                claim.writers -= 1;
                claim.settle().and(Err(error)).map_err(failed("write to", &self.path))
            }
        }
    }

    fn claim(&self) -> MutexGuard<'_, Claim> {
        self.claim.lock().expect("no panic while held")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.claim().file = None;
    }
}

/// When the last one goes the device is read-only again, if it is still kept.
#[derive(Debug)]
pub struct Writer {
    file: File,
    claim: Arc<Mutex<Claim>>,
}

impl Writer {
    pub fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }

    pub fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match nix::fcntl::fallocate(&self.file, flags, at as i64, length as i64) {
            Err(Errno::EOPNOTSUPP) => {}
            outcome => return outcome.map_err(io::Error::from),
        }
        let zeroes = vec![0; length.min(ZEROES_BYTES) as usize];
        let mut done = 0;
        while done < length {
            let part = (length - done).min(ZEROES_BYTES);
            self.write(at + done, &zeroes[..part as usize])?;
            done += part;
        }
        Ok(())
    }

    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let synced = self.flush();
        let mut claim = self.claim.lock().expect("no panic while held");
        claim.writers -= 1;
        if let Err(error) = synced.and_then(|()| claim.settle()) {
            tracing::warn!(%error, "a device that is kept from its machine is not read-only again");
        }
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
    refuse_writers(&device, path, None)?;
    file.sync_all().map_err(failed("flush", path))?;
    let was_read_only = is_read_only(&file).map_err(failed("look at", path))?;
    set_read_only(&file, true).map_err(failed("make read-only", path))?;
    // Who opened it between the two looks can have written until now, and not since.
    let outcome = refuse_writers(&device, path, None).and_then(|()| file.sync_all().map_err(failed("flush", path)));
    if let Err(error) = outcome {
        if !was_read_only {
            set_read_only(&file, false).map_err(failed("make writable", path))?;
        }
        return Err(error);
    }
    Ok(Kept { path: path.to_owned(), claim: Arc::new(Mutex::new(Claim { file: Some(file), writers: 0 })) })
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
fn refuse_writers(device: &Device, path: &Path, but: Option<u32>) -> Result<(), KeepError> {
    let unseen = |source| KeepError::Unseen { path: path.to_owned(), source };
    for process in std::fs::read_dir("/proc").map_err(unseen)?.filter_map(Result::ok) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if but == Some(pid.unsigned_abs()) {
            continue;
        }
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
