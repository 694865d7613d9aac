//! Refusals: why a server ends a stream, and what to do.

use super::{WireError, wire};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RefusalReason {
    /// This certificate may not write this disk.
    NotAuthorised,
    UnknownDisk,
    /// Superseded: the disk moved on to a newer generation.
    Generation,
    /// A newer session of the same identity took the stream over.
    Fenced,
    /// A cut does not begin where the journal stands.
    Gap,
    /// A hash, a length or an encoding does not hold.
    Damaged,
    SizeChanged,
    /// Retry later; nothing was lost.
    NoRoom,
    /// The journal failed and must be reopened.
    StoreFailed,
    Version,
    /// Frames in an order that the protocol does not allow.
    Protocol,
    /// The server stops; come back.
    Stopping,
    /// Epoch or hash unknown here.
    History,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub reason: RefusalReason,
    /// What happened, naming the disk.
    pub message: String,
    /// What to do.
    pub help: String,
}

/// What is kept of texts that the other side chose, in bytes.
const TEXT_BYTES_MAX: usize = 1024;

fn bounded(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let end = (0..=TEXT_BYTES_MAX).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

impl TryFrom<wire::Refusal> for Refusal {
    type Error = WireError;

    fn try_from(wire: wire::Refusal) -> Result<Self, WireError> {
        use wire::RefusalReason as From;
        let reason = match wire.reason() {
            From::NotAuthorised => RefusalReason::NotAuthorised,
            From::UnknownDisk => RefusalReason::UnknownDisk,
            From::Generation => RefusalReason::Generation,
            From::Fenced => RefusalReason::Fenced,
            From::Gap => RefusalReason::Gap,
            From::Damaged => RefusalReason::Damaged,
            From::SizeChanged => RefusalReason::SizeChanged,
            From::NoRoom => RefusalReason::NoRoom,
            From::StoreFailed => RefusalReason::StoreFailed,
            From::Version => RefusalReason::Version,
            From::Protocol => RefusalReason::Protocol,
            From::Stopping => RefusalReason::Stopping,
            From::History => RefusalReason::History,
            From::Invalid => return Err(WireError::Value { field: "refusal reason", value: wire.reason as u64 }),
        };
        Ok(Self { reason, message: bounded(wire.message), help: bounded(wire.help) })
    }
}

impl From<Refusal> for wire::Refusal {
    fn from(refusal: Refusal) -> Self {
        use wire::RefusalReason as To;
        let reason = match refusal.reason {
            RefusalReason::NotAuthorised => To::NotAuthorised,
            RefusalReason::UnknownDisk => To::UnknownDisk,
            RefusalReason::Generation => To::Generation,
            RefusalReason::Fenced => To::Fenced,
            RefusalReason::Gap => To::Gap,
            RefusalReason::Damaged => To::Damaged,
            RefusalReason::SizeChanged => To::SizeChanged,
            RefusalReason::NoRoom => To::NoRoom,
            RefusalReason::StoreFailed => To::StoreFailed,
            RefusalReason::Version => To::Version,
            RefusalReason::Protocol => To::Protocol,
            RefusalReason::Stopping => To::Stopping,
            RefusalReason::History => To::History,
        };
        Self { reason: reason as i32, message: refusal.message, help: refusal.help }
    }
}
