//! Disks inside images of other formats: protected, killed under, and recovered.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::{Site, need, tools, wait};

const BYTES: u64 = 48 * MIB;

/// An image with content, made by QEMU's own tools.
fn make(site: &Site, name: &str, format: &str, options: &str, seed: u64) -> PathBuf {
    let (raw, path) = (site.path("content.img"), site.path(name));
    image::make_mixed(&raw, BYTES, seed);
    let arguments =
        ["convert", "-f", "raw", "-O", format, "-o", options, raw.to_str().unwrap(), path.to_str().unwrap()];
    tools::run("qemu-img", &arguments);
    std::fs::remove_file(raw).unwrap();
    path
}

/// The disk in an image, by QEMU's tools, whoever has it open.
fn content(site: &Site, path: &Path, format: &str, name: &str) -> PathBuf {
    let to = site.path(name);
    let arguments = ["convert", "-U", "-f", format, "-O", "raw", path.to_str().unwrap(), to.to_str().unwrap()];
    tools::run("qemu-img", &arguments);
    to
}

/// The program of the agent that has an image open.
fn program_of(path: &Path) -> Option<i32> {
    let path = path.to_str().unwrap().as_bytes();
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|process| {
        let command = std::fs::read(process.path().join("cmdline")).ok()?;
        let is_it = command.starts_with(b"qemu-nbd\0") && command.windows(path.len()).any(|part| part == path);
        is_it.then(|| process.file_name().to_str()?.parse().ok())?
    })
}

fn kill_program_of(path: &Path) -> bool {
    let kill = |id| nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGKILL);
    program_of(path).is_some_and(|id| kill(id).is_ok())
}

/// fio over NBD: writes every block of the first 24 MiB once and verifies that it did.
fn fio(nbd: &str, seed: u32) {
    let (uri, seed) = (format!("--uri={nbd}"), format!("--randseed={seed}"));
    let job = ["--name=job", "--thread", "--rw=randwrite", "--bs=4k", "--size=24m", "--ioengine=nbd", "--iodepth=16"];
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--end_fsync=1", "--fsync=500"];
    tools::run("fio", &[&job[..], &verify, &[&uri, &seed]].concat());
}

#[test]
fn images_of_every_format_are_protected_and_recovered() {
    need!("qemu-img", "qemu-nbd", "fio");
    let mut site = Site::start();
    let kinds = [
        ("web.qcow2", "qcow2", "cluster_size=64k"),
        ("web.vhdx", "vhdx", "block_size=1M"),
        ("web.vhd", "vpc", "force_size=on"),
        ("web.vmdk", "vmdk", "subformat=monolithicSparse"),
    ];
    let paths: Vec<PathBuf> =
        kinds.iter().zip(1..).map(|((name, format, options), seed)| make(&site, name, format, options, seed)).collect();

    // What is not meant is not guessed.
    let disguised = site.path("disguised.img");
    std::fs::copy(&paths[0], &disguised).unwrap();
    let refused = site.run(&["protect", "other", "--disk", disguised.to_str().unwrap()]);
    refused.assert_refused(&["disguised.img", "not named as one"]);

    let disks: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let machine = site.protect("web", &disks, &[]);
    assert!(paths.iter().all(|path| program_of(path).is_some()), "one program an image");
    site.wait_protected("web");
    let mut points = Vec::new();
    for round in 0..2 {
        for (disk, path) in machine.disks.iter().zip(&paths) {
            fio(&disk.nbd, round * 7 + 1);
            if round == 1 {
                assert!(kill_program_of(path));
            }
        }
        let point = text(&site.point("web")["id"]);
        let name = |kind: &str| format!("{kind}-{round}.img");
        let copies: Vec<PathBuf> = kinds
            .iter()
            .zip(&paths)
            .map(|((kind, format, _), path)| content(&site, path, format, &name(kind)))
            .collect();
        points.push((point, copies));
    }
    wait::until("it is told that a program was started again", LIMIT, || {
        site.run(&["events", "--json"]).stdout.contains("image_reopened").then_some(())
    });

    // Killed with everything that is in it, and started again.
    site.kill_9();
    wait::until("the programs of the killed agent end", LIMIT, || {
        paths.iter().all(|path| program_of(path).is_none()).then_some(())
    });
    site.up();
    site.wait_protected("web");
    let events = site.run(&["events", "--json"]).stdout;
    assert_eq!(events.matches("is compared").count(), 4, "the first time alone: {events}");
    fio(&machine.disks[0].nbd, 99);
    let point = text(&site.point("web")["id"]);
    let copies = kinds
        .iter()
        .zip(&paths)
        .map(|((kind, format, _), path)| content(&site, path, format, &format!("{kind}-last.img")));
    points.push((point, copies.collect()));

    for (number, (point, copies)) in points.iter().enumerate() {
        let folder = site.path(&format!("point-{number}"));
        std::fs::create_dir(&folder).unwrap();
        let exported =
            site.json(&["point", "export", "web", point, "--to", folder.to_str().unwrap(), "--format", "qcow2"]);
        assert_eq!(exported["files"].as_array().map(Vec::len), Some(4), "{exported}");
        for (disk, copy) in machine.disks.iter().zip(copies) {
            let file = folder.join(format!("{}.qcow2", disk.id));
            let (copy, file) = (copy.to_str().unwrap(), file.to_str().unwrap());
            tools::run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", copy, file]);
        }
    }
    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    assert!(paths.iter().all(|path| program_of(path).is_none()), "nobody has an image open");
    let left: Vec<String> = std::fs::read_dir(site.folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(".tidemark") || name.ends_with(".hrl"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    for (path, (_, format, _)) in paths.iter().zip(kinds).take(2) {
        tools::run("qemu-img", &["check", "-q", "-r", "leaks", "-f", format, path.to_str().unwrap()]);
    }
}

/// Writes on until its disk is gone; returns the disk as every acknowledged write left it, and the write that was under way.
fn write_until_gone(nbd: &str, start: &[u8], is_begun: &AtomicBool) -> (Vec<u8>, Option<(u64, Vec<u8>)>) {
    let mut model = start.to_vec();
    let mut random = image::Seeded(5);
    let Ok(mut client) = Client::connect(nbd) else { return (model, None) };
    for round in 0u64.. {
        let length = 512 * (1 + random.below(64));
        let offset = random.below((BYTES - length) / 512) * 512;
        let data = vec![1 + (round % 255) as u8; length as usize];
        if client.write(offset, &data).is_err() {
            return (model, Some((offset, data)));
        }
        model[offset as usize..][..data.len()].copy_from_slice(&data);
        is_begun.store(round > 200, Ordering::Release);
    }
    unreachable!("rounds do not end")
}

/// Whatever was acknowledged is in the image and in the next point; nothing is compared as a whole.
#[test]
fn an_agent_that_is_killed_under_load_loses_nothing_in_an_image() {
    need!("qemu-img", "qemu-nbd");
    let mut site = Site::start();
    let path = make(&site, "db.qcow2", "qcow2", "cluster_size=64k", 9);
    let machine = site.protect("db", &[&path], &[]);
    site.wait_protected("db");
    for kill in 0..3 {
        let start = std::fs::read(content(&site, &path, "qcow2", "start.img")).unwrap();
        let is_begun = AtomicBool::new(false);
        let nbd = &machine.disks[0].nbd;
        let (mut model, open) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| write_until_gone(nbd, &start, &is_begun));
            wait::until("it writes", LIMIT, || is_begun.load(Ordering::Acquire).then_some(()));
            if kill == 2 {
                // Both at once: only what is in the page cache is left.
                kill_program_of(&path);
            }
            site.kill_9();
            writer.join().unwrap()
        });
        site.up();
        let found = wait::until("its disk can be opened again", Duration::from_secs(60), || {
            Client::connect(nbd).ok().map(|client| drop(client.disconnect()))?;
            Some(std::fs::read(content(&site, &path, "qcow2", "found.img")).unwrap())
        });
        let (offset, data) = open.expect("the kill met a write");
        // In sectors: it may have been done in part.
        for (index, sector) in data.chunks(512).enumerate() {
            let at = offset as usize + index * 512;
            if found[at..at + 512] == *sector {
                model[at..at + 512].copy_from_slice(sector);
            }
        }
        assert!(found == model, "kill {kill}: an acknowledged write is gone");
        site.wait_protected("db");
        site.point("db");
        let exported = site.export("db", "latest", &format!("kill-{kill}.qcow2"), "qcow2");
        tools::run(
            "qemu-img",
            &["compare", "-U", "-f", "qcow2", "-F", "qcow2", path.to_str().unwrap(), exported.to_str().unwrap()],
        );
    }
    // What a killed agent was about to tell may be lost; what the last one found is told.
    let events = wait::until("the last start is told", LIMIT, || {
        let events = site.run(&["events", "--json"]).stdout;
        events.contains("goes on after its agent was killed").then_some(events)
    });
    assert!(events.matches("the whole of disk").count() <= 1, "the first time at most: {events}");
}
