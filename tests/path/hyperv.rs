//! The logs of a Hyper-V host, from a folder to a recovered disk.

use std::path::{Path, PathBuf};

use tidemark_tests::image::{self, MIB};
use tidemark_tests::site::{LIMIT, text};
use tidemark_tests::{Site, need, tools, wait};

struct Host {
    folder: PathBuf,
    image: PathBuf,
}

impl Host {
    /// The guest writes, and the host's log of it is closed.
    fn write(&self, number: u8, writes: &[(u64, u64, u8)]) {
        let image = self.image.to_str().unwrap();
        let commands: Vec<String> =
            writes.iter().map(|(offset, length, byte)| format!("write -q -P {byte} {offset} {length}")).collect();
        let mut arguments = vec!["-f", "vhdx"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        arguments.push(image);
        tools::run("qemu-io", &arguments);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("path/hrl_writer.py");
        let new = self.folder.join("new");
        let words: Vec<String> = [script.to_str().unwrap(), new.to_str().unwrap(), image].map(str::to_owned).to_vec();
        let numbers = [number.to_string(), (number - 1).to_string()];
        let writes = writes.iter().map(|(offset, length, byte)| format!("{offset}:{length}:{byte}"));
        let all: Vec<String> = words.into_iter().chain(numbers).chain(writes).collect();
        tools::run("python3", &all.iter().map(String::as_str).collect::<Vec<_>>());
        // Under its name there is a whole log or none.
        std::fs::hard_link(&new, self.folder.join(format!("web_{number}.hrl"))).unwrap();
        std::fs::remove_file(new).unwrap();
    }

    /// The disk, by qemu-img.
    fn raw(&self, name: &str) -> PathBuf {
        let raw = self.folder.join(name);
        let (image, to) = (self.image.to_str().unwrap(), raw.to_str().unwrap());
        tools::run("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", image, to]);
        raw
    }
}

/// Makes points until one is the host's disk.
fn recover(site: &Site, expected: &Path, name: &str) -> PathBuf {
    let mut attempt = 0;
    wait::until("a point is the host's disk", LIMIT, || {
        attempt += 1;
        let point = site.run(&["point", "create", "web", "--json"]);
        if point.code != 0 {
            assert!(
                point.stderr.contains("is being replayed") || point.stderr.contains("is being replicated"),
                "{}",
                point.stderr
            );
            return None;
        }
        let exported = site.export("web", &text(&point.json()["id"]), &format!("{name}-{attempt}.raw"), "raw");
        let same = std::fs::read(&exported).unwrap() == std::fs::read(expected).unwrap();
        same.then_some(exported)
    })
}

#[test]
fn a_hyper_v_disk_is_recovered_from_its_logs() {
    need!("qemu-img", "qemu-io", "python3");
    let mut site = Site::start();
    let folder = site.path("host");
    std::fs::create_dir(&folder).unwrap();
    let host = Host { image: folder.join("web.vhdx"), folder };
    let image_path = host.image.to_str().unwrap().to_owned();
    tools::run("qemu-img", &["create", "-q", "-f", "vhdx", &image_path, "64M"]);
    host.write(1, &[(0, 4096, 1), (MIB, 3 * MIB, 2), (40 * MIB, 65536, 3)]);

    let raw = site.path("raw.img");
    image::make_mixed(&raw, MIB, 1);
    let refused = site.run(&["protect", "web", "--disk", raw.to_str().unwrap(), "--via", "hrl"]);
    refused.assert_refused(&["raw.img", "neither named .vhdx nor .vhd"]);
    // A disk of a Windows host is named as it is there; this one is none.
    let refused = site.run(&["protect", "web", "--disk", r"D:\Machines\web.vhdx", "--via", "rct"]);
    refused.assert_refused(&["nothing is protected via rct on Linux"]);
    let protected = site.json(&["protect", "web", "--disk", &image_path, "--via", "hrl"]);
    let attach = &protected["disks"][0]["attach"];
    assert!(attach["nbd"].is_null() && attach["file"].is_null(), "{protected}");
    assert_eq!(protected["disks"][0]["bytes"], 64 * MIB);
    site.wait_protected("web");
    recover(&site, &host.raw("first.img"), "first");

    host.write(2, &[(512, 1024, 4), (2 * MIB, 65536, 0), (63 * MIB, MIB, 5)]);
    host.write(3, &[(512, 512, 6)]);
    recover(&site, &host.raw("second.img"), "second");

    site.kill_9();
    host.write(4, &[(20 * MIB, 8192, 7)]);
    site.up();
    recover(&site, &host.raw("third.img"), "third");
    let log = std::fs::read_to_string(site.path("site.log")).unwrap();
    assert_eq!(log.matches("image compared with its copy").count(), 1, "after the first time logs were enough");
    for number in 1..=4 {
        assert!(host.folder.join(format!("web_{number}.hrl")).exists(), "what is the host's stays");
    }
    assert_eq!(site.run(&["unprotect", "web"]).code, 0);
    let copies = std::fs::read_dir(site.state().join("agent/imported")).unwrap();
    assert_eq!(copies.map(|copy| copy.unwrap().path()).collect::<Vec<_>>(), Vec::<PathBuf>::new(), "no copy stays");
}
