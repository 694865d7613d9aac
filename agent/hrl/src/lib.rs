//! The log of one disk's writes: Hyper-V Replica Log files, each with a companion for what that format cannot say.
//!
//! [`format`] is the format of others, [`companion`] ours beside it. [`ActiveLog`] writes both, [`LogReader`] reads
//! them, also while they are written, [`Examination`] decides what a log that was not closed is worth, [`LogChain`]
//! is all logs of a disk. [`tools`] work on `.hrl` files of anyone.
//!
//! The folder of a disk's logs holds `<stem>.00000001.hrl` and `<stem>.00000001.companion`, and so on; the stem is the
//! file name of the disk's image.

pub mod format;

mod hash;

mod name;

mod log;

pub mod companion;

mod active;

mod reader;

mod recovery;

mod chain;

mod error;

pub mod tools;

pub use active::{ActiveLog, Append, LogSync, MARK_BODY_BYTES_MAX, PreparedLog, RECORD_BYTES_MAX, ZEROES_BYTES_MAX};
pub use chain::{ChainRecord, ChainRecords, Forgotten, Found, LogChain};
pub use error::{Failure, LogError, Result};
pub use hash::{DataHash, DataHasher};
pub use name::LogName;
pub use reader::{LogReader, Record, RecordKind, Records};
pub use recovery::{Cause, Examination, Held, LostMark, Verdict, recover};
