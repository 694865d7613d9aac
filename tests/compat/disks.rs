//! Disks that fail, and disks that are somebody else's: what the guest sees of it, and what the replica does.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tidemark_tests::block::{self, Loop, Mount, NbdFile};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::{Machine, Site, need, need_root, tools, wait};

/// A loop device on a file of libnbd's, behind which a server of nbdkit fails what it is told to. Dropped from above to below.
struct BrokenDisk {
    device: Loop,
    _file: NbdFile,
    _server: Owned,
    folder: PathBuf,
}

impl BrokenDisk {
    fn new(site: &Site, image: &Path) -> Self {
        let folder = site.path("broken");
        std::fs::create_dir(&folder).unwrap();
        let socket = folder.join("nbdkit.sock");
        let trigger = |name: &str| format!("error-{name}-file={}", folder.join(name).display());
        let mut command = tools::command("nbdkit");
        command.args(["--foreground", "--filter=error", "--unix"]).arg(&socket).arg("file").arg(image);
        command.args(["error=EIO", "error-pwrite-rate=100%", "error-pread-rate=100%"]);
        command.args([trigger("pwrite"), trigger("pread")]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Owned::start("nbdkit", command, Some(&folder.join("nbdkit.log")));
        wait::until("nbdkit listens", tidemark_tests::site::LIMIT, || socket.exists().then_some(()));
        let file = NbdFile::mount(&format!("nbd+unix:///?socket={}", socket.display()), &folder.join("fuse"));
        let device = Loop::attach(file.path());
        // Without a second cache below the device's own.
        tools::run("losetup", &["--direct-io=on", device.path().to_str().unwrap()]);
        Self { device, _file: file, _server: server, folder }
    }

    fn path(&self) -> &Path {
        self.device.path()
    }

    /// From now on every `pread` or `pwrite` of the medium fails.
    fn fail(&self, what: &str) {
        File::create(self.folder.join(what)).unwrap();
    }

    fn heal(&self, what: &str) {
        std::fs::remove_file(self.folder.join(what)).unwrap();
    }

    /// Drops what the kernel remembers of the medium.
    fn forget(&self) {
        tools::outcome("blockdev", &["--flushbufs", self.path().to_str().unwrap()]);
    }
}

/// One command of qemu-io and what it said; it goes on after errors, so its status says nothing.
fn qemu_io(machine: &Machine, command: &str) -> String {
    let output = tools::outcome("qemu-io", &["-f", "raw", "-t", "writeback", "-c", command, machine.nbd()]);
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// qemu-io says nothing of a flush that fails; its status does.
fn flushes(machine: &Machine) -> bool {
    tools::outcome("qemu-io", &["-f", "raw", "-c", "flush", machine.nbd()]).status.success()
}

#[track_caller]
fn assert_fails(machine: &Machine, command: &str, why: &str) {
    let text = qemu_io(machine, command);
    assert!(text.contains(why), "{command}: {text}");
}

#[track_caller]
fn assert_works(machine: &Machine, command: &str) {
    let text = qemu_io(machine, command);
    // What it says when it closes the disk, with a flush of its own, is not the command's.
    let own = text.lines().next().unwrap_or_default();
    assert!(!text.contains("Pattern verification failed") && !own.contains("failed"), "{command}: {text}");
}

#[test]
fn a_medium_that_fails_costs_the_guest_its_own_requests_and_the_replica_nothing() {
    need!("qemu-io", "nbdkit", "nbdfuse", "losetup", "blockdev");
    need_root!("a loop device");
    block::private_mounts();
    let mut site = Site::start();
    let image = site.path("medium.img");
    image::make_mixed(&image, 32 * MIB, 1);
    let disk = BrokenDisk::new(&site, &image);
    let machine = site.protect("web", &[disk.path()], &[]);
    site.wait_protected("web");
    assert_works(&machine, "write -P 1 0 4M");
    assert!(flushes(&machine));

    // Reads: the request fails, the next one does not.
    disk.forget();
    disk.fail("pread");
    assert_fails(&machine, "read 16M 64k", "Input/output error");
    disk.heal("pread");
    assert_works(&machine, "read 16M 64k");

    // A write that must be durable fails, and with it every later flush: after a failed one the kernel says that all is well.
    disk.fail("pwrite");
    assert_fails(&machine, "write -f -P 2 1M 64k", "Input/output error");
    assert!(!flushes(&machine));
    disk.heal("pwrite");
    assert!(!flushes(&machine));
    // The rest goes on, and is replicated.
    assert_works(&machine, "write -P 3 8M 64k");
    assert_works(&machine, "read -P 3 8M 64k");
    site.wait_sent("web");
    site.point("web");
    let recovered = site.export("web", "latest", "recovered.raw", "raw");
    let (mut found, mut read) = ([0; 64 << 10], [0; 64 << 10]);
    let recovered = File::open(recovered).unwrap();
    recovered.read_exact_at(&mut found, 8 * MIB).unwrap();
    assert!(found == [3; 64 << 10], "the write after the failed ones is in the replica");
    // Where a write failed, nobody knows what is there: it was read again.
    recovered.read_exact_at(&mut found, MIB).unwrap();
    Client::connect(machine.nbd()).unwrap().read(MIB, &mut read).unwrap();
    assert!(found == read, "what was half written is as the guest reads it");

    // Attached anew: what the medium really holds is what counts.
    site.down();
    disk.forget();
    site.up();
    site.wait_protected("web");
    assert_works(&machine, "write -P 4 4M 64k");
    assert!(flushes(&machine), "a disk that is attached anew takes flushes again");
    // The same of a write that nobody wanted durable at once, and of the flush after it.
    disk.fail("pwrite");
    assert_works(&machine, "write -P 5 5M 64k");
    assert!(!flushes(&machine));
    disk.heal("pwrite");
    assert!(!flushes(&machine));
    site.point("web");
    site.down();
    disk.forget();
    site.up();
    site.wait_protected("web");
    image::assert_same(&image, &site.export("web", "latest", "last.raw", "raw"));
}

#[test]
fn a_disk_without_room_costs_the_guest_those_writes_alone() {
    need!("qemu-io");
    need_root!("a file system in memory");
    block::private_mounts();
    let site = Site::start();
    let small = Mount::memory(&site.path("small"), 24 * MIB);
    let disk = small.path().join("disk.img");
    File::create(&disk).and_then(|file| file.set_len(48 * MIB)).unwrap();
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    assert_works(&machine, "write -P 1 0 8M");
    // The medium takes a part of this, and then nothing more.
    assert_fails(&machine, "write -P 2 8M 32M", "No space left on device");
    assert_works(&machine, "read -P 1 0 8M");
    assert_works(&machine, "write -P 3 0 64k");
    small.resize(256 * MIB);
    assert_works(&machine, "write -P 4 8M 32M");
    assert_works(&machine, "read -P 4 8M 32M");
    assert!(flushes(&machine));
    site.wait_protected("web");
    site.wait_sent("web");
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}

#[test]
fn a_block_device_is_taken_alone_and_refused_while_somebody_has_it() {
    need!("qemu-io", "losetup", "mke2fs");
    need_root!("a loop device");
    block::private_mounts();
    let site = Site::start();
    let image = site.path("device.img");
    // A disk with one partition from 1 MiB on, and a file system in it.
    block::make_ext4(&site.path("partition.img"), 15 * MIB, "^has_journal");
    let mut content = vec![0; MIB as usize];
    content[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x78, 0, 0]);
    content[510..512].copy_from_slice(&[0x55, 0xaa]);
    content.extend(std::fs::read(site.path("partition.img")).unwrap());
    File::create(&image).and_then(|mut file| file.write_all(&content)).unwrap();
    let device = tools::run("losetup", &["--find", "--show", "--partscan", image.to_str().unwrap()]);
    let device = device.trim().to_owned();
    let path = Path::new(&device);
    let detach = Detach(device.clone());
    let partition = PathBuf::from(format!("{device}p1"));
    if partition.exists() {
        let folder = site.path("mounted");
        std::fs::create_dir(&folder).unwrap();
        tools::run("mount", &[partition.to_str().unwrap(), folder.to_str().unwrap()]);
        let refused = site.run(&["protect", "web", "--disk", &device]);
        tools::run("umount", &[folder.to_str().unwrap()]);
        refused.assert_refused(&[&device, "in use"]);
    } else {
        tools::skipped("disks::a_partition_in_use", "this kernel shows no partitions of loop devices");
    }
    // A device without partitions, on every kernel: it is mounted, or protected, and never both.
    block::make_ext4(&site.path("whole.img"), 16 * MIB, "^has_journal");
    let whole = Loop::attach(&site.path("whole.img"));
    let folder = site.path("whole");
    std::fs::create_dir(&folder).unwrap();
    let [whole_text, folder_text] = [whole.path(), &folder].map(|path| path.to_str().unwrap());
    tools::run("mount", &[whole_text, folder_text]);
    site.run(&["protect", "whole", "--disk", whole_text]).assert_refused(&[whole_text, "in use"]);
    tools::run("umount", &[folder_text]);
    site.protect("whole", &[whole.path()], &[]);
    let mounted = tools::outcome("mount", &[whole_text, folder_text]);
    assert!(!mounted.status.success(), "{}", tools::describe("mount", &[whole_text], &mounted));
    site.json(&["unprotect", "whole"]);
    tools::run("mount", &[whole_text, folder_text]);
    tools::run("umount", &[folder_text]);
    drop(whole);

    let machine = site.protect("web", &[path], &[]);
    site.wait_protected("web");
    // Now nobody else gets it.
    let other = site.run(&["protect", "other", "--disk", &device]);
    assert_ne!(other.code, 0, "{}", other.describe());
    let mounted = tools::outcome("mount", &[&device, site.folder().to_str().unwrap()]);
    assert!(!mounted.status.success(), "{}", tools::describe("mount", &[&device], &mounted));
    assert_works(&machine, "write -P 5 2M 64k");
    assert!(flushes(&machine));
    site.point("web");
    image::assert_same(&image, &site.export("web", "latest", "recovered.raw", "raw"));
    site.json(&["unprotect", "web"]);
    drop(detach);

    // A read-only device, and a read-only mount, cannot be written by a guest: protecting them is refused.
    let device = tools::run("losetup", &["--find", "--show", "--read-only", image.to_str().unwrap()]);
    let _detach = Detach(device.trim().to_owned());
    site.run(&["protect", "web", "--disk", device.trim()]).assert_refused(&[device.trim()]);
    let bound = site.path("bound.img");
    File::create(&bound).unwrap();
    tools::run("mount", &["--bind", image.to_str().unwrap(), bound.to_str().unwrap()]);
    tools::run("mount", &["-o", "remount,bind,ro", bound.to_str().unwrap()]);
    // The site must see the mount: it is started where it is.
    let seeing = Site::start();
    seeing.run(&["protect", "web", "--disk", bound.to_str().unwrap()]).assert_refused(&["bound.img"]);
    tools::run("umount", &[bound.to_str().unwrap()]);
}

/// Detaches a loop device.
struct Detach(String);

impl Drop for Detach {
    fn drop(&mut self) {
        tools::outcome("losetup", &["--detach", &self.0]);
    }
}
