//! What a cut of the power leaves: any part of what was not synced, in any order, torn at sectors. The replica may hold what
//! the disk lost (a phantom), and must be the same as the disk after the scan.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tidemark_base::disk::Durability;
use tidemark_base::random::Random;
use tidemark_base::{Extent, ExtentSet, Position};
use tidemark_nbd::Export;

use super::{Ahead, Fixture, records_after, replay, write, write_all_at};
use crate::attach::Decision;
use crate::capture::splitter::Splitter;
use crate::protected::ProtectedDisk;
use crate::source::Source;

pub const REGION_BYTES: u64 = 4 << 20;
pub const DISK_BYTES: u64 = 6 * REGION_BYTES;

/// A process server, as far as content goes: what it holds, and up to where.
pub struct Replica {
    image: Vec<u8>,
    at: Position,
}

impl Replica {
    /// After the first replication.
    pub fn of(fixture: &Fixture, disk: &ProtectedDisk) -> Self {
        fixture.settle(disk);
        Self { image: fixture.content(), at: disk.state().logged }
    }

    /// Takes the records that follow, and acknowledges them.
    pub fn ship(&mut self, fixture: &Fixture, disk: &ProtectedDisk) {
        replay(disk, &records_after(disk, &self.at), &mut self.image);
        self.at = disk.state().logged;
        disk.acknowledged(fixture.server, self.at).unwrap();
    }

    /// Takes what is pending as it is on the disk now, and everything that was logged since. How much was read.
    pub fn scan(&mut self, fixture: &Fixture, disk: &ProtectedDisk) -> u64 {
        let pending = fixture.pending(disk);
        for extent in pending.iter() {
            disk.disk().read_at(extent.offset, &mut self.image[extent.offset as usize..extent.end() as usize]).unwrap();
        }
        let start = disk.state().logged.epoch.start();
        if self.at.epoch != start.epoch {
            self.at = start;
        }
        self.ship(fixture, disk);
        fixture.settle(disk);
        pending.total_bytes()
    }

    pub fn assert_equals(&self, fixture: &Fixture, what: &str) {
        let content = fixture.content();
        if content == self.image {
            return;
        }
        if let Some(at) = (0..content.len()).find(|&at| content[at] != self.image[at]) {
            panic!("{what}: the replica differs from the disk at byte {at}");
        }
    }
}

/// The files of a disk as they are on the media for certain.
pub struct Media {
    durable: BTreeMap<PathBuf, Vec<u8>>,
}

/// These are written through: each store is synced before anything depends on it. What is cleared without a sync only leaves
/// more behind.
fn is_written_through(path: &std::path::Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    name == "intent" || name == "session" || name.starts_with("consumer-") || name.starts_with("lost-")
}

fn files(fixture: &Fixture) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![fixture.folder.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found
}

fn read(path: &PathBuf) -> Vec<u8> {
    let mut content = Vec::new();
    std::fs::File::open(path).unwrap().read_to_end(&mut content).unwrap();
    content
}

impl Media {
    /// To be called when everything was just synced (a tick of the keeper).
    pub fn of(fixture: &Fixture) -> Self {
        Self { durable: files(fixture).into_iter().map(|path| (path.clone(), read(&path))).collect() }
    }

    /// The guest flushed its disk.
    pub fn flushed(&mut self, fixture: &Fixture) {
        self.durable.insert(fixture.path(), fixture.content());
    }

    /// Leaves of each file what was durable and any of the sectors that were written since, and boots anew.
    pub fn cut_power(&self, fixture: &mut Fixture, seed: u64) {
        let mut random = Random::new(seed);
        for path in files(fixture) {
            if is_written_through(&path) {
                continue;
            }
            let now = read(&path);
            let durable = self.durable.get(&path).cloned().unwrap_or_default();
            let is_longer = random.chance(1, 2);
            let mut left = durable.clone();
            left.resize(if is_longer { now.len().max(durable.len()) } else { durable.len() }, 0);
            // All of it, none of it, or half.
            let share = random.below(3);
            for at in (0..left.len().min(now.len())).step_by(512) {
                let end = (at + 512).min(left.len()).min(now.len());
                if random.chance(share, 2) {
                    left[at..end].copy_from_slice(&now[at..end]);
                }
            }
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            if left.len() != now.len() {
                file.set_len(left.len() as u64).unwrap();
            }
            for at in (0..left.len()).step_by(64 << 10) {
                let end = (at + (64 << 10)).min(left.len());
                if now.get(at..end) != Some(&left[at..end]) {
                    write_all_at(&file, &left[at..end], at as u64).unwrap();
                }
            }
        }
        super::crash::reboot(fixture);
    }
}

/// One life of a disk and several deaths.
pub fn live_and_die(seed: u64) {
    let mut random = Random::new(seed);
    let clock = Ahead::new();
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.clock = clock.clone();
    let mut attached = fixture.attach();
    let mut replica = Replica::of(&fixture, &attached.disk);
    // Since everything was last compared: a region that was named before a kill is named after it.
    let mut touched = ExtentSet::new();
    for life in 0..3 {
        let what = format!("seed {seed}, life {life}");
        let disk = attached.disk.clone();
        let splitter = Splitter::new(disk.clone()).unwrap();
        disk.tick();
        let mut media = Media::of(&fixture);
        for _ in 0..random.below(30) {
            match random.below(12) {
                0..=5 => {
                    let part = if random.chance(1, 2) { 6 } else { 1 };
                    let offset = 512 * random.below(DISK_BYTES / 512 / part - 128);
                    let data = vec![1 + random.below(255) as u8; 512 * (1 + random.below(100)) as usize];
                    touched.insert(Extent::new(offset, data.len() as u64));
                    write(&splitter, offset, &data).unwrap();
                }
                6 => {
                    let extent = Extent::new(512 * random.below(DISK_BYTES / 512 - 300), 512 * (1 + random.below(300)));
                    touched.insert(extent);
                    splitter.zero(extent, random.chance(1, 2), Durability::Cached).unwrap();
                }
                7 => {
                    splitter.flush().unwrap();
                    media.flushed(&fixture);
                }
                8 | 9 => replica.ship(&fixture, &disk),
                10 => {
                    disk.tick();
                    media = Media::of(&fixture);
                }
                _ => {
                    disk.tick();
                    clock.go(Duration::from_secs(40));
                    disk.tick();
                    media = Media::of(&fixture);
                    assert!(!disk.intent.is_any_set());
                }
            }
        }
        drop((splitter, disk));
        let is_killed = random.chance(1, 4);
        drop(attached);
        if !is_killed {
            media.cut_power(&mut fixture, random.draw());
        }
        attached = fixture.attach();
        let disk = &attached.disk;
        if is_killed {
            assert_eq!(attached.decision, Decision::ReadSlots, "{what}");
            assert!(fixture.pending(disk).is_empty(), "{what}: nothing is compared");
            replica.ship(&fixture, disk);
        } else {
            assert_eq!(attached.decision, Decision::ScanTouched, "{what}");
            let regions =
                touched.iter().flat_map(|extent| extent.offset / REGION_BYTES..=(extent.end() - 1) / REGION_BYTES);
            let regions: std::collections::BTreeSet<u64> = regions.collect();
            let read = replica.scan(&fixture, disk);
            assert!(read <= regions.len() as u64 * REGION_BYTES, "{what}: {read} bytes for {regions:?}");
            touched.clear();
        }
        replica.assert_equals(&fixture, &what);
    }
}

#[test]
fn after_any_cut_of_the_power_the_scan_makes_the_replica_equal_to_the_disk() {
    for seed in 0..10 {
        live_and_die(seed);
    }
}

#[test]
#[ignore = "takes a minute: more of the same"]
fn after_many_cuts_of_the_power() {
    for seed in 10..2000 {
        live_and_die(seed);
    }
}

/// A write that was acknowledged and shipped, never flushed, and that the power cut undoes: the replica must lose it as well.
#[test]
fn the_phantom_leaves_the_replica() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 4096]).unwrap();
    replica.ship(&fixture, &disk);
    disk.tick();
    let media = Media::of(&fixture);
    write(&splitter, 8192, &[2; 4096]).unwrap();
    replica.ship(&fixture, &disk);
    // What the server holds is known here, durably: and still the disk decides.
    disk.consumer(fixture.server).unwrap().store().unwrap();
    let shipped = disk.state().logged;
    drop((splitter, disk));
    // Nothing of it came to the media.
    for (path, content) in &media.durable {
        if !is_written_through(path) {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(content.len() as u64).unwrap();
            write_all_at(&file, content, 0).unwrap();
        }
    }
    super::crash::reboot(&mut fixture);
    let attached = fixture.attach();
    assert_eq!(fixture.content()[8192], 0, "the disk lost it");
    assert_eq!(replica.image[8192], 2, "the replica has it");
    assert_eq!(attached.disk.cursor(fixture.server), Some(shipped));
    replica.scan(&fixture, &attached.disk);
    replica.assert_equals(&fixture, "phantom");
    // The lost sequence is never used for another write: it would be taken for a repeat.
    write(&Splitter::new(attached.disk.clone()).unwrap(), 0, &[3; 512]).unwrap();
    assert_ne!(attached.disk.state().logged.epoch, shipped.epoch);
}

/// Marks past the last sync of the log are lost with it, and that is said.
#[test]
fn marks_that_a_power_cut_took_are_reported() {
    use crate::events::EventKind;
    use crate::mark::Marker;
    use tidemark_proto::replication::Consistency;
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let marker =
        Marker::new(tidemark_base::MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 512]).unwrap();
    let kept = marker.mark(Consistency::Crash, "kept", true).unwrap();
    disk.tick();
    write(&splitter, 512, &[2; 512]).unwrap();
    marker.mark(Consistency::Crash, "lost", true).unwrap();
    marker.mark(Consistency::Crash, "lost too", true).unwrap();
    drop((splitter, marker, disk));
    super::crash::reboot(&mut fixture);
    let attached = fixture.attach();
    assert_eq!(attached.lost_marks, 2);
    assert!(fixture.kinds().contains(&EventKind::MarksLost) && fixture.kinds().contains(&EventKind::PowerWasLost));
    assert_ne!(attached.disk.state().logged.epoch, kept.positions[0].1.epoch);
}

/// How much is compared after a power cut, for three ways to write. `cargo test -p tidemark-host figures -- --nocapture`
#[test]
fn figures_of_what_is_compared_after_a_power_cut() {
    const GIB: u64 = 1 << 30;
    let mut lines = Vec::new();
    let workloads: [(&str, fn(&mut Random, u64) -> u64); 3] = [
        ("sequential, 4 KiB", |_, index| index * 4096),
        ("random, 4 KiB over 1 GiB", |random, _| random.below(GIB / 4096) * 4096),
        ("hot spot, 95 % in 32 MiB", |random, _| {
            let within = if random.chance(95, 100) { 32 << 20 } else { GIB };
            random.below(within / 4096) * 4096
        }),
    ];
    for (name, place) in workloads {
        let clock = Ahead::new();
        let mut fixture = Fixture::new(8 * GIB);
        fixture.clock = clock.clone();
        let disk = fixture.attach_in_sync();
        let splitter = Splitter::new(disk.clone()).unwrap();
        let mut random = Random::new(7);
        // A minute of writes, of which everything was shipped; the last half minute is named.
        let begin = Instant::now();
        let mut written = 0u64;
        for second in 0..60u64 {
            for index in 0..20 {
                write(&splitter, place(&mut random, second * 20 + index), &[second as u8; 4096]).unwrap();
                written += 4096;
            }
            disk.acknowledged(fixture.server, disk.state().logged).unwrap();
            clock.go(Duration::from_secs(1));
            disk.tick();
        }
        let took = begin.elapsed();
        drop((splitter, disk));
        super::crash::reboot(&mut fixture);
        let attached = fixture.attach();
        assert_eq!(attached.decision, Decision::ScanTouched);
        let compared = fixture.pending(&attached.disk).total_bytes();
        assert_eq!(compared, attached.scan_bytes);
        lines.push(format!(
            "{name:26} {:6} KiB written, {:6} MiB of 8192 MiB compared ({:.1} %), {} ms",
            written >> 10,
            compared >> 20,
            compared as f64 / (8 * GIB) as f64 * 100.0,
            took.as_millis()
        ));
        // Never a full resync: nothing outside of where it wrote, and less where it came back to the same place.
        assert!(compared <= GIB + REGION_BYTES, "{name}: {compared}");
        if name.starts_with("sequential") {
            assert!(compared <= 8 * REGION_BYTES, "{name}: {compared}");
        }
    }
    println!("{}", lines.join("\n"));
}
