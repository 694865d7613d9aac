//! Logs that were not closed: cut off anywhere, stopped at every operation, after a loss of power, damaged.

mod support;

use std::sync::Arc;

use support::memory::{Content, MemoryStorage};
use support::*;
use tidemark_base::random::Random;
use tidemark_base::storage::Storage;
use tidemark_base::{Extent, Position};
use tidemark_hrl::{ActiveLog, Append, Cause, Examination, Held, LogChain, LogError, PreparedLog, Verdict, recover};

fn mark(length: usize) -> Step {
    Step::Mark { body: (0..length).map(|index| index as u8).collect() }
}

fn judge(content: &Content, cause: Cause) -> (MemoryStorage, Verdict) {
    let memory = MemoryStorage::with(content);
    let verdict = recover(memory.storage(), STEM, disk(), cause, time(50)).unwrap();
    (memory, verdict)
}

/// Everything in the closed logs, from the first on.
fn read_closed(storage: Arc<dyn Storage>) -> Vec<Seen> {
    let chain = LogChain::open(storage.clone(), STEM, disk()).unwrap();
    let start = tidemark_base::Epoch([9; 16]).start();
    if chain.is_empty() { Vec::new() } else { read_chain(chain.records_after(&start).unwrap()).unwrap() }
}

fn seen(steps: &[Step]) -> Vec<Seen> {
    steps.iter().map(Seen::from).collect()
}

#[test]
fn a_companion_cut_at_any_byte_keeps_its_whole_records() {
    let steps =
        [write(0, 8, 1), mark(200), Step::Zeroes { sector: 64, sectors: 100 }, write(8, 1, 2), mark(0), write(0, 2, 3)];
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let mut ends = Vec::new();
    for step in &steps {
        append(&mut log, 1, std::slice::from_ref(step)).unwrap();
        ends.push(memory.content()[&name(1).companion()].len());
    }
    let content = memory.content();
    for length in 4096..=content[&name(1).companion()].len() {
        let mut cut = content.clone();
        cut.get_mut(&name(1).companion()).unwrap().truncate(length);
        let (memory, verdict) = judge(&cut, Cause::ProcessKilled);
        let whole = ends.iter().filter(|&&end| end <= length).count();
        let Verdict::Kept { end } = verdict else { panic!("at {length}: {verdict:?}") };
        assert_eq!(end.sequence.0, whole as u64, "at {length}");
        assert_eq!(read_closed(memory.storage()), seen(&steps[..whole]), "at {length}");
        let (writes, defects) = read_hrl(memory.content()[&name(1).hrl()].clone());
        assert_eq!(defects, Vec::<String>::new());
        assert_eq!(writes.len(), steps[..whole].iter().filter(|step| !matches!(step, Step::Mark { .. })).count());
        // What is closed is not judged again.
        let again = recover(memory.storage(), STEM, disk(), Cause::PowerLoss, time(60)).unwrap();
        assert!(matches!(again, Verdict::NothingOpen), "{again:?}");
    }
}

/// Runs a script until the storage stops; returns what was appended and synced for certain.
struct Run {
    memory: MemoryStorage,
    steps: Vec<Step>,
    /// What callers were told that it is logged, and durable.
    appended: usize,
    durable: usize,
}

fn script() -> Vec<Vec<Step>> {
    let mut batches = vec![
        vec![write(0, 8, 1), write(8, 3, 2)],
        vec![mark(300), Step::Zeroes { sector: 0, sectors: 2000 }],
        // Fills two sets.
        (0..260).map(|number| write(number, 1, number)).collect(),
        vec![Step::Zeroes { sector: 5, sectors: 1 }],
        vec![write(1, 1, 5), mark(10)],
        vec![write(7, 1, 6)],
    ];
    batches.push((0..130).map(|number| write(number, 1, number + 500)).collect());
    batches
}

/// One batch after another; syncs, rotations and closes in between.
fn run(stop_at: Option<u64>) -> Run {
    let memory = MemoryStorage::new();
    let mut run = Run { memory: memory.clone(), steps: script().concat(), appended: 0, durable: 0 };
    if let Some(stop_at) = stop_at {
        memory.stop_at(stop_at);
    }
    let _ = run_until_stop(&mut run);
    run
}

fn run_until_stop(run: &mut Run) -> tidemark_hrl::Result<()> {
    let storage = run.memory.storage();
    let epoch = tidemark_base::Epoch([9; 16]);
    let mut log = ActiveLog::create(storage.clone(), name(1), disk(), DISK_BYTES, epoch.start(), None, time(0))?;
    for (index, batch) in script().iter().enumerate() {
        run.appended = append(&mut log, index as u64, batch)?.sequence.0 as usize;
        match index {
            0 | 4 => run.durable = log.sync()?.sequence.0 as usize,
            2 => {
                let next = PreparedLog::create(storage.clone(), name(2), disk(), DISK_BYTES, time(9))?;
                let old = log.rotate(next, time(9))?;
                run.durable = run.durable.max(old.close(time(9))?.end().sequence.0 as usize);
            }
            // The old log stays unclosed; a sync of the new one must cover it.
            5 => {
                let next = PreparedLog::create(storage.clone(), name(3), disk(), DISK_BYTES, time(9))?;
                let _old = log.rotate(next, time(9))?;
            }
            _ => {}
        }
    }
    run.durable = log.sync()?.sequence.0 as usize;
    Ok(())
}

fn operations_of_a_run() -> u64 {
    (1..).find(|&stop_at| !run(Some(stop_at)).memory.has_stopped()).unwrap()
}

fn end_of(verdict: &Verdict, storage: &Arc<dyn Storage>) -> Option<Position> {
    match verdict {
        Verdict::Kept { end } | Verdict::Cut { end, .. } => Some(*end),
        Verdict::NothingOpen => LogChain::open(storage.clone(), STEM, disk()).unwrap().last().map(|(_, end)| end),
        Verdict::Damaged { .. } | Verdict::NeedsCompare { .. } => panic!("{verdict:?}"),
    }
}

#[test]
fn a_process_killed_at_any_operation_loses_nothing_that_was_logged() {
    for stop_at in 1..operations_of_a_run() {
        let run = run(Some(stop_at));
        let (memory, verdict) = judge(&run.memory.content(), Cause::ProcessKilled);
        let end = end_of(&verdict, &memory.storage()).map_or(0, |end| end.sequence.0 as usize);
        assert!(end >= run.appended, "stopped at {stop_at}: {end} of {} records, {verdict:?}", run.appended);
        assert_eq!(read_closed(memory.storage()), seen(&run.steps[..end]), "stopped at {stop_at}");
    }
}

#[test]
fn a_power_loss_at_any_operation_keeps_what_was_synced() {
    for stop_at in 1..=operations_of_a_run() {
        let run = run(Some(stop_at));
        for seed in 0..12 {
            let content = run.memory.content_after_power_loss(seed * 1000 + stop_at);
            let (memory, verdict) = judge(&content, Cause::PowerLoss);
            let end = end_of(&verdict, &memory.storage()).map_or(0, |end| end.sequence.0 as usize);
            assert!(end >= run.durable, "stopped at {stop_at}, seed {seed}: {end} of {}, {verdict:?}", run.durable);
            assert_eq!(read_closed(memory.storage()), seen(&run.steps[..end]), "stopped at {stop_at}, seed {seed}");
        }
    }
}

#[test]
fn a_recovery_that_is_stopped_itself_is_repeated() {
    let mut random = Random::new(5);
    for stop_at in (1..operations_of_a_run()).step_by(3) {
        let run = run(Some(stop_at));
        let after_kill = (Cause::ProcessKilled, run.memory.content(), run.appended);
        let after_loss = (Cause::PowerLoss, run.memory.content_after_power_loss(stop_at), run.durable);
        for (cause, content, certain) in [after_kill, after_loss] {
            let memory = MemoryStorage::with(&content);
            let expected = end_of(&judge(&content, cause).1, &judge(&content, cause).0.storage());
            memory.stop_at(1 + random.draw() % 12);
            let _ = recover(memory.storage(), STEM, disk(), cause, time(50));
            // A power loss in the middle of a recovery from a killed process would be a power loss to both.
            let again = match cause {
                Cause::ProcessKilled => memory.content(),
                Cause::PowerLoss => memory.content_after_power_loss(random.draw()),
            };
            let (memory, verdict) = judge(&again, cause);
            let end = end_of(&verdict, &memory.storage());
            assert_eq!(end, expected, "{cause:?}, stopped at {stop_at}");
            let end = end.map_or(0, |end| end.sequence.0 as usize);
            assert!(end >= certain);
            assert_eq!(read_closed(memory.storage()), seen(&run.steps[..end]), "{cause:?}, stopped at {stop_at}");
        }
    }
}

#[test]
fn lost_marks_are_reported() {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    append(&mut log, 1, &[write(0, 1, 1), mark(5)]).unwrap();
    let durable = log.sync().unwrap();
    append(&mut log, 2, &[write(0, 1, 2), mark(7), write(0, 1, 3)]).unwrap();
    let (_, verdict) = judge(&memory.content(), Cause::PowerLoss);
    let Verdict::Cut { end, discarded_records, lost_marks } = verdict else { panic!("{verdict:?}") };
    assert_eq!((end, discarded_records), (durable, 3));
    assert_eq!(lost_marks.len(), 1);
    assert_eq!((lost_marks[0].sequence.0, lost_marks[0].body.len()), (4, 7));
}

/// A log with three durable records and one that is not; the first lies at byte 4096 of both files.
fn four_records() -> (Content, usize) {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    append(&mut log, 1, &[write(0, 1, 1), write(8, 1, 2), write(16, 1, 3)]).unwrap();
    log.sync().unwrap();
    append(&mut log, 2, &[write(24, 1, 4)]).unwrap();
    let content = memory.content();
    let length = content[&name(1).companion()].len();
    (content, length)
}

#[test]
fn damaged_data_names_the_ranges_to_compare() {
    for cause in [Cause::ProcessKilled, Cause::PowerLoss] {
        let (mut content, _) = four_records();
        content.get_mut(&name(1).hrl()).unwrap()[4096 + 512 + 3] ^= 1;
        let (memory, verdict) = judge(&content, cause);
        let Verdict::Damaged { from, held: Held::Extents(extents), offset, .. } = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!((from.0, offset), (2, 4096 + 512));
        let expected: Vec<Extent> = [8u64, 16, 24].map(|sector| Extent::new(sector * 512, 512)).to_vec();
        assert_eq!(extents.iter().collect::<Vec<_>>(), expected);
        // The log is out of the way, and there to be looked at.
        assert!(memory.content().contains_key(&format!("{}.damaged", name(1).hrl())));
        assert!(matches!(judge(&memory.content(), cause).1, Verdict::NothingOpen));
    }
}

#[test]
fn a_damaged_slot_among_durable_ones_means_that_nothing_is_known() {
    for cause in [Cause::ProcessKilled, Cause::PowerLoss] {
        let (mut content, _) = four_records();
        content.get_mut(&name(1).companion()).unwrap()[4096 + 128 + 30] ^= 1;
        let verdict = judge(&content, cause).1;
        assert!(matches!(&verdict, Verdict::Damaged { from, held: Held::Unknown, .. } if from.0 == 2), "{verdict:?}");
    }
}

#[test]
fn a_durable_record_that_is_missing_is_damage_and_no_torn_tail() {
    for cause in [Cause::ProcessKilled, Cause::PowerLoss] {
        let (mut content, length) = four_records();
        content.get_mut(&name(1).companion()).unwrap().truncate(length - 128 - 5);
        let verdict = judge(&content, cause).1;
        assert!(matches!(verdict, Verdict::Damaged { .. }), "{verdict:?}");
    }
}

#[test]
fn zeroes_where_a_record_was_are_damage_unless_the_power_failed() {
    let (mut content, length) = four_records();
    content.get_mut(&name(1).companion()).unwrap()[length - 128..].fill(0);
    assert!(matches!(judge(&content, Cause::ProcessKilled).1, Verdict::Damaged { .. }));
    let verdict = judge(&content, Cause::PowerLoss).1;
    assert!(matches!(verdict, Verdict::Cut { end, .. } if end.sequence.0 == 3), "{verdict:?}");
}

#[test]
fn without_a_companion_only_a_compare_helps() {
    let (content, _) = four_records();
    for missing in [name(1).companion(), name(1).hrl()] {
        let mut content = content.clone();
        content.remove(&missing);
        assert!(matches!(judge(&content, Cause::ProcessKilled).1, Verdict::NeedsCompare { .. }), "without {missing}");
    }
    let mut content = content.clone();
    content.get_mut(&name(1).companion()).unwrap()[1024 + 20] ^= 4;
    assert!(matches!(judge(&content, Cause::PowerLoss).1, Verdict::NeedsCompare { .. }));
}

#[test]
fn nothing_changes_before_the_verdict_is_accepted() {
    let (mut content, length) = four_records();
    content.get_mut(&name(1).companion()).unwrap().truncate(length - 1);
    let memory = MemoryStorage::with(&content);
    let examination = Examination::examine(memory.storage(), STEM, disk(), Cause::ProcessKilled).unwrap();
    assert!(matches!(examination.verdict(), Verdict::Kept { .. }));
    assert_eq!(memory.content(), content);
}

#[test]
fn a_log_of_another_disk_is_refused() {
    let (content, _) = four_records();
    let other = tidemark_base::DiskId::from_bytes([8; 16]);
    let result = recover(MemoryStorage::with(&content).storage(), STEM, other, Cause::ProcessKilled, time(0));
    assert!(matches!(result, Err(LogError::OtherDisk { .. })));
}

/// A guest wrote what looks like a metadata block and like slots of a companion: both are only data.
#[test]
fn look_alikes_in_the_data_are_data() {
    let (content, _) = four_records();
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let forged = tidemark_hrl::format::BlockHeader { previous: 0, entries: 1 }.encode();
    let mut data = content[&name(1).companion()][4096..4096 + 512].to_vec();
    data[..32].copy_from_slice(&forged);
    let hash = tidemark_hrl::DataHasher::new(disk()).hash(&data);
    log.append(time(1), &[tidemark_hrl::Append::Write { offset: 0, data: &data, hash }]).unwrap();
    let (memory, verdict) = judge(&memory.content(), Cause::ProcessKilled);
    assert!(matches!(verdict, Verdict::Kept { end } if end.sequence.0 == 1), "{verdict:?}");
    assert_eq!(read_closed(memory.storage()), [Seen::Write { offset: 0, data }]);
}

#[test]
fn metadata_blocks_of_a_recovered_log_are_made_from_the_companion() {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let steps: Vec<Step> = (0..200).map(|number| write(number, 1, number)).collect();
    append(&mut log, 1, &steps).unwrap();
    let mut content = memory.content();
    let block_at = 4096 + 127 * 512;
    content.get_mut(&name(1).hrl()).unwrap()[block_at..block_at + 4096].fill(0xaa);
    let (memory, verdict) = judge(&content, Cause::ProcessKilled);
    assert!(matches!(verdict, Verdict::Kept { .. }), "{verdict:?}");
    let (writes, defects) = read_hrl(memory.content()[&name(1).hrl()].clone());
    assert_eq!((writes.len(), defects), (200, Vec::new()));
}

/// A guest keeps whole logs on its own disk, those of this very disk: `.hrl` files and companions, byte for byte, where
/// ours would have its metadata blocks. Wherever a crash cuts ours, what is kept are writes of the guest in their order.
#[test]
fn a_guest_that_writes_whole_logs_fools_nobody() {
    let other = MemoryStorage::new();
    let mut log = first_log(&other.storage());
    append(&mut log, 1, &(0..127).map(|number| write(number, 1, number)).collect::<Vec<_>>()).unwrap();
    append(&mut log, 2, &[mark(300)]).unwrap();
    log.close(time(3)).unwrap();
    let files = other.content();
    let look_alikes = [&files[&name(1).hrl()][..], &files[&name(1).companion()][..]];

    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let hasher = tidemark_hrl::DataHasher::new(disk());
    // Whole sets, so that look-alikes stand before, at and behind the places of real blocks.
    let pieces: Vec<(u64, &[u8])> = (0..3u64)
        .flat_map(|round| look_alikes.map(|file| (round, file)))
        .flat_map(|(round, file)| {
            file.chunks(512).enumerate().map(move |(at, piece)| (round * 4096 + at as u64, piece))
        })
        .map(|(sector, piece)| (sector * 512, piece))
        .collect();
    let mut durable = 0;
    for (number, batch) in pieces.chunks(40).enumerate() {
        let batch: Vec<Append<'_>> =
            batch.iter().map(|&(offset, data)| Append::Write { offset, data, hash: hasher.hash(data) }).collect();
        log.append(time(10 + number as u64), &batch).unwrap();
        if number == 8 {
            log.sync().unwrap();
            durable = (number + 1) * 40;
        }
    }
    drop(log);
    let expected: Vec<Seen> =
        pieces.iter().map(|&(offset, data)| Seen::Write { offset, data: data.to_vec() }).collect();
    assert!(expected.len() > 3 * 127 && durable > 127);

    let open = memory.content();
    let lengths = [open[&name(1).hrl()].len(), open[&name(1).companion()].len()];
    let mut kept_by_kill = 0;
    // Cut the companion after each of many records and within them; the data stays, ends with it, or is all look-alikes.
    for cut in (0..=24).map(|part| 4096 + (lengths[1] - 4096) * part / 24) {
        for data_cut in [lengths[0], lengths[0] * 2 / 3] {
            let mut content = open.clone();
            content.get_mut(&name(1).companion()).unwrap().truncate(cut);
            content.get_mut(&name(1).hrl()).unwrap().truncate(data_cut);
            for cause in [Cause::ProcessKilled, Cause::PowerLoss] {
                let (memory, verdict) = judge(&content, cause);
                match verdict {
                    Verdict::Kept { end } | Verdict::Cut { end, .. } => {
                        let seen = read_closed(memory.storage());
                        assert_eq!(seen.len() as u64, end.sequence.0);
                        assert!(
                            seen[..] == expected[..seen.len()],
                            "cut at {cut}, {data_cut} bytes of data, {cause:?}"
                        );
                        assert!(seen.len() >= durable, "durable records were lost at {cut}");
                        if cause == Cause::ProcessKilled {
                            kept_by_kill += 1;
                        }
                        // What other programs then read in it is what was logged.
                        let (writes, defects) = read_hrl(memory.content()[&name(1).hrl()].clone());
                        assert_eq!((writes.len(), defects), (seen.len(), Vec::new()));
                    }
                    Verdict::Damaged { from, .. } => assert!(from.0 > 1 || cut < lengths[1] || data_cut < lengths[0]),
                    other => panic!("cut at {cut}: {other:?}"),
                }
            }
        }
    }
    assert!(kept_by_kill >= 8, "{kept_by_kill}");
}
