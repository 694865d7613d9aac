use blake3::Hasher;
use tidemark_base::{DiskId, HistoryHash, Sequence, Timestamp};
use uuid::Uuid;

use crate::companion::SlotKind;
use crate::format::checksum;

/// What proves the data of a record: keyed BLAKE3, and the weak checksum that goes into the HRL entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataHash {
    pub(crate) digest: [u8; 32],
    pub(crate) checksum: u32,
}

impl DataHash {
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

/// Hashes data under a key that belongs to the disk, so that data of another disk does not verify. Cheap to clone and
/// meant to be used outside of the log's lock.
#[derive(Clone)]
pub struct DataHasher {
    key: [u8; 32],
}

impl DataHasher {
    pub fn new(disk: DiskId) -> Self {
        Self { key: blake3::derive_key("tidemark 2026-11 data of one disk's log records", disk.as_bytes()) }
    }

    pub fn hash(&self, data: &[u8]) -> DataHash {
        DataHash { digest: *blake3::keyed_hash(&self.key, data).as_bytes(), checksum: checksum(data) }
    }

    pub(crate) fn digest(&self, data: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.key, data).as_bytes()
    }

    /// For data that is read in parts.
    pub(crate) fn in_parts(&self) -> Hasher {
        Hasher::new_keyed(&self.key)
    }
}

/// The digest of a record of zeroes, whatever its length.
pub(crate) const ZEROES_DIGEST: [u8; 32] = [0; 32];

/// The key of a companion's slots: bound to the disk and to this one log, so that a slot of another does not verify.
pub(crate) fn slot_key(disk: DiskId, log: Uuid) -> [u8; 32] {
    let mut material = [0; 32];
    material[..16].copy_from_slice(disk.as_bytes());
    material[16..].copy_from_slice(log.as_bytes());
    blake3::derive_key("tidemark 2026-11 slots of one companion", &material)
}

/// What of a record makes history. Neither the place of its data nor the log that holds it does, so that records can
/// be packed anew without changing the history.
pub(crate) struct Event<'a> {
    pub sequence: Sequence,
    pub kind: SlotKind,
    pub time: Timestamp,
    pub offset: u64,
    /// Of a mark: its body's.
    pub length: u64,
    pub digest: &'a [u8; 32],
}

/// The running hash after a record.
pub(crate) fn history_after(before: HistoryHash, event: &Event<'_>) -> HistoryHash {
    // 120 bytes are two BLAKE3 blocks.
    let mut bytes = [0; 120];
    bytes[..16].copy_from_slice(b"tidemark record\0");
    bytes[16..48].copy_from_slice(&before.0);
    bytes[48..56].copy_from_slice(&event.sequence.0.to_le_bytes());
    bytes[56..64].copy_from_slice(&(event.kind as u64).to_le_bytes());
    bytes[64..72].copy_from_slice(&event.time.0.to_le_bytes());
    bytes[72..80].copy_from_slice(&event.offset.to_le_bytes());
    bytes[80..88].copy_from_slice(&event.length.to_le_bytes());
    bytes[88..120].copy_from_slice(event.digest);
    HistoryHash(*blake3::hash(&bytes).as_bytes())
}
