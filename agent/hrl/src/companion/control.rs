use tidemark_base::{DiskId, Epoch, HistoryHash, Position, Sequence, Timestamp};
use uuid::Uuid;

use super::slot::{SLOT_BYTES, Slot, SlotKind, sequence_of};
use crate::format::{array_at, put, u32_at, u64_at};

const MAGIC: &[u8; 16] = b"tidemark log\0\0\0\0";
const VERSION: u32 = 2;

fn slot_of(kind: SlotKind, sequence: Sequence, history: HistoryHash) -> Slot {
    let mut slot = [0; SLOT_BYTES];
    slot[0] = kind as u8;
    put(&mut slot, 8, &sequence.0.to_le_bytes());
    put(&mut slot, 80, &history.0);
    slot
}

/// Which log this is. Needed to make the key that verifies everything else, itself included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    pub disk: DiskId,
    pub disk_bytes: u64,
    pub log: Uuid,
    pub created: Timestamp,
}

impl Identity {
    pub(crate) fn encode(&self) -> Slot {
        let mut slot = [0; SLOT_BYTES];
        slot[0] = SlotKind::Header as u8;
        put(&mut slot, 16, MAGIC);
        put(&mut slot, 32, &VERSION.to_le_bytes());
        put(&mut slot, 40, &self.disk_bytes.to_le_bytes());
        put(&mut slot, 48, self.disk.as_bytes());
        put(&mut slot, 64, self.log.as_bytes());
        put(&mut slot, 80, &self.created.0.to_le_bytes());
        slot
    }

    /// `None` unless it is a companion of a version that we know. The tag is still to be verified.
    pub(crate) fn decode(slot: &Slot) -> Option<Self> {
        let is_ours = SlotKind::of(slot) == Some(SlotKind::Header)
            && array_at::<16>(slot, 16) == *MAGIC
            && u32_at(slot, 32) == VERSION;
        is_ours.then(|| Self {
            disk: DiskId::from_bytes(array_at(slot, 48)),
            disk_bytes: u64_at(slot, 40),
            log: Uuid::from_bytes(array_at(slot, 64)),
            created: Timestamp(u64_at(slot, 80)),
        })
    }
}

/// What the first record follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Start {
    pub position: Position,
    /// Nil for the first log of a chain.
    pub previous: Uuid,
    pub time: Timestamp,
}

impl Start {
    pub(crate) fn encode(&self) -> Slot {
        let mut slot = slot_of(SlotKind::Start, self.position.sequence, self.position.hash);
        put(&mut slot, 16, &self.time.0.to_le_bytes());
        put(&mut slot, 24, self.previous.as_bytes());
        put(&mut slot, 48, &self.position.epoch.0);
        slot
    }

    pub(crate) fn decode(slot: &Slot) -> Option<Self> {
        (SlotKind::of(slot) == Some(SlotKind::Start)).then(|| Self {
            position: Position {
                epoch: Epoch(array_at(slot, 48)),
                sequence: sequence_of(slot),
                hash: HistoryHash(array_at(slot, 80)),
            },
            previous: Uuid::from_bytes(array_at(slot, 24)),
            time: Timestamp(u64_at(slot, 16)),
        })
    }
}

/// How far the log is on stable storage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Durable {
    pub count: u64,
    /// `None` until the first sync.
    pub reached: Option<Reached>,
}

/// A place in a log: after a record, with the lengths of both files there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reached {
    pub sequence: Sequence,
    pub hash: HistoryHash,
    pub companion_bytes: u64,
    pub data_bytes: u64,
}

impl Durable {
    pub(crate) fn encode(&self) -> Slot {
        let nothing = Reached { sequence: Sequence(0), hash: HistoryHash([0; 32]), companion_bytes: 0, data_bytes: 0 };
        let reached = self.reached.unwrap_or(nothing);
        let mut slot = slot_of(SlotKind::Durable, reached.sequence, reached.hash);
        put(&mut slot, 16, &self.count.to_le_bytes());
        put(&mut slot, 24, &reached.companion_bytes.to_le_bytes());
        put(&mut slot, 32, &reached.data_bytes.to_le_bytes());
        slot[40] = u8::from(self.reached.is_some());
        slot
    }

    pub(crate) fn decode(slot: &Slot) -> Option<Self> {
        (SlotKind::of(slot) == Some(SlotKind::Durable)).then(|| Self {
            count: u64_at(slot, 16),
            reached: (slot[40] == 1).then(|| Reached {
                sequence: sequence_of(slot),
                hash: HistoryHash(array_at(slot, 80)),
                companion_bytes: u64_at(slot, 24),
                data_bytes: u64_at(slot, 32),
            }),
        })
    }
}

/// Where a closed log ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct End {
    pub reached: Reached,
    pub eol_location: u64,
    pub time: Timestamp,
}

impl End {
    pub(crate) fn encode(&self) -> Slot {
        let mut slot = slot_of(SlotKind::End, self.reached.sequence, self.reached.hash);
        put(&mut slot, 16, &self.time.0.to_le_bytes());
        put(&mut slot, 24, &self.reached.companion_bytes.to_le_bytes());
        put(&mut slot, 32, &self.reached.data_bytes.to_le_bytes());
        put(&mut slot, 40, &self.eol_location.to_le_bytes());
        slot
    }

    pub(crate) fn decode(slot: &Slot) -> Option<Self> {
        (SlotKind::of(slot) == Some(SlotKind::End)).then(|| Self {
            reached: Reached {
                sequence: sequence_of(slot),
                hash: HistoryHash(array_at(slot, 80)),
                companion_bytes: u64_at(slot, 24),
                data_bytes: u64_at(slot, 32),
            },
            eol_location: u64_at(slot, 40),
            time: Timestamp(u64_at(slot, 16)),
        })
    }
}
