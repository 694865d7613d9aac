//! The one file of a mount: what the kernel asks, and what the export is asked for it.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Durability};
use tidemark_nbd::{Export, WriteRequest};

use crate::door::Door;

/// Data of one request.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Asynchronous requests of one file that the kernel has under way; with more it lets their programs wait.
const REQUESTS_MAX: u16 = 256;
/// The size never changes, and what does is asked for again after each write.
const ATTRIBUTES_LIVE: Duration = Duration::from_secs(60);
/// A longer range is zeroed part by part.
const ZERO_BYTES_MAX: u64 = 1 << 30;
const BLOCK_BYTES: u32 = 4096;

/// What is served, shared by the threads of its mount and by whoever closes it.
pub struct Served {
    export: Arc<dyn Export>,
    bytes: u64,
    /// Requests to the export are multiples of it.
    unit: u64,
    /// Users besides root and our own who may open it.
    allowed_uids: Vec<u32>,
    pub door: Door,
    /// Held alone by a write that is no whole sectors: it reads what it does not write, and nobody may change that meanwhile.
    edges: RwLock<()>,
    /// When it was written last, for programs that look at that.
    modified_ns: AtomicU64,
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Served {
    pub fn new(export: Arc<dyn Export>, allowed_uids: &[u32]) -> Self {
        let (bytes, unit) = (export.bytes(), u64::from(export.block_bytes_min()));
        let served = Self {
            export,
            bytes,
            unit,
            allowed_uids: allowed_uids.to_vec(),
            door: Door::default(),
            edges: RwLock::default(),
            modified_ns: AtomicU64::new(0),
        };
        served.touch();
        served
    }

    fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.modified_ns.store(now.as_nanos() as u64, Ordering::Relaxed);
    }

    fn is_aligned(&self, offset: u64, length: u64) -> bool {
        (offset | length).is_multiple_of(self.unit)
    }

    /// Fills what lies on the disk; the rest of `size` is its end.
    fn read(&self, offset: u64, size: u32, then: impl FnOnce(&[u8])) -> io::Result<()> {
        let end = offset.saturating_add(u64::from(size)).min(self.bytes);
        if offset >= end {
            then(&[]);
            return Ok(());
        }
        let begin = offset - offset % self.unit;
        let until = end.next_multiple_of(self.unit).min(self.bytes);
        // Nobody below comes back here on this thread, so the buffer is free.
        let mut buffer = BUFFER.take();
        buffer.resize((until - begin) as usize, 0);
        let result = self.export.read(begin, &mut buffer);
        if result.is_ok() {
            then(&buffer[(offset - begin) as usize..(end - begin) as usize]);
        }
        BUFFER.set(buffer);
        result
    }

    /// Writes what fits on the disk, and says how much that is.
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<u32> {
        if offset >= self.bytes && !data.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let length = (data.len() as u64).min(self.bytes - offset.min(self.bytes));
        let data = &data[..length as usize];
        if data.is_empty() {
            return Ok(0);
        }
        if self.is_aligned(offset, length) {
            let _shared = self.edges.read().expect("no panic while held");
            self.write_whole(offset, data, durability)?;
        } else {
            let _alone = self.edges.write().expect("no panic while held");
            self.write_part(offset, data, durability)?;
        }
        self.touch();
        Ok(length as u32)
    }

    fn write_whole(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let mut results = [Err(io::Error::from_raw_os_error(libc::EIO))];
        let fua = durability == Durability::Durable;
        self.export.write_batch(&[WriteRequest { offset, data, fua }], &mut results);
        let [result] = results;
        result
    }

    /// The sectors at both ends are read and written whole. Held alone.
    fn write_part(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let end = offset + data.len() as u64;
        let begin = offset - offset % self.unit;
        let until = end.next_multiple_of(self.unit).min(self.bytes);
        let mut whole = vec![0; (until - begin) as usize];
        let unit = self.unit as usize;
        if begin < offset {
            self.export.read(begin, &mut whole[..unit])?;
        }
        let last = whole.len() - unit;
        if end < until && (last > 0 || begin == offset) {
            self.export.read(until - self.unit, &mut whole[last..])?;
        }
        whole[(offset - begin) as usize..(end - begin) as usize].copy_from_slice(data);
        self.write_whole(begin, &whole, durability)
    }

    /// Makes exactly this range read as zeroes.
    fn zero(&self, extent: Extent, discard: bool) -> io::Result<()> {
        if self.is_aligned(extent.offset, extent.length) {
            let _shared = self.edges.read().expect("no panic while held");
            self.zero_whole(extent, discard)?;
        } else {
            let _alone = self.edges.write().expect("no panic while held");
            let first = extent.offset.next_multiple_of(self.unit);
            let last = extent.end() - extent.end() % self.unit;
            let zeroes = vec![0; self.unit as usize];
            let write = |begin: u64, end: u64| match end > begin {
                true => self.write_part(begin, &zeroes[..(end - begin) as usize], Durability::Cached),
                false => Ok(()),
            };
            if first > last {
                // Inside of one sector.
                write(extent.offset, extent.end())?;
            } else {
                write(extent.offset, first)?;
                if last > first {
                    self.zero_whole(Extent::new(first, last - first), discard)?;
                }
                write(last, extent.end())?;
            }
        }
        self.touch();
        Ok(())
    }

    fn zero_whole(&self, extent: Extent, discard: bool) -> io::Result<()> {
        let mut at = extent.offset;
        while at < extent.end() {
            let length = (extent.end() - at).min(ZERO_BYTES_MAX);
            self.export.zero(Extent::new(at, length), discard, Durability::Cached)?;
            at += length;
        }
        Ok(())
    }

    fn fallocate(&self, offset: u64, length: u64, mode: i32) -> io::Result<()> {
        let refused = |code| Err(io::Error::from_raw_os_error(code));
        let is_size_kept = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let Some(end) = offset.checked_add(length) else { return refused(libc::EFBIG) };
        // A disk does not grow.
        if end > self.bytes && !is_size_kept {
            return refused(libc::EFBIG);
        }
        let end = end.min(self.bytes);
        if offset >= end {
            return Ok(());
        }
        let extent = Extent::new(offset, end - offset);
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => self.export.allocate(extent),
            libc::FALLOC_FL_PUNCH_HOLE if is_size_kept => self.zero(extent, true),
            libc::FALLOC_FL_ZERO_RANGE => self.zero(extent, false),
            _ => refused(libc::EOPNOTSUPP),
        }
    }

    /// Where data, or a hole, begins at or after `offset`.
    fn seek(&self, offset: u64, whence: i32) -> io::Result<u64> {
        let wanted = match whence {
            libc::SEEK_DATA => Allocation::Data,
            libc::SEEK_HOLE => Allocation::Hole,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        let mut at = offset - offset % self.unit;
        while at < self.bytes {
            let (length, found) = self.export.allocation(at)?;
            if found == wanted {
                return Ok(at.max(offset));
            }
            at += length.max(1);
        }
        // Every file ends with a hole.
        match wanted {
            Allocation::Hole if offset < self.bytes => Ok(self.bytes),
            _ => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        }
    }

    fn attributes(&self) -> FileAttr {
        let modified = UNIX_EPOCH + Duration::from_nanos(self.modified_ns.load(Ordering::Relaxed));
        FileAttr {
            ino: INodeNo::ROOT,
            size: self.bytes,
            blocks: self.bytes.div_ceil(512),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind: FileType::RegularFile,
            perm: if self.export.is_read_only() { 0o400 } else { 0o600 },
            nlink: 1,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    /// Who opens it is looked at once, as for a socket: the descriptor may be handed on.
    fn may_open(&self, request: &Request) -> bool {
        let uid = request.uid();
        uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.allowed_uids.contains(&uid)
    }
}

/// The file system that fuser serves.
pub struct Node(pub Arc<Served>);

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Runs what is asked while the door is open.
macro_rules! inside {
    ($node:expr, $reply:expr) => {
        match $node.0.door.enter() {
            Some(inside) => inside,
            None => return $reply.error(Errno::from_i32(libc::ENOTCONN)),
        }
    };
}

impl Filesystem for Node {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What a kernel does not know it goes without: mapping for writing, and requests of one program side by side.
        for wanted in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP] {
            if let Err(missing) = config.add_capabilities(wanted) {
                tracing::debug!(?missing, "the kernel is older");
            }
        }
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(REQUESTS_MAX);
        let _ = config.set_congestion_threshold(REQUESTS_MAX);
        Ok(())
    }

    fn getattr(&self, _request: &Request, _ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTES_LIVE, &self.0.attributes());
    }

    /// A disk has its size, and who may open it is not said by the file's mode.
    fn setattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let now = self.0.attributes();
        let is_same = size.is_none_or(|size| size == now.size)
            && mode.is_none_or(|mode| mode & 0o7777 == u32::from(now.perm))
            && uid.is_none_or(|uid| uid == now.uid)
            && gid.is_none_or(|gid| gid == now.gid);
        match is_same {
            true => reply.attr(&ATTRIBUTES_LIVE, &now),
            false => reply.error(Errno::EPERM),
        }
    }

    fn access(&self, request: &Request, _ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        if mask.contains(AccessFlags::W_OK) && self.0.export.is_read_only() {
            return reply.error(Errno::EROFS);
        }
        match self.0.may_open(request) && !mask.contains(AccessFlags::X_OK) {
            true => reply.ok(),
            false => reply.error(Errno::EACCES),
        }
    }

    fn open(&self, request: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if !self.0.may_open(request) {
            return reply.error(Errno::EACCES);
        }
        if self.0.door.is_closed() {
            return reply.error(Errno::from_i32(libc::ENOTCONN));
        }
        if self.0.export.is_read_only() {
            return match flags.acc_mode() {
                OpenAccMode::O_RDONLY => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
                _ => reply.error(Errno::EROFS),
            };
        }
        let past_cache = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), past_cache);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _inside = inside!(self, reply);
        let mut reply = Some(reply);
        let result = self.0.read(offset, size, |data| {
            if let Some(reply) = reply.take() {
                reply.data(data);
            }
        });
        if let (Err(error), Some(reply)) = (result, reply) {
            reply.error(errno(&error));
        }
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _inside = inside!(self, reply);
        // O_SYNC has this bit as well, and so has a single write with RWF_DSYNC.
        let durability = match flags.0 & libc::O_DSYNC {
            0 => Durability::Cached,
            _ => Durability::Durable,
        };
        match self.0.write(offset, data, durability) {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Of a close: nothing waits here, and it makes nothing durable.
    fn flush(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let _inside = inside!(self, reply);
        match self.0.export.flush() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _inside = inside!(self, reply);
        match self.0.fallocate(offset, length, mode) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _inside = inside!(self, reply);
        let found = u64::try_from(offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENXIO))
            .and_then(|offset| self.0.seek(offset, whence));
        match found {
            Ok(at) => reply.offset(at as i64),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply.statfs(self.0.bytes / u64::from(BLOCK_BYTES), 0, 0, 1, 0, BLOCK_BYTES, 255, BLOCK_BYTES);
    }
}
