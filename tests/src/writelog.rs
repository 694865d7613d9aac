//! What went to a block device, write by write, as QEMU's `blklogwrites` records it in the kernel's dm-log-writes format;
//! and the states that a power cut could have left: everything up to a flush, and of what came after it any part, in any
//! order, each write whole or torn at a sector.
//!
//! ```text
//! sector 0     magic u64, version u64 (1), entries u64, sector bytes u32
//! then entries: one sector with sector u64, sectors u64, flags u64, data bytes u64; then the data, unless it is a discard
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::image::Seeded;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
/// What a disk writes as a whole.
const SECTOR: u64 = 512;

/// QEMU's nodes that record what goes to the node `image` in a file.
pub fn nodes(log: &Path) -> [Value; 2] {
    let log = log.to_str().expect("paths of tests are text");
    [
        json!({"driver": "file", "node-name": "log", "filename": log}),
        json!({"driver": "blklogwrites", "node-name": "recorded", "file": "image", "log": "log",
               "log-append": false, "log-super-update-interval": 1}),
    ]
}

/// A log that may still be written.
#[derive(Clone)]
pub struct Recording {
    path: PathBuf,
}

impl Recording {
    /// At an existing file, which must be as large as the log may become.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// How many entries there are now: an instant, for this device.
    pub fn entries(&self) -> usize {
        let mut head = [0; 28];
        File::open(&self.path).and_then(|file| file.read_exact_at(&mut head, 0)).expect("the log can be read");
        u64_at(&head, 16) as usize
    }

    /// Reads the whole log.
    pub fn read(&self) -> WriteLog {
        let file = File::open(&self.path).expect("the log can be opened");
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0).expect("the log has a head");
        assert_eq!((u64_at(&head, 0), u64_at(&head, 8)), (MAGIC, 1), "a log of dm-log-writes, version 1");
        let sector_bytes = u64::from(u32::from_le_bytes(head[24..28].try_into().expect("four bytes")));
        let mut at = sector_bytes;
        let mut entries = Vec::new();
        for _ in 0..u64_at(&head, 16) {
            let mut entry = [0; 32];
            file.read_exact_at(&mut entry, at).expect("the log has its entries");
            at += sector_bytes;
            let (offset, bytes) = (u64_at(&entry, 0) * sector_bytes, u64_at(&entry, 8) * sector_bytes);
            let flags = u64_at(&entry, 16);
            let mut data = None;
            if flags & DISCARD == 0 && bytes > 0 {
                let mut content = vec![0; bytes as usize];
                file.read_exact_at(&mut content, at).expect("an entry has its data");
                at += bytes;
                data = Some(content);
            }
            entries.push(Entry { offset, bytes, flush: flags & (FLUSH | FUA) != 0, data });
        }
        WriteLog { entries }
    }
}

struct Entry {
    offset: u64,
    bytes: u64,
    flush: bool,
    /// None: zeroes, or nothing at all.
    data: Option<Vec<u8>>,
}

#[derive(Default)]
pub struct WriteLog {
    entries: Vec<Entry>,
}

/// What a device may hold after a cut, made from the states before it: instants must not go back.
pub struct Device<'a> {
    log: &'a WriteLog,
    content: Content,
    /// Entries that are in `content`: all up to a flush.
    applied: usize,
    /// Entries before the cut whose flushes the device only pretended to make.
    lies: usize,
}

impl WriteLog {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The device as it was when the log began.
    pub fn device(&self, base: &Path) -> Device<'_> {
        Device { log: self, content: Content::read(base), applied: 0, lies: 0 }
    }
}

impl Device<'_> {
    /// A device that lies about the flushes among its last so many writes: the control of an experiment.
    pub fn lying(self, lies: usize) -> Self {
        Self { lies, ..self }
    }

    /// Writes to `image` a state after a power cut at an instant; how many writes had not been flushed then, and how many of
    /// them it has.
    pub fn cut(&mut self, instant: usize, seeded: &mut Seeded, image: &Path) -> (usize, usize) {
        let entries = &self.log.entries[..instant.min(self.log.len())];
        let honest = &entries[..entries.len().saturating_sub(self.lies)];
        let flushed = honest.iter().rposition(|entry| entry.flush).map_or(0, |last| last + 1).max(self.applied);
        for entry in &entries[self.applied.min(flushed)..flushed] {
            self.content.apply(entry, entry.bytes);
        }
        self.applied = flushed;
        let mut state = self.content.clone();
        let mut tail: Vec<&Entry> = entries[flushed.min(entries.len())..].iter().filter(|e| e.bytes > 0).collect();
        let unflushed = tail.len();
        // Any order: a shuffle, and then a random part of it. Every fourth state keeps nothing, every fourth all of it.
        for index in (1..tail.len()).rev() {
            tail.swap(index, seeded.below(index as u64 + 1) as usize);
        }
        match seeded.below(4) {
            0 => tail.clear(),
            1 => {}
            _ => tail.retain(|_| seeded.below(2) == 0),
        }
        for entry in &tail {
            let torn = seeded.below(4) == 0;
            state.apply(entry, if torn { seeded.below(entry.bytes / SECTOR) * SECTOR } else { entry.bytes });
        }
        state.write(image);
        (unflushed, tail.len())
    }
}

/// A sparse device: parts that are not here are zeroes.
#[derive(Clone)]
struct Content {
    bytes: u64,
    parts: BTreeMap<u64, Vec<u8>>,
}

impl Content {
    const PART: u64 = 64 << 10;

    fn read(path: &Path) -> Self {
        let content = std::fs::read(path).expect("the base can be read");
        let parts = content.chunks(Self::PART as usize).enumerate();
        let parts = parts.filter(|(_, part)| part.iter().any(|byte| *byte != 0));
        Self { bytes: content.len() as u64, parts: parts.map(|(index, part)| (index as u64, part.to_vec())).collect() }
    }

    fn apply(&mut self, entry: &Entry, bytes: u64) {
        let mut done = 0;
        while done < bytes {
            let at = entry.offset + done;
            let (index, within) = (at / Self::PART, at % Self::PART);
            let length = (Self::PART - within).min(bytes - done);
            let range = within as usize..(within + length) as usize;
            match &entry.data {
                Some(data) => {
                    let part = self.parts.entry(index).or_insert_with(|| vec![0; Self::PART as usize]);
                    part[range].copy_from_slice(&data[done as usize..(done + length) as usize]);
                }
                None => {
                    if let Some(part) = self.parts.get_mut(&index) {
                        part[range].fill(0);
                    }
                }
            }
            done += length;
        }
    }

    fn write(&self, image: &Path) {
        let file = File::create(image).expect("an image can be made");
        file.set_len(self.bytes).expect("an image can grow");
        for (index, part) in &self.parts {
            let length = Self::PART.min(self.bytes - index * Self::PART) as usize;
            file.write_all_at(&part[..length], index * Self::PART).expect("an image can be written");
        }
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, content: &[u8]) {
        File::create(path).and_then(|file| file.write_all_at(content, 0)).unwrap();
    }

    /// A log with these (sector, fill, flags), one sector each.
    fn log(folder: &Path, entries: &[(u64, u8, u64)]) -> WriteLog {
        let path = folder.join("log");
        let mut content = vec![0; 512];
        content[..8].copy_from_slice(&MAGIC.to_le_bytes());
        content[8..16].copy_from_slice(&1u64.to_le_bytes());
        content[16..24].copy_from_slice(&(entries.len() as u64).to_le_bytes());
        content[24..28].copy_from_slice(&512u32.to_le_bytes());
        for (sector, fill, flags) in entries {
            let mut head = vec![0; 512];
            head[..8].copy_from_slice(&sector.to_le_bytes());
            head[8..16].copy_from_slice(&u64::from(*fill > 0).to_le_bytes());
            head[16..24].copy_from_slice(&flags.to_le_bytes());
            content.extend(head);
            if *fill > 0 {
                content.extend([*fill; 512]);
            }
        }
        write(&path, &content);
        Recording::new(&path).read()
    }

    #[test]
    fn what_was_flushed_stays_and_the_rest_may() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        write(&base, &[9; 2048]);
        let log = log(folder.path(), &[(0, 1, 0), (1, 2, 0), (0, 0, FLUSH), (1, 3, 0), (2, 4, 0)]);
        assert_eq!(log.len(), 5);
        let image = folder.path().join("image");
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let (unflushed, _) = log.device(&base).cut(5, &mut Seeded(seed), &image);
            assert_eq!(unflushed, 2);
            let state = std::fs::read(&image).unwrap();
            assert_eq!((state[0], state[1536]), (1, 9), "flushed, and never written");
            seen.insert((state[512], state[1024]));
        }
        let all = [(2, 4), (2, 9), (3, 4), (3, 9)];
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), all);
        // Before the flush anything may be missing.
        let (unflushed, _) = log.device(&base).cut(2, &mut Seeded(1), &image);
        assert_eq!(unflushed, 2);
    }
}
