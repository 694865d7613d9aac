//! A block device whose workload goes on as it is: the kernel tells what changes.

use std::os::unix::fs::FileExt;
use std::path::Path;

use tidemark_tests::block::Loop;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::text;
use tidemark_tests::{Site, need, need_root, tools};

/// As a program that knows nothing of us.
fn write(device: &Path, offset: u64, data: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(data, offset).unwrap();
    file.sync_all().unwrap();
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
