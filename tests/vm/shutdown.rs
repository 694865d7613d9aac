//! Planned failovers whose source is shut down by whoever runs it: the guest itself says that it was.

use std::path::Path;

use tidemark_tests::guest::{GUEST_LIMIT, Guest};
use tidemark_tests::{Machine, Site, image, need, owner, wait};

use crate::failover::There;
use crate::stream::{ALIVE, Parts, SHUT_DOWN, SYNCED, protect};

const GIB: u64 = 1 << 30;

fn boot(site: &Site, parts: &Parts, machine: &Machine, folder: &Path) -> Guest {
    Guest::boot_owned(site, &parts.kernel, &parts.initrd, machine.nbd(), folder)
}

/// H36, F22: the guest shuts down by itself, and everything that it wrote is there; one that does not listen is left on and
/// refused, or turned off, as it is asked for; it is started again, or told about, when the failover is taken back.
#[test]
fn h36_a_planned_failover_shuts_its_source_down() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let site = Site::start();
    let Some(parts) = Parts::make(&site, "shutdown::h36_a_planned_failover_shuts_its_source_down") else { return };
    let machine = protect(&site, "web", GIB);
    parts.describe(&site, "web", &["--no-sign"]);
    let folder = site.path("source");
    std::fs::create_dir(&folder).expect("a folder can be made");
    let qemu = format!("[qemu]\nqmp = \"{0}/qmp.sock\"\n", folder.display());
    let listening = format!("{qemu}guest-agent = \"{}/agent.sock\"\n", folder.display());
    let mut source = boot(&site, &parts, &machine, &folder);
    source.says_number(SYNCED, 5);

    // It knows no power button: it is left on, and nothing is begun.
    owner::settings(&site, "web", "[xen]\n");
    site.run(&["failover", "planned", "web"]).assert_refused(&["owner.toml"]);
    owner::settings(&site, "web", &qemu);
    let deaf = site.run(&["failover", "planned", "web", "--shutdown-limit", "2"]);
    deaf.assert_refused(&["web", "did not shut down within 2 s"]);
    assert_eq!(site.status("web")["state"], "protected");
    assert!(There::all(&site).is_empty(), "nothing was begun");
    source.next_number(SYNCED);
    let odd = site.run(&["failover", "planned", "web", "--disks-only", "--turn-off"]);
    assert_eq!(odd.code, 2, "whose disks are only closed is not turned off: {}", odd.describe());

    // It listens, by its agent.
    owner::settings(&site, "web", &listening);
    let checked = site.json(&["failover", "planned", "web", "--check"]);
    assert_eq!((&checked["source"]["owner"], &checked["source"]["power"]), (&"QEMU".into(), &"on".into()), "{checked}");
    let before = source.next_number(SYNCED);
    let result = site.json(&["failover", "planned", "web"]);
    assert_eq!(result["source"]["stopped"], "by_guest", "{result}");
    let last = source.says_number(SHUT_DOWN, before);
    wait::until("its QEMU ends", GUEST_LIMIT, || source.process.ending());
    let there = There::find(&site);
    assert_eq!(there.says(ALIVE, 0), last, "what it held in memory is there as well, and nothing came after it");
    there.goes_on();

    // Back: this QEMU is started by somebody else.
    let back = site.json(&["failover", "cancel", "web"]);
    assert!(back["started"]["error"].as_str().is_some_and(|text| text.contains("start again")), "{back}");
    drop(there);
    site.wait_protected("web");
    let mut source = boot(&site, &parts, &machine, &folder);
    assert_eq!(source.says_number(ALIVE, 0), last);
    let synced = source.says_number(SYNCED, last + 3);

    // It does not listen again, and is turned off.
    owner::settings(&site, "web", &qemu);
    let result = site.json(&["failover", "planned", "web", "--shutdown-limit", "1", "--turn-off"]);
    assert_eq!((&result["source"]["stopped"], &result["lost_bytes"]), (&"turned_off".into(), &0.into()), "{result}");
    wait::until("its QEMU ends", GUEST_LIMIT, || source.process.ending());
    let there = There::find(&site);
    assert!(there.says(ALIVE, synced) >= synced, "what it had synced is there");
    there.goes_on();

    // Home again: whoever runs it there starts it, when that is a program that can.
    site.json(&["commit", "web"]);
    site.json(&["reprotect", "web"]);
    std::fs::remove_file(site.state().join("agent/owner.d/web/owner.toml")).expect("it is there");
    let started = site.path("started");
    owner::program(&site, "web", "power", "echo '{\"power\": \"off\"}'");
    owner::program(&site, "web", "start", &format!("touch {}", started.display()));
    let synced = there.says(SYNCED, 0);
    let home = site.json(&["failback", "web", "--shutdown-limit", "1"]);
    assert_eq!(home["source"]["owner"], "scripts", "{home}");
    assert!(started.exists(), "it was told to start it");
    let source = boot(&site, &parts, &machine, &folder);
    assert!(source.says_number(ALIVE, 0) >= synced);
    site.json(&["commit", "web"]);
    drop(source);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "latest.raw", "raw"));
}
