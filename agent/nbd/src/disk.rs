//! Any [`Disk`] as an [`Export`]: plain serving, and the reference that other exports are measured against.

use std::io;
use std::sync::Arc;

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Disk, Durability, FileDisk};

use crate::cached::CachedReader;
use crate::export::{Export, WriteRequest};

/// Serves a [`Disk`].
pub struct DiskExport {
    disk: Arc<dyn Disk>,
    reader: Option<CachedReader>,
    read_only: bool,
    writes_inline: bool,
    zeroes_fast: bool,
}

impl DiskExport {
    /// Every operation on worker threads: right for disks that may wait for something.
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, reader: None, read_only: false, writes_inline: false, zeroes_fast: false }
    }

    /// A file or device: cached reads and all writes without a change of thread.
    pub fn of_file(disk: Arc<FileDisk>) -> io::Result<Self> {
        let reader = CachedReader::new(disk.file())?;
        let zeroes_fast = !disk.is_block_device();
        Ok(Self { disk, reader: Some(reader), read_only: false, writes_inline: true, zeroes_fast })
    }

    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }
}

impl Export for DiskExport {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn zeroes_fast(&self) -> bool {
        self.zeroes_fast
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Option<io::Result<()>> {
        self.reader.as_ref()?.try_read(offset, buffer)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buffer)
    }

    fn writes_inline(&self) -> bool {
        self.writes_inline
    }

    fn write_batch(&self, writes: &[WriteRequest<'_>], results: &mut [io::Result<()>]) {
        for (write, result) in writes.iter().zip(results) {
            let durability = if write.fua { Durability::Durable } else { Durability::Cached };
            *result = self.disk.write_at(write.offset, write.data, durability);
        }
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        self.disk.zero(extent, discard, durability)
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.disk.allocation(offset)
    }
}
