//! Images that `qemu-nbd` reads, read-only.

use std::path::Path;

use tidemark_base::Extent;
use tidemark_base::disk::Allocation;
use tidemark_nbd::client::{Client, ClientError};
use tidemark_nbd::qemu::{QemuAccess, QemuNbd, QemuNbdError};

use super::Format;

pub type OpenError = QemuNbdError;
pub type ReadError = ClientError;

pub fn help(error: &OpenError) -> &'static str {
    match error {
        QemuNbdError::Run { .. } => "install QEMU's tools (Debian: qemu-utils)",
        _ => super::UNREADABLE,
    }
}

pub struct Reader {
    // Dropped first, so that the child sees its client go.
    client: Client,
    _server: QemuNbd,
}

impl Reader {
    pub fn open(path: &Path, format: Format) -> Result<Self, OpenError> {
        let format = match format {
            Format::Vhdx => "vhdx",
            Format::Vhd => "vpc",
        };
        let mut server = QemuNbd::start(path, format, QemuAccess::Read)?;
        Ok(Self { client: server.connect()?, _server: server })
    }

    pub fn bytes(&self) -> u64 {
        self.client.bytes()
    }

    pub fn status(&mut self, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ReadError> {
        self.client.block_status(extent)
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.client.read(offset, buffer)
    }
}
