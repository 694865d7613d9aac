//! Three guests on two hosts that belong together: a mark whose release is late is no point of the group, and a plan takes them to
//! one that is.

use std::collections::BTreeMap;

use nix::sys::signal::Signal;
use tidemark_tests::guest::Guest;
use tidemark_tests::site::text;
use tidemark_tests::{Machine, Site, image, need};

use crate::failover::There;
use crate::stream::{ALIVE, Parts, SYNCED, disk, last_number, protect_on};

const NAMES: [&str; 3] = ["db", "app", "web"];
const MIB: u64 = 1 << 20;
/// The guests write at the beginning of it.
const BYTES: u64 = 256 * MIB;

/// F23, F24, F27, F1: one plan, from a point that all three have in common; then home, each byte for byte.
#[test]
fn f23_a_plan_takes_three_machines_of_a_group_there_and_they_come_home() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let mut site = Site::start_roles();
    let name = "group::f23_a_plan_takes_three_machines_of_a_group_there_and_they_come_home";
    let Some(parts) = Parts::make(&site, name) else { return };
    let first = site.host_ids().remove(0);
    let second = site.start_host("host-2");
    let hosts = [&first, &second, &second];
    let machines: Vec<Machine> =
        NAMES.iter().zip(hosts).map(|(name, host)| protect_on(&site, name, BYTES, host)).collect();
    NAMES.iter().for_each(|name| drop(parts.describe(&site, name, &["--no-sign"])));
    site.json(&[&["group", "create", "shop"][..], &NAMES, &["--interval", "0s", "--hold-limit", "2s"]].concat());
    site.json(&["plan", "create", "shop", "--step", "machines:db", "--step", "machines:app,web"]);
    let mut guests: Vec<Guest> =
        machines.iter().map(|machine| Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd())).collect();
    for guest in &guests {
        guest.says_number(SYNCED, 3);
    }

    // One host stands still in the barrier: its release comes too late, so the point is none of the group.
    site.role("host-2").signal(Signal::SIGSTOP);
    let late = site.json(&["group", "point", "shop"]);
    site.role("host-2").signal(Signal::SIGCONT);
    assert_eq!(late["group_consistent"], false, "{late}");
    let nobody = site.run(&["plan", "run", "shop", "--unplanned", "--point", "latest-group", "--dry-run"]);
    nobody.assert_refused(&["no point that all of its machines have"]);

    let before: Vec<u64> = guests.iter().map(|guest| guest.next_number(SYNCED)).collect();
    let point = tidemark_tests::wait::until("a point of the group", tidemark_tests::site::LIMIT, || {
        let made = site.json(&["group", "point", "shop"]);
        (made["group_consistent"] == true).then(|| text(&made["id"]))
    });
    let after: Vec<u64> = guests.iter().map(|guest| guest.next_number(SYNCED)).collect();
    guests.iter_mut().for_each(|guest| guest.process.kill_9());
    // A site is lost: neither host is there.
    site.kill_role("host-2");
    site.kill_role("agent");

    let report = site.json(&["plan", "run", "shop", "--unplanned", "--point", "latest-group"]);
    assert_eq!(report["state"], "succeeded", "{report}");
    let there: BTreeMap<String, There> = There::all(&site).into_iter().map(|there| (there.name(), there)).collect();
    assert_eq!(there.len(), 3);
    for (index, name) in NAMES.iter().enumerate() {
        let all = report["machines"].as_array().expect("it is a list");
        let of = all.iter().find(|of| of["machine"] == *name).expect("each is told of");
        assert_eq!(of["point"], point.as_str(), "{of}");
        println!("{name}: first instruction after {} s", of["rto_seconds"]);
        let found = there[*name].says(ALIVE, 0);
        assert!(
            (before[index]..=after[index]).contains(&found),
            "{name}: {found}, not {}..={}",
            before[index],
            after[index]
        );
        there[*name].goes_on();
    }
    site.json(&["plan", "commit", "shop"]);

    // Home from a point that is not the latest: what came after it at home goes, and is kept aside.
    site.start_role("agent");
    site.start_host_again("host-2");
    for (machine, name) in machines.iter().zip(NAMES) {
        let reprotected = site.json(&["reprotect", name]);
        assert!(reprotected["kept_point"].is_string(), "{reprotected}");
        let synced = last_number(&there[name].console(), SYNCED).expect("it wrote");
        site.json(&["failback", name, "--shutdown-limit", "1"]);
        assert!(there[name].pid().is_none(), "it is off there");
        let home = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
        assert!(home.says_number(ALIVE, 0) >= synced, "{name}: what it had synced there is at home");
        drop(home);
        site.json(&["commit", name]);
        site.wait_protected(name);
        site.point(name);
        let exported = site.export(name, "latest", &format!("{name}.raw"), "raw");
        image::assert_same(&disk(&site, name), &exported);
    }
}
