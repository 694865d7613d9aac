//! Guests that one firmware starts at home and another where they failed over to.

use tidemark_tests::guest::{Guest, Uefi};
use tidemark_tests::{Site, image, need, tools};

use crate::failover::There;
use crate::stream::{ALIVE, BIOS, Parts, SYNCED, UEFI, protect};

const NAME: &str = "generations::h6_a_guest_of_generation_2_runs_as_generation_1_and_comes_home";

/// H6: of generation 2 at home (UEFI), of generation 1 where it failed over to (BIOS, another chipset), and back; its disk says the same
/// to both. The other way round in a drill. Each firmware starts a kernel that it is given.
#[test]
fn h6_a_guest_of_generation_2_runs_as_generation_1_and_comes_home() {
    need!("qemu-system-x86_64", "busybox", "mke2fs");
    let site = Site::start();
    let Some(parts) = Parts::make(&site, NAME) else { return };
    let Some(firmware) = Uefi::of_machine(&site) else { return tools::skipped(NAME, "OVMF is not installed") };
    let machine = protect(&site, "web", 1 << 30);
    let boot = || Guest::boot_uefi(&site, &parts.kernel, &parts.initrd, machine.nbd(), &firmware);
    parts.describe(&site, "web", &["--firmware", "bios", "--no-sign"]);
    let source = boot();
    source.says(UEFI);
    let synced = source.says_number(SYNCED, 3);
    drop(source);
    site.json(&["failover", "planned", "web"]);
    let there = There::find(&site);
    assert!(there.says(ALIVE, synced) >= synced);
    assert!(there.console().contains(BIOS) && !there.console().contains(UEFI), "{}", there.console());
    let synced = there.says(SYNCED, synced + 3);
    site.json(&["commit", "web"]);
    site.json(&["reprotect", "web"]);
    // It knows no power button here.
    site.json(&["failback", "web", "--shutdown-limit", "1"]);
    let home = boot();
    home.says(UEFI);
    assert!(home.says_number(ALIVE, synced) >= synced, "what it wrote there is here");
    site.json(&["commit", "web"]);
    drop(home);
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "latest.raw", "raw"));

    let source = Guest::boot(&site, &parts.kernel, &parts.initrd, machine.nbd());
    source.says(BIOS);
    let synced = source.says_number(SYNCED, 0);
    site.point("web");
    drop(source);
    parts.describe(&site, "web", &["--sign-console", SYNCED]);
    let before = site.json(&["machine", "show", "web"])["description"].clone();
    let converted = site.json(&["machine", "set", "web", "--generation", "2"])["description"].clone();
    assert_eq!(
        (&converted["hardware"]["firmware"], &converted["converted"]["firmware"]),
        (&"uefi".into(), &"bios".into())
    );
    let drilled = site.json(&["failover", "test", "web", "--cleanup"]);
    assert_eq!(drilled["outcome"], "alive", "{drilled}");
    let console = drilled["console"].as_str().expect("it is kept");
    let console = String::from_utf8_lossy(&std::fs::read(console).expect("the console was kept")).into_owned();
    let found = crate::stream::last_number(&console, ALIVE).expect("it says how long its chain is");
    assert!(console.contains(UEFI) && found >= synced, "{found} records, {synced} were synced before: {console}");
    let taken_back = site.json(&["machine", "set", "web", "--generation", "1"]);
    assert_eq!(taken_back["description"], before);
}
