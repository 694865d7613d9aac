use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_host::freeze::Freezer;
use tidemark_proto::control::{Failure, FailureKind};

pub fn host_name() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

/// No disk is tracked past which the agent's state could not be kept.
pub fn memory_folder(_state: &Path) -> Option<PathBuf> {
    None
}

/// Nothing is made quiet here: who asks for an app-consistent point of a machine is told so.
pub fn applications(_folder: PathBuf) -> Option<Arc<dyn Freezer>> {
    None
}

/// Who runs machines at home. A Hyper-V host's machines are imported or tracked, and a planned failover is refused before anybody is asked.
pub struct Owners;

impl Owners {
    pub fn new(_folder: PathBuf) -> Self {
        Self
    }

    pub async fn execute(&self, _call: &str) -> Result<String, Failure> {
        let message = "machines are neither shut down nor started by an agent on Windows";
        Err(Failure::new(FailureKind::Conflict, message, "shut it down yourself, in Hyper-V's own way"))
    }
}
