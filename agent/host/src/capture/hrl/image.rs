//! A host's disk image, read by `qemu-nbd`: nobody of ours writes to it.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tidemark_base::Extent;
use tidemark_base::disk::Allocation;
use tidemark_base::stop::Stop;
use tidemark_base::storage::create_private_folder;
use tidemark_base::time::Instant;
use tidemark_nbd::client::{Client, ClientError};

const START_LIMIT: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Where a VHDX has its two headers; the one with the greater sequence number counts.
const VHDX_HEADERS: [u64; 2] = [64 << 10, 128 << 10];

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{} does not exist", path.display())]
    Absent { path: PathBuf },
    #[error("{} is neither named .vhdx nor .vhd", path.display())]
    Kind { path: PathBuf },
    #[error("cannot run qemu-nbd")]
    Run { source: io::Error },
    #[error("qemu-nbd cannot open {}: {message}", path.display())]
    Refused { path: PathBuf, message: String },
    #[error("qemu-nbd, which opens {}, did not get ready", path.display())]
    NotReady { path: PathBuf },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: ClientError },
    #[error("{} has {bytes} bytes, which is not a positive multiple of 512", path.display())]
    OddSize { path: PathBuf, bytes: u64 },
}

impl ImageError {
    pub fn help(&self) -> &'static str {
        match self {
            ImageError::Absent { .. } => "check the path, and that the share is mounted",
            ImageError::Kind { .. } => "name the .vhdx or .vhd file whose .hrl files lie beside it",
            ImageError::Run { .. } => "install QEMU's tools (Debian: qemu-utils)",
            ImageError::Refused { .. } | ImageError::NotReady { .. } | ImageError::Read { .. } => {
                "check that it is a sound image (`qemu-img check`) and that its host lets others read it now; where it does not, give a checkpoint"
            }
            ImageError::OddSize { .. } => "resize the disk to whole sectors at its host",
        }
    }
}

/// An image that is open for reading.
pub struct Image {
    client: Option<Client>,
    child: Child,
    folder: PathBuf,
    path: PathBuf,
}

fn format_of(path: &Path) -> Result<&'static str, ImageError> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    match ending.as_str() {
        "vhdx" | "avhdx" => Ok("vhdx"),
        "vhd" | "avhd" => Ok("vpc"),
        _ => Err(ImageError::Kind { path: path.to_owned() }),
    }
}

impl Image {
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let format = format_of(path)?;
        if !path.exists() {
            return Err(ImageError::Absent { path: path.to_owned() });
        }
        let run = |source| ImageError::Run { source };
        let folder = std::env::temp_dir().join(format!("tidemark-import-{}", uuid::Uuid::new_v4()));
        create_private_folder(&folder).map_err(run)?;
        // An absolute path cannot be taken for an option or a protocol such as `nbd:`.
        let absolute = std::path::absolute(path).map_err(run)?;
        let child = Command::new("qemu-nbd")
            .args(["--read-only", "--format", format, "--socket"])
            .arg(folder.join("socket"))
            .arg("--")
            .arg(absolute)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let child = child.map_err(|source| {
            let _ = std::fs::remove_dir_all(&folder);
            ImageError::Run { source }
        })?;
        let mut image = Self { client: None, child, folder, path: path.to_owned() };
        let client = image.connect()?;
        let bytes = client.bytes();
        if bytes == 0 || !bytes.is_multiple_of(512) {
            return Err(ImageError::OddSize { path: path.to_owned(), bytes });
        }
        image.client = Some(client);
        Ok(image)
    }

    fn connect(&mut self) -> Result<Client, ImageError> {
        let deadline = Instant::now() + START_LIMIT;
        let never = Stop::new();
        loop {
            if let Ok(client) = Client::connect_unix(&self.folder.join("socket"), "") {
                return Ok(client);
            }
            if let Ok(Some(_)) = self.child.try_wait() {
                let mut message = String::new();
                if let Some(stderr) = &mut self.child.stderr {
                    let _ = stderr.take(4096).read_to_string(&mut message);
                }
                return Err(ImageError::Refused { path: self.path.clone(), message: message.trim().to_owned() });
            }
            if Instant::now() > deadline {
                return Err(ImageError::NotReady { path: self.path.clone() });
            }
            never.wait_for(LOOK_AGAIN);
        }
    }

    fn client(&mut self) -> Result<&mut Client, ImageError> {
        self.client.as_mut().ok_or_else(|| ImageError::NotReady { path: self.path.clone() })
    }

    pub fn bytes(&self) -> u64 {
        self.client.as_ref().map_or(0, Client::bytes)
    }

    /// What is known of a range without reading it.
    pub fn status(&mut self, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ImageError> {
        let path = self.path.clone();
        self.client()?.block_status(extent).map_err(|source| ImageError::Read { path, source })
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let path = self.path.clone();
        self.client()?.read(offset, buffer).map_err(|source| ImageError::Read { path, source })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.client = None;
        // Does nothing to a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Of a VHDX: what its writer changes at the first write after each opening. `None` for others, and where it cannot be read now. A header that
/// is being written may be read as a wrong one: whoever acts on a difference looks again first.
pub fn data_write_guid(path: &Path) -> Option<uuid::Uuid> {
    use std::os::unix::fs::FileExt;
    if format_of(path).ok()? != "vhdx" {
        return None;
    }
    let file = std::fs::File::open(path).ok()?;
    let headers = VHDX_HEADERS.iter().filter_map(|&at| {
        let mut header = [0; 48];
        file.read_exact_at(&mut header, at).ok()?;
        let (signature, sequence, guid) = (&header[..4], header.get(8..16)?, header.get(32..48)?);
        let sequence = u64::from_le_bytes(sequence.try_into().ok()?);
        (signature == b"head").then_some((sequence, uuid::Uuid::from_bytes_le(guid.try_into().ok()?)))
    });
    headers.max_by_key(|(sequence, _)| *sequence).map(|(_, guid)| guid)
}
