//! A host's disk image, read by others' programs: on Linux `qemu-nbd`, on Windows a reader of VHDX. Nobody of ours writes to it.

#[cfg(unix)]
#[path = "image/qemu.rs"]
mod reader;
#[cfg(windows)]
#[path = "image/vhdx.rs"]
mod reader;
/// Compared with the other one.
#[cfg(all(test, unix))]
#[path = "image/vhdx.rs"]
pub mod vhdx;

use std::path::{Path, PathBuf};

use tidemark_base::Extent;
use tidemark_base::disk::Allocation;
use tidemark_base::storage::read_exact_at;

use reader::{OpenError, ReadError, Reader};

/// Where a VHDX has its two headers; the one with the greater sequence number counts.
const VHDX_HEADERS: [u64; 2] = [64 << 10, 128 << 10];

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{} does not exist", path.display())]
    Absent { path: PathBuf },
    #[error("{} is neither named .vhdx nor .vhd", path.display())]
    Kind { path: PathBuf },
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: ReadError },
    #[error("{} has {bytes} bytes, which is not a positive multiple of 512", path.display())]
    OddSize { path: PathBuf, bytes: u64 },
}

const UNREADABLE: &str = "check that it is a sound image (`qemu-img check`) and that its host lets others read it now; where it does not, give a checkpoint";

impl ImageError {
    pub fn help(&self) -> &'static str {
        match self {
            ImageError::Absent { .. } => "check the path, and that the share is mounted",
            ImageError::Kind { .. } => "name the .vhdx or .vhd file whose .hrl files lie beside it",
            ImageError::Open(error) => reader::help(error),
            ImageError::Read { .. } => UNREADABLE,
            ImageError::OddSize { .. } => "resize the disk to whole sectors at its host",
        }
    }
}

/// An image that is open for reading.
pub struct Image {
    reader: Reader,
    path: PathBuf,
}

/// What Hyper-V keeps disks in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Vhdx,
    Vhd,
}

fn format_of(path: &Path) -> Result<Format, ImageError> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    match ending.as_str() {
        "vhdx" | "avhdx" => Ok(Format::Vhdx),
        "vhd" | "avhd" => Ok(Format::Vhd),
        _ => Err(ImageError::Kind { path: path.to_owned() }),
    }
}

impl Image {
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let format = format_of(path)?;
        if !path.exists() {
            return Err(ImageError::Absent { path: path.to_owned() });
        }
        let reader = Reader::open(path, format)?;
        let bytes = reader.bytes();
        if bytes == 0 || !bytes.is_multiple_of(512) {
            return Err(ImageError::OddSize { path: path.to_owned(), bytes });
        }
        Ok(Self { reader, path: path.to_owned() })
    }

    pub fn bytes(&self) -> u64 {
        self.reader.bytes()
    }

    /// What is known of a range without reading it.
    pub fn status(&mut self, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ImageError> {
        self.reader.status(extent).map_err(|source| ImageError::Read { path: self.path.clone(), source })
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        self.reader.read(offset, buffer).map_err(|source| ImageError::Read { path: self.path.clone(), source })
    }
}

/// Of a VHDX: what its writer changes at the first write after each opening. `None` for others, and where it cannot be read now. A header that
/// is being written may be read as a wrong one: whoever acts on a difference looks again first.
pub fn data_write_guid(path: &Path) -> Option<uuid::Uuid> {
    if format_of(path).ok()? != Format::Vhdx {
        return None;
    }
    let file = std::fs::File::open(path).ok()?;
    let headers = VHDX_HEADERS.iter().filter_map(|&at| {
        let mut header = [0; 48];
        read_exact_at(&file, &mut header, at).ok()?;
        let (signature, sequence, guid) = (&header[..4], header.get(8..16)?, header.get(32..48)?);
        let sequence = u64::from_le_bytes(sequence.try_into().ok()?);
        (signature == b"head").then_some((sequence, uuid::Uuid::from_bytes_le(guid.try_into().ok()?)))
    });
    headers.max_by_key(|(sequence, _)| *sequence).map(|(_, guid)| guid)
}
