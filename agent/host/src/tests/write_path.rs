use std::io;
use std::sync::Arc;

use tidemark_base::disk::Durability;
use tidemark_base::error::shut_down;
use tidemark_base::{Extent, Sequence};
use tidemark_nbd::{Export, WriteRequest};

use super::{Fixture, Random, data_refs, records_after, replay, write};
use crate::attach::{Decision, Why};
use crate::capture::splitter::Splitter;
use crate::source::{Located, RECORD_BYTES_MAX, ReadDataError, ScanReason, ScanRevision, Source};

const DISK_BYTES: u64 = 1 << 20;

#[test]
fn many_writers_over_each_other_leave_one_order() {
    let fixture = Fixture::new(DISK_BYTES);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::First));
    let disk = attached.disk;
    let start = disk.state().logged;
    assert_eq!(start, start.epoch.start());
    let splitter = Arc::new(Splitter::new(disk.clone()).unwrap());
    let writers: Vec<_> = (1..=4u64)
        .map(|seed| {
            let splitter = splitter.clone();
            std::thread::spawn(move || {
                let mut random = Random(seed);
                for round in 0..120u64 {
                    // Batches whose writes overlap each other and those of the other writers.
                    let data: Vec<Vec<u8>> = (0..8)
                        .map(|_| vec![(1 + random.below(255)) as u8; 512 * (1 + random.below(24)) as usize])
                        .collect();
                    let writes: Vec<WriteRequest<'_>> = data
                        .iter()
                        .map(|data| WriteRequest {
                            offset: 512 * random.below(DISK_BYTES / 512 / 4 - 24),
                            data,
                            fua: random.below(50) == 0,
                        })
                        .collect();
                    let mut results: Vec<_> = writes.iter().map(|_| Err(io::ErrorKind::Other.into())).collect();
                    splitter.write_batch(&writes, &mut results);
                    assert!(results.iter().all(Result::is_ok));
                    if round % 10 == 0 {
                        let extent = Extent::new(512 * random.below(256), 512 * (1 + random.below(100)));
                        splitter.zero(extent, round % 20 == 0, Durability::Cached).unwrap();
                    }
                }
            })
        })
        .collect();
    // The keeper rotates meanwhile, and a reader that began early follows through all logs.
    let mut early = disk.read_after(&start).unwrap();
    let mut seen = Vec::new();
    while writers.iter().any(|writer| !writer.is_finished()) {
        disk.tick();
        early.read(Sequence(u64::MAX), 1000, &mut seen).unwrap();
    }
    for writer in writers {
        writer.join().unwrap();
    }
    early.read(Sequence(u64::MAX), usize::MAX, &mut seen).unwrap();

    let records = records_after(&disk, &start);
    assert_eq!(records, seen);
    assert_eq!(records.len() as u64, disk.state().logged.sequence.0);
    let mut image = vec![0; DISK_BYTES as usize];
    replay(&disk, &records, &mut image);
    assert!(image == fixture.content(), "the log does not replay to the disk");
    let logs = data_refs(&records).iter().map(|data| data.log).collect::<std::collections::BTreeSet<_>>();
    assert!(logs.len() > 1, "rotated at least once");

    // Each position of the history is found again, and no other.
    for record in [&records[0], &records[records.len() / 2], &records[records.len() - 1]] {
        let mut position = start;
        (position.sequence, position.hash) = (record.sequence, record.hash);
        assert_eq!(disk.locate(&position).unwrap(), Located::Here);
        position.hash.0[0] ^= 1;
        assert_eq!(disk.locate(&position).unwrap(), Located::Differs);
    }
    // What every consumer passed is removed, with the logs that held it.
    fixture.settle(&disk);
    disk.tick();
    assert_eq!(disk.locate(&start).unwrap(), Located::Gone);
    let mut buffer = vec![0; data_refs(&records)[0].length as usize];
    // A file that was read just now may still be open.
    assert!(matches!(disk.read_data(&data_refs(&records)[..1], &mut buffer), Err(ReadDataError::Gone) | Ok(())));
}

#[test]
fn a_long_write_becomes_records_of_a_bounded_size() {
    let fixture = Fixture::new(2 << 20);
    let disk = fixture.attach().disk;
    let start = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    let data: Vec<u8> = (0..(1u32 << 20) + 512).map(|number| (number / 512) as u8).collect();
    write(&splitter, 512, &data).unwrap();
    let records = records_after(&disk, &start);
    assert_eq!(records.len(), 5);
    let refs = data_refs(&records);
    assert!(refs.iter().all(|data| u64::from(data.length) <= RECORD_BYTES_MAX));
    // Neighbours in the log are read together.
    let mut buffer = vec![0; data.len()];
    disk.read_data(&refs, &mut buffer).unwrap();
    assert!(buffer == data);
    assert_eq!(disk.pending_bytes(Some(&start)), data.len() as u64);
    assert_eq!(disk.pending_bytes(Some(&disk.state().logged)), 0);
}

#[test]
fn a_damaged_log_is_noticed_when_it_is_read() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let start = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    for block in 0..4 {
        write(&splitter, block * 4096, &[block as u8 + 1; 4096]).unwrap();
    }
    let refs = data_refs(&records_after(&disk, &start));
    let log = fixture.folder.path().join("disk.img.00000001.hrl");
    let file = std::fs::OpenOptions::new().write(true).open(log).unwrap();
    super::write_all_at(&file, &[9], refs[2].offset + 7).unwrap();
    let mut buffer = vec![0; 4 * 4096];
    let error = disk.read_data(&refs, &mut buffer).unwrap_err();
    assert!(matches!(error, ReadDataError::Damaged { indices } if indices == [2]));
    assert!(buffer[..4096].iter().all(|byte| *byte == 1) && buffer[3 * 4096..].iter().all(|byte| *byte == 4));
}

#[test]
fn a_failed_write_is_scanned_and_not_logged() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let before = disk.state();
    disk.write_failed(Extent::new(65536, 4096), &io::Error::other("the medium failed"));
    let pending = disk.pending_scan(fixture.server, before.scan_revision).unwrap();
    assert_eq!(pending.reason, Some(ScanReason::Dirty));
    assert_eq!(pending.extents.iter().collect::<Vec<_>>(), [Extent::new(65536, 65536)]);
    assert!(disk.state().scan_revision > before.scan_revision);
    assert_eq!(disk.state().logged, before.logged);
    // Durable at once: a crash now finds it again.
    drop(disk);
    let disk = fixture.attach().disk;
    assert_eq!(disk.pending_scan(fixture.server, ScanRevision(0)).unwrap().extents.len(), 1);
}

/// What one consumer cannot store is in memory for it, and the others are told all the same.
#[test]
fn a_failed_write_is_scanned_for_each_consumer_whatever_fails_for_another() {
    for is_first_broken in [true, false] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let other = tidemark_base::ServerId::random();
        fixture.others.push(other);
        let disk = fixture.attach_in_sync();
        fixture.settle_for(&disk, other);
        let broken = if is_first_broken { fixture.server } else { other };
        let nowhere = tidemark_base::storage::RealStorage::open_folder("/nonexistent");
        disk.consumer(broken).unwrap().set_storage(nowhere);
        disk.write_failed(Extent::new(65536, 4096), &io::Error::other("the medium failed"));
        for server in [fixture.server, other] {
            let pending = disk.pending_scan(server, ScanRevision(0)).unwrap().extents;
            assert_eq!(pending.iter().collect::<Vec<_>>(), [Extent::new(65536, 65536)], "{is_first_broken}");
        }
    }
}

#[test]
fn a_detached_disk_takes_no_writes() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 512]).unwrap();
    disk.detach().unwrap();
    assert_eq!(write(&splitter, 0, &[2; 512]).unwrap_err().raw_os_error(), shut_down().raw_os_error());
    assert!(disk.state().closed);
    assert_eq!(fixture.content()[0], 1);
}
