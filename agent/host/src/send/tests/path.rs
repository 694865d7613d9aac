//! What goes over the link when all is well.

use std::time::Duration;

use tidemark_base::Extent;
use tidemark_proto::replication::CutKind;

use super::{Bench, LIMIT, Random};
use crate::pack::CompressionPolicy;
use crate::send::link::Traffic;
use crate::send::{Phase, SendPolicy, ShipMode};
use crate::source::{RECORD_BYTES_MAX, Source};

#[test]
fn an_initial_scan_skips_holes_and_zeroes_and_ends_at_the_barrier() {
    let bench = Bench::new(64 << 20, 1);
    let mut random = Random(1);
    bench.source.write(1 << 20, &random.bytes(100 << 10));
    bench.source.write(40 << 20, &vec![0; 300 << 10]);
    let mut half = random.bytes(64 << 10);
    half[8192..40960].fill(0);
    bench.source.write(50 << 20, &half);
    // What was written before anyone listened is on the disk; a new epoch forgets that it was in the log, too.
    bench.source.new_epoch(crate::source::EpochReason::Unclean).unwrap();
    let sender = bench.start();
    bench.settle(&sender);
    let data = (100 << 10) + (64 << 10) - 32768;
    assert_eq!(bench.server.with(|state| (state.raw_bytes, state.zero_bytes)), (data, 0));
    assert_eq!(*bench.source.disk.read_bytes.lock().unwrap(), (100 + 300 + 64) << 10);
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
    bench.server.with(|state| {
        assert_eq!(state.cuts.iter().filter(|cut| cut.kind == CutKind::ScanEnd).count(), 1);
        assert!(state.image == bench.source.disk.content());
    });
    // Live changes moved to their own connection.
    assert!(bench.server.wait_until(LIMIT, |state| state.streams.ends_with(&[Traffic::Scan, Traffic::Live])));
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Live));
    sender.stop();
    assert!(bench.server.with(|state| state.closes) >= 2, "streams are closed with their totals");
}

#[test]
fn live_changes_replace_each_other_within_a_cut_and_zeroes_carry_no_data() {
    let mut bench = Bench::new(4 << 20, 2);
    bench.config.policy =
        SendPolicy { mode: ShipMode::Interval, compression: CompressionPolicy::Off, ..SendPolicy::default() };
    let sender = bench.start();
    bench.settle(&sender);
    let before = bench.server.with(|state| (state.raw_bytes, state.zero_bytes, state.cuts.len()));
    let mut random = Random(2);
    for _ in 0..50 {
        bench.source.write(4096, &random.bytes(8192));
    }
    bench.source.write(1 << 20, &[0; 16384]);
    bench.source.write(2 << 20, &random.bytes(4096));
    bench.source.zero(Extent::new(2 << 20, 1 << 20));
    bench.settle(&sender);
    bench.server.with(|state| {
        let records: Vec<_> =
            state.cuts[before.2..].iter().filter(|cut| cut.kind == CutKind::Records && cut.chunks > 0).collect();
        assert_eq!(records.len(), 1, "one cycle is one cut");
        assert_eq!(records[0].written_bytes, 50 * 8192 + 16384 + 4096 + (1 << 20));
        assert_eq!(state.raw_bytes - before.0, 8192);
        assert_eq!(state.zero_bytes - before.1, 16384 + (1 << 20));
    });
}

#[test]
fn a_cycle_larger_than_the_map_is_packed_in_several_passes() {
    let mut bench = Bench::new(8 << 20, 3);
    bench.config.policy.mode = ShipMode::Interval;
    bench.config.limits.map_entries_max = 64;
    let sender = bench.start();
    bench.settle(&sender);
    let mut random = Random(3);
    for _ in 0..3000 {
        let sectors = random.below(24) + 1;
        let offset = random.below((8 << 11) - sectors) * 512;
        match random.below(8) {
            0 => bench.source.zero(Extent::new(offset, sectors * 512)),
            _ => bench.source.write(offset, &random.bytes(sectors as usize * 512)),
        };
    }
    bench.settle(&sender);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
}

/// Of each record a sector is left, and still each is read as a whole.
#[test]
fn what_is_read_for_a_frame_is_bounded() {
    let mut bench = Bench::new(1 << 20, 7);
    bench.config.policy.mode = ShipMode::Interval;
    let sender = bench.start();
    bench.settle(&sender);
    let mut random = Random(7);
    let mut data = random.bytes(256 << 10);
    for number in 0..160u8 {
        data.fill(number + 1);
        bench.source.write(u64::from(number) * 512, &data);
    }
    bench.settle(&sender);
    let read = bench.source.read_bytes_max.load(std::sync::atomic::Ordering::SeqCst) as u64;
    assert!(read <= crate::send::session::BATCH_READ_BYTES_MAX + RECORD_BYTES_MAX, "{read} bytes at once");
}

/// The source returns to its log only when what the old one holds was taken, and no mark ends its last cycle.
#[test]
fn a_cycle_that_the_end_of_the_log_cut_short_leaves_without_a_mark() {
    let mut bench = Bench::new(1 << 20, 6);
    bench.config.policy.mode = ShipMode::Interval;
    let sender = bench.start();
    bench.settle(&sender);
    let last = bench.source.write(4096, &[7; 4096]);
    assert!(!sender.wait_durable(last, Duration::from_millis(60)), "the cycle is not over");
    bench.source.step_down();
    let is_sent = |cuts: &[tidemark_proto::replication::CutEnd]| cuts.last().is_some_and(|cut| cut.to == last);
    assert!(bench.server.wait_until(LIMIT, |state| is_sent(&state.cuts)), "{:?}", sender.status());
    // What is not logged now is unknown to the server, which must not be told that all is there up to now.
    let cuts = bench.server.with(|state| state.cuts.len());
    assert!(!bench.server.wait_until(Duration::from_millis(60), |state| state.cuts.len() > cuts));
}

#[test]
fn an_idle_disk_beats_and_a_paused_one_does_not() {
    let bench = Bench::new(1 << 20, 4);
    let sender = bench.start();
    bench.settle(&sender);
    let is_beat = |cuts: &[tidemark_proto::replication::CutEnd]| {
        cuts.iter().rev().take(3).all(|cut| cut.kind == CutKind::Records && cut.from == cut.to)
    };
    assert!(bench.server.wait_until(LIMIT, |state| is_beat(&state.cuts)));
    sender.pause();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
    let cuts = bench.server.with(|state| state.cuts.len());
    let position = bench.source.write(0, &[7; 4096]);
    assert!(!sender.wait_durable(position, Duration::from_millis(60)));
    assert_eq!(bench.server.with(|state| state.cuts.len()), cuts);
    sender.resume();
    bench.settle(&sender);
    assert!(sender.status().rpo(1.0).is_some());
}

/// A server with little credit, a slow link: what is held stays within its limits.
#[test]
fn memory_is_bounded_when_the_link_stalls() {
    let mut bench = Bench::new(16 << 20, 5);
    bench.config.policy.compression = CompressionPolicy::Off;
    bench.config.limits.live_bytes_max = 1 << 20;
    bench.config.limits.scan_bytes_max = 1 << 20;
    let mut random = Random(5);
    let sender = bench.start();
    bench.settle(&sender);
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Live && status.streams_opened == 2));
    bench.server.with(|state| state.behaviour.stalled = true);
    let piece = random.bytes(256 << 10);
    for offset in (0..16 << 20).step_by(256 << 10) {
        bench.source.write(offset, &piece);
    }
    // The budget is used up, not exceeded: the emitter waits for the link.
    let stalled = bench.server.wait_until(LIMIT, |state| state.queued_bytes > 700 << 10);
    assert!(stalled, "{:?} {:?}", bench.server.with(|state| state.queued_bytes), sender.status());
    assert!(!sender.wait_durable(bench.source.mark(), Duration::from_millis(50)));
    assert!(bench.server.with(|state| state.queued_bytes_max) <= 1 << 20);
    assert!(sender.status().held_bytes_peak <= 2 << 20);
    sender.stop();
    bench.server.with(|state| state.behaviour.stalled = false);
    bench.server.with(|state| state.behaviour.grant_max = 100 << 10);
    let sender = bench.start();
    bench.settle(&sender);
    assert!(sender.status().held_bytes_peak <= 2 << 20);
}
