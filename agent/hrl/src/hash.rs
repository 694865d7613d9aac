use tidemark_base::{DiskId, HistoryHash, Sequence, Timestamp};
use twox_hash::XxHash3_128;
use uuid::Uuid;

use crate::companion::SlotKind;
use crate::format::{checksum, u64_at};

/// What proves the data of a record: a keyed digest, and the weak checksum that goes into the HRL entry.
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

/// Bytes of the secret that XXH3 mixes with the data.
const SECRET_BYTES: usize = 192;

/// Hashes data under a key that belongs to the disk, so that data of another disk does not verify. Cheap to clone and
/// meant to be used outside of the log's lock.
///
/// The digest is XXH3, not BLAKE3: see the companion's format for what it has to withstand.
#[derive(Clone)]
pub struct DataHasher {
    seed: u64,
    secret: [u8; SECRET_BYTES],
    mark_key: [u8; 32],
}

impl DataHasher {
    pub fn new(disk: DiskId) -> Self {
        let mut key = [0; 8 + SECRET_BYTES];
        let mut deriving = blake3::Hasher::new_derive_key("tidemark 2026-11 data of one disk's log records, XXH3");
        deriving.update(disk.as_bytes()).finalize_xof().fill(&mut key);
        let mut secret = [0; SECRET_BYTES];
        secret.copy_from_slice(&key[8..]);
        Self {
            seed: u64_at(&key, 0),
            secret,
            mark_key: blake3::derive_key("tidemark 2026-11 bodies of one disk's marks", disk.as_bytes()),
        }
    }

    pub fn hash(&self, data: &[u8]) -> DataHash {
        DataHash { digest: self.digest(data), checksum: checksum(data) }
    }

    /// [`DataHash::digest`] alone, to verify what was read.
    pub fn digest(&self, data: &[u8]) -> [u8; 32] {
        let hash = XxHash3_128::oneshot_with_seed_and_secret(self.seed, &self.secret, data);
        widen(hash.expect("the secret is longer than the 136 bytes that are needed"))
    }

    /// For data that is read in parts.
    pub(crate) fn in_parts(&self) -> PartsHasher {
        let hasher = XxHash3_128::with_seed_and_secret(self.seed, self.secret);
        PartsHasher(hasher.unwrap_or_else(|_| unreachable!("the secret is longer than the 136 bytes that are needed")))
    }

    pub(crate) fn mark_digest(&self, body: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.mark_key, body).as_bytes()
    }
}

/// [`DataHasher::digest`] of data that comes piece by piece.
pub(crate) struct PartsHasher(XxHash3_128);

impl PartsHasher {
    pub(crate) fn update(&mut self, part: &[u8]) {
        self.0.write(part);
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        widen(self.0.finish_128())
    }
}

fn widen(hash: u128) -> [u8; 32] {
    let mut digest = [0; 32];
    digest[..16].copy_from_slice(&hash.to_le_bytes());
    digest
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

#[cfg(test)]
mod tests {
    use super::*;

    fn hasher(disk: u8) -> DataHasher {
        DataHasher::new(DiskId::from_bytes([disk; 16]))
    }

    /// The digest is part of the format: a log must verify under every later version and on every processor.
    #[test]
    fn the_digest_is_what_it_always_was() {
        let data: Vec<u8> = (0..200_000u32).map(|index| (index % 251) as u8).collect();
        let digests: Vec<String> =
            [512, 4096, 200_000].iter().map(|&bytes| to_hex(&hasher(7).digest(&data[..bytes])[..16])).collect();
        assert_eq!(digests, KNOWN);
    }

    const KNOWN: [&str; 3] =
        ["659c908e506fc14002aca3ee583eaa15", "eaa93578c2f84922d7461d51472ee134", "4e5af923ee77709413a7c61fc07a92c1"];

    fn to_hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn parts_hash_like_the_whole_and_each_disk_has_its_own() {
        let data: Vec<u8> = (0..100_000u32).map(|index| (index % 253) as u8).collect();
        for cut in [0, 1, 512, 65_536, data.len()] {
            let mut parts = hasher(1).in_parts();
            parts.update(&data[..cut]);
            parts.update(&data[cut..]);
            assert_eq!(parts.digest(), hasher(1).digest(&data), "cut at {cut}");
        }
        assert_ne!(hasher(1).digest(&data), hasher(2).digest(&data));
        assert_ne!(hasher(1).digest(&data[..512]), hasher(2).digest(&data[..512]));
        assert_ne!(hasher(1).mark_digest(b"mark"), hasher(2).mark_digest(b"mark"));
    }
}
