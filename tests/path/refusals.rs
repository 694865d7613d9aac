//! What bad input gets: an error that names the thing and says what to do, with nothing lost.

use std::os::unix::fs::FileExt;
use std::path::Path;

use tidemark_tests::block::Loop;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::site::{LIMIT, Outcome};
use tidemark_tests::{Site, need, need_root, tools, wait};

fn protect(site: &Site, name: &str, disk: &Path) -> Outcome {
    site.run(&["protect", name, "--disk", disk.to_str().unwrap(), "--json"])
}

#[test]
fn disks_that_cannot_be_protected_are_named() {
    let site = Site::start();
    let absent = site.path("absent.img");
    protect(&site, "absent", &absent).assert_refused(&["absent.img"]);

    let odd = site.path("odd.img");
    std::fs::File::create(&odd).unwrap().set_len(MIB + 7).unwrap();
    protect(&site, "odd", &odd).assert_refused(&["odd.img"]);

    let empty = site.path("empty.img");
    std::fs::File::create(&empty).unwrap();
    protect(&site, "empty", &empty).assert_refused(&["empty.img"]);

    let folder = site.path("folder.img");
    std::fs::create_dir(&folder).unwrap();
    protect(&site, "folder", &folder).assert_refused(&["folder.img"]);

    protect(&site, "no-disk", Path::new("/dev/null")).assert_refused(&["/dev/null"]);

    // Nothing of a refused machine stays.
    assert_eq!(site.json(&["status"]).as_array().map(Vec::len), Some(0));
    let disk = site.path("good.img");
    image::make_mixed(&disk, MIB, 1);
    site.protect("absent", &[&disk], &[]);
}

/// What is written through the loop device would go past the agent.
#[test]
fn a_file_that_a_loop_device_shows_is_refused() {
    need_root!("loop devices");
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 4 * MIB, 1);
    let device = Loop::attach(&disk);
    protect(&site, "web", &disk).assert_refused(&["disk.img", "in use"]);
    drop(device);
    site.protect("web", &[&disk], &[]);
}

#[test]
fn a_disk_in_use_is_refused_and_a_protected_one_is_locked() {
    need!("qemu-io");
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 4 * MIB, 1);
    // A qemu that has the disk open for writing holds its lock.
    let mut command = tools::command("qemu-io");
    command.args(["-f", "raw"]).arg(&disk).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut qemu = Owned::start("qemu-io", command, None);
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&disk).unwrap());
    wait::until("qemu holds its lock", LIMIT, || {
        std::fs::read_to_string("/proc/locks").unwrap().contains(&format!(":{inode} ")).then_some(())
    });
    protect(&site, "web", &disk).assert_refused(&["disk.img"]);
    qemu.kill_9();

    site.protect("web", &[&disk], &[]);
    let refused = tools::outcome("qemu-io", &["-f", "raw", "-c", "write 0 512", disk.to_str().unwrap()]);
    assert!(!refused.status.success(), "qemu wrote to a protected disk behind the agent's back");
    protect(&site, "other", &disk).assert_refused(&["disk.img"]);
    // The same again is no error: it prints the addresses again.
    let first = protect(&site, "web", &disk);
    assert_eq!(first.code, 0, "{}", first.describe());
}

#[test]
fn a_read_only_disk_is_refused() {
    need!("losetup");
    need_root!("a read-only loop device");
    let site = Site::start();
    let file = site.path("disk.img");
    image::make_mixed(&file, 4 * MIB, 1);
    let Some(device) = Loop::attach_read_only(&file) else {
        tools::skipped("a_read_only_disk_is_refused", "no loop device can be made here");
        return;
    };
    protect(&site, "web", device.path()).assert_refused(&[device.path().to_str().unwrap()]);
}

#[test]
fn a_file_that_a_program_writes_is_refused() {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 4 * MIB, 1);
    let writer = std::fs::File::options().append(true).open(&disk).unwrap();
    protect(&site, "web", &disk).assert_refused(&["disk.img", "in use"]);
    drop(writer);
    site.protect("web", &[&disk], &[]);
}

#[test]
fn a_disk_that_shrinks_under_us_fails_its_io_and_says_so() {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 4 * MIB, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(0, &[1; 4096]).unwrap();
    let point = site.point("web");
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(2 * MIB).unwrap();
    wait::until("the status says that the disk is not as it was", LIMIT, || {
        let _ = client.write(3 * MIB, &[2; 4096]);
        let status = site.status("web");
        (status["health"] != "normal" && status["health"] != "healthy" && status["health"] != "ok").then_some(())
    });
    // The points from before stay.
    let id = point["id"].as_str().unwrap();
    assert_eq!(site.run(&["point", "verify", "web", id]).code, 0);
}

/// A machine whose log folder is full: sending is paused, and more was written than fits. `None`: skipped.
fn full_log_folder(test: &str) -> Option<(Site, Mounted, std::path::PathBuf)> {
    let site = Site::start();
    let folder = site.path("small");
    std::fs::create_dir(&folder).unwrap();
    let mount = tools::outcome("mount", &["-t", "tmpfs", "-o", "size=320m", "tidemark-test", folder.to_str().unwrap()]);
    if !mount.status.success() {
        tools::skipped(test, "no tmpfs can be mounted here");
        return None;
    }
    let mounted = Mounted(folder.to_str().unwrap().to_owned());
    let disk = folder.join("disk.img");
    let file = std::fs::File::create(&disk).unwrap();
    // All of the disk is allocated, so that only the log runs out of room.
    file.write_all_at(&vec![1; 32 << 20], 0).unwrap();
    drop(file);
    site.json(&["policy", "create", "roomy", "--log-limit", "8G"]);
    let machine = site.protect("web", &[&disk], &["--policy", "roomy"]);
    site.wait_protected("web");
    site.json(&["pause", "web"]);
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut data = vec![0; 64 << 10];
    let mut seeded = image::Seeded(1);
    for round in 0..10 {
        for block in 0..512 {
            seeded.fill(&mut data);
            client.write(block * data.len() as u64, &data).unwrap_or_else(|error| {
                panic!("the guest's write {block} of round {round} failed: {error}\n{}", site.log_tail())
            });
        }
    }
    client.flush().unwrap();
    Some((site, mounted, disk))
}

#[test]
fn a_full_log_folder_does_not_stop_the_guest() {
    need_root!("a small file system of its own");
    let Some((site, _mounted, _)) = full_log_folder("a_full_log_folder_does_not_stop_the_guest") else { return };
    let status = site.status("web");
    assert_eq!(status["mode"], "bitmap", "320 MiB of log do not fit beside the disk: {status}");
    let problems = status["problems"].as_array().unwrap();
    assert!(problems.iter().any(|problem| problem.to_string().contains("room")), "the status says why: {status}");
}

#[test]
fn a_full_log_folder_is_emptied_by_sending() {
    need_root!("a small file system of its own");
    let Some((site, _mounted, disk)) = full_log_folder("a_full_log_folder_is_emptied_by_sending") else { return };
    site.json(&["resume", "web"]);
    wait::until("everything arrived and is logged again", LIMIT, || {
        let status = site.status("web");
        (status["state"] == "protected" && status["mode"] == "data" && status["pending_bytes"] == 0).then_some(())
    });
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}

struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = tools::command("umount").args(["--lazy", &self.0]).status();
    }
}

#[test]
fn wrong_names_and_wrong_usage_are_told_apart() {
    let site = Site::start();
    site.run(&["status", "nonesuch"]).assert_refused(&["nonesuch"]);
    site.run(&["point", "create", "nonesuch"]).assert_refused(&["nonesuch"]);
    site.run(&["unprotect", "nonesuch"]).assert_refused(&["nonesuch"]);
    for wrong in [&["nonesuch"][..], &["point", "create"], &["protect", "web"], &["status", "--nonesuch"]] {
        let outcome = site.run(wrong);
        assert_eq!(outcome.code, 2, "{}", outcome.describe());
        assert!(outcome.stderr.contains("error: "), "{}", outcome.describe());
    }
    let disk = site.path("disk.img");
    image::make_mixed(&disk, MIB, 1);
    for name in ["../escape", "a/b", "", "."] {
        let outcome = protect(&site, name, &disk);
        assert!(matches!(outcome.code, 1 | 2), "{name:?}: {}", outcome.describe());
        assert!(outcome.stderr.contains("error: "), "{name:?}: {}", outcome.describe());
    }
    site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    site.run(&["point", "verify", "web", "no-such-point"]).assert_refused(&["no-such-point"]);
    let taken = site.path("taken.raw");
    std::fs::File::create(&taken).unwrap().write_all_at(b"precious", 0).unwrap();
    site.point("web");
    site.run(&["point", "export", "web", "latest", "--to", taken.to_str().unwrap()]).assert_refused(&["taken.raw"]);
    assert_eq!(std::fs::read(&taken).unwrap(), b"precious");
    let outside = site.run(&["point", "export", "web", "latest", "--to", "/nonexistent/x.raw"]);
    outside.assert_refused(&["/nonexistent"]);
}

#[test]
fn a_site_that_does_not_run_is_named() {
    let mut site = Site::start();
    site.down();
    let refused = site.run(&["status"]);
    refused.assert_refused(&[]);
    let nowhere = site.command().env("TIDEMARK_DIR", "/nonexistent").arg("status").output().unwrap();
    assert_eq!(nowhere.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&nowhere.stderr);
    assert!(stderr.contains("/nonexistent") && stderr.contains("help: "), "{stderr}");
}
