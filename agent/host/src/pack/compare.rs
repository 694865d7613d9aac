//! What a worker does for a compare: hash blocks to ask about them, and seal of blocks that differ only the parts that do.

use tidemark_base::chunk::{ChunkKey, Compression};
use tidemark_base::compare::{BLOCK_BYTES, BlockHash, CompareKey, PART_BYTES, pieces};
use tidemark_base::disk::{Disk, is_zero};
use tidemark_base::{CHUNK_BYTES_MAX, Extent};

use super::chunks::ChunkWriter;
use super::{PackError, Sealed, Worker, ZeroPolicy};

/// Read at once while blocks are hashed: what a worker holds in memory for it.
pub const HASH_READ_BYTES: u64 = 1 << 20;

/// A block of at most 64 KiB, as it was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashedBlock {
    pub extent: Extent,
    /// `None`: it reads as zeroes.
    pub hash: Option<BlockHash>,
}

/// What the consumer said that it holds at a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    Zeroes,
    Hash(BlockHash),
}

/// A part of a differing block, of at most 4 KiB, of which the consumer said what it holds.
pub type HeldPart = (Extent, Held);

/// Reads and hashes blocks of the disk.
pub fn hash_blocks(
    worker: &mut Worker,
    disk: &dyn Disk,
    key: &CompareKey,
    blocks: &[Extent],
) -> Result<Vec<HashedBlock>, PackError> {
    let mut hashed = Vec::new();
    for extent in blocks.iter().flat_map(|extent| pieces(*extent, HASH_READ_BYTES)) {
        let buffer = worker.buffer(extent.length as usize);
        disk.read_at(extent.offset, buffer).map_err(|source| PackError::Disk { extent, source })?;
        for block in pieces(extent, BLOCK_BYTES) {
            let data = &buffer[(block.offset - extent.offset) as usize..][..block.length as usize];
            let hash = (!is_zero(data)).then(|| key.hash(block, data));
            hashed.push(HashedBlock { extent: block, hash });
        }
    }
    Ok(hashed)
}

/// What is sealed, and with what.
pub struct Differing<'a> {
    pub key: &'a ChunkKey,
    pub compare: &'a CompareKey,
    pub compression: Compression,
    /// In disk order, like `holes` and `held`.
    pub blocks: &'a [Extent],
    pub holes: &'a [Extent],
    pub held: &'a [HeldPart],
}

/// Reads blocks and seals them, but for the parts that the consumer holds already, which are returned.
pub fn seal_differing(
    worker: &mut Worker,
    disk: &dyn Disk,
    what: &Differing<'_>,
) -> Result<(Sealed, Vec<Extent>), PackError> {
    let bytes: u64 = what.blocks.iter().map(|extent| extent.length).sum();
    let (sealer, buffer) = worker.tools(what.key, what.compression, bytes as usize);
    let mut rest = &mut buffer[..];
    for extent in what.blocks {
        let (now, later) = rest.split_at_mut(extent.length as usize);
        disk.read_at(extent.offset, now).map_err(|source| PackError::Disk { extent: *extent, source })?;
        rest = later;
    }
    let mut writer = ChunkWriter::new(sealer, ZeroPolicy::Send, CHUNK_BYTES_MAX, bytes as usize);
    let mut equal = Vec::new();
    let mut held = what.held.iter().peekable();
    let mut holes = what.holes.iter().peekable();
    let mut rest = &buffer[..];
    for block in what.blocks {
        while let Some(hole) = holes.next_if(|hole| hole.offset < block.offset) {
            writer.zeroes(*hole);
        }
        let (data, later) = rest.split_at(block.length as usize);
        rest = later;
        let of = |extent: Extent| &data[(extent.offset - block.offset) as usize..][..extent.length as usize];
        let mut at = block.offset;
        while let Some((part, content)) = held.next_if(|(part, _)| part.offset < block.end()) {
            // A part that the plan cut through is sent, and so is one that begins in another: both come from a peer's answers.
            if !block.contains(part) || part.length > PART_BYTES || part.offset < at {
                continue;
            }
            let same = match content {
                Held::Zeroes => is_zero(of(*part)),
                Held::Hash(hash) => what.compare.hash(*part, of(*part)) == *hash,
            };
            if same {
                send(&mut writer, Extent::new(at, part.offset - at), &of);
                equal.push(*part);
                at = part.end();
            }
        }
        send(&mut writer, Extent::new(at, block.end() - at), &of);
    }
    holes.for_each(|hole| writer.zeroes(*hole));
    Ok((writer.finish(Vec::new()), equal))
}

fn send<'a>(writer: &mut ChunkWriter<'_>, extent: Extent, of: &impl Fn(Extent) -> &'a [u8]) {
    if !extent.is_empty() {
        writer.data(extent, of(extent));
    }
}
