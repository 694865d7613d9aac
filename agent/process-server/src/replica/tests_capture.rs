//! What the way home is told of a machine's layer.

use std::sync::Arc;

use tidemark_base::bits::PART_BYTES;
use tidemark_base::disk::{Disk, Durability};
use tidemark_base::storage::{OpenMode, Storage};
use tidemark_base::{Bits, Extent};

use super::testing::*;
use super::tests::{DISK_BYTES, open, scenario};
use crate::view::scratch::ScratchDisk;

fn read(disk: &ScratchDisk) -> Vec<u8> {
    let mut content = vec![0; DISK_BYTES as usize];
    disk.read_at(0, &mut content).unwrap();
    content
}

fn change(disk: &ScratchDisk, chance: &mut Chance) -> Extent {
    let at = chance.below(DISK_BYTES - 9000);
    let extent = Extent::new(at, 1 + chance.below(9000));
    if chance.below(4) == 0 {
        disk.zero(extent, true, Durability::Cached).unwrap();
    } else {
        disk.write_at(at, &vec![chance.below(250) as u8 + 1; extent.length as usize], Durability::Cached).unwrap();
    }
    extent
}

/// Whole parts that differ.
fn differing(one: &[u8], other: &[u8]) -> Bits {
    let mut bits = Bits::new(DISK_BYTES);
    for at in (0..DISK_BYTES).step_by(PART_BYTES as usize) {
        let part = at as usize..(at + PART_BYTES).min(DISK_BYTES) as usize;
        if one[part.clone()] != other[part] {
            bits.insert(Extent::new(at, 1));
        }
    }
    bits
}

fn is_within(inner: &Bits, outer: &Bits) -> bool {
    let mut united = outer.clone();
    united.unite(inner);
    united == *outer
}

/// Rounds while the machine writes, some of them given up: each ends with home as the machine was when it began.
#[test]
fn a_frozen_round_reads_as_the_disk_was_and_nothing_that_is_written_meanwhile_is_missed() {
    let storage = SimStorage::default();
    let run = scenario(&storage);
    let set = open(&storage);
    let replica = set.get(run.host.info.disk).unwrap();
    let cut = run.host.cut;
    for seed in 0..8 {
        let mut chance = Chance(seed);
        let folder = SimStorage::default();
        let disk = ScratchDisk::open_lasting(Arc::new(replica.view(cut).unwrap()), &folder, "boot one").unwrap();
        let mut home = run.host.contents[&cut].clone();
        (0..10).for_each(|_| _ = change(&disk, &mut chance));
        assert!(is_within(&differing(&read(&disk), &home), &disk.written()));
        disk.set_behind(Bits::new(DISK_BYTES), 0);
        for round in 1..12 {
            let file = folder.open("round.raw", OpenMode::OpenOrCreate).unwrap();
            file.set_bytes(0).unwrap();
            file.set_bytes(DISK_BYTES).unwrap();
            ScratchDisk::claim(round, &[(&disk, Some(file))]);
            let then = read(&disk);
            let is_given_up = chance.below(3) == 0;
            let (mut from, mut at_home) = (0, home.clone());
            loop {
                change(&disk, &mut chance);
                let (runs, next) = disk.claimed_runs(round, from, 3).unwrap();
                for run in runs {
                    let range = run.extent.offset as usize..run.extent.end() as usize;
                    match run.zeroes {
                        true => at_home[range].fill(0),
                        false => disk.read_claimed(round, run.extent.offset, &mut at_home[range]).unwrap(),
                    }
                    change(&disk, &mut chance);
                }
                match next {
                    Some(next) => from = next,
                    None => break,
                }
            }
            assert!(at_home == then, "seed {seed}, round {round}");
            disk.end_claim(round, !is_given_up);
            if !is_given_up {
                home = at_home;
            }
            assert!(disk.claimed_runs(round, 0, 1).is_err(), "it is over");
        }
        // What is missing at home is known, whatever was given up.
        ScratchDisk::claim(99, &[(&disk, None)]);
        let mut left = Bits::new(DISK_BYTES);
        disk.claimed_runs(99, 0, 10_000).unwrap().0.iter().for_each(|run| _ = left.insert(run.extent));
        assert!(is_within(&differing(&read(&disk), &home), &left), "seed {seed}");
    }
}

#[test]
fn what_was_written_since_the_failover_is_known_over_a_kill_and_never_too_little_after_a_power_cut() {
    let storage = SimStorage::default();
    let run = scenario(&storage);
    let set = open(&storage);
    let replica = set.get(run.host.info.disk).unwrap();
    let cut = run.host.cut;
    let point = run.host.contents[&cut].clone();
    let folder = SimStorage::default();
    let view = || Arc::new(replica.view(cut).unwrap());
    let mut chance = Chance(5);
    let disk = ScratchDisk::open_lasting(view(), &folder, "boot one").unwrap();
    let mut written = Bits::new(DISK_BYTES);
    for step in 0..20 {
        written.insert(change(&disk, &mut chance));
        // What a promotion takes over was not written by the machine.
        let _ = disk.fill(step * PART_BYTES).unwrap();
    }
    assert!(disk.written() == written);
    drop(disk);
    let disk = ScratchDisk::open_lasting(view(), &folder, "boot one").unwrap();
    assert!(disk.written() == written, "a killed process forgets nothing");
    disk.flush().unwrap();
    for _ in 0..10 {
        change(&disk, &mut chance);
    }
    for seed in 0..10 {
        let disk = ScratchDisk::open_lasting(view(), &folder.after_crash(seed), "boot two").unwrap();
        assert!(is_within(&differing(&read(&disk), &point), &disk.written()), "seed {seed}");
    }
}

/// What home lacks is what came after the point and what the machine wrote, also while somebody found out the former; behind what
/// home said it has, everything; before that, what was written.
#[test]
fn what_the_machine_wrote_is_behind_whatever_else_is_said() {
    let storage = SimStorage::default();
    let run = scenario(&storage);
    let set = open(&storage);
    let replica = set.get(run.host.info.disk).unwrap();
    let view = Arc::new(replica.view(run.host.cut).unwrap());
    let disk = ScratchDisk::open_lasting(view, &SimStorage::default(), "boot one").unwrap();
    let part = |number: u64| Extent::new(number * PART_BYTES, PART_BYTES);
    let claimed = |round| {
        ScratchDisk::claim(round, &[(&disk, None)]);
        let runs = disk.claimed_runs(round, 0, 10_000).unwrap().0;
        let mut bits = Bits::new(DISK_BYTES);
        runs.iter().for_each(|run| _ = bits.insert(run.extent));
        bits
    };
    let bits = |extents: &[Extent]| {
        let mut bits = Bits::new(DISK_BYTES);
        extents.iter().for_each(|extent| _ = bits.insert(*extent));
        bits
    };
    let write = |number| disk.write_at(part(number).offset, &[7; 100], Durability::Cached).unwrap();
    write(1);
    // As a call finds it out, and what is written until it says so.
    let after = bits(&[part(3)]);
    write(5);
    disk.set_behind(after, 0);
    write(8);
    assert_eq!(claimed(1), bits(&[part(1), part(3), part(5), part(8)]));
    disk.end_claim(1, false);
    disk.set_behind(Bits::all(DISK_BYTES), part(6).offset + 100);
    let rest = Extent::new(part(6).offset, DISK_BYTES - part(6).offset);
    assert_eq!(claimed(2), bits(&[part(1), part(5), rest]));
}
