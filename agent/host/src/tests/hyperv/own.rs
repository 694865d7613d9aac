//! Images by a writer of the tests' own, after Microsoft's specification of VHDX: dynamic, blocks of 1 MiB, no log.

use std::fs::File;
use std::path::Path;

use tidemark_base::storage::read_exact_at;
use uuid::{Uuid, uuid};

use super::super::write_all_at;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = MIB;
const HEADERS: [u64; 2] = [64 * KIB, 128 * KIB];
const REGION_TABLES: [u64; 2] = [192 * KIB, 256 * KIB];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;
const BLOCKS: u64 = 4 * MIB;
const ITEMS: u64 = 64 * KIB;
const FULLY_PRESENT: u64 = 6;

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn sealed(mut block: Vec<u8>) -> Vec<u8> {
    let sum = crc32c(&block);
    put(&mut block, 4, &sum.to_le_bytes());
    block
}

fn header(sequence: u64) -> Vec<u8> {
    let mut block = vec![0; 4096];
    put(&mut block, 0, b"head");
    put(&mut block, 8, &sequence.to_le_bytes());
    put(&mut block, 16, &Uuid::new_v4().to_bytes_le());
    put(&mut block, 32, &Uuid::new_v4().to_bytes_le());
    put(&mut block, 66, &1u16.to_le_bytes());
    put(&mut block, 68, &(MIB as u32).to_le_bytes());
    put(&mut block, 72, &LOG.to_le_bytes());
    sealed(block)
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn number(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    read_exact_at(file, &mut bytes, at).unwrap();
    u64::from_le_bytes(bytes)
}

pub fn create(path: &Path, bytes: u64) -> bool {
    let file = File::create(path).unwrap();
    let write = |at: u64, block: &[u8]| write_all_at(&file, block, at).unwrap();
    file.set_len(BLOCKS).unwrap();
    write(0, b"vhdxfile");
    HEADERS.iter().zip([1, 2]).for_each(|(at, sequence)| write(*at, &header(sequence)));
    let regions = [
        (uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08"), BAT),
        (uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e"), METADATA),
    ];
    let mut table = vec![0; 64 << 10];
    put(&mut table, 0, b"regi");
    put(&mut table, 8, &(regions.len() as u32).to_le_bytes());
    for (index, (region, at)) in regions.into_iter().enumerate() {
        let entry = &mut table[16 + index * 32..][..32];
        put(entry, 0, &region.to_bytes_le());
        put(entry, 16, &at.to_le_bytes());
        put(entry, 24, &(MIB as u32).to_le_bytes());
        put(entry, 28, &1u32.to_le_bytes());
    }
    let table = sealed(table);
    REGION_TABLES.iter().for_each(|at| write(*at, &table));
    // What it is, its bytes, and whether it is of the virtual disk.
    let items: [(Uuid, Vec<u8>, u32); 5] = [
        (uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b"), BLOCK_BYTES.to_le_bytes().to_vec(), 4),
        (uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8"), bytes.to_le_bytes().to_vec(), 6),
        (uuid!("beca12ab-b2e6-4523-93ef-c309e000c746"), Uuid::new_v4().to_bytes_le().to_vec(), 6),
        (uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f"), 512u32.to_le_bytes().to_vec(), 6),
        (uuid!("cda348c7-445d-4471-9cc9-e9885251c556"), 4096u32.to_le_bytes().to_vec(), 6),
    ];
    let mut table = vec![0; 64 << 10];
    put(&mut table, 0, b"metadata");
    put(&mut table, 10, &(items.len() as u16).to_le_bytes());
    for (index, (item, content, flags)) in items.iter().enumerate() {
        let at = ITEMS + index as u64 * 64;
        let entry = &mut table[32 + index * 32..][..32];
        put(entry, 0, &item.to_bytes_le());
        put(entry, 16, &(at as u32).to_le_bytes());
        put(entry, 20, &(content.len() as u32).to_le_bytes());
        put(entry, 24, &flags.to_le_bytes());
        write(METADATA + at, content);
    }
    write(METADATA, &table);
    true
}

/// Says that it lies on another image.
pub fn set_parent(path: &Path) {
    write_all_at(&open(path), &(BLOCK_BYTES | 2 << 32).to_le_bytes(), METADATA + ITEMS).unwrap();
}

/// As a program that opened it: its first write changes DataWriteGuid.
pub fn write(path: &Path, writes: &[(u64, Vec<u8>)]) {
    let file = open(path);
    let sequences = HEADERS.map(|at| number(&file, at + 8));
    let (older, newest) = (usize::from(sequences[1] < sequences[0]), sequences[0].max(sequences[1]));
    write_all_at(&file, &header(newest + 1), HEADERS[older]).unwrap();
    for (offset, data) in writes {
        let mut at = 0;
        while at < data.len() {
            let place = offset + at as u64;
            let (block, within) = (place / BLOCK_BYTES, place % BLOCK_BYTES);
            let length = ((BLOCK_BYTES - within) as usize).min(data.len() - at);
            let mut entry = number(&file, BAT + block * 8);
            if entry & 7 != FULLY_PRESENT {
                let end = file.metadata().unwrap().len();
                file.set_len(end + BLOCK_BYTES).unwrap();
                entry = end | FULLY_PRESENT;
                write_all_at(&file, &entry.to_le_bytes(), BAT + block * 8).unwrap();
            }
            write_all_at(&file, &data[at..at + length], (entry & !(MIB - 1)) + within).unwrap();
            at += length;
        }
    }
}

pub fn content(path: &Path) -> Vec<u8> {
    let file = open(path);
    let mut content = vec![0; number(&file, METADATA + ITEMS + 64) as usize];
    for (block, part) in content.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        let entry = number(&file, BAT + block as u64 * 8);
        if entry & 7 == FULLY_PRESENT {
            read_exact_at(&file, part, entry & !(MIB - 1)).unwrap();
        }
    }
    content
}
