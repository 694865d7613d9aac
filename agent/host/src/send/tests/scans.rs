//! Scans while the guest writes.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemark_base::Extent;
use tidemark_proto::replication::CutKind;

use super::{Bench, LIMIT, Random};
use crate::send::link::Traffic;
use crate::source::Source;

/// Each read of the scan takes its data, then waits until a write into the same range was received by the server.
/// The stale data must not come after it.
#[test]
fn a_delayed_read_never_undoes_a_write_that_left_before_it() {
    let bench = Bench::new(4 << 20, 11);
    bench.fill(&mut Random(11));
    bench.source.new_epoch(crate::source::EpochReason::Unclean).unwrap();
    let overtaken = Arc::new(AtomicU64::new(0));
    let hook = {
        let (source, server, overtaken) = (bench.source.clone(), bench.server.clone(), overtaken.clone());
        let one = Mutex::new(Random(12));
        move |extent: Extent| {
            // One reader at a time, so that the other worker can seal what overtakes it.
            let Ok(mut random) = one.try_lock() else { return };
            let sectors = random.below(16) + 1;
            let offset = extent.offset + random.below((extent.length / 512).saturating_sub(sectors).max(1)) * 512;
            let length = (sectors * 512).min(extent.end() - offset) as usize;
            let written = source.write(offset, &random.bytes(length));
            let received = server.wait_until(LIMIT, |state| {
                state.received.is_some_and(|position| position.sequence >= written.sequence)
            });
            assert!(received, "live changes stand behind a scan");
            overtaken.fetch_add(1, Ordering::SeqCst);
        }
    };
    *bench.source.disk.read_hook.lock().unwrap() = Some(Arc::new(hook));
    let sender = bench.start();
    bench.settle(&sender);
    assert!(overtaken.load(Ordering::SeqCst) >= 4, "{overtaken:?}");
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}

/// Marks inside a scan are no points; from the barrier on they are.
#[test]
fn a_scan_under_hot_writes_is_consistent_from_its_end_on() {
    let bench = Bench::new(2 << 20, 13);
    bench.fill(&mut Random(13));
    bench.source.new_epoch(crate::source::EpochReason::Unclean).unwrap();
    let sender = bench.start();
    let mut random = Random(14);
    let mut marks = 0;
    while !sender.wait_for(std::time::Duration::ZERO, |status| status.cuts_durable > 3 && !status.scan_open) {
        for _ in 0..20 {
            bench.source.write(random.below(512) * 4096, &random.bytes(4096));
        }
        bench.source.mark();
        marks += 1;
        assert!(marks < 100_000);
    }
    for _ in 0..20 {
        bench.source.write(random.below(512) * 4096, &random.bytes(4096));
        bench.source.mark();
    }
    bench.settle(&sender);
    assert!(bench.points() >= 21);
}

/// A block whose write was not logged is scanned: on its own connection, zeroes included, and nothing else is.
#[test]
fn a_dirty_range_is_drained() {
    let bench = Bench::new(8 << 20, 15);
    bench.fill(&mut Random(15));
    let sender = bench.start();
    bench.settle(&sender);
    assert!(bench.server.wait_until(LIMIT, |state| state.streams.last() == Some(&Traffic::Live)));
    let before = bench.server.with(|state| (state.raw_bytes, state.zero_bytes));
    let mut random = Random(16);
    bench.source.write_unlogged(bench.consumer, 1 << 20, &random.bytes(8192));
    bench.source.write_unlogged(bench.consumer, 2 << 20, &[0; 12288]);
    assert!(bench.server.wait_until(LIMIT, |state| {
        state.cuts.iter().filter(|cut| cut.kind == CutKind::ScanEnd).count() >= 2 && !state.scan_open
    }));
    bench.settle(&sender);
    assert_eq!(bench.server.with(|state| (state.raw_bytes - before.0, state.zero_bytes - before.1)), (8192, 12288));
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}

/// What the server cannot read any more is sent again, zeroes included, and nothing else is.
#[test]
fn what_the_server_lost_is_sent_again() {
    let bench = Bench::new(8 << 20, 19);
    bench.fill(&mut Random(19));
    bench.source.zero(Extent::new(1 << 20, 128 << 10));
    let sender = bench.start();
    bench.settle(&sender);
    let before = bench.server.with(|state| (state.raw_bytes, state.zero_bytes));
    bench.server.lose(&[Extent::new((1 << 20) + (64 << 10), 128 << 10), Extent::new(6 << 20, 64 << 10)]);
    assert!(bench.server.wait_until(LIMIT, |state| {
        state.cuts.iter().filter(|cut| cut.kind == CutKind::ScanEnd).count() >= 2 && !state.scan_open
    }));
    bench.settle(&sender);
    assert_eq!(
        bench.server.with(|state| (state.raw_bytes - before.0, state.zero_bytes - before.1)),
        (128 << 10, 64 << 10)
    );
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}

/// A range that became dirty again after its read was submitted stays pending, and is read again.
#[test]
fn what_was_dirtied_since_its_read_is_read_again() {
    let bench = Bench::new(2 << 20, 17);
    bench.fill(&mut Random(17));
    bench.source.new_epoch(crate::source::EpochReason::Unclean).unwrap();
    let dirtied = Arc::new(AtomicU64::new(0));
    let hook = {
        let (source, consumer, dirtied) = (bench.source.clone(), bench.consumer, dirtied.clone());
        move |extent: Extent| {
            if dirtied.fetch_add(1, Ordering::SeqCst) < 3 {
                source.write_unlogged(consumer, extent.offset, &[dirtied.load(Ordering::SeqCst) as u8; 4096]);
            }
        }
    };
    *bench.source.disk.read_hook.lock().unwrap() = Some(Arc::new(hook));
    let sender = bench.start();
    bench.settle(&sender);
    assert!(dirtied.load(Ordering::SeqCst) >= 4);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}

/// A block is written, logged, and then written again without being logged; the record leaves after the block was read.
#[test]
fn an_unlogged_write_outlives_an_older_record_that_leaves_late() {
    let mut bench = Bench::new(2 << 20, 18);
    bench.fill(&mut Random(18));
    bench.source.new_epoch(crate::source::EpochReason::Unclean).unwrap();
    // Long enough that scanned blocks would overtake records.
    bench.config.limits.cut_gap = std::time::Duration::from_millis(400);
    let calls = Arc::new(AtomicU64::new(0));
    let hook = {
        let (source, consumer, calls) = (bench.source.clone(), bench.consumer, calls.clone());
        move |extent: Extent| {
            let call = calls.fetch_add(1, Ordering::SeqCst);
            if call < 4 {
                source.write(extent.offset, &[1; 8192]);
                source.write_unlogged(consumer, extent.offset, &[2; 4096]);
            }
        }
    };
    *bench.source.disk.read_hook.lock().unwrap() = Some(Arc::new(hook));
    let sender = bench.start();
    bench.settle(&sender);
    assert!(calls.load(Ordering::SeqCst) > 4);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}

/// The mark that ends a scan needs room in the log, and only acknowledgements make it: with the stream, what is to be
/// acknowledged would be lost, and sent again for ever.
#[test]
fn a_scan_that_cannot_end_keeps_its_stream() {
    let bench = Bench::new(2 << 20, 19);
    bench.fill(&mut Random(19));
    let (refused, refusals) = std::sync::mpsc::channel();
    *bench.source.refused_marks.lock().unwrap() = Some(refused);
    bench.server.with(|state| state.behaviour.hold_acknowledgements = true);
    let sender = bench.start();
    for _ in 0..5 {
        refusals.recv_timeout(LIMIT).expect("the end of the scan is tried again");
    }
    bench.server.with(|state| {
        assert_eq!(state.streams.len(), 1, "the stream was given up, and what was under way with it");
        state.behaviour.hold_acknowledgements = false;
    });
    // This server acknowledges when a cut ends, and not each.
    let deadline = std::time::Instant::now() + LIMIT;
    while !sender.wait_durable(bench.source.mark(), std::time::Duration::from_millis(100)) {
        assert!(std::time::Instant::now() < deadline, "{:?}", sender.status());
    }
    bench.settle(&sender);
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}
