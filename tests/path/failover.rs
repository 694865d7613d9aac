//! Failovers of disks alone: no hypervisor, so that everything but a guest is here. `vm/failover.rs` has the guests.

use std::path::Path;

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::workload::{content, nbd, protected, write};
use tidemark_tests::{Site, wait};

const BYTES: u64 = 32 * MIB;

fn sent(site: &Site) -> u64 {
    site.status("web")["sent_bytes"].as_u64().expect("it is a number")
}

/// F21: to the last change, with nothing lost; and back, as if nothing had been.
#[test]
fn f21_a_planned_failover_loses_nothing_and_its_source_goes_on_when_it_is_cancelled() {
    let site = Site::start();
    let machine = protected(&site, "web", "disk.img", BYTES, 1);
    let point = site.json(&["point", "create", "web", "--label", "before"]);
    write(machine.nbd(), MIB, 65_536, 7);

    let checked = site.run(&["failover", "planned", "web", "--disks-only", "--check"]);
    assert_eq!(checked.code, 0, "{}", checked.describe());
    site.run(&["failover", "planned", "web"]).assert_refused(&["no description"]);
    site.run(&["failover", "cancel", "web"]).assert_refused(&["has not failed over"]);
    assert_eq!(site.status("web")["state"], "protected", "nothing was begun");

    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    assert_eq!((&result["lost_seconds"], &result["lost_bytes"]), (&0.0.into(), &0.into()), "{result}");
    assert!(text(&result["direction"]).contains("from host"), "{result}");
    assert_eq!(site.status("web")["state"], "failed_over");
    assert!(Client::connect(machine.nbd()).is_err(), "the workload is kept from its disks");
    image::assert_same(&machine.disks[0].path, &content(&site, &nbd(&result), "there.img"));
    write(&nbd(&result), 0, 65_536, 9);

    let (new_disk, old_disk) = (site.path("new.img"), machine.disks[0].path.clone());
    let [new_disk, old_disk] = [new_disk, old_disk].map(|disk| disk.to_str().expect("UTF-8").to_owned());
    for (verb, reason) in [
        (vec!["unprotect", "web"], "failed over"),
        (vec!["pause", "web"], "failed over"),
        (vec!["resync", "web"], "failed over"),
        (vec!["machine", "disk", "add", "web", &new_disk], "failed over"),
        (vec!["machine", "disk", "remove", "web", &old_disk], "failed over"),
        (vec!["machine", "disk", "resize", "web"], "failed over"),
        (vec!["point", "create", "web"], "failed over"),
        (vec!["failover", "planned", "web", "--disks-only"], "failed over"),
        (vec!["failover", "unplanned", "web", "--disks-only"], "failed over"),
        (vec!["migrate", "web"], "not committed"),
    ] {
        site.run(&verb).assert_refused(&[reason]);
    }

    let before = sent(&site);
    assert_eq!(site.json(&["failover", "cancel", "web"])["source"], "goes on");
    assert!(Client::connect(&nbd(&result)).is_err(), "the disks there are gone");
    site.wait_protected("web");
    write(machine.nbd(), 2 * MIB, 65_536, 8);
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "latest.raw", "raw"));
    let status = site.status("web");
    assert_eq!(status["compare"]["compared_bytes"], 0, "{status}");
    let since = sent(&site).saturating_sub(before.min(sent(&site)));
    assert!(since < MIB, "{since} bytes were sent: no resync");
    // The points from before are there, and it can be done again.
    site.json(&["point", "verify", "web", &text(&point["id"])]);
    let again = site.json(&["failover", "planned", "web", "--disks-only"]);
    image::assert_same(&machine.disks[0].path, &content(&site, &nbd(&again), "again.img"));
}

/// F21: what is lost is said beforehand; a source that comes back is kept out; any point can be chosen until the commit.
#[test]
fn f21_an_unplanned_failover_says_what_it_loses_and_keeps_a_source_that_comes_back_out() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 2);
    let early = site.json(&["point", "create", "web", "--label", "early"]);
    let reference = site.path("early.img");
    image::copy(&machine.disks[0].path, &reference);
    site.json(&["point", "lock", "web", &text(&early["id"])]);
    write(machine.nbd(), MIB, 65_536, 7);
    let late = site.point("web");
    let last = site.path("late.img");
    image::copy(&machine.disks[0].path, &last);
    site.kill_role("agent");
    wait::until("its end is seen", LIMIT, || (site.connected() == Some(1)).then_some(()));

    site.run(&["failover", "planned", "web", "--disks-only"]).assert_refused(&["not connected", "last seen"]);
    let id = text(&early["id"]);
    let check = site.json(&["failover", "unplanned", "web", "--point", &id, "--disks-only", "--check"]);
    assert!(check["lost_bytes"].as_u64().is_some_and(|bytes| (65_536..MIB).contains(&bytes)), "{check}");
    assert!(check["lost_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{check}");
    assert!(check["source_last_seen"].is_string(), "{check}");
    assert_ne!(site.status("web")["state"], "failed_over", "nothing was begun");
    let nowhere = site.run(&["failover", "unplanned", "web", "--disks-only", "--point", "2001-01-01T00:00:00Z"]);
    nowhere.assert_refused(&["no such point", "2001-01-01"]);

    let result = site.json(&["failover", "unplanned", "web", "--disks-only"]);
    assert_eq!(result["point"], late["id"]);
    image::assert_same(&last, &content(&site, &nbd(&result), "there.img"));
    write(&nbd(&result), 3 * MIB, 65_536, 9);

    // A source that comes back belongs to a time that is over.
    site.start_role("agent");
    site.wait_connected();
    let kept_out = || Client::connect(machine.nbd()).is_err().then_some(());
    wait::until("the source is kept from its disks", LIMIT, kept_out);

    // What was acknowledged there outlives its process server.
    site.kill_role("process-server");
    site.start_role("process-server");
    site.wait_connected();
    let shown = site.json(&["failover", "show", "web"]);
    assert_eq!(nbd(&shown["running"]), nbd(&result), "at the same address");
    let expected = site.path("expected.img");
    image::copy(&last, &expected);
    patch(&expected, 3 * MIB, 9);
    image::assert_same(&expected, &content(&site, &nbd(&result), "after.img"));

    let changed = site.json(&["failover", "change-point", "web", "--point", &id]);
    image::assert_same(&reference, &content(&site, &nbd(&changed), "changed.img"));
    site.run(&["failover", "change-point", "web", "--point", "2001-01-01T00:00:00Z"]).assert_refused(&["2001-01-01"]);
    assert_eq!(site.status("web")["state"], "failed_over", "a refusal changes nothing");
    image::assert_same(&reference, &content(&site, &nbd(&changed), "still.img"));

    // Back to the source, which has what it had.
    site.json(&["failover", "cancel", "web"]);
    wait::until("the source goes on", LIMIT, || Client::connect(machine.nbd()).ok().map(drop));
    site.wait_protected("web");
    image::assert_same(&machine.disks[0].path, &last);
    write(machine.nbd(), 4 * MIB, 65_536, 5);
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "latest.raw", "raw"));
    assert_eq!(site.status("web")["compare"]["compared_bytes"], 0, "no resync");
}

fn patch(path: &Path, at: u64, byte: u8) {
    let file = std::fs::File::options().write(true).open(path).expect("the file is there");
    std::os::unix::fs::FileExt::write_all_at(&file, &[byte; 64 << 10], at).expect("it can be written");
}

/// F34: cut while the last changes are sent, a planned failover is gone on with by who asks for it again.
#[test]
fn f34_a_planned_failover_that_was_cut_is_gone_on_with() {
    let mut site = Site::start_roles();
    let machine = protected(&site, "web", "disk.img", BYTES, 4);
    site.json(&["policy", "create", "slow", "--throttle", "512K"]);
    site.protect("web", &[&machine.disks[0].path], &["--policy", "slow"]);
    // Some seconds of what does not compress.
    let mut data = vec![0; 4 << 20];
    image::Seeded(7).fill(&mut data);
    Client::connect(machine.nbd()).expect("the disk can be opened").write(MIB, &data).expect("it can be written");
    site.json(&["failover", "planned", "web", "--disks-only", "--no-wait"]);
    wait::until("the last changes are being sent", LIMIT, || {
        let shown = site.run(&["failover", "show", "web", "--json"]);
        shown.stdout.contains("\"draining\"").then_some(())
    });
    site.kill_role("config-server");
    site.start_role("config-server");
    site.wait_connected();
    assert!(Client::connect(machine.nbd()).is_err(), "the workload is kept from its disks all the while");
    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    assert_eq!(result["lost_bytes"], 0, "{result}");
    image::assert_same(&machine.disks[0].path, &content(&site, &nbd(&result), "there.img"));
}

/// F29, and complete migration: plain disks beside a running machine, the commit, and the end of the way back (F5).
#[test]
fn f5_a_migrated_machine_keeps_its_plain_disks_and_has_no_way_back() {
    let site = Site::start();
    let machine = protected(&site, "web", "disk.img", BYTES, 3);
    write(machine.nbd(), MIB, 65_536, 7);
    let result = site.json(&["failover", "planned", "web", "--disks-only"]);
    write(&nbd(&result), 5 * MIB, 65_536, 4);
    site.run(&["failover", "promote", "web", "--throttle", "0"]).assert_refused(&["no bytes a second"]);
    // So slow that it is not done before it is stopped.
    let slow = site.run(&["failover", "promote", "web", "--throttle", "1K", "--no-wait"]);
    assert_eq!(slow.code, 0, "{}", slow.describe());
    let stopped = site.json(&["failover", "promote", "web", "--stop"]);
    assert_eq!(stopped["promotion"], "no", "{stopped}");
    let promoted = site.json(&["failover", "promote", "web"]);
    assert_eq!((&promoted["promotion"], &promoted["done_bytes"]), (&"filled".into(), &BYTES.into()), "{promoted}");
    let plain = text(&promoted["disks"][0]["plain"]);
    let expected = site.path("expected.img");
    image::copy(&machine.disks[0].path, &expected);
    patch(&expected, 5 * MIB, 4);
    image::assert_same(&expected, Path::new(&plain));

    site.run(&["migrate", "web"]).assert_refused(&["not committed"]);
    assert_eq!(site.json(&["commit", "web"])["point"], result["point"]);
    assert_eq!(site.status("web")["state"], "committed");
    assert_eq!(site.json(&["commit", "web"])["point"], result["point"], "committing again changes nothing");
    site.run(&["failover", "cancel", "web"]).assert_refused(&["committed"]);
    site.run(&["failover", "change-point", "web", "--point", "latest"]).assert_refused(&["for good"]);
    site.run(&["unprotect", "web"]).assert_refused(&["for good"]);
    site.json(&["migrate", "web"]);
    site.run(&["status", "web"]).assert_refused(&["no machine"]);
    site.run(&["failover", "planned", "web", "--disks-only"]).assert_refused(&["no machine"]);
    site.run(&["reprotect", "web"]).assert_refused(&["no way home", "migration was completed"]);
    site.run(&["failback", "web"]).assert_refused(&["no way home", "migration was completed"]);
    site.run(&["reprotect", "other"]).assert_refused(&["no machine"]);
    image::assert_same(&expected, Path::new(&plain));
}
