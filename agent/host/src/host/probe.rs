//! Whether disks could be protected, and what they would need. Nothing is changed.

use std::path::{Path, PathBuf};

use tidemark_base::DiskId;
use tidemark_base::storage::{RealStorage, allocated_bytes};
use tidemark_proto::control::{LogRoom, ProbedDisk, Via};

use super::Host;
use crate::capture::CaptureProvider;
use crate::error::HostError;
use crate::log::LogLimits;

impl Host {
    /// Whether these disks could be protected.
    pub fn probe(&self, paths: &[String], via: Via) -> Result<Vec<ProbedDisk>, HostError> {
        let provider = self.shared.provider(via);
        let state = self.shared.config.state_of(&**provider, paths.iter().map(String::as_str));
        paths
            .iter()
            .map(|path| {
                let bytes = provider.probe(path.as_ref(), state)?;
                let log = via.keeps_log().then(|| self.log_room(&**provider, path.as_ref(), state)).flatten();
                Ok(ProbedDisk { path: path.clone(), bytes, occupied_bytes: occupied(path.as_ref()), log })
            })
            .collect()
    }

    /// Beside a file; where the agent keeps its state for a device.
    fn log_room(&self, provider: &dyn CaptureProvider, path: &Path, state: &Path) -> Option<LogRoom> {
        let place = provider.place(path, DiskId::random());
        let beside = place.parent().filter(|_| !is_device(path)).map(Path::to_owned);
        let folder = first_that_exists(beside.unwrap_or_else(|| state.to_owned()))?;
        let free_bytes = RealStorage::open_folder(folder.clone()).available_bytes().ok()?;
        let limits =
            LogLimits { rotate_bytes: 0, limit_bytes: 0, reserve_bytes: self.shared.config.limits.log_reserve_bytes };
        Some(LogRoom { folder: folder.display().to_string(), free_bytes, needed_bytes: limits.resume_bytes() })
    }
}

/// Of its volume. A device, and a disk that is no file here, do not say.
fn occupied(path: &Path) -> Option<u64> {
    path.is_file().then(|| allocated_bytes(path).ok()).flatten()
}

fn is_device(path: &Path) -> bool {
    path.exists() && !path.is_file()
}

fn first_that_exists(folder: PathBuf) -> Option<PathBuf> {
    folder.ancestors().find(|folder| folder.is_dir()).map(Path::to_owned)
}
