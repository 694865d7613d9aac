//! Disks of a Linux host: files and block devices, and what is inside of images.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::FallocateFlags;
use nix::unistd::Whence;

use super::{Access, Allocation, Disk, DiskError, DiskIdentity, Durability, ImageDisk, RemoteDisk};
use crate::{Extent, SECTOR_BYTES};

/// A raw disk image or a block device of this machine; what is inside an image of another format; or what another program reads for us, which proves as little of itself as a block device.
pub struct FileDisk {
    file: File,
    path: PathBuf,
    bytes: u64,
    is_block_device: bool,
    is_observed: bool,
    flush_failed: AtomicBool,
    remote: Option<Arc<dyn RemoteDisk>>,
    image: Option<Image>,
    #[cfg(feature = "simulation")]
    simulated: Option<Arc<dyn crate::seam::SimulatedDisk>>,
}

/// What is inside the file.
struct Image {
    disk: Arc<dyn ImageDisk>,
    locked: LockedFile,
    closed: AtomicBool,
}

/// A file that holds a disk of another format, locked as a disk itself is: others are kept out for as long as anybody has the
/// file open that it was locked by, a child that inherits it included.
pub struct LockedFile {
    file: Arc<File>,
    path: PathBuf,
    /// Files that its content lies on; they are read alone.
    below: Vec<PathBuf>,
    /// As it was found, before anybody opened what is inside.
    found: DiskIdentity,
}

impl LockedFile {
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let (file, is_block_device) = open_file(path, Access::Exclusive)?;
        if is_block_device {
            return Err(DiskError::Kind { path: path.to_owned() });
        }
        let found = times_of(&file, false).map_err(|source| DiskError::Open { path: path.to_owned(), source })?;
        Ok(Self { file: Arc::new(file), path: path.to_owned(), below: Vec::new(), found })
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its content lies on these as well: when one of them changes, it changes. Told before anybody opens what is inside. They
    /// are synced: no flush of the disk reaches them.
    pub fn lies_on(&mut self, below: Vec<PathBuf>) -> Result<(), DiskError> {
        self.below = below;
        let sync = || -> io::Result<()> { self.below.iter().try_for_each(|path| File::open(path)?.sync_data()) };
        sync().map_err(|source| DiskError::Open { path: self.path.clone(), source })?;
        self.found = self.identity().map_err(|source| DiskError::Open { path: self.path.clone(), source })?;
        Ok(())
    }

    /// Its newest times are those of all its files.
    fn identity(&self) -> io::Result<DiskIdentity> {
        let mut all = times_of(&self.file, false)?;
        for path in &self.below {
            let one = times_of(&File::open(path)?, false)?;
            all.changed_ns = all.changed_ns.max(one.changed_ns);
            all.modified_ns = all.modified_ns.max(one.modified_ns);
        }
        Ok(all)
    }
}

/// Lets the simulated disk behind a [`FileDisk`] do it, if that is what it is.
macro_rules! simulated {
    ($disk:expr, $method:ident ( $($argument:expr),* )) => {
        #[cfg(feature = "simulation")]
        if let Some(disk) = &$disk.simulated {
            return disk.$method($($argument),*);
        }
    };
}

impl FileDisk {
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let named = || path.to_owned();
        #[cfg(feature = "simulation")]
        if let Some(world) = crate::seam::current() {
            let disk = world.open_disk(path, access)?;
            let file = File::open("/dev/null").map_err(|source| DiskError::Open { path: named(), source })?;
            let (bytes, is_block_device) = (disk.bytes(), false);
            let flush_failed = AtomicBool::new(false);
            return Ok(Self {
                file,
                path: named(),
                bytes,
                is_block_device,
                is_observed: false,
                flush_failed,
                remote: None,
                image: None,
                simulated: Some(disk),
            });
        }
        let (file, is_block_device) = open_file(path, access)?;
        let bytes = size_of(&file, is_block_device).map_err(|source| DiskError::Open { path: named(), source })?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::OddSize { path: named(), bytes });
        }
        Ok(Self {
            file,
            path: named(),
            bytes,
            is_block_device,
            is_observed: access == Access::Observe,
            flush_failed: AtomicBool::new(false),
            remote: None,
            image: None,
            #[cfg(feature = "simulation")]
            simulated: None,
        })
    }

    /// A disk that another program reads for us, under the name that it has here.
    pub fn through(path: &Path, remote: Arc<dyn RemoteDisk>) -> Result<Self, DiskError> {
        let open = |source| DiskError::Open { path: path.to_owned(), source };
        Ok(Self {
            // Not opened for writing: whoever tries is refused.
            file: File::open("/dev/null").map_err(open)?,
            path: path.to_owned(),
            bytes: remote.bytes(),
            is_block_device: true,
            is_observed: true,
            flush_failed: AtomicBool::new(false),
            remote: Some(remote),
            image: None,
            #[cfg(feature = "simulation")]
            simulated: None,
        })
    }

    /// What is inside a locked file, which `image` has open.
    pub fn inside(locked: LockedFile, image: Arc<dyn ImageDisk>) -> Result<Self, DiskError> {
        let path = locked.path.clone();
        let bytes = image.bytes();
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::OddSize { path, bytes });
        }
        Ok(Self {
            file: locked.file.try_clone().map_err(|source| DiskError::Open { path: path.clone(), source })?,
            path,
            bytes,
            is_block_device: false,
            is_observed: false,
            flush_failed: AtomicBool::new(false),
            remote: None,
            image: Some(Image { disk: image, locked, closed: AtomicBool::new(false) }),
            #[cfg(feature = "simulation")]
            simulated: None,
        })
    }

    /// What is inside of the file, where the file is not the disk itself.
    pub fn image(&self) -> Option<&dyn ImageDisk> {
        self.image.as_ref().map(|image| &*image.disk)
    }

    /// Nothing is written to it any more: its content and its times are on the media when this returns, and stay as they are.
    pub fn finish(&self) -> io::Result<()> {
        if self.is_observed {
            return Ok(());
        }
        if let Some(image) = &self.image {
            image.disk.close()?;
            image.closed.store(true, Ordering::Release);
        }
        self.file.sync_all()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size as the system says it now; differs from [`Disk::bytes`] once someone resized the disk.
    pub fn current_bytes(&self) -> io::Result<u64> {
        #[cfg(feature = "simulation")]
        if let Some(disk) = &self.simulated {
            return Ok(disk.bytes());
        }
        if let Some(remote) = &self.remote {
            return remote.current_bytes();
        }
        if self.image.is_some() {
            // Whoever would change it is kept out.
            return Ok(self.bytes);
        }
        size_of(&self.file, self.is_block_device)
    }

    pub fn identity(&self) -> io::Result<DiskIdentity> {
        simulated!(self, identity());
        if let Some(remote) = &self.remote {
            let bytes = remote.current_bytes()?;
            let (device, inode, changed_ns, modified_ns) = (0, 0, 0, 0);
            let (born_ns, is_block_device, data_write_guid) = (None, true, None);
            return Ok(DiskIdentity {
                device,
                inode,
                bytes,
                changed_ns,
                modified_ns,
                born_ns,
                is_block_device,
                data_write_guid,
            });
        }
        if let Some(image) = &self.image {
            // Opening it may change the file, and that says nothing of who did so before.
            let identity = match image.closed.load(Ordering::Acquire) {
                true => image.locked.identity()?,
                false => image.locked.found.clone(),
            };
            return Ok(DiskIdentity { bytes: self.bytes, ..identity });
        }
        times_of(&self.file, self.is_block_device)
    }

    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Others write to it: see [`Access::Observe`].
    pub fn is_observed(&self) -> bool {
        self.is_observed
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes the room for a range now, and leaves what it reads as.
    pub fn reserve(&self, extent: Extent) -> io::Result<()> {
        if self.is_block_device || self.image.is_some() {
            return Err(crate::error::not_supported());
        }
        crate::platform::reserve(&self.file, extent.offset, extent.length)
    }

    /// Reads whole blocks into memory that a device takes as it is, and copies out of it.
    fn read_past_cache(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        thread_local! {
            static BOUNCE: std::cell::RefCell<Vec<AlignedBlock>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        let end = offset + buffer.len() as u64;
        BOUNCE.with_borrow_mut(|bounce| {
            bounce.resize_with(BOUNCE_BLOCKS, || AlignedBlock([0; BLOCK]));
            let bounce = bounce.as_flattened_bytes();
            let mut at = offset;
            while at < end {
                let begin = at / BLOCK as u64 * BLOCK as u64;
                let until = (begin + bounce.len() as u64).min(end.next_multiple_of(BLOCK as u64)).min(self.bytes);
                let part = &mut bounce[..(until - begin) as usize];
                self.file.read_exact_at(part, begin)?;
                let to = until.min(end);
                buffer[(at - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&part[(at - begin) as usize..(to - begin) as usize]);
                at = to;
            }
            Ok(())
        })
    }

    /// Whether what was written before may never reach the medium: see [`Disk::flush`].
    pub fn has_failed_to_sync(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire) || self.image().is_some_and(|image| image.has_failed_to_sync())
    }

    fn sync_data(&self) -> io::Result<()> {
        simulated!(self, flush());
        if let Some(image) = self.image() {
            return image.flush();
        }
        self.file.sync_data()
    }

    fn make_durable(&self, durability: Durability) -> io::Result<()> {
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.flush(),
        }
    }
}

/// What every device takes as a unit.
const BLOCK: usize = 4096;
const BOUNCE_BLOCKS: usize = 64;

#[repr(C, align(4096))]
struct AlignedBlock([u8; BLOCK]);

trait Flattened {
    fn as_flattened_bytes(&mut self) -> &mut [u8];
}

impl Flattened for Vec<AlignedBlock> {
    fn as_flattened_bytes(&mut self) -> &mut [u8] {
        let bytes = self.len() * BLOCK;
        // SAFETY: the blocks lie back to back, have no padding, and any bytes are valid in them.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast::<u8>(), bytes) }
    }
}

/// Opens a file or device, and locks it where it is to be written.
fn open_file(path: &Path, access: Access) -> Result<(File, bool), DiskError> {
    let named = || path.to_owned();
    let is_block_device = match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() => true,
        Ok(metadata) if metadata.is_file() => false,
        Ok(_) => return Err(DiskError::Kind { path: named() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(DiskError::Absent { path: named() }),
        Err(source) => return Err(DiskError::Open { path: named(), source }),
    };
    // Before we are a writer ourselves.
    if access == Access::Exclusive && !is_block_device && (is_behind_loop(path) || is_open_for_writing(path)) {
        return Err(DiskError::InUse { path: named() });
    }
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::Exclusive);
    if is_block_device && access == Access::Exclusive {
        options.custom_flags(libc::O_EXCL);
    }
    if access == Access::Observe && is_block_device {
        options.custom_flags(libc::O_DIRECT);
    }
    let file = options.open(path).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => DiskError::InUse { path: named() },
        Some(libc::EROFS | libc::EACCES | libc::EPERM) if access == Access::Exclusive => {
            DiskError::ReadOnly { path: named() }
        }
        _ => DiskError::Open { path: named(), source },
    })?;
    // The system opens a read-only device for writing all the same, and fails each write.
    if access == Access::Exclusive
        && is_block_device
        && is_read_only_device(&file).map_err(|source| DiskError::Open { path: named(), source })?
    {
        return Err(DiskError::ReadOnly { path: named() });
    }
    if access == Access::Exclusive && !is_block_device {
        lock_image(&file).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => DiskError::InUse { path: named() },
            _ => DiskError::Open { path: named(), source },
        })?;
    }
    Ok((file, is_block_device))
}

/// Which file it is, and when it changed last.
fn times_of(file: &File, is_block_device: bool) -> io::Result<DiskIdentity> {
    let metadata = file.metadata()?;
    let ns = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    Ok(DiskIdentity {
        device: if is_block_device { metadata.rdev() } else { metadata.dev() },
        inode: metadata.ino(),
        bytes: size_of(file, is_block_device)?,
        changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
        born_ns: metadata.created().ok().map(|time| i128::from(crate::Timestamp::from_system(time).0)),
        is_block_device,
        data_write_guid: None,
    })
}

fn size_of(file: &File, is_block_device: bool) -> io::Result<u64> {
    if !is_block_device {
        return Ok(file.metadata()?.len());
    }
    nix::ioctl_read!(block_device_bytes, 0x12, 114, u64);
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 writes one u64 to the address that it is given.
    unsafe { block_device_bytes(file.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

fn is_read_only_device(file: &File) -> io::Result<bool> {
    // BLKROGET of linux/fs.h
    nix::ioctl_read_bad!(block_device_read_only, nix::request_code_none!(0x12, 94), libc::c_int);
    let mut read_only = 0;
    // SAFETY: BLKROGET writes one int to the address that it is given.
    unsafe { block_device_read_only(file.as_raw_fd(), &raw mut read_only) }?;
    Ok(read_only != 0)
}

/// Byte numbers that QEMU locks in an image, so that it and we keep each other out: (block/file-posix.c, public
/// since QEMU 2.10) bytes 100… say which permissions are in use, bytes 200… which are not shared.
mod qemu_locks {
    pub const PERMISSION_BASE: i64 = 100;
    pub const UNSHARED_BASE: i64 = 200;
    pub const CONSISTENT_READ: i64 = 0;
    pub const WRITE: i64 = 1;
    pub const WRITE_UNCHANGED: i64 = 2;
    pub const RESIZE: i64 = 3;
}

/// Whether a loop device shows the file: what is written there goes past everybody who has the file open.
fn is_behind_loop(path: &Path) -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return false };
    let Ok(path) = crate::storage::canonical(path) else { return false };
    devices.filter_map(Result::ok).filter(|device| device.file_name().to_string_lossy().starts_with("loop")).any(
        |device| {
            std::fs::read_to_string(device.path().join("loop/backing_file"))
                .is_ok_and(|behind| Path::new(behind.trim_end_matches('\n')) == path)
        },
    )
}

/// Whether any program has the file open for writing, lock or not: the system gives out a lease for reading only where none has.
/// Where there are no leases (network file systems, another user's file) nobody can tell.
fn is_open_for_writing(path: &Path) -> bool {
    /// As Linux has it.
    const F_SETSIG: libc::c_int = 10;
    let Ok(file) = File::open(path) else { return false };
    let lease = |kind: libc::c_int| {
        // SAFETY: the descriptor is open, and the argument is a number.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }
    };
    // Who opens the file while we hold the lease has us told by a signal: one that nobody dies of.
    // SAFETY: as above.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } != 0 {
        return false;
    }
    if lease(libc::F_RDLCK as libc::c_int) == 0 {
        lease(libc::F_UNLCK as libc::c_int);
        return false;
    }
    io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
}

/// Open-file-description locks: taken as QEMU takes them, plus one exclusive lock of our own kind on byte 0… of the
/// range that QEMU leaves free (300), because shared locks alone would let two of us in.
fn lock_image(file: &File) -> io::Result<()> {
    use qemu_locks::*;
    let lock = |kind: i32, start: i64, command: fn(&libc::flock) -> nix::fcntl::FcntlArg<'_>| -> io::Result<()> {
        let lock =
            libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: 1, l_pid: 0 };
        nix::fcntl::fcntl(file, command(&lock)).map(drop).map_err(io::Error::from)
    };
    lock(libc::F_WRLCK, 300, |lock| nix::fcntl::FcntlArg::F_OFD_SETLK(lock))?;
    for permission in [CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE] {
        lock(libc::F_RDLCK, PERMISSION_BASE + permission, |lock| nix::fcntl::FcntlArg::F_OFD_SETLK(lock))?;
    }
    for unshared in [WRITE, WRITE_UNCHANGED, RESIZE] {
        lock(libc::F_RDLCK, UNSHARED_BASE + unshared, |lock| nix::fcntl::FcntlArg::F_OFD_SETLK(lock))?;
    }
    // Whoever already uses a permission that we do not share, or does not share one that we use, holds a read lock on its byte.
    let conflicts = [WRITE, WRITE_UNCHANGED, RESIZE].map(|unshared| PERMISSION_BASE + unshared);
    let refused = [CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE].map(|permission| UNSHARED_BASE + permission);
    for byte in conflicts.into_iter().chain(refused) {
        let mut probe = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_GETLK(&mut probe))?;
        if probe.l_type != libc::F_UNLCK as i16 {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
    }
    Ok(())
}

impl Disk for FileDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        simulated!(self, read_at(offset, buffer));
        if let Some(remote) = &self.remote {
            return remote.read_at(offset, buffer);
        }
        if let Some(image) = self.image() {
            return image.read_at(offset, buffer);
        }
        if self.is_observed {
            return self.read_past_cache(offset, buffer);
        }
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        #[cfg(feature = "simulation")]
        if let Some(disk) = &self.simulated {
            let result = disk.write_at(offset, data, durability);
            // As below: the only error of a durable write that means lost data.
            if durability == Durability::Durable
                && result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
            {
                self.flush_failed.store(true, Ordering::Release);
            }
            return result;
        }
        if let Some(image) = self.image() {
            return image.write_at(offset, data, durability);
        }
        if durability == Durability::Cached {
            return self.file.write_all_at(data, offset);
        }
        let mut written = 0;
        while written < data.len() {
            let rest = libc::iovec { iov_base: data[written..].as_ptr() as *mut _, iov_len: data.len() - written };
            // SAFETY: `rest` points into `data`, which outlives the call; the kernel only reads it.
            let count = unsafe {
                libc::pwritev2(self.file.as_raw_fd(), &rest, 1, (offset + written as u64) as i64, libc::RWF_DSYNC)
            };
            match count {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count if count > 0 => written += count as usize,
                _ => {
                    let error = io::Error::last_os_error();
                    match error.raw_os_error() {
                        Some(libc::EINTR) => {}
                        // File systems without RWF_DSYNC: the same by two calls.
                        Some(libc::EOPNOTSUPP) => {
                            self.file.write_all_at(&data[written..], offset + written as u64)?;
                            return self.flush();
                        }
                        // The system tells a failed writeback once, to whoever syncs first, also of data that others wrote
                        // before: a later flush that knows nothing of it must not say that all is well.
                        Some(libc::EIO) => {
                            self.flush_failed.store(true, Ordering::Release);
                            return Err(error);
                        }
                        _ => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        #[cfg(feature = "simulation")]
        if let Some(disk) = &self.simulated {
            disk.zero(extent, discard, Durability::Cached)?;
            return self.make_durable(durability);
        }
        if let Some(image) = self.image() {
            return image.zero(extent, discard, durability);
        }
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let flags = if discard {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE | keep
        };
        match nix::fcntl::fallocate(&self.file, flags, extent.offset as i64, extent.length as i64) {
            Ok(()) => {}
            // Where the file system or device cannot do that, zeroes are written.
            Err(nix::Error::EOPNOTSUPP | nix::Error::ENOSYS | nix::Error::EINVAL) => write_zeroes(&self.file, extent)?,
            Err(error) => return Err(error.into()),
        }
        self.make_durable(durability)
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_observed {
            return Ok(());
        }
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if crate::sabotage::is("disk-flush") {
            return Ok(());
        }
        let result = self.sync_data();
        if result.is_err() {
            self.flush_failed.store(true, Ordering::Release);
        }
        result
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        simulated!(self, allocation(offset));
        if let Some(remote) = &self.remote {
            return remote.allocation(offset);
        }
        if let Some(image) = self.image() {
            return image.allocation(offset);
        }
        if self.is_block_device {
            return Ok((self.bytes - offset, Allocation::Data));
        }
        let seek = |whence| match nix::unistd::lseek(&self.file, offset as i64, whence) {
            Ok(place) => Ok(place as u64),
            Err(nix::Error::ENXIO) => Ok(self.bytes),
            Err(error) => Err(io::Error::from(error)),
        };
        let data = seek(Whence::SeekData)?.min(self.bytes);
        if data > offset {
            return Ok((data - offset, Allocation::Hole));
        }
        let hole = seek(Whence::SeekHole)?.clamp(offset + 1, self.bytes);
        Ok((hole - offset, Allocation::Data))
    }
}

fn write_zeroes(file: &File, extent: Extent) -> io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut at = extent.offset;
    while at < extent.end() {
        let length = (extent.end() - at).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..length as usize], at)?;
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn a_disk_that_cannot_be_used_says_why() {
        let (_folder, path) = image(1000);
        assert!(matches!(FileDisk::open(&path, Access::Read), Err(DiskError::OddSize { bytes: 1000, .. })));
        assert!(matches!(FileDisk::open(Path::new("/nonexistent/disk"), Access::Read), Err(DiskError::Absent { .. })));
        assert!(matches!(FileDisk::open(Path::new("/dev/null"), Access::Read), Err(DiskError::Kind { .. })));
    }

    #[test]
    fn a_second_writer_is_kept_out() {
        let (_folder, path) = image(4096);
        let first = FileDisk::open(&path, Access::Exclusive).unwrap();
        assert!(matches!(FileDisk::open(&path, Access::Exclusive), Err(DiskError::InUse { .. })));
        drop(first);
        FileDisk::open(&path, Access::Exclusive).unwrap();
    }

    #[test]
    fn a_file_that_another_has_open_for_writing_is_in_use() {
        let (_folder, path) = image(4096);
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        assert!(matches!(FileDisk::open(&path, Access::Exclusive), Err(DiskError::InUse { .. })));
        FileDisk::open(&path, Access::Read).unwrap();
        drop(writer);
        let reader = File::open(&path).unwrap();
        FileDisk::open(&path, Access::Exclusive).unwrap();
        drop(reader);
    }

    #[test]
    fn qemu_is_kept_out_and_keeps_us_out() {
        let (_folder, path) = image(1 << 20);
        let Ok(version) = std::process::Command::new("qemu-io").arg("--version").output() else { return };
        assert!(version.status.success());
        let disk = FileDisk::open(&path, Access::Exclusive).unwrap();
        let write = || {
            std::process::Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k"]).arg(&path).output().unwrap()
        };
        assert!(!write().status.success());
        drop(disk);
        assert!(write().status.success());
    }

    #[test]
    fn holes_are_seen_without_reading() {
        let (_folder, path) = image(4 << 20);
        let disk = FileDisk::open(&path, Access::Exclusive).unwrap();
        disk.write_at(1 << 20, &[7; 65536], Durability::Durable).unwrap();
        assert_eq!(disk.allocation(0).unwrap(), (1 << 20, Allocation::Hole));
        assert_eq!(disk.allocation(1 << 20).unwrap(), (65536, Allocation::Data));
        assert_eq!(disk.allocation((1 << 20) + 65536).unwrap(), ((3 << 20) - 65536, Allocation::Hole));
        disk.zero(Extent::new(1 << 20, 65536), true, Durability::Cached).unwrap();
        assert_eq!(disk.allocation(0).unwrap(), (4 << 20, Allocation::Hole));
    }
}
