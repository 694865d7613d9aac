//! What a mark holds: every write acknowledged before it, none admitted after it, on all disks of the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tidemark_base::{Clock, SystemClock, Timestamp};
use tidemark_tests::image::{self, MIB};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::text;
use tidemark_tests::{Site, wait};

/// One write of a counter: when it was sent and acknowledged.
struct Written {
    counter: u64,
    sent: Timestamp,
    acknowledged: Timestamp,
}

/// Writes 1, 2, 3 … as one block at `offset` until told to stop; each after the acknowledgement of the one before.
fn count(uri: &str, offset: u64, stop: &AtomicBool) -> Vec<Written> {
    let clock = SystemClock::new();
    let mut client = Client::connect(uri).unwrap();
    let mut written = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let counter = written.len() as u64 + 1;
        let block = counter.to_le_bytes().repeat(512);
        let sent = clock.wall_now();
        client.write(offset, &block).unwrap();
        written.push(Written { counter, sent, acknowledged: clock.wall_now() });
    }
    written
}

fn counter_at(uri: &str, offset: u64) -> u64 {
    let mut block = [0; 4096];
    Client::connect(uri).unwrap().read(offset, &mut block).unwrap();
    let counter = u64::from_le_bytes(block[..8].try_into().unwrap());
    assert!(block.chunks(8).all(|part| part == counter.to_le_bytes()), "a torn write at {offset}");
    counter
}

#[test]
fn a_mark_under_load_holds_what_was_acknowledged_and_no_more() {
    const WRITERS: u64 = 4;
    let site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 16 * MIB, 1);
    // A machine that builds other things meanwhile may send slower than this writes: the log must hold it.
    site.json(&["policy", "create", "roomy", "--log-limit", "8G"]);
    let machine = site.protect("db", &[&disk], &["--policy", "roomy"]);
    site.wait_protected("db");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (uri, stop) = (machine.nbd().to_owned(), stop.clone());
            std::thread::spawn(move || count(&uri, writer * MIB, &stop))
        })
        .collect();
    let points: Vec<_> = (0..4).map(|_| site.point("db")).collect();
    stop.store(true, Ordering::Relaxed);
    let written: Vec<Vec<Written>> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();

    for point in &points {
        let mark = Timestamp::parse(&text(&point["time"])).unwrap();
        let served = site.serve("db", &text(&point["id"]), &[]);
        for (writer, written) in written.iter().enumerate() {
            let held = counter_at(served.nbd(), writer as u64 * MIB);
            // Before the writer's first write the block holds what the disk was made with.
            let last_before = written.iter().filter(|write| write.acknowledged < mark).map(|write| write.counter).max();
            let first_after = written.iter().filter(|write| write.sent > mark).map(|write| write.counter).min();
            if let Some(last) = last_before {
                assert!(
                    held >= last,
                    "writer {writer}: write {last} was acknowledged before {mark}, the point has {held}"
                );
                assert!(held <= written.len() as u64, "writer {writer}: {held} was never written");
                if let Some(first) = first_after {
                    assert!(held < first, "writer {writer}: write {first} was sent after {mark}, the point has {held}");
                }
            }
        }
    }
    let total: usize = written.iter().map(Vec::len).sum();
    assert!(total > 100, "{total} writes are no load");
}

#[test]
fn the_disks_of_a_machine_are_marked_at_one_instant() {
    let site = Site::start();
    let disks = [site.path("system.img"), site.path("data.img")];
    for disk in &disks {
        std::fs::File::create(disk).unwrap().set_len(16 * MIB).unwrap();
    }
    site.json(&["policy", "create", "roomy", "--log-limit", "8G"]);
    let machine = site.protect("db", &[&disks[0], &disks[1]], &["--policy", "roomy"]);
    assert_eq!(machine.disks.len(), 2);
    site.wait_protected("db");
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(Mutex::new(0));
    // Round n goes to the first disk, and to the second only when the first has acknowledged it.
    let writer = std::thread::spawn({
        let (machine, stop, rounds) = (machine.clone(), stop.clone(), rounds.clone());
        move || {
            let mut clients: Vec<Client> =
                machine.disks.iter().map(|disk| Client::connect(&disk.nbd).unwrap()).collect();
            for round in 1u64.. {
                let block = round.to_le_bytes().repeat(512);
                for client in &mut clients {
                    client.write(4096, &block).unwrap();
                }
                *rounds.lock().unwrap() = round;
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
    });
    wait::until("the writer runs", tidemark_tests::site::LIMIT, || (*rounds.lock().unwrap() > 10).then_some(()));
    let points: Vec<_> = (0..4).map(|_| site.point("db")).collect();
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    for point in points {
        let served = site.serve("db", &text(&point["id"]), &[]);
        let held: Vec<u64> = machine.disks.iter().map(|disk| counter_at(served.nbd_of(disk), 4096)).collect();
        assert!(held[0] == held[1] || held[0] == held[1] + 1, "no instant had rounds {held:?}: {point}");
        assert!(held[1] >= 10, "{held:?}");
    }
    site.point("db");
    let folder = site.path("recovered");
    std::fs::create_dir(&folder).unwrap();
    site.json(&["point", "export", "db", "latest", "--to", folder.to_str().unwrap(), "--format", "raw"]);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2, "one image per disk: {files:?}");
    for disk in &disks {
        assert!(
            files.iter().any(|file| image::first_difference(disk, file).unwrap().is_none()),
            "{} is in none of {files:?}",
            disk.display()
        );
    }
}
