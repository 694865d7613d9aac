//! A block device whose workload goes on as it is: the kernel tells what changes.

use std::os::unix::fs::FileExt;
use std::path::Path;

use tidemark_tests::block::{self, Loop, Mount};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, need_root, tools};

/// As a program that knows nothing of us.
fn write(device: &Path, offset: u64, data: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(data, offset).unwrap();
    file.sync_all().unwrap();
}

fn make(path: &Path, data: &[u8]) {
    let mut file = std::fs::File::create(path).unwrap();
    std::io::Write::write_all(&mut file, data).unwrap();
    file.sync_all().unwrap();
}

/// As on a server with one disk: the agent's own state lies on it.
#[test]
fn a_disk_that_the_agent_itself_lives_on_is_recovered_to_its_points() {
    need!("losetup", "mke2fs", "mount", "umount", "e2fsck");
    need_root!("programs in the kernel, file systems");
    let test = "a_disk_that_the_agent_itself_lives_on_is_recovered_to_its_points";
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return tools::skipped(test, "needs a kernel that describes its types");
    }
    block::private_mounts();
    // As systemd has it: /run is in memory.
    std::fs::create_dir_all("/run/tidemark").unwrap();
    let memory = Mount::memory(Path::new("/run/tidemark"), 256 * MIB);
    let mut site = Site::start_roles();
    let image = site.path("disk.img");
    std::fs::File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let device = Loop::attach(&image);
    let path = device.path().to_str().unwrap().to_owned();
    tools::run("mke2fs", &["-q", "-t", "ext4", &path]);
    let root = Mount::device(device, &site.path("server"), "rw");
    let host = site.start_host("server");
    site.json(&["protect", "web", "--disk", &path, "--via", "bpf", "--host", &host]);
    site.wait_protected("web");

    let mut written = Vec::new();
    for round in 1..=3u8 {
        let file = root.path().join(format!("file-{round}"));
        make(&file, &[round; 300_000]);
        written.push(format!("file-{round}"));
        let point = site.point("web");
        let exported = site.export("web", &text(&point["id"]), &format!("exported-{round}.raw"), "raw");
        // What the agent keeps there itself is a part of the disk, and no reason for changes without end.
        let recovered = Mount::image(&exported, &site.path("recovered"));
        for (file, round) in written.iter().zip(1u8..) {
            assert!(std::fs::read(recovered.path().join(file)).unwrap() == vec![round; 300_000], "{file}");
        }
        assert!(recovered.path().join("authority").is_dir(), "the agent's own files as well");
        recovered.unmount();
        // Its journal was replayed by the mount.
        tools::run("e2fsck", &["-fn", exported.to_str().unwrap()]);
        if round == 2 {
            // What the kernel told meanwhile, and what was kept in memory, outlive the agent.
            site.kill_role("server");
            make(&root.path().join("meanwhile"), &[7; 100_000]);
            site.start_host_again("server");
            site.wait_connected();
            site.wait_protected("web");
        }
    }
    let compared = site.run(&["events", "--json"]);
    assert!(!compared.stdout.contains("nobody watched the block device"), "{}", compared.stdout);
    let state = root.path().join("agent/devices");
    assert!(!state.exists() || std::fs::read_dir(&state).unwrap().next().is_none(), "nothing of it lies on the disk");
    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    site.down();
    root.unmount();
    memory.unmount();
}

#[test]
fn a_device_that_is_written_to_as_before_is_recovered_to_its_points() {
    need!("losetup");
    need_root!("programs in the kernel");
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        let test = "a_device_that_is_written_to_as_before_is_recovered_to_its_points";
        return tools::skipped(test, "needs a kernel that describes its types");
    }
    let mut site = Site::start();
    let image = site.path("disk.img");
    image::make_mixed(&image, 32 * MIB, 5);
    let device = Loop::attach(&image);
    let path = device.path().to_str().unwrap().to_owned();

    let refused = site.run(&["protect", "web", "--disk", image.to_str().unwrap(), "--via", "bpf"]);
    refused.assert_refused(&["not a block device"]);
    assert!(refused.stderr.contains("--via nbd"), "{}", refused.stderr);
    let protected = site.json(&["protect", "web", "--disk", &path, "--via", "bpf"]);
    let disk = &protected["disks"][0];
    assert!(disk["attach"]["nbd"].is_null() && disk["attach"]["file"].is_null(), "{protected}");
    let pins = format!("/sys/fs/bpf/tidemark-{}", text(&disk["id"]));
    assert!(Path::new(&pins).is_dir());
    site.wait_protected("web");
    assert_eq!(site.json(&["protect", "web", "--disk", &path])["disks"], protected["disks"], "the same again");
    site.run(&["protect", "web", "--disk", &path, "--via", "nbd"]).assert_refused(&["via bpf"]);

    let mut references = Vec::new();
    for round in 1..=3u8 {
        // A little, and more than is logged.
        write(device.path(), u64::from(round) * 7 * MIB + 4096, &[round; 5000]);
        if round == 2 {
            for granule in 0..64 {
                write(device.path(), 8 * MIB + granule * 65536, &[round; 512]);
            }
        }
        let point = site.point("web");
        let reference = site.path(&format!("reference-{round}.img"));
        image::copy(&image, &reference);
        references.push((text(&point["id"]), reference));
    }
    assert_eq!(site.status("web")["mode"], "bitmap");

    // The kernel goes on watching while nobody of us is there.
    site.kill_9();
    write(device.path(), 30 * MIB, &[9; 4096]);
    site.up();
    site.wait_protected("web");
    let point = site.point("web");
    references.push((text(&point["id"]), image.clone()));
    for (number, (point, reference)) in references.iter().enumerate() {
        let exported = site.export("web", point, &format!("exported-{number}.raw"), "raw");
        image::assert_same(reference, &exported);
    }
    let compared = site.run(&["events", "--json"]);
    assert!(!compared.stdout.contains("nobody watched the block device"), "{}", compared.stdout);
    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    assert!(!Path::new(&pins).exists(), "nothing stays in the kernel");
}
