use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tidemark_base::{MachineId, Timestamp};
use tidemark_nbd::{Export, WriteRequest};
use tidemark_proto::replication::Consistency;

use super::{Fixture, replay, write};
use crate::capture::splitter::Splitter;
use crate::error::HostError;
use crate::mark::Marker;
use crate::source::{RecordBody, Source};

const DISK_BYTES: u64 = 1 << 20;
const WRITERS: usize = 4;
/// Each writer has a part of the disk, which it writes over again and again in one batch: long enough on its way that
/// every hold meets writes in flight.
const PART_BYTES: usize = DISK_BYTES as usize / WRITERS;
const WRITE_BYTES: usize = 32 << 10;

/// The number that a writer wrote last, at the begin of its part.
fn block(content: &[u8], writer: usize) -> u64 {
    u64::from_le_bytes(content[writer * PART_BYTES..writer * PART_BYTES + 8].try_into().unwrap())
}

/// A batch of writes with a number all over them.
fn write_part(splitter: &Splitter, writer: usize, number: u64) {
    let data: Vec<u8> = std::iter::repeat_n(number.to_le_bytes(), WRITE_BYTES / 8).flatten().collect();
    let writes: Vec<WriteRequest<'_>> = (0..PART_BYTES / WRITE_BYTES)
        .map(|index| WriteRequest {
            offset: (writer * PART_BYTES + index * WRITE_BYTES) as u64,
            data: &data,
            fua: false,
        })
        .collect();
    let mut results: Vec<_> = writes.iter().map(|_| Err(std::io::ErrorKind::Other.into())).collect();
    splitter.write_batch(&writes, &mut results);
    assert!(results.iter().all(Result::is_ok));
}

/// Stops the writers, also when an assertion failed.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_mark_under_load_is_one_instant_of_two_disks() {
    mark_under_load();
}

pub fn mark_under_load() {
    let fixtures = [Fixture::new(DISK_BYTES), Fixture::new(DISK_BYTES)];
    let disks = [fixtures[0].attach().disk, fixtures[1].attach().disk];
    let marker = Marker::new(MachineId::random(), "web".into(), disks.to_vec(), None, Duration::from_secs(1));
    let splitters = Arc::new(disks.clone().map(|disk| Splitter::new(disk).unwrap()));
    let stop = Arc::new(AtomicBool::new(false));
    let _stop = StopOnDrop(stop.clone());
    // For each writer: what was begun, and what was acknowledged. It writes first to one disk, then to the other.
    let counters: Arc<Vec<[AtomicU64; 4]>> = Arc::new((0..WRITERS).map(|_| Default::default()).collect());
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (splitters, stop, counters) = (splitters.clone(), stop.clone(), counters.clone());
            std::thread::spawn(move || {
                for number in 1u64.. {
                    for disk in 0..2 {
                        counters[writer][disk * 2].store(number, Ordering::SeqCst);
                        write_part(&splitters[disk], writer, number);
                        counters[writer][disk * 2 + 1].store(number, Ordering::SeqCst);
                    }
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                }
            })
        })
        .collect();
    let mut marks = Vec::new();
    for round in 0..20 {
        // Every writer came on since the round before, and somebody is on its way: what a hold is for.
        let counted = |writer: usize, at: usize| counters[writer][at].load(Ordering::SeqCst);
        let reached: Vec<u64> = (0..WRITERS).map(|writer| counted(writer, 3)).collect();
        let has_moved = |writer: usize| counted(writer, 3) > reached[writer];
        let is_on_its_way =
            |writer: usize| counted(writer, 0) > counted(writer, 1) || counted(writer, 2) > counted(writer, 3);
        while !(0..WRITERS).all(has_moved) || (0..WRITERS).filter(|writer| is_on_its_way(*writer)).count() < 2 {
            std::thread::yield_now();
        }
        let all = || counters.iter().map(|writer| [0, 1, 2, 3].map(|at| writer[at].load(Ordering::SeqCst)));
        let before: Vec<[u64; 4]> = all().collect();
        let mut reference = Vec::new();
        let mut held = Vec::new();
        let outcome = marker
            .mark_observed(Consistency::Crash, "under load", round % 2 == 0, &mut |_| {
                reference = fixtures.iter().map(Fixture::content).collect();
                held = all().collect();
            })
            .unwrap();
        for disk in 0..2 {
            for writer in 0..WRITERS {
                let content = block(&reference[disk], writer);
                assert!(content >= before[writer][disk * 2 + 1], "acknowledged before the mark and not in it");
                assert!(content >= held[writer][disk * 2 + 1], "acknowledged during the hold and not in it");
                assert!(content <= held[writer][disk * 2], "in the mark before it was begun");
                // The second disk's write was begun after the first one's was acknowledged: never ahead of it.
                assert!(block(&reference[1], writer) <= block(&reference[0], writer));
            }
        }
        assert_eq!(disks[0].state().marked.unwrap(), position_of(&outcome, &fixtures[0]));
        marks.push((outcome, reference));
    }
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.join().unwrap();
    }
    for disk in 0..2 {
        let mut image = vec![0; DISK_BYTES as usize];
        let mut reader = disks[disk].read_after(&disks[disk].state().logged.epoch.start()).unwrap();
        let mut newest = Timestamp(0);
        for (outcome, reference) in &marks {
            let position = position_of(outcome, &fixtures[disk]);
            let mut records = Vec::new();
            reader.read(position.sequence, usize::MAX, &mut records).unwrap();
            let RecordBody::Mark(mark) = &records.last().unwrap().body else { panic!("no mark at its position") };
            assert_eq!((mark.id, mark.time, mark.disks.len()), (outcome.id, outcome.time, 2));
            assert!(records.iter().all(|record| {
                let grows = record.time >= newest;
                newest = record.time;
                grows
            }));
            replay(&disks[disk], &records, &mut image);
            assert!(image == reference[disk], "the log's prefix is not the disk at the mark");
        }
    }
}

fn position_of(outcome: &crate::MarkOutcome, fixture: &Fixture) -> tidemark_base::Position {
    outcome.positions.iter().find(|(disk, _)| *disk == fixture.disk).unwrap().1
}

#[test]
fn a_write_that_does_not_end_is_let_go_on() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    let stuck = [tidemark_base::Extent::new(0, 512)];
    let admitted = disk.in_flight.admit(&stuck).unwrap();
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let marking = scope.spawn(|| {
            let outcome = marker.mark(Consistency::Crash, "", false).unwrap();
            assert!(finished.load(Ordering::SeqCst), "marked while a write was in flight");
            outcome
        });
        // Other writes get through between two tries.
        let splitter = Splitter::new(disk.clone()).unwrap();
        for _ in 0..2 {
            write(&splitter, 8192, &[1; 512]).unwrap();
        }
        finished.store(true, Ordering::SeqCst);
        disk.in_flight.finish(admitted, fixture.clock.wall_now());
        marking.join().unwrap();
    });
    assert!(!marker.is_written_since(false));
}

#[test]
fn without_a_log_there_is_no_mark_and_without_scripts_no_quiet_application() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    let error = marker.mark(Consistency::Application, "", true).unwrap_err();
    assert!(matches!(error, HostError::Freeze { .. }) && error.help().contains("freeze"));
    disk.log.close().unwrap();
    assert!(matches!(marker.mark(Consistency::Crash, "", true), Err(HostError::NotLogging { .. })));
    // Nobody is held after a failed mark.
    write(&Splitter::new(disk).unwrap(), 0, &[1; 512]).unwrap();
}

/// It is refused where marks are asked for; in a log it would make everything after it unreadable.
#[test]
fn a_mark_that_cannot_be_read_back_is_not_logged() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    let logged = disk.state().logged;
    assert!(matches!(marker.mark(Consistency::Crash, &"x".repeat(300), true), Err(HostError::Io { .. })));
    assert_eq!(disk.state().logged, logged);
    marker.mark(Consistency::Crash, "before the upgrade", true).unwrap();
    assert_eq!(super::records_after(&disk, &logged).len(), 1);
}
