//! Interval mode: a log a cycle, in which later writes replace earlier ones.

use std::time::{Duration, Instant};

use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::number;
use tidemark_tests::{Site, tools, wait};

/// What ends a cycle looks every second, and the last one is on its way for a moment.
const LATE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(500);

#[test]
fn a_cycle_sends_the_last_version_of_a_block_alone() {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 32 * MIB, 1);
    site.json(&["policy", "create", "cycles", "--frequency", "30s"]);
    let machine = site.protect("web", &[&disk], &["--policy", "cycles"]);
    site.wait_protected("web");
    site.point("web");
    let before = number(&site.status("web")["sent_bytes"]);
    let mut client = Client::connect(machine.nbd()).unwrap();
    let mut seeded = image::Seeded(2);
    let mut data = vec![0; 64 << 10];
    // 1 MiB of incompressible data, sixteen times over the same blocks.
    for _ in 0..16 {
        for block in 0..16 {
            seeded.fill(&mut data);
            client.write(block * data.len() as u64, &data).unwrap();
        }
    }
    // A point ends the cycle: no need to wait for it.
    site.point("web");
    let sent = number(&site.status("web")["sent_bytes"]) - before;
    assert!((1 << 20..4 << 20).contains(&sent), "1 MiB written sixteen times over cost {sent} bytes");
    image::assert_same(&disk, &site.export("web", "latest", "recovered.raw", "raw"));
}

/// What is written all the time leaves once in each of two cycles.
fn assert_cycles(frequency: &str, length: Duration) {
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 32 * MIB, 1);
    site.json(&["policy", "create", "cycles", "--frequency", frequency]);
    let machine = site.protect("web", &[&disk], &["--policy", "cycles"]);
    site.wait_protected("web");
    let durable = || site.status("web")["disks"][0]["positions"]["durable"].clone();
    let mut client = Client::connect(machine.nbd()).expect("the disk can be opened");
    let mut at = durable();
    assert!(at.is_string(), "{at}");
    let mut next = || {
        let mut looked = Instant::now();
        at = wait::until("a cycle ends", length * 2, || {
            if looked.elapsed() < LOOK_AGAIN {
                return None;
            }
            looked = Instant::now();
            client.write(MIB, &[7; 4096]).expect("it can be written");
            Some(durable()).filter(|now| *now != at)
        });
        Instant::now()
    };
    // The one that was under way.
    let mut began = next();
    for _ in 0..2 {
        let ended = next();
        let took = ended - began;
        assert!((length - LATE..length + LATE).contains(&took), "a cycle of {frequency} took {took:?}");
        began = ended;
    }
}

/// H30.
#[test]
fn h30_a_cycle_of_30_s_takes_30_s() {
    assert_cycles("30s", Duration::from_secs(30));
}

/// In a long run.
#[test]
fn h30_a_cycle_of_5_min_takes_5_min() {
    if !tools::is_long() {
        return;
    }
    assert_cycles("5m", Duration::from_secs(300));
}

#[test]
fn policies_are_checked() {
    let site = Site::start();
    site.run(&["policy", "create", "p", "--frequency", "7 parsecs"]).assert_usage_or_refused();
    site.json(&["policy", "create", "p", "--frequency", "5m"]);
    let list = site.json(&["policy", "list"]);
    assert!(list.as_array().unwrap().iter().any(|policy| policy["name"] == "p"), "{list}");
    let disk = site.path("disk.img");
    image::make_mixed(&disk, MIB, 1);
    let refused = site.run(&["protect", "web", "--disk", disk.to_str().unwrap(), "--policy", "nonesuch"]);
    refused.assert_refused(&["nonesuch"]);
}
