//! The slot table: which writes are in flight, in memory that outlives the process.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use tidemark_base::{Extent, Timestamp};

use super::session::SessionId;

/// The most writes of one disk that are in flight at once; more of them wait for a free slot.
pub const SLOTS: usize = 256;

const _: () = assert!(cfg!(target_endian = "little"), "the mapped table is little-endian");

const MAGIC: &[u8; 8] = b"TMSLOTS1";
const HEADER_BYTES: usize = 4096;
const SLOT_BYTES: usize = 16;
const ACTIVITY_OFFSET: usize = 32;
/// The size of the whole file.
pub const FILE_BYTES: u64 = (HEADER_BYTES + SLOTS * SLOT_BYTES) as u64;

/// The table of the session that is running.
pub struct SlotTable {
    map: MmapRaw,
}

/// What a table of an earlier session held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotsFound {
    pub session: SessionId,
    pub activity: Timestamp,
    /// Writes whose record may be missing from the log. Not checked against the disk's size.
    pub in_flight: Vec<Extent>,
}

impl SlotTable {
    /// Takes the file over for a new session: all slots free. The file has [`FILE_BYTES`] already.
    pub fn start(file: &File, session: SessionId, now: Timestamp) -> io::Result<Self> {
        let map = map(file)?;
        let table = Self { map };
        for slot in 0..SLOTS {
            table.clear(slot);
        }
        // SAFETY: the mapping has FILE_BYTES bytes and nobody else reads the header while it is written: the disk is
        // exclusively ours and no write was admitted yet.
        let header = unsafe { std::slice::from_raw_parts_mut(table.map.as_mut_ptr(), ACTIVITY_OFFSET) };
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&(SLOTS as u32).to_le_bytes());
        header[12..16].fill(0);
        header[16..32].copy_from_slice(&session.0);
        table.word(ACTIVITY_OFFSET).store(now.0, Ordering::Release);
        table.sync()?;
        Ok(table)
    }

    /// Makes the header durable: whose slots these are, and when a write was last worked on.
    pub fn sync(&self) -> io::Result<()> {
        self.map.flush_range(0, HEADER_BYTES)
    }

    /// What is in the file, or `None` when it is not a slot table.
    pub fn read(file: &File) -> io::Result<Option<SlotsFound>> {
        if file.metadata()?.len() != FILE_BYTES {
            return Ok(None);
        }
        let table = Self { map: map(file)? };
        // SAFETY: as in `start`; nobody writes it now.
        let header = unsafe { std::slice::from_raw_parts(table.map.as_ptr(), ACTIVITY_OFFSET) };
        if &header[..8] != MAGIC || header[8..12] != (SLOTS as u32).to_le_bytes() {
            return Ok(None);
        }
        let session = SessionId(header[16..32].try_into().expect("sixteen bytes"));
        let activity = Timestamp(table.word(ACTIVITY_OFFSET).load(Ordering::Acquire));
        let in_flight = (0..SLOTS)
            .filter_map(|slot| {
                let at = HEADER_BYTES + slot * SLOT_BYTES;
                let length = table.word(at + 8).load(Ordering::Acquire);
                let offset = table.word(at).load(Ordering::Relaxed);
                (length != 0).then_some(Extent { offset, length })
            })
            .collect();
        Ok(Some(SlotsFound { session, activity, in_flight }))
    }

    /// Two stores; the length last, because it is what makes the slot count.
    pub fn set(&self, slot: usize, extent: Extent) {
        let at = HEADER_BYTES + slot * SLOT_BYTES;
        self.word(at).store(extent.offset, Ordering::Relaxed);
        self.word(at + 8).store(extent.length, Ordering::Release);
    }

    pub fn clear(&self, slot: usize) {
        self.word(HEADER_BYTES + slot * SLOT_BYTES + 8).store(0, Ordering::Release);
    }

    /// Says that a write was worked on at `now`. The latest counts, whoever comes last.
    pub fn touch(&self, now: Timestamp) {
        self.word(ACTIVITY_OFFSET).fetch_max(now.0, Ordering::AcqRel);
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= FILE_BYTES as usize, "outside the slot table");
        // SAFETY: inside the mapping, aligned (the mapping is page-aligned), and only ever used as an atomic.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }
    }
}

fn map(file: &File) -> io::Result<MmapRaw> {
    MmapOptions::new().len(FILE_BYTES as usize).map_raw(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_outlive_their_table() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE_BYTES).unwrap();
        let session = SessionId::random();
        let table = SlotTable::start(&file, session, Timestamp(5)).unwrap();
        table.set(0, Extent::new(4096, 512));
        table.set(255, Extent::new(1 << 40, 1 << 30));
        table.set(7, Extent::new(0, 4096));
        table.clear(7);
        table.touch(Timestamp(77));
        drop(table);
        let found = SlotTable::read(&file).unwrap().unwrap();
        assert_eq!(found.session, session);
        assert_eq!(found.activity, Timestamp(77));
        assert_eq!(found.in_flight, [Extent::new(4096, 512), Extent::new(1 << 40, 1 << 30)]);

        SlotTable::start(&file, SessionId::random(), Timestamp(0)).unwrap();
        assert_eq!(SlotTable::read(&file).unwrap().unwrap().in_flight, []);
    }

    #[test]
    fn another_file_is_no_slot_table() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(SlotTable::read(&file).unwrap(), None);
        file.set_len(FILE_BYTES).unwrap();
        assert_eq!(SlotTable::read(&file).unwrap(), None);
    }
}
