use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_host::freeze::Freezer;

pub use crate::roles::owner::Owners;

pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default()
}

/// A folder in memory for whoever keeps its state there: of its own in the one that its unit has, or in /run.
pub fn memory_folder(state: &Path) -> Option<PathBuf> {
    let own = std::env::var_os("RUNTIME_DIRECTORY").filter(|folder| !folder.as_bytes().contains(&b':'));
    let base = own.map_or_else(|| PathBuf::from("/run/tidemark"), PathBuf::from);
    let name = blake3::hash(state.as_os_str().as_bytes()).to_hex();
    Some(base.join(format!("state-{}", &name[..16])))
}

/// What makes the applications of machines quiet, as it is installed in the folder.
pub fn applications(folder: PathBuf) -> Option<Arc<dyn Freezer>> {
    Some(Arc::new(crate::roles::quiet::Applications::new(folder)))
}
