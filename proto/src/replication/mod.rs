//! The data path between a host and a process server.
//!
//! [`wire`] is generated from `replication.proto`. What arrives is untrusted until a `TryFrom` made it one of the
//! types here: lengths hold, enumerations are known, ids are not zero, labels are bounded. What leaves is made by `From`.

mod compare;
mod credit;
mod cut;
mod frame;
mod mark;
mod refusal;

pub mod wire {
    tonic::include_proto!("tidemark.replication.v1");
}

/// The one method of the service.
pub const REPLICATE: &str = "/tidemark.replication.v1.Replication/Replicate";

pub use compare::{
    Claim, DIFFERING_RUNS_MAX, Differing, DifferingRun, Found, HashedRun, Hashes, NEED_EXTENTS_MAX, Need, NeedReason,
    QUESTION_BLOCKS_MAX, QUESTION_RUNS_MAX, QUESTIONS_MAX,
};
pub use credit::Credit;
pub use cut::{CutEnd, CutKind, CutOrdinal};
pub use frame::{Close, Data, Durable, Hello, HostFrame, PROTOCOL_VERSION, ServerFrame, SessionId, Welcome};
pub use mark::{Consistency, LABEL_BYTES_MAX, MARK_DISKS_MAX, Mark};
pub use refusal::{Refusal, RefusalReason};

use tidemark_base::{Epoch, HistoryHash, Position, Sequence};

/// Why a frame is not one of ours. The stream that carried it is closed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    #[error("a frame cannot be decoded: {0}")]
    Encoding(String),
    #[error("a frame has no body that this version knows")]
    Empty,
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field} has {bytes} bytes")]
    Length { field: &'static str, bytes: usize },
    #[error("{field} has the value {value}, which is not allowed")]
    Value { field: &'static str, value: u64 },
    #[error("{0}")]
    Contradiction(&'static str),
}

/// Turns bytes of the wire into an array.
fn array<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Length { field, bytes: bytes.len() })
}

/// Takes an id, which is 16 bytes and not zero.
macro_rules! id {
    ($kind:ty, $field:literal, $bytes:expr) => {{
        let bytes = $bytes;
        <$kind>::from_slice(&bytes).ok_or($crate::replication::WireError::Length { field: $field, bytes: bytes.len() })
    }};
}
use id;

/// A number that may not be zero.
fn positive(field: &'static str, value: u64) -> Result<u64, WireError> {
    if value == 0 { Err(WireError::Value { field, value }) } else { Ok(value) }
}

impl TryFrom<wire::Position> for Position {
    type Error = WireError;

    fn try_from(wire: wire::Position) -> Result<Self, WireError> {
        let epoch = Epoch(array("epoch", &wire.epoch)?);
        if epoch.0 == [0; 16] {
            return Err(WireError::Value { field: "epoch", value: 0 });
        }
        let position = Position {
            epoch,
            sequence: Sequence(wire.sequence),
            hash: HistoryHash(array("history hash", &wire.hash)?),
        };
        if wire.sequence == 0 && position != epoch.start() {
            return Err(WireError::Contradiction(
                "a position at sequence 0 has another hash than its epoch begins with",
            ));
        }
        Ok(position)
    }
}

impl From<Position> for wire::Position {
    fn from(position: Position) -> Self {
        Self { epoch: position.epoch.0.to_vec(), sequence: position.sequence.0, hash: position.hash.0.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_checked_on_arrival() {
        let position = Epoch([7; 16]).start();
        let good: wire::Position = position.into();
        assert_eq!(Position::try_from(good.clone()), Ok(position));
        let short = wire::Position { epoch: vec![1; 15], ..good.clone() };
        assert_eq!(Position::try_from(short), Err(WireError::Length { field: "epoch", bytes: 15 }));
        let none = wire::Position { epoch: vec![0; 16], ..good.clone() };
        assert!(Position::try_from(none).is_err());
        let forged = wire::Position { hash: vec![0; 32], ..good };
        assert!(matches!(Position::try_from(forged), Err(WireError::Contradiction(_))));
    }
}
