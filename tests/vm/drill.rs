//! Test failovers: from a point of a machine that goes on writing.

use std::path::Path;
use std::time::Duration;

use tidemark_tests::guest::{GUEST_LIMIT, Guest};
use tidemark_tests::image;
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, tools, wait};

use crate::stream::{ALIVE, Parts, SYNCED, last_number, protect};

const GIB: u64 = 1 << 30;

/// Folders of machines at the process server.
fn machines(site: &Site) -> Vec<String> {
    let folder = site.state().join("process-server/hypervisor");
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    names.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn console(result: &serde_json::Value) -> String {
    std::fs::read_to_string(text(&result["console"])).expect("the console was kept")
}

/// H15, F34: a drill boots a point, the guest itself judges it, and neither the machine nor its replication notice.
#[test]
fn a_drill_boots_the_point_and_its_chain_is_whole() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let site = Site::start();
    let Some(parts) = Parts::make(&site, "drill::a_drill_boots_the_point_and_its_chain_is_whole") else { return };
    let machine = protect(&site, "web", GIB);
    let nobody = site.run(&["failover", "test", "web"]);
    nobody.assert_refused(&["web", "no description"]);

    let mut source = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    source.says_number(SYNCED, 5);
    let before = source.next_number(SYNCED);
    let point = site.point("web");
    // Until it says this one, it does not begin the next.
    let after = source.next_number(SYNCED);
    let described = parts.describe(&site, "web", &["--sign-console", SYNCED]);
    assert!(described["hypervisor"]["version"].as_str().is_some_and(|text| text.contains("QEMU")), "{described}");

    let id = text(&point["id"]);
    let first = site.json(&["failover", "test", "web", "--point", &id]);
    assert_eq!((&first["outcome"], &first["running"]), (&"alive".into(), &true.into()), "{first}");
    assert_eq!(first["point"], point["id"]);
    let found = last_number(&console(&first), ALIVE).expect("it says how long its chain is");
    assert!((before..=after).contains(&found), "{found} records, {before} were synced before and {after} after");
    let screen = std::fs::read(text(&first["screen"])).expect("the screen was kept");
    assert!(screen.starts_with(b"\x89PNG"));
    println!("first instruction after {} s, sign after {} s", first["rto_seconds"], first["sign_seconds"]);

    // Beside it another one, of a later point, which is ended at once.
    let later = source.next_number(SYNCED);
    site.point("web");
    let second = site.json(&["failover", "test", "web", "--cleanup"]);
    let found = last_number(&console(&second), ALIVE).expect("it says how long its chain is");
    assert!(found >= later, "{found} records, {later} were synced before the point");
    assert_eq!(second["running"], false);
    assert_eq!(machines(&site).len(), 1, "the first one still runs");
    let refused = site.run(&["unprotect", "web"]);
    refused.assert_refused(&["test failover", "web"]);
    let points = site.json(&["point", "list", "web"]);
    let flags = |id: &serde_json::Value| {
        let listed = points.as_array().unwrap().iter().find(|listed| listed["id"] == *id);
        listed.map(|listed| listed["flags"].to_string()).unwrap_or_default()
    };
    assert!(flags(&first["point"]).contains("booted") && flags(&second["point"]).contains("booted"), "{points}");

    let ended = site.json(&["failover", "cleanup", "web"]);
    assert_eq!(ended["ended"], 1);
    assert!(machines(&site).is_empty(), "{:?}", machines(&site));
    assert_eq!(site.json(&["failover", "cleanup", "web"])["ended"], 0, "cleaning up may be repeated");

    // The machine went on meanwhile, and its replica is its disk.
    assert!(source.next_number(SYNCED) > later);
    source.process.kill_9();
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "latest.raw", "raw"));
}

/// A drill without its sign fails, says why, keeps what the guest said, and leaves nothing.
#[test]
fn a_drill_without_a_sign_of_life_fails_and_leaves_nothing() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let site = Site::start();
    let Some(parts) = Parts::make(&site, "drill::a_drill_without_a_sign_of_life_fails_and_leaves_nothing") else {
        return;
    };
    protect(&site, "web", GIB);
    site.point("web");
    parts.describe(&site, "web", &["--sign-console", "NEVER SAID", "--sign-limit", "3"]);
    let silent = site.run(&["failover", "test", "web"]);
    silent.assert_refused(&["no sign of life", "NEVER SAID", "3 s"]);
    let points = site.json(&["point", "list", "web"]);
    assert!(!points.to_string().contains("booted"), "{points}");
    assert!(machines(&site).is_empty());

    let wrong = site.run(&["machine", "set", "web", "--kernel", "/nowhere/vmlinuz"]);
    assert_eq!(wrong.code, 0, "{}", wrong.describe());
    site.run(&["failover", "test", "web"]).assert_refused(&["/nowhere/vmlinuz"]);
    // A file of the host that an operator of this server names, and that is there.
    assert_eq!(site.run(&["machine", "set", "web", "--kernel", "/etc/passwd"]).code, 0);
    site.run(&["failover", "test", "web"]).assert_refused(&["/etc/passwd", "no kernel"]);
    assert!(machines(&site).is_empty());
    let odd = site.run(&["machine", "set", "web", "--firmware", "uefi", "--bus", "ide"]);
    odd.assert_refused(&["UEFI", "IDE"]);
    parts.describe(&site, "web", &["--no-sign"]);
    let nowhere = site.run(&["failover", "test", "web", "--point", "2001-01-01T00:00:00Z"]);
    nowhere.assert_refused(&["2001-01-01"]);
    assert!(machines(&site).is_empty());
}

/// A process server that is killed leaves a drill whose disk is gone: its next start ends it.
#[test]
fn a_drill_that_a_crash_left_is_ended() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let mut site = Site::start_roles();
    let Some(parts) = Parts::make(&site, "drill::a_drill_that_a_crash_left_is_ended") else { return };
    protect(&site, "web", GIB);
    site.point("web");
    parts.describe(&site, "web", &["--no-sign"]);
    site.json(&["failover", "test", "web"]);
    let [machine] = &machines(&site)[..] else { panic!("one machine: {:?}", machines(&site)) };
    let pid_file = site.state().join("process-server/hypervisor").join(machine).join("pid");
    let pid = std::fs::read_to_string(pid_file).expect("it runs").trim().to_owned();
    let runs = || Path::new("/proc").join(&pid).exists();
    assert!(runs());
    site.kill_role("process-server");
    assert!(runs(), "a machine is a process of its own");
    site.start_role("process-server");
    site.wait_connected();
    wait::until("what was left is ended", GUEST_LIMIT, || (!runs() && machines(&site).is_empty()).then_some(()));
    assert_eq!(site.json(&["failover", "cleanup", "web"])["ended"], 1);
    let again = site.json(&["failover", "test", "web", "--cleanup"]);
    assert_eq!(again["outcome"], "alive");
}

/// The time to the first instruction does not grow with the disk.
#[test]
fn a_drill_starts_as_fast_from_a_large_disk() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let site = Site::start();
    let Some(parts) = Parts::make(&site, "drill::a_drill_starts_as_fast_from_a_large_disk") else { return };
    let mut measured = Vec::new();
    for (name, bytes) in [("small", GIB), ("middle", 64 * GIB), ("large", 1024 * GIB)] {
        protect(&site, name, bytes);
        site.point(name);
        parts.describe(&site, name, &["--no-sign"]);
        let mut best = f64::MAX;
        for _ in 0..3 {
            let result = site.json(&["failover", "test", name, "--cleanup"]);
            best = best.min(result["rto_seconds"].as_f64().expect("it was started"));
        }
        println!("{name}, {} GiB: first instruction after {best:.2} s", bytes / GIB);
        measured.push(best);
    }
    // What a disk's size might cost is seconds or minutes; what a busy machine adds is less.
    let slack = Duration::from_secs(2).as_secs_f64();
    assert!(measured[2] < measured[0] + slack, "{measured:?}");
    tools::counted("drills of large disks", 9);
}

/// With the first process server of its machine away, a drill runs at another one that has the point; its clean-up finds it there.
#[test]
fn h15_a_drill_runs_where_a_process_server_is_there() {
    need!("qemu-system-x86_64");
    let mut site = Site::start_roles();
    let first = site.peer_ids("process-server").remove(0);
    let second = site.start_process_server("second");
    let disk = site.path("disk.img");
    image::make_mixed(&disk, image::MIB, 1);
    site.protect("web", &[&disk], &["--process-server", &first, "--process-server", &second]);
    let holders = |point: &serde_json::Value| {
        let points = site.json(&["point", "list", "web"]);
        let listed = points.as_array().unwrap().iter().find(|listed| listed["id"] == *point).cloned();
        listed.map_or(0, |listed| listed["process_servers"].as_array().unwrap().len())
    };
    let point = wait::until("there is a point at both", GUEST_LIMIT, || {
        let made = site.run(&["point", "create", "web", "--json"]);
        let point = serde_json::from_str::<serde_json::Value>(&made.stdout).ok()?["id"].clone();
        (holders(&point) == 2).then_some(point)
    });
    // Firmware and no system: where it runs is what is asked.
    site.json(&["machine", "set", "web", "--memory", "128M"]);
    site.kill_role("process-server");
    let result = site.json(&["failover", "test", "web", "--point", &text(&point)]);
    assert_eq!((&result["point"], &result["running"]), (&point, &true.into()), "{result}");
    let kept = site.run(&["machine", "process-server", "remove", "web", &second]);
    kept.assert_refused(&["test failover", "web"]);
    assert_eq!(site.json(&["failover", "cleanup", "web"])["ended"], 1);
    site.json(&["machine", "process-server", "remove", "web", &second]);
    site.down();
}
