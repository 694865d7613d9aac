//! Other people's programs against our NBD front end: what a guest's hypervisor and an administrator use.

mod disks;
mod guest;
mod tls;

use tidemark_tests::image::{self, MIB};
use tidemark_tests::process::Owned;
use tidemark_tests::{Machine, Site, need, tools, wait};

/// A protected disk of 64 MiB: the first half has content, the second is a hole.
fn front_end() -> (Site, Machine) {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 32 * MIB, 1);
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(64 * MIB).unwrap();
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    (site, machine)
}

/// Nothing of all this may differ at the replica.
fn assert_replicated(site: &Site, machine: &Machine) {
    site.point("web");
    image::assert_same(&machine.disks[0].path, &site.export("web", "latest", "recovered.raw", "raw"));
}

#[test]
fn nbdinfo_sees_what_the_export_can() {
    need!("nbdinfo");
    let (_site, machine) = front_end();
    let info: serde_json::Value = serde_json::from_str(&tools::run("nbdinfo", &["--json", machine.nbd()])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(info["protocol"], "newstyle-fixed", "{info}");
    assert_eq!(info["structured"], true, "{info}");
    assert_eq!(export["export-size"], 64 << 20, "{info}");
    assert_eq!(export["is_read_only"], false, "{info}");
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
        assert_eq!(export[can], true, "{can}: {info}");
    }
    assert!(export["contexts"].as_array().unwrap().iter().any(|context| context == "base:allocation"), "{info}");
    let map: serde_json::Value =
        serde_json::from_str(&tools::run("nbdinfo", &["--json", "--map", machine.nbd()])).unwrap();
    let map = map.as_array().unwrap();
    let covered: u64 = map.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(covered, 64 << 20, "the map covers the disk: {map:?}");
    let hole_at_end = map.last().unwrap();
    assert_eq!(hole_at_end["type"], 3, "the second half is a hole: {map:?}");
    let socket = machine.nbd().split_once("?socket=").unwrap().1;
    let list = tools::run("nbdinfo", &["--list", &format!("nbd+unix:///?socket={socket}")]);
    assert!(list.contains("export-size: 67108864"), "{list}");
}

#[test]
fn an_unknown_export_is_refused() {
    need!("nbdinfo");
    let (_site, machine) = front_end();
    let socket = machine.nbd().split_once("?socket=").unwrap().1;
    let refused = tools::outcome("nbdinfo", &[&format!("nbd+unix:///nonesuch?socket={socket}")]);
    assert!(!refused.status.success(), "{}", tools::describe("nbdinfo", &[], &refused));
}

#[test]
fn qemu_io_reads_writes_zeroes_and_discards() {
    need!("qemu-io");
    let (site, machine) = front_end();
    tools::qemu_io(
        machine.nbd(),
        &[
            "write -P 1 0 64k",
            "write -P 2 512 512",
            "write -P 3 1000k 3M",
            "write -f -P 4 40M 1M",
            "write -z 1001k 64k",
            "write -z -u 2M 1M",
            "discard 16M 1M",
            "aio_write -P 5 50M 64k",
            "aio_write -P 6 51M 64k",
            "aio_flush",
            "flush",
            "read -P 1 0 512",
            "read -P 2 512 512",
            "read -P 1 1024 63k",
            "read -P 0 1001k 64k",
            "read -P 0 2M 1M",
            "read -P 4 40M 1M",
            "read -P 5 50M 64k",
            "read -P 6 51M 64k",
        ],
    );
    assert_replicated(&site, &machine);
    let beyond = tools::outcome("qemu-io", &["-f", "raw", "-c", "write 64M 4k", machine.nbd()]);
    let text = tools::describe("qemu-io", &[], &beyond);
    assert!(!beyond.status.success() || text.contains("failed") || text.contains("error"), "{text}");
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    need!("qemu-img");
    let (site, machine) = front_end();
    let disk = machine.disks[0].path.clone();
    let info = tools::run("qemu-img", &["info", "--output=json", machine.nbd()]);
    assert!(info.contains("\"virtual-size\": 67108864"), "{info}");
    tools::run("qemu-img", &["map", "--output=json", machine.nbd()]);
    let out = site.path("out.qcow2");
    tools::run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", "-W", "-m", "8", machine.nbd(), out.to_str().unwrap()],
    );
    let reference = site.path("reference.img");
    image::copy(&disk, &reference);
    tools::run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", reference.to_str().unwrap(), out.to_str().unwrap()],
    );
    // In: a new image over the protected disk, many requests in flight and out of order.
    let new = site.path("new.img");
    image::make_mixed(&new, 64 * MIB, 9);
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", new.to_str().unwrap(), machine.nbd()];
    tools::run("qemu-img", &convert);
    image::assert_same(&new, &disk);
    assert_replicated(&site, &machine);
}

#[test]
fn nbdcopy_copies_in_and_out_over_many_connections() {
    need!("nbdcopy");
    let (site, machine) = front_end();
    let new = site.path("new.img");
    image::make_mixed(&new, 64 * MIB, 10);
    tools::run("nbdcopy", &["--flush", "--connections=4", "--requests=64", new.to_str().unwrap(), machine.nbd()]);
    image::assert_same(&new, &machine.disks[0].path);
    let out = site.path("out.raw");
    tools::run("nbdcopy", &["--connections=4", machine.nbd(), out.to_str().unwrap()]);
    image::assert_same(&new, &out);
    assert_replicated(&site, &machine);
}

#[test]
fn fio_verifies_its_own_writes_with_flushes_and_trims() {
    need!("fio");
    let (site, machine) = front_end();
    let uri = format!("--uri={}", machine.nbd());
    let common = ["--thread", "--ioengine=nbd", "--size=32m", "--iodepth=32", &uri];
    let write_read = [
        "--name=verify",
        "--rw=randwrite",
        "--bs=4k",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_backlog=256",
        "--fsync=64",
    ];
    tools::run("fio", &[&write_read[..], &common].concat());
    let trims = ["--name=trim", "--rw=randtrimwrite", "--bs=16k", "--number_ios=512"];
    tools::run("fio", &[&trims[..], &common].concat());
    assert_replicated(&site, &machine);
}

#[test]
fn a_served_point_is_read_by_everybody() {
    need!("qemu-img", "nbdinfo", "nbdcopy");
    let (site, machine) = front_end();
    site.point("web");
    let disk = machine.disks[0].path.to_str().unwrap();
    let reference = site.path("reference.img");
    image::copy(&machine.disks[0].path, &reference);
    let served = site.serve("web", "latest", &[]);
    let map = tools::run("nbdinfo", &["--map", "--totals", served.nbd()]);
    assert!(map.contains("hole"), "holes of {disk} are holes of the point: {map}");
    let reference = reference.to_str().unwrap();
    tools::run("qemu-img", &["compare", "-f", "raw", "-F", "raw", reference, served.nbd()]);
    let copied = site.path("copied.raw");
    tools::run("nbdcopy", &["--connections=4", served.nbd(), copied.to_str().unwrap()]);
    image::assert_same(std::path::Path::new(reference), &copied);
}

#[test]
fn a_client_that_dies_disturbs_no_other() {
    need!("fio", "qemu-io");
    let (site, machine) = front_end();
    let mut command = tools::command("fio");
    command.args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32"]);
    command
        .args(["--size=16m", "--time_based", "--runtime=60", "--output=/dev/null"])
        .arg(format!("--uri={}", machine.nbd()));
    let mut fio = Owned::start("fio", command, None);
    let first = site.status("web")["written_bytes"].as_u64().unwrap();
    wait::until("fio writes", tidemark_tests::site::LIMIT, || {
        (site.status("web")["written_bytes"].as_u64().unwrap() > first + MIB).then_some(())
    });
    fio.kill_9();
    tools::qemu_io(machine.nbd(), &["write -P 7 40M 64k", "flush", "read -P 7 40M 64k"]);
    assert_replicated(&site, &machine);
}

#[test]
fn garbage_on_the_socket_ends_that_connection_alone() {
    need!("qemu-io");
    use std::io::{Read, Write};
    let (site, machine) = front_end();
    let socket = machine.nbd().split_once("?socket=").unwrap().1;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0; 64]] {
        let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        // The server may close before it has read all of it: both ends of this are fine.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    tools::qemu_io(machine.nbd(), &["write -P 8 0 64k", "flush", "read -P 8 0 64k"]);
    assert_replicated(&site, &machine);
}
