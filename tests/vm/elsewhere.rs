//! Homes that are not the one it left, and a home without where it ran: the guest itself judges what it finds there.

use std::path::Path;

use serde_json::Value;
use tidemark_tests::guest::{GUEST_LIMIT, Guest};
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::{Site, image, need, wait};

use crate::failover::There;
use crate::stream::{ALIVE, Parts, SYNCED, protect};

const GIB: u64 = 1 << 30;
/// This guest knows no power button.
const AT_ONCE: [&str; 2] = ["--shutdown-limit", "1"];

fn boot(site: &Site, parts: &Parts, nbd: &str) -> Guest {
    Guest::boot(site, &parts.kernel, &parts.initrd, nbd)
}

/// Its replica and its home disk are the same, and nobody was told of two histories.
fn assert_level(site: &Site, home: &Path, round: &str) {
    site.wait_protected("web");
    site.point("web");
    let exported = site.export("web", "latest", &format!("{round}.raw"), "raw");
    image::assert_same(home, &exported);
    std::fs::remove_file(exported).expect("it can be removed");
    let events = site.json(&["events"]);
    let diverged = |event: &&Value| event["kind"] == "history_diverged";
    let told: Vec<&Value> = events.as_array().expect("it is a list").iter().filter(diverged).collect();
    assert_eq!(told, [&Value::Null; 0], "nothing diverged");
}

/// H44, F8, F12: a guest that writes all the time goes home to another host, whose agent is killed on the way; is protected there
/// without an alarm, fails over from there, and goes back there when where it ran is lost (F31).
#[test]
fn h44_a_machine_goes_home_to_another_host_and_back_there_without_where_it_ran() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let mut site = Site::start_roles();
    let name = "elsewhere::h44_a_machine_goes_home_to_another_host_and_back_there_without_where_it_ran";
    let Some(parts) = Parts::make(&site, name) else { return };
    let machine = protect(&site, "web", GIB);
    let host = site.start_host("host-2");
    parts.describe(&site, "web", &["--no-sign"]);
    let mut source = boot(&site, &parts, machine.nbd());
    source.says_number(SYNCED, 5);
    source.process.kill_9();
    site.json(&["failover", "planned", "web"]);
    let there = There::find(&site);
    there.goes_on();
    site.json(&["commit", "web"]);
    let original = site.path("original.img");
    image::copy(&machine.disks[0].path, &original);

    let store = site.path("store");
    std::fs::create_dir(&store).expect("a folder can be made");
    let to = ["reprotect", "web", "--to", &host, "--store", store.to_str().expect("UTF-8")];
    let begun = site.run(&[&to[..], &["--no-wait", "--json"]].concat());
    assert_eq!(begun.code, 0, "{}", begun.describe());
    let new = store.join("web.img");
    wait::until("that is its home", LIMIT, || (site.status("web")["state"] == "reprotecting").then_some(()));
    site.kill_role("host-2");
    wait::until("its end is seen", LIMIT, || (site.connected() == Some(2)).then_some(()));
    site.start_host_again("host-2");
    assert_eq!(site.json(&["reprotect", "web"])["method"], "full");
    let synced = there.goes_on();
    let back = site.json(&["failback", "web", AT_ONCE[0], AT_ONCE[1]]);
    assert!(there.pid().is_none(), "it is off there");
    assert_eq!(text(&back["disks"][0]["path"]), new.to_str().expect("UTF-8"), "{back}");
    let home = text(&back["disks"][0]["attach"]["nbd"]);
    let mut guest = boot(&site, &parts, &home);
    let found = guest.says_number(ALIVE, 0);
    assert!(found >= synced, "{found} records at home, {synced} were synced there");
    // It writes while its new disk is compared with the replica of the old one.
    assert_eq!(site.run(&["commit", "web", "--no-wait", "--json"]).code, 0);
    drop(there);
    site.wait_protected("web");
    let known = guest.says_number(SYNCED, found + 5);
    guest.process.kill_9();
    site.wait_sent("web");
    assert_level(&site, &new, "moved");
    image::assert_same(&original, &machine.disks[0].path);

    // Away from there, and home again while everything that it ran on is gone.
    site.json(&["failover", "planned", "web"]);
    let there = There::find(&site);
    assert!(there.says(ALIVE, 0) >= known);
    there.goes_on();
    site.json(&["commit", "web"]);
    let at_least = there.goes_on();
    assert_eq!(site.json(&["reprotect", "web"])["method"], "delta");
    there.goes_on();
    site.kill_role("process-server");
    wait::until("its end is seen", LIMIT, || (site.connected() == Some(2)).then_some(()));
    let back = site.json(&["failback", "web", "--unplanned"]);
    assert!(back["lost_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{back}");
    assert_eq!(text(&back["disks"][0]["attach"]["nbd"]), home, "{back}");
    let mut guest = boot(&site, &parts, &home);
    let found = guest.says_number(ALIVE, 0);
    assert!(found >= at_least, "{found} records at home, it had {at_least} when it was protected there");
    guest.says_number(SYNCED, found + 3);
    site.start_role("process-server");
    site.wait_connected();
    wait::until("what runs there is turned off", GUEST_LIMIT, || there.pid().is_none().then_some(()));
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    guest.says_number(SYNCED, found + 6);
    guest.process.kill_9();
    site.wait_sent("web");
    assert_level(&site, &new, "taken");
}
