//! Hashes of blocks that two ends compare.
//!
//! A hash is 16 bytes of BLAKE3, keyed with the disk, its generation and the agent's session, which is 128 random bits that no
//! guest knows, and bound to the range that it is of. A truncation to 128 bits without a secret would let a guest look for two
//! blocks with one hash with 2⁶⁴ work; with the secret there is nothing to try it on, and what is left is chance: 2⁻¹²⁸ a block, which
//! is 2⁻¹⁰⁴ for a disk of 1 TiB. 32 bytes would double the traffic of a compare for no fault that happens.

use crate::{DiskId, Extent, Generation};

/// What one hash of a question is of, aligned on the disk.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// What one hash of an answer is of, aligned on the disk; nothing smaller is left out of what is sent.
pub const PART_BYTES: u64 = 4 << 10;

pub const BLOCK_HASH_BYTES: usize = 16;
pub type BlockHash = [u8; BLOCK_HASH_BYTES];

/// What hashes of one stream are keyed with.
#[derive(Clone)]
pub struct CompareKey([u8; 32]);

impl CompareKey {
    pub fn new(disk: DiskId, generation: Generation, session: [u8; 16]) -> Self {
        let mut context = [0; 40];
        context[..16].copy_from_slice(disk.as_bytes());
        context[16..24].copy_from_slice(&generation.0.to_le_bytes());
        context[24..].copy_from_slice(&session);
        Self(blake3::derive_key("tidemark 2026-11 compared block of a disk, generation and session", &context))
    }

    /// The hash of what lies at `extent`.
    pub fn hash(&self, extent: Extent, data: &[u8]) -> BlockHash {
        debug_assert_eq!(extent.length, data.len() as u64);
        let mut place = [0; 16];
        place[..8].copy_from_slice(&extent.offset.to_le_bytes());
        place[8..].copy_from_slice(&extent.length.to_le_bytes());
        // The place by itself first, so that the data is hashed in the widest lanes.
        let key = blake3::keyed_hash(&self.0, &place);
        blake3::keyed_hash(key.as_bytes(), data).as_bytes()[..BLOCK_HASH_BYTES].try_into().expect("16 of 32 bytes")
    }
}

/// The parts of `extent` between multiples of `size`, in order.
pub fn pieces(extent: Extent, size: u64) -> impl Iterator<Item = Extent> {
    let mut at = extent.offset;
    std::iter::from_fn(move || {
        let end = (at - at % size).saturating_add(size).min(extent.end());
        let piece = (at < end).then(|| Extent::new(at, end - at));
        at = end;
        piece
    })
}

/// How many of them there are.
pub fn piece_count(extent: Extent, size: u64) -> u64 {
    if extent.is_empty() { 0 } else { (extent.end() - 1) / size - extent.offset / size + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Epoch;

    #[test]
    fn a_hash_is_bound_to_disk_session_and_place() {
        let disk = DiskId::random();
        let session = Epoch::random().0;
        let key = CompareKey::new(disk, Generation::FIRST, session);
        let data = [5; 4096];
        let hash = key.hash(Extent::new(4096, 4096), &data);
        assert_eq!(hash, CompareKey::new(disk, Generation::FIRST, session).hash(Extent::new(4096, 4096), &data));
        let others = [
            CompareKey::new(DiskId::random(), Generation::FIRST, session).hash(Extent::new(4096, 4096), &data),
            CompareKey::new(disk, Generation(2), session).hash(Extent::new(4096, 4096), &data),
            CompareKey::new(disk, Generation::FIRST, Epoch::random().0).hash(Extent::new(4096, 4096), &data),
            key.hash(Extent::new(8192, 4096), &data),
        ];
        assert!(others.iter().all(|other| *other != hash));
    }

    #[test]
    fn pieces_lie_between_multiples() {
        let parts: Vec<Extent> = pieces(Extent::new(BLOCK_BYTES - 512, BLOCK_BYTES + 1024), BLOCK_BYTES).collect();
        assert_eq!(
            parts,
            [
                Extent::new(BLOCK_BYTES - 512, 512),
                Extent::new(BLOCK_BYTES, BLOCK_BYTES),
                Extent::new(2 * BLOCK_BYTES, 512)
            ]
        );
        assert_eq!(parts.len() as u64, piece_count(Extent::new(BLOCK_BYTES - 512, BLOCK_BYTES + 1024), BLOCK_BYTES));
        assert_eq!(pieces(Extent::new(512, 0), BLOCK_BYTES).count(), 0);
    }
}
