use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Reads of a file that never wait for its device.
pub struct CachedReader {
    file: OwnedFd,
    in_memory: bool,
    /// The file system does not know RWF_NOWAIT, or has no page cache for this file.
    refused: AtomicBool,
}

impl CachedReader {
    pub fn new(file: &File) -> io::Result<Self> {
        let file = file.as_fd();
        let in_memory = nix::sys::statfs::fstatfs(file)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
        Ok(Self { file: file.try_clone_to_owned()?, in_memory, refused: AtomicBool::new(false) })
    }

    /// Fills `buffer` if all of it is in memory; see [`Export::try_read`](crate::Export::try_read).
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<io::Result<()>> {
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        // tmpfs does not know RWF_NOWAIT, and does not need it.
        let flags = if self.in_memory { 0 } else { libc::RWF_NOWAIT };
        let range = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: `range` is exactly `buffer`, which is borrowed mutably for the call.
        let count = unsafe { libc::preadv2(self.file.as_raw_fd(), &raw const range, 1, offset as i64, flags) };
        if count == buffer.len() as isize {
            return Some(Ok(()));
        }
        if count < 0 && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) {
            self.refused.store(true, Ordering::Relaxed);
        }
        // Partly cached, interrupted, or an error: the blocking read finds out which.
        None
    }
}
