//! A store on a disk that fails a flush or a write, once: the page cache says afterwards that all is well, and the process
//! server must not believe it. What it acknowledged is on the media; what is not there is sent again.

use serde_json::json;
use tidemark_tests::block::{self, Mount, StorageDaemon};
use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number, offline, text};
use tidemark_tests::{Site, need, need_root, tools, wait};

const DISK_BYTES: u64 = 8 * MIB;
const DEVICE_BYTES: u64 = 256 * MIB;
const BLOCK: u64 = 4096;

/// One failure of `what`; the store's file system has these features.
fn fail_once(what: &str, features: &str) {
    block::private_mounts();
    let mut site = Site::prepare();
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("store.raw");
    block::make_ext4(&image, DEVICE_BYTES, features);
    let top = json!({"driver": "raw", "node-name": "top", "file": "image"});
    let daemon = StorageDaemon::start(&image, &folder.path().join("shown"), &[top]);
    let store = site.state().join("process-server");
    let mount = Mount::image(daemon.file(), &store);
    site.start_roles_here();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    let point = text(&site.point("web")["id"]);
    let reference = site.path("reference.img");
    image::copy(&disk, &reference);

    // From now on the next one fails.
    let failing = json!({"driver": "blkdebug", "node-name": "failing", "image": "image",
                         "inject-error": [{"event": "none", "iotype": what, "errno": 5, "once": true}]});
    daemon.ask("blockdev-add", &failing);
    daemon.ask("blockdev-reopen", &json!({"options": [{"driver": "raw", "node-name": "top", "file": "failing"}]}));
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut seeded = Seeded(2);
    let mut data = vec![0; BLOCK as usize];
    let mut highest = 0;
    let mut said = None;
    wait::until("the failure is noticed", LIMIT, || {
        for _ in 0..50 {
            seeded.fill(&mut data);
            client.write(seeded.below(DISK_BYTES / BLOCK) * BLOCK, &data).expect("the guest can write");
        }
        let status = site.status("web");
        highest = highest.max(durable(&status["disks"][0]["positions"]["durable"]));
        let problems = status["problems"].to_string();
        (status["state"] != "protected" && problems != "[]").then(|| said = Some(problems))
    });
    println!("{what}: {}", said.unwrap_or_default());
    // What was called durable until the end is on the media, as whoever mounts them finds.
    let status = site.status("web");
    highest = highest.max(durable(&status["disks"][0]["positions"]["durable"]));
    site.kill_role("process-server");
    mount.unmount();
    daemon.stop();
    tools::outcome("e2fsck", &["-f", "-y", image.to_str().unwrap()]);
    let mount = Mount::image(&image, &store);
    let replica = store.join("replicas").join(&machine.disks[0].id);
    let inspected = offline(&["replica", "inspect", replica.to_str().unwrap(), "--json"]);
    assert_eq!(inspected.code, 0, "{}", inspected.describe());
    let found = number(&inspected.json()["durable"]["position"]["sequence"]);
    assert!(found >= highest, "{highest} was called durable, {found} is on the media");
    // On sound media the rest is sent again.
    site.start_role("process-server");
    wait::until("a point is made again", LIMIT, || (site.run(&["point", "create", "web"]).code == 0).then_some(()));
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
    image::assert_same(&reference, &site.export("web", &point, "kept.raw", "raw"));
    client.disconnect().unwrap();
    site.down();
    mount.unmount();
}

/// The sequence of a position as the status prints it.
fn durable(position: &serde_json::Value) -> u64 {
    position.as_str().and_then(|text| text.rsplit(':').next()?.parse().ok()).unwrap_or(0)
}

#[test]
fn a_store_whose_disk_failed_one_flush_acknowledges_nothing_more() {
    need!("qemu-storage-daemon", "fusermount3", "mke2fs", "e2fsck", "losetup", "mount", "umount");
    need_root!("loop devices and mounts");
    fail_once("flush", "^metadata_csum_seed");
}

#[test]
fn a_store_whose_disk_failed_one_write_acknowledges_nothing_more() {
    need!("qemu-storage-daemon", "fusermount3", "mke2fs", "e2fsck", "losetup", "mount", "umount");
    need_root!("loop devices and mounts");
    // Without a journal nothing stops the file system: the second fsync succeeds, and the data is gone.
    fail_once("write", "^has_journal");
}
