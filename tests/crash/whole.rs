//! `kill -9` of everything at once, under load.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{LIMIT, number, text};
use tidemark_tests::{Machine, Site, wait};

pub const BLOCK: u64 = 4096;

/// A writer that runs until its connection breaks, and what it knows then.
pub struct Load {
    thread: std::thread::JoinHandle<Written>,
    stop: Arc<AtomicBool>,
}

/// Blocks with their last acknowledged content, and the one write that was in flight at the end.
#[derive(Default)]
pub struct Written {
    pub acknowledged: BTreeMap<u64, u64>,
    pub in_flight: Option<(u64, u64)>,
    pub count: u64,
}

/// Content of a block: recognisable, and different in every write.
fn content(stamp: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    Seeded(stamp).fill(&mut data);
    data[..8].copy_from_slice(&stamp.to_le_bytes());
    data
}

impl Load {
    /// Writes random blocks of `[start, start + bytes)` until the connection breaks.
    pub fn start(uri: &str, start: u64, bytes: u64, seed: u64) -> Self {
        let mut client = Client::connect(uri).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut seeded = Seeded(seed);
            let mut written = Written::default();
            while !stopped.load(Ordering::SeqCst) {
                let offset = start + seeded.below(bytes / BLOCK) * BLOCK;
                let stamp = seeded.number();
                written.in_flight = Some((offset, stamp));
                if client.write(offset, &content(stamp)).is_err() {
                    return written;
                }
                written.acknowledged.insert(offset, stamp);
                written.in_flight = None;
                written.count += 1;
            }
            written
        });
        Self { thread, stop }
    }

    /// Ends it while the disk is there.
    pub fn finish(self) -> Written {
        self.stop.store(true, Ordering::SeqCst);
        self.join()
    }

    /// Waits until the connection broke.
    pub fn join(self) -> Written {
        self.thread.join().unwrap()
    }
}

impl Written {
    /// Every acknowledged write is on the disk; a block whose newer write was in flight may have either.
    #[track_caller]
    pub fn assert_on(&self, disk: &std::path::Path) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open(disk).unwrap();
        let mut data = vec![0; BLOCK as usize];
        for (offset, stamp) in &self.acknowledged {
            file.read_exact_at(&mut data, *offset).unwrap();
            let in_flight = self.in_flight.filter(|(at, _)| at == offset).map(|(_, stamp)| content(stamp));
            assert!(
                data == content(*stamp) || in_flight.is_some_and(|newer| data == newer),
                "{} lost the acknowledged write at {offset}",
                disk.display()
            );
        }
    }
}

/// The replica is the source, with all of `written` in both.
#[track_caller]
pub fn assert_recovered(site: &Site, machine: &Machine, written: &[Written]) {
    site.wait_protected(&machine.name);
    site.point(&machine.name);
    let recovered = site.export(&machine.name, "latest", &format!("recovered-{}.raw", site.pid()), "raw");
    image::assert_same(&machine.disks[0].path, &recovered);
    for written in written {
        written.assert_on(&recovered);
    }
    std::fs::remove_file(recovered).unwrap();
}

#[test]
fn killed_under_load_nothing_acknowledged_is_lost() {
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 64 * MIB, 1);
    let machine = site.protect("db", &[&disk], &[]);
    site.wait_protected("db");
    let first = site.point("db");
    let reference = site.path("reference.img");
    image::copy(&disk, &reference);
    let mut written = Vec::new();
    for round in 0..3 {
        // Regions of their own, so that each round's writes can be checked at the end.
        let loads = [0, 1].map(|half| {
            let region = 64 * MIB / 6;
            let region = region - region % BLOCK;
            Load::start(machine.nbd(), (round * 2 + half) * region, region, 100 + round * 2 + half)
        });
        let before = number(&site.status("db")["written_bytes"]);
        wait::until("the load is on its way", LIMIT, || {
            (number(&site.status("db")["written_bytes"]) > before + 2 * MIB).then_some(())
        });
        site.kill_9();
        written.extend(loads.map(Load::join));
        site.up();
        assert_recovered(&site, &machine, &written);
    }
    assert!(written.iter().all(|written| written.count > 20), "hardly any load");
    // The point from before the kills is what it was.
    image::assert_same(&reference, &site.export("db", &text(&first["id"]), "first.raw", "raw"));
}

#[test]
fn killed_in_the_initial_replication_it_goes_on() {
    let mut site = Site::start();
    let disk = site.path("disk.img");
    image::make_mixed(&disk, 256 * MIB, 2);
    let machine = site.protect("db", &[&disk], &[]);
    let load = Load::start(machine.nbd(), 0, 256 * MIB, 7);
    let state = wait::until("something was sent", LIMIT, || {
        let status = site.status("db");
        (number(&status["sent_bytes"]) > 4 * MIB).then(|| status["state"].clone())
    });
    assert_ne!(state, "protected", "the initial replication was over before it could be interrupted");
    site.kill_9();
    let written = load.join();
    site.up();
    assert_recovered(&site, &machine, &[written]);
}
