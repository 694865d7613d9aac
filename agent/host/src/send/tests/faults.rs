//! Cut streams, lost tails, damaged logs, refusals.

use tidemark_base::Extent;
use tidemark_proto::replication::{Refusal, RefusalReason};

use super::{Bench, LIMIT, Random};
use crate::pack::CompressionPolicy;
use crate::send::Phase;
use crate::send::resume::Alarm;
use crate::send::tests::server::eventually;
use crate::source::{EpochReason, Source};

/// Streams are cut at random frames, servers lose what was not durable, epochs end; every mark that became a point
/// equals the source at that mark.
#[test]
fn every_point_is_right_whatever_is_cut() {
    for seed in 100..103 {
        let bench = Bench::new(1 << 20, seed);
        let mut random = Random(seed);
        bench.fill(&mut random);
        bench.server.with(|state| {
            state.behaviour.cut_after_frames = Some(40);
            state.behaviour.lose_tail = true;
            state.behaviour.grant_max = 96 << 10;
        });
        let sender = bench.start();
        for step in 0..250 {
            let sectors = random.below(32) + 1;
            let offset = random.below((1 << 11) - sectors) * 512;
            match random.below(26) {
                0 | 1 => drop(bench.source.zero(Extent::new(offset, sectors * 512))),
                2 => drop(bench.source.mark()),
                3 => bench.source.write_unlogged(bench.consumer, offset, &random.bytes(sectors as usize * 512)),
                4 if step % 7 == 0 => drop(bench.source.new_epoch(EpochReason::Unclean).unwrap()),
                5..=7 => {
                    // Lets the sender come along, so that cuts of all kinds are met.
                    let cuts = bench.server.with(|state| state.cuts.len());
                    bench.server.wait_until(LIMIT, |state| state.cuts.len() > cuts + 2);
                }
                _ => drop(bench.source.write(offset, &random.bytes(sectors as usize * 512))),
            }
        }
        bench.server.with(|state| state.behaviour.cut_after_frames = None);
        bench.settle(&sender);
        bench.server.with(|state| {
            assert!(state.image == bench.source.disk.content(), "seed {seed}");
            assert!(state.streams.len() > 4 && state.points.len() > 1, "seed {seed}: {:?}", state.streams.len());
        });
        assert_eq!(sender.status().alarm, None, "seed {seed}");
    }
}

#[test]
fn a_sender_that_dies_in_the_middle_of_a_cut_leaves_nothing_of_it() {
    let mut bench = Bench::new(8 << 20, 21);
    bench.config.policy.compression = CompressionPolicy::Off;
    let sender = bench.start();
    bench.settle(&sender);
    sender.pause();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
    let before = bench.server.with(|state| {
        // Two frames of the next cut can leave; the third waits for credit that never comes.
        state.behaviour.standing_credit = 600 << 10;
        state.behaviour.grant_max = 0;
        (state.image.clone(), state.durable)
    });
    let mut random = Random(21);
    for offset in (0..1 << 20).step_by(4096) {
        bench.source.write(offset, &random.bytes(4096));
    }
    sender.resume();
    assert!(bench.server.wait_until(LIMIT, |state| state.frames_in_open_cut == 2));
    drop(sender);
    bench.server.with(|state| {
        assert_eq!((state.incomplete_cuts, state.durable), (1, before.1));
        assert!(state.image == before.0);
        state.behaviour.grant_max = u64::MAX;
    });
    let sender = bench.start();
    bench.settle(&sender);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
}

#[test]
fn a_server_that_lost_everything_gets_everything() {
    let bench = Bench::new(2 << 20, 22);
    bench.fill(&mut Random(22));
    let sender = bench.start();
    bench.settle(&sender);
    sender.stop();
    bench.server.wipe();
    let sender = bench.start();
    bench.settle(&sender);
    assert_eq!(sender.status().alarm, Some(Alarm::ReplicaLost));
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
}

/// A server restored to an earlier state, and a source whose log was: neither is trusted.
#[test]
fn diverged_histories_are_told_and_scanned() {
    let bench = Bench::new(2 << 20, 23);
    bench.fill(&mut Random(23));
    let sender = bench.start();
    bench.settle(&sender);
    let old = bench.server.with(|state| (state.image.clone(), state.durable));
    bench.source.write(0, &[1; 65536]);
    bench.settle(&sender);
    sender.stop();
    bench.server.with(|state| (state.image, state.durable) = old);
    let epoch = bench.source.state().logged.epoch;
    let sender = bench.start();
    assert!(sender.wait_for(LIMIT, |status| status.alarm == Some(Alarm::Diverged)));
    assert!(eventually(LIMIT, || bench.source.state().logged.epoch != epoch));
    bench.settle(&sender);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
}

/// What the log cannot give back is read from the disk.
#[test]
fn damage_in_the_log_is_scanned() {
    let bench = Bench::new(2 << 20, 24);
    bench.fill(&mut Random(24));
    let sender = bench.start();
    bench.settle(&sender);
    sender.pause();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Paused));
    let mut random = Random(25);
    let next = |random: &mut Random| random.below(500) * 4096;
    for _ in 0..40 {
        bench.source.write(next(&mut random), &random.bytes(4096));
    }
    // The log's data lies back to back after the 2 MiB that filled the disk.
    bench.source.damaged.lock().unwrap().extend([(2 << 20) + 5 * 4096, (2 << 20) + 39 * 4096]);
    sender.resume();
    bench.settle(&sender);
    assert_eq!(sender.status().alarm, None);
    bench.server.with(|state| assert!(state.image == bench.source.disk.content()));
    assert_eq!(bench.source.pending_bytes(bench.consumer), 0);
}

#[test]
fn a_fenced_sender_halts_and_says_so() {
    let bench = Bench::new(1 << 20, 26);
    let refusal = Refusal { reason: RefusalReason::Fenced, message: "fenced".into(), help: "find the other".into() };
    bench.server.with(|state| state.behaviour.refusal = Some(refusal));
    let sender = bench.start();
    assert!(sender.wait_for(LIMIT, |status| status.phase == Phase::Halted));
    let problem = sender.status().problem.unwrap();
    assert_eq!((problem.refusal, problem.help.as_str()), (Some(RefusalReason::Fenced), "find the other"));
    let streams = bench.server.with(|state| {
        state.behaviour.refusal = None;
        state.streams.len()
    });
    assert_eq!(streams, 1);
    sender.resume();
    bench.settle(&sender);
}

#[test]
fn a_server_without_room_is_asked_again() {
    let bench = Bench::new(1 << 20, 27);
    let refusal = Refusal { reason: RefusalReason::NoRoom, message: "full".into(), help: "make room".into() };
    bench.server.with(|state| state.behaviour.refusal = Some(refusal));
    let sender = bench.start();
    assert!(bench.server.wait_until(LIMIT, |state| state.streams.len() > 3));
    assert_eq!(sender.status().problem.unwrap().refusal, Some(RefusalReason::NoRoom));
    bench.server.with(|state| state.behaviour.refusal = None);
    bench.settle(&sender);
    assert_eq!(sender.status().problem, None);
}
