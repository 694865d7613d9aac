//! The disk that everybody replicates, and the changes that are made to it: made from a seed, the same bytes in every
//! run and on every machine.
//!
//! About a quarter of the disk was never written; of what was, two thirds are what file systems hold (text, database
//! pages, programs, metadata) and a third cannot be compressed (media, archives, encrypted files). Runs of one kind are
//! 16 KiB to 4 MiB long. Compressibility is that of a measured disk with Debian, a database, logs and media files: zstd at
//! level 1 makes 0.57 of what was written in pieces of 64 KiB, and hardly less (0.56) in pieces of 1 MiB.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tidemark_tests::image::Seeded;

use crate::Failure;

pub const BLOCK: usize = 4096;
const SEED: u64 = 0x7469_6465_6d61_726b;
const RUN_BYTES_MAX: usize = 4 << 20;

/// What a disk consists of.
#[derive(Clone, Copy, Default, Debug)]
pub struct Content {
    pub bytes: u64,
    pub allocated: u64,
    pub incompressible: u64,
    /// All that is written, compressed in pieces of 64 KiB.
    pub compressed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Hole,
    Text,
    Rows,
    Program,
    Metadata,
    Random,
}

/// Kinds with their share in percent.
const SHARES: [(Kind, u64); 6] = [
    (Kind::Hole, 20),
    (Kind::Text, 10),
    (Kind::Rows, 15),
    (Kind::Program, 23),
    (Kind::Metadata, 5),
    (Kind::Random, 27),
];

/// The end of the disk is a hole, for data that is appended.
pub fn append_area(bytes: u64) -> (u64, u64) {
    let length = (bytes / 16).min(256 << 20);
    (bytes - length, length)
}

pub fn make(path: &Path, bytes: u64) -> Result<Content, Failure> {
    let file = File::create(path)?;
    file.set_len(bytes)?;
    let mut seeded = Seeded(SEED);
    let words = Words::new();
    let mut buffer = Vec::with_capacity(RUN_BYTES_MAX);
    let mut content = Content { bytes, ..Content::default() };
    let mut compressor = zstd::bulk::Compressor::new(1)?;
    let end = append_area(bytes).0;
    let (mut offset, mut runs) = (0, 0u64);
    while offset < end {
        let kind = choose(seeded.below(100));
        // 16 KiB · 2^0..8, and up to as much again in single blocks.
        let run = (16 << 10) << seeded.below(9);
        let run = (run + seeded.below(run / BLOCK as u64) * BLOCK as u64).min(RUN_BYTES_MAX as u64).min(end - offset);
        if kind != Kind::Hole {
            buffer.clear();
            fill(kind, &mut Seeded(seeded.number()), &words, &mut buffer, run as usize);
            file.write_all_at(&buffer, offset)?;
            if kind == Kind::Random {
                content.incompressible += run;
            }
            // Every eighth run says enough about the whole.
            runs += 1;
            if runs % 8 == 0 {
                let (mut raw, mut packed) = (0, 0);
                for piece in buffer.chunks(64 << 10) {
                    raw += piece.len();
                    packed += compressor.compress(piece)?.len().min(piece.len());
                }
                content.compressed += packed as u64;
                content.allocated += raw as u64;
            }
        }
        offset += run;
    }
    let ratio = content.compressed as f64 / content.allocated.max(1) as f64;
    content.allocated = file.metadata()?.blocks() * 512;
    content.compressed = (content.allocated as f64 * ratio) as u64;
    Ok(content)
}

fn choose(mut point: u64) -> Kind {
    for (kind, share) in SHARES {
        if point < share {
            return kind;
        }
        point -= share;
    }
    Kind::Random
}

/// Changes to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// 1 % of all 4 KiB blocks, anywhere: half of them random, half of them half compressible.
    Random,
    /// 64 MiB in one piece where the disk was empty: two thirds log text, one third random.
    Append,
}

/// One change: whole blocks.
pub struct Write {
    pub offset: u64,
    pub data: Vec<u8>,
}

impl Change {
    pub fn writes(self, bytes: u64, round: usize) -> Vec<Write> {
        let mut seeded = Seeded(SEED ^ ((round as u64 + 1) << 32) ^ u64::from(self == Self::Append));
        let words = Words::new();
        match self {
            Self::Random => {
                let blocks = bytes / BLOCK as u64;
                let mut chosen = std::collections::BTreeSet::new();
                while (chosen.len() as u64) < blocks / 100 {
                    chosen.insert(seeded.below(blocks));
                }
                // In no order of the disk: a guest does not write in one either.
                let mut order: Vec<u64> = chosen.into_iter().collect();
                for last in (1..order.len()).rev() {
                    order.swap(last, seeded.below(last as u64 + 1) as usize);
                }
                let block = |(index, block): (usize, u64)| {
                    let mut data = vec![0; BLOCK];
                    seeded.fill(&mut data);
                    if index % 2 == 0 {
                        let row = format!("{index:08}|row|");
                        for (at, byte) in data[BLOCK / 2..].iter_mut().enumerate() {
                            *byte = row.as_bytes()[at % row.len()];
                        }
                    }
                    Write { offset: block * BLOCK as u64, data }
                };
                order.into_iter().enumerate().map(block).collect()
            }
            Self::Append => {
                let (start, room) = append_area(bytes);
                let length = (room / 4).min(64 << 20);
                let start = start + round as u64 % 3 * length;
                let piece = |index: u64| {
                    let mut data = Vec::with_capacity(1 << 20);
                    let kind = if index % 3 == 2 { Kind::Random } else { Kind::Text };
                    fill(kind, &mut seeded, &words, &mut data, 1 << 20);
                    Write { offset: start + (index << 20), data }
                };
                (0..length >> 20).map(piece).collect()
            }
        }
    }
}

/// Writes changes into a file, and gives what was there before, to undo them.
pub fn apply(file: &File, writes: &[Write]) -> io::Result<Vec<Write>> {
    let old = |write: &Write| {
        let mut data = vec![0; write.data.len()];
        file.read_exact_at(&mut data, write.offset)?;
        file.write_all_at(&write.data, write.offset)?;
        Ok(Write { offset: write.offset, data })
    };
    writes.iter().map(old).collect()
}

/// Words as people and programs use them: few often, many seldom.
struct Words(Vec<Vec<u8>>);

impl Words {
    fn new() -> Self {
        let mut seeded = Seeded(SEED + 1);
        let syllables =
            ["an", "ber", "con", "der", "el", "for", "ge", "host", "in", "ka", "lo", "mar", "net", "or", "par", "re"];
        let word = |_| {
            let mut word = String::new();
            for _ in 0..1 + seeded.below(4) {
                word += syllables[seeded.below(16) as usize];
            }
            word.into_bytes()
        };
        Self((0..4096).map(word).collect())
    }

    fn word(&self, seeded: &mut Seeded) -> &[u8] {
        // The square of a uniform number favours the front.
        let uniform = seeded.below(1 << 20);
        &self.0[((uniform * uniform) >> 28) as usize]
    }
}

fn fill(kind: Kind, seeded: &mut Seeded, words: &Words, buffer: &mut Vec<u8>, length: usize) {
    match kind {
        Kind::Hole => buffer.resize(length, 0),
        Kind::Random => {
            buffer.resize(length, 0);
            seeded.fill(buffer);
        }
        Kind::Text => text(seeded, words, buffer, length),
        Kind::Rows => rows(seeded, words, buffer, length),
        Kind::Program => program(seeded, buffer, length),
        Kind::Metadata => metadata(seeded, buffer, length),
    }
    buffer.resize(length, 0);
}

/// Lines of a web server's log.
fn text(seeded: &mut Seeded, words: &Words, buffer: &mut Vec<u8>, length: usize) {
    let mut second = 1_700_000_000 + seeded.below(10_000_000);
    while buffer.len() < length {
        second += seeded.below(3);
        decimal(buffer, second);
        buffer.extend(b" host");
        decimal(buffer, seeded.below(20));
        buffer.extend(b" nginx: 10.");
        decimal(buffer, seeded.below(4));
        buffer.push(b'.');
        decimal(buffer, seeded.below(256));
        buffer.extend(b" \"GET /");
        buffer.extend(words.word(seeded));
        buffer.push(b'/');
        buffer.extend(words.word(seeded));
        buffer.extend(b"?id=");
        decimal(buffer, seeded.below(1 << 20));
        buffer.extend(b" HTTP/1.1\" 200 ");
        decimal(buffer, seeded.below(90_000));
        for _ in 0..3 {
            buffer.push(b' ');
            buffer.extend(words.word(seeded));
        }
        buffer.push(b'\n');
    }
}

/// Pages of a database: a header, rows with counters, words and keys, some room.
fn rows(seeded: &mut Seeded, words: &Words, buffer: &mut Vec<u8>, length: usize) {
    const PAGE: usize = 8192;
    let mut row = seeded.below(1 << 30);
    while buffer.len() < length {
        let page = buffer.len();
        let filled = page + PAGE - 256 - seeded.below(1024) as usize;
        buffer.extend(seeded.number().to_le_bytes());
        buffer.extend([0, 0, 4, 0, 0, 32, 4, 32]);
        while buffer.len() < filled {
            row += 1;
            buffer.extend((row as u32).to_le_bytes());
            buffer.extend((seeded.below(1 << 24) as u32).to_le_bytes());
            buffer.extend([2, 0, 9, 24]);
            buffer.extend(words.word(seeded));
            buffer.push(b' ');
            buffer.extend(words.word(seeded));
            buffer.extend(b"@example.org");
            buffer.extend(seeded.number().to_le_bytes());
        }
        buffer.resize(page + PAGE, 0);
    }
}

/// Something like machine code: few instructions often, operands that differ, and sequences that come again.
fn program(seeded: &mut Seeded, buffer: &mut Vec<u8>, length: usize) {
    let mut table = Seeded(SEED + 2);
    let instructions: Vec<[u8; 4]> = (0..512).map(|_| (table.number() as u32).to_le_bytes()).collect();
    while buffer.len() < length {
        let dice = seeded.number();
        if dice & 7 < 5 && buffer.len() > 512 {
            let window = buffer.len().min(8 << 10);
            let start = buffer.len() - 64 - (dice >> 32) as usize % (window - 64);
            buffer.extend_from_within(start..start + 6 + (dice >> 8 & 31) as usize);
            continue;
        }
        for shift in [0, 16, 32] {
            let uniform = (dice >> shift) & 0xffff;
            let instruction = instructions[((uniform * uniform) >> 23) as usize];
            buffer.extend(&instruction[..2 + (dice >> (56 + shift / 16) & 1) as usize]);
        }
        buffer.push((dice >> 48) as u8);
    }
}

/// Inodes and bitmaps: mostly zeroes.
fn metadata(seeded: &mut Seeded, buffer: &mut Vec<u8>, length: usize) {
    while buffer.len() < length {
        let start = buffer.len();
        if seeded.below(3) > 0 {
            buffer.extend(0x81a4u16.to_le_bytes());
            buffer.extend((seeded.below(1 << 20) as u32).to_le_bytes());
            buffer.extend([0; 6]);
            buffer.extend(((1_700_000_000 + seeded.below(1 << 16)) as u32).to_le_bytes());
            buffer.extend([0; 12]);
            buffer.extend((seeded.below(1 << 20) as u32).to_le_bytes());
        }
        buffer.resize(start + 256, 0);
    }
}

fn decimal(buffer: &mut Vec<u8>, number: u64) {
    use std::io::Write as _;
    write!(buffer, "{number}").expect("memory takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_the_same_every_time_and_of_the_promised_kind() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [folder.path().join("one"), folder.path().join("two")];
        let content = make(&paths[0], 128 << 20).unwrap();
        make(&paths[1], 128 << 20).unwrap();
        tidemark_tests::image::assert_same(&paths[0], &paths[1]);
        let share = |part: u64| part as f64 / content.bytes as f64;
        assert!((0.55..0.90).contains(&share(content.allocated)), "{content:?}");
        let ratio = content.compressed as f64 / content.allocated as f64;
        assert!((0.45..0.70).contains(&ratio), "{content:?}");
    }

    #[test]
    fn changes_are_undone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        make(&path, 64 << 20).unwrap();
        let before = std::fs::read(&path).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for change in [Change::Random, Change::Append] {
            let writes = change.writes(64 << 20, 0);
            let old = apply(&file, &writes).unwrap();
            assert!(std::fs::read(&path).unwrap() != before);
            apply(&file, &old).unwrap();
            assert!(std::fs::read(&path).unwrap() == before);
        }
        assert_eq!(Change::Random.writes(64 << 20, 0).len(), (64 << 20) / BLOCK / 100);
    }
}
