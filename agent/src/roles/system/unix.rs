use std::path::PathBuf;
use std::sync::Arc;

use tidemark_host::freeze::Freezer;

pub use crate::roles::owner::Owners;

pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default()
}

/// What makes the applications of machines quiet, as it is installed in the folder.
pub fn applications(folder: PathBuf) -> Option<Arc<dyn Freezer>> {
    Some(Arc::new(crate::roles::quiet::Applications::new(folder)))
}
