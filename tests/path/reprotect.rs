//! The way home, of disks alone: reprotect, failback, commit, and replication from home again (F1, F4, F8, F18, F32, H40 to H43).

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::workload::{content, nbd, protected, write};
use tidemark_tests::{Site, wait};

const BYTES: u64 = 32 * MIB;
const BLOCK: u64 = 4096;

fn copy(site: &Site, from: &Path, name: &str) -> PathBuf {
    let to = site.path(name);
    image::copy(from, &to);
    to
}

fn are_same(one: &Path, other: &Path) -> bool {
    image::first_difference(one, other).expect("both can be read").is_none()
}

fn fail_over(site: &Site) -> String {
    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    nbd(&result)
}

/// As close to the machine as it gets while nobody writes.
fn wait_level(home: &Path, there: &Path) {
    wait::until("the home disk follows", LIMIT, || are_same(home, there).then_some(()));
}

/// F1, F4, F18, F32, H40, H43: the whole way there, home and there again, byte for byte, by delta.
#[test]
fn f1_a_machine_goes_there_and_home_and_there_again() {
    let site = Site::start();
    let machine = protected(&site, "web", "disk.img", BYTES, 1);
    let home = machine.disks[0].path.clone();
    write(machine.nbd(), MIB, 65_536, 7);
    site.run(&["reprotect", "web"]).assert_refused(&["has not failed over"]);
    site.run(&["failback", "web"]).assert_refused(&["has not failed over"]);
    let planned = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.run(&["reprotect", "web"]).assert_refused(&["cannot be reprotected"]);
    site.json(&["commit", "web"]);
    let there = nbd(&planned);
    // One part of 4 KiB at a time, all over the disk.
    let mut changed = 0;
    for at in (0..BYTES).step_by(512 << 10) {
        write(&there, at + BLOCK, BLOCK, 0xa5);
        changed += BLOCK;
    }
    site.run(&["failback", "web"]).assert_refused(&["not reprotected"]);
    let checked = site.json(&["reprotect", "web", "--check"]);
    assert_eq!((&checked["recommended"], number(&checked["changed_bytes"])), (&"delta".into(), changed), "{checked}");
    let reprotected = site.json(&["reprotect", "web", "--method", "delta"]);
    let received = number(&reprotected["received_bytes"]);
    assert_eq!(number(&reprotected["compared_bytes"]), changed, "only what changed is even looked at: {reprotected}");
    assert!(received * 100 <= changed * 105, "{received} bytes for {changed} that changed");
    assert_eq!(received, changed, "{reprotected}");
    assert_eq!(site.status("web")["state"], "reprotected");
    image::assert_same(&home, &content(&site, &there, "there.img"));
    assert!(Client::connect(machine.nbd()).is_err(), "nobody opens the home disk");
    // It follows.
    write(&there, 5 * MIB, 8192, 3);
    let second = content(&site, &there, "second.img");
    wait_level(&home, &second);
    for (verb, reason) in [
        (vec!["unprotect", "web"], "reprotected"),
        (vec!["migrate", "web"], "not committed"),
        (vec!["point", "create", "web"], "reprotected"),
        (vec!["failback", "complete", "web"], "no failback was begun"),
        (vec!["failover", "cancel", "web"], "committed"),
    ] {
        site.run(&verb).assert_refused(&[reason]);
    }

    // Home: close while it runs, then down, the last changes, and up.
    let ready = site.json(&["failback", "web", "--minimise-downtime"]);
    assert_eq!(ready["ready"], true, "{ready}");
    assert_eq!(site.status("web")["state"], "failing_back");
    site.run(&["commit", "web"]).assert_refused(&["nothing to commit yet"]);
    write(&there, 6 * MIB, 65_536, 9);
    let last = content(&site, &there, "last.img");
    let back = site.json(&["failback", "complete", "web"]);
    assert!(Client::connect(&there).is_err(), "it is off there");
    assert_eq!(text(&back["disks"][0]["attach"]["nbd"]), machine.nbd(), "the address at home is the one of before");
    image::assert_same(&last, &home);
    assert_eq!(site.status("web")["state"], "failed_back");
    write(machine.nbd(), 7 * MIB, 65_536, 4);
    assert_eq!(site.json(&["commit", "web"])["home"], true);
    site.wait_protected("web");
    assert!(!site.state().join("process-server/failed-over").read_dir().is_ok_and(|mut all| all.next().is_some()));
    site.point("web");
    let status = site.status("web");
    assert_eq!(status["compare"]["compared_bytes"], 0, "replication from home goes on with what is known: {status}");
    image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));

    // And there again.
    let there = fail_over(&site);
    write(&there, 9 * MIB, 65_536, 5);
    site.json(&["reprotect", "web"]);
    let last = content(&site, &there, "again.img");
    site.json(&["failback", "web"]);
    site.json(&["commit", "web"]);
    image::assert_same(&last, &home);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&home, &site.export("web", "latest", "again.raw", "raw"));
}

/// 3.9: from a point that is not the latest, with changes that only home has: they are kept, and nothing of them is left over.
#[test]
fn f1_home_from_a_point_that_is_not_the_latest() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 2);
    let home = machine.disks[0].path.clone();
    let early = site.json(&["point", "create", "web", "--label", "early"]);
    write(machine.nbd(), MIB, 65_536, 7);
    site.point("web");
    // Never sent: the process server is away while it is written.
    site.kill_role("process-server");
    write(machine.nbd(), 2 * MIB, 65_536, 8);
    site.kill_role("agent");
    site.start_role("process-server");
    wait::until("the process server is back", LIMIT, || (site.connected() == Some(1)).then_some(()));
    let only_home = copy(&site, &home, "only-home.img");
    let failed = site.json(&["failover", "unplanned", "web", "--point", &text(&early["id"]), "--disks-only"]);
    site.json(&["commit", "web"]);
    let there = nbd(&failed);
    write(&there, 3 * MIB, 65_536, 9);
    let expected = content(&site, &there, "there.img");

    // F31: the agent has not registered again; it is waited for, and nothing is overwritten meanwhile.
    let waiting = site.run(&["reprotect", "web", "--method", "delta", "--no-wait", "--json"]);
    let job = text(&serde_json::from_str::<Value>(&waiting.stdout).expect("a job")["job"]);
    wait::until("who waits is told since when", LIMIT, || {
        let shown = site.json(&["job", "show", &job]);
        let told = |step: &Value| text(&step["name"]).contains("has not registered yet (last seen");
        shown["steps"].as_array().is_some_and(|steps| steps.iter().any(told)).then_some(())
    });
    site.start_role("agent");
    let done = wait::until("the reprotect ends", LIMIT, || {
        let shown = site.json(&["job", "show", &job]);
        (shown["state"] != "running").then_some(shown)
    });
    assert_eq!(done["state"], "succeeded", "{done}");
    image::assert_same(&expected, &home);
    let kept = text(&done["result"]["kept_point"]);
    image::assert_same(&only_home, &site.export("web", &kept, "kept.raw", "raw"));

    // Taken back: home has what only it had.
    let cancelled = site.json(&["reprotect", "cancel", "web"]);
    assert!(number(&cancelled["given_back_bytes"]) >= 3 * 65_536, "{cancelled}");
    image::assert_same(&only_home, &home);
    assert_eq!(site.status("web")["state"], "committed");
    site.run(&["reprotect", "cancel", "web"]).assert_refused(&["no reprotect to take back"]);

    // By compare this time, and home for good.
    let compared = site.json(&["reprotect", "web", "--method", "compare"]);
    // What is zeroes there crosses as that.
    assert!((65_536..=3 * 65_536).contains(&number(&compared["received_bytes"])), "{compared}");
    image::assert_same(&expected, &home);
    site.json(&["failback", "web"]);
    image::assert_same(&expected, &home);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));
    image::assert_same(&only_home, &site.export("web", &kept, "kept-still.raw", "raw"));
}

/// Each role is killed while the machine is on its way home, and it gets there all the same.
#[test]
fn each_role_is_killed_on_the_way_home() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 3);
    let home = machine.disks[0].path.clone();
    let there = fail_over(&site);
    write(&there, MIB, 4 * MIB, 9);
    for (round, role) in ["agent", "process-server", "config-server"].into_iter().enumerate() {
        let started = site.run(&["reprotect", "web", "--method", "compare", "--no-wait", "--json"]);
        assert_eq!(started.code, 0, "{}", started.describe());
        write(&there, (8 + round as u64) * MIB, MIB, round as u8);
        site.kill_role(role);
        site.start_role(role);
        site.wait_connected();
    }
    site.json(&["reprotect", "web"]);
    let level = content(&site, &there, "there.img");
    wait_level(&home, &level);
    // What home does not have yet is known in memory alone: after a restart it is everything that was written.
    write(&there, 13 * MIB, MIB, 0x33);
    site.kill_role("process-server");
    site.start_role("process-server");
    site.wait_connected();
    let level = content(&site, &there, "unsent.img");
    wait_level(&home, &level);
    write(&there, 12 * MIB, MIB, 0x77);
    let level = content(&site, &there, "last.img");
    site.json(&["failback", "web", "--minimise-downtime"]);
    for role in ["agent", "process-server"] {
        let started = site.run(&["failback", "complete", "web", "--no-wait", "--json"]);
        assert_eq!(started.code, 0, "{}", started.describe());
        site.kill_role(role);
        site.start_role(role);
        site.wait_connected();
    }
    let back = site.json(&["failback", "complete", "web"]);
    assert_eq!(text(&back["disks"][0]["attach"]["nbd"]), machine.nbd(), "{back}");
    image::assert_same(&level, &home);
    assert!(Client::connect(&there).is_err(), "it is off there");
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    write(machine.nbd(), 0, 4096, 1);
    site.point("web");
    image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));
}

/// H40: cancelled at every step, it goes on where it ran, with what it had; also when it was home and wrote there.
#[test]
fn h40_a_failback_is_cancelled_at_every_step() {
    let site = Site::start();
    let machine = protected(&site, "web", "disk.img", BYTES, 4);
    let home = machine.disks[0].path.clone();
    let there = fail_over(&site);
    write(&there, MIB, 65_536, 9);
    site.json(&["reprotect", "web", "--method", "full"]);
    image::assert_same(&home, &content(&site, &there, "there.img"));
    site.run(&["failback", "cancel", "web"]).assert_refused(&["no failback to cancel"]);
    assert_eq!(
        site.run(&["failback", "web", "--minimise-downtime", "--full-download"]).code,
        2,
        "it is one or the other"
    );
    // Close, and not gone.
    site.json(&["failback", "web", "--minimise-downtime"]);
    assert_eq!(site.json(&["failback", "cancel", "web"])["state"], "reprotected");
    write(&there, 2 * MIB, 65_536, 8);
    // Gone, and back.
    site.json(&["failback", "web"]);
    write(machine.nbd(), 3 * MIB, 65_536, 0x11);
    let at_home = copy(&site, &home, "at-home.img");
    let before = content(&site, machine.nbd(), "nbd.img");
    image::assert_same(&at_home, &before);
    assert_eq!(site.json(&["failback", "cancel", "web"])["state"], "reprotected");
    assert!(Client::connect(machine.nbd()).is_err(), "home is closed");
    let again = content(&site, &there, "again.img");
    assert!(!are_same(&again, &at_home), "what it wrote at home is not there");
    wait_level(&home, &again);
    let kept = text(&site.json(&["failover", "show", "web"])["failover"]["home"]["kept"]);
    image::assert_same(&at_home, &site.export("web", &kept, "kept.raw", "raw"));
    // Everything once more, while it is off.
    write(&there, 4 * MIB, 65_536, 7);
    let last = content(&site, &there, "last.img");
    let back = site.json(&["failback", "web", "--full-download"]);
    assert!(number(&back["received_bytes"]) > 2 * MIB, "{back}");
    image::assert_same(&last, &home);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));
}

/// F8: the original is gone: new disks are made, everything crosses, and they follow.
#[test]
fn f8_a_machine_whose_home_disks_are_gone_goes_home_to_new_ones() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 6);
    let home = machine.disks[0].path.clone();
    site.point("web");
    site.kill_role("agent");
    std::fs::remove_file(&home).expect("it can be removed");
    let failed = site.json(&["failover", "unplanned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let there = nbd(&failed);
    write(&there, MIB, 65_536, 9);
    site.start_role("agent");
    site.wait_connected();
    site.run(&["reprotect", "web"]).assert_refused(&["disk.img"]);
    assert!(!home.exists(), "nobody asked for a new one");
    let full = site.json(&["reprotect", "web", "--method", "full"]);
    assert_eq!(number(&full["compared_bytes"]), 0, "there is nothing to compare with: {full}");
    let level = content(&site, &there, "there.img");
    image::assert_same(&level, &home);
    site.json(&["failback", "web"]);
    image::assert_same(&level, &home);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));
}

/// F20: nothing is written below a snapshot; F9, F12: places that it cannot go to are named.
#[test]
fn f20_a_home_disk_with_a_snapshot_is_left_alone() {
    let site = Site::start();
    let machine = protected(&site, "web", "disk.img", BYTES, 5);
    let home = machine.disks[0].path.clone();
    let there = fail_over(&site);
    write(&there, MIB, 65_536, 9);
    let before = copy(&site, &home, "before.img");
    // A qcow2 overlay: magic, version 3, where the name of what is below it lies, and how long that is.
    let overlay = home.with_file_name("snapshot.qcow2");
    let name = b"disk.img";
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.extend_from_slice(&112u64.to_be_bytes());
    header.extend_from_slice(&(name.len() as u32).to_be_bytes());
    header.resize(112, 0);
    header.extend_from_slice(name);
    let file = std::fs::File::create(&overlay).expect("a file can be made");
    file.write_all_at(&header, 0).expect("it can be written");
    site.run(&["reprotect", "web"]).assert_refused(&["has a snapshot", "snapshot.qcow2"]);
    assert_eq!(site.status("web")["state"], "committed", "nothing was begun");
    image::assert_same(&before, &home);
    std::fs::remove_file(&overlay).expect("it can be removed");
    site.run(&["reprotect", "web", "--to", "elsewhere"]).assert_refused(&["elsewhere"]);
    site.run(&["reprotect", "web", "--process-server", "other"]).assert_refused(&["runs at process server"]);
    assert_eq!(site.run(&["reprotect", "web", "--method", "magic"]).code, 2, "there is no such method");
    site.json(&["reprotect", "web"]);
    image::assert_same(&home, &content(&site, &there, "there.img"));
}
