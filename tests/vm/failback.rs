//! Machines that go home while they write: the guest itself judges what it finds there.

use tidemark_tests::guest::Guest;
use tidemark_tests::{Site, image, need, wait};

use crate::failover::There;
use crate::stream::{ALIVE, Parts, SYNCED, protect};

const GIB: u64 = 1 << 30;
/// This guest knows no power button.
const AT_ONCE: [&str; 2] = ["--shutdown-limit", "1"];

/// F1, F4, F22, F32, H40: there, home and there again, with a guest that writes all the time; the process server is killed while
/// the home disk follows it.
#[test]
fn f1_a_machine_goes_home_and_fails_over_again() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let mut site = Site::start_roles();
    let Some(parts) = Parts::make(&site, "failback::f1_a_machine_goes_home_and_fails_over_again") else { return };
    let machine = protect(&site, "web", GIB);
    parts.describe(&site, "web", &["--no-sign"]);
    let mut source = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    let mut known = source.says_number(SYNCED, 5);
    source.process.kill_9();
    for round in 0..2 {
        site.json(&["failover", "planned", "web"]);
        let there = There::find(&site);
        assert!(there.says(ALIVE, 0) >= known, "every record that was synced is there");
        there.goes_on();
        site.json(&["commit", "web"]);
        let reprotected = site.json(&["reprotect", "web"]);
        assert_eq!(reprotected["method"], "delta", "{reprotected}");
        if round == 0 {
            site.kill_role("process-server");
            site.start_role("process-server");
            site.wait_connected();
        }
        there.goes_on();
        site.json(&["failback", "web", "--minimise-downtime"]);
        there.goes_on();
        let synced = there.says(SYNCED, 0);
        let back = site.json(&["failback", "complete", "web", AT_ONCE[0], AT_ONCE[1]]);
        println!("down for {} s, {} s of it the last changes", back["downtime_seconds"], back["delta_seconds"]);
        assert!(there.pid().is_none(), "it is off there");
        // What it was told is on its disk is at home.
        let mut home = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
        let found = home.says_number(ALIVE, 0);
        assert!(found >= synced, "{found} records at home, {synced} were synced there");
        home.says_number(SYNCED, found + 3);
        site.json(&["commit", "web"]);
        drop(there);
        site.wait_protected("web");
        known = home.says_number(SYNCED, found + 6);
        home.process.kill_9();
        site.point("web");
        let exported = site.export("web", "latest", "latest.raw", "raw");
        image::assert_same(&machine.disks[0].path, &exported);
        std::fs::remove_file(exported).expect("it can be removed");
        wait::until("nothing is left there", tidemark_tests::site::LIMIT, || {
            let folder = site.state().join("process-server/failed-over");
            folder.read_dir().is_ok_and(|mut all| all.next().is_none()).then_some(())
        });
    }
}

/// F1, F8: promoted to plain disks, which nobody sees it write to, and home from there all the same: it is moved back without a stop.
#[test]
fn f1_a_machine_on_plain_disks_goes_home() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let mut site = Site::start_roles();
    let Some(parts) = Parts::make(&site, "failback::f1_a_machine_on_plain_disks_goes_home") else { return };
    let machine = protect(&site, "web", GIB);
    parts.describe(&site, "web", &["--no-sign"]);
    site.json(&["failover", "planned", "web"]);
    let there = There::find(&site);
    there.goes_on();
    site.json(&["commit", "web"]);
    assert_eq!(site.json(&["failover", "promote", "web"])["promotion"], "plain");
    there.goes_on();
    let pid = there.pid();
    let reprotected = site.json(&["reprotect", "web", "--method", "delta"]);
    assert_eq!(reprotected["method"], "compare", "what it wrote is not known: {reprotected}");
    there.goes_on();
    assert_eq!(there.pid(), pid, "it was never stopped");
    // What home does not have is not forgotten with the process server.
    site.kill_role("process-server");
    site.start_role("process-server");
    site.wait_connected();
    let synced = there.goes_on();
    site.json(&["failback", "web", AT_ONCE[0], AT_ONCE[1]]);
    assert!(there.pid().is_none(), "it is off there");
    let home = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    assert!(home.says_number(ALIVE, 0) >= synced);
    drop(home);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "latest.raw", "raw"));
}
