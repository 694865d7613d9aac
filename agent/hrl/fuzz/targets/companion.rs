//! Any bytes as a companion, beside a good log: reading, looking up and recovering it does not panic, takes no memory that
//! the files do not back, and ends.
//!
//! The first byte of the input says how it is used: as the whole file, as its records, or as changes of slots; and
//! whether tags are made right, which only our own code could do.
//!
//! `cargo +nightly fuzz run companion` in `agent/hrl`.
#![no_main]

#[path = "../../tests/support/memory.rs"]
#[allow(dead_code)]
mod memory;
#[path = "sealed.rs"]
mod sealed;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use memory::{Content, MemoryStorage};
use tidemark_base::{DiskId, Epoch, Extent, Sequence, Timestamp};
use tidemark_hrl::{ActiveLog, Append, Cause, DataHasher, LogName, LogReader, recover};

const STEM: &str = "disk";
const DATA_BYTES_MAX: u64 = 1 << 20;

fn disk() -> DiskId {
    DiskId::from_bytes([7; 16])
}

/// The same log, open and closed.
fn originals() -> &'static [Content; 2] {
    static LOGS: OnceLock<[Content; 2]> = OnceLock::new();
    LOGS.get_or_init(|| {
        let memory = MemoryStorage::new();
        let start = Epoch([9; 16]).start();
        let mut log = ActiveLog::create(
            memory.storage(),
            LogName::new(STEM, 1),
            disk(),
            1 << 20,
            start,
            None,
            Timestamp(1 << 60),
        )
        .unwrap();
        let hasher = DataHasher::new(disk());
        for number in 0..10u8 {
            let data = [number; 1024];
            let item = match number {
                4 => Append::Mark { body: &data[..300] },
                6 => Append::Zeroes { extent: Extent::new(512, 4096) },
                _ => Append::Write { offset: u64::from(number) * 512, data: &data, hash: hasher.hash(&data) },
            };
            log.append(Timestamp(1 << 60), &[item]).unwrap();
        }
        log.sync().unwrap();
        let open = memory.content();
        log.close(Timestamp(1 << 60)).unwrap();
        [open, memory.content()]
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((&mode, bytes)) = input.split_first() else { return };
    let name = LogName::new(STEM, 1);
    let mut content = originals()[usize::from(mode & 1)].clone();
    let companion = content.get_mut(&name.companion()).unwrap();
    match mode >> 1 & 3 {
        0 => *companion = bytes.to_vec(),
        1 => {
            companion.truncate(4096);
            companion.extend(bytes);
        }
        // A place, and what a slot says there from its first byte on.
        _ => {
            for change in bytes.chunks(18) {
                let Some((&place, change)) = change.split_first() else { continue };
                let at = match place {
                    0..5 => [0, 512, 1024, 1536, 2048][usize::from(place)],
                    _ => 4096 + (usize::from(place) - 5) * 16,
                };
                for (byte, &changed) in companion.iter_mut().skip(at).zip(change) {
                    *byte = changed;
                }
            }
        }
    }
    if mode & 8 == 0 {
        sealed::seal_again(companion);
    }
    let storage = MemoryStorage::with(&content).storage();
    if let Ok(log) = LogReader::open(storage.clone(), &name, disk()) {
        let mut records = log.records();
        let mut buffer = Vec::new();
        // Each record takes a slot at least.
        let slots = content[&name.companion()].len() / 128;
        for _ in 0..=slots {
            let Ok(Some(record)) = records.next() else { break };
            let bytes = record.extent().map_or(0, |extent| extent.length);
            if bytes <= DATA_BYTES_MAX {
                buffer.resize(bytes as usize, 0);
                let _ = log.read_data(&record, &mut buffer);
            }
            if let Ok(Some(position)) = log.position_of(record.sequence) {
                let _ = log.records_after(&position);
            }
        }
        assert!(!matches!(records.next(), Ok(Some(_))) || slots == 0, "more records than slots");
        for sequence in [0, 1, 5, u64::MAX] {
            let _ = log.position_of(Sequence(sequence));
        }
    }
    let cause = if mode & 16 == 0 { Cause::ProcessKilled } else { Cause::PowerLoss };
    let _ = recover(storage, STEM, disk(), cause, Timestamp(1 << 60));
});
