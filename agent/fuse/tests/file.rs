//! A file over an export in memory, used as programs use files. Where files cannot be mounted the tests say so and pass.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Durability};
use tidemark_fuse::{FuseError, FuseFile};
use tidemark_nbd::{Export, WriteRequest};

const BYTES: u64 = 4 << 20;
const SECTOR: u64 = 512;

/// A disk of whole sectors, which counts what it was asked for.
struct Memory {
    content: Mutex<Vec<u8>>,
    read_only: bool,
    flushes: AtomicU64,
    durable: AtomicU64,
    allocated: Mutex<Vec<Extent>>,
    fails: AtomicBool,
    /// Writes wait while it is true.
    held: Mutex<bool>,
    changed: Condvar,
    waiting: AtomicU64,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self::with(false))
    }

    fn with(read_only: bool) -> Self {
        Self {
            content: Mutex::new(vec![0; BYTES as usize]),
            read_only,
            flushes: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            allocated: Mutex::default(),
            fails: AtomicBool::new(false),
            held: Mutex::new(false),
            changed: Condvar::new(),
            waiting: AtomicU64::new(0),
        }
    }

    fn wait_for_a_request(&self) {
        while self.waiting.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
    }

    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.changed.notify_all();
    }

    fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }
}

fn check(extent: Extent) {
    assert!(extent.offset.is_multiple_of(SECTOR) && extent.length.is_multiple_of(SECTOR), "{extent:?} is no sectors");
    assert!(extent.length > 0 && extent.end() <= BYTES, "{extent:?}");
}

impl Export for Memory {
    fn bytes(&self) -> u64 {
        BYTES
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        check(Extent::new(offset, buffer.len() as u64));
        buffer.copy_from_slice(&self.content.lock().unwrap()[offset as usize..][..buffer.len()]);
        // What is read grows old before it is used: others write meanwhile, if nothing keeps them from it.
        (0..20).for_each(|_| std::thread::yield_now());
        Ok(())
    }

    fn write_batch(&self, writes: &[WriteRequest<'_>], results: &mut [io::Result<()>]) {
        let held = self.held.lock().unwrap();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        drop(self.changed.wait_while(held, |held| *held).unwrap());
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        for (write, result) in writes.iter().zip(results) {
            check(write.extent());
            if self.fails.load(Ordering::SeqCst) {
                *result = Err(io::Error::from_raw_os_error(libc::EIO));
                continue;
            }
            self.content.lock().unwrap()[write.offset as usize..][..write.data.len()].copy_from_slice(write.data);
            self.durable.fetch_add(u64::from(write.fua), Ordering::SeqCst);
            *result = Ok(());
        }
    }

    fn zero(&self, extent: Extent, _discard: bool, _durability: Durability) -> io::Result<()> {
        check(extent);
        self.content.lock().unwrap()[extent.offset as usize..extent.end() as usize].fill(0);
        Ok(())
    }

    fn allocate(&self, extent: Extent) -> io::Result<()> {
        self.allocated.lock().unwrap().push(extent);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        let content = self.content.lock().unwrap();
        let kind = |at: u64| match content[at as usize..(at + SECTOR).min(BYTES) as usize].iter().all(|&byte| byte == 0)
        {
            true => Allocation::Hole,
            false => Allocation::Data,
        };
        let first = kind(offset);
        let end = (offset..BYTES).step_by(SECTOR as usize).find(|&at| kind(at) != first).unwrap_or(BYTES);
        Ok((end - offset, first))
    }
}

struct Mounted {
    disk: Arc<Memory>,
    file: FuseFile,
    folder: tempfile::TempDir,
}

fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}");
    println!("{line}");
    if let Some(file) = std::env::var_os("TIDEMARK_SKIPPED")
        && let Ok(mut file) = OpenOptions::new().create(true).append(true).open(file)
    {
        io::Write::write_all(&mut file, format!("{line}\n").as_bytes()).unwrap();
    }
}

fn can_mount(test: &str) -> bool {
    let probed = tidemark_fuse::probe();
    if let Err(error) = &probed {
        skipped(test, &error.to_string());
    }
    probed.is_ok()
}

fn mounted(test: &str, disk: Arc<Memory>) -> Option<Mounted> {
    if !can_mount(test) {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = FuseFile::serve(&folder.path().join("disks/web-0"), disk.clone(), &[]).unwrap();
    Some(Mounted { disk, file, folder })
}

impl Mounted {
    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.file.path()).unwrap()
    }
}

fn fallocate(file: &File, mode: i32, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: a descriptor and integers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn code<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// Any byte ranges, by several programs at once in parts of their own: the file is what a plain one would be.
#[test]
fn any_ranges_of_bytes_are_written_zeroed_and_read() {
    let Some(mounted) = mounted("any_ranges_of_bytes_are_written_zeroed_and_read", Memory::new()) else { return };
    const WRITERS: u64 = 4;
    // Parts that share sectors at their ends.
    const PART: u64 = 100_001;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let file = mounted.open();
            scope.spawn(move || {
                let start = writer * PART;
                let mut model = vec![0u8; PART as usize];
                let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(writer + 1);
                let mut below = |limit: u64| {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (random >> 33) % limit
                };
                for round in 0..300u64 {
                    let offset = below(PART);
                    let length = (1 + below(if round % 10 == 0 { 70_000 } else { 2000 })).min(PART - offset);
                    let range = offset as usize..(offset + length) as usize;
                    match below(4) {
                        0 => {
                            fallocate(&file, if round % 2 == 0 { PUNCH } else { ZERO }, start + offset, length)
                                .unwrap();
                            model[range].fill(0);
                        }
                        1 => {
                            let mut read = vec![0; length as usize];
                            file.read_exact_at(&mut read, start + offset).unwrap();
                            assert!(read == model[range], "writer {writer}, round {round}");
                        }
                        _ => {
                            let data: Vec<u8> = (0..length).map(|at| (at + round) as u8 | 1).collect();
                            file.write_all_at(&data, start + offset).unwrap();
                            model[range].copy_from_slice(&data);
                        }
                    }
                }
                let mut whole = vec![0; PART as usize];
                file.read_exact_at(&mut whole, start).unwrap();
                assert!(whole == model, "writer {writer}");
            });
        }
    });
    let content = mounted.disk.content();
    assert!(content == std::fs::read(mounted.file.path()).unwrap());
    assert!(content[(WRITERS * PART) as usize..].iter().all(|&byte| byte == 0), "nothing beside");
    mounted.file.close().unwrap();
}

/// Every sector belongs to four programs, each with a part of its own.
#[test]
fn writes_to_parts_of_one_sector_lose_none_of_each_other() {
    let Some(mounted) = mounted("writes_to_parts_of_one_sector_lose_none_of_each_other", Memory::new()) else { return };
    const PART: usize = 128;
    std::thread::scope(|scope| {
        for writer in 0..4u8 {
            let file = mounted.open();
            scope.spawn(move || {
                for round in 0..1000u64 {
                    let offset = round % 8 * SECTOR + u64::from(writer) * PART as u64;
                    file.write_all_at(&[round as u8 | 1; PART], offset).unwrap();
                    let mut read = [0; PART];
                    file.read_exact_at(&mut read, offset).unwrap();
                    assert!(read == [round as u8 | 1; PART], "writer {writer}, round {round}");
                }
            });
        }
    });
}

#[test]
fn what_is_said_to_be_durable_was_made_so() {
    let Some(mounted) = mounted("what_is_said_to_be_durable_was_made_so", Memory::new()) else { return };
    let disk = &mounted.disk;
    let file = mounted.open();
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!((disk.flushes.load(Ordering::SeqCst), disk.durable.load(Ordering::SeqCst)), (0, 0));
    assert_eq!(disk.content()[..4096], [1; 4096], "nothing waits in the kernel");
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 2);
    let synchronous = OpenOptions::new().write(true).custom_flags(libc::O_DSYNC).open(mounted.file.path()).unwrap();
    synchronous.write_all_at(&[2; 100], 4000).unwrap();
    assert!(disk.durable.load(Ordering::SeqCst) == 1 || disk.flushes.load(Ordering::SeqCst) == 3, "O_DSYNC");
    // Mapped pages are written by msync, and closing loses none.
    // SAFETY: the mapping is as long as what is written through it.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 8192);
        if page != libc::MAP_FAILED {
            std::ptr::write_bytes(page.cast::<u8>(), 7, 4096);
            assert_eq!(libc::msync(page, 4096, libc::MS_SYNC), 0);
            assert_eq!(disk.content()[8192..12288], [7; 4096]);
            libc::munmap(page, 4096);
        }
    }
    // Past the cache of the kernel, which has none, from memory as a device wants it.
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mounted.file.path()).unwrap();
    let mut read = vec![0; 8192];
    let start = read.as_ptr().align_offset(4096);
    let part = &mut read[start..start + 4096];
    direct.read_exact_at(part, 0).unwrap();
    assert!(part[..4000] == [1; 4000] && part[4000..] == [2; 96]);
    // A failure is the caller's to know.
    disk.fails.store(true, Ordering::SeqCst);
    assert_eq!(code(file.sync_all()), Some(libc::EIO));
    assert_eq!(code(file.write_all_at(&[1; 512], 0)), Some(libc::EIO));
}

#[test]
fn a_disk_keeps_its_size_and_says_what_it_is() {
    let Some(mounted) = mounted("a_disk_keeps_its_size_and_says_what_it_is", Memory::new()) else { return };
    let path = mounted.file.path();
    let file = mounted.open();
    let metadata = file.metadata().unwrap();
    assert!(metadata.is_file() && metadata.len() == BYTES && metadata.mode() & 0o777 == 0o600);
    assert_eq!(code(file.set_len(BYTES / 2)), Some(libc::EPERM));
    assert_eq!(code(OpenOptions::new().write(true).truncate(true).open(path)), Some(libc::EPERM));
    file.set_len(BYTES).unwrap();
    assert_eq!(file.write_at(&[9; 100], BYTES - 40).unwrap(), 40, "as much as fits");
    assert_eq!(code(file.write_at(&[9; 100], BYTES)), Some(libc::ENOSPC));
    assert_eq!(file.read_at(&mut [0; 100], BYTES - 10).unwrap(), 10);
    assert_eq!(file.read_at(&mut [0; 100], BYTES).unwrap(), 0);
    assert_eq!(code(fallocate(&file, 0, BYTES - 512, 1024)), Some(libc::EFBIG));
    assert_eq!(code(fallocate(&file, libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096)), Some(libc::EOPNOTSUPP));
    fallocate(&file, 0, 4096, 8192).unwrap();
    assert_eq!(*mounted.disk.allocated.lock().unwrap(), [Extent::new(4096, 8192)]);
    // Past the end there is nothing to zero; what lies before it is zeroed.
    fallocate(&file, PUNCH, BYTES - 4096, 1 << 30).unwrap();
    assert!(mounted.disk.content().iter().all(|&byte| byte == 0));
    file.write_all_at(&[1; 4096], 1 << 20).unwrap();
    let seek = |offset: i64, whence| {
        // SAFETY: a descriptor and integers.
        let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
        if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
    };
    assert_eq!(seek(0, libc::SEEK_DATA).unwrap(), 1 << 20);
    assert_eq!(seek((1 << 20) + 100, libc::SEEK_HOLE).unwrap(), (1 << 20) + 4096);
    assert_eq!(code(seek((1 << 20) + 4096, libc::SEEK_DATA)), Some(libc::ENXIO));
    assert_eq!(
        code(std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))),
        Some(libc::EPERM)
    );
}

#[test]
fn a_read_only_export_is_a_read_only_file() {
    let disk = Memory::with(true);
    disk.content.lock().unwrap()[70_000..70_100].fill(3);
    let Some(mounted) = mounted("a_read_only_export_is_a_read_only_file", Arc::new(disk)) else { return };
    assert_eq!(code(OpenOptions::new().write(true).open(mounted.file.path())), Some(libc::EROFS));
    assert!(std::fs::read(mounted.file.path()).unwrap() == mounted.disk.content());
}

#[test]
fn only_root_our_user_and_those_that_are_named_open_it() {
    const TEST: &str = "only_root_our_user_and_those_that_are_named_open_it";
    if !can_mount(TEST) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return skipped(TEST, "needs root to become other users");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let file = FuseFile::serve(&folder.path().join("disks/web-0"), Memory::new(), &[4711]).unwrap();
    let may_read = |uid: u32| {
        let mut command = std::process::Command::new("head");
        std::os::unix::process::CommandExt::uid(&mut command, uid);
        command.args(["-c", "1"]).arg(file.path()).output().unwrap().status.success()
    };
    assert!(may_read(0) && may_read(4711) && !may_read(4712));
}

#[test]
fn closing_lets_requests_finish_and_ends_who_has_it_open() {
    let Some(mounted) = mounted("closing_lets_requests_finish_and_ends_who_has_it_open", Memory::new()) else { return };
    let path: PathBuf = mounted.file.path().to_owned();
    let file = mounted.open();
    mounted.disk.hold(true);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| file.write_all_at(&[5; 4096], 0));
        mounted.disk.wait_for_a_request();
        let closing = scope.spawn(|| mounted.file.close());
        while !is_closing(&path) {
            std::thread::yield_now();
        }
        mounted.disk.hold(false);
        writing.join().unwrap().expect("what was received is done");
        closing.join().unwrap().unwrap();
    });
    assert_eq!(mounted.disk.content()[..4096], [5; 4096]);
    assert_eq!(code(file.write_all_at(&[6; 4096], 0)), Some(libc::ENOTCONN));
    assert_eq!(code(file.read_at(&mut [0; 512], 0)), Some(libc::ENOTCONN));
    assert_eq!(mounted.disk.content()[..4096], [5; 4096]);
    assert!(!path.exists(), "nothing stays that could be taken for the disk");
    mounted.file.close().unwrap();
}

/// A read is refused as soon as the file closes.
fn is_closing(path: &Path) -> bool {
    File::open(path).is_err()
}

fn put(path: &Path, content: &str) {
    io::Write::write_all(&mut File::create(path).unwrap(), content.as_bytes()).unwrap();
}

/// A kernel mount whose process is gone, as `kill -9` leaves it.
fn dead_mount(path: &Path) {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let target = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let options =
        std::ffi::CString::new(format!("fd={},rootmode=100000,user_id=0,group_id=0", device.as_raw_fd())).unwrap();
    // SAFETY: strings that end in zero.
    let result = unsafe {
        libc::mount(c"tidemark".as_ptr(), target.as_ptr(), c"fuse.tidemark".as_ptr(), 0, options.as_ptr().cast())
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn a_dead_mount_is_taken_away_and_what_is_not_ours_is_refused_by_name() {
    const TEST: &str = "a_dead_mount_is_taken_away_and_what_is_not_ours_is_refused_by_name";
    let Some(mounted) = mounted(TEST, Memory::new()) else { return };
    if !nix::unistd::geteuid().is_root() {
        return skipped(TEST, "needs root to mount by itself");
    }
    let in_use = FuseFile::serve(mounted.file.path(), Memory::new(), &[]).err().unwrap();
    assert!(matches!(&in_use, FuseError::InUse { kind, .. } if kind == "fuse.tidemark"), "{in_use}");
    assert!(in_use.help().contains("unmount"), "{}", in_use.help());
    mounted.open().write_all_at(&[1; 512], 0).expect("who was there stays");

    let path = mounted.folder.path().join("disks/web-1");
    put(&path, "");
    dead_mount(&path);
    assert_eq!(code(std::fs::read(&path)), Some(libc::ENOTCONN), "nobody reads or writes what lies beneath");
    let again = FuseFile::serve(&path, Memory::new(), &[]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap().len() as u64, BYTES);
    drop(again);
    assert!(!path.exists());

    put(&path, "a disk of somebody else");
    let occupied = FuseFile::serve(&path, Memory::new(), &[]).err().unwrap();
    assert!(matches!(occupied, FuseError::Occupied { .. }), "{occupied}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a disk of somebody else");
}

/// A request that never ends does not keep a machine from being left.
#[test]
fn a_medium_that_hangs_is_named_and_left() {
    let Some(mounted) = mounted("a_medium_that_hangs_is_named_and_left", Memory::new()) else { return };
    let file = mounted.open();
    mounted.disk.hold(true);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| file.write_all_at(&[5; 4096], 0));
        mounted.disk.wait_for_a_request();
        let begin = std::time::Instant::now();
        let busy = mounted.file.close().unwrap_err();
        assert!(matches!(busy, FuseError::Busy { .. }) && begin.elapsed() < Duration::from_secs(60), "{busy}");
        assert!(matches!(code(writing.join().unwrap()), Some(libc::ECONNABORTED | libc::ENOTCONN)));
        mounted.disk.hold(false);
    });
}
