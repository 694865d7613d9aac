//! Segments that are gone: only a scan that began after that was found repairs it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidemark_base::Extent;
use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_proto::replication::CutKind;

use super::testing::{Chance, SimStorage, TestHost};
use super::tests::{DISK_BYTES, check, open, session};
use super::{Replica, ReplicaSet};
use crate::fold::base::{BLOCK_BYTES, DATA_NAME};
use crate::journal::{Limits, Part, SegmentName};
use crate::scrub;

/// A replica with records, then a scan of a few blocks alone, then records again; and the cut at which that scan began. Each
/// cut is synced, so that the next one proves it.
fn scanned_twice(storage: &SimStorage) -> (TestHost, u64) {
    let set = open(storage);
    let mut host = TestHost::new(DISK_BYTES);
    let mut chance = Chance(21);
    let replica = set.create(host.info).unwrap();
    let stream = session(&replica);
    let mut began = 0;
    let records = |count| std::iter::repeat_n(CutKind::Records, count);
    let scan = [CutKind::ScanStart, CutKind::Scan, CutKind::ScanEnd];
    for kind in scan.into_iter().chain(records(40)).chain(scan).chain(records(12)) {
        let mark = (kind == CutKind::ScanEnd).then(|| host.mark(true));
        host.send(&stream, kind, mark, &mut chance).unwrap();
        set.sync(&replica).unwrap();
        if kind == CutKind::ScanStart {
            began = host.cut;
        }
    }
    (host, began)
}

/// The sealed segments whose cuts all lie after the first scan and before `until`, oldest first: file, first and last cut.
fn segments(storage: &SimStorage, until: u64) -> Vec<(String, u64, u64)> {
    let names = storage.files().into_iter().filter_map(|(name, _)| {
        match SegmentName::parse(name.rsplit('/').next().unwrap()) {
            Some(SegmentName::Sealed { first, last }) => Some((name, first, last)),
            _ => None,
        }
    });
    let mut found: Vec<_> = names.filter(|&(_, first, last)| first > 3 && last < until).collect();
    found.sort_by_key(|&(_, first, _)| first);
    found
}

/// Header, or index and data, of a segment destroyed.
fn destroyed(storage: &SimStorage, name: &str, whole: bool) -> SimStorage {
    let content = storage.files().into_iter().find(|file| file.0 == name).unwrap().1;
    if whole {
        return storage.with_flipped_bit(name, 70);
    }
    // In the middle of the data, and in the hash that ends the footer.
    let set = open(storage);
    let replica = set.replicas().remove(0);
    let sealed = replica.parts().into_iter().find_map(|part| match part {
        Part::Sealed(sealed) if sealed.segment.name.ends_with(name) => Some(sealed),
        _ => None,
    });
    let middle = sealed.unwrap().data_end / 2;
    storage.with_flipped_bit(name, middle * 8).with_flipped_bit(name, content.len() as u64 * 8 - 3)
}

/// Whole scans of what differs; the replica shows what the host has from the end on.
fn repair(set: &ReplicaSet, replica: &Arc<Replica>, host: &mut TestHost, seed: u64) {
    let mut chance = Chance(seed);
    (host.cut, host.scanning) = (replica.durable().cut, false);
    let stream = session(replica);
    host.send(&stream, CutKind::ScanStart, None, &mut chance).unwrap();
    let (differs, _) = host.compare(&stream);
    host.scan(&stream, &differs).unwrap();
    let mark = host.mark(true);
    host.send(&stream, CutKind::ScanEnd, Some(mark), &mut chance).unwrap();
    set.sync(replica).unwrap();
    assert!(!replica.durable().needs_scan && !replica.durable().scan_open);
    shows(replica, host);
}

fn shows(replica: &Replica, host: &TestHost) {
    let mut read = vec![0xee; DISK_BYTES as usize];
    replica.view(host.cut).unwrap().read_at(0, &mut read).unwrap();
    assert!(read == host.content, "the newest cut, {}, is silently wrong", host.cut);
}

fn losses_of(storage: &SimStorage, host: &TestHost) -> usize {
    open(storage).get(host.info.disk).unwrap().manifest().losses.len()
}

#[test]
fn a_scan_that_began_before_a_segment_was_lost_repairs_nothing() {
    for whole in [true, false] {
        let storage = SimStorage::default();
        let (mut host, began) = scanned_twice(&storage);
        let sealed = segments(&storage, began);
        assert!(sealed.len() > 4, "{sealed:?}");
        let (name, first, _) = sealed[sealed.len() - 2].clone();
        let storage = destroyed(&storage, &name, whole);
        // The scan of before ended behind the loss; a restart, and another one, know better.
        for _ in 0..2 {
            let set = open(&storage);
            let replica = set.get(host.info.disk).unwrap();
            let durable = replica.durable();
            assert!(durable.needs_scan && durable.position.is_none(), "whole: {whole}: {durable:?}");
            let lost: BTreeMap<u64, Vec<u8>> =
                host.contents.iter().filter(|&(&cut, _)| cut < first).map(|(&cut, is)| (cut, is.clone())).collect();
            let part = host.contents.iter().filter(|&(&cut, _)| cut >= first && replica.view(cut).is_ok()).count();
            assert!(!whole || part == 0, "{part} cuts behind the loss are shown");
            assert!(replica.view(host.cut).is_err() && !lost.is_empty());
        }
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        repair(&set, &replica, &mut host, 5);
        drop((replica, set));
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        assert!(!replica.durable().needs_scan);
        shows(&replica, &host);
        drop((replica, set));
        // A second loss, older than the first: that one's repair is none of it.
        let storage = destroyed(&storage, &sealed[1].0, true);
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        assert!(replica.durable().needs_scan && replica.view(host.cut).is_err());
        repair(&set, &replica, &mut host, 6);
        drop((replica, set));
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        shows(&replica, &host);
        // A fold past the repair leaves nothing to remember.
        assert_eq!(replica.manifest().losses.len(), 2);
        crate::fold::fold(&replica, host.cut, &Stop::new()).unwrap();
        shows(&replica, &host);
        drop((replica, set));
        assert_eq!(losses_of(&storage, &host), 0);
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        assert_eq!(check(&replica, &BTreeMap::from([(host.cut, host.content.clone())])), 1);
    }
}

/// Seed 10218 of the simulation: what is known to be lost is left out unread at later starts, and is named all the same.
#[test]
fn a_file_that_was_lost_before_is_named_at_every_start() {
    let storage = SimStorage::default();
    let (host, began) = scanned_twice(&storage);
    let name = segments(&storage, began).pop().unwrap().0;
    let storage = destroyed(&storage, &name, true);
    for start in 0..3 {
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        let report = crate::scrub::scrub(&replica, &Stop::new()).unwrap();
        let named = report.findings.iter().any(|finding| finding.what.contains(&name));
        assert!(named, "start {start}: {name} is not named: {:?}", report.findings);
    }
}

#[test]
fn a_fold_that_was_declared_waits_for_the_repair_of_what_was_lost_meanwhile() {
    let storage = SimStorage::default();
    let (mut host, began) = scanned_twice(&storage);
    let target = host.cut - 2;
    {
        let set = open(&storage);
        set.get(host.info.disk).unwrap().declare_fold(target).unwrap();
    }
    let lost = segments(&storage, began).pop().unwrap();
    let storage = destroyed(&storage, &lost.0, true);
    for _ in 0..2 {
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        let folded = crate::fold::fold(&replica, target, &Stop::new()).unwrap();
        assert!(folded.to < target && replica.durable().needs_scan, "{folded:?}");
    }
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    repair(&set, &replica, &mut host, 7);
    crate::fold::fold(&replica, host.cut, &Stop::new()).unwrap();
    shows(&replica, &host);
    drop((replica, set));
    shows(&open(&storage).get(host.info.disk).unwrap(), &host);
}

/// A fold was cut short, and bits turned in every block of the base: what the fold writes again is left to it, and reads are right
/// there; all the rest is found.
#[test]
fn what_a_fold_that_was_cut_short_writes_again_is_said_and_never_read() {
    let storage = SimStorage::default();
    let (host, _) = scanned_twice(&storage);
    let target = host.cut - 8;
    {
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        replica.declare_fold(target).unwrap();
        replica.declare_step(target).unwrap();
    }
    let name = format!("replicas/{}/{DATA_NAME}", host.info.disk);
    let holds = |extent: &Extent, at: u64| (extent.offset..extent.end()).contains(&at);
    let blocks = || (0..DISK_BYTES).step_by(BLOCK_BYTES as usize);
    blocks().for_each(|at| storage.write(&name, at, &[0x5a; 8]));
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    let report = scrub::scrub(&replica, &Stop::new()).unwrap();
    let left = &report.left_to_fold;
    assert_eq!(left.iter().map(|extent| extent.length).sum::<u64>(), report.left_to_fold_bytes);
    assert!(report.left_to_fold_bytes > 0, "{report:?}");
    for at in blocks() {
        let is_found = report.findings.iter().any(|found| found.extent.is_some_and(|extent| holds(&extent, at)));
        assert!(is_found != left.iter().any(|extent| holds(extent, at)), "block at {at}: {report:?}");
    }
    let mut views = 0;
    for (&cut, expected) in host.contents.range(target..) {
        let Ok(view) = replica.view(cut) else { continue };
        views += 1;
        for extent in left {
            let mut read = vec![0xee; extent.length as usize];
            view.read_at(extent.offset, &mut read).unwrap();
            assert!(read == expected[extent.offset as usize..extent.end() as usize], "cut {cut}, {extent:?}");
        }
    }
    assert!(views > 0);
}

#[test]
fn a_segment_in_use_is_not_made_again_without_a_cut_that_it_holds() {
    let storage = SimStorage::default();
    let (host, began) = scanned_twice(&storage);
    let name = segments(&storage, began).pop().unwrap().0;
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    let part = replica.parts().into_iter().find_map(|part| match part {
        Part::Sealed(sealed) if sealed.segment.name.ends_with(&name) => Some(sealed),
        _ => None,
    });
    let sealed = part.unwrap();
    // The frames lose a cut while the segment is open: its index still names the place, and reads say so.
    let content = storage.files().into_iter().find(|file| file.0 == name).unwrap().1;
    let at = sealed.data_end / 2;
    storage.write(&name, at, &[content[at as usize] ^ 1]);
    assert!(!replica.repair_segment(sealed.first_cut()).unwrap(), "a whole index is replaced by one with a hole");
    let mut read = vec![0; DISK_BYTES as usize];
    for (&cut, expected) in host.contents.range(sealed.first_cut()..) {
        if let Ok(view) = replica.view(cut)
            && view.read_at(0, &mut read).is_ok()
        {
            assert!(read == *expected, "cut {cut} is silently wrong");
        }
    }
}

#[test]
fn what_was_lost_is_noted_before_anything_follows_it() {
    let storage = SimStorage::default();
    let (host, began) = scanned_twice(&storage);
    let name = segments(&storage, began).pop().unwrap().0;
    let storage = destroyed(&storage, &name, true);
    storage.set_room(Some(0));
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    assert!(replica.durable().needs_scan);
    assert!(replica.begin_session(host.info.generation, DISK_BYTES).is_err(), "the loss is in memory alone");
    storage.set_room(None);
    assert!(replica.begin_session(host.info.generation, DISK_BYTES).is_ok());
    assert_eq!(replica.manifest().losses.len(), 1);
    drop((replica, set));
    assert_eq!(losses_of(&storage, &host), 1);
}

/// Seed 1295 of the simulation: the damage lies in the segment that was open, before a scan that went on over it.
#[test]
fn a_scan_in_the_segment_that_is_damaged_repairs_nothing() {
    let storage = SimStorage::default();
    let limits = Limits { reserve_bytes: 0, ..Limits::default() };
    let mut host = TestHost::new(DISK_BYTES);
    let mut chance = Chance(31);
    let at = {
        let set = ReplicaSet::open(Arc::new(storage.clone()), limits).unwrap().0;
        let replica = set.create(host.info).unwrap();
        let stream = session(&replica);
        let mut send = |kind, marked: bool| {
            let mark = marked.then(|| host.mark(true));
            host.send(&stream, kind, mark, &mut chance).unwrap();
            set.sync(&replica).unwrap();
        };
        send(CutKind::ScanStart, false);
        send(CutKind::ScanEnd, true);
        let at = replica.active().unwrap().end + 100;
        (0..3).for_each(|_| send(CutKind::Records, false));
        send(CutKind::ScanStart, false);
        send(CutKind::Scan, false);
        send(CutKind::ScanEnd, true);
        (0..2).for_each(|_| send(CutKind::Records, false));
        at
    };
    let name = storage.files().into_iter().find(|file| file.0.ends_with(".active")).unwrap().0;
    let storage = storage.with_flipped_bit(&name, at * 8);
    // The next start seals it, and the one after that reads the index alone.
    for _ in 0..2 {
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        assert!(replica.durable().needs_scan, "{:?}", replica.durable());
        assert!((3..=host.cut).all(|cut| replica.view(cut).is_err()));
    }
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    repair(&set, &replica, &mut host, 8);
    drop((replica, set));
    shows(&open(&storage).get(host.info.disk).unwrap(), &host);
}

/// The commit of a cut is damaged, its data is not, and so is the index: made again, it lacks the cut, and an index that
/// was merged while the cut was whole must not bring it back behind the repair.
#[test]
fn an_index_that_was_merged_before_a_cut_was_lost_is_not_used_after() {
    let storage = SimStorage::default();
    let (mut host, _) = scanned_twice(&storage);
    {
        let set = open(&storage);
        assert!(set.get(host.info.disk).unwrap().merge_indexes(&Stop::new()).unwrap() > 0);
    }
    let merged = |storage: &SimStorage| storage.files().into_iter().filter(|file| file.0.ends_with(".merged")).count();
    assert!(merged(&storage) > 0);
    let original = host.content.clone();
    for (name, first, last) in segments(&storage, u64::MAX) {
        let commit_at = {
            let set = open(&storage);
            let replica = set.get(host.info.disk).unwrap();
            let cut = (first + last) / 2;
            let state = replica.state();
            state.journal.commit_entry(cut).unwrap().unwrap().commit_at
        };
        let bytes = storage.files().into_iter().find(|file| file.0 == name).unwrap().1.len() as u64;
        let storage = storage.with_flipped_bit(&name, (commit_at + 70) * 8).with_flipped_bit(&name, bytes * 8 - 3);
        let (cut, position, time) = (host.cut, host.position, host.time);
        let set = open(&storage);
        let replica = set.get(host.info.disk).unwrap();
        assert!(replica.durable().needs_scan, "{:?}", replica.open_report());
        repair(&set, &replica, &mut host, 9);
        // Indexes come and go, what is shown stays.
        replica.merge_indexes(&Stop::new()).unwrap();
        shows(&replica, &host);
        drop((replica, set));
        let mut without = storage.clone();
        for (name, _) in storage.files().into_iter().filter(|file| file.0.ends_with(".merged")) {
            without = without.without_file(&name);
        }
        shows(&open(&without).get(host.info.disk).unwrap(), &host);
        shows(&open(&storage).get(host.info.disk).unwrap(), &host);
        (host.cut, host.position, host.content, host.time) = (cut, position, original.clone(), time);
    }
}

/// What could not be read once can be read the next time: the repair compared without it, so it stays out.
#[test]
fn a_segment_that_was_lost_stays_lost_when_it_can_be_read_again() {
    let storage = SimStorage::default();
    let (mut host, _) = scanned_twice(&storage);
    let (name, first, _) = segments(&storage, u64::MAX).pop().unwrap();
    let good = storage.files().into_iter().find(|file| file.0 == name).unwrap().1;
    let storage = destroyed(&storage, &name, true);
    let set = open(&storage);
    let replica = set.get(host.info.disk).unwrap();
    // The guest wrote again what was there before, so that the compare finds much of it to be the same.
    host.content = host.contents[&(first - 1)].clone();
    repair(&set, &replica, &mut host, 5);
    drop((replica, set));
    let back = storage.with_file(&name, &good);
    shows(&open(&back).get(host.info.disk).unwrap(), &host);
}
