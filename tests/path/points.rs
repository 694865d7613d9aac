//! Recovery points: any position by time, served, exported, verified.

use std::time::{Duration, Instant};

use tidemark_base::{Clock, SystemClock};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::text;
use tidemark_tests::{Machine, Site, need, tools, wait};

/// A protected disk with content, in a running site.
fn protected(seed: u64) -> (Site, Machine) {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 32 * MIB, seed);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    (site, machine)
}

#[test]
fn points_are_listed_with_what_they_are() {
    let (site, _) = protected(1);
    let crash = site.point("web");
    assert_eq!(crash["consistency"], "crash");
    let labelled = site.json(&["point", "create", "web", "--label", "before the upgrade"]);
    let list = site.json(&["point", "list", "web"]);
    let list = list.as_array().expect("a list of points");
    for point in [&crash, &labelled] {
        let listed = list.iter().find(|listed| listed["id"] == point["id"]);
        let listed = listed.unwrap_or_else(|| panic!("{} is not in {list:?}", point["id"]));
        assert_eq!(listed["time"], point["time"]);
        assert!(text(&listed["time"]).ends_with('Z'), "times are RFC 3339 in UTC: {listed}");
    }
    assert!(list.iter().any(|listed| listed["label"] == "before the upgrade"), "{list:?}");
    let locked = site.run(&["point", "lock", "web", &text(&crash["id"])]);
    assert_eq!(locked.code, 0, "{}", locked.describe());
}

#[test]
fn any_position_is_found_by_its_time() {
    let (site, machine) = protected(2);
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut moments = Vec::new();
    for round in 1..=3u8 {
        client.write(MIB, &vec![round; 64 << 10]).unwrap();
        client.write(u64::from(round) * 4 * MIB, &vec![round; 8192]).unwrap();
        // Marks are made each second while there is something to mark: two seconds later there is one after the write.
        wait::until_passed(Instant::now() + Duration::from_millis(2200));
        let before = site.path(&format!("reference-{round}.img"));
        image::copy(&machine.disks[0].path, &before);
        moments.push((SystemClock::new().wall_now(), before));
    }
    client.write(MIB, &vec![0xff; 64 << 10]).unwrap();
    site.point("web");
    for (round, (time, reference)) in moments.iter().enumerate() {
        let exported = site.export("web", &time.to_string(), &format!("at-{round}.raw"), "raw");
        image::assert_same(reference, &exported);
    }
    let early =
        site.run(&["point", "export", "web", "2001-01-01T00:00:00Z", "--to", site.path("x.raw").to_str().unwrap()]);
    early.assert_refused(&["2001-01-01"]);
    assert!(!site.path("x.raw").exists(), "a refused export leaves no file");
}

#[test]
fn a_served_point_reads_as_the_mark_and_refuses_writes() {
    need!("nbdcopy", "nbdinfo");
    let (site, machine) = protected(3);
    let point = site.point("web");
    let reference = site.path("reference.img");
    image::copy(&machine.disks[0].path, &reference);
    Client::connect(machine.nbd()).unwrap().write(0, &vec![9; 1 << 20]).unwrap();
    site.point("web");

    let served = site.serve("web", &text(&point["id"]), &[]);
    let copied = site.path("copied.raw");
    tools::run("nbdcopy", &[served.nbd(), copied.to_str().unwrap()]);
    image::assert_same(&reference, &copied);
    let info = tools::run("nbdinfo", &[served.nbd()]);
    assert!(info.contains("is_read_only: true"), "{info}");
    let refused = Client::connect(served.nbd()).unwrap().write(0, &[1; 512]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{refused}");
}

#[test]
fn a_writable_serve_changes_nothing_but_its_own_layer() {
    let (site, machine) = protected(4);
    let point = site.point("web");
    let reference = site.path("reference.img");
    image::copy(&machine.disks[0].path, &reference);
    let id = text(&point["id"]);

    let served = site.serve("web", &id, &["--writable"]);
    let mut client = Client::connect(served.nbd()).unwrap();
    let mut old = vec![0; 64 << 10];
    client.read(2 * MIB, &mut old).unwrap();
    client.write(2 * MIB + 512, &vec![0xee; 4096]).unwrap();
    client.flush().unwrap();
    let mut new = vec![0; 64 << 10];
    client.read(2 * MIB, &mut new).unwrap();
    old[512..512 + 4096].fill(0xee);
    assert!(old == new, "a write of 4 KiB changes exactly these bytes");
    image::assert_same(&reference, &machine.disks[0].path);
    image::assert_same(&reference, &site.export("web", &id, "point.raw", "raw"));
}

#[test]
fn exports_are_images_that_qemu_reads() {
    need!("qemu-img");
    let (site, machine) = protected(5);
    site.point("web");
    let source = machine.disks[0].path.to_str().unwrap();
    for (format, qemu) in [
        ("qcow2", "qcow2"),
        ("vhdx", "vhdx"),
        ("vhdx-fixed", "vhdx"),
        ("vhd", "vpc"),
        ("vhd-fixed", "vpc"),
        ("vmdk", "vmdk"),
        ("vmdk-stream", "vmdk"),
    ] {
        let exported = site.export("web", "latest", &format!("web.{format}"), format);
        let exported = exported.to_str().unwrap();
        tools::run("qemu-img", &["compare", "-f", "raw", "-F", qemu, source, exported]);
        // One of VHD: QEMU takes the size from its geometry unless it is told otherwise, and so would a hypervisor.
        let bytes = std::fs::metadata(source).unwrap().len();
        let info = tools::run("qemu-img", &["info", "--output=json", "-f", qemu, exported]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], bytes, "{format}");
        match format {
            "vmdk-stream" => {
                assert_eq!(info.pointer("/format-specific/data/create-type").unwrap(), "streamOptimized")
            }
            // The disk as it is, and a footer.
            "vhd-fixed" => assert_eq!(std::fs::metadata(exported).unwrap().len(), bytes + 512),
            "vhdx-fixed" => assert!(std::fs::metadata(exported).unwrap().len() > bytes),
            "qcow2" | "vhdx" => drop(tools::run("qemu-img", &["check", "-f", qemu, exported])),
            _ => {}
        }
    }
    // What the name says, where nothing else is said.
    let named = site.path("named.vhdx");
    let named = named.to_str().unwrap();
    site.json(&["point", "export", "web", "latest", "--to", named]);
    tools::run("qemu-img", &["check", "-f", "vhdx", named]);
    let raw = site.export("web", "latest", "web.raw", "raw");
    image::assert_same(&machine.disks[0].path, &raw);
    // Zeroes are holes: a plain disk image costs what its data costs.
    use std::os::unix::fs::MetadataExt;
    let allocated = |path: &std::path::Path| std::fs::metadata(path).unwrap().blocks() * 512;
    assert!(allocated(&raw) <= allocated(&machine.disks[0].path) + MIB, "{} bytes", allocated(&raw));
}

#[test]
fn damage_at_the_replica_is_found_and_named() {
    let (mut site, _) = protected(6);
    site.point("web");
    assert_eq!(site.run(&["point", "verify", "web"]).code, 0);
    // Else it is healed before it is asked for.
    site.json(&["pause", "web"]);
    site.down();
    // The largest file of the site that is not a source disk is the base or a journal segment: flip one byte of its middle.
    let mut files = Vec::new();
    collect(&site.state(), &mut files);
    files.sort();
    let (_, victim) = files.last().expect("a replica has files").clone();
    let content = std::fs::read(&victim).unwrap();
    // In the middle of what is data.
    let at = (content.len() / 2..content.len()).find(|at| content[*at] != 0).expect("a replica has data");
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(&victim).unwrap();
    file.write_all_at(&[content[at] ^ 0x40], at as u64).unwrap();
    drop(file);
    site.up();
    let verified = site.run(&["point", "verify", "web"]);
    assert_eq!(verified.code, 1, "damage at byte {at} of {} was not found: {}", victim.display(), verified.describe());
    assert!(verified.stderr.contains("error: "), "{}", verified.describe());
}

fn collect(folder: &std::path::Path, files: &mut Vec<(u64, std::path::PathBuf)>) {
    use std::os::unix::fs::MetadataExt;
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            collect(&entry.path(), files);
        } else if kind.is_file() {
            files.push((entry.metadata().unwrap().blocks() * 512, entry.path()));
        }
    }
}

/// What is left of a machine that is not protected any more is there until somebody deletes it, and never by accident.
#[test]
fn the_replica_of_an_unprotected_machine_is_kept_and_deleted_on_demand() {
    let (site, machine) = protected(9);
    let point = text(&site.point("web")["id"]);
    site.json(&["point", "lock", "web", &point]);
    site.run(&["unprotect", "web", "--delete-replica"]).assert_refused(&[&point, "locked"]);
    site.json(&["point", "unlock", "web", &point]);
    let served = site.serve("web", &point, &[]);
    site.run(&["unprotect", "web", "--delete-replica"]).assert_refused(&["web", "served"]);
    drop(served);

    let reference = site.path("reference.img");
    image::copy(&machine.disks[0].path, &reference);
    site.json(&["unprotect", "web"]);
    assert_eq!(site.json(&["status"]), serde_json::json!([]));
    let kept = site.json(&["replica", "list"]);
    let id = text(&kept[0]["id"]);
    assert_eq!((text(&kept[0]["name"]).as_str(), kept.as_array().unwrap().len()), ("web", 1), "{kept}");
    image::assert_same(&reference, &site.export("web", &point, "kept.raw", "raw"));

    // Another machine of that name, and its disk, do not hide it.
    site.protect("web", &[&machine.disks[0].path], &[]);
    site.wait_protected("web");
    image::assert_same(&reference, &site.export(&id, &point, "by-id.raw", "raw"));
    site.json(&["point", "lock", &id, &point]);
    site.run(&["replica", "delete", &id]).assert_refused(&[&point, "locked"]);
    site.json(&["replica", "delete", &id, "--force"]);
    assert_eq!(site.json(&["replica", "list"]), serde_json::json!([]));
    site.run(&["replica", "delete", &id]).assert_refused(&[&id, "no replica"]);
    site.run(&["point", "list", &id]).assert_refused(&["no machine"]);
    let replicas = site.state().join("process-server/replicas");
    assert_eq!(std::fs::read_dir(&replicas).map(Iterator::count).unwrap_or(0), 1, "{}", replicas.display());
    site.json(&["unprotect", "web", "--delete-replica"]);
    assert_eq!(site.json(&["replica", "list"]), serde_json::json!([]));
}
