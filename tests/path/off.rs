//! Machines whose writes pass by their agent: failed over once they are off, and not before.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tidemark_tests::block::Loop;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::{LIMIT, number};
use tidemark_tests::workload::{content, nbd, write};
use tidemark_tests::{Site, need, need_root, owner, tools, wait};

const BYTES: u64 = 32 * MIB;

/// A block device with a workload, which knows nothing of us.
struct Tracked {
    image: PathBuf,
    device: Loop,
    /// There while its machine is on.
    on: PathBuf,
}

impl Tracked {
    /// `None`: the test was noted as skipped.
    fn protect(site: &Site, test: &str) -> Option<Self> {
        if !Path::new("/sys/kernel/btf/vmlinux").exists() {
            tools::skipped(test, "needs a kernel that describes its types");
            return None;
        }
        let image = site.path("disk.img");
        image::make_mixed(&image, BYTES, 5);
        let device = Loop::attach(&image);
        site.json(&["protect", "web", "--disk", device.path().to_str().expect("UTF-8"), "--via", "bpf"]);
        site.wait_protected("web");
        Some(Self { image, device, on: site.path("web.on") })
    }

    fn path(&self) -> &str {
        self.device.path().to_str().expect("UTF-8")
    }

    fn open(&self) -> io::Result<File> {
        File::options().read(true).write(true).open(self.device.path())
    }

    /// Left in the page cache, as a program leaves it that ends.
    fn write(&self, at: u64, byte: u8) {
        self.open().and_then(|file| file.write_all_at(&[byte; 65_536], at)).expect("it can be written");
    }

    /// Past the page cache, whose pages would be written long after.
    fn write_through(&self, at: u64, byte: u8) -> io::Result<()> {
        #[repr(align(4096))]
        struct Aligned([u8; 65_536]);
        let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(self.device.path())?;
        file.write_all_at(&Aligned([byte; 65_536]).0, at)
    }

    fn is_kept(&self) -> bool {
        let alone = File::options().read(true).custom_flags(libc::O_EXCL).open(self.device.path());
        alone.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
            && self.write_through(0, 1).is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
    }

    /// As somebody does who knows what he does.
    fn make_writable(&self) {
        const BLKROSET: libc::Ioctl = 0x125d;
        let Ok(file) = File::open(self.device.path()) else { return };
        let flag: libc::c_int = 0;
        // SAFETY: the descriptor is open, and the kernel reads one int at the address of one.
        unsafe { libc::ioctl(file.as_raw_fd(), BLKROSET, &raw const flag) };
    }
}

impl Drop for Tracked {
    /// The next test has this loop device.
    fn drop(&mut self) {
        self.make_writable();
    }
}

fn problems(site: &Site) -> String {
    site.status("web")["reasons"].to_string()
}

/// H36: a device that others write to fails over by plan once whoever runs its machine says that it is off and nobody has it
/// open; then nobody gets at it, and who does all the same is told of. Taken back, its machine goes on with it.
#[test]
fn h36_a_tracked_device_fails_over_by_plan_when_its_machine_is_off() {
    need!("losetup");
    need_root!("programs in the kernel");
    let mut site = Site::start_roles();
    let test = "off::h36_a_tracked_device_fails_over_by_plan_when_its_machine_is_off";
    let Some(tracked) = Tracked::protect(&site, test) else { return };
    let planned = ["failover", "planned", "web", "--disks-only"];
    let refuse = |words: &[&str]| {
        site.run(&planned).assert_refused(words);
        site.wait_protected("web");
        assert!(!tracked.is_kept(), "it was given back");
    };
    refuse(&["past its agent", "--via bpf", "says that it is off"]);
    owner::switch(&site, "web");
    owner::program(&site, "web", "power", r#"echo '{"power": "on"}'"#);
    refuse(&["does not say that it is off"]);
    owner::switch(&site, "web");
    let checked = site.json(&["failover", "planned", "web", "--disks-only", "--check"]);
    assert_eq!((&checked["source"]["owner"], &checked["source"]["power"]), (&"scripts".into(), &"on".into()));

    // Off, he says, and somebody has it open all the same.
    let open = tracked.open().expect("it can be opened");
    refuse(&[tracked.path(), "open for writing", &std::process::id().to_string()]);
    assert!(tracked.on.exists(), "its machine was started again");
    drop(open);
    let alone = File::options().read(true).custom_flags(libc::O_EXCL).open(tracked.device.path());
    refuse(&[tracked.path(), "in use"]);
    drop(alone);

    tracked.write(7 * MIB, 7);
    let result = site.json(&planned);
    assert_eq!((&result["lost_seconds"], &result["lost_bytes"]), (&0.0.into(), &0.into()), "{result}");
    assert_eq!(result["source"]["stopped"], "by_guest", "{result}");
    assert!(result["not_fenced"].is_null(), "{result}");
    assert!(!tracked.on.exists() && tracked.is_kept());
    let there = content(&site, &nbd(&result), "there.img");
    image::assert_same(&tracked.image, &there);
    let mut last = [0; 65_536];
    File::open(&there).and_then(|file| file.read_exact_at(&mut last, 7 * MIB)).expect("it can be read");
    assert!(last == [7; 65_536], "what was in the page cache alone is there");

    // Also when the agent was started again.
    site.kill_role("agent");
    site.start_role("agent");
    site.wait_connected();
    wait::until("it is kept again", LIMIT, || tracked.is_kept().then_some(()));
    assert_eq!(site.status("web")["state"], "failed_over");
    assert!(!problems(&site).contains("kept"), "{}", problems(&site));
    wait::until("somebody writes to it, and that is told", LIMIT, || {
        tracked.make_writable();
        // Read-only again, maybe.
        let _ = tracked.write_through(9 * MIB, 9);
        problems(&site).contains("it was written to").then_some(())
    });
    wait::until("its event is there", LIMIT, || {
        site.run(&["events", "--json"]).stdout.contains("source_open").then_some(())
    });

    let before = site.status("web")["compare"]["compared_bytes"].clone();
    let back = site.json(&["failover", "cancel", "web"]);
    assert_eq!(back["source"], "goes on", "{back}");
    assert!(tracked.on.exists() && !tracked.is_kept());
    site.wait_protected("web");
    assert!(!problems(&site).contains("kept"), "{}", problems(&site));
    tracked.write(11 * MIB, 11);
    tracked.open().and_then(|file| file.sync_all()).expect("it can be synced");
    site.point("web");
    image::assert_same(&tracked.image, &site.export("web", "latest", "latest.raw", "raw"));
    assert_eq!(site.status("web")["compare"]["compared_bytes"], before, "no resync");

    // For good: it is let go of at the end.
    let result = site.json(&planned);
    image::assert_same(&tracked.image, &content(&site, &nbd(&result), "again.img"));
    site.json(&["commit", "web"]);
    let elsewhere = site.path("elsewhere");
    std::fs::create_dir(&elsewhere).expect("a folder can be made");
    let elsewhere = elsewhere.to_str().expect("UTF-8");
    site.run(&["reprotect", "web", "--store", elsewhere]).assert_refused(&["others write them"]);
    assert!(tracked.is_kept());
    site.json(&["failover", "promote", "web"]);
    site.json(&["migrate", "web"]);
    assert!(!tracked.is_kept(), "it is nobody's now");
    site.down();
}

/// F1: there and home. While its machine is away the device is written by its agent alone, and who else might is told of; at home the machine goes on,
/// and so does its replication, with what the tracker saw.
#[test]
fn f1_a_tracked_device_is_brought_home() {
    need!("losetup");
    need_root!("programs in the kernel");
    let mut site = Site::start_roles();
    let Some(tracked) = Tracked::protect(&site, "off::f1_a_tracked_device_is_brought_home") else { return };
    owner::switch(&site, "web");
    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let there = nbd(&result);
    write(&there, 3 * MIB, 65_536, 3);
    write(&there, 5 * MIB, 65_536, 0);
    let reprotected = site.json(&["reprotect", "web", "--method", "delta"]);
    assert!(number(&reprotected["compared_bytes"]) < 4 * MIB, "what changed alone: {reprotected}");
    image::assert_same(&tracked.image, &content(&site, &there, "there.img"));
    let follows = |site: &Site, at: u64, byte: u8| {
        write(&there, at, 65_536, byte);
        let expected = content(site, &there, "follows.img");
        let is_level = || image::first_difference(&tracked.image, &expected).expect("both can be read").is_none();
        wait::until("the device follows", LIMIT, || is_level().then_some(()));
    };
    follows(&site, 7 * MIB, 7);
    assert!(!problems(&site).contains("kept"), "what we write is no trespass: {}", problems(&site));
    let alone = File::options().read(true).custom_flags(libc::O_EXCL).open(tracked.device.path());
    assert!(alone.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)), "nobody mounts it");
    let open = tracked.open().expect("it can be opened");
    wait::until("who has it open is told of", LIMIT, || problems(&site).contains("open for writing").then_some(()));
    drop(open);
    wait::until("and not for ever", LIMIT, || (!problems(&site).contains("open for writing")).then_some(()));

    // Its agent goes on with it.
    site.kill_role("agent");
    site.start_role("agent");
    site.wait_connected();
    follows(&site, 9 * MIB, 9);

    let last = content(&site, &there, "last.img");
    assert!(!tracked.on.exists());
    site.json(&["failback", "web"]);
    image::assert_same(&last, &tracked.image);
    assert!(tracked.on.exists() && !tracked.is_kept(), "its machine goes on at home");
    tracked.write(11 * MIB, 11);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    tracked.write(13 * MIB, 13);
    tracked.open().and_then(|file| file.sync_all()).expect("it can be synced");
    site.point("web");
    image::assert_same(&tracked.image, &site.export("web", "latest", "latest.raw", "raw"));

    // A reprotect that is taken back leaves the device as it was.
    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let before = site.path("before.img");
    image::copy(&tracked.image, &before);
    write(&nbd(&result), 15 * MIB, 65_536, 15);
    site.json(&["reprotect", "web"]);
    assert!(image::first_difference(&tracked.image, &before).expect("both can be read").is_some());
    site.json(&["reprotect", "cancel", "web"]);
    image::assert_same(&before, &tracked.image);
    assert!(tracked.is_kept());
    site.json(&["failover", "promote", "web"]);
    site.json(&["migrate", "web"]);
    assert!(!tracked.is_kept(), "it is nobody's now");
    site.down();
}

/// Unplanned, from a source that goes on: that is said, what it writes is refused, and it is kept from its disk as soon as it is off.
#[test]
fn h36_an_unplanned_failover_of_a_tracked_device_says_that_its_source_goes_on() {
    need!("losetup");
    need_root!("programs in the kernel");
    let site = Site::start();
    let test = "off::h36_an_unplanned_failover_of_a_tracked_device_says_that_its_source_goes_on";
    let Some(tracked) = Tracked::protect(&site, test) else { return };
    tracked.write(7 * MIB, 7);
    let open = tracked.open().expect("it can be opened");
    open.sync_all().expect("it can be synced");
    site.point("web");
    let reference = site.path("reference.img");
    image::copy(&tracked.image, &reference);

    let result = site.json(&["failover", "unplanned", "web", "--disks-only"]);
    assert!(result["not_fenced"]["error"].to_string().contains("open for writing"), "{result}");
    image::assert_same(&reference, &content(&site, &nbd(&result), "there.img"));
    open.write_all_at(&[8; 65_536], 8 * MIB).and_then(|()| open.sync_all()).expect("nobody is in its way");
    wait::until("it is told", LIMIT, || problems(&site).contains("open for writing").then_some(()));
    image::assert_same(&reference, &content(&site, &nbd(&result), "still.img"));
    drop(open);
    wait::until("it is kept", LIMIT, || tracked.is_kept().then_some(()));
    wait::until("it is told no more", LIMIT, || (!problems(&site).contains("open for writing")).then_some(()));

    site.json(&["failover", "cancel", "web"]);
    site.wait_protected("web");
    assert!(!tracked.is_kept());
    site.point("web");
    image::assert_same(&tracked.image, &site.export("web", "latest", "latest.raw", "raw"));
    assert_eq!(site.status("web")["compare"]["compared_bytes"], 0, "what it wrote meanwhile was tracked");
}
