//! The way home of a machine whose configuration server was lost meanwhile, and restored at another address (F9, F19).

use std::io::Write;
use std::process::{Command, Stdio};

use tidemark_tests::image::{self, MIB};
use tidemark_tests::process::Owned;
use tidemark_tests::site::{offline, text};
use tidemark_tests::workload::{content, nbd, protected, write};
use tidemark_tests::{Site, binary};

const BYTES: u64 = 32 * MIB;

/// The machine runs elsewhere when the configuration server goes, with all that was on its host. What it was is restored from the
/// backup that the process server keeps; the machine is reprotected, goes home and is replicated from there, as if nothing had been.
#[test]
fn f19_a_machine_goes_home_under_a_configuration_server_that_was_restored_elsewhere() {
    let mut site = Site::start_roles();
    site.kill_role("config-server");
    let state = site.state();
    let made = offline(&["config-server", "recovery-key", "--dir", state.to_str().expect("UTF-8"), "--json"]);
    let key = site.path("recovery-key");
    std::fs::File::create(&key)
        .and_then(|mut file| file.write_all(text(&made.json()["recovery_key"]).as_bytes()))
        .expect("it can be written");
    site.start_role("config-server");
    site.wait_connected();
    let machine = protected(&site, "web", "disk.img", BYTES, 1);
    let home = machine.disks[0].path.clone();
    let planned = site.json(&["failover", "planned", "web", "--disks-only"]);
    site.json(&["commit", "web"]);
    let there = nbd(&planned);
    write(&there, MIB, 65_536, 9);
    let made = site.json(&["config-server", "backup"]);
    assert_eq!(made["process_servers"].as_array().map(Vec::len), Some(1), "{made}");
    let before = site.addresses();

    site.kill_role("config-server");
    std::fs::remove_dir_all(state.join("config-server")).expect("it can be removed");
    let backups = state.join("process-server/config-backups").read_dir().expect("it keeps backups");
    let kept = backups.map(|entry| entry.expect("it can be listed").path()).max().expect("it keeps one");
    write(&there, 2 * MIB, 65_536, 8);
    let elsewhere = site.path("elsewhere");
    let [kept, key, folder] = [&kept, &key, &elsewhere].map(|path| path.to_str().expect("UTF-8"));
    let restored = offline(&["config-server", "restore", kept, "--key-file", key, "--dir", folder]);
    assert_eq!(restored.code, 0, "{}", restored.describe());
    let mut command = Command::new(binary::tidemark());
    command.args(["config-server", "run", "--dir", folder]).stdin(Stdio::null()).stdout(Stdio::null());
    site.adopt(Owned::start("config-server", command, Some(&site.path("site.log"))));
    site.move_control(&elsewhere);
    site.wait_connected();
    assert_ne!(site.addresses(), before, "nobody finds it where it was");

    assert_eq!(site.status("web")["state"], "committed", "what it was is known");
    let reprotected = site.json(&["reprotect", "web"]);
    assert_eq!(reprotected["method"], "delta", "{reprotected}");
    image::assert_same(&home, &content(&site, &there, "there.img"));
    write(&there, 3 * MIB, 65_536, 7);
    let last = content(&site, &there, "last.img");
    site.json(&["failback", "web"]);
    image::assert_same(&last, &home);
    site.json(&["commit", "web"]);
    site.wait_protected("web");
    write(machine.nbd(), 4 * MIB, 65_536, 6);
    site.point("web");
    image::assert_same(&home, &site.export("web", "latest", "latest.raw", "raw"));
}
