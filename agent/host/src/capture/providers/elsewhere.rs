//! What this system does not have.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tidemark_base::DiskId;
use tidemark_proto::control::Via;

use super::ProviderError;
use crate::capture::{Address, CaptureProvider};
use crate::error::HostError;
use crate::protected::ProtectedDisk;

/// In the place of what another system alone has: says so.
pub(super) struct Elsewhere {
    pub via: Via,
}

impl Elsewhere {
    fn refuse<T>(&self) -> Result<T, HostError> {
        Err(ProviderError::Elsewhere { via: self.via }.into())
    }
}

impl CaptureProvider for Elsewhere {
    fn probe(&self, _path: &Path, _state: &Path) -> Result<u64, HostError> {
        self.refuse()
    }

    fn prepare(&self, _path: &Path, _disk: DiskId) -> Result<(), HostError> {
        self.refuse()
    }

    fn attach(&self, _name: &str, _disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn detach(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tidemark_proto::control::FailureKind;

    use super::*;

    #[test]
    fn what_another_system_has_is_refused_by_name() {
        let provider = Elsewhere { via: Via::Rct };
        let refused = provider.probe("D:/Machines/web.vhdx".as_ref(), "/".as_ref()).unwrap_err();
        assert!(refused.to_string().contains("via rct on "), "{refused}");
        assert!(refused.kind() == FailureKind::BadRequest && !refused.help().is_empty());
        assert!(provider.prepare("D:/Machines/web.vhdx".as_ref(), DiskId::random()).is_err());
    }
}
