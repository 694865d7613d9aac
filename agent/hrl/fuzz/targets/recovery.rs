//! A log that was not closed, changed by the input: recovery does not panic, and what it keeps is a prefix of what was
//! appended.
//!
//! `cargo +nightly fuzz run recovery` in `agent/hrl`.
#![no_main]

#[path = "../../tests/support/memory.rs"]
#[allow(dead_code)]
mod memory;
#[path = "sealed.rs"]
mod sealed;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use memory::{Content, MemoryStorage};
use tidemark_base::{DiskId, Epoch, Extent, HistoryHash, Timestamp};
use tidemark_hrl::{ActiveLog, Append, Cause, DataHasher, LogName, LogReader, Verdict, recover};

const STEM: &str = "disk";

fn disk() -> DiskId {
    DiskId::from_bytes([7; 16])
}

fn original() -> &'static (Content, Vec<HistoryHash>) {
    static LOG: OnceLock<(Content, Vec<HistoryHash>)> = OnceLock::new();
    LOG.get_or_init(|| {
        let memory = MemoryStorage::new();
        let start = Epoch([9; 16]).start();
        let name = LogName::new(STEM, 1);
        let mut log =
            ActiveLog::create(memory.storage(), name, disk(), 1 << 20, start, None, Timestamp(1 << 60)).unwrap();
        let hasher = DataHasher::new(disk());
        let mut history = vec![start.hash];
        for number in 0..12u8 {
            let data = [number; 1024];
            let item = match number {
                3 | 7 => Append::Mark { body: &data[..usize::from(number) * 50] },
                5 => Append::Zeroes { extent: Extent::new(512, 4096) },
                _ => Append::Write { offset: u64::from(number) * 512, data: &data, hash: hasher.hash(&data) },
            };
            history.push(log.append(Timestamp(1 << 60), &[item]).unwrap().hash);
            if number == 8 {
                log.sync().unwrap();
            }
        }
        (memory.content(), history)
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((&mode, changes)) = input.split_first() else { return };
    let (content, history) = original();
    let mut content = content.clone();
    let name = LogName::new(STEM, 1);
    for change in changes.chunks_exact(4) {
        let file = if change[0] & 1 == 0 { name.companion() } else { name.hrl() };
        let bytes = content.get_mut(&file).unwrap();
        let at = usize::from(u16::from_le_bytes([change[1], change[2]]));
        match change[0] >> 1 & 7 {
            0 => bytes.truncate(at),
            1 => bytes.extend(std::iter::repeat_n(change[3], at % 1000)),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= change[3];
                }
            }
        }
    }
    // With tags made right again, what lies behind them is reached: a companion made to harm.
    let forged = mode & 2 != 0;
    if forged {
        sealed::seal_again(content.get_mut(&name.companion()).unwrap());
    }
    let cause = if mode & 1 == 0 { Cause::ProcessKilled } else { Cause::PowerLoss };
    let storage = MemoryStorage::with(&content).storage();
    let Ok(verdict) = recover(storage.clone(), STEM, disk(), cause, Timestamp(1 << 60)) else { return };
    if let (Verdict::Kept { end } | Verdict::Cut { end, .. }, false) = (&verdict, forged) {
        assert_eq!(history.get(end.sequence.0 as usize), Some(&end.hash), "{verdict:?}");
        assert!(end.sequence.0 >= 9, "durable records were lost: {verdict:?}");
    }
    if let Ok(log) = LogReader::open(storage, &name, disk()) {
        let mut records = log.records();
        let mut buffer = Vec::new();
        while let Ok(Some(record)) = records.next() {
            if !forged {
                assert_eq!(history[record.sequence.0 as usize], record.history);
            }
            let extent = record.extent().unwrap_or(Extent::new(0, 0));
            if extent.length <= 1 << 20 {
                buffer.resize(extent.length as usize, 0);
                let _ = log.read_data(&record, &mut buffer);
            }
        }
    }
});
