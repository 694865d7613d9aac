//! All logs of a disk: positions across rotations, deletion, what is missing.

mod support;

use std::sync::Arc;
use support::memory::MemoryStorage;
use support::*;
use tidemark_base::{Epoch, Position};
use tidemark_hrl::{ActiveLog, Found, LogChain, LogError, PreparedLog};

/// Three closed logs and an active one, each with two records. Positions by sequence.
fn four_logs(memory: &MemoryStorage) -> (Arc<LogChain>, ActiveLog, Vec<Position>) {
    let storage = memory.storage();
    let chain = LogChain::open(storage.clone(), STEM, disk()).unwrap();
    let mut log = first_log(&storage);
    chain.add(log.reader());
    let mut positions = vec![log.position()];
    for number in 2..=5 {
        for seed in 0..2 {
            positions.push(append(&mut log, number, &[write(seed, 1, number * 10 + seed)]).unwrap());
        }
        if number < 5 {
            assert_eq!(chain.next_name(), name(number));
            let next =
                PreparedLog::create(storage.clone(), chain.next_name(), disk(), DISK_BYTES, time(number)).unwrap();
            let old = log.rotate(next, time(number)).unwrap();
            chain.add(log.reader());
            old.close(time(number)).unwrap();
        }
    }
    (chain, log, positions)
}

#[test]
fn reading_follows_rotations_and_waits_at_the_end() {
    let memory = MemoryStorage::new();
    let (chain, mut log, positions) = four_logs(&memory);
    let mut records = chain.records_after(&positions[3]).unwrap();
    for position in &positions[4..] {
        assert_eq!(records.next().unwrap().unwrap().record.sequence, position.sequence);
        assert_eq!(records.position(), *position);
    }
    assert!(records.next().unwrap().is_none());
    append(&mut log, 9, &[write(0, 1, 99)]).unwrap();
    let next = PreparedLog::create(memory.storage(), name(5), disk(), DISK_BYTES, time(9)).unwrap();
    let old = log.rotate(next, time(9)).unwrap();
    chain.add(log.reader());
    append(&mut log, 9, &[write(0, 1, 100)]).unwrap();
    let record = records.next().unwrap().unwrap();
    let mut data = vec![0; 512];
    record.read_data(&mut data).unwrap();
    assert_eq!(data, data_of(99, 1));
    assert_eq!(records.next().unwrap().unwrap().record.sequence.0, 10);
    assert!(records.next().unwrap().is_none());
    drop(old);
}

#[test]
fn only_what_lies_wholly_before_the_position_is_deleted() {
    let memory = MemoryStorage::new();
    let (chain, _log, positions) = four_logs(&memory);
    let before = chain.allocated_bytes().unwrap();
    // Sequences 3 and 4 lie in log 2; its end is the start of log 3.
    assert_eq!(chain.forget_before(&positions[3]).unwrap().logs, 1);
    assert_eq!(chain.find(&positions[1]).unwrap(), Found::Unknown);
    assert_eq!(chain.find(&positions[2]).unwrap(), Found::In(name(2)));
    let forgotten = chain.forget_before(&positions[4]).unwrap();
    assert_eq!(forgotten.logs, 1);
    assert!(forgotten.allocated_bytes > 0 && chain.allocated_bytes().unwrap() < before);
    assert_eq!(chain.find(&positions[4]).unwrap(), Found::In(name(3)));
    // All that is closed may go, the active log never.
    assert_eq!(chain.forget_before(&positions[8]).unwrap().logs, 1);
    assert_eq!(memory.content().into_keys().collect::<Vec<_>>(), [name(4).companion(), name(4).hrl()]);
    assert!(matches!(chain.forget_before(&Epoch([1; 16]).start()), Err(LogError::Unknown { .. })));
}

#[test]
fn a_position_of_another_history_is_unknown() {
    let memory = MemoryStorage::new();
    let (chain, log, positions) = four_logs(&memory);
    let ahead = Position { sequence: tidemark_base::Sequence(9), ..positions[8] };
    let shifted = Position { hash: positions[3].hash, ..positions[4] };
    for position in [ahead, shifted, Epoch([1; 16]).start()] {
        assert_eq!(chain.find(&position).unwrap(), Found::Unknown, "{position}");
    }
    // A new epoch follows in the same chain; reading the old one ends there.
    let old = log.close(time(9)).unwrap();
    let epoch = Epoch([2; 16]);
    let mut log =
        ActiveLog::create(memory.storage(), name(5), disk(), DISK_BYTES, epoch.start(), Some(old.id()), time(9))
            .unwrap();
    chain.add(log.reader());
    append(&mut log, 9, &[write(0, 1, 1)]).unwrap();
    assert_eq!(read_chain(chain.records_after(&positions[6]).unwrap()).unwrap().len(), 2);
    assert_eq!(read_chain(chain.records_after(&epoch.start()).unwrap()).unwrap().len(), 1);
}

#[test]
fn a_missing_log_is_an_error_and_not_a_gap() {
    for without_companion in [false, true] {
        let memory = MemoryStorage::new();
        let (_, log, positions) = four_logs(&memory);
        log.close(time(9)).unwrap();
        let mut content = memory.content();
        content.remove(&name(2).companion());
        if !without_companion {
            content.remove(&name(2).hrl());
        }
        let chain = LogChain::open(MemoryStorage::with(&content).storage(), STEM, disk()).unwrap();
        let mut records = chain.records_after(&positions[1]).unwrap();
        assert_eq!(records.next().unwrap().unwrap().record.sequence.0, 2);
        assert!(matches!(records.next().err(), Some(LogError::Damaged { .. })));
        assert_eq!(read_chain(chain.records_after(&positions[4]).unwrap()).unwrap().len(), 4);
    }
}

#[test]
fn logs_that_were_not_closed_are_refused() {
    let memory = MemoryStorage::new();
    let (_, _log, _) = four_logs(&memory);
    assert!(matches!(LogChain::open(memory.storage(), STEM, disk()).err(), Some(LogError::NotClosed { .. })));
}

#[test]
fn a_discarded_log_leaves_nothing() {
    let memory = MemoryStorage::new();
    let log = PreparedLog::create(memory.storage(), name(1), disk(), DISK_BYTES, time(0)).unwrap();
    let again = PreparedLog::create(memory.storage(), name(1), disk(), DISK_BYTES, time(0));
    assert!(matches!(again.err(), Some(LogError::Io { .. })));
    log.discard().unwrap();
    assert!(memory.content().is_empty());
}

#[test]
fn zeroes_longer_than_an_entry_can_say_take_several() {
    let (_folder, storage) = folder();
    let disk_bytes = 16 << 30;
    let mut log =
        ActiveLog::create(storage.clone(), name(1), disk(), disk_bytes, Epoch([9; 16]).start(), None, time(0)).unwrap();
    let steps = [write(1, 1, 1), Step::Zeroes { sector: 0, sectors: (10 << 30) / 512 }, write(2, 1, 2)];
    append(&mut log, 1, &steps).unwrap();
    let log = log.close(time(2)).unwrap();
    assert!(log.apparent_bytes() > 10 << 30);
    assert!(log.allocated_bytes().unwrap() < 1 << 20, "zeroes are holes");
    assert_eq!(read_all(&log).unwrap(), steps.iter().map(Seen::from).collect::<Vec<_>>());
    let file = storage.open(&name(1).hrl(), tidemark_base::storage::OpenMode::Read).unwrap();
    let file = tidemark_hrl::format::HrlFile::open(&file).unwrap();
    assert_eq!(file.header().total_entries, 2 + 3);
}
