//! What the tests of this crate share. Data is made from a number, so that a record's data can be made again.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod memory;

use std::sync::Arc;

use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{DiskId, Epoch, Extent, Position, Timestamp};
use tidemark_hrl::format::HrlFile;
use tidemark_hrl::{ActiveLog, Append, ChainRecords, DataHasher, LogName, LogReader, RecordKind};

pub const DISK_BYTES: u64 = 64 << 20;
pub const STEM: &str = "disk.img";

pub fn disk() -> DiskId {
    DiskId::from_bytes([7; 16])
}

pub fn time(number: u64) -> Timestamp {
    Timestamp(1_763_000_000_000_000_000 + number * 250_000_000)
}

pub fn folder() -> (tempfile::TempDir, Arc<dyn Storage>) {
    let folder = tempfile::tempdir().unwrap();
    let storage = RealStorage::open_folder(folder.path());
    (folder, storage)
}

pub fn name(number: u64) -> LogName {
    LogName::new(STEM, number)
}

/// What is appended, as a test says it.
#[derive(Clone, PartialEq, Debug)]
pub enum Step {
    Write { sector: u64, sectors: u64, seed: u64 },
    Zeroes { sector: u64, sectors: u64 },
    Mark { body: Vec<u8> },
}

pub fn write(sector: u64, sectors: u64, seed: u64) -> Step {
    Step::Write { sector, sectors, seed }
}

pub fn data_of(seed: u64, sectors: u64) -> Vec<u8> {
    let mut data = vec![0; sectors as usize * 512];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut data);
    data
}

pub fn new_log(storage: &Arc<dyn Storage>, number: u64, start: Position, previous: Option<uuid::Uuid>) -> ActiveLog {
    ActiveLog::create(storage.clone(), name(number), disk(), DISK_BYTES, start, previous, time(0)).unwrap()
}

pub fn first_log(storage: &Arc<dyn Storage>) -> ActiveLog {
    new_log(storage, 1, Epoch([9; 16]).start(), None)
}

/// Appends the steps as one batch.
pub fn append(log: &mut ActiveLog, number: u64, steps: &[Step]) -> tidemark_hrl::Result<Position> {
    let hasher = DataHasher::new(disk());
    let data: Vec<Vec<u8>> = steps
        .iter()
        .map(|step| match step {
            Step::Write { sectors, seed, .. } => data_of(*seed, *sectors),
            _ => Vec::new(),
        })
        .collect();
    let batch: Vec<Append<'_>> = steps
        .iter()
        .zip(&data)
        .map(|(step, data)| match step {
            Step::Write { sector, .. } => Append::Write { offset: sector * 512, data, hash: hasher.hash(data) },
            Step::Zeroes { sector, sectors } => Append::Zeroes { extent: Extent::new(sector * 512, sectors * 512) },
            Step::Mark { body } => Append::Mark { body },
        })
        .collect();
    log.append(time(number), &batch)
}

/// A record with its data, to be compared with what was appended.
#[derive(Clone, PartialEq, Debug)]
pub enum Seen {
    Write { offset: u64, data: Vec<u8> },
    Zeroes { extent: Extent },
    Mark { body: Vec<u8> },
}

impl From<&Step> for Seen {
    fn from(step: &Step) -> Self {
        match step {
            Step::Write { sector, sectors, seed } => {
                Seen::Write { offset: sector * 512, data: data_of(*seed, *sectors) }
            }
            Step::Zeroes { sector, sectors } => Seen::Zeroes { extent: Extent::new(sector * 512, sectors * 512) },
            Step::Mark { body } => Seen::Mark { body: body.clone() },
        }
    }
}

pub fn read_all(log: &LogReader) -> tidemark_hrl::Result<Vec<Seen>> {
    let mut records = log.records();
    let mut seen = Vec::new();
    while let Some(record) = records.next()? {
        seen.push(match &record.kind {
            RecordKind::Write { extent, .. } => {
                let mut data = vec![0; extent.length as usize];
                log.read_data(&record, &mut data)?;
                Seen::Write { offset: extent.offset, data }
            }
            RecordKind::Zeroes { extent } => Seen::Zeroes { extent: *extent },
            RecordKind::Mark { body } => Seen::Mark { body: body.clone() },
        });
    }
    Ok(seen)
}

pub fn read_chain(mut records: ChainRecords) -> tidemark_hrl::Result<Vec<Seen>> {
    let mut seen = Vec::new();
    while let Some(record) = records.next()? {
        seen.push(match &record.record.kind {
            RecordKind::Write { extent, .. } => {
                let mut data = vec![0; extent.length as usize];
                record.read_data(&mut data)?;
                Seen::Write { offset: extent.offset, data }
            }
            RecordKind::Zeroes { extent } => Seen::Zeroes { extent: *extent },
            RecordKind::Mark { body } => Seen::Mark { body: body.clone() },
        });
    }
    Ok(seen)
}

/// The writes of an `.hrl` file alone, with what is wrong with it.
pub fn read_hrl(bytes: Vec<u8>) -> (Vec<(u64, Vec<u8>)>, Vec<String>) {
    let file = HrlFile::open(&bytes).unwrap();
    let mut writes = Vec::new();
    let mut defects: Vec<String> = file.warnings().iter().map(ToString::to_string).collect();
    file.for_each(
        |located| {
            let at = located.data_offset as usize;
            writes.push((located.entry.byte_offset, bytes[at..at + located.entry.data_bytes as usize].to_vec()));
            let mut buffer = vec![0; 8192];
            match file.data_checksum(located, &mut buffer) {
                Ok(Some(pair)) => assert!(pair.is_ok(), "data checksum of {located:?}"),
                other => panic!("{other:?}"),
            }
            Ok::<(), ()>(())
        },
        |defect| {
            defects.push(defect.to_string());
            Ok(())
        },
    )
    .unwrap();
    (writes, defects)
}
