//! What is in a log.

use std::path::Path;

use serde::Serialize;
use tidemark_base::Timestamp;
use uuid::Uuid;

use super::{Opened, ToolError};
use crate::format::{ChecksumPair, DefectKind, Header, HrlFile, LocatedEntry};

/// The file header, as people and programs see it.
#[derive(Clone, Debug, Serialize)]
pub struct HeaderView {
    pub log_format_version: String,
    pub created: Timestamp,
    pub creator_application: String,
    pub creator_version: u32,
    pub original_size: u64,
    pub current_size: u64,
    pub checksum: u32,
    pub checksum_ok: bool,
    pub eol_location: u64,
    pub error_code: i32,
    pub metadata_size: u32,
    pub unique_id: Uuid,
    pub previous_unique_id: Uuid,
    pub last_modified: Timestamp,
    pub total_metadata_entries: u64,
    pub file_type: u32,
    pub flags: u16,
    pub vhd2_data_write_guid: Uuid,
}

impl HeaderView {
    fn of(header: &Header, checksum: ChecksumPair) -> Self {
        Self {
            log_format_version: format!("{}.{}", header.version >> 16, header.version & 0xffff),
            created: Timestamp::from_hrl_seconds(header.created_seconds),
            creator_application: header.creator.escape_ascii().to_string().trim_end_matches("\\x00").to_owned(),
            creator_version: header.creator_version,
            original_size: header.original_bytes,
            current_size: header.current_bytes,
            checksum: checksum.stored,
            checksum_ok: checksum.is_ok(),
            eol_location: header.eol_location,
            error_code: header.error_code,
            metadata_size: header.metadata_bytes,
            unique_id: header.unique_id,
            previous_unique_id: header.previous_unique_id,
            last_modified: Timestamp::from_hrl_seconds(header.modified_seconds),
            total_metadata_entries: header.total_entries,
            file_type: header.file_type,
            flags: header.flags,
            vhd2_data_write_guid: header.data_write_guid,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct EntryView {
    pub byte_offset: u64,
    pub data_length: u32,
    pub time: Timestamp,
    pub operation: u8,
    pub checksum: u32,
    pub checksum_ok: bool,
    /// `null` where the entry carries none.
    pub data_checksum: Option<u32>,
    pub entry_offset: u64,
    pub data_offset: u64,
}

impl EntryView {
    fn of(located: &LocatedEntry) -> Self {
        let entry = &located.entry;
        Self {
            byte_offset: entry.byte_offset,
            data_length: entry.data_bytes,
            time: Timestamp::from_hrl_seconds(entry.time_seconds),
            operation: entry.operation,
            checksum: located.checksum.stored,
            checksum_ok: located.checksum.is_ok(),
            data_checksum: (entry.data_checksum != 0).then_some(entry.data_checksum),
            entry_offset: located.entry_offset,
            data_offset: located.data_offset,
        }
    }
}

/// Further warnings are counted.
const WARNINGS_MAX: usize = 1000;

/// An opened log. Entries are handed out one by one: a log may hold millions.
pub struct Inspection {
    opened: Opened,
    pub header: HeaderView,
    pub closed: bool,
}

impl Inspection {
    pub fn open(path: &Path) -> Result<Self, ToolError> {
        let opened = Opened::open(path)?;
        let (header, checksum) = HrlFile::header_of(&opened.file).map_err(|defect| opened.defect(defect))?;
        let closed = header.eol_location != 0;
        if closed {
            // A log whose blocks cannot be found is an error before anything is printed.
            HrlFile::open(&opened.file).map_err(|defect| opened.defect(defect))?;
        }
        Ok(Self { opened, header: HeaderView::of(&header, checksum), closed })
    }

    /// Hands every entry to `each`; returns what is not as it should be. An open log has no entries yet.
    pub fn entries(&self, mut each: impl FnMut(&EntryView) -> std::io::Result<()>) -> Result<Vec<String>, ToolError> {
        let file = match HrlFile::open(&self.opened.file) {
            Ok(file) => file,
            Err(defect) if matches!(defect.kind, DefectKind::NotClosed) => return Ok(vec![defect.to_string()]),
            Err(defect) => return Err(self.opened.defect(defect)),
        };
        let mut warnings: Vec<String> = file.warnings().iter().map(ToString::to_string).collect();
        let mut more = 0u64;
        file.for_each(
            |located| each(&EntryView::of(located)).map_err(|source| ToolError::Print { source }),
            |defect| {
                if warnings.len() < WARNINGS_MAX {
                    warnings.push(defect.to_string());
                } else {
                    more += 1;
                }
                Ok(())
            },
        )?;
        if more > 0 {
            warnings.push(format!("and {more} more"));
        }
        Ok(warnings)
    }
}
