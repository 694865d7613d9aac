//! A machine that runs already, under a QEMU that knows nothing of us.

use tidemark_tests::guest::Guest;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, tools};

use crate::stream::{ALIVE, Parts, SYNCED};

#[test]
fn a_machine_that_runs_already_is_protected_and_what_is_recovered_boots() {
    need!("qemu-system-x86_64", "qemu-img", "busybox", "mke2fs");
    let name = "qemu::a_machine_that_runs_already_is_protected_and_what_is_recovered_boots";
    let mut site = Site::start();
    let Some(parts) = Parts::make(&site, name) else { return };
    let (raw, image, empty) = (site.path("made.raw"), site.path("web.qcow2"), site.path("empty"));
    std::fs::create_dir_all(&empty).expect("a folder can be made");
    image::make_ext4(&raw, 48 * MIB, &empty);
    let mut convert = tools::command("qemu-img");
    convert.args(["convert", "-O", "qcow2"]).arg(&raw).arg(&image);
    assert!(convert.status().expect("it runs").success());
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
    // Before anything is shut down: nobody could keep it from its disks.
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
    let events = site.run(&["events", "--json"]);
    assert!(!events.stdout.contains("did not see every write"), "{}", events.stdout);
    assert!(!events.stdout.contains("nobody watched"), "{}", events.stdout);
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
