//! Linux.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::FallocateFlags;

/// Of a file of ours: for its owner alone, and no link to somewhere else.
pub(crate) fn open_private(options: &mut OpenOptions) {
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
}

pub(crate) fn create_private_folder(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|file| file.sync_all())
}

pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)
}

pub(crate) fn available_bytes(folder: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    Ok(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}

pub(crate) fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(buffer, offset)
}

pub(crate) fn write_all_at(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(data, offset)
}

/// A range reads as zeroes, and its room is given back.
pub(crate) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(file, flags, offset as i64, length as i64).map_err(io::Error::from)
}

/// The first place from `from` on that is no hole; `None`: nothing but holes up to the end.
pub(crate) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match nix::unistd::lseek(file, from as i64, nix::unistd::Whence::SeekData) {
        Ok(place) => Ok(Some(place as u64)),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Which file system a folder is on.
pub(crate) fn volume_of(folder: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(folder)?.dev())
}

/// What is asked for is not done here.
pub(crate) const NOT_SUPPORTED: i32 = libc::EOPNOTSUPP;
/// Who is asked has ended.
pub(crate) const SHUT_DOWN: i32 = libc::ESHUTDOWN;

pub(crate) fn reserve(file: &File, offset: u64, length: u64) -> io::Result<()> {
    nix::fcntl::fallocate(file, FallocateFlags::empty(), offset as i64, length as i64).map_err(io::Error::from)
}

/// Who is neither the superuser nor we, or lets others write, can swap what we would run.
pub(crate) fn distrust(path: &Path) -> io::Result<Option<&'static str>> {
    let metadata = path.metadata()?;
    if metadata.uid() != 0 && metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Ok(Some("it belongs to another user"));
    }
    if metadata.mode() & 0o022 != 0 {
        return Ok(Some("others may write it"));
    }
    Ok(None)
}

/// `pwritev` until everything is written. At most [`VECTORS_MAX`] slices go into one call.
pub(crate) fn write_all_vectored_at(file: &File, mut offset: u64, slices: &[IoSlice<'_>]) -> io::Result<()> {
    for group in slices.chunks(VECTORS_MAX) {
        let total: usize = group.iter().map(|slice| slice.len()).sum();
        let mut written = 0;
        while written < total {
            // SAFETY: `IoSlice` has the layout of `iovec`; the slices outlive the call, which only reads them.
            let result = if written == 0 {
                unsafe { libc::pwritev(file.as_raw_fd(), group.as_ptr().cast(), group.len() as i32, offset as i64) }
            } else {
                let (index, skip) = find(group, written);
                let rest = &group[index][skip..];
                unsafe {
                    libc::pwrite(file.as_raw_fd(), rest.as_ptr().cast(), rest.len(), (offset + written as u64) as i64)
                }
            };
            match result {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count if count > 0 => written += count as usize,
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        offset += total as u64;
    }
    Ok(())
}

/// Linux takes at most this many buffers in one call (`IOV_MAX`).
const VECTORS_MAX: usize = 1024;

/// The slice that holds byte `at` of the group, and where in it.
fn find(group: &[IoSlice<'_>], mut at: usize) -> (usize, usize) {
    for (index, slice) in group.iter().enumerate() {
        if at < slice.len() {
            return (index, at);
        }
        at -= slice.len();
    }
    unreachable!("a place past the end of the group")
}
