use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tidemark_base::{MachineId, MarkId, Position};
use tidemark_proto::control::{HoldGroup, Verdict};
use tidemark_proto::replication::{Consistency, Mark};

use super::{Fixture, replay, write};
use crate::capture::splitter::Splitter;
use crate::error::HostError;
use crate::mark::{Barriers, GroupOutcome, Joining, Marker};
use crate::protected::ProtectedDisk;
use crate::source::{RecordBody, Source};

const DISK_BYTES: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);

/// A host with one machine of one disk.
struct TestHost {
    fixture: Fixture,
    disk: Arc<ProtectedDisk>,
    marker: Arc<Marker>,
    machine: MachineId,
    barriers: Barriers,
    expired: Arc<AtomicU64>,
}

impl TestHost {
    fn new() -> Self {
        let fixture = Fixture::new(DISK_BYTES);
        let disk = fixture.attach().disk;
        let machine = MachineId::random();
        let marker = Marker::new(machine, "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
        let (barriers, expired) = (Barriers::default(), Arc::default());
        Self { fixture, disk, marker: Arc::new(marker), machine, barriers, expired }
    }

    fn hold(&self, round: MarkId, limit: Duration) -> Result<(), HostError> {
        let joining = Joining { marker: self.marker.clone(), refuse: Box::new(|| Ok(())) };
        let request = HoldGroup { round, group: "shop".into(), machines: vec![self.machine], limit, label: "".into() };
        let expired = self.expired.clone();
        self.barriers.hold(vec![joining], &request, move || {
            expired.fetch_add(1, Ordering::SeqCst);
        })
    }

    fn release(&self, round: MarkId, verdict: Verdict) -> GroupOutcome {
        self.barriers.release(round, verdict).unwrap()
    }

    fn splitter(&self) -> Splitter {
        Splitter::new(self.disk.clone()).unwrap()
    }

    /// The marks in its log, with the number that the disk shows at each.
    fn marks(&self) -> Vec<(Mark, u64)> {
        let mut image = vec![0; DISK_BYTES as usize];
        let mut reader = self.disk.read_after(&self.disk.state().logged.epoch.start()).unwrap();
        let mut records = Vec::new();
        reader.read(self.disk.state().logged.sequence, usize::MAX, &mut records).unwrap();
        let mut marks = Vec::new();
        for record in &records {
            replay(&self.disk, std::slice::from_ref(record), &mut image);
            if let RecordBody::Mark(mark) = &record.body {
                marks.push(((**mark).clone(), u64::from_le_bytes(image[..8].try_into().unwrap())));
            }
        }
        marks
    }
}

fn put(splitter: &Splitter, number: u64) {
    let block: Vec<u8> = std::iter::repeat_n(number.to_le_bytes(), 64).flatten().collect();
    write(splitter, 0, &block).unwrap();
}

/// Ends the writer also when an assertion failed.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One machine counts; another, on another host, copies what was acknowledged. At an instant of both the copy is never ahead.
#[test]
fn a_barrier_is_one_instant_of_two_hosts() {
    barrier_under_load();
}

pub fn barrier_under_load() {
    let hosts = [TestHost::new(), TestHost::new()];
    let (stop, counted) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut rounds = Vec::new();
    let mut apart = Vec::new();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            let [original, copy] = [hosts[0].splitter(), hosts[1].splitter()];
            let mut number = 0;
            while !stop.load(Ordering::SeqCst) {
                number += 1;
                put(&original, number);
                put(&copy, number);
                counted.store(number, Ordering::SeqCst);
            }
        });
        let come_on = || {
            let reached = counted.load(Ordering::SeqCst);
            while counted.load(Ordering::SeqCst) < reached + 2 {
                std::thread::yield_now();
            }
        };
        for _ in 0..10 {
            let round = MarkId::random();
            come_on();
            hosts[0].hold(round, LONG).unwrap();
            // Long enough that the copy would come on, were it not for the barrier.
            let waited = Instant::now();
            while waited.elapsed() < Duration::from_millis(5) {
                std::thread::yield_now();
            }
            hosts[1].hold(round, LONG).unwrap();
            hosts.iter().for_each(|host| assert!(host.release(round, Verdict::Group).in_time));
            rounds.push(round);
            // The same without a barrier: a mark of each.
            let first = hosts[0].marker.mark(Consistency::Crash, "", true).unwrap();
            come_on();
            let second = hosts[1].marker.mark(Consistency::Crash, "", true).unwrap();
            apart.push((first.id, second.id));
        }
    });
    let found = hosts.each_ref().map(|host| {
        host.marks().into_iter().map(|(mark, number)| (mark.id, (mark.group, number))).collect::<BTreeMap<_, _>>()
    });
    for round in rounds {
        let ((flagged, original), (also_flagged, copy)) = (found[0][&round], found[1][&round]);
        assert!(flagged && also_flagged, "both are of the group");
        assert!(copy <= original, "the copy {copy} is ahead of the original {original}");
        assert!(original <= copy + 1, "nothing was written between the holds");
    }
    let is_ahead = |(first, second): &(MarkId, MarkId)| found[1][second].1 > found[0][first].1;
    assert!(apart.iter().all(is_ahead), "marks without a barrier are not one instant, and this test would not notice");
}

/// Whoever decides is gone: writes go on by the host's own clock, and its mark is not one of the group.
#[test]
fn a_release_that_is_late_lets_writes_go_on_at_the_limit_without_the_flag() {
    let (late, good) = (TestHost::new(), TestHost::new());
    let limit = Duration::from_millis(200);
    let round = MarkId::random();
    good.hold(round, LONG).unwrap();
    late.hold(round, limit).unwrap();
    let began = Instant::now();
    put(&late.splitter(), 7);
    let waited = began.elapsed();
    assert!(waited > limit / 4, "it was not held: {waited:?}");
    assert!(waited < LONG / 2, "it was held past its limit: {waited:?}");
    let outcome = late.release(round, Verdict::Group);
    assert!(!outcome.in_time && outcome.expired && outcome.held >= limit, "{outcome:?}");
    assert_eq!(late.expired.load(Ordering::SeqCst), 1, "it is told once");
    assert!(good.release(round, Verdict::Group).in_time);
    let flags =
        |host: &TestHost| host.marks().iter().map(|(mark, _)| (mark.id == round, mark.group)).collect::<Vec<_>>();
    assert_eq!((flags(&late), flags(&good)), (vec![(true, false)], vec![(true, true)]));
    // It is forgotten once it was told.
    assert!(matches!(late.barriers.release(round, Verdict::Group), Err(HostError::NoBarrier { .. })));
}

#[test]
fn a_barrier_that_somebody_misses_leaves_a_plain_mark_or_none() {
    let host = TestHost::new();
    for (verdict, marks) in [(Verdict::Plain, 1), (Verdict::Nothing, 1), (Verdict::Group, 2)] {
        let round = MarkId::random();
        host.hold(round, LONG).unwrap();
        let outcome = host.release(round, verdict);
        assert!(outcome.in_time && !outcome.expired);
        assert_eq!(host.marks().len(), marks, "{verdict:?}");
        put(&host.splitter(), 1);
    }
    assert_eq!(host.marks().iter().map(|(mark, _)| mark.group).collect::<Vec<_>>(), [false, true]);
}

/// A write that does not end keeps the barrier from being held, and is itself let go on; so does a mark that takes long.
#[test]
fn what_cannot_be_held_within_the_limit_is_not_held_at_all() {
    let host = TestHost::new();
    let limit = Duration::from_millis(100);
    let stuck = host.disk.in_flight.admit(&[tidemark_base::Extent::new(1 << 19, 512)]).unwrap();
    assert!(matches!(host.hold(MarkId::random(), limit), Err(HostError::Busy { .. })));
    put(&host.splitter(), 1);
    host.disk.in_flight.finish(stuck, host.fixture.clock.wall_now());
    let held = MarkId::random();
    host.hold(held, LONG).unwrap();
    // Another barrier over the same machine waits for this one, and gives up.
    assert!(matches!(host.hold(MarkId::random(), limit), Err(HostError::Busy { .. })));
    host.release(held, Verdict::Nothing);
    host.disk.log.close().unwrap();
    assert!(matches!(host.hold(MarkId::random(), limit), Err(HostError::NotLogging { .. })));
    assert!(host.marks().is_empty());
    put(&host.splitter(), 2);
}

/// The position of a disk at a mark is the same as without a barrier: what was acknowledged before is in it.
#[test]
fn what_was_acknowledged_before_a_barrier_is_in_its_mark() {
    let host = TestHost::new();
    put(&host.splitter(), 9);
    let round = MarkId::random();
    host.hold(round, LONG).unwrap();
    let outcome = host.release(round, Verdict::Group);
    let (_, mark) = &outcome.marks[0];
    let positions: Vec<Position> =
        mark.as_ref().unwrap().as_ref().unwrap().positions.iter().map(|(_, position)| *position).collect();
    assert_eq!(positions, [host.disk.state().marked.unwrap()]);
    assert_eq!(host.marks()[0].1, 9);
    assert!(!host.marker.is_written_since(true), "it counts as a kept mark");
}
