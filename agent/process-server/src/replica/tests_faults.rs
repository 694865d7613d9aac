//! Damage, full volumes, failed syncs and old copies: found, named, never shown, and lived through.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{Extent, Timestamp};
use tidemark_proto::replication::{CutKind, RefusalReason};

use super::testing::{Chance, SimStorage, TestHost};
use super::tests::{DISK_BYTES, check, open, scanned, session, small, tight};
use super::{Replica, ReplicaSet};
use crate::journal::Limits;
use crate::points::{PointSelector, Retention};
use crate::scrub::{self, Cursor, ScrubReport};

const LOOK_UPS_MAX: u64 = 20;

fn one_cut_a_segment() -> Limits {
    Limits { segment_cuts: 1, reserve_bytes: 0, ..Limits::default() }
}

fn whole(replica: &Replica, cut: u64) -> Vec<u8> {
    let mut read = vec![0xee; DISK_BYTES as usize];
    replica.view(cut).unwrap().read_at(0, &mut read).unwrap();
    read
}

#[test]
fn two_thousand_segments_take_at_most_twenty_look_ups_at_any_cut() {
    const SEGMENTS: u64 = 2000;
    let storage = SimStorage::default();
    let set = ReplicaSet::open(Arc::new(storage.clone()), one_cut_a_segment()).unwrap().0;
    let mut host = TestHost::new(DISK_BYTES);
    let mut chance = Chance(77);
    let replica = set.create(host.info).unwrap();
    let stream = session(&replica);
    host.send(&stream, CutKind::ScanStart, None, &mut chance).unwrap();
    let mark = host.mark(true);
    host.send(&stream, CutKind::ScanEnd, Some(mark), &mut chance).unwrap();
    while host.cut < SEGMENTS {
        host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
        if host.cut.is_multiple_of(3) {
            replica.merge_indexes(&Stop::new()).unwrap();
        }
    }
    set.sync(&replica).unwrap();
    let mut most = 0;
    let mut look = |replica: &Replica, cut: u64, chance: &mut Chance| {
        let view = replica.view(cut).unwrap();
        let expected = &host.contents[&cut];
        let mut read = vec![0xee; DISK_BYTES as usize];
        view.read(0, &mut read).unwrap();
        assert!(read == *expected, "cut {cut}");
        for _ in 0..4 {
            let at = chance.below(DISK_BYTES / 512) as usize * 512;
            let before = view.look_ups();
            view.read(at as u64, &mut read[at..at + 512]).unwrap();
            most = most.max(view.look_ups() - before);
            assert!(read[at..at + 512] == expected[at..at + 512]);
        }
        assert!(view.layers() as u64 <= LOOK_UPS_MAX, "cut {cut} asks {} indexes", view.layers());
    };
    (2..=SEGMENTS).step_by(13).chain(SEGMENTS - 70..=SEGMENTS).for_each(|cut| look(&replica, cut, &mut chance));
    let indexes = replica.statistics().indexes;
    assert!(indexes > 600, "{indexes} merged indexes");
    drop((stream, replica, set));

    let begin = std::time::Instant::now();
    let set = ReplicaSet::open(Arc::new(storage.clone()), one_cut_a_segment()).unwrap().0;
    let opening = begin.elapsed();
    let replica = set.get(host.info.disk).unwrap();
    assert_eq!(replica.open_report().rebuilt, Vec::<String>::new());
    assert_eq!(replica.statistics().indexes, indexes);
    (2..=SEGMENTS).step_by(41).for_each(|cut| look(&replica, cut, &mut chance));
    // The base moves into the middle of indexes of every level: what they say of segments that are gone falls through.
    for target in [700, 701, 1337] {
        crate::fold::fold(&replica, target, &Stop::new()).unwrap();
        assert_eq!(replica.floor(), target);
        (target..=SEGMENTS).step_by(29).for_each(|cut| look(&replica, cut, &mut chance));
        replica.merge_indexes(&Stop::new()).unwrap();
    }
    eprintln!("{indexes} indexes, at most {most} look-ups a read, opening {SEGMENTS} segments took {opening:?}");
    assert!(most <= LOOK_UPS_MAX, "{most} look-ups");
}

/// A small replica with merged indexes, points and a base.
fn small_world() -> (SimStorage, TestHost) {
    let storage = SimStorage::default();
    let limits = Limits { segment_cuts: 2, reserve_bytes: 0, ..Limits::default() };
    let set = ReplicaSet::open(Arc::new(storage.clone()), limits).unwrap().0;
    let mut host = TestHost::new(8192);
    let mut chance = Chance(5);
    let replica = set.create(host.info).unwrap();
    let stream = replica.begin_session(host.info.generation, 8192).unwrap();
    host.send(&stream, CutKind::ScanStart, None, &mut chance).unwrap();
    let mark = host.mark(true);
    host.send(&stream, CutKind::ScanEnd, Some(mark), &mut chance).unwrap();
    for cut in 3..=13 {
        let mark = (cut % 4 == 0).then(|| host.mark(true));
        host.send(&stream, CutKind::Records, mark, &mut chance).unwrap();
        set.sync(&replica).unwrap();
    }
    crate::fold::fold(&replica, 3, &Stop::new()).unwrap();
    replica.merge_indexes(&Stop::new()).unwrap();
    assert!(replica.statistics().indexes > 0 && replica.active().is_some());
    drop(stream);
    (storage, host)
}

/// What becomes of one flipped bit.
#[derive(Default)]
struct Flips {
    tried: u64,
    by_opening: u64,
    by_reading: u64,
    by_scrubbing: u64,
}

#[test]
fn every_single_flipped_bit_is_found_and_never_shown() {
    let (storage, host) = small_world();
    let limits = Limits { segment_cuts: 2, reserve_bytes: 0, ..Limits::default() };
    let mut flips = Flips::default();
    let mut silent = Vec::new();
    let mut kinds = BTreeSet::new();
    let mut files = storage.files();
    // What a fold or a replacement left behind says nothing any more.
    files.retain(|(name, _)| !name.ends_with("fold.pending") && !name.ends_with(".new"));
    let acknowledged = host.cut;
    let all_bits: u64 = files.iter().map(|(_, content)| content.len() as u64 * 8).sum();
    for (name, content) in &files {
        kinds.insert(name.rsplit(['/', '.']).next().unwrap().to_owned());
        let bits = content.len() as u64 * 8;
        // Every bit takes a minute (`TIDEMARK_EVERY_BIT=1`); always, every file's share of some 12,000.
        let stride = if std::env::var_os("TIDEMARK_EVERY_BIT").is_some() { 1 } else { (all_bits / 12_000).max(1) };
        for bit in (bits % stride..bits).step_by(stride as usize) {
            flips.tried += 1;
            let (set, failures) = ReplicaSet::open(Arc::new(storage.with_flipped_bit(name, bit)), limits).unwrap();
            let points_named = set.damaged_lines(host.info.machine) > 0;
            let Ok(replica) = set.get(host.info.disk) else {
                assert!(!failures.is_empty(), "{name} bit {bit}");
                flips.by_opening += 1;
                continue;
            };
            let report = replica.open_report();
            // A host that was told of more is behind nobody: it compares.
            let named = !report.damage.is_empty() || !report.rebuilt.is_empty() || points_named;
            let opened = named || replica.durable().cut < acknowledged;
            let mut read_failed = false;
            let mut read = vec![0; 8192];
            for (&cut, expected) in host.contents.range(replica.floor().max(1)..=replica.durable().cut) {
                if let Ok(view) = replica.view(cut) {
                    match view.read_at(0, &mut read) {
                        Ok(()) => assert!(read == *expected, "{name} bit {bit}: cut {cut} is silently wrong"),
                        Err(_) => read_failed = true,
                    }
                }
            }
            if opened {
                flips.by_opening += 1;
            } else if read_failed {
                flips.by_reading += 1;
            } else if !scrub::scrub(&replica, &Stop::new()).unwrap().sound || !set.check_points().is_empty() {
                flips.by_scrubbing += 1;
            } else {
                silent.push((name.clone(), bit));
            }
        }
    }
    let Flips { tried, by_opening, by_reading, by_scrubbing } = flips;
    eprintln!(
        "{tried} flipped bits: {by_opening} found by opening, {by_reading} by reading, {by_scrubbing} by scrubbing"
    );
    for kind in ["sealed", "active", "merged", "manifest", "copy", "points", "raw", "sums"] {
        assert!(kinds.contains(kind), "{kinds:?}");
    }
    assert!(silent.is_empty(), "{} of {tried}: {:?}", silent.len(), &silent[..silent.len().min(20)]);
    assert!(tried >= 10_000, "{tried}");
}

#[test]
fn a_manifest_is_there_twice_and_one_that_is_damaged_is_written_again() {
    let (storage, host) = small_world();
    let limits = Limits { segment_cuts: 2, reserve_bytes: 0, ..Limits::default() };
    let files = storage.files();
    let of = |name: &str| files.iter().find(|file| file.0.ends_with(name)).unwrap().clone();
    let (first, copy) = (of("/manifest"), of("/manifest.copy"));
    assert!(first.1 == copy.1);
    for ((name, good), other) in [(first.clone(), &copy.0), (copy.clone(), &first.0)] {
        for bit in (0..good.len() as u64 * 8).step_by(7) {
            let damaged = storage.with_flipped_bit(&name, bit);
            let (set, failures) = ReplicaSet::open(Arc::new(damaged.clone()), limits).unwrap();
            assert!(failures.is_empty(), "{name} bit {bit}: {failures:?}");
            let replica = set.get(host.info.disk).unwrap();
            assert!(replica.open_report().rebuilt.iter().any(|what| what.contains(&name)), "{name} bit {bit}");
            assert!(damaged.files().contains(&(name.clone(), good.clone())), "it is written again");
            let mut read = vec![0; 8192];
            replica.view(host.cut).unwrap().read_at(0, &mut read).unwrap();
            assert!(read == host.content);
            // One that turns while the replica is open is found by the scrub.
            damaged.write(&name, bit / 8, &[good[(bit / 8) as usize] ^ 1]);
            let report = scrub::scrub(&replica, &Stop::new()).unwrap();
            assert!(report.findings.iter().any(|found| found.what.contains(&name)), "{:?}", report.findings);
            assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
        }
        // Both at once: nothing is known, and what to do is said.
        let both = storage.with_flipped_bit(&name, 800).with_flipped_bit(other, 800);
        let (set, failures) = ReplicaSet::open(Arc::new(both), limits).unwrap();
        assert!(set.get(host.info.disk).is_err());
        assert!(failures[0].error.to_string().contains("protect the disk again"), "{failures:?}");
    }
    // A folder of before has no copy: it is made without a word.
    let old = storage.without_file(&copy.0);
    let (set, _) = ReplicaSet::open(Arc::new(old.clone()), limits).unwrap();
    assert!(set.get(host.info.disk).unwrap().open_report().rebuilt.is_empty());
    assert!(old.files().contains(&copy));
}

#[test]
fn a_header_that_turns_while_its_segment_is_open_is_found_and_written_again() {
    let (storage, host) = small_world();
    let limits = Limits { segment_cuts: 2, reserve_bytes: 0, ..Limits::default() };
    let names = |end: &str| storage.files().into_iter().map(|file| file.0).rfind(|name| name.ends_with(end)).unwrap();
    for name in [names(".active"), names(".sealed")] {
        let storage = storage.copy();
        let good = storage.files().into_iter().find(|file| file.0 == name).unwrap().1;
        let set = ReplicaSet::open(Arc::new(storage.clone()), limits).unwrap().0;
        let replica = set.get(host.info.disk).unwrap();
        for byte in [0, 13, 60, 150, 300, 511] {
            storage.write(&name, byte, &[good[byte as usize] ^ 4]);
            let report = scrub::scrub(&replica, &Stop::new()).unwrap();
            assert!(report.findings.iter().any(|found| found.file.contains(&name)), "{name} byte {byte}");
            for &first in &report.indexes {
                assert!(replica.repair_segment(first).unwrap());
            }
            assert!(storage.files().contains(&(name.clone(), good.clone())), "{name} byte {byte} is as it was");
            assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
        }
        drop((replica, set));
        // Without a server nothing is written.
        storage.write(&name, 60, &[good[60] ^ 4]);
        let before = storage.files();
        let folder = storage.folder(&format!("replicas/{}", host.info.disk));
        let report = scrub::verify_folder(folder, &Stop::new()).unwrap();
        assert!(!report.sound && storage.files() == before);
    }
}

#[test]
fn a_header_that_turned_before_its_segment_was_sealed_is_sealed_as_it_was_written() {
    let (storage, mut host) = small_world();
    let limits = Limits { segment_cuts: 2, reserve_bytes: 0, ..Limits::default() };
    let set = ReplicaSet::open(Arc::new(storage.clone()), limits).unwrap().0;
    let replica = set.get(host.info.disk).unwrap();
    let stream = replica.begin_session(host.info.generation, 8192).unwrap();
    let mut chance = Chance(6);
    let (name, good) = storage.files().into_iter().find(|file| file.0.ends_with(".active")).unwrap();
    storage.write(&name, 60, &[good[60] ^ 4]);
    while replica.active().is_some_and(|active| active.segment.name.ends_with(&name)) {
        host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
        set.sync(&replica).unwrap();
    }
    drop(stream);
    // It is told once, by the name that it had.
    let report = scrub::scrub(&replica, &Stop::new()).unwrap();
    let named: Vec<&str> = report.findings.iter().map(|found| found.file.as_str()).collect();
    assert!(named.len() == 1 && named[0].ends_with(&name), "{named:?}");
    assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
    drop((replica, set));
    let set = ReplicaSet::open(Arc::new(storage.clone()), limits).unwrap().0;
    let replica = set.get(host.info.disk).unwrap();
    assert!(replica.open_report().damage.is_empty() && !replica.durable().needs_scan, "{:?}", replica.open_report());
    let mut read = vec![0; 8192];
    replica.view(host.cut).unwrap().read_at(0, &mut read).unwrap();
    assert!(read == host.content);
}

#[test]
fn a_damaged_merged_index_is_passed_by_and_made_again() {
    let (storage, host) = small_world();
    let indexes: Vec<(String, Vec<u8>)> =
        storage.files().into_iter().filter(|(name, _)| name.ends_with(".merged")).collect();
    let (name, content) = indexes.last().unwrap();
    let limits = Limits { segment_cuts: 2, reserve_bytes: 0, ..Limits::default() };
    for bit in [5, content.len() as u64 * 8 - 5] {
        let damaged = storage.with_flipped_bit(name, bit);
        let (set, _) = ReplicaSet::open(Arc::new(damaged.clone()), limits).unwrap();
        let replica = set.get(host.info.disk).unwrap();
        let by_name = |found: &str| found.contains(name.rsplit('/').next().unwrap());
        let mut read = vec![0; 8192];
        for (&cut, expected) in host.contents.range(replica.floor()..) {
            replica.view(cut).unwrap().read_at(0, &mut read).unwrap();
            assert!(read == *expected, "cut {cut}");
        }
        let named = replica.open_report().rebuilt.iter().any(|found| by_name(found))
            || scrub::scrub(&replica, &Stop::new()).unwrap().findings.iter().any(|found| by_name(&found.file));
        assert!(named, "bit {bit}");
        set.tend(&Stop::new());
        assert_eq!(set.untended(host.info.disk), None);
        let made = damaged.files().into_iter().find(|file| file.0 == *name).unwrap();
        assert!(made.1 == *content, "it is as it was");
        assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
    }
}

/// Flips a bit of the data that `cut` wrote, and gives the place on the disk.
fn flip_in_cut(storage: &SimStorage, host: &TestHost, cut: u64) -> Option<(SimStorage, Extent)> {
    let set = open(storage);
    let replica = set.get(host.info.disk).unwrap();
    for part in replica.parts() {
        let crate::journal::Part::Sealed(sealed) = part else { continue };
        if cut < sealed.first_cut() || cut > sealed.last_cut {
            continue;
        }
        let cache = crate::view::cache::BlockCache::new(1 << 20);
        let before = if cut > sealed.first_cut() { sealed.entries_up_to(cut - 1, &cache).unwrap().len() } else { 0 };
        let entries = sealed.entries_up_to(cut, &cache).unwrap();
        let entry = entries[before..].iter().find(|entry| !entry.place.is_zeroes())?;
        let name =
            storage.files().into_iter().map(|file| file.0).find(|name| sealed.segment.name.ends_with(name)).unwrap();
        let bit = (entry.place.chunk_at + u64::from(entry.place.sealed_bytes) - 2) * 8;
        return Some((storage.with_flipped_bit(&name, bit), entry.extent));
    }
    None
}

#[test]
fn damaged_data_is_quarantined_named_asked_for_and_healed() {
    let storage = SimStorage::default();
    let (set, replica, mut host, stream, _) = scanned(&storage, 40);
    drop((stream, replica, set));
    let mut healed_in_need = 0;
    for cut in 24..=40 {
        let Some((damaged, _)) = flip_in_cut(&storage, &host, cut) else { continue };
        let set = open(&damaged);
        let replica = set.get(host.info.disk).unwrap();
        let report = scrub::scrub(&replica, &Stop::new()).unwrap();
        assert!(!report.sound);
        let found = set.quarantine(&replica, &report.findings, &Stop::new()).unwrap().unwrap();
        assert!(found.new > 0, "cut {cut}: {:?}", report.findings);
        let points = set.points(host.info.machine).unwrap().list();
        let mut read = vec![0; DISK_BYTES as usize];
        for point in &points {
            let at = point.cut_of(host.info.disk).unwrap();
            let reads = replica.view(at).unwrap().read_at(0, &mut read).is_ok();
            assert_eq!(reads, !point.damaged, "the point at {at}, damage in {cut}");
            assert!(!reads || read == host.contents[&at]);
            assert_eq!(point.damaged, found.points.contains(&point.id));
        }
        // Finding it again changes nothing.
        assert_eq!(set.quarantine(&replica, &report.findings, &Stop::new()).unwrap().unwrap().new, 0);
        let need = replica.need();
        let newest_is_whole = replica.view(host.cut).unwrap().read_at(0, &mut read).is_ok();
        assert_eq!(need.is_empty(), newest_is_whole);
        assert_eq!(replica.needs().is_empty(), need.is_empty(), "the host is asked");
        // A failover goes to the last state that is whole, where there is one.
        match set.resolve(host.info.machine, PointSelector::LowestRpo) {
            Ok(place) if newest_is_whole => assert_eq!(place.cuts[0].1, host.cut),
            Ok(place) => assert!(replica.view(place.cuts[0].1).unwrap().read_at(0, &mut read).is_ok()),
            Err(_) => assert!(!newest_is_whole && points.iter().all(|point| point.damaged)),
        }
        if need.is_empty() {
            continue;
        }
        healed_in_need += 1;
        // A restart still asks.
        drop((replica, set));
        let set = open(&damaged);
        let replica = set.get(host.info.disk).unwrap();
        assert_eq!(replica.need(), need);
        assert!(!replica.needs().is_empty());
        let (saved_cut, saved_position, saved_content) = (host.cut, host.position, host.content.clone());
        let stream = session(&replica);
        let mut chance = Chance(cut);
        let before = host.mark(true);
        host.send_at(&stream, &[], Some(before.clone())).unwrap();
        // The newest content of what is needed comes again, and is whole from there on.
        let after = host.mark(true);
        host.send_at(&stream, &need, Some(after.clone())).unwrap();
        set.sync(&replica).unwrap();
        let store = set.points(host.info.machine).unwrap();
        assert!(store.get(before.id).unwrap().damaged, "made before the damage was healed");
        assert!(!store.get(after.id).unwrap().damaged);
        assert!(replica.need().is_empty());
        assert!(whole(&replica, host.cut) == host.content);
        assert!(replica.damages().iter().all(|damage| damage.healed_at == Some(host.cut)));
        // Folding past the damage does not stumble over it, and then nothing is left of it.
        host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
        set.sync(&replica).unwrap();
        let (newest, _) = (host.cut, crate::fold::fold(&replica, host.cut, &Stop::new()).unwrap());
        assert!(whole(&replica, newest) == host.content);
        replica.forget_damage();
        assert!(replica.damages().is_empty());
        assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
        host.contents.split_off(&(saved_cut + 1));
        (host.cut, host.position, host.content) = (saved_cut, saved_position, saved_content);
    }
    assert!(healed_in_need > 1, "{healed_in_need}");
}

/// A bit of the last data in the active segment, which is open.
fn turn_in_active(storage: &SimStorage, replica: &Replica) {
    let active = replica.active().unwrap();
    let entry = active.entries.iter().rfind(|entry| !entry.place.is_zeroes()).unwrap();
    let (name, content) =
        storage.files().into_iter().find(|(name, _)| active.segment.name.ends_with(name.as_str())).unwrap();
    let at = entry.place.chunk_at + u64::from(entry.place.sealed_bytes) - 2;
    storage.write(&name, at, &[content[at as usize] ^ 1]);
}

#[test]
fn damage_in_an_active_segment_costs_no_history_at_a_restart() {
    for noticed in [true, false] {
        let storage = SimStorage::default();
        let (set, replica, mut host, stream, mut chance) = scanned(&storage, 40);
        // A segment that was just begun, so that what follows does not end it.
        let is_new = || {
            let is_data = |entry: &crate::journal::Entry| !entry.place.is_zeroes();
            replica.active().is_some_and(|it| it.ends.len() == 1 && it.entries.iter().any(is_data))
        };
        while !is_new() {
            host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
            set.sync(&replica).unwrap();
        }
        turn_in_active(&storage, &replica);
        let mut healed = None;
        if noticed {
            let report = scrub::scrub(&replica, &Stop::new()).unwrap();
            set.quarantine(&replica, &report.findings, &Stop::new()).unwrap().unwrap();
            let (need, mark) = (replica.need(), host.mark(true));
            assert!(!need.is_empty());
            host.send_at(&stream, &need, Some(mark.clone())).unwrap();
            set.sync(&replica).unwrap();
            healed = Some(mark.id);
        } else {
            drop(stream);
            set.end_segments();
        }
        drop((replica, set));
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        assert!(!replica.durable().needs_scan, "noticed: {noticed}");
        let points = set.points(host.info.machine).unwrap();
        if let Some(healed) = healed {
            assert!(!points.get(healed).unwrap().damaged);
            assert!(whole(&replica, host.cut) == host.content);
        }
        let mut read = vec![0; DISK_BYTES as usize];
        let listed = points.list();
        let shown = listed.iter().filter(|point| {
            let cut = point.cut_of(host.info.disk).unwrap();
            let is_read = replica.view(cut).unwrap().read_at(0, &mut read).is_ok();
            assert!(!is_read || read == host.contents[&cut], "cut {cut}");
            is_read
        });
        assert!(shown.count() > 30, "what is before the damage can be shown");
        assert!(!scrub::scrub(&replica, &Stop::new()).unwrap().sound, "it is found");
    }
}

#[test]
fn a_damaged_base_block_is_named_asked_for_and_healed_by_a_fold() {
    let storage = SimStorage::default();
    let (set, replica, mut host, stream, _) = scanned(&storage, 12);
    crate::fold::fold(&replica, host.cut - 1, &Stop::new()).unwrap();
    drop((stream, replica, set));
    let name = storage.files().into_iter().map(|file| file.0).find(|name| name.ends_with("base.raw")).unwrap();
    let damaged = storage.with_flipped_bit(&name, 4096 * 8 * 3 + 9);
    let set = open(&damaged);
    let replica = set.get(host.info.disk).unwrap();
    // A read finds it; looking after the replica does the rest.
    let mut read = vec![0; DISK_BYTES as usize];
    assert!(replica.view(host.cut).unwrap().read_at(0, &mut read).is_err());
    set.tend(&Stop::new());
    let points = set.points(host.info.machine).unwrap();
    assert!(points.list().iter().any(|point| point.damaged));
    assert_eq!(replica.need(), [Extent::new(4096 * 3, 4096)]);
    let stream = session(&replica);
    let mark = host.mark(true);
    host.send_at(&stream, &replica.need(), Some(mark.clone())).unwrap();
    set.sync(&replica).unwrap();
    assert!(whole(&replica, host.cut) == host.content && replica.need().is_empty());
    assert_eq!(set.resolve(host.info.machine, PointSelector::Latest).unwrap().id, Some(mark.id));
    crate::fold::fold(&replica, host.cut, &Stop::new()).unwrap();
    assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
}

#[test]
fn a_fold_that_meets_damage_goes_on_when_it_was_healed() {
    let storage = SimStorage::default();
    let (set, replica, mut host, stream, _) = scanned(&storage, 40);
    drop((stream, replica, set));
    let mut stuck = 0;
    for cut in (4..34).step_by(5) {
        let Some((damaged, _)) = flip_in_cut(&storage, &host, cut) else { continue };
        let set = open(&damaged);
        let replica = set.get(host.info.disk).unwrap();
        // Declared before anybody knew: it cannot end where it was to.
        let failed = crate::fold::fold(&replica, cut + 1, &Stop::new()).is_err();
        stuck += u64::from(failed);
        let report = scrub::scrub(&replica, &Stop::new()).unwrap();
        set.quarantine(&replica, &report.findings, &Stop::new()).unwrap();
        let (saved_cut, saved_position, saved_content) = (host.cut, host.position, host.content.clone());
        let stream = session(&replica);
        host.send_at(&stream, &replica.need(), None).unwrap();
        set.sync(&replica).unwrap();
        crate::fold::fold(&replica, host.cut, &Stop::new()).unwrap();
        assert!(whole(&replica, host.cut) == host.content, "damage in cut {cut}");
        host.contents.split_off(&(saved_cut + 1));
        (host.cut, host.position, host.content) = (saved_cut, saved_position, saved_content);
    }
    assert!(stuck > 1, "{stuck}");
}

#[test]
fn what_a_failed_sync_lost_is_cut_off_and_comes_again() {
    for cuts in 1..9 {
        for restarts in [false, true] {
            let storage = SimStorage::default();
            let (set, replica, mut host, stream, mut chance) = scanned(&storage, cuts);
            let acknowledged = replica.durable().cut;
            let (cut, position, content) = (host.cut, host.position, host.content.clone());
            storage.fail_next_sync();
            let sent = host.send(&stream, CutKind::Records, None, &mut chance);
            let refused = sent.and_then(|()| set.sync(&replica).map(drop)).unwrap_err();
            assert_eq!(refused.reason(), RefusalReason::StoreFailed);
            assert!(replica.failure().is_some());
            drop(stream);
            // The same boot, with the page cache as it is: a new process, or a new session of the host.
            let (set, replica) = if restarts {
                drop((replica, set));
                let set = open(&storage);
                let replica = set.get(host.info.disk).unwrap();
                (set, replica)
            } else {
                (set, replica)
            };
            let stream = session(&replica);
            assert_eq!(replica.failure(), None);
            let (durable, _) = set.sync(&replica).unwrap();
            assert!(durable.cut >= acknowledged);
            assert!(restarts || durable.cut == acknowledged, "{} of {acknowledged}", durable.cut);
            // What is said to be durable now outlives the power.
            for seed in 0..6 {
                let found = open(&storage.after_crash(seed));
                let found = found.get(host.info.disk).unwrap();
                assert!(found.durable().cut >= durable.cut, "cuts {cuts} seed {seed} restarts {restarts}");
                assert!(found.open_report().damage.is_empty());
            }
            if durable.cut > host.cut {
                // Sealing failed and so the host was refused, but the cut is there: it would resume behind it.
                continue;
            }
            if durable.cut == cut {
                host.contents.remove(&(cut + 1));
                (host.cut, host.position, host.content) = (cut, position, content);
            }
            host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
            set.sync(&replica).unwrap();
            check(&replica, &host.contents);
        }
    }
}

#[test]
fn a_journal_that_cannot_be_opened_again_shows_what_is_durable_and_is_cut_off_at_the_next_try() {
    let storage = SimStorage::default();
    let (set, replica, mut host, stream, mut chance) = scanned(&storage, 5);
    let acknowledged = replica.durable().cut;
    assert_eq!(acknowledged, host.cut);
    let (position, content) = (host.position, host.content.clone());
    storage.fail_next_sync();
    let sent = host.send(&stream, CutKind::Records, None, &mut chance);
    sent.and_then(|()| set.sync(&replica).map(drop)).unwrap_err();
    host.contents.split_off(&(acknowledged + 1));
    (host.cut, host.position, host.content) = (acknowledged, position, content);
    drop(stream);
    // Opening it again fails, too.
    for _ in 0..2 {
        storage.crash_at(0);
        assert!(replica.begin_session(host.info.generation, DISK_BYTES).is_err());
        storage.crash_at(u64::MAX);
        assert!(whole(&replica, acknowledged) == host.content, "what is durable is in the active segment");
    }
    let stream = session(&replica);
    assert_eq!(replica.durable().cut, acknowledged, "nothing of the failed sync is believed");
    host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
    set.sync(&replica).unwrap();
    check(&replica, &host.contents);
}

#[test]
fn a_fold_never_goes_past_a_listed_point() {
    let storage = SimStorage::default();
    let (set, replica, mut host, stream, mut chance) = scanned(&storage, 3);
    let retention = Retention {
        any_time_window: Duration::from_secs(12),
        point_age_max: Duration::from_secs(86_400),
        points_max: 1,
        ..Retention::default()
    };
    let mut folded_to = 0;
    for number in 0..60 {
        // Places of any-time recovery now and then, so that the window begins with one that lies before its first cut;
        // kept points are newer.
        let mark = (number % 5 == 0).then(|| host.mark(number % 10 == 0));
        host.send(&stream, CutKind::Records, mark, &mut chance).unwrap();
        set.sync(&replica).unwrap();
        let done = set.maintain(host.info.machine, &retention, Timestamp(host.time), &Stop::new()).unwrap();
        folded_to = done.folds.into_iter().map(|fold| fold.result.unwrap().to).fold(folded_to, u64::max);
        for point in set.points(host.info.machine).unwrap().all() {
            let cut = point.cut_of(host.info.disk).unwrap();
            assert!(whole(&replica, cut) == host.contents[&cut], "the listed point at cut {cut}");
        }
    }
    assert!(folded_to > 30, "folded to {folded_to} of {}", host.cut);
}

#[test]
fn a_fold_can_be_cut_short_between_any_two_of_its_steps() {
    let image = SimStorage::default();
    let (set, replica, mut host, stream, mut chance) = scanned(&image, 6);
    // A scan in the way: the base steps through the middle of it.
    host.send(&stream, CutKind::ScanStart, None, &mut chance).unwrap();
    for _ in 0..14 {
        host.send(&stream, CutKind::Scan, None, &mut chance).unwrap();
    }
    let mark = host.mark(true);
    host.send(&stream, CutKind::ScanEnd, Some(mark), &mut chance).unwrap();
    for _ in 0..4 {
        host.send(&stream, CutKind::Records, None, &mut chance).unwrap();
    }
    set.sync(&replica).unwrap();
    replica.merge_indexes(&Stop::new()).unwrap();
    drop((stream, replica, set));
    let target = host.cut - 2;
    let run = |storage: &SimStorage| {
        let set = open(storage);
        let replica = set.get(host.info.disk).unwrap();
        crate::fold::fold(&replica, target, &Stop::new()).map(drop)
    };
    let whole_run = image.copy();
    run(&whole_run).unwrap();
    let steps = whole_run.steps();
    assert!(steps > 40, "{steps} steps");
    for step in 0..steps {
        for seed in 0..4 {
            let storage = image.copy();
            storage.crash_at(step);
            let _ = std::panic::catch_unwind(|| run(&storage)).map(drop);
            let found = storage.after_crash(step * 4 + seed);
            let set = open(&found);
            let replica = set.get(host.info.disk).unwrap();
            assert!(replica.open_report().damage.is_empty(), "step {step}: {:?}", replica.open_report());
            check(&replica, &host.contents);
            crate::fold::fold(&replica, target, &Stop::new()).unwrap();
            assert!(check(&replica, &host.contents) >= 3);
            assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound, "step {step} seed {seed}");
        }
    }
}

#[test]
fn a_replica_rolled_back_to_yesterday_goes_on_from_there_and_lies_about_nothing() {
    let storage = SimStorage::default();
    let (set, replica, mut host, stream, mut chance) = scanned(&storage, 9);
    let yesterday = storage.copy();
    let (cut, position, content) = (host.cut, host.position, host.content.clone());
    for _ in 0..9 {
        let mark = host.mark(true);
        host.send(&stream, CutKind::Records, Some(mark), &mut chance).unwrap();
    }
    set.sync(&replica).unwrap();
    let todays = set.points(host.info.machine).unwrap().list();
    drop((stream, replica, set));

    // All of it: the server says where it stands, and the host sees that it is behind what it acknowledged.
    let set = open(&yesterday);
    let replica = set.get(host.info.disk).unwrap();
    let durable = replica.durable();
    assert_eq!((durable.cut, durable.position), (cut, position));
    assert_eq!(set.points(host.info.machine).unwrap().list().len() as u64, cut - 1);
    assert!(check(&replica, &host.contents.range(..=cut).map(|(cut, content)| (*cut, content.clone())).collect()) > 0);
    drop((replica, set));

    // The replicas alone, with today's points: those that are gone are flagged, and stay so when their numbers come again.
    storage.replace_files("replicas/", &yesterday);
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    let machine = host.info.machine;
    let flagged = |set: &ReplicaSet| {
        let points = set.points(machine).unwrap();
        todays.iter().filter(|point| points.get(point.id).is_some_and(|point| point.damaged)).count()
    };
    assert_eq!(flagged(&set), 9);
    (host.cut, host.position, host.content) = (cut, position, content);
    host.contents.split_off(&(cut + 1));
    let stream = session(&replica);
    for _ in 0..12 {
        let mark = host.mark(true);
        host.send(&stream, CutKind::Records, Some(mark), &mut chance).unwrap();
    }
    set.sync(&replica).unwrap();
    drop((stream, replica, set));
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    assert_eq!(flagged(&set), 9);
    check(&replica, &host.contents);
}

#[test]
fn a_scrub_goes_on_where_it_was_and_covers_everything_once() {
    let storage = SimStorage::default();
    let (set, replica, host, stream, _) = scanned(&storage, 30);
    replica.merge_indexes(&Stop::new()).unwrap();
    let mut all = ScrubReport::default();
    let mut cursor = Cursor::Start;
    let mut units = 0;
    while cursor != Cursor::End {
        let next = scrub::advance(&replica, cursor, &Stop::new(), &mut all).unwrap().unwrap();
        assert!(next > cursor, "{cursor:?} to {next:?}");
        // As it is kept across restarts.
        cursor = serde_json::from_str(&serde_json::to_string(&next).unwrap()).unwrap();
        units += 1;
    }
    let whole = scrub::scrub(&replica, &Stop::new()).unwrap();
    assert_eq!((all.bytes, all.segments, all.cuts), (whole.bytes, whole.segments, whole.cuts));
    assert!(units > 8 && whole.cuts == host.cut, "{units} units");
    drop((stream, replica, set));
}

/// A volume of its own, as small as it is said; none where this process may not mount one.
struct SmallVolume(tempfile::TempDir);

impl SmallVolume {
    fn mount(bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={bytes},mode=0700");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self(folder))
    }
}

impl Drop for SmallVolume {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_small_volume_folds_what_would_not_fit_twice_and_outlives_being_full() {
    use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
    const MIB: u64 = 1 << 20;
    let Some(volume) = SmallVolume::mount(40 * MIB) else {
        eprintln!("skipped: only root may mount a small volume");
        return;
    };
    let limits = Limits { segment_bytes: 2 * MIB, reserve_bytes: 2 * MIB, ..Limits::default() };
    let storage = RealStorage::open_folder(volume.0.path());
    let set = ReplicaSet::open(storage.clone(), limits).unwrap().0;
    let mut host = TestHost::new(64 * MIB);
    let replica = set.create(host.info).unwrap();
    let stream = replica.begin_session(host.info.generation, host.info.disk_bytes).unwrap();
    let mut sealer = Sealer::new(ChunkKey::new(host.info.disk, host.info.generation), Compression::Off);
    let mut chunk_at = |offset: u64, seed: u64| {
        let mut raw = vec![0; 64 << 10];
        tidemark_base::random::Random::new(offset ^ seed).fill(&mut raw);
        let mut sealed = Vec::new();
        sealer.seal(&[Extent::new(offset, raw.len() as u64)], &raw, &mut sealed);
        (sealed, raw)
    };
    let mut send = |host: &mut TestHost, kind, places: &[u64], seed, mark| {
        let mut chunks = Vec::new();
        for &place in places {
            let (sealed, raw) = chunk_at(place, seed);
            host.content[place as usize..place as usize + raw.len()].copy_from_slice(&raw);
            chunks.push(sealed);
        }
        let end = host.end(kind, &chunks, mark);
        chunks.iter().try_for_each(|chunk| stream.append_chunks(end.cut.0, chunk))?;
        stream.end_cut(&end)?;
        (host.cut, host.position) = (end.cut.0, Some(end.to));
        Ok::<(), crate::journal::JournalError>(())
    };
    // 24 MiB of a scan: as much again does not fit.
    send(&mut host, CutKind::ScanStart, &[], 0, None).unwrap();
    for cut in 0..24 {
        let places: Vec<u64> = (0..16).map(|place| cut * MIB + place * (64 << 10)).collect();
        send(&mut host, CutKind::Scan, &places, 0, None).unwrap();
    }
    let mark = host.mark(true);
    send(&mut host, CutKind::ScanEnd, &[], 0, Some(mark)).unwrap();
    set.sync(&replica).unwrap();
    let view = |replica: &Replica, host: &TestHost, cut| {
        let mut read = vec![0; host.content.len()];
        replica.view(cut).unwrap().read_at(0, &mut read).unwrap();
        assert!(read == host.content, "cut {cut}");
    };
    let first = host.cut;
    view(&replica, &host, first);
    let maintain = |host: &TestHost| {
        let done = set.maintain(host.info.machine, &tight(), Timestamp(host.time), &Stop::new()).unwrap();
        done.folds.into_iter().map(|fold| fold.result).collect::<Vec<_>>()
    };
    let outcome = maintain(&host);
    assert!(outcome.iter().all(Result::is_ok), "{outcome:?}");
    assert_eq!(replica.floor(), first);
    view(&replica, &host, first);
    assert!(replica.statistics().base_allocated_bytes >= 24 * MIB);

    // Now it is filled up by somebody else. Everything stays servable, and goes on when there is room.
    let free = storage.available_bytes().unwrap();
    let filler = storage.open("filler", tidemark_base::storage::OpenMode::Create).unwrap();
    filler.write_at(0, &vec![1; (free - 4 * MIB) as usize]).unwrap();
    drop(filler);
    let refused = (0..64)
        .find_map(|cut| {
            let (content, places) = (host.content.clone(), [(cut % 24) * MIB]);
            let refused = send(&mut host, CutKind::Records, &places, 1 + cut, None).err()?;
            host.content = content;
            Some(refused)
        })
        .expect("a full volume refuses");
    assert_eq!(refused.reason(), RefusalReason::NoRoom);
    assert!(replica.lacks_room().is_some(), "the status says so");
    set.sync(&replica).unwrap();
    view(&replica, &host, host.cut);
    let _ = replica.merge_indexes(&Stop::new());
    let _ = maintain(&host);
    view(&replica, &host, host.cut);
    // Whoever comes again hears it before anything is sent.
    let again = replica.begin_session(host.info.generation, host.info.disk_bytes).map(drop).unwrap_err();
    assert_eq!(again.reason(), RefusalReason::NoRoom, "{again}");
    storage.remove("filler").unwrap();
    // The cut that was refused is gone with its session; the host begins again.
    drop(stream);
    let stream = replica.begin_session(host.info.generation, host.info.disk_bytes).unwrap();
    let mark = host.mark(true);
    let end = host.end(CutKind::Records, &[], Some(mark));
    stream.end_cut(&end).unwrap();
    (host.cut, host.position) = (end.cut.0, Some(end.to));
    set.sync(&replica).unwrap();
    let (sealed, _) = chunk_at(0, 0);
    stream.append_chunks(host.cut + 1, &sealed).unwrap();
    assert_eq!(replica.lacks_room(), None);
    replica.merge_indexes(&Stop::new()).unwrap();
    let outcome = maintain(&host);
    assert!(outcome.iter().all(Result::is_ok), "{outcome:?}");
    view(&replica, &host, host.cut);
    assert!(scrub::scrub(&replica, &Stop::new()).unwrap().sound);
    let _ = small();
}
