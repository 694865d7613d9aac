//! A protected disk that is a file for any program, and served points that are.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tidemark_tests::block::{self, Loop, Mount};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, need_root, tools};

/// Says so where files cannot be had.
fn has_fuse(test: &str) -> bool {
    let found = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    if let Err(error) = &found {
        tools::skipped(test, &format!("/dev/fuse: {error}"));
    }
    found.is_ok()
}

/// Protects a disk as a file, and says where it is.
fn protect(site: &Site, disk: &Path) -> PathBuf {
    let protected = site.json(&["protect", "db", "--disk", disk.to_str().unwrap(), "--via", "fuse"]);
    let attach = &protected["disks"][0]["attach"];
    assert!(attach["nbd"].is_null(), "{protected}");
    PathBuf::from(text(&attach["file"]))
}

/// fio over a file or device: writes every block of `size` once, or verifies that it did.
fn fio(target: &Path, seed: u32, is_write: bool) {
    let (target, seed) = (format!("--filename={}", target.display()), format!("--randseed={seed}"));
    let job = ["--name=job", "--thread", "--rw=randwrite", "--bs=4k", "--size=40m", "--ioengine=libaio", "--direct=1"];
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--iodepth=16", "--end_fsync=1"];
    let mode: &[&str] = if is_write { &["--do_verify=1"] } else { &["--verify_only"] };
    let all: Vec<&str> = [&job[..], &verify, mode, &[&target, &seed]].concat();
    tools::run("fio", &all);
}

#[test]
fn a_disk_is_a_file_that_programs_and_loop_devices_write_to() {
    const NAME: &str = "a_disk_is_a_file_that_programs_and_loop_devices_write_to";
    need!("fio", "losetup", "mke2fs", "e2fsck");
    need_root!("mounts");
    if !has_fuse(NAME) {
        return;
    }
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 64 * MIB, 3);
    let file = protect(&site, &disk);
    site.wait_protected("db");
    image::assert_same(&disk, &file);

    // A program that knows nothing of us; then a loop device on the same file, with what a file system does to it.
    fio(&file, 7, true);
    let first = text(&site.point("db")["id"]);
    let at_first = site.path("first.img");
    image::copy(&disk, &at_first);
    let device = Loop::attach(&file);
    fio(device.path(), 8, true);
    tools::run("mke2fs", &["-q", "-F", "-E", "discard", device.path().to_str().unwrap(), "16M"]);
    drop(device);
    let second = text(&site.point("db")["id"]);
    let at_second = site.path("second.img");
    image::copy(&disk, &at_second);
    image::assert_same(&at_first, &site.export("db", &first, "first.raw", "raw"));
    let exported = site.export("db", &second, "second.raw", "raw");
    image::assert_same(&at_second, &exported);
    tools::run("e2fsck", &["-fn", exported.to_str().unwrap()]);

    // The agent is killed under a program that has the file open.
    fio(&file, 9, true);
    let open = OpenOptions::new().read(true).write(true).open(&file).unwrap();
    site.kill_9();
    let dead = |result: std::io::Result<usize>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    dead(open.write_at(&[1; 512], 0));
    dead(open.read_at(&mut [0; 512], 0));
    dead(File::open(&file).map(|_| 0));
    site.up();
    assert_eq!(protect(&site, &disk), file, "the address stays");
    fio(&file, 9, false);
    dead(open.write_at(&[1; 512], 0));
    OpenOptions::new().write(true).open(&file).unwrap().write_all_at(&[5; 1000], 50 * MIB + 17).unwrap();
    site.wait_protected("db");
    let third = text(&site.point("db")["id"]);
    image::assert_same(&disk, &site.export("db", &third, "third.raw", "raw"));

    // A point is a file too.
    let served = site.serve("db", &first, &[]);
    let [shown] = served.files() else { panic!("a file for each disk: {:?}", served.files()) };
    image::assert_same(&at_first, shown);
    let refused = OpenOptions::new().write(true).open(shown).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let shown = shown.clone();
    drop(served);

    site.run(&["protect", "db", "--disk", disk.to_str().unwrap(), "--via", "nbd"]).assert_refused(&["via fuse"]);
    assert_eq!(site.run(&["unprotect", "db"]).code, 0);
    assert!(!file.exists(), "nothing stays that could be taken for the disk");
    site.down();
    assert!(!shown.exists());
}

fn put(path: &Path, content: &str) {
    std::io::Write::write_all(&mut File::create(path).unwrap(), content.as_bytes()).unwrap();
}

#[test]
fn what_is_in_the_way_of_a_file_is_named() {
    need!("mount");
    need_root!("mounts");
    if !has_fuse("what_is_in_the_way_of_a_file_is_named") {
        return;
    }
    block::private_mounts();
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, MIB, 1);
    let folder = site.state().join("run/disks");
    std::fs::create_dir_all(&folder).unwrap();
    let place = folder.join("db-0");
    let disk_text = disk.to_str().unwrap().to_owned();
    let refused = || site.run(&["protect", "db", "--disk", &disk_text, "--via", "fuse"]);

    put(&place, "somebody's own");
    refused().assert_refused(&["db-0", "no empty file of ours"]);
    assert_eq!(std::fs::read_to_string(&place).unwrap(), "somebody's own");
    put(&place, "");
    let other = site.path("other");
    put(&other, "mounted there");
    let mounted = Mount::bind(&other, &place);
    refused().assert_refused(&["something is mounted on", "db-0"]);
    mounted.unmount();

    // A machine without the kernel's module: the device does not answer.
    let socket = site.path("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let gone = Mount::bind(&socket, Path::new("/dev/fuse"));
    refused().assert_refused(&["FUSE is not to be had", "/dev/fuse"]);
    gone.unmount();
    assert_eq!(site.json(&["status"]).as_array().map(Vec::len), Some(0), "nothing of a refused machine stays");
    assert_eq!(protect(&site, &disk), place);
}
