#![doc = include_str!("FORMAT.md")]

mod control;
mod slot;

pub(crate) use control::{Durable, End, Identity, Reached, Start};
pub use slot::SlotKind;
pub(crate) use slot::{RecordSlot, SLOT_BYTES, Slot, seal, sequence_of, verify};

/// Where the records begin.
pub const RECORDS_OFFSET: u64 = 4096;

/// Bytes of a mark's body in one slot.
pub(crate) const BODY_SLOT_BYTES: usize = 96;

pub(crate) mod control_at {
    pub(crate) const HEADER: u64 = 0;
    pub(crate) const START: u64 = 512;
    pub(crate) const DURABLE: [u64; 2] = [1024, 1536];
    pub(crate) const END: u64 = 2048;
}
