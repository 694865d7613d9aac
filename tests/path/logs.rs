//! The logs beside a protected disk are real HRL files, and what is none is told so.

use std::path::{Path, PathBuf};

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{number, offline};
use tidemark_tests::{Site, wait};

fn logs_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "hrl") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn closed_logs_beside_the_disk_verify_and_replay() {
    let mut site = Site::start();
    let folder = site.path("disks");
    std::fs::create_dir(&folder).unwrap();
    let disk = folder.join("disk.img");
    image::make_mixed(&disk, 16 * MIB, 1);
    let before = site.path("before.img");
    image::copy(&disk, &before);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    // Paused, the log keeps all that follows.
    site.json(&["pause", "web"]);
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut seeded = image::Seeded(2);
    for _ in 0..300 {
        let mut data = vec![0; 512 * (1 + seeded.below(16)) as usize];
        seeded.fill(&mut data);
        client.write(seeded.below(16 * MIB / 512 - 16) * 512, &data).unwrap();
    }
    client.disconnect().unwrap();
    site.down();

    let logs = logs_in(&folder);
    assert!(!logs.is_empty(), "no .hrl file in {}", folder.display());
    let mut entries = 0;
    for log in &logs {
        let log = log.to_str().unwrap();
        let inspected = offline(&["hrl", "inspect", log, "--json"]);
        assert_eq!(inspected.code, 0, "{}", inspected.describe());
        let inspected = inspected.json();
        assert_eq!(inspected["closed"], true, "a clean end closes the log: {inspected}");
        assert!(number(&inspected["header"]["eol_location"]) > 0);
        for entry in inspected["entries"].as_array().unwrap() {
            assert_eq!(entry["checksum_ok"], true, "{entry}");
            entries += 1;
        }
        let verified = offline(&["hrl", "verify", log]);
        assert_eq!(verified.code, 0, "{}", verified.describe());
    }
    assert!(entries >= 300, "{entries} entries for 300 writes");
    // Replaying them onto the disk as it was gives the disk as it is: the logs hold all that changed.
    let mut arguments = vec!["hrl", "apply"];
    arguments.extend(logs.iter().map(|log| log.to_str().unwrap()));
    arguments.extend(["--to", before.to_str().unwrap()]);
    let applied = offline(&arguments);
    assert_eq!(applied.code, 0, "{}", applied.describe());
    image::assert_same(&disk, &before);
}

#[test]
fn what_is_no_sound_log_is_named() {
    let mut site = Site::start();
    let folder = site.path("disks");
    std::fs::create_dir(&folder).unwrap();
    let disk = folder.join("disk.img");
    image::make_mixed(&disk, MIB, 1);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    site.json(&["pause", "web"]);
    let mut client = Client::connect(machine.nbd()).unwrap();
    for block in 0..20 {
        client.write(block * 4096, &[block as u8; 4096]).unwrap();
    }
    client.disconnect().unwrap();
    site.down();
    let log = wait::until("a log with entries", tidemark_tests::site::LIMIT, || {
        logs_in(&folder).into_iter().max_by_key(|log| std::fs::metadata(log).unwrap().len())
    });
    let content = std::fs::read(&log).unwrap();
    assert!(content.len() > 20 * 4096, "the writes are in the log");

    let case = |name: &str, content: &[u8]| {
        let path = site.path(name);
        use std::os::unix::fs::FileExt;
        std::fs::File::create(&path).unwrap().write_all_at(content, 0).unwrap();
        let path = path.to_str().unwrap().to_owned();
        let verified = offline(&["hrl", "verify", &path]);
        assert_eq!(verified.code, 1, "{name}: {}", verified.describe());
        assert!(verified.stdout.contains("byte ") || verified.stderr.contains("error: "), "{}", verified.describe());
        let inspected = offline(&["hrl", "inspect", &path, "--json"]);
        assert!(matches!(inspected.code, 0 | 1), "{name}: {}", inspected.describe());
        path
    };
    case("empty.hrl", &[]);
    case("alien.hrl", &vec![0x7f; 100_000]);
    case("header-only.hrl", &content[..4096]);
    case("truncated.hrl", &content[..content.len() - 512]);
    let mut flipped = content.clone();
    let last_set = flipped.len() - 4096;
    flipped[last_set + 40] ^= 1;
    case("flipped.hrl", &flipped);
    // A back-link to itself must not run for ever.
    let mut cyclic = content.clone();
    cyclic[last_set..last_set + 8].fill(0);
    cyclic[last_set] = 1;
    let cyclic = case("cyclic.hrl", &cyclic);
    // Nothing is applied of a log that is not sound.
    let target = site.path("target.img");
    image::make_mixed(&target, MIB, 7);
    let before = site.path("target-before.img");
    image::copy(&target, &before);
    let applied = offline(&["hrl", "apply", &cyclic, "--to", target.to_str().unwrap()]);
    assert_eq!(applied.code, 1, "{}", applied.describe());
    image::assert_same(&before, &target);
    let absent = offline(&["hrl", "verify", "/nonexistent/x.hrl"]);
    assert_eq!(absent.code, 1, "{}", absent.describe());
    assert!(absent.stderr.contains("/nonexistent/x.hrl"), "{}", absent.describe());
}

/// What a role writes to its log, each line one object, for those who collect logs; levels by module; a filter that cannot be
/// read is said, and no reason not to work.
#[test]
fn what_roles_log_is_objects_when_that_is_asked_for() {
    let mut site = Site::prepare();
    for (role, filter) in [("config-server", "info"), ("process-server", "error,tidemark=nothing"), ("agent", "off")] {
        let mut command = std::process::Command::new(tidemark_tests::binary::tidemark());
        command.env("TIDEMARK_LOG_FORMAT", "json").env("TIDEMARK_LOG", filter);
        site.start_role_as(role, command);
    }
    site.wait_connected();
    let log = std::fs::read_to_string(site.path("site.log")).expect("the roles log");
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect();
    let has = |part: &str| lines.iter().any(|line| line["target"].as_str().is_some_and(|from| from.contains(part)));
    assert!(has("config_server"), "the configuration server notes what it does: {log}");
    assert!(lines.iter().any(|line| line["TIDEMARK_LOG"] == "error,tidemark=nothing"), "the bad filter is said: {log}");
    assert!(!has("roles::agent"), "the agent was to log nothing: {log}");
}
