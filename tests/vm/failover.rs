//! Machines that fail over while they write: the guest itself judges what it finds.

use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tidemark_tests::guest::{GUEST_LIMIT, Guest};
use tidemark_tests::site::text;
use tidemark_tests::{Site, image, need, wait};

use crate::stream::{ALIVE, Parts, SYNCED, last_number, protect};

const GIB: u64 = 1 << 30;

/// The machine that a process server runs. Machines outlive it, so they are ended with the test.
pub struct There(PathBuf);

impl There {
    /// The only one.
    #[track_caller]
    pub fn find(site: &Site) -> Self {
        let mut all = Self::all(site).into_iter();
        let found = all.next().expect("a machine");
        assert!(all.next().is_none(), "one machine");
        found
    }

    /// All of them.
    pub fn all(site: &Site) -> Vec<Self> {
        let folder = site.state().join("process-server/hypervisor");
        let all = std::fs::read_dir(folder).expect("machines have a folder").flatten().map(|entry| entry.path());
        all.filter(|path| path.is_dir()).map(Self).collect()
    }

    /// As it is called there.
    pub fn name(&self) -> String {
        let kept = std::fs::read(self.0.join("machine.json")).expect("it was defined");
        let kept: serde_json::Value = serde_json::from_slice(&kept).expect("it is JSON");
        text(&kept["machine"]["name"])
    }

    pub fn pid(&self) -> Option<i32> {
        std::fs::read_to_string(self.0.join("pid")).ok()?.trim().parse().ok()
    }

    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.0.join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for a number behind a line's beginning, at least this one.
    #[track_caller]
    pub fn says(&self, beginning: &str, at_least: u64) -> u64 {
        let what = format!("it says {beginning:?} from {at_least} on");
        let found = || {
            let console = self.console();
            assert!(!console.contains("FAILED"), "{console}");
            last_number(&console, beginning).filter(|number| *number >= at_least)
        };
        wait::until(&what, GUEST_LIMIT, found)
    }

    /// It goes on.
    #[track_caller]
    pub fn goes_on(&self) -> u64 {
        let now = last_number(&self.console(), SYNCED).unwrap_or(0);
        self.says(SYNCED, now + 3)
    }
}

impl Drop for There {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// F1, F29: planned, with nothing lost; the process server is killed under the running machine; plain disks without a stop;
/// the commit, and the end of the migration.
#[test]
fn f1_a_machine_fails_over_and_goes_on_through_a_kill_and_a_promotion() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let mut site = Site::start_roles();
    let name = "failover::f1_a_machine_fails_over_and_goes_on_through_a_kill_and_a_promotion";
    let Some(parts) = Parts::make(&site, name) else { return };
    let machine = protect(&site, "web", GIB);
    parts.describe(&site, "web", &["--no-sign"]);
    let mut source = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    source.says_number(SYNCED, 5);
    site.point("web");
    let synced = source.next_number(SYNCED);
    source.process.kill_9();

    let result = site.json(&["failover", "planned", "web"]);
    let there = There::find(&site);
    assert_eq!((&result["lost_bytes"], &result["power"]), (&0.into(), &"on".into()), "{result}");
    println!("first instruction after {} s", result["rto_seconds"]);
    assert!(there.says(ALIVE, 0) >= synced, "every record that was synced is there");
    there.goes_on();
    // Its disks wait for the process server, and nothing that the guest was told is on them is lost.
    site.kill_role("process-server");
    let before = last_number(&there.console(), SYNCED).expect("it wrote");
    site.start_role("process-server");
    site.wait_connected();
    there.says(SYNCED, before + 3);

    let pid = there.pid();
    let promoted = site.json(&["failover", "promote", "web"]);
    assert_eq!(promoted["promotion"], "plain", "{promoted}");
    there.goes_on();
    assert_eq!(there.pid(), pid, "it was never stopped");
    assert_eq!(site.json(&["failover", "show", "web"])["running"]["power"], "on");
    site.json(&["commit", "web"]);
    // Without its replica, and without the process server.
    site.json(&["migrate", "web"]);
    site.kill_role("process-server");
    let last = there.goes_on();
    assert_eq!(there.pid(), pid);
    // The plain disk alone is the machine's disk: another boot finds the whole chain.
    kill(Pid::from_raw(pid.expect("it runs")), Signal::SIGKILL).expect("it runs");
    drop(there);
    let plain = text(&promoted["disks"][0]["plain"]);
    let again = Guest::boot_file(&site, &parts.kernel, &parts.initrd, plain.as_ref());
    assert!(again.says_number(ALIVE, 0) >= last);
}

/// F21: unplanned, from a point that is not the latest; another point; promoted, and cancelled all the same: the source goes
/// on as it was.
#[test]
fn f21_an_unplanned_failover_goes_to_any_point_and_back() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let site = Site::start();
    let name = "failover::f21_an_unplanned_failover_goes_to_any_point_and_back";
    let Some(parts) = Parts::make(&site, name) else { return };
    let machine = protect(&site, "web", GIB);
    parts.describe(&site, "web", &["--no-sign"]);
    let mut source = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    let before = source.says_number(SYNCED, 5);
    let early = site.point("web");
    let after = source.next_number(SYNCED);
    site.json(&["point", "lock", "web", &text(&early["id"])]);
    let late = source.next_number(SYNCED);
    site.point("web");
    source.process.kill_9();
    site.wait_sent("web");
    let reference = site.path("reference.img");
    image::copy(&machine.disks[0].path, &reference);

    let result = site.json(&["failover", "unplanned", "web", "--point", &text(&early["id"])]);
    let there = There::find(&site);
    assert!(result["lost_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{result}");
    let found = there.says(ALIVE, 0);
    assert!((before..=after).contains(&found), "{found} records, {before} before the point and {after} after");
    there.goes_on();
    let changed = site.json(&["failover", "change-point", "web", "--point", "latest"]);
    assert_eq!(changed["power"], "on", "{changed}");
    assert!(there.says(ALIVE, 0) >= late, "the later point has more");
    there.goes_on();
    site.json(&["failover", "promote", "web"]);
    there.goes_on();
    let back = site.json(&["failover", "change-point", "web", "--point", &text(&early["id"])]);
    assert_eq!(back["point"], early["id"], "promoted, and yet any point can be chosen");
    assert!((before..=after).contains(&there.says(ALIVE, 0)));
    site.json(&["failover", "cancel", "web"]);
    assert!(there.pid().is_none(), "the machine is gone");
    site.wait_protected("web");
    image::assert_same(&reference, &machine.disks[0].path);
    let source = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    assert!(source.says_number(ALIVE, 0) >= late, "the source goes on with what it had");
}
