//! Initial replication, changes, and the proof that what is recovered is what was protected.

use std::time::Duration;

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::process::Owned;
use tidemark_tests::site::number;
use tidemark_tests::{Site, need, tools, wait};

#[test]
fn a_file_system_is_recovered_byte_for_byte() {
    need!("mke2fs", "e2fsck", "qemu-io");
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_ext4(&disk, 96 * MIB, &tidemark_tests::binary::repository().join("agent"));
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");

    // Into the last blocks, which a file system this empty does not use: the disk stays a sound file system.
    tools::qemu_io(machine.nbd(), &["write -P 0x5a 95M 64k", "write -P 0xa5 95M 4k", "write -z 95500k 4k", "flush"]);
    site.point("web");
    let exported = site.export("web", "latest", "recovered.raw", "raw");
    image::assert_same(&disk, &exported);
    tools::qemu_io(exported.to_str().unwrap(), &["read -P 0xa5 95M 4k", "read -P 0x5a 97284k 32k"]);
    tools::run("e2fsck", &["-fn", exported.to_str().unwrap()]);
}

#[test]
fn fio_verifies_at_the_replica_what_it_wrote_at_the_source() {
    need!("fio");
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 64 * MIB, 1);
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");

    let job = ["--name=job", "--thread", "--rw=randwrite", "--bs=4k"];
    let pattern = ["--size=48m", "--randseed=11", "--verify=crc32c", "--verify_state_save=0", "--iodepth=16"];
    let uri = format!("--uri={}", machine.nbd());
    let write: Vec<&str> = [&job[..], &pattern, &["--ioengine=nbd", "--do_verify=0", &uri]].concat();
    tools::run("fio", &write);
    site.point("db");
    let exported = site.export("db", "latest", "recovered.raw", "raw");
    let file = format!("--filename={}", exported.display());
    let check: Vec<&str> = [&job[..], &pattern, &["--ioengine=psync", "--verify_only", &file]].concat();
    tools::run("fio", &check);
    image::assert_same(&disk, &exported);
}

#[test]
fn writes_during_the_initial_replication_are_kept() {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 256 * MIB, 2);
    let machine = site.protect("web", &[&disk], &[]);
    // Hot blocks all over the disk, overwritten again and again while the scan passes over them.
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut seeded = image::Seeded(3);
    let mut data = [0; 4096];
    let mut writes_during_scan = 0;
    wait::until("the initial replication ends", tidemark_tests::site::LIMIT, || {
        let before = site.status("web")["state"] != "protected";
        for _ in 0..400 {
            seeded.fill(&mut data);
            client.write(seeded.below(64) * 4 * MIB, &data).unwrap();
        }
        if before {
            writes_during_scan += 400;
            return None;
        }
        Some(())
    });
    assert!(writes_during_scan > 0, "the scan was over before the first write");
    site.point("web");
    let exported = site.export("web", "latest", "recovered.raw", "raw");
    image::assert_same(&disk, &exported);
}

#[test]
fn holes_and_zeroes_are_not_sent() {
    let site = Site::start();
    let disk = site.path("disk.img");
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(1 << 40).unwrap();
    // 8 MiB of written zeroes and 1 MiB of data in a tebibyte of holes.
    use std::os::unix::fs::FileExt;
    file.write_all_at(&vec![0; 8 << 20], 1 << 39).unwrap();
    let mut data = vec![0; 1 << 20];
    image::Seeded(4).fill(&mut data);
    file.write_all_at(&data, 3 << 38).unwrap();
    drop(file);
    site.protect("sparse", &[&disk], &[]);
    site.wait_protected("sparse");
    site.point("sparse");
    let status = site.status("sparse");
    let sent = number(&status["sent_bytes"]);
    assert!((1 << 20..3 << 20).contains(&sent), "1 MiB of data cost {sent} bytes: {status}");
    let served = site.serve("sparse", "latest", &[]);
    let mut client = Client::connect(served.nbd()).unwrap();
    assert_eq!(client.bytes, 1 << 40);
    let mut back = vec![0; 1 << 20];
    client.read(3 << 38, &mut back).unwrap();
    assert!(back == data, "the only data of the disk differs");
}

#[test]
fn a_paused_machine_sends_nothing_and_catches_up() {
    need!("qemu-io");
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 32 * MIB, 5);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    site.point("web");
    site.json(&["pause", "web"]);
    let before = number(&site.status("web")["sent_bytes"]);
    tools::qemu_io(machine.nbd(), &["write -P 0x11 1M 8M", "flush"]);
    let paused = site.status("web");
    assert!(number(&paused["pending_bytes"]) >= 8 << 20, "{paused}");
    assert!(number(&paused["sent_bytes"]) - before < 64 << 10, "sent while paused: {before} before, then {paused}");
    site.json(&["resume", "web"]);
    site.wait_sent("web");
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}

#[test]
fn a_guest_writes_while_fio_runs_and_points_are_made() {
    need!("fio");
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 64 * MIB, 6);
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");
    let mut command = tools::command("fio");
    command.args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=8"]);
    command
        .args(["--size=64m", "--io_size=96m", "--norandommap", "--output=/dev/null"])
        .arg(format!("--uri={}", machine.nbd()));
    let mut fio = Owned::start("fio", command, None);
    let mut points = 0;
    while fio.is_running() && points < 20 {
        site.point("db");
        points += 1;
    }
    assert!(points > 1, "fio was over before the second point");
    wait::until("fio ends", Duration::from_secs(60), || (!fio.is_running()).then_some(()));
    site.point("db");
    let verified = site.run(&["point", "verify", "db"]);
    assert_eq!(verified.code, 0, "{}", verified.describe());
    image::assert_same(&disk, &site.export("db", "latest", "recovered.raw", "raw"));
    site.down();
}
