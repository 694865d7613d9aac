//! What a worker does: read, verify, seal. One job, one frame.

use std::io;

use tidemark_base::chunk::{ChunkKey, Compression, IN_PLACE_AT};
use tidemark_base::disk::{Disk, is_zero};
use tidemark_base::{CHUNK_BYTES_MAX, Extent};

use super::chunks::{ChunkWriter, ZERO_BLOCK_BYTES};
use super::{Content, LIVE_CHUNK_BYTES, Piece, Sealed, Worker, ZeroPolicy};
use crate::source::{DataRef, ReadDataError, Source};

#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The log cannot give these back.
    #[error("stored data of {0:?} cannot be read back")]
    Damaged(Vec<Extent>),
    #[error("the log was removed while it was read")]
    Gone,
    #[error("cannot read the disk at {extent}")]
    Disk { extent: Extent, source: io::Error },
}

/// Seals pieces of a cut, which are in disk order. With `omit_damaged`, what the log cannot give back is left out and
/// named in the result: for cuts within a scan, which reads those blocks from the disk.
pub fn seal_pieces(
    worker: &mut Worker,
    source: &dyn Source,
    key: &ChunkKey,
    compression: Compression,
    pieces: &[(Extent, Piece)],
    omit_damaged: bool,
) -> Result<Sealed, PackError> {
    // In the order of the log, each record once: neighbours are read with one call.
    let mut reads: Vec<DataRef> = pieces
        .iter()
        .filter_map(|(_, piece)| match piece.content {
            Content::Data { data, .. } => Some(data),
            Content::Zeroes => None,
        })
        .collect();
    reads.sort_unstable();
    reads.dedup();
    let mut starts = Vec::with_capacity(reads.len());
    let mut bytes = 0usize;
    for read in &reads {
        starts.push(bytes);
        bytes += read.length as usize;
    }
    let (sealer, buffer) = worker.tools(key, compression, bytes);
    let lost = match source.read_data(&reads, buffer) {
        Ok(()) => Vec::new(),
        Err(ReadDataError::Gone) => return Err(PackError::Gone),
        Err(ReadDataError::Damaged { indices }) => indices,
    };
    let index_of = |data: &DataRef| reads.binary_search(data).expect("every piece's record is among the reads");
    let damaged: Vec<Extent> = pieces
        .iter()
        .filter(|(_, piece)| matches!(&piece.content, Content::Data { data, .. } if lost.contains(&index_of(data))))
        .map(|(extent, _)| *extent)
        .collect();
    if !damaged.is_empty() && !omit_damaged {
        return Err(PackError::Damaged(damaged));
    }
    let raw: u64 =
        pieces.iter().map(|(extent, piece)| if piece.content == Content::Zeroes { 0 } else { extent.length }).sum();
    let mut writer = ChunkWriter::new(sealer, ZeroPolicy::Send, LIVE_CHUNK_BYTES, raw as usize);
    for (extent, piece) in pieces {
        match &piece.content {
            Content::Zeroes => writer.zeroes(*extent),
            Content::Data { data, skip } => {
                let index = index_of(data);
                if !lost.contains(&index) {
                    let start = starts[index] + *skip as usize;
                    writer.data(*extent, &buffer[start..start + extent.length as usize]);
                }
            }
        }
    }
    Ok(writer.finish(damaged))
}

/// Reads blocks of the disk, which are in disk order, and seals them; `holes` are sent as zeroes.
pub fn seal_blocks(
    worker: &mut Worker,
    disk: &dyn Disk,
    key: &ChunkKey,
    compression: Compression,
    blocks: &[Extent],
    holes: &[Extent],
    zero_policy: ZeroPolicy,
) -> Result<Sealed, PackError> {
    if let ([block], [], Compression::Off) = (blocks, holes, compression)
        && let Some(sealed) = seal_in_place(worker, disk, key, *block)?
    {
        return Ok(sealed);
    }
    let bytes: u64 = blocks.iter().map(|extent| extent.length).sum();
    let (sealer, buffer) = worker.tools(key, compression, bytes as usize);
    let mut rest = &mut buffer[..];
    for extent in blocks {
        let (now, later) = rest.split_at_mut(extent.length as usize);
        disk.read_at(extent.offset, now).map_err(|source| PackError::Disk { extent: *extent, source })?;
        rest = later;
    }
    let mut writer = ChunkWriter::new(sealer, zero_policy, CHUNK_BYTES_MAX, bytes as usize);
    let mut rest = &buffer[..];
    let mut holes = holes.iter().peekable();
    for extent in blocks {
        while let Some(hole) = holes.next_if(|hole| hole.offset < extent.offset) {
            writer.zeroes(*hole);
        }
        let (now, later) = rest.split_at(extent.length as usize);
        writer.data(*extent, now);
        rest = later;
    }
    holes.for_each(|hole| writer.zeroes(*hole));
    Ok(writer.finish(Vec::new()))
}

/// Reads one run of blocks to where it leaves from. `None` when some block of it is all zeroes, which is not sent as
/// data.
fn seal_in_place(
    worker: &mut Worker,
    disk: &dyn Disk,
    key: &ChunkKey,
    run: Extent,
) -> Result<Option<Sealed>, PackError> {
    if !run.offset.is_multiple_of(ZERO_BLOCK_BYTES) {
        return Ok(None);
    }
    let count = run.length.div_ceil(CHUNK_BYTES_MAX as u64) as usize;
    let mut room = worker.room(run.length as usize + count * IN_PLACE_AT);
    let (sealer, _) = worker.tools(key, Compression::Off, 0);
    let mut hashes = Vec::with_capacity(count);
    let mut offset = run.offset;
    for chunk in room.as_mut_slice().chunks_mut(IN_PLACE_AT + CHUNK_BYTES_MAX) {
        let data = &mut chunk[IN_PLACE_AT..];
        let extent = Extent::new(offset, data.len() as u64);
        disk.read_at(offset, data).map_err(|source| PackError::Disk { extent, source })?;
        if data.chunks_exact(ZERO_BLOCK_BYTES as usize).any(is_zero) {
            return Ok(None);
        }
        hashes.push(sealer.seal_in_place(extent, chunk));
        offset = extent.end();
    }
    Ok(Some(Sealed { chunks: room.freeze(), hashes, raw_bytes: run.length, damaged: Vec::new() }))
}
