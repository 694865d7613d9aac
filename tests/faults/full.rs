//! Folders that fill up: by what we write ourselves, and by somebody else to the last byte. The guest goes on, what was
//! recoverable stays so, and everything is right again by itself when there is room.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tidemark_tests::block::{self, Mount};
use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, Machine, text};
use tidemark_tests::{Site, need, need_root, wait};

const DISK_BYTES: u64 = 16 * MIB;
const BLOCK: u64 = 4096;
/// What the roles want free before they log again, and some more.
const ROOM_BYTES: u64 = 176 * MIB;

/// Takes all that is left of a file system.
fn fill(folder: &Path) -> PathBuf {
    let path = folder.join("somebody-elses");
    let file = File::create(&path).unwrap();
    let mut at = 0;
    for part in [MIB as usize, BLOCK as usize, 1] {
        let data = vec![7; part];
        loop {
            match file.write_at(&data, at) {
                Ok(written) => at += written as u64,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
                    break;
                }
            }
        }
    }
    path
}

/// A disk without holes: its own blocks need no more room.
fn make_full(path: &Path) {
    let mut data = vec![0; DISK_BYTES as usize];
    Seeded(1).fill(&mut data);
    File::create(path).and_then(|file| file.write_all_at(&data, 0)).unwrap();
}

fn write(machine: &Machine, seed: u64, count: u64) {
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut seeded = Seeded(seed);
    let mut data = vec![0; BLOCK as usize];
    for number in 0..count {
        seeded.fill(&mut data);
        client.write(seeded.below(DISK_BYTES / BLOCK) * BLOCK, &data).expect("the guest can write");
        if number % 100 == 0 {
            client.flush().expect("the guest can flush");
        }
    }
    client.disconnect().unwrap();
}

/// Whatever the site says is wrong.
fn problems(status: &Value) -> String {
    status["problems"].to_string()
}

struct Kept {
    point: String,
    reference: PathBuf,
}

impl Kept {
    fn make(site: &Site, machine: &Machine, name: &str) -> Self {
        let point = text(&site.point("web")["id"]);
        let reference = site.path(name);
        image::copy(&machine.disks[0].path, &reference);
        Self { point, reference }
    }

    fn assert_there(&self, site: &Site) {
        let exported = site.export("web", &self.point, "kept.raw", "raw");
        image::assert_same(&self.reference, &exported);
        std::fs::remove_file(exported).unwrap();
        let served = site.serve("web", &self.point, &[]);
        let mut client = Client::connect(served.nbd()).unwrap();
        let (mut found, mut wanted) = (vec![0; MIB as usize], vec![0; MIB as usize]);
        client.read(5 * MIB, &mut found).unwrap();
        File::open(&self.reference).unwrap().read_exact_at(&mut wanted, 5 * MIB).unwrap();
        assert!(found == wanted, "the served point differs");
        client.disconnect().unwrap();
    }
}

fn assert_recovered(site: &Site, machine: &Machine) {
    wait::until("a point is made again", LIMIT, || (site.run(&["point", "create", "web"]).code == 0).then_some(()));
    let recovered = site.export("web", "latest", "recovered.raw", "raw");
    image::assert_same(&machine.disks[0].path, &recovered);
    std::fs::remove_file(recovered).unwrap();
}

#[test]
fn a_log_folder_without_room_stops_no_guest_and_recovers_by_itself() {
    need!("mount", "umount");
    need_root!("file systems in memory");
    block::private_mounts();
    let mut site = Site::prepare();
    let mount = Mount::memory(&site.path("host"), DISK_BYTES + ROOM_BYTES);
    site.start_roles_here();
    let disk = mount.path().join("disk.img");
    make_full(&disk);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(&machine, 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");

    // Somebody else takes everything.
    let taken = fill(mount.path());
    write(&machine, 2, 1500);
    let status = wait::until("the mode steps down", LIMIT, || {
        let status = site.status("web");
        (status["mode"] != "data").then_some(status)
    });
    println!("no room: mode {}, problems {}", status["mode"], problems(&status));
    write(&machine, 3, 500);
    kept.assert_there(&site);
    std::fs::remove_file(taken).unwrap();
    wait::until("the mode steps up", LIMIT, || (site.status("web")["mode"] == "data").then_some(()));
    assert_recovered(&site, &machine);

    // Nobody takes what is logged, until the log itself has taken everything.
    site.kill_role("process-server");
    let mut seed = 10;
    wait::until("the log is at its end", LIMIT, || {
        seed += 1;
        write(&machine, seed, 2000);
        (site.status("web")["mode"] != "data").then_some(())
    });
    write(&machine, 5, 500);
    site.start_role("process-server");
    wait::until("the mode steps up", LIMIT, || (site.status("web")["mode"] == "data").then_some(()));
    assert_recovered(&site, &machine);
    kept.assert_there(&site);
    site.down();
    mount.unmount();
}

#[test]
fn a_store_without_room_stops_no_guest_and_keeps_its_points() {
    need!("mount", "umount");
    need_root!("file systems in memory");
    block::private_mounts();
    let mut site = Site::prepare();
    let mount = Mount::memory(&site.state().join("process-server"), DISK_BYTES + ROOM_BYTES);
    site.start_roles_here();
    let disk = site.path("disk.img");
    make_full(&disk);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    write(&machine, 1, 200);
    let kept = Kept::make(&site, &machine, "kept.img");
    let taken = fill(mount.path());
    write(&machine, 2, 3000);
    let status = wait::until("it is said that there is no room", LIMIT, || {
        let status = site.status("web");
        problems(&status).contains("room").then_some(status)
    });
    println!("no room: state {}, problems {}", status["state"], problems(&status));
    kept.assert_there(&site);
    // A restart without room loses nothing either.
    site.kill_role("process-server");
    site.start_role("process-server");
    write(&machine, 3, 200);
    site.wait_connected();
    kept.assert_there(&site);
    std::fs::remove_file(taken).unwrap();
    assert_recovered(&site, &machine);
    kept.assert_there(&site);
    site.down();
    mount.unmount();
}
