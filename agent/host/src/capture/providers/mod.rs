//! Who catches changes on this host, and what can go wrong with them.

use std::sync::Arc;

use tidemark_proto::control::Via;

use super::CaptureProvider;

mod elsewhere;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
pub use windows::*;

/// All of them, by the names that machines are protected via.
pub struct Providers {
    all: Vec<(Via, Arc<dyn CaptureProvider>)>,
}

impl Providers {
    pub fn of(&self, via: Via) -> &Arc<dyn CaptureProvider> {
        let found = self.all.iter().find(|(name, _)| *name == via);
        &found.expect("each way has a provider, if only one that refuses").1
    }

    /// Those that write to disks themselves; they are ended before the disks are left.
    pub fn writers(&self) -> impl Iterator<Item = &Arc<dyn CaptureProvider>> {
        let writes = |via: &Via| matches!(via, Via::Nbd | Via::Fuse | Via::Hrl);
        self.all.iter().filter(move |(via, _)| writes(via)).map(|(_, provider)| provider)
    }
}
