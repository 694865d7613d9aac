//! The way home to another place than the original: another host, another folder (F8, F12, H42, H44).

use std::path::Path;

use serde_json::Value;
use tidemark_tests::block::Mount;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::workload::{content, nbd, protected, write};
use tidemark_tests::{Site, wait};

const BYTES: u64 = 32 * MIB;

fn fail_over(site: &Site) -> String {
    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    nbd(&result)
}

fn folder(site: &Site, name: &str) -> String {
    let folder = site.path(name);
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    folder.to_str().expect("paths of tests are text").to_owned()
}

/// Who knows of a disk at its agent keeps it locked; who let go of it does not.
fn is_free(disk: &Path) -> bool {
    let file = std::fs::File::options().read(true).write(true).open(disk).expect("the disk is there");
    let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}

/// A home that we moved is no other history.
fn assert_no_alarm(site: &Site) {
    let events = site.json(&["events"]);
    let diverged = |event: &&Value| event["kind"] == "history_diverged";
    let told: Vec<&Value> = events.as_array().expect("it is a list").iter().filter(diverged).collect();
    assert_eq!(told, [&Value::Null; 0], "nothing diverged");
}

/// To another host and another folder: new disks, everything crosses once, and from the commit on it is protected there. The
/// original host is away the whole time, and lets go when it comes back.
#[test]
fn h44_a_machine_goes_home_to_another_host() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 1);
    let original = machine.disks[0].path.clone();
    let second = site.start_host("host-2");
    let there = fail_over(&site);
    let before = site.path("before.img");
    image::copy(&original, &before);
    write(&there, MIB, 65_536, 9);
    let store = folder(&site, "store");
    let new = site.path("store/disk.img");

    // What is in the way is named, and nothing is begun.
    site.run(&["reprotect", "web", "--to", "nowhere"]).assert_refused(&["no host", "nowhere"]);
    site.run(&["reprotect", "web", "--store", "store"]).assert_refused(&["no absolute path"]);
    let to = ["reprotect", "web", "--to", &second, "--store", &store];
    site.run(&[&to[..], &["--method", "delta"]].concat()).assert_refused(&["new disks", "everything crosses"]);
    std::fs::File::create(&new).and_then(|file| file.set_len(MIB)).expect("a file can be made");
    site.run(&to).assert_refused(&["disk.img", "is there already"]);
    std::fs::remove_file(&new).expect("it can be removed");
    let gone = site.path("gone").to_str().expect("UTF-8").to_owned();
    site.run(&["reprotect", "web", "--to", &second, "--store", &gone]).assert_refused(&["folder", "not there"]);
    let small = site.path("small");
    let mount = Mount::memory(&small, MIB);
    let full = site.run(&["reprotect", "web", "--to", &second, "--store", small.to_str().expect("UTF-8")]);
    full.assert_refused(&["lacks room", "bytes are needed", "are free"]);
    assert!(std::fs::read_dir(&small).expect("it is there").next().is_none(), "nothing was made");
    drop(mount);
    let checked = site.json(&[&to[..], &["--check"]].concat());
    assert!((MIB..=BYTES).contains(&number(&checked["needed_bytes"])), "{checked}");
    assert_eq!((&checked["recommended"], &checked["host"]), (&"full".into(), &second.as_str().into()), "{checked}");
    assert!(!new.exists(), "it was only looked at");
    assert_eq!(site.status("web")["state"], "committed");

    site.kill_role("agent");
    wait::until("its end is seen", LIMIT, || (site.connected() == Some(2)).then_some(()));
    let done = site.json(&to);
    assert_eq!(done["method"], "full", "{done}");
    image::assert_same(&new, &content(&site, &there, "there.img"));
    site.run(&["reprotect", "web", "--store", &folder(&site, "third")]).assert_refused(&["on its way home"]);
    write(&there, 2 * MIB, 65_536, 8);
    let last = content(&site, &there, "last.img");
    // The original host comes back in the middle, and keeps everybody from its disk.
    site.start_role("agent");
    wait::until("it is back", LIMIT, || (site.connected() == Some(3)).then_some(()));
    let back = site.json(&["failback", "web"]);
    assert!(Client::connect(machine.nbd()).is_err(), "the original disk is closed");
    assert!(Client::connect(&there).is_err(), "it is off there");
    image::assert_same(&last, &new);
    image::assert_same(&before, &original);
    assert_eq!(text(&back["disks"][0]["path"]), new.to_str().expect("UTF-8"), "{back}");
    let home = text(&back["disks"][0]["attach"]["nbd"]);
    write(&home, 3 * MIB, 65_536, 7);
    site.json(&["commit", "web"]);
    let status = site.wait_protected("web");
    assert!(number(&status["compare"]["compared_bytes"]) > 0, "its history is another one: {status}");
    assert_no_alarm(&site);
    site.point("web");
    image::assert_same(&new, &site.export("web", "latest", "latest.raw", "raw"));
    wait::until("the original host let go", LIMIT, || is_free(&original).then_some(()));
    image::assert_same(&before, &original);

    // It is at home there: away and back again by delta.
    let there = fail_over(&site);
    write(&there, 5 * MIB, 4096, 5);
    let delta = site.json(&["reprotect", "web"]);
    assert_eq!((&delta["method"], number(&delta["received_bytes"])), (&"delta".into(), 4096), "{delta}");
    site.json(&["failback", "web"]);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
}

/// Another folder of the same host, taken back, and home to the original after all: what only that had is still there.
#[test]
fn h42_a_reprotect_to_another_folder_is_taken_back() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 2);
    let original = machine.disks[0].path.clone();
    site.point("web");
    site.kill_role("process-server");
    write(machine.nbd(), 2 * MIB, 65_536, 8);
    site.start_role("process-server");
    site.wait_connected();
    let failed = site.json(&["failover", "unplanned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let only_home = site.path("only-home.img");
    image::copy(&original, &only_home);
    let there = nbd(&failed);
    write(&there, MIB, 65_536, 9);
    let store = folder(&site, "store");
    site.json(&["reprotect", "web", "--store", &store]);
    let new = site.path("store/disk.img");
    let level = content(&site, &there, "there.img");
    image::assert_same(&level, &new);
    // Killed in the middle of it, and gone on with.
    site.kill_role("agent");
    site.start_role("agent");
    site.wait_connected();
    write(&there, 4 * MIB, 65_536, 3);
    let level = content(&site, &there, "later.img");
    wait::until("the new disk follows", LIMIT, || {
        image::first_difference(&level, &new).expect("both can be read").is_none().then_some(())
    });
    let cancelled: Value = site.json(&["reprotect", "cancel", "web"]);
    assert!(text(&cancelled["left_disks"]["paths"][0]).contains("store/disk.img"), "{cancelled}");
    assert_eq!(site.status("web")["state"], "committed");
    image::assert_same(&only_home, &original);
    wait::until("the new disk is nobody's", LIMIT, || is_free(&new).then_some(()));

    site.json(&["reprotect", "web", "--method", "compare"]);
    image::assert_same(&original, &content(&site, &there, "last.img"));
    site.json(&["failback", "web"]);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&original, &site.export("web", "latest", "latest.raw", "raw"));
    assert_no_alarm(&site);
}
