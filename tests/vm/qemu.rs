//! A machine that runs already, under a QEMU that knows nothing of us.

use std::path::PathBuf;

use tidemark_tests::guest::{GUEST_LIMIT, Guest};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, owner, tools, wait};

use crate::failover::There;
use crate::stream::{ALIVE, Parts, SHUT_DOWN, SYNCED};

/// A disk of 48 MiB with an empty file system, in a qcow2 image.
fn make_image(site: &Site) -> PathBuf {
    let (raw, image, empty) = (site.path("made.raw"), site.path("web.qcow2"), site.path("empty"));
    std::fs::create_dir_all(&empty).expect("a folder can be made");
    image::make_ext4(&raw, 48 * MIB, &empty);
    let mut convert = tools::command("qemu-img");
    convert.args(["convert", "-O", "qcow2"]).arg(&raw).arg(&image);
    assert!(convert.status().expect("it runs").success());
    image
}

fn assert_nothing_missed(site: &Site) {
    let events = site.run(&["events", "--json"]);
    assert!(!events.stdout.contains("did not see every write"), "{}", events.stdout);
    assert!(!events.stdout.contains("nobody watched"), "{}", events.stdout);
}

/// H36: a machine that runs under a QEMU of others fails over by plan: it is shut down by whoever runs it, its image is kept from
/// everybody and read, and nothing is lost; taken back, its QEMU goes on with it, and nothing is compared.
#[test]
fn h36_a_machine_that_runs_already_fails_over_by_plan_and_goes_on_when_that_is_taken_back() {
    need!("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-storage-daemon", "busybox", "mke2fs");
    let name = "qemu::h36_a_machine_that_runs_already_fails_over_by_plan_and_goes_on_when_that_is_taken_back";
    let site = Site::start();
    let Some(parts) = Parts::make(&site, name) else { return };
    let (image, folder) = (make_image(&site), site.path("source"));
    std::fs::create_dir(&folder).expect("a folder can be made");
    let boot = || Guest::boot_tracked(&site, &parts.kernel, &parts.initrd, &image, &folder);
    let mut source = boot();
    source.says_number(SYNCED, 3);
    site.json(&["protect", "web", "--disk", image.to_str().expect("paths of tests are text"), "--via", "qemu"]);
    site.wait_protected("web");
    parts.describe(&site, "web", &["--no-sign"]);
    let at = folder.display();
    owner::settings(&site, "web", &format!("[qemu]\nqmp = \"{at}/qmp.sock\"\nguest-agent = \"{at}/agent.sock\"\n"));
    let checked = site.json(&["failover", "planned", "web", "--check"]);
    assert_eq!(checked["source"]["power"], "on", "{checked}");

    let before = source.next_number(SYNCED);
    let result = site.json(&["failover", "planned", "web"]);
    assert_eq!((&result["source"]["stopped"], &result["lost_bytes"]), (&"by_guest".into(), &0.into()), "{result}");
    assert!(result["not_fenced"].is_null(), "{result}");
    let last = source.says_number(SHUT_DOWN, before);
    wait::until("its QEMU ends", GUEST_LIMIT, || source.process.ending());
    let there = There::find(&site);
    assert_eq!(there.says(ALIVE, 0), last, "what it held in memory is there as well, and nothing came after it");
    assert_nothing_missed(&site);
    let mut open = tools::command("qemu-io");
    let open = open.args(["-f", "qcow2", "-c", "read 0 512"]).arg(&image).output().expect("it runs");
    assert!(String::from_utf8_lossy(&open.stderr).contains("lock"), "no QEMU gets at it: {open:?}");

    let back = site.json(&["failover", "cancel", "web"]);
    assert!(back["started"]["error"].as_str().is_some_and(|text| text.contains("start again")), "{back}");
    drop(there);
    let source = boot();
    assert_eq!(source.says_number(ALIVE, 0), last);
    site.wait_protected("web");
    let before = source.next_number(SYNCED);
    let point = site.point("web");
    let after = source.next_number(SYNCED);
    let exported = site.export("web", &text(&point["id"]), "exported.raw", "raw");
    let found = Guest::boot_file(&site, &parts.kernel, &parts.initrd, &exported).says_number(ALIVE, 0);
    assert!((before..=after).contains(&found), "{found} records, {before} were synced before and {after} after");
    assert_nothing_missed(&site);
}

#[test]
fn a_machine_that_runs_already_is_protected_and_what_is_recovered_boots() {
    need!("qemu-system-x86_64", "qemu-img", "busybox", "mke2fs");
    let name = "qemu::a_machine_that_runs_already_is_protected_and_what_is_recovered_boots";
    let mut site = Site::start();
    let Some(parts) = Parts::make(&site, name) else { return };
    let image = make_image(&site);
    let disk = image.to_str().expect("paths of tests are text").to_owned();

    let refused = site.run(&["protect", "web", "--disk", &disk, "--via", "qemu"]);
    refused.assert_refused(&["no QEMU has", "web.qcow2"]);
    let socket = site.path("web.qmp");
    let mut guest = Guest::boot_with_monitor(&site, &parts.kernel, &parts.initrd, &image, &socket);
    guest.says_number(SYNCED, 3);
    let protected = site.json(&["protect", "web", "--disk", &disk, "--via", "qemu"]);
    let attach = &protected["disks"][0]["attach"];
    assert!(attach["nbd"].is_null() && attach["file"].is_null(), "its workload goes on as it is: {protected}");
    site.wait_protected("web");
    assert_eq!(site.status("web")["mode"], "bitmap");
    // Before anything is shut down: nobody says that it is off.
    let planned = site.run(&["failover", "planned", "web", "--disks-only"]);
    planned.assert_refused(&["past its agent", "--via qemu"]);

    // Each with how many records it has at least, and at most.
    let mut points = Vec::new();
    for is_killed in [false, true] {
        if is_killed {
            // The machine writes on while nobody of us is there.
            site.kill_9();
            guest.next_number(SYNCED);
            site.up();
            site.wait_protected("web");
        }
        let before = guest.next_number(SYNCED);
        let point = site.point("web");
        // Until it says this one, it does not begin the next.
        points.push((text(&point["id"]), before, guest.next_number(SYNCED)));
    }
    assert_nothing_missed(&site);
    for (number, (point, before, after)) in points.iter().enumerate() {
        let exported = site.export("web", point, &format!("exported-{number}.raw"), "raw");
        let recovered = Guest::boot_file(&site, &parts.kernel, &parts.initrd, &exported);
        let found = recovered.says_number(ALIVE, 0);
        assert!((before..=after).contains(&&found), "{found} records, {before} were synced before and {after} after");
    }
    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    guest.next_number(SYNCED);
    guest.process.kill_9();
    let mut info = tools::command("qemu-img");
    let told = info.args(["info", "-U"]).arg(&image).output().expect("it runs");
    let ours = format!("tidemark-{}", text(&protected["disks"][0]["id"]));
    assert!(!String::from_utf8_lossy(&told.stdout).contains(&ours), "nothing of ours stays in the image");
}
