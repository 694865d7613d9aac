//! Home disks that are block devices: F11, and F20 of whoever holds one.

use tidemark_tests::block::{self, Loop};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::LIMIT;
use tidemark_tests::workload::{content, nbd, write};
use tidemark_tests::{Site, need, need_root, tools, wait};

const BYTES: u64 = 32 * MIB;

/// F11: a machine whose disk is a block device goes there and home, onto the device that is there; F20: not while somebody at home
/// has the device.
#[test]
fn f11_a_machine_goes_home_onto_the_block_device_that_is_there() {
    need!("losetup", "mke2fs", "mount", "umount", "qemu-io");
    need_root!("loop devices and mounts");
    block::private_mounts();
    let mut site = Site::start_roles();
    let image = site.path("device.img");
    block::make_ext4(&image, BYTES, "^has_journal");
    let device = Loop::attach(&image);
    let path = device.path().to_owned();
    let machine = site.protect("web", &[&path], &[]);
    site.wait_protected("web");
    write(machine.nbd(), 20 * MIB, 65_536, 7);
    let planned = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let there = nbd(&planned);
    write(&there, 24 * MIB, 65_536, 9);

    // Somebody at home makes use of it while its agent is away.
    site.kill_role("agent");
    let before = site.path("before.img");
    let folder = site.path("mounted");
    std::fs::create_dir(&folder).expect("a folder can be made");
    let [device_text, folder_text] = [&path, &folder].map(|path| path.to_str().expect("UTF-8"));
    tools::run("mount", &["-o", "ro", device_text, folder_text]);
    image::copy(&image, &before);
    site.start_role("agent");
    site.wait_connected();
    site.run(&["reprotect", "web"]).assert_refused(&[device_text, "in use"]);
    assert_eq!(site.status("web")["state"], "committed", "nothing was begun");
    image::assert_same(&before, &image);
    tools::run("umount", &[folder_text]);

    let reprotected = wait::until("its agent has it again", LIMIT, || {
        let done = site.run(&["reprotect", "web", "--method", "delta", "--json"]);
        (done.code == 0).then(|| done.json())
    });
    assert_eq!(reprotected["method"], "delta", "{reprotected}");
    image::assert_same(&image, &content(&site, &there, "there.img"));
    write(&there, 28 * MIB, 65_536, 8);
    let last = content(&site, &there, "last.img");
    site.json(&["failback", "web"]);
    image::assert_same(&last, &image);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    tools::qemu_io(machine.nbd(), &["write -P 6 30M 64k", "flush"]);
    site.point("web");
    image::assert_same(&image, &site.export("web", "latest", "latest.raw", "raw"));
    site.down();
}
