//! Hyper-V itself: by WMI, which the system's own PowerShell speaks ([`wmi`]), and by `virtdisk.dll` ([`virtdisk`]). Nothing is decided here.

mod virtdisk;
mod wmi;

use std::path::Path;
use std::sync::OnceLock;

use tidemark_base::storage::RealStorage;

use crate::error::RctError;
use crate::hypervisor::{Checkpoint, Found, Hypervisor, Image, ReferencePoint};
use virtdisk::Library;

/// The Hyper-V of this host.
#[derive(Default)]
pub struct HyperV {
    /// Found when it is first needed: an agent that tracks nothing runs on any Windows.
    library: OnceLock<Result<Library, String>>,
}

impl HyperV {
    pub fn new() -> Self {
        Self::default()
    }

    fn library(&self) -> Result<&Library, RctError> {
        let found = self.library.get_or_init(Library::find);
        found.as_ref().map_err(|reason| RctError::NoHyperV { reason: reason.clone() })
    }
}

impl Hypervisor for HyperV {
    fn find(&self, disk: &Path) -> Result<Found, RctError> {
        // Before anything is promised: without it nothing can be told.
        self.library()?;
        wmi::find(disk)
    }

    fn look(&self, machine: &str) -> Result<Found, RctError> {
        wmi::look(machine)
    }

    fn free_bytes(&self, disk: &Path) -> Result<u64, RctError> {
        let folder = disk.parent().unwrap_or(disk);
        let failed = |source| RctError::Io { what: "see what is free in", path: folder.to_owned(), source };
        RealStorage::open_folder(folder).available_bytes().map_err(failed)
    }

    fn checkpoint(&self, machine: &str, quiet: bool) -> Result<Checkpoint, RctError> {
        wmi::checkpoint(machine, quiet)
    }

    fn convert(&self, checkpoint: &str) -> Result<ReferencePoint, RctError> {
        wmi::convert(checkpoint)
    }

    fn remove(&self, reference_point: &str) -> Result<(), RctError> {
        wmi::remove(reference_point)
    }

    fn switch_on(&self, file: &Path) -> Result<(), RctError> {
        self.library()?.switch_on(file)
    }

    fn open(&self, file: &Path) -> Result<Box<dyn Image>, RctError> {
        self.library()?.open(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no Hyper-V (as under Wine): refused by name, and nothing hangs.
    #[test]
    fn a_system_without_hyper_v_is_told_by_name() {
        let host = HyperV::new();
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("web.vhdx");
        let refused = host.find(&disk).unwrap_err();
        assert!(matches!(refused, RctError::NoHyperV { .. } | RctError::NoMachine { .. }), "{refused}");
        assert!(!refused.help().is_empty() && refused.is_a_wrong_question());
        assert!(host.free_bytes(&disk).unwrap() > 0);
    }
}
