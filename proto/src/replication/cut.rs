//! The end of a cut: only with it may any of the cut's chunks be used.

use std::fmt;

use tidemark_base::{Position, Timestamp};

use super::{Mark, WireError, array, positive, wire};

/// Counts the cuts of one disk's journal; the first is 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct CutOrdinal(pub u64);

impl CutOrdinal {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for CutOrdinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CutKind {
    /// Records `(from, to]`; none of them is a heartbeat.
    Records,
    /// Blocks read from the disk; the position does not move.
    Scan,
    /// From here to the next scan end the replica is not consistent. May begin a new epoch.
    ScanStart,
    /// Records up to the barrier mark E: consistent from here on.
    ScanEnd,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CutEnd {
    pub cut: CutOrdinal,
    pub kind: CutKind,
    pub from: Position,
    pub to: Position,
    /// The time of the cut's last record, or of the heartbeat; never decreases along a disk.
    pub time: Timestamp,
    pub clock_stepped: bool,
    pub chunks: u64,
    pub chunk_bytes: u64,
    /// BLAKE3 over the chunks' hashes in order.
    pub chunks_hash: [u8; 32],
    /// What the guest wrote in these records.
    pub written_bytes: u64,
    /// Present when no write was in flight at `to`.
    pub mark: Option<Mark>,
}

impl CutEnd {
    /// What can be said of a cut without knowing the one before it.
    fn check(&self) -> Result<(), WireError> {
        let moves = self.from != self.to;
        if self.from.epoch != self.to.epoch {
            return Err(WireError::Contradiction("a cut's records are of two epochs"));
        }
        if self.to.sequence < self.from.sequence || (moves && self.to.sequence == self.from.sequence) {
            return Err(WireError::Contradiction("a cut does not end after it began"));
        }
        match self.kind {
            CutKind::Scan | CutKind::ScanStart if moves => {
                Err(WireError::Contradiction("the position moves in a cut of a scan"))
            }
            CutKind::Scan | CutKind::ScanStart if self.mark.is_some() => {
                Err(WireError::Contradiction("a cut of a scan carries a mark"))
            }
            CutKind::ScanStart if self.chunks > 0 => Err(WireError::Contradiction("the start of a scan carries data")),
            CutKind::ScanEnd if self.mark.is_none() => {
                Err(WireError::Contradiction("the end of a scan carries no mark"))
            }
            CutKind::Records if !moves && (self.chunks > 0 || self.mark.is_some()) => {
                Err(WireError::Contradiction("a heartbeat carries data or a mark"))
            }
            _ if (self.chunks == 0) != (self.chunk_bytes == 0) => {
                Err(WireError::Contradiction("a cut has chunks without bytes, or bytes without chunks"))
            }
            _ => Ok(()),
        }
    }
}

impl TryFrom<wire::CutEnd> for CutEnd {
    type Error = WireError;

    fn try_from(wire: wire::CutEnd) -> Result<Self, WireError> {
        let kind = match wire.kind() {
            wire::CutKind::Records => CutKind::Records,
            wire::CutKind::Scan => CutKind::Scan,
            wire::CutKind::ScanStart => CutKind::ScanStart,
            wire::CutKind::ScanEnd => CutKind::ScanEnd,
            wire::CutKind::Invalid => return Err(WireError::Value { field: "cut kind", value: wire.kind as u64 }),
        };
        let cut = Self {
            cut: CutOrdinal(positive("the ordinal of a cut", wire.cut)?),
            kind,
            from: wire.from.ok_or(WireError::Missing("the position that a cut begins at"))?.try_into()?,
            to: wire.to.ok_or(WireError::Missing("the position that a cut ends at"))?.try_into()?,
            time: Timestamp(positive("the time of a cut", wire.time_ns)?),
            clock_stepped: wire.clock_stepped,
            chunks: wire.chunks,
            chunk_bytes: wire.chunk_bytes,
            chunks_hash: array("the hash of a cut's chunks", &wire.chunks_hash)?,
            written_bytes: wire.written_bytes,
            mark: wire.mark.map(Mark::try_from).transpose()?,
        };
        cut.check()?;
        Ok(cut)
    }
}

impl From<CutEnd> for wire::CutEnd {
    fn from(cut: CutEnd) -> Self {
        Self {
            cut: cut.cut.0,
            kind: match cut.kind {
                CutKind::Records => wire::CutKind::Records,
                CutKind::Scan => wire::CutKind::Scan,
                CutKind::ScanStart => wire::CutKind::ScanStart,
                CutKind::ScanEnd => wire::CutKind::ScanEnd,
            } as i32,
            from: Some(cut.from.into()),
            to: Some(cut.to.into()),
            time_ns: cut.time.0,
            clock_stepped: cut.clock_stepped,
            chunks: cut.chunks,
            chunk_bytes: cut.chunk_bytes,
            chunks_hash: cut.chunks_hash.to_vec(),
            written_bytes: cut.written_bytes,
            mark: cut.mark.map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::{Epoch, HistoryHash, Sequence};

    fn heartbeat() -> wire::CutEnd {
        let at = Epoch([3; 16]).start();
        CutEnd {
            cut: CutOrdinal(1),
            kind: CutKind::Records,
            from: at,
            to: at,
            time: Timestamp(1),
            clock_stepped: false,
            chunks: 0,
            chunk_bytes: 0,
            chunks_hash: [0; 32],
            written_bytes: 0,
            mark: None,
        }
        .into()
    }

    #[test]
    fn a_cut_that_contradicts_itself_is_refused() {
        assert!(CutEnd::try_from(heartbeat()).is_ok());
        let later = Position {
            sequence: Sequence(4),
            hash: HistoryHash([1; 32]),
            ..Position::try_from(heartbeat().to.unwrap()).unwrap()
        };
        let other_epoch = Epoch([4; 16]).start();
        let scan = wire::CutKind::Scan as i32;
        for bad in [
            wire::CutEnd { cut: 0, ..heartbeat() },
            wire::CutEnd { kind: 0, ..heartbeat() },
            wire::CutEnd { kind: 77, ..heartbeat() },
            wire::CutEnd { from: None, ..heartbeat() },
            wire::CutEnd { from: Some(later.into()), ..heartbeat() },
            wire::CutEnd { to: Some(other_epoch.into()), ..heartbeat() },
            wire::CutEnd { kind: scan, to: Some(later.into()), ..heartbeat() },
            wire::CutEnd { chunks: 1, chunk_bytes: 90, ..heartbeat() },
            wire::CutEnd { to: Some(later.into()), chunks: 1, ..heartbeat() },
            wire::CutEnd { kind: wire::CutKind::ScanEnd as i32, to: Some(later.into()), ..heartbeat() },
            wire::CutEnd { chunks_hash: vec![], ..heartbeat() },
        ] {
            assert!(CutEnd::try_from(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
