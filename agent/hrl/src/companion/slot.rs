use tidemark_base::{Extent, HistoryHash, Sequence, Timestamp};

use crate::format::{array_at, put, u32_at, u64_at};

pub(crate) const SLOT_BYTES: usize = 128;
const TAG_AT: usize = 112;

pub(crate) type Slot = [u8; SLOT_BYTES];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SlotKind {
    Write = 1,
    Zeroes = 2,
    Mark = 3,
    Body = 4,
    Header = 5,
    Start = 6,
    Durable = 7,
    End = 8,
}

impl SlotKind {
    pub(crate) fn of(slot: &Slot) -> Option<Self> {
        Some(match slot[0] {
            1 => Self::Write,
            2 => Self::Zeroes,
            3 => Self::Mark,
            4 => Self::Body,
            5 => Self::Header,
            6 => Self::Start,
            7 => Self::Durable,
            8 => Self::End,
            _ => return None,
        })
    }
}

fn tag(key: &[u8; 32], at: u64, slot: &Slot) -> [u8; 16] {
    let mut bytes = [0; 8 + TAG_AT];
    bytes[..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..].copy_from_slice(&slot[..TAG_AT]);
    array_at(blake3::keyed_hash(key, &bytes).as_bytes(), 0)
}

/// Writes the tag of a slot that will lie at `at`.
pub(crate) fn seal(key: &[u8; 32], at: u64, slot: &mut Slot) {
    let tag = tag(key, at, slot);
    put(slot, TAG_AT, &tag);
}

/// Whether a slot is one that was written at this place of this log.
pub(crate) fn verify(key: &[u8; 32], at: u64, slot: &Slot) -> bool {
    tag(key, at, slot) == slot[TAG_AT..]
}

pub(crate) fn sequence_of(slot: &Slot) -> Sequence {
    Sequence(u64_at(slot, 8))
}

/// A record as it lies in its slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RecordSlot {
    pub kind: SlotKind,
    pub sequence: Sequence,
    pub time: Timestamp,
    pub extent: Extent,
    pub data_offset: u64,
    pub digest: [u8; 32],
    pub checksum: u32,
    pub history: HistoryHash,
}

impl RecordSlot {
    pub(crate) fn encode(&self, slot: &mut Slot) {
        slot.fill(0);
        slot[0] = self.kind as u8;
        put(slot, 4, &self.checksum.to_le_bytes());
        put(slot, 8, &self.sequence.0.to_le_bytes());
        put(slot, 16, &self.time.0.to_le_bytes());
        put(slot, 24, &self.extent.offset.to_le_bytes());
        put(slot, 32, &self.extent.length.to_le_bytes());
        put(slot, 40, &self.data_offset.to_le_bytes());
        put(slot, 48, &self.digest);
        put(slot, 80, &self.history.0);
    }

    /// Of a slot whose tag was verified and that holds a record.
    pub(crate) fn decode(kind: SlotKind, slot: &Slot) -> Self {
        Self {
            kind,
            sequence: sequence_of(slot),
            time: Timestamp(u64_at(slot, 16)),
            extent: Extent::new(u64_at(slot, 24), u64_at(slot, 32)),
            data_offset: u64_at(slot, 40),
            digest: array_at(slot, 48),
            checksum: u32_at(slot, 4),
            history: HistoryHash(array_at(slot, 80)),
        }
    }
}
