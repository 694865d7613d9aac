//! What every stage of Tidemark stands on: names, positions, time, extents, disks, durable files, chunks, stopping.
//!
//! No tokio and no network here: everything blocks, on a thread of its caller. The traits [`disk::Disk`],
//! [`storage::Storage`] and [`time::Clock`] are the seam through which the same code runs on a real machine and under
//! a seed.

pub mod bits;
pub mod chunk;
pub mod compare;
pub mod disk;
pub mod error;
pub mod extent;
pub mod ids;
pub mod meter;
mod platform;
pub mod position;
pub mod random;
pub mod sabotage;
pub mod seam;
pub mod size;
pub mod stop;
pub mod storage;
pub mod sync;
pub mod tally;
pub mod thread;
pub mod time;
pub mod trust;
pub mod words;

pub use bits::Bits;
pub use extent::{Extent, ExtentMap, ExtentSet};
pub use ids::{DiskId, Generation, HostId, MachineId, MarkId, ServerId};
pub use position::{Epoch, HistoryHash, Position, Sequence};
pub use time::{Clock, SystemClock, Timestamp};

/// The smallest unit of a disk: offsets and lengths of records, chunks and disks are multiples of it.
pub const SECTOR_BYTES: u64 = 512;

/// The most payload that one chunk carries.
pub const CHUNK_BYTES_MAX: usize = 256 << 10;

/// The most encoded chunks that one frame on the wire carries.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
