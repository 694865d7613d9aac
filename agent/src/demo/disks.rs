//! Disk images as the demonstration handles them: hashed, copied with their holes, compared; and disks behind NBD.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tidemark_base::disk::{Access, Allocation, Disk, FileDisk};
use tidemark_nbd::Client;

use crate::cli::CliError;

/// What is read at once.
const STEP_BYTES: usize = 1 << 20;
const COMPARE_BYTES: usize = 4096;

pub fn failed(path: &Path, error: io::Error) -> CliError {
    CliError::new(
        format!("{}: {error}", path.display()),
        "check the room and the owner of the demonstration's folder, or name another with --dir",
    )
}

fn open(path: &Path) -> Result<FileDisk, CliError> {
    FileDisk::open(path, Access::Read).map_err(|error| CliError::new(error.to_string(), error.help()))
}

/// BLAKE3 of a whole image.
pub fn hash(path: &Path) -> Result<blake3::Hash, CliError> {
    let disk = open(path)?;
    let mut hasher = blake3::Hasher::new();
    each_run(&disk, path, |_, data| {
        hasher.update(data);
        Ok(())
    })?;
    Ok(hasher.finalize())
}

/// Copies an image with its holes; gives the hash of what was copied.
pub fn copy(from: &Path, to: &Path) -> Result<blake3::Hash, CliError> {
    let disk = open(from)?;
    let target = File::create(to)
        .and_then(|file| file.set_len(disk.bytes()).map(|()| file))
        .map_err(|error| failed(to, error))?;
    let mut hasher = blake3::Hasher::new();
    each_run(&disk, from, |offset, data| {
        hasher.update(data);
        if tidemark_base::disk::is_zero(data) {
            return Ok(());
        }
        target.write_all_at(data, offset).map_err(|error| failed(to, error))
    })?;
    Ok(hasher.finalize())
}

/// Everything in order; holes come as zeroes without being read.
fn each_run(
    disk: &FileDisk,
    path: &Path,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut buffer = vec![0; STEP_BYTES];
    let zeroes = vec![0; STEP_BYTES];
    let mut offset = 0;
    while offset < disk.bytes() {
        let (run, allocation) = disk.allocation(offset).map_err(|error| failed(path, error))?;
        let end = (offset + run).min(disk.bytes());
        while offset < end {
            let step = (end - offset).min(STEP_BYTES as u64) as usize;
            let data = match allocation {
                Allocation::Hole => &zeroes[..step],
                Allocation::Data => {
                    disk.read_at(offset, &mut buffer[..step]).map_err(|error| failed(path, error))?;
                    &buffer[..step]
                }
            };
            take(offset, data)?;
            offset += step as u64;
        }
    }
    Ok(())
}

/// What differs between two images of one size: (offset, content of the second).
pub fn differences(before: &Path, after: &Path) -> Result<Vec<(u64, Vec<u8>)>, CliError> {
    let (old, new) = (open(before)?, open(after)?);
    let mut old_data = vec![0; STEP_BYTES];
    let mut found = Vec::new();
    each_run(&new, after, |offset, data| {
        let old_data = &mut old_data[..data.len()];
        old.read_at(offset, old_data).map_err(|error| failed(before, error))?;
        for (index, (old, new)) in old_data.chunks(COMPARE_BYTES).zip(data.chunks(COMPARE_BYTES)).enumerate() {
            if old != new {
                found.push((offset + (index * COMPARE_BYTES) as u64, new.to_vec()));
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// A disk behind NBD.
pub struct NbdDisk {
    client: Client,
    address: String,
}

impl NbdDisk {
    /// `nbd+unix:///NAME?socket=PATH`
    pub fn connect(address: &str) -> Result<Self, CliError> {
        let parts = address
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="))
            .map(|(name, socket)| (name.to_owned(), PathBuf::from(socket)));
        let (name, socket) = parts.ok_or_else(|| {
            CliError::new(format!("{address:?} is no NBD address on a Unix socket"), "run the same version everywhere")
        })?;
        let client = Client::connect_unix(&socket, &name).map_err(|error| broken(address, &error))?;
        Ok(Self { client, address: address.to_owned() })
    }

    pub fn bytes(&self) -> u64 {
        self.client.bytes()
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), CliError> {
        self.client.read(offset, buffer).map_err(|error| broken(&self.address, &error))
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), CliError> {
        self.client.write(offset, data).map_err(|error| broken(&self.address, &error))
    }

    pub fn flush(&mut self) -> Result<(), CliError> {
        self.client.flush().map_err(|error| broken(&self.address, &error))
    }

    /// Copies all of it into a file with holes; gives the hash.
    pub fn copy_to(&mut self, to: &Path) -> Result<blake3::Hash, CliError> {
        let target = File::create(to)
            .and_then(|file| file.set_len(self.bytes()).map(|()| file))
            .map_err(|error| failed(to, error))?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; STEP_BYTES];
        let mut offset = 0;
        while offset < self.bytes() {
            let step = (self.bytes() - offset).min(STEP_BYTES as u64) as usize;
            let data = &mut buffer[..step];
            self.read(offset, data)?;
            hasher.update(data);
            if !tidemark_base::disk::is_zero(data) {
                target.write_all_at(data, offset).map_err(|error| failed(to, error))?;
            }
            offset += step as u64;
        }
        Ok(hasher.finalize())
    }
}

fn broken(address: &str, error: &dyn std::error::Error) -> CliError {
    let failure = tidemark_proto::control::Failure::from_error(
        tidemark_proto::control::FailureKind::Failed,
        error,
        "see the demonstration's log; --keep leaves it",
    );
    CliError::new(format!("disk {address}: {}", failure.message), failure.help)
}
