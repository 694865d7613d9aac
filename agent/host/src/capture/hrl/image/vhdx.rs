//! VHDX images, read by a crate: their log is replayed in memory when they are opened. It does not tell holes, which are read as zeroes;
//! and it knows neither VHD nor what lies on another image.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use tidemark_base::Extent;
use tidemark_base::disk::Allocation;
use vhdx::{VhdxError, VhdxReader};

use super::Format;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is a VHD, which is not read on Windows", path.display())]
    Vhd { path: PathBuf },
    #[error("{} lies on another image", path.display())]
    Differencing { path: PathBuf },
    #[error("cannot open {}", path.display())]
    Unreadable { path: PathBuf, source: VhdxError },
}

pub type ReadError = io::Error;

pub fn help(error: &OpenError) -> &'static str {
    match error {
        OpenError::Vhd { .. } => "make it a VHDX (`Convert-VHD`), or import it on a Linux host",
        OpenError::Differencing { .. } => "merge the machine's checkpoints, and name the disk that is left",
        OpenError::Unreadable { .. } => super::UNREADABLE,
    }
}

pub struct Reader {
    image: VhdxReader,
}

impl Reader {
    pub fn open(path: &Path, format: Format) -> Result<Self, OpenError> {
        if format == Format::Vhd {
            return Err(OpenError::Vhd { path: path.to_owned() });
        }
        let image = VhdxReader::open(path).map_err(|source| match source {
            VhdxError::DifferencingNotSupported => OpenError::Differencing { path: path.to_owned() },
            source => OpenError::Unreadable { path: path.to_owned(), source },
        })?;
        Ok(Self { image })
    }

    pub fn bytes(&self) -> u64 {
        self.image.virtual_disk_size()
    }

    pub fn status(&mut self, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ReadError> {
        Ok(vec![(extent, Allocation::Data)])
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.image.seek(SeekFrom::Start(offset))?;
        self.image.read_exact(buffer)
    }
}
