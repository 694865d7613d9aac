//! `resync`: the disk is compared with the replica, and what differs is sent.

use std::os::unix::fs::FileExt;

use serde_json::Value;
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number};
use tidemark_tests::{Site, wait};

fn sent(site: &Site) -> u64 {
    number(&site.status("web")["sent_bytes"])
}

/// A replicated disk of random data with some zeroes.
fn replicated(bytes: u64, seed: u64) -> (Site, std::path::PathBuf, tidemark_tests::site::Machine) {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, bytes, seed);
    let machine = site.protect("web", &[&disk], &[]);
    site.wait_protected("web");
    site.point("web");
    (site, disk, machine)
}

/// Compares, and waits until a new point can be made.
fn resync(site: &Site) -> Value {
    let bytes: u64 = site.status("web")["disks"].as_array().unwrap().iter().map(|disk| number(&disk["bytes"])).sum();
    let before = number(&site.status("web")["compare"]["compared_bytes"]);
    let done = site.json(&["resync", "web"]);
    // It ends when everything is compared.
    assert_eq!(number(&done["compare"]["compared_bytes"]) - before, bytes, "{done}");
    let status = site.status("web");
    assert_eq!(status["state"], "protected", "{status}");
    site.point("web");
    status
}

/// Behind the agent's back: nothing knows of it.
fn edit(disk: &std::path::Path, seed: u64, blocks: u64, of: u64) -> u64 {
    let file = std::fs::OpenOptions::new().write(true).open(disk).unwrap();
    let mut seeded = image::Seeded(seed);
    let mut data = [0; 4096];
    for _ in 0..blocks {
        seeded.fill(&mut data);
        file.write_all_at(&data, seeded.below(of) * 4096).unwrap();
    }
    file.sync_all().unwrap();
    blocks * 4096
}

#[test]
fn a_resync_of_an_identical_replica_sends_almost_nothing() {
    let (site, disk, _machine) = replicated(128 * MIB, 21);
    let before = sent(&site);
    resync(&site);
    let cost = sent(&site) - before;
    assert!(cost > 0 && cost < 128 * MIB / 500, "{cost} bytes for a disk that did not change");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}

#[test]
fn a_resync_sends_the_one_percent_that_differs() {
    const BYTES: u64 = 128 * MIB;
    let (site, disk, machine) = replicated(BYTES, 22);
    let old = site.json(&["point", "list", "web"]);
    let edited = edit(&disk, 23, BYTES / 4096 / 100, BYTES / 4096);
    let before = sent(&site);
    site.json(&["resync", "web", "--no-wait"]);
    // The guest writes on meanwhile.
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut seeded = image::Seeded(24);
    let mut data = [0; 4096];
    let mut written = 0;
    wait::until("the resync ends", LIMIT, || {
        for _ in 0..8 {
            seeded.fill(&mut data);
            client.write(seeded.below(BYTES / 4096) * 4096, &data).unwrap();
            written += 4096;
        }
        let status = site.status("web");
        (status["state"] == "protected" && number(&status["sent_bytes"]) > before + edited).then_some(())
    });
    client.flush().unwrap();
    site.wait_sent("web");
    site.point("web");
    let cost = sent(&site) - before;
    let expected = edited + written;
    assert!(cost >= edited && cost < expected + expected / 4 + BYTES / 500, "{cost} bytes for {expected} that differ");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
    // Every point from before is still there.
    let points = |list: &Value| -> Vec<String> {
        list.as_array().map(|list| list.iter().map(|point| point["id"].to_string()).collect()).unwrap_or_default()
    };
    let now = points(&site.json(&["point", "list", "web"]));
    assert!(!points(&old).is_empty() && points(&old).iter().all(|point| now.contains(point)), "{old} {now:?}");
}

/// Both ends die in the middle of a compare; it ends all the same, and the replica is right.
#[test]
fn a_resync_outlives_a_kill() {
    const BYTES: u64 = 256 * MIB;
    let (mut site, disk, _machine) = replicated(BYTES, 25);
    edit(&disk, 26, 400, BYTES / 4096);
    site.json(&["resync", "web", "--no-wait"]);
    site.kill_9();
    site.up();
    site.wait_protected("web");
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}

/// A resync that was asked for by mistake: whether it waits or runs, it ends at once and costs nothing; what the guest wrote
/// meanwhile is replicated, and every recovery point stays.
#[test]
fn a_resync_is_cancelled_at_no_cost() {
    const BYTES: u64 = 256 * MIB;
    let (site, disk, machine) = replicated(BYTES, 27);
    let points = |site: &Site| -> Vec<String> {
        let list = site.json(&["point", "list", "web"]);
        list.as_array().map(|list| list.iter().map(|point| point["id"].to_string()).collect()).unwrap_or_default()
    };
    let old = points(&site);
    // While it waits.
    site.json(&["pause", "web"]);
    site.json(&["resync", "web", "--no-wait"]);
    let mut client = Client::connect(machine.nbd()).unwrap();
    client.write(3 * MIB, &[27; 65536]).unwrap();
    wait::until("the whole disk waits", LIMIT, || {
        (number(&site.status("web")["pending_bytes"]) >= BYTES).then_some(())
    });
    let before = sent(&site);
    site.json(&["resync", "web", "--cancel"]);
    site.json(&["resume", "web"]);
    site.wait_sent("web");
    let status = site.wait_protected("web");
    assert_eq!(number(&status["compare"]["compared_bytes"]), 0, "{status}");
    assert!(sent(&site) - before < MIB, "{status}");
    // While it runs; cancelled again, nothing happens.
    let job = site.json(&["resync", "web", "--no-wait"]);
    wait::until("the compare begins", LIMIT, || {
        (number(&site.status("web")["compare"]["compared_bytes"]) > 0).then_some(())
    });
    site.json(&["resync", "web", "--cancel"]);
    let job = site.json(&["job", "show", job["job"].as_str().unwrap()]);
    assert_eq!(job["state"], "cancelled", "{job}");
    client.write(5 * MIB, &[28; 65536]).unwrap();
    client.disconnect().unwrap();
    site.json(&["resync", "web", "--cancel"]);
    site.wait_sent("web");
    let status = site.wait_protected("web");
    assert_eq!(number(&status["compare"]["left_bytes"]), 0, "{status}");
    assert_eq!(number(&status["compare"]["differing_bytes"]), 0, "{status}");
    site.point("web");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
    let now = points(&site);
    assert!(!old.is_empty() && old.iter().all(|point| now.contains(point)), "{old:?} {now:?}");
}
