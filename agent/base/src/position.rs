//! Positions in one disk's order of writes.
//!
//! Each stage has one, and they keep this order:
//! `completed ≥ logged ≥ sent ≥ durable ≥ consistent ≥ folded`.
//!
//! A position is (epoch, sequence). Sequences count the records of one epoch from 1 and are never reused in it; an
//! epoch is a random number drawn at each attach that is not a proven clean continuation, so that two histories of one
//! disk are never mistaken for each other. Numbers alone prove nothing: a position travels with the running hash over
//! the records before it, and only an equal hash makes two positions the same.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One unbroken history of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(#[serde(with = "hex_array")] pub [u8; 16]);

impl Epoch {
    pub fn random() -> Self {
        Self(*crate::random::uuid().as_bytes())
    }

    /// The hash that the first record of this epoch follows.
    pub fn first_hash(&self) -> HistoryHash {
        HistoryHash(blake3::derive_key("tidemark 2026-11 history hash of an empty epoch", &self.0))
    }

    /// The position before the first record of this epoch.
    pub fn start(self) -> Position {
        Position { epoch: self, sequence: Sequence(0), hash: self.first_hash() }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight digits tell epochs apart in a log line.
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({self})")
    }
}

/// The number of a record in its epoch; the first is 1, 0 is the place before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sequence(pub u64);

impl Sequence {
    pub fn next(self) -> Sequence {
        Sequence(self.0 + 1)
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The running BLAKE3 over an epoch's records.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HistoryHash(#[serde(with = "hex_array")] pub [u8; 32]);

impl fmt::Debug for HistoryHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HistoryHash(")?;
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, "…)")
    }
}

/// A place in a disk's history, with the proof that it is this history.
///
/// Positions of different epochs have no order of their own; the process server's journal knows which came first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Position {
    pub epoch: Epoch,
    pub sequence: Sequence,
    pub hash: HistoryHash,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.sequence)
    }
}

mod hex_array {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(from: D) -> Result<[u8; N], D::Error> {
        let text = String::deserialize(from)?;
        let mut bytes = [0; N];
        if text.len() != 2 * N || !text.is_ascii() {
            return Err(D::Error::custom(format!("expected {} hexadecimal digits", 2 * N)));
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(D::Error::custom)?;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_survives_json() {
        let position = Epoch::random().start();
        let text = serde_json::to_string(&position).unwrap();
        assert_eq!(serde_json::from_str::<Position>(&text).unwrap(), position);
    }

    #[test]
    fn epochs_start_with_different_hashes() {
        assert_ne!(Epoch([1; 16]).first_hash(), Epoch([2; 16]).first_hash());
    }

    #[test]
    fn hex_of_another_length_or_alphabet_is_refused() {
        for text in ["\"\"", "\"00\"", "\"zz000000000000000000000000000000\"", "\"éé00000000000000000000000000\""] {
            assert!(serde_json::from_str::<Epoch>(text).is_err(), "{text}");
        }
    }
}
