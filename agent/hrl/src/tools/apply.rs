//! Replays logs onto a disk, oldest first.

use std::path::PathBuf;

use serde::Serialize;
use tidemark_base::Extent;
use tidemark_base::disk::{Disk, Durability, is_zero};

use super::verify::{PART_BYTES, verify_file};
use super::{Link, Opened, ToolError, chain_order};
use crate::format::{Defect, HrlFile};

#[derive(Debug, Serialize)]
pub struct ApplyReport {
    /// In the order in which they were applied.
    pub logs: Vec<PathBuf>,
    pub entries: u64,
    pub data_bytes: u64,
    /// Entries whose data nothing vouched for.
    pub entries_without_data_checksum: u64,
    pub warnings: Vec<String>,
}

/// Logs that were checked and put in order.
pub struct ApplyPlan {
    logs: Vec<Opened>,
    report: ApplyReport,
}

impl ApplyPlan {
    /// Reads every log completely; refuses any that is not sound, and logs that are no chain. Nothing is written yet.
    pub fn check(paths: &[PathBuf]) -> Result<Self, ToolError> {
        let mut links: Vec<Link> = Vec::new();
        let mut report = ApplyReport {
            logs: Vec::new(),
            entries: 0,
            data_bytes: 0,
            entries_without_data_checksum: 0,
            warnings: Vec::new(),
        };
        for path in paths {
            // An error that has its own help, such as `not closed`, is said as itself.
            let opened = Opened::open(path)?;
            HrlFile::open(&opened.file).map_err(|defect| opened.defect(defect))?;
            let file = verify_file(path)?;
            if let Some(first) = file.first_intolerable() {
                let first = format!("at byte {}: {}", first.offset, first.what);
                return Err(ToolError::Unsound { path: path.clone(), count: file.defect_count, first });
            }
            let name = path.display();
            report.warnings.extend(file.defects.iter().map(|defect| format!("{name}: {}", defect.what)));
            report.entries_without_data_checksum += file.entries_without_data_checksum;
            links.extend(file.link());
        }
        let order = chain_order(&links).map_err(|faults| ToolError::NotAChain { what: faults.join("; ") })?;
        let logs = order.iter().map(|&index| Opened::open(&paths[index])).collect::<Result<_, _>>()?;
        report.logs = order.iter().map(|&index| paths[index].clone()).collect();
        Ok(Self { logs, report })
    }

    /// Writes every entry, in order, and flushes the disk.
    pub fn apply(mut self, disk: &dyn Disk) -> Result<ApplyReport, ToolError> {
        for log in &self.logs {
            check_places(log, disk.bytes())?;
        }
        let mut buffer = vec![0; PART_BYTES];
        for log in &self.logs {
            let file = HrlFile::open(&log.file).map_err(|defect| log.defect(defect))?;
            let report = &mut self.report;
            file.for_each(
                |located| {
                    file.read_data(located, &mut buffer, |done, data| {
                        let extent = Extent::new(located.entry.byte_offset + done, data.len() as u64);
                        write(disk, extent, data).map_err(|source| Failed(ToolError::Write { extent, source }))
                    })?;
                    report.entries += 1;
                    report.data_bytes += u64::from(located.entry.data_bytes);
                    Ok(())
                },
                // Every log was checked: a defect now means that the file changes meanwhile.
                |defect| Err(Failed::from(defect)),
            )
            .map_err(|failed: Failed| failed.0.named(log))?;
        }
        disk.flush().map_err(|source| ToolError::Flush { source })?;
        Ok(self.report)
    }
}

fn write(disk: &dyn Disk, extent: Extent, data: &[u8]) -> std::io::Result<()> {
    if is_zero(data) {
        disk.zero(extent, true, Durability::Cached)
    } else {
        disk.write_at(extent.offset, data, Durability::Cached)
    }
}

/// A defect learns its file's name where it leaves the loop over entries.
struct Failed(ToolError);

impl From<Defect> for Failed {
    fn from(defect: Defect) -> Self {
        Self(ToolError::Defect { path: PathBuf::new(), defect })
    }
}

impl ToolError {
    fn named(self, log: &Opened) -> Self {
        match self {
            ToolError::Defect { defect, .. } => log.defect(defect),
            other => other,
        }
    }
}

/// Refuses before anything is written.
fn check_places(log: &Opened, disk_bytes: u64) -> Result<(), ToolError> {
    let file = HrlFile::open(&log.file).map_err(|defect| log.defect(defect))?;
    file.for_each(
        |located| {
            let extent = Extent::new(located.entry.byte_offset, u64::from(located.entry.data_bytes));
            match extent.is_valid_on(disk_bytes) {
                true => Ok(()),
                false => Err(ToolError::BeyondDisk {
                    path: log.path.clone(),
                    entry_offset: located.entry_offset,
                    extent,
                    disk_bytes,
                }),
            }
        },
        |defect| Err(log.defect(defect)),
    )
}
