//! Histories that go wrong: servers and hosts that are set back to an earlier day, two of one, disks that change behind
//! everybody's back, kills in the middle of a drill, and how soon a role is back at work.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tidemark_tests::block::{self, Loop, Mount};
use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::site::{LIMIT, Machine, ROLES, number, text};
use tidemark_tests::{Site, binary, need, need_root, tools, wait};

const DISK_BYTES: u64 = 32 * MIB;
const BLOCK: u64 = 4096;
/// How soon a role that was started again must be at work.
const BACK_IN: Duration = Duration::from_secs(5);
/// Best of so many: the machine has other things to do.
const RESTARTS: usize = 3;

fn write(uri: &str, seed: u64, count: u64) {
    let mut client = Client::connect(uri).unwrap();
    let mut seeded = Seeded(seed);
    let mut data = vec![0; BLOCK as usize];
    for _ in 0..count {
        seeded.fill(&mut data);
        client.write(seeded.below(DISK_BYTES / BLOCK) * BLOCK, &data).expect("the guest can write");
    }
    client.flush().expect("the guest can flush");
    client.disconnect().unwrap();
}

fn copy_folder(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    tools::run("cp", &["--archive", "--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
}

struct Kept {
    point: String,
    reference: PathBuf,
}

impl Kept {
    fn make(site: &Site, machine: &Machine, name: &str) -> Self {
        let point = text(&site.point(&machine.name)["id"]);
        let reference = site.path(name);
        image::copy(&machine.disks[0].path, &reference);
        Self { point, reference }
    }

    fn assert_there(&self, site: &Site, machine: &Machine) {
        let exported = site.export(&machine.name, &self.point, "kept.raw", "raw");
        image::assert_same(&self.reference, &exported);
        std::fs::remove_file(exported).unwrap();
    }
}

fn point_again(site: &Site, machine: &Machine) {
    wait::until("a point is made again", LIMIT, || {
        (site.run(&["point", "create", &machine.name]).code == 0).then_some(())
    });
}

fn assert_recovered(site: &Site, machine: &Machine) {
    site.wait_protected(&machine.name);
    point_again(site, machine);
    let recovered = site.export(&machine.name, "latest", "recovered.raw", "raw");
    image::assert_same(&machine.disks[0].path, &recovered);
    std::fs::remove_file(recovered).unwrap();
}

fn was_alarmed(site: &Site) -> bool {
    std::fs::read_to_string(site.path("site.log")).unwrap().contains("history diverged")
}

fn stop(site: &mut Site, role: &str) {
    assert!(site.take_role(role).stop(Duration::from_secs(30)).success(), "{role} ends cleanly");
}

#[test]
fn a_process_server_of_yesterday_is_compared_and_told() {
    let mut site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(machine.nbd(), 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");
    let (store, yesterday) = (site.state().join("process-server"), site.path("yesterday"));
    stop(&mut site, "process-server");
    copy_folder(&store, &yesterday);
    site.start_role("process-server");
    write(machine.nbd(), 2, 200);
    point_again(&site, &machine);
    stop(&mut site, "process-server");
    copy_folder(&yesterday, &store);
    assert!(!was_alarmed(&site));
    site.start_role("process-server");
    wait::until("the loss is noticed", LIMIT, || was_alarmed(&site).then_some(()));
    assert_recovered(&site, &machine);
    kept.assert_there(&site, &machine);
    site.down();
}

#[test]
fn a_host_that_was_set_back_is_compared_and_told() {
    need!("mke2fs", "losetup", "mount", "umount");
    need_root!("loop devices and mounts");
    block::private_mounts();
    let mut site = Site::prepare();
    let image = site.path("host.raw");
    block::make_ext4(&image, 512 * MIB, "^metadata_csum_seed");
    let folder = site.path("host");
    let device = Loop::attach(&image);
    let path = device.path().to_owned();
    let mut mounts = vec![Mount::device(device, &folder, "noatime")];
    std::fs::create_dir(folder.join("agent")).unwrap();
    let agent = site.state().join("agent");
    mounts.push(Mount::bind(&folder.join("agent"), &agent));
    site.start_roles_here();
    let disk = folder.join("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(machine.nbd(), 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");
    // As a snapshot of the host's storage does it: everything is as it was, to the last inode.
    let snapshot = site.path("snapshot.raw");
    let mut remount = |site: &mut Site, between: &dyn Fn()| {
        stop(site, "agent");
        while let Some(mount) = mounts.pop() {
            mount.unmount();
        }
        between();
        mounts.push(Mount::device(Loop::attach_at(&path, &image), &folder, "noatime"));
        mounts.push(Mount::bind(&folder.join("agent"), &agent));
        site.start_role("agent");
    };
    remount(&mut site, &|| image::copy(&image, &snapshot));
    site.wait_connected();
    site.wait_protected("web");
    write(machine.nbd(), 2, 300);
    let future = Kept::make(&site, &machine, "future.img");
    assert!(!was_alarmed(&site));
    remount(&mut site, &|| image::copy(&snapshot, &image));
    wait::until("the change of history is noticed", LIMIT, || was_alarmed(&site).then_some(()));
    site.wait_connected();
    assert_recovered(&site, &machine);
    // Of both histories everything that was kept is there.
    kept.assert_there(&site, &machine);
    future.assert_there(&site, &machine);
    site.down();
}

#[test]
fn two_agents_of_one_identity_leave_no_mixture() {
    need!("unshare", "mount");
    need_root!("mounts");
    let mut site = Site::prepare();
    let folder = site.path("host");
    std::fs::create_dir(&folder).unwrap();
    site.start_roles_here();
    let disk = folder.join("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(machine.nbd(), 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");
    // The copy of a running host: its disk, its logs, its identity, at the same paths of another machine.
    let (clone, clone_agent) = (site.path("clone"), site.path("clone-agent"));
    stop(&mut site, "agent");
    copy_folder(&folder, &clone);
    copy_folder(&site.state().join("agent"), &clone_agent);
    site.start_role("agent");
    site.wait_connected();
    let addresses: serde_json::Value =
        serde_json::from_slice(&std::fs::read(site.state().join("run/config-server.json")).unwrap()).unwrap();
    let configuration =
        format!("[agent]\ndir = {clone_agent:?}\nconfig-server = \"{}\"\n", text(&addresses["control"]));
    let file = site.path("clone.toml");
    File::create(&file).and_then(|file| file.write_all_at(configuration.as_bytes(), 0)).unwrap();
    let mut command = tools::command("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$1\" \"$2\" && exec \"$3\" agent run --config \"$4\"", "sh"]);
    command.args([&clone, &folder]).arg(binary::tidemark()).arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
    let mut second = Owned::start("the other agent", command, Some(&site.path("clone.log")));
    let uri = format!("nbd+unix:///web-0?socket={}", clone_agent.join("run/nbd.sock").display());
    wait::until("the clone serves its disk", LIMIT, || {
        assert!(second.is_running(), "it ended: {}", second.log_tail());
        Client::connect(&uri).ok().map(drop)
    });
    // Both guests write; neither feels anything of it.
    for round in 0..5 {
        write(machine.nbd(), 10 + round, 100);
        write(&uri, 20 + round, 100);
        wait::until_passed(Instant::now() + Duration::from_millis(300));
    }
    second.kill_9();
    // Nobody knows which of them is the host: both are refused until an administrator decides.
    let fenced = wait::until("the identity is fenced", LIMIT, || {
        let identities = site.json(&["identity", "list"]);
        let fenced = identities.as_array()?.iter().find(|identity| identity["standing"] == "fenced")?;
        Some(text(&fenced["identity"]))
    });
    println!("two agents: {fenced} is fenced");
    assert_eq!(site.run(&["identity", "restore", &fenced]).code, 0);
    site.kill_role("agent");
    site.start_role("agent");
    site.wait_connected();
    assert_recovered(&site, &machine);
    assert!(was_alarmed(&site), "what the other one sent is no history of this host");
    kept.assert_there(&site, &machine);
    site.down();
}

#[test]
fn a_replaced_or_resized_disk_is_compared_or_refused() {
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(machine.nbd(), 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");
    site.down();
    // Another file of the same size under the same name.
    let other = site.path("other.img");
    image::make_mixed(&other, DISK_BYTES, 2);
    std::fs::remove_file(&disk).unwrap();
    image::copy(&other, &disk);
    site.up();
    assert_recovered(&site, &machine);
    kept.assert_there(&site, &machine);
    site.down();
    // A larger one: never taken for the disk that the replica has, and never silently.
    File::options().write(true).open(&disk).unwrap().set_len(DISK_BYTES + 4 * MIB).unwrap();
    site.up();
    let status = wait::until("the new size is noticed", LIMIT, || {
        let status = site.status("web");
        (status["problems"].as_array().is_some_and(|problems| !problems.is_empty())).then_some(status)
    });
    println!("resized: state {}, problems {}", status["state"], status["problems"]);
    kept.assert_there(&site, &machine);
    site.down();
}

#[test]
fn a_process_server_killed_in_a_drill_serves_again() {
    let mut site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(machine.nbd(), 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");
    for round in 0..3 {
        let served = site.serve("web", &kept.point, &["--writable"]);
        // The drill writes, the machine writes, and the process server dies.
        write(served.nbd(), 100 + round, 50);
        write(machine.nbd(), 200 + round, 50);
        site.kill_role("process-server");
        write(machine.nbd(), 300 + round, 50);
        site.start_role("process-server");
        site.wait_connected();
        drop(served);
        assert_recovered(&site, &machine);
        // What the drill wrote went with it.
        kept.assert_there(&site, &machine);
    }
    site.down();
}

#[test]
fn a_role_that_is_started_again_is_at_work_within_seconds() {
    let mut site = Site::start_roles();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 4 * DISK_BYTES, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    for role in ROLES {
        let mut best = Duration::MAX;
        for round in 0..RESTARTS as u64 {
            write(machine.nbd(), 10 + round, 200);
            site.kill_role(role);
            // Of a guest whose agent is away nothing can be expected; of any other, that it goes on.
            if role != "agent" {
                write(machine.nbd(), 20 + round, 200);
            }
            let sent = number(&match role {
                "config-server" => serde_json::json!(0),
                _ => site.status("web")["sent_bytes"].clone(),
            });
            let begin = Instant::now();
            site.start_role(role);
            point_again(&site, &machine);
            best = best.min(begin.elapsed());
            if role == "agent" {
                let status = site.status("web");
                println!(
                    "agent: {} bytes sent before, {} since, compared {}",
                    sent, status["sent_bytes"], status["compared_bytes"]
                );
            }
        }
        println!("{role}: replication runs again after {best:?}");
        assert!(best <= BACK_IN, "{role}: {best:?}");
    }
    assert_recovered(&site, &machine);
    site.down();
}
