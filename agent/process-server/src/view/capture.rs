//! What the way home needs to know of a machine's layer: which parts of 4 KiB were written since the failover, which of them
//! home does not have, and what they held at one instant.
//!
//! All of it is in memory, under the lock of the layer's map, but for `written.live`, which is made as `disk.live` is and holds the
//! parts that the machine wrote. It counts in its boot alone. In another boot everything that is in the layer counts as
//! written: a part that is not in the layer shows the point, so that this is never too little.
//!
//! *Consistency.* A part is noted before it is written. A claim that is frozen keeps what a part held before the first write to
//! it. *Retries.* A claim that is given up goes back into what home does not have. *Cancellation* and *Crash.* Claims end with
//! the process; what home does not have is then everything that was written since the failover.

use std::io;
use std::sync::Arc;

use tidemark_base::storage::StorageFile;
use tidemark_base::{Bits, Extent};

pub struct Capture {
    pub written: Bits,
    pub written_live: Option<Arc<dyn StorageFile>>,
    /// Where the bits begin in the file.
    pub live_at: u64,
    /// What home does not have; `None`: nobody said yet what it has.
    pub behind: Option<Bits>,
    pub claim: Option<Claim>,
}

/// What one round is about.
pub struct Claim {
    pub round: u64,
    pub parts: Bits,
    pub frozen: Option<Frozen>,
}

/// The disk as it was when the round began, for the parts of the round that were written since.
pub struct Frozen {
    pub file: Arc<dyn StorageFile>,
    pub saved: Bits,
    /// A part could not be kept: the machine goes on, the round does not.
    pub failed: Option<String>,
}

impl Capture {
    /// Knows nothing, and notes nothing durable: of a layer that does not last.
    pub fn new(disk_bytes: u64) -> Self {
        Self { written: Bits::new(disk_bytes), written_live: None, live_at: 0, behind: None, claim: None }
    }

    /// A write to `extent` is about to begin.
    pub fn note(&mut self, extent: Extent) -> io::Result<()> {
        if let Some(behind) = &mut self.behind {
            behind.insert(extent);
        }
        let is_new = self.written_live.is_some() && self.written.insert(extent);
        if let (true, Some(live)) = (is_new, &self.written_live) {
            let (at, bytes) = self.written.stored(extent);
            live.write_at(self.live_at + at, &bytes)?;
        }
        Ok(())
    }

    /// The parts of `extent` whose content must be kept before it is written.
    pub fn unsaved(&self, extent: Extent) -> Vec<Extent> {
        let Some(Claim { parts, frozen: Some(frozen), .. }) = &self.claim else { return Vec::new() };
        if frozen.failed.is_some() {
            return Vec::new();
        }
        tidemark_base::compare::pieces(whole_parts(extent, parts.disk_bytes()), tidemark_base::bits::PART_BYTES)
            .filter(|part| parts.contains(part.offset) && !frozen.saved.contains(part.offset))
            .collect()
    }

    /// What a part held is kept, or was not to be had.
    pub fn saved(&mut self, part: Extent, content: io::Result<Vec<u8>>) {
        let Some(Claim { frozen: Some(frozen), .. }) = &mut self.claim else { return };
        match content.and_then(|content| frozen.file.write_at(part.offset, &content)) {
            Ok(()) => _ = frozen.saved.insert(part),
            Err(error) => frozen.failed = Some(error.to_string()),
        }
    }

    /// The round is over. What it was about goes back, unless home has it.
    pub fn end(&mut self, is_durable: bool) {
        if let (Some(claim), false) = (self.claim.take(), is_durable) {
            match &mut self.behind {
                Some(behind) => behind.unite(&claim.parts),
                None => self.behind = Some(claim.parts),
            }
        }
    }
}

/// `extent`, made longer to whole parts.
fn whole_parts(extent: Extent, disk_bytes: u64) -> Extent {
    let part = tidemark_base::bits::PART_BYTES;
    let offset = extent.offset / part * part;
    Extent::new(offset, extent.end().next_multiple_of(part).min(disk_bytes) - offset)
}
