//! `fold.pending`: blocks of a batch that need the base's old content, before the base is touched.

use std::io;

use tidemark_base::storage::{OpenMode, Storage};

use super::base::{BLOCK_BYTES, BaseStore, Block};
use crate::journal::{Fields, ReadError};

const NAME: &str = "fold.pending";
const MAGIC: [u8; 8] = *b"TDMKPEND";
const HEADER_BYTES: usize = 32;
const BLOCKS_MAX: u64 = super::BATCH_BYTES / BLOCK_BYTES;

pub struct Pending;

impl Pending {
    /// Replaces the content, durably.
    pub fn store<'a>(
        storage: &dyn Storage,
        from: u64,
        to: u64,
        blocks: impl Iterator<Item = &'a Block>,
    ) -> io::Result<()> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        [from, to, 0].iter().for_each(|number: &u64| out.extend_from_slice(&number.to_le_bytes()));
        let mut count = 0u64;
        for block in blocks {
            out.extend_from_slice(&block.number.to_le_bytes());
            let start = out.len();
            out.extend_from_slice(block.data.as_deref().unwrap_or_default());
            out.resize(start + BLOCK_BYTES as usize, 0);
            count += 1;
        }
        out[24..32].copy_from_slice(&count.to_le_bytes());
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        let is_new = !storage.exists(NAME)?;
        let file = storage.open(NAME, OpenMode::OpenOrCreate)?;
        file.write_at(0, &out)?;
        file.sync()?;
        if is_new { storage.sync_folder("") } else { Ok(()) }
    }

    /// The blocks of the batch that a fold from `from` to `to` was writing; none when the file is of another or not whole.
    pub fn load(storage: &dyn Storage, from: u64, to: u64, base: &BaseStore) -> Result<Vec<(u64, Vec<u8>)>, ReadError> {
        let io = |source| ReadError::Io { file: storage.path(NAME).display().to_string(), source };
        if !storage.exists(NAME).map_err(io)? {
            return Ok(Vec::new());
        }
        let file = storage.open(NAME, OpenMode::Read).map_err(io)?;
        let bytes = file.bytes().map_err(io)?;
        let mut content = vec![0; bytes.min(HEADER_BYTES as u64) as usize];
        file.read_at(0, &mut content).map_err(io)?;
        let mut fields = Fields(&content);
        let head = (fields.array::<8>(), fields.u64(), fields.u64(), fields.u64());
        let (Some(MAGIC), Some(found_from), Some(found_to), Some(count)) = head else { return Ok(Vec::new()) };
        let length = HEADER_BYTES as u64 + count.min(BLOCKS_MAX + 1) * (8 + BLOCK_BYTES);
        if (found_from, found_to) != (from, to) || count > BLOCKS_MAX || bytes < length + 32 {
            return Ok(Vec::new());
        }
        content.resize(length as usize + 32, 0);
        file.read_at(0, &mut content).map_err(io)?;
        let (content, hash) = content.split_at(length as usize);
        if blake3::hash(content).as_bytes() != hash {
            return Ok(Vec::new());
        }
        let blocks = content[HEADER_BYTES..].chunks_exact(8 + BLOCK_BYTES as usize).filter_map(|entry| {
            let number = u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"));
            let start = number.checked_mul(BLOCK_BYTES).filter(|&start| start < base.disk_bytes())?;
            let bytes = BLOCK_BYTES.min(base.disk_bytes() - start) as usize;
            Some((number, entry[8..8 + bytes].to_vec()))
        });
        Ok(blocks.collect())
    }
}
