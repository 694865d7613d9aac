//! Records of one cut, or blocks of the disk, become frames of sealed chunks.
//!
//! ```text
//! records → gather (extent map: later replaces earlier) → pieces in disk order ┐
//!                                                                              ├→ jobs → workers (read, verify, seal) → frames in order
//! scan: blocks of the disk ────────────────────────────────────────────────────┘
//! ```
//!
//! One job makes one frame: 256 or 512 KiB of raw data, read on the worker that seals it, so that a disk's data crosses
//! no thread before it is sealed. A job runs only with a [`Permit`] for the memory that it needs; the permit rides with
//! the frame until the link took it.
//!
//! A cut of any length is packed in bounded memory. When the map of its extents outgrows [`MAP_ENTRIES_MAX`], the upper
//! half of the disk is dropped from it, the lower half is emitted, and the records are read again for the rest: the
//! closed log is read once more for each pass, and the map never grows past its limit.
//!
//! *Consistency.* Extents of one cut never overlap. Stored data is verified against the log's hash before it is sealed
//! under the chunk's own. *Retries.* None: what cannot be read back is named, and its blocks are scanned.
//! *Cancellation.* Dropping a [`Ticket`] cancels a job that did not start; one that runs ends within milliseconds.
//! *Crash.* Nothing here is durable.

mod budget;
mod chunks;
mod compare;
mod gather;
mod job;
mod level;
mod room;
mod workers;

pub use budget::{Budget, Permit};
pub use chunks::{Sealed, ZeroPolicy};
pub use compare::{Differing, HashedBlock, Held, HeldPart, hash_blocks, seal_differing};
pub use gather::{Content, CutLimits, CutPieces, CutSpan, Piece, Records};
pub use job::{PackError, seal_blocks, seal_pieces};
pub use level::{CompressionPolicy, Level, Waits};
pub use workers::{Lost, Priority, Ticket, Worker, Workers};

/// Data in one chunk of live changes: it is recovered in small pieces while it is young, and a chunk is read, proven and
/// unfolded as a whole. Chunks of a scan are as long as the format allows.
pub const LIVE_CHUNK_BYTES: usize = 64 << 10;
const _: () = assert!(LIVE_CHUNK_BYTES <= tidemark_base::CHUNK_BYTES_MAX);

/// Extents that the map of one pass over a cut holds: about 20 MiB.
pub const MAP_ENTRIES_MAX: usize = 128 << 10;

/// Raw bytes in one frame when nothing is compressed: 256 KiB frames were the fastest on the wire, larger ones fall out
/// of the processor's cache.
pub const FRAME_RAW_BYTES: u64 = 256 << 10;
/// And when they are compressed, to about that size.
pub const FRAME_RAW_BYTES_COMPRESSED: u64 = 512 << 10;

/// What a frame needs beyond its raw bytes: headers and extent tables of its chunks.
const FRAME_OVERHEAD_BYTES: u64 = 64 << 10;
const _: () = assert!(FRAME_RAW_BYTES_COMPRESSED + FRAME_OVERHEAD_BYTES <= tidemark_base::FRAME_BYTES_MAX as u64);

/// The raw bytes that a frame should carry.
pub fn frame_raw_bytes(compression: tidemark_base::chunk::Compression) -> u64 {
    match compression {
        tidemark_base::chunk::Compression::Off => FRAME_RAW_BYTES,
        tidemark_base::chunk::Compression::Level(_) => FRAME_RAW_BYTES_COMPRESSED,
    }
}

/// The memory that a job with so many raw bytes needs at most, until its frame left.
pub fn job_bytes(raw: u64) -> u64 {
    raw + FRAME_OVERHEAD_BYTES
}
