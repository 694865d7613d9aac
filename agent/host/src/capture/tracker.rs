//! What a tracker tells: which blocks of a disk that others write changed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::disk::RemoteDisk;
use tidemark_base::{DiskId, ExtentSet};

use crate::freeze::{FreezeError, Frozen};

/// Knows which granules changed, and forgets none before somebody took it.
///
/// *Consistency.* A granule is dirty from the submission of a write to it, and again from its completion. [`Tracker::claim`] moves it
/// to what is claimed, and [`Tracker::release`] forgets it: what changed is in one of the two at any instant. *Crash.* Both survive a kill of
/// this process.
pub trait Tracker: Send + Sync {
    /// The session that this tracker saw everything since, if it did.
    fn witnessed(&self) -> Option<[u8; 16]>;

    /// Everything that it did not see is in a durable scan; `session` reads it from now on.
    fn arm(&self, session: [u8; 16]);

    /// Something changed that was not claimed.
    fn is_dirty(&self) -> bool;

    fn claim(&self) -> io::Result<()>;

    /// What was claimed and not released.
    fn claimed(&self) -> ExtentSet;

    /// What is not released is claimed again.
    fn release(&self, extents: &ExtentSet) -> io::Result<()>;

    /// Writes that were submitted and did not complete.
    fn in_flight(&self) -> io::Result<u64>;

    /// Why it may have missed something since it was armed, or since [`Tracker::forgive`].
    fn broken(&self) -> Option<String>;

    /// What it may have missed is in a durable scan.
    fn forgive(&self);

    /// Makes whoever writes to the disk keep still, for `limit` at most. `None`: there is nobody who can be asked to.
    fn freeze(&self, limit: Duration) -> Result<Option<Box<dyn Frozen>>, FreezeError>;

    /// Who reads the disk; `None`: this process, by itself.
    fn reader(&self) -> Option<Arc<dyn RemoteDisk>> {
        None
    }

    /// Who makes instants of the machine that the disk belongs to; `None`: one without writes must be waited for.
    fn instants(&self) -> Option<Arc<dyn Instants>> {
        None
    }

    /// Whether it still is the witness after a power cut of this host: what is released must be on durable media then.
    fn outlives_power_cuts(&self) -> bool {
        false
    }
}

/// Makes instants of all disks of a machine, while it writes to them.
pub trait Instants: Send + Sync {
    /// One instant of these disks; `None` where more than `bytes_max` of one changed. Claims what changed.
    fn take(&self, disks: &[DiskId], bytes_max: u64) -> io::Result<Option<Box<dyn Changes>>>;

    /// How far apart instants are that nobody asked for.
    fn rest(&self) -> Duration;

    /// Whether it can make the applications of the machine quiet for an instant.
    fn makes_quiet(&self) -> bool {
        false
    }

    /// As [`Instants::take`], of applications that are quiet.
    fn take_quiet(&self, disks: &[DiskId], bytes_max: u64) -> io::Result<Option<Box<dyn Changes>>> {
        self.take(disks, bytes_max)
    }
}

/// What changed of each disk up to an instant, as it was then.
pub trait Changes: Send {
    fn changed(&self, disk: DiskId) -> ExtentSet;

    /// Part of what changed.
    fn read_at(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Once everything was read: whether all of it was of the instant.
    fn still_holds(&self) -> io::Result<()> {
        Ok(())
    }
}
