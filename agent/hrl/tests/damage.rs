//! Single bit flips, hostile files and failing media.

mod support;

use support::memory::{Content, MemoryStorage};
use support::*;
use tidemark_hrl::format::{BlockHeader, DefectKind, Entry, Header, HrlFile};
use tidemark_hrl::{Append, Cause, DataHasher, Failure, LogError, LogReader, Verdict, recover};

fn small_log() -> (Content, Vec<Seen>, MemoryStorage) {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let steps = [
        write(3, 1, 1),
        Step::Mark { body: b"a mark".to_vec() },
        Step::Zeroes { sector: 9, sectors: 1 },
        write(5, 1, 2),
    ];
    append(&mut log, 1, &steps).unwrap();
    let open = memory.content();
    log.close(time(2)).unwrap();
    (open, steps.iter().map(Seen::from).collect(), memory)
}

/// Each bit of the file, flipped.
fn flips(content: &Content, file: &str, mut each: impl FnMut(&Content, usize)) {
    let mut content = content.clone();
    for bit in 0..content[file].len() * 8 {
        content.get_mut(file).unwrap()[bit / 8] ^= 1 << (bit % 8);
        each(&content, bit);
        content.get_mut(file).unwrap()[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn every_flipped_bit_of_a_closed_log_is_found_or_harmless() {
    let (_, expected, memory) = small_log();
    let content = memory.content();
    let mut found = 0;
    for file in [name(1).hrl(), name(1).companion()] {
        flips(&content, &file, |flipped, bit| {
            let storage = MemoryStorage::with(flipped).storage();
            match LogReader::open(storage, &name(1), disk()).and_then(|log| read_all(&log)) {
                Ok(seen) => assert_eq!(seen, expected, "bit {bit} of {file}"),
                Err(_) => found += 1,
            }
        });
    }
    // The header, the data and the records: all but unused room and what the companion makes up for.
    assert!(found > (4096 + 2 * 512 + 6 * 128) * 8, "{found}");
}

#[test]
fn every_flipped_bit_of_an_hrl_file_alone_is_found_or_harmless() {
    let (_, expected, memory) = small_log();
    let writes = |bytes: &Vec<u8>| -> Result<Vec<(u64, Vec<u8>)>, String> {
        let file = HrlFile::open(bytes).map_err(|defect| defect.to_string())?;
        if let Some(warning) = file.warnings().first() {
            return Err(warning.to_string());
        }
        let (mut writes, mut buffer) = (Vec::new(), vec![0; 4096]);
        file.for_each(
            |located| {
                match file.data_checksum(located, &mut buffer) {
                    Ok(Some(pair)) if pair.is_ok() => {}
                    other => return Err(format!("{other:?}")),
                }
                let at = located.data_offset as usize;
                writes.push((located.entry.byte_offset, bytes[at..at + located.entry.data_bytes as usize].to_vec()));
                Ok(())
            },
            |defect| Err(defect.to_string()),
        )?;
        Ok(writes)
    };
    let intact = writes(&memory.content()[&name(1).hrl()]).unwrap();
    assert_eq!(intact.len(), expected.len() - 1);
    flips(&memory.content(), &name(1).hrl(), |flipped, bit| {
        if let Ok(seen) = writes(&flipped[&name(1).hrl()]) {
            assert_eq!(seen, intact, "bit {bit}");
        }
    });
}

#[test]
fn every_flipped_bit_of_an_open_log_is_found_or_harmless() {
    let (open, expected, _) = small_log();
    for file in [name(1).hrl(), name(1).companion()] {
        flips(&open, &file, |flipped, bit| {
            let storage = MemoryStorage::with(flipped).storage();
            let verdict = recover(storage.clone(), STEM, disk(), Cause::ProcessKilled, time(9));
            match verdict {
                Ok(Verdict::Kept { end }) => {
                    assert_eq!(end.sequence.0 as usize, expected.len(), "bit {bit} of {file}");
                    let log = LogReader::open(storage, &name(1), disk()).unwrap();
                    assert_eq!(read_all(&log).unwrap(), expected, "bit {bit} of {file}");
                }
                Ok(Verdict::Damaged { .. } | Verdict::NeedsCompare { .. }) | Err(LogError::OtherDisk { .. }) => {}
                other => panic!("bit {bit} of {file}: {other:?}"),
            }
        });
    }
}

/// The writes of the `.hrl` file alone, as another program reads them; `None` when it finds damage.
fn writes_of(bytes: &Vec<u8>) -> Option<Vec<(u64, u64)>> {
    let file = HrlFile::open(bytes).ok().filter(|file| file.warnings().is_empty())?;
    let (mut writes, mut buffer) = (Vec::new(), vec![0; 4096]);
    file.for_each(
        |located| match file.data_checksum(located, &mut buffer) {
            Ok(Some(pair)) if pair.is_ok() => {
                writes.push((located.entry.byte_offset, located.data_offset));
                Ok(())
            }
            _ => Err(()),
        },
        |_| Err(()),
    )
    .ok()?;
    Some(writes)
}

/// A log of exactly 64 KiB: header, fourteen blocks of data, a metadata block.
#[test]
fn every_flipped_bit_of_a_log_of_64_kib_and_of_its_companion_is_found() {
    const HEADER_BITS: usize = 4096 * 8;
    const LOG_BITS: usize = (64 << 10) * 8;
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let steps: Vec<Step> = (0..14).map(|number| write(number * 64, 8, number)).collect();
    append(&mut log, 1, &steps[..9]).unwrap();
    append(&mut log, 2, &steps[9..]).unwrap();
    log.close(time(3)).unwrap();
    let content = memory.content();
    let expected: Vec<Seen> = steps.iter().map(Seen::from).collect();
    let intact = writes_of(&content[&name(1).hrl()]).unwrap();
    assert_eq!(content[&name(1).hrl()].len() * 8, LOG_BITS);
    let companion_bits = content[&name(1).companion()].len() * 8;
    assert_eq!(companion_bits, HEADER_BITS + 14 * 128 * 8, "a page of control slots, fourteen records");

    // Where data lies, the record's own check finds it, in a log that is open already.
    let data = HEADER_BITS..HEADER_BITS + 14 * 4096 * 8;
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (content, data) = (&content, data.clone());
            scope.spawn(move || {
                let memory = MemoryStorage::with(content);
                let log = LogReader::open(memory.storage(), &name(1), disk()).unwrap();
                let mut records = log.records();
                let records: Vec<_> = std::iter::from_fn(|| records.next().unwrap()).collect();
                let mut buffer = vec![0; 4096];
                for bit in data.skip(half).step_by(2) {
                    memory.flip(&name(1).hrl(), bit);
                    let number = (bit - HEADER_BITS) / (4096 * 8);
                    assert!(log.read_data(&records[number], &mut buffer).is_err(), "bit {bit} of the data");
                    memory.flip(&name(1).hrl(), bit);
                }
            });
        }
    });

    // Elsewhere it is found when the log is opened and read, or by whoever reads the `.hrl` file alone; or it lies in room
    // that nobody uses, and changes nothing.
    let (mut found, mut unused) = ([0, 0], [0, 0]);
    for (index, (file, bits)) in [(name(1).hrl(), LOG_BITS), (name(1).companion(), companion_bits)].iter().enumerate() {
        for bit in (0..*bits).filter(|bit| index == 1 || !data.contains(bit)) {
            memory.flip(file, bit);
            let seen = LogReader::open(memory.storage(), &name(1), disk()).and_then(|log| read_all(&log));
            let alone = if index == 0 { writes_of(&memory.content()[file]) } else { Some(intact.clone()) };
            match (seen, alone) {
                (Ok(seen), Some(alone)) => {
                    assert_eq!((seen, alone), (expected.clone(), intact.clone()), "bit {bit} of {file} is believed");
                    unused[index] += 1;
                    // Never in a record.
                    assert!(index == 0 || bit < HEADER_BITS, "bit {bit} of {file} is not found");
                }
                _ => found[index] += 1,
            }
            memory.flip(file, bit);
        }
    }
    // Each slot and all that the format gives a meaning. The rest is room between control slots and after the entries.
    assert!(found[0] >= (68 + 32 + 14 * 32) * 8, "{found:?} found, {unused:?} unused");
    assert!(found[1] >= (14 + 5) * 128 * 8, "{found:?} found, {unused:?} unused");
}

/// An `.hrl` file with these blocks, each with its distance back, entries and the data before it.
fn forge(blocks: &[(u64, Vec<Entry>, usize)]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    for (previous, entries, data_bytes) in blocks {
        bytes.resize(bytes.len() + data_bytes, 0x55);
        let mut block = BlockHeader { previous: *previous, entries: entries.len() as u32 }.encode().to_vec();
        entries.iter().for_each(|entry| block.extend(entry.encode()));
        block.resize(4096, 0);
        bytes.extend(block);
    }
    let mut header = Header::new(uuid::Uuid::from_u128(1), uuid::Uuid::nil(), time(0));
    header.eol_location = bytes.len() as u64;
    header.total_entries = blocks.iter().map(|block| block.1.len() as u64).sum();
    bytes[..4096].copy_from_slice(&header.encode());
    bytes
}

fn entry(data_bytes: u32) -> Entry {
    Entry { byte_offset: 0, data_bytes, time_seconds: 0, operation: 1, data_checksum: 0 }
}

fn defects(bytes: &Vec<u8>) -> Vec<String> {
    let file = match HrlFile::open(bytes) {
        Ok(file) => file,
        Err(defect) => return vec![defect.to_string()],
    };
    let mut defects: Vec<String> = file.warnings().iter().map(ToString::to_string).collect();
    file.for_each(
        |_| Ok::<(), ()>(()),
        |defect| {
            defects.push(defect.to_string());
            Ok(())
        },
    )
    .unwrap();
    defects
}

#[test]
fn an_empty_first_block_is_sound_as_hyper_v_makes_it() {
    assert_eq!(defects(&forge(&[(0, vec![], 0), (4096 + 1024, vec![entry(512), entry(512)], 1024)])), [""; 0]);
}

#[test]
fn hostile_blocks_are_refused_by_name() {
    let with_header = |change: fn(&mut Header)| {
        let mut bytes = forge(&[(0, vec![entry(512)], 512)]);
        let mut page = [0; 4096];
        page.copy_from_slice(&bytes[..4096]);
        let (mut header, _) = Header::decode(&page).unwrap();
        change(&mut header);
        bytes[..4096].copy_from_slice(&header.encode());
        bytes
    };
    for (bytes, expected) in [
        // Back links: to itself, into the block after, before the header, round the number range.
        (forge(&[(0, vec![], 0), (1, vec![], 0)]), "points 1 bytes back"),
        (forge(&[(0, vec![], 0), (4095, vec![], 0)]), "points 4095 bytes back"),
        (forge(&[(0, vec![], 0), (8192, vec![], 0)]), "points 8192 bytes back"),
        (forge(&[(0, vec![], 0), (u64::MAX, vec![], 0)]), "bytes back"),
        (forge(&[(0, vec![entry(1024)], 512)]), "runs past the set's end"),
        (forge(&[(0, vec![entry(u32::MAX - 511)], 512)]), "runs past the set's end"),
        (forge(&[(0, vec![entry(512)], 1024)]), "512 bytes of the set belong to no entry"),
        (forge(&[(0, vec![Entry { operation: 2, ..entry(512) }], 512)]), "operation 2"),
        (forge(&[(0, vec![entry(511)], 511)]), "whole sectors"),
        (forge(&[(0, vec![Entry { byte_offset: u64::MAX - 511, ..entry(512) }], 512)]), "whole sectors"),
        (with_header(|header| header.eol_location = 0), "not closed"),
        (with_header(|header| header.eol_location = u64::MAX), "cannot hold"),
        (with_header(|header| header.eol_location = 4097), "cannot hold"),
        (with_header(|header| header.eol_location -= 1), "metadata block's checksum"),
        (with_header(|header| header.metadata_bytes = 1 << 20), "cannot hold"),
        (with_header(|header| header.total_entries = u64::MAX), "the blocks hold 1"),
        (Vec::new(), "fewer than a header"),
        (vec![0; 4096], "cookie"),
    ] {
        let found = defects(&bytes);
        assert!(found.iter().any(|defect| defect.contains(expected)), "{expected}: {found:?}");
    }
    let mut bytes = forge(&[(0, vec![], 0)]);
    bytes[4096..4128].copy_from_slice(&BlockHeader { previous: 0, entries: u32::MAX }.encode());
    assert!(matches!(
        HrlFile::open(&bytes).err().unwrap().kind,
        DefectKind::BlockEntries { found: u32::MAX, max: 127 }
    ));
    bytes.extend([0; 100]);
    bytes[4096..4128].copy_from_slice(&BlockHeader { previous: 0, entries: 0 }.encode());
    assert!(defects(&bytes)[0].contains("100 bytes follow"));
}

#[test]
fn a_failed_write_latches_and_shows_nothing() {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let before = append(&mut log, 1, &[write(0, 1, 1)]).unwrap();
    for stop_at in [1, 2] {
        let memory = MemoryStorage::new();
        let mut log = first_log(&memory.storage());
        assert_eq!(append(&mut log, 1, &[write(0, 1, 1)]).unwrap(), before);
        memory.stop_at(stop_at);
        assert!(matches!(append(&mut log, 2, &[write(8, 64, 2), write(0, 1, 3)]), Err(LogError::Io { .. })));
        memory.go_on();
        assert_eq!((log.position(), log.reader().end()), (before, before));
        assert_eq!(read_all(&log.reader()).unwrap(), [Seen::from(&write(0, 1, 1))]);
        let latched = |result| matches!(result, Err(LogError::Latched { failure: Failure::Write, .. }));
        assert!(latched(append(&mut log, 3, &[write(0, 1, 4)])));
        assert!(latched(log.sync()));
        assert!(latched(log.close(time(4)).map(|log| log.end())));
        // Opened again by recovery, it holds what was appended before.
        let verdict = recover(memory.storage(), STEM, disk(), Cause::ProcessKilled, time(5)).unwrap();
        assert!(matches!(verdict, Verdict::Kept { end } if end == before), "{verdict:?}");
    }
}

#[test]
fn a_failed_sync_latches_and_is_not_repeated() {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let syncer = log.syncer();
    append(&mut log, 1, &[write(0, 1, 1)]).unwrap();
    let durable = syncer.sync().unwrap();
    append(&mut log, 2, &[write(1, 1, 1)]).unwrap();
    memory.fail_syncs(true);
    assert!(matches!(syncer.sync(), Err(LogError::Io { .. })));
    memory.fail_syncs(false);
    assert!(matches!(syncer.sync(), Err(LogError::Latched { failure: Failure::Sync, .. })));
    assert!(matches!(append(&mut log, 3, &[]), Err(LogError::Latched { failure: Failure::Sync, .. })));
    assert_eq!(syncer.durable(), Some(durable));
}

#[test]
fn what_cannot_be_logged_is_refused_and_latches_nothing() {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let hasher = DataHasher::new(disk());
    let long = vec![0; tidemark_hrl::MARK_BODY_BYTES_MAX + 1];
    let data = [0; 1024];
    for refused in [
        Append::Write { offset: 1, data: &data, hash: hasher.hash(&data) },
        Append::Write { offset: 0, data: &data[..100], hash: hasher.hash(&data[..100]) },
        Append::Write { offset: 0, data: &[], hash: hasher.hash(&[]) },
        Append::Write { offset: DISK_BYTES - 512, data: &data, hash: hasher.hash(&data) },
        Append::Zeroes { extent: tidemark_base::Extent::new(u64::MAX - 511, 512) },
        Append::Mark { body: &long },
    ] {
        let whole = Append::Mark { body: b"part of the same batch" };
        assert!(matches!(log.append(time(1), &[whole, refused]), Err(LogError::Record { .. })), "{refused:?}");
    }
    assert_eq!(log.position().sequence.0, 0);
    log.append(time(1), &[Append::Mark { body: &long[..tidemark_hrl::MARK_BODY_BYTES_MAX] }]).unwrap();
    assert_eq!(read_all(&log.reader()).unwrap().len(), 1);
}

/// A hash that is not of the data is as good as damaged data: it is found when the record is read.
#[test]
fn data_under_a_wrong_hash_does_not_verify() {
    let memory = MemoryStorage::new();
    let mut log = first_log(&memory.storage());
    let hash = DataHasher::new(tidemark_base::DiskId::from_bytes([8; 16])).hash(&[1; 512]);
    log.append(time(1), &[Append::Write { offset: 0, data: &[1; 512], hash }]).unwrap();
    assert!(matches!(read_all(&log.reader()), Err(LogError::Damaged { offset: 4096, .. })));
}
