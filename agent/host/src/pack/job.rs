//! What a worker does: read, verify, seal. One job, one frame.

use std::io;

use tidemark_base::Extent;
use tidemark_base::chunk::{ChunkKey, Compression};
use tidemark_base::disk::Disk;

use super::chunks::ChunkWriter;
use super::{Content, Piece, Sealed, Worker, ZeroPolicy};
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
    let mut writer = ChunkWriter::new(sealer, ZeroPolicy::Send, raw as usize);
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
    let bytes: u64 = blocks.iter().map(|extent| extent.length).sum();
    let (sealer, buffer) = worker.tools(key, compression, bytes as usize);
    let mut rest = &mut buffer[..];
    for extent in blocks {
        let (now, later) = rest.split_at_mut(extent.length as usize);
        disk.read_at(extent.offset, now).map_err(|source| PackError::Disk { extent: *extent, source })?;
        rest = later;
    }
    let mut writer = ChunkWriter::new(sealer, zero_policy, bytes as usize);
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
