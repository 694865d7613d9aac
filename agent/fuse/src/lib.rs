//! A disk as a file: any program opens it by its path, and each of its requests comes to an [`Export`](tidemark_nbd::Export), as those of an
//! NBD client do. Used on both ends: for protected disks and for served recovery points.
//!
//! Each file is a mount of its own, a FUSE file system that consists of nothing but that file: one disk that hangs keeps no other waiting, and
//! unmounting ends whoever has this one open and nobody else.
//!
//! *Consistency.* The kernel keeps nothing of a writable file: every read and every write comes here (no page cache, no write-back), a write returns
//! to its program when the export acknowledged it, `fsync` and O_DSYNC when it is durable. Only what is mapped is cached, until `msync`. Writes that are no
//! whole sectors are made whole under a lock that keeps all others out. A read-only file is cached: it never changes.
//! *Retries.* None. *Cancellation.* [`FuseFile::close`] lets the requests that were received finish, then aborts the connection: programs that still have
//! the file open get ENOTCONN for everything from then on.
//! *Crash.* The kernel aborts the connection of a process that is gone: requests that were not acknowledged fail with ECONNABORTED or ENOTCONN,
//! everything after them with ENOTCONN, and so does opening the path (the dead mount stays, so that nobody writes to what lies beneath). The next
//! [`FuseFile::serve`] of the same path takes the dead mount away and mounts anew; programs open the file again, loop devices are made again.

mod door;
mod error;
mod file;
mod mount;

pub use error::FuseError;
pub use mount::{FuseFile, clear_dead, probe};
