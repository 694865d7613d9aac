//! Whether logs are sound, each and together.
//!
//! A log is checked by the format's own means, and, where our companion lies beside it, by that: record by record and
//! all data, which also finds what the format's weak checksum cannot.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use tidemark_base::storage::{OpenMode, Storage};
use uuid::Uuid;

use super::{Link, Opened, ToolError, chain_order};
use crate::companion::{Identity, SLOT_BYTES};
use crate::error::LogError;
use crate::format::{Defect, DefectKind, HrlFile};
use crate::name::LogName;
use crate::reader::{LogReader, RecordKind};

#[derive(Debug, Serialize)]
pub struct VerifyReport {
    pub sound: bool,
    pub files: Vec<FileReport>,
    /// What keeps the files from being one chain. Empty for a single file.
    pub chain_defects: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct FileReport {
    pub path: PathBuf,
    pub unique_id: Option<Uuid>,
    pub previous_unique_id: Option<Uuid>,
    pub entries: u64,
    pub data_bytes: u64,
    /// Entries whose data nothing in this file vouches for: Hyper-V writes none.
    pub entries_without_data_checksum: u64,
    /// Where the first of these are.
    pub without_data_checksum: Vec<EntryName>,
    pub companion: Companion,
    pub defect_count: u64,
    /// The first of them.
    pub defects: Vec<DefectReport>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Companion {
    Absent,
    Verified,
    Defective,
}

#[derive(Debug, Serialize)]
pub struct EntryName {
    pub entry_offset: u64,
    pub byte_offset: u64,
    pub data_length: u32,
}

#[derive(Debug, Serialize)]
pub struct DefectReport {
    pub offset: u64,
    pub what: String,
    /// In the companion and not in the log itself.
    pub in_companion: bool,
    /// A known log of Hyper-V has it: reported, but no reason not to apply the log.
    #[serde(skip)]
    pub(crate) is_tolerable: bool,
}

/// As many defects, and entries without a checksum, are listed for a file; the rest is counted.
pub const LISTED_MAX: usize = 1000;
/// Data is read in parts of this size.
pub(crate) const PART_BYTES: usize = 1 << 20;

impl FileReport {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            unique_id: None,
            previous_unique_id: None,
            entries: 0,
            data_bytes: 0,
            entries_without_data_checksum: 0,
            without_data_checksum: Vec::new(),
            companion: Companion::Absent,
            defect_count: 0,
            defects: Vec::new(),
        }
    }

    fn add(&mut self, defect: Defect) {
        let is_tolerable = matches!(defect.kind, DefectKind::HeaderChecksum(_));
        self.list(defect.offset, defect.kind.to_string(), false, is_tolerable);
    }

    fn list(&mut self, offset: u64, what: String, in_companion: bool, is_tolerable: bool) {
        self.defect_count += 1;
        if self.defects.len() < LISTED_MAX {
            self.defects.push(DefectReport { offset, what, in_companion, is_tolerable });
        }
    }

    /// The first defect for which the log must not be replayed.
    pub(crate) fn first_intolerable(&self) -> Option<&DefectReport> {
        self.defects.iter().find(|defect| !defect.is_tolerable)
    }

    pub(crate) fn link(&self) -> Option<Link> {
        Some(Link { path: self.path.clone(), id: self.unique_id?, previous: self.previous_unique_id? })
    }
}

/// Checks each file, and that together they are a chain where more than one is given.
pub fn verify(paths: &[PathBuf]) -> Result<VerifyReport, ToolError> {
    let files: Vec<FileReport> = paths.iter().map(|path| verify_file(path)).collect::<Result<_, _>>()?;
    let mut chain_defects = Vec::new();
    if files.len() > 1 {
        let links: Vec<Link> = files.iter().filter_map(FileReport::link).collect();
        chain_defects = chain_order(&links).err().unwrap_or_default();
    }
    let sound = chain_defects.is_empty() && files.iter().all(|file| file.defect_count == 0);
    Ok(VerifyReport { sound, files, chain_defects })
}

pub(crate) fn verify_file(path: &Path) -> Result<FileReport, ToolError> {
    let opened = Opened::open(path)?;
    let mut report = FileReport::new(path);
    match HrlFile::header_of(&opened.file) {
        Ok((header, _)) => {
            report.unique_id = Some(header.unique_id);
            report.previous_unique_id = Some(header.previous_unique_id);
        }
        Err(defect) => {
            report.add(defect);
            return Ok(report);
        }
    }
    match HrlFile::open(&opened.file) {
        Ok(file) => verify_entries(&file, &mut report),
        Err(defect) => report.add(defect),
    }
    verify_companion(&opened, &mut report);
    Ok(report)
}

fn verify_entries(file: &HrlFile<'_>, report: &mut FileReport) {
    let mut buffer = vec![0; PART_BYTES];
    let report = std::cell::RefCell::new(report);
    for warning in file.warnings() {
        let is_tolerable = matches!(warning.kind, DefectKind::HeaderChecksum(_));
        report.borrow_mut().list(warning.offset, warning.kind.to_string(), false, is_tolerable);
    }
    let checked = file.for_each(
        |located| {
            let mut report = report.borrow_mut();
            report.entries += 1;
            report.data_bytes += u64::from(located.entry.data_bytes);
            match file.data_checksum(located, &mut buffer) {
                Ok(Some(pair)) if pair.is_ok() => {}
                Ok(Some(pair)) => report.add(DefectKind::DataChecksum(pair).at(located.data_offset)),
                Ok(None) => {
                    report.entries_without_data_checksum += 1;
                    if report.without_data_checksum.len() < LISTED_MAX {
                        report.without_data_checksum.push(EntryName {
                            entry_offset: located.entry_offset,
                            byte_offset: located.entry.byte_offset,
                            data_length: located.entry.data_bytes,
                        });
                    }
                }
                Err(defect) => report.add(defect),
            }
            Ok::<(), std::convert::Infallible>(())
        },
        |defect| {
            report.borrow_mut().add(defect);
            Ok(())
        },
    );
    match checked {
        Ok(()) => {}
    }
}

/// A log of ours has its companion beside it, under the name that belongs to it.
fn verify_companion(opened: &Opened, report: &mut FileReport) {
    let Some(name) = own_name(&opened.file_name) else { return };
    let Ok(true) = opened.storage.exists(&name.companion()) else { return };
    report.companion = Companion::Verified;
    if let Err(error) = read_by_companion(opened.storage.clone(), &name) {
        report.companion = Companion::Defective;
        match error {
            LogError::Damaged { path, offset, what } => {
                report.list(offset, what, path == opened.storage.path(&name.companion()), false);
            }
            error => {
                let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
                report.list(0, format!("{error}{}", source.unwrap_or_default()), true, false);
            }
        }
    }
}

fn own_name(file_name: &str) -> Option<LogName> {
    let (stem, _) = file_name.strip_suffix(".hrl")?.rsplit_once('.')?;
    LogName::parse(stem, file_name).map(|(name, _)| name)
}

fn read_by_companion(storage: Arc<dyn Storage>, name: &LogName) -> Result<(), LogError> {
    let io = |source| LogError::Io { verb: "read", path: storage.path(&name.companion()), source };
    let mut slot = [0; SLOT_BYTES];
    let companion = storage.open(&name.companion(), OpenMode::Read).map_err(io)?;
    let identity = match companion.read_at(0, &mut slot) {
        Ok(()) => Identity::decode(&slot),
        Err(_) => None,
    };
    let identity = identity.ok_or_else(|| LogError::Damaged {
        path: storage.path(&name.companion()),
        offset: 0,
        what: "this is no companion".to_owned(),
    })?;
    let log = LogReader::open(storage.clone(), name, identity.disk)?;
    let mut records = log.records();
    let mut buffer = Vec::new();
    while let Some(record) = records.next()? {
        if let RecordKind::Write { extent, .. } = &record.kind {
            buffer.resize(extent.length as usize, 0);
            log.read_data(&record, &mut buffer)?;
        }
    }
    match records.position() == log.end() {
        true => Ok(()),
        false => Err(LogError::Damaged {
            path: storage.path(&name.companion()),
            offset: crate::companion::control_at::END,
            what: "the records end elsewhere than the log".to_owned(),
        }),
    }
}
