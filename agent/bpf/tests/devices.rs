//! What the kernel tells of real block devices. Needs root, loop devices and BPF; skipped, by name, elsewhere.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tidemark_base::error::with_causes;
use tidemark_base::{DiskId, Extent, ExtentSet};
use tidemark_bpf::{BlockTracker, DeviceError, Found, KernelError, TrackerError, Witness};

const GRANULE: u64 = 64 << 10;

/// A loop device over a file, and whatever is pinned for a disk. Both go at the end.
struct Loop {
    folder: tempfile::TempDir,
    path: PathBuf,
    disk: DiskId,
}

impl Loop {
    /// `None`, and says so, where loop devices or programs of the kernel cannot be had.
    fn new(test: &str, bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let Some(path) = attach(&image) else {
            skipped(test, "no loop device can be had");
            return None;
        };
        let this = Self { folder, path, disk: DiskId::random() };
        match this.open() {
            Ok(_) => {
                BlockTracker::remove(this.disk).unwrap();
                Some(this)
            }
            Err(TrackerError::Kernel(error @ (KernelError::NoTypes | KernelError::NotPermitted(_)))) => {
                skipped(test, &error.to_string());
                None
            }
            Err(error) => panic!("{}", with_causes(&error)),
        }
    }

    fn open(&self) -> Result<(BlockTracker, Found), TrackerError> {
        BlockTracker::open(&self.path, self.disk)
    }

    fn direct(&self) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&self.path).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = BlockTracker::remove(self.disk);
        run("losetup", &["-d", self.path.to_str().unwrap()]);
    }
}

/// Says that a test did not run, where `tests/run` gathers such lines.
fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}");
    println!("{line}");
    if let Some(file) = std::env::var_os("TIDEMARK_SKIPPED")
        && let Ok(mut file) = OpenOptions::new().create(true).append(true).open(file)
    {
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

fn attach(image: &Path) -> Option<PathBuf> {
    let output = Command::new("losetup").args(["-f", "--show"]).arg(image).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().into())
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Memory that a device takes as it is.
#[repr(align(4096))]
struct Aligned([u8; 128 << 10]);

fn write_direct(file: &File, offset: u64, length: usize) {
    let data = Box::new(Aligned([7; 128 << 10]));
    file.write_all_at(&data.0[..length], offset).unwrap();
}

fn discard(file: &File, request: u64, offset: u64, length: u64) {
    let range = [offset, length];
    // SAFETY: BLKDISCARD and BLKZEROOUT read two u64.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, range.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;

fn granules(list: &[(u64, u64)]) -> ExtentSet {
    list.iter().map(|(first, count)| Extent::new(first * GRANULE, count * GRANULE)).collect()
}

#[test]
fn every_kind_of_write_is_told_and_reads_are_not() {
    let Some(device) = Loop::new("every_kind_of_write_is_told_and_reads_are_not", 1 << 30) else { return };
    let (tracker, found) = device.open().unwrap();
    assert_eq!((found, tracker.is_dirty()), (Found::New, false));
    let file = device.direct();
    let told = |what: &str, expected: &[(u64, u64)]| {
        assert!(tracker.is_dirty(), "{what}");
        let claimed: Vec<_> = tracker.claim().iter().collect();
        assert_eq!(claimed, granules(expected).iter().collect::<Vec<_>>(), "{what}");
        assert_eq!(tracker.claimed().iter().collect::<Vec<_>>(), claimed, "{what}");
        tracker.release(&tracker.claimed());
        assert!(tracker.claimed().is_empty() && !tracker.is_dirty(), "{what}");
    };
    write_direct(&file, 0, 512);
    told("a sector", &[(0, 1)]);
    write_direct(&file, 3 * GRANULE - 4096, 8192);
    told("across a border", &[(2, 2)]);
    write_direct(&file, 63 * GRANULE, 128 << 10);
    told("across a word", &[(63, 2)]);
    write_direct(&file, (1 << 30) - 4096, 4096);
    told("the last block", &[((1 << 30) / GRANULE - 1, 1)]);
    discard(&file, BLKDISCARD, 100 * GRANULE, 5000 * GRANULE);
    told("a discard of many words", &[(100, 5000)]);
    discard(&file, BLKZEROOUT, 7 * GRANULE, 200 * GRANULE);
    told("zeroes", &[(7, 200)]);
    let buffered = OpenOptions::new().read(true).write(true).open(&device.path).unwrap();
    buffered.write_all_at(&[1; 300], 20 * GRANULE).unwrap();
    assert!(!tracker.is_dirty(), "nothing was submitted yet");
    buffered.sync_all().unwrap();
    told("buffered, synced", &[(20, 1)]);
    let mut data = Box::new(Aligned([0; 128 << 10]));
    file.read_exact_at(&mut data.0, 0).unwrap();
    buffered.sync_all().unwrap();
    assert!(!tracker.is_dirty(), "neither reads nor flushes change anything");
    assert_eq!((tracker.witness(), tracker.device().writes_in_flight().unwrap()), (Witness::Whole, 0));
}

/// The event of a write to a partition names the partition, with a sector of the whole disk.
#[test]
fn writes_to_partitions_are_told_of_the_disk_and_of_the_partition() {
    let Some(device) = Loop::new("writes_to_partitions_are_told_of_the_disk_and_of_the_partition", 64 << 20) else {
        return;
    };
    let disk = device.path.to_str().unwrap();
    // A loop device keeps its partitions when it is detached: one of a run that was killed may be there.
    let _ = Command::new("delpart").args([disk, "2"]).output().unwrap();
    run("addpart", &[disk, "2", "20480", "32768"]);
    let partition = PathBuf::from(format!("{}p2", device.path.display()));
    let number =
        std::fs::read_to_string(format!("/sys/class/block/{}/dev", partition.file_name().unwrap().to_str().unwrap()));
    let Ok(number) = number else {
        skipped("writes_to_partitions_are_told_of_the_disk_and_of_the_partition", "no partitions on loop devices");
        return;
    };
    let own = device.folder.path().join("partition");
    let (major, minor) = number.trim().split_once(':').unwrap();
    run("mknod", &[own.to_str().unwrap(), "b", major, minor]);
    let (whole, _) = device.open().unwrap();
    let part_id = DiskId::random();
    let (part, _) = BlockTracker::open(&own, part_id).unwrap();
    assert_eq!((part.device().first_sector, part.device().bytes()), (20480, 16 << 20));
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&own).unwrap();
    write_direct(&file, 5 * GRANULE, 4096);
    let first = 20480 * 512 / GRANULE;
    assert_eq!(whole.claim().iter().collect::<Vec<_>>(), granules(&[(first + 5, 1)]).iter().collect::<Vec<_>>());
    assert_eq!(part.claim().iter().collect::<Vec<_>>(), granules(&[(5, 1)]).iter().collect::<Vec<_>>());
    // Beside it, and across its begin.
    write_direct(&device.direct(), 20480 * 512 - 4096, 8192);
    discard(&device.direct(), BLKZEROOUT, 1 << 20, 4 << 20);
    assert_eq!(part.claim().iter().collect::<Vec<_>>(), granules(&[(0, 1)]).iter().collect::<Vec<_>>());
    drop((whole, part, file));
    BlockTracker::remove(part_id).unwrap();
    run("delpart", &[disk, "2"]);
}

#[test]
fn a_witness_is_one_that_was_armed_for_the_same_disk() {
    let Some(device) = Loop::new("a_witness_is_one_that_was_armed_for_the_same_disk", 16 << 20) else { return };
    let (tracker, _) = device.open().unwrap();
    write_direct(&device.direct(), 0, 512);
    drop(tracker);
    let (tracker, found) = device.open().unwrap();
    assert_eq!(found, Found::New, "it was not armed");
    assert!(!tracker.is_dirty());
    tracker.arm([9; 16]);
    write_direct(&device.direct(), GRANULE, 512);
    tracker.claim();
    drop(tracker);
    // Nobody watches but the kernel.
    write_direct(&device.direct(), 2 * GRANULE, 512);
    let (tracker, found) = device.open().unwrap();
    assert_eq!(found, Found::Witness([9; 16]));
    assert_eq!(tracker.claimed().iter().collect::<Vec<_>>(), granules(&[(1, 1)]).iter().collect::<Vec<_>>());
    assert_eq!(tracker.claim().iter().collect::<Vec<_>>(), granules(&[(2, 1)]).iter().collect::<Vec<_>>());
    // A part of what is pinned is gone.
    let links = format!("/sys/fs/bpf/tidemark-{}/link-block_bio_queue", device.disk);
    std::fs::remove_file(links).unwrap();
    drop(tracker);
    let (tracker, found) = device.open().unwrap();
    assert_eq!(found, Found::New);
    tracker.arm([9; 16]);
    // Another disk behind the same name.
    let other = device.folder.path().join("other.img");
    File::create(&other).unwrap().set_len(16 << 20).unwrap();
    run("losetup", &["-d", device.path.to_str().unwrap()]);
    run("losetup", &[device.path.to_str().unwrap(), other.to_str().unwrap()]);
    assert!(matches!(tracker.witness(), Witness::Broken(_)));
    drop(tracker);
    assert_eq!(device.open().unwrap().1, Found::New);
}

/// Forty thousand writes by four writers at once, claimed meanwhile: what is claimed is what was written.
#[test]
fn no_write_is_lost_among_many() {
    let Some(device) = Loop::new("no_write_is_lost_among_many", 256 << 20) else { return };
    let (tracker, _) = device.open().unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let (written, mut claimed) = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|seed| {
                let file = device.direct();
                scope.spawn(move || {
                    let (mut random, mut written) = (seed * 77 + 1, ExtentSet::new());
                    let data = Box::new(Aligned([seed as u8; 128 << 10]));
                    for _ in 0..10_000 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let offset = (random >> 33) % (256 << 8) * 4096;
                        file.write_all_at(&data.0[..4096], offset).unwrap();
                        written.insert(Extent::new(offset / GRANULE * GRANULE, GRANULE));
                    }
                    written
                })
            })
            .collect();
        let claimer = scope.spawn(|| {
            let mut all = ExtentSet::new();
            while !is_over.load(std::sync::atomic::Ordering::Acquire) {
                tracker.claim().iter().for_each(|extent| all.insert(extent));
                std::thread::yield_now();
            }
            all
        });
        let mut written = ExtentSet::new();
        for writer in writers {
            writer.join().unwrap().iter().for_each(|extent| written.insert(extent));
        }
        is_over.store(true, std::sync::atomic::Ordering::Release);
        (written, claimer.join().unwrap())
    });
    tracker.claim().iter().for_each(|extent| claimed.insert(extent));
    assert_eq!(claimed.iter().collect::<Vec<_>>(), written.iter().collect::<Vec<_>>());
    assert_eq!(tracker.witness(), Witness::Whole);
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name() {
    let Some(device) = Loop::new("what_cannot_be_tracked_is_refused_by_name", 16 << 20) else { return };
    let image = device.folder.path().join("disk.img");
    let refused = BlockTracker::probe(&image).unwrap_err();
    assert!(matches!(refused, TrackerError::Device(DeviceError::NotADevice { .. })), "{refused}");
    let name = device.path.file_name().unwrap().to_str().unwrap();
    let iostats = format!("/sys/block/{name}/queue/iostats");
    run("sh", &["-c", &format!("echo 0 > {iostats}")]);
    let refused = BlockTracker::probe(&device.path);
    run("sh", &["-c", &format!("echo 1 > {iostats}")]);
    let refused = refused.unwrap_err();
    assert!(matches!(refused, TrackerError::Device(DeviceError::NotCounted { .. })), "{refused}");
    assert!(refused.help().contains("iostats"));
    BlockTracker::probe(&device.path).unwrap();
}
