//! Compares: only what differs crosses, and what was settled is the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tidemark_base::disk::{Disk, Durability};
use tidemark_base::{Extent, ExtentSet};
use tidemark_proto::replication::CutKind;

use super::{Bench, LIMIT, Random};
use crate::send::resume::Alarm;
use crate::send::{Phase, Sender, SenderStatus};
use crate::source::{EpochReason, ScanReason, Source};

impl Bench {
    /// A disk that is replicated, and whose server waits for more.
    fn replicated(bytes: u64, seed: u64) -> (Self, Sender) {
        let bench = Bench::new(bytes, seed);
        bench.fill(&mut Random(seed));
        let sender = bench.start();
        bench.settle(&sender);
        (bench, sender)
    }

    fn resync(&self) {
        let whole = ExtentSet::from_iter([Extent::new(0, self.source.disk.bytes())]);
        self.source.require_scan(self.consumer, &whole, ScanReason::Requested).unwrap();
    }

    /// A write that nothing tells of.
    fn edit(&self, offset: u64, data: &[u8]) {
        self.source.disk.write_at(offset, data, Durability::Cached).unwrap();
    }

    fn scans(&self) -> usize {
        self.server.with(|state| state.cuts.iter().filter(|cut| cut.kind == CutKind::ScanEnd).count())
    }

    /// Waits until one more scan ended, and compares.
    fn settle_scan(&self, sender: &Sender, scans: usize) -> SenderStatus {
        let ended = self.server.wait_until(LIMIT, |state| {
            !state.scan_open && state.cuts.iter().filter(|cut| cut.kind == CutKind::ScanEnd).count() > scans
        });
        assert!(ended, "{:?}\n{:?}", sender.status(), self.violations());
        self.settle(sender);
        self.server.with(|state| assert!(state.image == self.source.disk.content()));
        assert_eq!(self.source.pending_bytes(self.consumer), 0);
        sender.status()
    }

    fn sent(&self) -> (u64, u64) {
        self.server.with(|state| (state.raw_bytes, state.zero_bytes))
    }
}

#[test]
fn nothing_of_an_identical_replica_is_sent() {
    const BYTES: u64 = 24 << 20;
    let (bench, sender) = Bench::replicated(BYTES, 31);
    // A part of it reads as zeroes, allocated and not.
    bench.source.zero(Extent::new(4 << 20, 3 << 20));
    bench.source.write(5 << 20, &[0; 1 << 20]);
    bench.settle(&sender);
    let (before, scans) = (bench.sent(), bench.scans());
    bench.resync();
    let status = bench.settle_scan(&sender, scans);
    assert_eq!(bench.sent(), before, "no data, and no zeroes");
    assert_eq!(status.compared_bytes, BYTES);
    assert!(
        status.question_bytes_sent > 0 && status.question_bytes_sent < BYTES / 1000,
        "{}",
        status.question_bytes_sent
    );
}

/// One block in a hundred, in parts of 4 KiB: so much is sent, and not 16 times as much.
#[test]
fn one_percent_that_differs_is_one_percent_that_is_sent() {
    const BYTES: u64 = 32 << 20;
    let (bench, sender) = Bench::replicated(BYTES, 32);
    let mut random = Random(33);
    let mut edited = ExtentSet::new();
    while edited.total_bytes() < BYTES / 100 {
        let offset = random.below(BYTES / 4096) * 4096;
        bench.edit(offset, &random.bytes(4096));
        edited.insert(Extent::new(offset, 4096));
    }
    // The source has a hole where the replica has data.
    bench.source.disk.zero(Extent::new(20 << 20, 256 << 10), true, Durability::Cached).unwrap();
    edited.remove(Extent::new(20 << 20, 256 << 10));
    let (before, scans) = (bench.sent(), bench.scans());
    bench.resync();
    let status = bench.settle_scan(&sender, scans);
    let sent = bench.sent();
    assert_eq!((sent.0 - before.0, sent.1 - before.1), (edited.total_bytes(), 256 << 10));
    assert!(status.question_bytes_sent < BYTES / 1000);
}

/// A replica without anything: no questions, and no zeroes.
#[test]
fn an_empty_server_is_not_asked() {
    let (bench, sender) = Bench::replicated(4 << 20, 34);
    sender.stop();
    bench.server.wipe();
    bench.resync();
    let scans = bench.scans();
    let sender = bench.start();
    let status = bench.settle_scan(&sender, scans);
    assert_eq!((bench.server.with(|state| state.questions), status.compared_bytes), (0, 0));
    assert_eq!(status.alarm, Some(Alarm::ReplicaLost));
}

/// A server restored from yesterday, and one that lost cuts: both are compared with, and hardly anything is sent.
#[test]
fn a_replica_of_yesterday_is_compared_with() {
    for lost_cuts in [false, true] {
        let (bench, sender) = Bench::replicated(8 << 20, 35);
        let old = bench.server.with(|state| (state.image.clone(), state.durable));
        bench.source.write(1 << 20, &Random(36).bytes(128 << 10));
        bench.settle(&sender);
        sender.stop();
        bench.server.with(|state| {
            state.image = old.0;
            if lost_cuts {
                state.behaviour.lost_cuts = true;
            } else {
                state.durable = old.1;
            }
        });
        let (before, scans) = (bench.sent(), bench.scans());
        let sender = bench.start();
        let status = bench.settle_scan(&sender, scans);
        assert_eq!(status.alarm, Some(Alarm::Diverged));
        // Records of the log may be sent once more, the disk is not.
        let sent = bench.sent().0 - before.0;
        let records: u64 = if lost_cuts { (8 << 20) + (128 << 10) } else { 0 };
        assert!(sent <= records + (128 << 10), "{sent} bytes, lost cuts: {lost_cuts}");
        assert_eq!(status.compared_bytes, 8 << 20);
    }
}

/// Blocks are hashed, then written and logged before the hashes leave, then written back without a record. What the
/// replica holds is the same again for a moment, until the record arrives.
#[test]
fn a_block_is_not_settled_before_the_records_that_its_read_saw() {
    let mut bench = Bench::new(2 << 20, 37);
    bench.fill(&mut Random(37));
    let sender = bench.start();
    bench.settle(&sender);
    sender.stop();
    // Long enough that questions would overtake records.
    bench.config.limits.cut_gap = Duration::from_millis(300);
    let calls = Arc::new(AtomicU64::new(0));
    let original = bench.source.disk.content();
    let hook = {
        let (source, consumer, calls) = (bench.source.clone(), bench.consumer, calls.clone());
        move |extent: Extent| {
            if calls.fetch_add(1, Ordering::SeqCst) < 2 {
                let at = extent.offset as usize;
                source.write(extent.offset, &[1; 8192]);
                source.write_unlogged(consumer, extent.offset, &original[at..at + 8192]);
            }
        }
    };
    *bench.source.disk.read_hook.lock().unwrap() = Some(Arc::new(hook));
    bench.resync();
    let scans = bench.scans();
    let sender = bench.start();
    bench.settle_scan(&sender, scans);
    assert!(calls.load(Ordering::SeqCst) > 2);
}

/// Each hash is of what was there a moment ago: a record that changes the block left before the question.
#[test]
fn hot_writes_between_hash_question_and_answer() {
    for seed in 40..44 {
        let (bench, sender) = Bench::replicated(4 << 20, seed);
        bench.server.with(|state| state.behaviour.delay_answers = true);
        let random = std::sync::Mutex::new(Random(seed));
        let overtaken = Arc::new(AtomicU64::new(0));
        let hook = {
            let (source, server, overtaken) = (bench.source.clone(), bench.server.clone(), overtaken.clone());
            let consumer = bench.consumer;
            move |extent: Extent| {
                let Ok(mut random) = random.try_lock() else { return };
                if overtaken.load(Ordering::SeqCst) > 40 {
                    return;
                }
                let sectors = random.below(24) + 1;
                let offset = extent.offset + random.below((extent.length / 512).saturating_sub(sectors).max(1)) * 512;
                let length = (sectors * 512).min(extent.end() - offset) as usize;
                if random.below(3) == 0 {
                    source.write_unlogged(consumer, offset, &random.bytes(length));
                }
                let written = source.write(offset, &random.bytes(length));
                if random.below(4) == 0 {
                    source.write_unlogged(consumer, offset, &random.bytes(length.min(512)));
                }
                let received = server.wait_until(LIMIT, |state| {
                    state.received.is_some_and(|position| position.sequence >= written.sequence)
                });
                assert!(received, "live changes stand behind a compare");
                overtaken.fetch_add(1, Ordering::SeqCst);
            }
        };
        for block in 0..16 {
            bench.edit(block * (256 << 10), &Random(seed + block).bytes(12 << 10));
        }
        *bench.source.disk.read_hook.lock().unwrap() = Some(Arc::new(hook));
        let scans = bench.scans();
        bench.resync();
        bench.settle_scan(&sender, scans);
        assert!(overtaken.load(Ordering::SeqCst) >= 4, "seed {seed}: {overtaken:?}");
        assert!(bench.server.with(|state| state.questions) > 0, "seed {seed}");
    }
}

/// What was settled before the link was cut is not asked again.
#[test]
fn a_compare_that_is_cut_short_goes_on_where_it_was() {
    const BYTES: u64 = 48 << 20;
    let (bench, sender) = Bench::replicated(BYTES, 45);
    sender.pause();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
    // The answers to the last questions do not come; a second later the others are settled.
    bench.server.with(|state| state.behaviour.hold_answers_from = Some(BYTES / 2));
    let scans = bench.scans();
    bench.resync();
    sender.resume();
    let held = |status: &SenderStatus| status.scan.is_some_and(|scan| scan.durable_bytes >= 8 << 20);
    assert!(sender.wait_for(LIMIT, held), "{:?}", sender.status());
    sender.stop();
    let left = bench.source.pending_bytes(bench.consumer);
    assert!(left > 0 && left <= BYTES - (8 << 20), "{left}");
    bench.server.with(|state| {
        state.behaviour.hold_answers_from = None;
        state.behaviour.hold_answers = false;
    });
    let before = bench.server.with(|state| state.asked_bytes);
    let sender = bench.start();
    let status = bench.settle_scan(&sender, scans);
    assert_eq!(bench.server.with(|state| state.asked_bytes) - before, left);
    assert_eq!(status.compared_bytes, left);
}

/// Paused and resumed in the middle, the guest writing on: old points stay, and the end is right.
#[test]
fn a_compare_can_be_paused_at_any_time() {
    let (bench, sender) = Bench::replicated(16 << 20, 46);
    bench.server.with(|state| state.behaviour.delay_answers = true);
    let mut random = Random(46);
    let (points, scans) = (bench.points(), bench.scans());
    for block in 0..64 {
        bench.edit(block * (256 << 10) + 4096 * random.below(60), &random.bytes(4096));
    }
    bench.resync();
    for _ in 0..6 {
        let questions = bench.server.with(|state| state.questions);
        bench.server.wait_until(Duration::from_millis(100), |state| state.questions > questions);
        bench.source.write(random.below(4096) * 4096, &random.bytes(4096));
        sender.pause();
        assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
        assert!(bench.points() >= points);
        sender.resume();
    }
    bench.settle_scan(&sender, scans);
}

/// Everything at once, with links that are cut and cuts that are lost.
#[test]
fn compares_end_right_whatever_happens() {
    for seed in 50..58 {
        let bench = Bench::new(1 << 20, seed);
        let mut random = Random(seed);
        bench.fill(&mut random);
        bench.server.with(|state| {
            state.behaviour.cut_after_frames = Some(60);
            state.behaviour.lose_tail = true;
            state.behaviour.delay_answers = true;
        });
        let sender = bench.start();
        for step in 0..160 {
            let sectors = random.below(48) + 1;
            let offset = random.below((1 << 11) - sectors) * 512;
            let length = sectors as usize * 512;
            match random.below(16) {
                0 => drop(bench.source.zero(Extent::new(offset, sectors * 512))),
                1 => drop(bench.source.mark()),
                2 => bench.source.write_unlogged(bench.consumer, offset, &random.bytes(length)),
                3 if step % 5 == 0 => drop(bench.source.new_epoch(EpochReason::Unclean).unwrap()),
                4 if step % 4 == 0 => bench.resync(),
                // An edit, and whoever noticed it.
                5 | 6 => {
                    bench.edit(offset, &random.bytes(length));
                    let edited = ExtentSet::from_iter([Extent::new(offset, length as u64)]);
                    bench.source.require_scan(bench.consumer, &edited, ScanReason::Unclean).unwrap();
                }
                7 => {
                    let cuts = bench.server.with(|state| state.cuts.len());
                    bench.server.wait_until(LIMIT, |state| state.cuts.len() > cuts + 2);
                }
                _ => drop(bench.source.write(offset, &random.bytes(length))),
            }
        }
        bench.server.with(|state| state.behaviour.cut_after_frames = None);
        bench.settle(&sender);
        bench.server.with(|state| assert!(state.image == bench.source.disk.content(), "seed {seed}"));
        assert!(bench.server.with(|state| state.questions) > 0, "seed {seed}");
        assert_eq!(bench.source.pending_bytes(bench.consumer), 0, "seed {seed}");
        assert_eq!(sender.status().alarm, None, "seed {seed}");
    }
}

/// A damaged block is different, whatever its hash would have been, and whole again afterwards.
#[test]
fn a_block_that_the_server_cannot_read_is_sent() {
    let (bench, sender) = Bench::replicated(4 << 20, 60);
    let lost = Extent::new(1 << 20, 64 << 10);
    bench.server.with(|state| state.damaged.insert(lost));
    let (before, scans) = (bench.sent(), bench.scans());
    bench.resync();
    bench.settle_scan(&sender, scans);
    assert_eq!(bench.sent().0 - before.0, lost.length);
    assert!(bench.server.with(|state| state.damaged.is_empty()));
}

/// A bitmap in which every other granule is set is worked through in stretches.
#[test]
fn a_scattered_bitmap_is_scanned_in_stretches() {
    use crate::source::{ScanRevision, WINDOW_EXTENTS_MAX};
    const BYTES: u64 = 16 << 20;
    let (bench, sender) = Bench::replicated(BYTES, 62);
    sender.pause();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
    let mut scattered = ExtentSet::new();
    for sector in (0..BYTES / 512).step_by(2) {
        scattered.insert(Extent::new(sector * 512, 512));
    }
    for sector in (0..BYTES / 512).step_by(200) {
        bench.edit(sector * 512, &[sector as u8; 512]);
    }
    bench.source.require_scan(bench.consumer, &scattered, ScanReason::Unclean).unwrap();
    let window = bench.source.pending_window(bench.consumer, ScanRevision(0), 0).unwrap();
    assert!(window.extents.len() == WINDOW_EXTENTS_MAX && window.next.is_some());
    let scans = bench.scans();
    sender.resume();
    let status = bench.settle_scan(&sender, scans);
    assert_eq!(status.compared_bytes, BYTES / 2);
}
