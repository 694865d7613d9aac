//! The file of points: lines that prove themselves.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{OpenMode, Storage, StorageFile, os_error, replace_file};
use tidemark_base::{MarkId, Timestamp};

use super::Point;

pub const NAME: &str = "points";
const DIGEST_BYTES: usize = 32;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    Point(Point),
    Lock { id: MarkId, locked: bool },
    Flag { id: MarkId, damaged: bool },
    Proven { id: MarkId, time: Timestamp },
    Confirm { id: MarkId },
    LeaveGroup {},
    Drop { ids: Vec<MarkId> },
}

pub struct PointLog {
    storage: Arc<dyn Storage>,
    file: Arc<dyn StorageFile>,
    end: u64,
    failed: bool,
    pub lines: usize,
}

fn line_of(record: &Record) -> String {
    let json = serde_json::to_string(record).expect("a record has no map with odd keys");
    format!("{} {json}\n", &blake3::hash(json.as_bytes()).to_hex()[..DIGEST_BYTES])
}

fn record_of(line: &[u8]) -> Option<Record> {
    let (digest, json) = line.split_at_checked(DIGEST_BYTES)?;
    let json = json.strip_prefix(b" ")?;
    if &blake3::hash(json).to_hex().as_bytes()[..DIGEST_BYTES] != digest {
        return None;
    }
    serde_json::from_slice(json).ok()
}

impl PointLog {
    /// Reads the log; returns its records and how many lines were damaged. With `write` a torn tail is truncated.
    pub fn open(storage: Arc<dyn Storage>, write: bool) -> io::Result<(Self, Vec<Record>, usize)> {
        let file = storage.open(NAME, if write { OpenMode::OpenOrCreate } else { OpenMode::Read })?;
        if write {
            storage.sync_folder("")?;
        }
        let bytes = file.bytes()?;
        let mut content = vec![0; bytes as usize];
        file.read_at(0, &mut content)?;
        let (mut records, mut damaged, mut pending, mut end, mut at) = (Vec::new(), 0, 0, 0, 0);
        for line in content.split_inclusive(|&byte| byte == b'\n') {
            at += line.len() as u64;
            match line.strip_suffix(b"\n").and_then(record_of) {
                Some(record) => {
                    damaged += std::mem::take(&mut pending);
                    records.push(record);
                    end = at;
                }
                None => pending += 1,
            }
        }
        // A last line that ends as lines do was written whole: it is damaged, not torn. So is one that would be whole if
        // its last byte ended it.
        let last = &content[end as usize..];
        let ended = last.split_last().is_some_and(|(byte, line)| *byte == b'\n' || record_of(line).is_some());
        damaged += if ended { pending } else { 0 };
        if write && end < bytes {
            file.set_bytes(end)?;
        }
        if write && bytes > 0 {
            // A sync that failed before this start may have lost what the page cache still shows: what is believed from now
            // on, as that a point was dropped, is written again and synced.
            file.write_at(0, &content[..end as usize])?;
            file.sync()?;
        }
        let lines = records.len();
        Ok((Self { storage, file, end, failed: false, lines }, records, damaged))
    }

    /// Nothing is appended any more until it was replaced.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Reads every line again; says what is wrong.
    pub fn check(&self) -> io::Result<Option<String>> {
        let path = || self.storage.path(NAME).display().to_string();
        let mut content = vec![0; self.end as usize];
        match self.file.read_at(0, &mut content) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Some(format!("{}: it ends before byte {}", path(), self.end)));
            }
            result => result?,
        }
        let mut at = 0;
        for line in content.split_inclusive(|&byte| byte == b'\n') {
            if line.strip_suffix(b"\n").and_then(record_of).is_none() {
                return Ok(Some(format!("{}: the line at {at} is damaged", path())));
            }
            at += line.len();
        }
        Ok(None)
    }

    pub fn append(&mut self, records: &[Record], durable: bool) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("the log of points failed before and is to be replaced"));
        }
        let text: String = records.iter().map(line_of).collect();
        let result = self.file.write_at(self.end, text.as_bytes());
        let result = result.and_then(|()| if durable { self.file.sync() } else { Ok(()) });
        match result {
            Ok(()) => {
                self.end += text.len() as u64;
                self.lines += records.len();
                Ok(())
            }
            Err(error) => {
                // What a full volume left of the lines goes, and the next attempt begins anew. A sync that failed may
                // have lost what it was for, and nothing after it may be believed.
                let full = matches!(os_error(&error), Some(libc::ENOSPC | libc::EDQUOT));
                self.failed = !full || self.file.set_bytes(self.end).is_err();
                Err(error)
            }
        }
    }

    /// Replaces the log by `records`.
    pub fn compact(&mut self, records: &[Record]) -> io::Result<()> {
        let text: String = records.iter().map(line_of).collect();
        replace_file(&*self.storage, NAME, text.as_bytes())?;
        self.file = self.storage.open(NAME, OpenMode::ReadWrite)?;
        self.end = text.len() as u64;
        self.lines = records.len();
        self.failed = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::testing::SimStorage;

    /// Folds go past a point that was dropped: it must not come back.
    #[test]
    fn what_a_failed_sync_lost_and_a_restart_found_is_durable() {
        let dropped = Record::Drop { ids: vec![MarkId::from_bytes([1; 16])] };
        let later = Record::Lock { id: MarkId::from_bytes([2; 16]), locked: true };
        for seed in 0..8 {
            let storage = SimStorage::default();
            let (mut log, ..) = PointLog::open(Arc::new(storage.clone()), true).unwrap();
            log.append(std::slice::from_ref(&later), true).unwrap();
            storage.fail_next_sync();
            log.append(std::slice::from_ref(&dropped), true).unwrap_err();
            drop(log);
            // A new process in the same boot.
            let (log, found, _) = PointLog::open(Arc::new(storage.clone()), true).unwrap();
            drop(log);
            let (_, after, damaged) = PointLog::open(Arc::new(storage.after_crash(seed)), true).unwrap();
            assert_eq!((found.len(), damaged), (2, 0));
            assert_eq!(after, found, "seed {seed}");
        }
    }
}
