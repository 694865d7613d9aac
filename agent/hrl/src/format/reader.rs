use std::io;
use std::sync::Arc;

use tidemark_base::storage::StorageFile;

use super::{
    BLOCK_HEADER_BYTES, BlockHeader, ChecksumPair, ENTRY_BYTES, Entry, HEADER_BYTES, Header, OPERATION_WRITE, byte_sum,
};

/// What a log is read from.
pub trait Source {
    fn bytes(&self) -> io::Result<u64>;
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Source for Arc<dyn StorageFile> {
    fn bytes(&self) -> io::Result<u64> {
        StorageFile::bytes(&**self)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        StorageFile::read_at(&**self, offset, buffer)
    }
}

impl Source for Vec<u8> {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..offset.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }
}

/// Something in a log that is not as the format wants it, and where.
#[derive(Debug, thiserror::Error)]
#[error("at byte {offset}: {kind}")]
pub struct Defect {
    pub offset: u64,
    pub kind: DefectKind,
}

#[derive(Debug, thiserror::Error)]
pub enum DefectKind {
    #[error("the file has {bytes} bytes, fewer than a header")]
    Short { bytes: u64 },
    #[error("the file does not begin with the cookie `msctlog` but with {}", found.escape_ascii())]
    Cookie { found: [u8; 8] },
    #[error("format version {found:#010x} is neither 1 nor 2")]
    Version { found: u32 },
    #[error("a metadata size of {found} is not a multiple of 512 up to 1 MiB")]
    MetadataSize { found: u32 },
    #[error("the header's checksum is {} where its fields give {}", .0.stored, .0.computed)]
    HeaderChecksum(ChecksumPair),
    #[error("the log was not closed (EOLLocation is 0)")]
    NotClosed,
    #[error("the log ends at {eol_location}, which the file of {bytes} bytes cannot hold")]
    EolLocation { eol_location: u64, bytes: u64 },
    #[error("{bytes} bytes follow the end of the log")]
    TrailingBytes { bytes: u64 },
    #[error("the header counts {stored} entries, the blocks hold {found}")]
    EntryCount { stored: u64, found: u64 },
    #[error("the metadata block's checksum is {} where its fields give {}", .0.stored, .0.computed)]
    BlockChecksum(ChecksumPair),
    #[error("the metadata block says that it holds {found} entries, its size allows {max}")]
    BlockEntries { found: u32, max: u32 },
    #[error("the metadata block points {distance} bytes back, which does not lead to an earlier block")]
    BackLink { distance: u64 },
    #[error("the entry's checksum is {} where its fields give {}", .0.stored, .0.computed)]
    EntryChecksum(ChecksumPair),
    #[error("operation {found} is not a write")]
    Operation { found: u8 },
    #[error("a write of {bytes} bytes at {byte_offset} is not one of whole sectors")]
    WriteExtent { byte_offset: u64, bytes: u32 },
    #[error("the data of {bytes} bytes runs past the set's end at {set_end}")]
    DataRange { bytes: u32, set_end: u64 },
    #[error("{bytes} bytes of the set belong to no entry")]
    UnclaimedBytes { bytes: u64 },
    #[error("the data's checksum is {} where the data gives {}", .0.stored, .0.computed)]
    DataChecksum(ChecksumPair),
    #[error("cannot be read: {0}")]
    Io(#[source] io::Error),
}

impl DefectKind {
    pub fn at(self, offset: u64) -> Defect {
        Defect { offset, kind: self }
    }
}

/// An entry and where it and its data are in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocatedEntry {
    pub entry: Entry,
    pub checksum: ChecksumPair,
    /// Of the entry itself.
    pub entry_offset: u64,
    pub data_offset: u64,
}

/// A closed log whose blocks have been found. Nothing in it is trusted beyond that.
pub struct HrlFile<'a> {
    source: &'a (dyn Source + 'a),
    header: Header,
    /// In the order of the file.
    blocks: Vec<Block>,
    warnings: Vec<Defect>,
}

#[derive(Clone, Copy)]
struct Block {
    offset: u64,
    entries: u32,
}

impl<'a> HrlFile<'a> {
    /// Reads the header alone: all that an open log has.
    pub fn header_of(source: &(dyn Source + '_)) -> Result<(Header, ChecksumPair), Defect> {
        let bytes = source.bytes().map_err(|error| DefectKind::Io(error).at(0))?;
        if bytes < HEADER_BYTES as u64 {
            return Err(DefectKind::Short { bytes }.at(0));
        }
        let mut page = [0; HEADER_BYTES];
        source.read_at(0, &mut page).map_err(|error| DefectKind::Io(error).at(0))?;
        Header::decode(&page).map_err(|kind| kind.at(0))
    }

    /// Finds the blocks from the last to the first. Each step leads back by at least one block, so it ends.
    pub fn open(source: &'a (dyn Source + 'a)) -> Result<Self, Defect> {
        let (header, checksum) = Self::header_of(source)?;
        let bytes = source.bytes().map_err(|error| DefectKind::Io(error).at(0))?;
        let mut warnings = Vec::new();
        if !checksum.is_ok() {
            warnings.push(DefectKind::HeaderChecksum(checksum).at(40));
        }
        let eol_location = header.eol_location;
        if eol_location == 0 {
            return Err(DefectKind::NotClosed.at(44));
        }
        if eol_location < HEADER_BYTES as u64 || eol_location > bytes {
            return Err(DefectKind::EolLocation { eol_location, bytes }.at(44));
        }
        if eol_location < bytes {
            warnings.push(DefectKind::TrailingBytes { bytes: bytes - eol_location }.at(eol_location));
        }
        let mut file = Self { source, header, blocks: Vec::new(), warnings };
        file.find_blocks()?;
        let found = file.blocks.iter().map(|block| u64::from(block.entries)).sum();
        if found != file.header.total_entries {
            file.warnings.push(DefectKind::EntryCount { stored: file.header.total_entries, found }.at(96));
        }
        Ok(file)
    }

    fn find_blocks(&mut self) -> Result<(), Defect> {
        let metadata_bytes = u64::from(self.header.metadata_bytes);
        let eol_location = self.header.eol_location;
        // A log that ends with its header has no block at all.
        if eol_location == HEADER_BYTES as u64 {
            return Ok(());
        }
        let mut at = eol_location
            .checked_sub(metadata_bytes)
            .filter(|&at| at >= HEADER_BYTES as u64)
            .ok_or_else(|| DefectKind::EolLocation { eol_location, bytes: eol_location }.at(44))?;
        loop {
            let mut bytes = [0; BLOCK_HEADER_BYTES];
            self.source.read_at(at, &mut bytes).map_err(|error| DefectKind::Io(error).at(at))?;
            let (header, checksum) = BlockHeader::decode(&bytes);
            if !checksum.is_ok() {
                return Err(DefectKind::BlockChecksum(checksum).at(at));
            }
            let max = (self.header.metadata_bytes - BLOCK_HEADER_BYTES as u32) / ENTRY_BYTES as u32;
            if header.entries > max {
                return Err(DefectKind::BlockEntries { found: header.entries, max }.at(at));
            }
            self.blocks.push(Block { offset: at, entries: header.entries });
            if header.previous == 0 {
                self.blocks.reverse();
                return Ok(());
            }
            at = at
                .checked_sub(header.previous)
                .filter(|&before| before >= HEADER_BYTES as u64 && header.previous >= metadata_bytes)
                .ok_or_else(|| DefectKind::BackLink { distance: header.previous }.at(at))?;
        }
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What is not as it should be, but lets the log be read.
    pub fn warnings(&self) -> &[Defect] {
        &self.warnings
    }

    /// Hands every entry to `each`, in the order of the writes, and what is wrong with it and with its set to `defect`.
    ///
    /// Ends at the first error of `each`. An entry whose data range cannot be right ends its set, since the places of
    /// all data after it in the set follow from it.
    pub fn for_each<E>(
        &self,
        mut each: impl FnMut(&LocatedEntry) -> Result<(), E>,
        mut defect: impl FnMut(Defect) -> Result<(), E>,
    ) -> Result<(), E> {
        let metadata_bytes = u64::from(self.header.metadata_bytes);
        let mut table = vec![0; self.header.metadata_bytes as usize - BLOCK_HEADER_BYTES];
        let mut data_offset = HEADER_BYTES as u64;
        for block in &self.blocks {
            let table = &mut table[..block.entries as usize * ENTRY_BYTES];
            let table_offset = block.offset + BLOCK_HEADER_BYTES as u64;
            if let Err(error) = self.source.read_at(table_offset, table) {
                defect(DefectKind::Io(error).at(table_offset))?;
                data_offset = block.offset + metadata_bytes;
                continue;
            }
            let mut cut_short = false;
            for (index, bytes) in table.as_chunks::<ENTRY_BYTES>().0.iter().enumerate() {
                let entry_offset = table_offset + (index * ENTRY_BYTES) as u64;
                let (entry, checksum) = Entry::decode(bytes);
                if !checksum.is_ok() {
                    defect(DefectKind::EntryChecksum(checksum).at(entry_offset))?;
                }
                if entry.operation != OPERATION_WRITE {
                    defect(DefectKind::Operation { found: entry.operation }.at(entry_offset))?;
                }
                if !is_of_whole_sectors(&entry) {
                    let kind = DefectKind::WriteExtent { byte_offset: entry.byte_offset, bytes: entry.data_bytes };
                    defect(kind.at(entry_offset))?;
                }
                let data_end = data_offset + u64::from(entry.data_bytes);
                if data_end > block.offset {
                    let kind = DefectKind::DataRange { bytes: entry.data_bytes, set_end: block.offset };
                    defect(kind.at(entry_offset))?;
                    cut_short = true;
                    break;
                }
                each(&LocatedEntry { entry, checksum, entry_offset, data_offset })?;
                data_offset = data_end;
            }
            if data_offset < block.offset && !cut_short {
                defect(DefectKind::UnclaimedBytes { bytes: block.offset - data_offset }.at(data_offset))?;
            }
            data_offset = block.offset + metadata_bytes;
        }
        Ok(())
    }

    /// Reads the data of an entry in parts of at most `buffer`.
    pub fn read_data<E: From<Defect>>(
        &self,
        located: &LocatedEntry,
        buffer: &mut [u8],
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        while done < u64::from(located.entry.data_bytes) {
            let part = (u64::from(located.entry.data_bytes) - done).min(buffer.len() as u64) as usize;
            let at = located.data_offset + done;
            self.source.read_at(at, &mut buffer[..part]).map_err(|error| DefectKind::Io(error).at(at))?;
            each(done, &buffer[..part])?;
            done += part as u64;
        }
        Ok(())
    }

    /// The checksum of an entry's data beside the one that it carries; `None` where it carries none.
    pub fn data_checksum(&self, located: &LocatedEntry, buffer: &mut [u8]) -> Result<Option<ChecksumPair>, Defect> {
        if located.entry.data_checksum == 0 {
            return Ok(None);
        }
        let mut sum = 0u32;
        self.read_data(located, buffer, |_, part| {
            sum = sum.wrapping_add(byte_sum(part));
            Ok::<(), Defect>(())
        })?;
        Ok(Some(ChecksumPair { stored: located.entry.data_checksum, computed: !sum }))
    }
}

fn is_of_whole_sectors(entry: &Entry) -> bool {
    tidemark_base::Extent::new(entry.byte_offset, u64::from(entry.data_bytes)).is_valid_on(u64::MAX)
}
