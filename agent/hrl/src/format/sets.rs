use super::{
    BLOCK_HEADER_BYTES, BlockHeader, ENTRY_BYTES, ENTRY_DATA_BYTES_MAX, Entry, HEADER_BYTES, METADATA_BYTES,
    OPERATION_WRITE, SET_ENTRIES_MAX, put,
};

/// Where the next data goes, and the metadata block that is being filled.
///
/// The live log and its recovery both place records through this, so that the layout that follows from a companion is
/// the one that was written.
pub(crate) struct SetBuilder {
    block: Box<[u8; METADATA_BYTES]>,
    entries: usize,
    total_entries: u64,
    end: u64,
    last_block: Option<u64>,
}

impl SetBuilder {
    pub(crate) fn new() -> Self {
        Self {
            block: Box::new([0; METADATA_BYTES]),
            entries: 0,
            total_entries: 0,
            end: HEADER_BYTES as u64,
            last_block: None,
        }
    }

    /// Where the file ends after all data and blocks so far.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    pub(crate) fn total_entries(&self) -> u64 {
        self.total_entries
    }

    pub(crate) fn is_full(&self) -> bool {
        self.entries == SET_ENTRIES_MAX
    }

    /// How many blocks fill up when this many entries are added.
    pub(crate) fn blocks_for(&self, entries: usize) -> usize {
        (self.entries + entries) / SET_ENTRIES_MAX
    }

    /// Adds a write whose data lies at [`Self::end`]. The set must not be full.
    pub(crate) fn add(&mut self, byte_offset: u64, data_bytes: u32, time_seconds: u32, data_checksum: u32) {
        let entry = Entry { byte_offset, data_bytes, time_seconds, operation: OPERATION_WRITE, data_checksum };
        put(&mut self.block[..], BLOCK_HEADER_BYTES + self.entries * ENTRY_BYTES, &entry.encode());
        self.entries += 1;
        self.total_entries += 1;
        self.end += u64::from(data_bytes);
    }

    /// Completes the block, which lies at [`Self::end`], into `out`, and says where that is.
    pub(crate) fn finish(&mut self, out: &mut [u8; METADATA_BYTES]) -> u64 {
        let at = self.end;
        let previous = self.last_block.map_or(0, |last| at - last);
        let header = BlockHeader { previous, entries: self.entries as u32 };
        put(&mut self.block[..], 0, &header.encode());
        out.copy_from_slice(&self.block[..]);
        self.block.fill(0);
        self.entries = 0;
        self.last_block = Some(at);
        self.end += METADATA_BYTES as u64;
        at
    }

    /// Whether closing the log takes one more block: for the entries of the open set, or because there is none yet.
    pub(crate) fn needs_last_block(&self) -> bool {
        self.entries > 0 || self.last_block.is_none()
    }
}

/// The entries that a run of zeroes takes: DataLength has 32 bits.
pub(crate) fn zero_parts(offset: u64, length: u64) -> impl Iterator<Item = (u64, u32)> {
    (0..zero_part_count(length)).map(move |part| {
        let skip = part * ENTRY_DATA_BYTES_MAX;
        (offset + skip, (length - skip).min(ENTRY_DATA_BYTES_MAX) as u32)
    })
}

pub(crate) fn zero_part_count(length: u64) -> u64 {
    length.div_ceil(ENTRY_DATA_BYTES_MAX)
}
