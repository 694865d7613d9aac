#![doc = include_str!("FORMAT.md")]

mod checksum;
mod reader;
mod sets;

use tidemark_base::Timestamp;
use uuid::Uuid;

pub(crate) use checksum::byte_sum;
pub use checksum::checksum;
pub use reader::{Defect, DefectKind, HrlFile, LocatedEntry, Source};
pub(crate) use sets::{SetBuilder, zero_part_count, zero_parts};

pub const HEADER_BYTES: usize = 4096;
/// What we write; a reader takes it from the header.
pub const METADATA_BYTES: usize = 4096;
/// A larger MetadataSize is refused: it would only make a reader allocate.
pub const METADATA_BYTES_MAX: u32 = 1 << 20;
pub const BLOCK_HEADER_BYTES: usize = 32;
pub const ENTRY_BYTES: usize = 32;
/// Entries in a block of [`METADATA_BYTES`].
pub const SET_ENTRIES_MAX: usize = (METADATA_BYTES - BLOCK_HEADER_BYTES) / ENTRY_BYTES;
/// The longest entry that we write; whole disk blocks, below the 32 bits of DataLength.
pub const ENTRY_DATA_BYTES_MAX: u64 = (1 << 32) - 4096;

pub const OPERATION_WRITE: u8 = 1;

const COOKIE: &[u8; 7] = b"msctlog";
pub const VERSION_1: u32 = 0x0001_0000;
pub const VERSION_2: u32 = 0x0002_0000;
const CREATOR: [u8; 4] = *b"tdmk";
const CREATOR_VERSION: u32 = 0x0001_0000;

const _: () = assert!(SET_ENTRIES_MAX == 127);
const _: () = assert!(ENTRY_DATA_BYTES_MAX <= u32::MAX as u64 && ENTRY_DATA_BYTES_MAX.is_multiple_of(512));
const _: () = assert!(header_at::RESERVED == 126 && entry_at::RESERVED + 6 == ENTRY_BYTES);

/// Where the fields of the file header are. Each is the one before it plus that one's size.
mod header_at {
    pub const VERSION: usize = 8;
    pub const CREATED: usize = VERSION + 4;
    pub const CREATOR: usize = CREATED + 4;
    pub const CREATOR_VERSION: usize = CREATOR + 4;
    pub const ORIGINAL_SIZE: usize = CREATOR_VERSION + 4;
    pub const CURRENT_SIZE: usize = ORIGINAL_SIZE + 8;
    pub const CHECKSUM: usize = CURRENT_SIZE + 8;
    pub const EOL_LOCATION: usize = CHECKSUM + 4;
    pub const ERROR_CODE: usize = EOL_LOCATION + 8;
    pub const METADATA_SIZE: usize = ERROR_CODE + 4;
    pub const UNIQUE_ID: usize = METADATA_SIZE + 4;
    pub const PREVIOUS_UNIQUE_ID: usize = UNIQUE_ID + 16;
    pub const MODIFIED: usize = PREVIOUS_UNIQUE_ID + 16;
    pub const TOTAL_ENTRIES: usize = MODIFIED + 4;
    pub const FILE_TYPE: usize = TOTAL_ENTRIES + 8;
    pub const FLAGS: usize = FILE_TYPE + 4;
    pub const DATA_WRITE_GUID: usize = FLAGS + 2;
    pub const RESERVED: usize = DATA_WRITE_GUID + 16;
}

mod block_at {
    pub const ENTRIES: usize = 8;
    pub const CHECKSUM: usize = ENTRIES + 4;
}

mod entry_at {
    pub const CHECKSUM: usize = 8;
    pub const DATA_LENGTH: usize = CHECKSUM + 4;
    pub const TIME: usize = DATA_LENGTH + 4;
    pub const OPERATION: usize = TIME + 4;
    pub const DATA_CHECKSUM: usize = OPERATION + 1;
    pub const LOCATION: usize = DATA_CHECKSUM + 4;
    pub const RESERVED: usize = LOCATION + 1;
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The checksum of a structure, without its own field.
fn checksum_around(bytes: &[u8], at: usize) -> u32 {
    !byte_sum(&bytes[..at]).wrapping_add(byte_sum(&bytes[at + 4..]))
}

/// The file header, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    pub version: u32,
    pub created_seconds: u32,
    pub creator: [u8; 4],
    pub creator_version: u32,
    pub original_bytes: u64,
    pub current_bytes: u64,
    /// 0 while the log is open.
    pub eol_location: u64,
    pub error_code: i32,
    pub metadata_bytes: u32,
    pub unique_id: Uuid,
    /// Nil for the first log of a chain.
    pub previous_unique_id: Uuid,
    pub modified_seconds: u32,
    pub total_entries: u64,
    pub file_type: u32,
    pub flags: u16,
    pub data_write_guid: Uuid,
}

/// The checksum that a structure carries and the one that it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChecksumPair {
    pub stored: u32,
    pub computed: u32,
}

impl ChecksumPair {
    pub fn is_ok(&self) -> bool {
        self.stored == self.computed
    }
}

impl Header {
    /// A new, open log of ours.
    pub fn new(unique_id: Uuid, previous_unique_id: Uuid, created: Timestamp) -> Self {
        Self {
            version: VERSION_2,
            created_seconds: created.hrl_seconds(),
            creator: CREATOR,
            creator_version: CREATOR_VERSION,
            original_bytes: 0,
            current_bytes: HEADER_BYTES as u64,
            eol_location: 0,
            error_code: 0,
            metadata_bytes: METADATA_BYTES as u32,
            unique_id,
            previous_unique_id,
            modified_seconds: created.hrl_seconds(),
            total_entries: 0,
            file_type: 0,
            flags: 0,
            data_write_guid: Uuid::nil(),
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        use header_at::*;
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, COOKIE);
        put(&mut bytes, VERSION, &self.version.to_le_bytes());
        put(&mut bytes, CREATED, &self.created_seconds.to_le_bytes());
        put(&mut bytes, CREATOR, &self.creator);
        put(&mut bytes, CREATOR_VERSION, &self.creator_version.to_le_bytes());
        put(&mut bytes, ORIGINAL_SIZE, &self.original_bytes.to_le_bytes());
        put(&mut bytes, CURRENT_SIZE, &self.current_bytes.to_le_bytes());
        put(&mut bytes, EOL_LOCATION, &self.eol_location.to_le_bytes());
        put(&mut bytes, ERROR_CODE, &self.error_code.to_le_bytes());
        put(&mut bytes, METADATA_SIZE, &self.metadata_bytes.to_le_bytes());
        put(&mut bytes, UNIQUE_ID, &self.unique_id.to_bytes_le());
        put(&mut bytes, PREVIOUS_UNIQUE_ID, &self.previous_unique_id.to_bytes_le());
        put(&mut bytes, MODIFIED, &self.modified_seconds.to_le_bytes());
        put(&mut bytes, TOTAL_ENTRIES, &self.total_entries.to_le_bytes());
        put(&mut bytes, FILE_TYPE, &self.file_type.to_le_bytes());
        put(&mut bytes, FLAGS, &self.flags.to_le_bytes());
        put(&mut bytes, DATA_WRITE_GUID, &self.data_write_guid.to_bytes_le());
        let sum = checksum_around(&bytes, CHECKSUM);
        put(&mut bytes, CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    /// What the fields say; `Err` only where nothing after them could be read by it.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(Self, ChecksumPair), DefectKind> {
        use header_at::*;
        if &bytes[..COOKIE.len()] != COOKIE || !matches!(bytes[COOKIE.len()], 0 | b' ') {
            return Err(DefectKind::Cookie { found: array_at(bytes, 0) });
        }
        let version = u32_at(bytes, VERSION);
        if !matches!(version, VERSION_1 | VERSION_2) {
            return Err(DefectKind::Version { found: version });
        }
        let metadata_bytes = u32_at(bytes, METADATA_SIZE);
        if metadata_bytes == 0 || !metadata_bytes.is_multiple_of(512) || metadata_bytes > METADATA_BYTES_MAX {
            return Err(DefectKind::MetadataSize { found: metadata_bytes });
        }
        let data_write_guid = match version {
            VERSION_1 => Uuid::nil(),
            _ => Uuid::from_bytes_le(array_at(bytes, DATA_WRITE_GUID)),
        };
        let header = Self {
            version,
            created_seconds: u32_at(bytes, CREATED),
            creator: array_at(bytes, CREATOR),
            creator_version: u32_at(bytes, CREATOR_VERSION),
            original_bytes: u64_at(bytes, ORIGINAL_SIZE),
            current_bytes: u64_at(bytes, CURRENT_SIZE),
            eol_location: u64_at(bytes, EOL_LOCATION),
            error_code: i32::from_le_bytes(array_at(bytes, ERROR_CODE)),
            metadata_bytes,
            unique_id: Uuid::from_bytes_le(array_at(bytes, UNIQUE_ID)),
            previous_unique_id: Uuid::from_bytes_le(array_at(bytes, PREVIOUS_UNIQUE_ID)),
            modified_seconds: u32_at(bytes, MODIFIED),
            total_entries: u64_at(bytes, TOTAL_ENTRIES),
            file_type: u32_at(bytes, FILE_TYPE),
            flags: u16::from_le_bytes(array_at(bytes, FLAGS)),
            data_write_guid,
        };
        let checksums = ChecksumPair { stored: u32_at(bytes, CHECKSUM), computed: checksum_around(bytes, CHECKSUM) };
        Ok((header, checksums))
    }
}

/// The head of a metadata block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockHeader {
    /// Distance back to the block before; 0 for the first.
    pub previous: u64,
    pub entries: u32,
}

impl BlockHeader {
    pub fn encode(&self) -> [u8; BLOCK_HEADER_BYTES] {
        let mut bytes = [0; BLOCK_HEADER_BYTES];
        put(&mut bytes, 0, &self.previous.to_le_bytes());
        put(&mut bytes, block_at::ENTRIES, &self.entries.to_le_bytes());
        let sum = checksum_around(&bytes, block_at::CHECKSUM);
        put(&mut bytes, block_at::CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; BLOCK_HEADER_BYTES]) -> (Self, ChecksumPair) {
        let header = Self { previous: u64_at(bytes, 0), entries: u32_at(bytes, block_at::ENTRIES) };
        let computed = checksum_around(bytes, block_at::CHECKSUM);
        (header, ChecksumPair { stored: u32_at(bytes, block_at::CHECKSUM), computed })
    }
}

/// One write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub byte_offset: u64,
    pub data_bytes: u32,
    pub time_seconds: u32,
    pub operation: u8,
    /// 0 = not present.
    pub data_checksum: u32,
}

impl Entry {
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        put(&mut bytes, 0, &self.byte_offset.to_le_bytes());
        put(&mut bytes, entry_at::DATA_LENGTH, &self.data_bytes.to_le_bytes());
        put(&mut bytes, entry_at::TIME, &self.time_seconds.to_le_bytes());
        bytes[entry_at::OPERATION] = self.operation;
        put(&mut bytes, entry_at::DATA_CHECKSUM, &self.data_checksum.to_le_bytes());
        let sum = checksum_around(&bytes, entry_at::CHECKSUM);
        put(&mut bytes, entry_at::CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; ENTRY_BYTES]) -> (Self, ChecksumPair) {
        let entry = Self {
            byte_offset: u64_at(bytes, 0),
            data_bytes: u32_at(bytes, entry_at::DATA_LENGTH),
            time_seconds: u32_at(bytes, entry_at::TIME),
            operation: bytes[entry_at::OPERATION],
            data_checksum: u32_at(bytes, entry_at::DATA_CHECKSUM),
        };
        let computed = checksum_around(bytes, entry_at::CHECKSUM);
        (entry, ChecksumPair { stored: u32_at(bytes, entry_at::CHECKSUM), computed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's own example, a log of Windows Server 2016.
    #[test]
    fn known_checksums_of_entries() {
        for (byte_offset, data_bytes, time_seconds, expected) in [
            (3_626_340_352, 4096, 539_842_382, 4_294_966_639u32),
            (3_626_344_448, 4096, 539_842_382, 4_294_966_623),
            (3_628_871_680, 4096, 539_842_382, 4_294_966_696),
            (10_188_185_600, 4096, 539_842_382, 4_294_966_776),
            (3_673_764_352, 31_232, 539_842_382, 4_294_966_413),
            (138_656_768, 512, 539_842_381, 4_294_966_788),
        ] {
            let entry = Entry { byte_offset, data_bytes, time_seconds, operation: OPERATION_WRITE, data_checksum: 0 };
            let (decoded, checksums) = Entry::decode(&entry.encode());
            assert_eq!(decoded, entry);
            assert_eq!(checksums, ChecksumPair { stored: expected, computed: expected });
        }
    }

    #[test]
    fn known_checksums_of_block_headers() {
        for (previous, entries, expected) in [(324_096, 58, 4_294_966_991u32), (0, 0, 4_294_967_295)] {
            let header = BlockHeader { previous, entries };
            let (decoded, checksums) = BlockHeader::decode(&header.encode());
            assert_eq!(decoded, header);
            assert_eq!(checksums, ChecksumPair { stored: expected, computed: expected });
        }
    }

    fn header() -> Header {
        let id = Uuid::parse_str("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        Header::new(id, Uuid::nil(), Timestamp::from_hrl_seconds(539_842_382))
    }

    #[test]
    fn guids_are_in_microsoft_byte_order() {
        let bytes = header().encode();
        assert_eq!(
            bytes[60..76],
            [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]
        );
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let mut header = header();
        header.eol_location = 8192;
        header.error_code = -5;
        header.total_entries = 3;
        header.data_write_guid = Uuid::from_u128(7);
        let (decoded, checksums) = Header::decode(&header.encode()).unwrap();
        assert_eq!(decoded, header);
        assert!(checksums.is_ok());
        let mut flipped = header.encode();
        flipped[4000] ^= 1;
        assert!(!Header::decode(&flipped).unwrap().1.is_ok());
    }

    #[test]
    fn the_cookie_is_padded_with_nul_or_blank_and_nothing_else() {
        let mut bytes = header().encode();
        assert_eq!(&bytes[..8], b"msctlog\0");
        bytes[7] = b' ';
        assert!(Header::decode(&bytes).is_ok());
        bytes[7] = b'x';
        assert!(matches!(Header::decode(&bytes), Err(DefectKind::Cookie { .. })));
        bytes[..8].copy_from_slice(b"MSCTLOG\0");
        assert!(matches!(Header::decode(&bytes), Err(DefectKind::Cookie { .. })));
    }

    #[test]
    fn version_1_is_read_and_others_are_not() {
        let mut first = header();
        first.version = VERSION_1;
        first.data_write_guid = Uuid::from_u128(9);
        assert_eq!(Header::decode(&first.encode()).unwrap().0.data_write_guid, Uuid::nil());
        first.version = 0x0003_0000;
        assert!(matches!(Header::decode(&first.encode()), Err(DefectKind::Version { found: 0x0003_0000 })));
    }

    #[test]
    fn a_metadata_size_that_makes_no_sense_is_refused() {
        for metadata_bytes in [0, 1, 511, 4097, METADATA_BYTES_MAX + 512, u32::MAX] {
            let header = Header { metadata_bytes, ..header() };
            assert!(
                matches!(Header::decode(&header.encode()), Err(DefectKind::MetadataSize { found }) if found == metadata_bytes)
            );
        }
    }
}
