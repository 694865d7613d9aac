//! What the system says of a block device, and why one cannot be tracked.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tidemark_base::SECTOR_BYTES;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{path} is not a block device")]
    NotADevice { path: PathBuf },
    #[error("{path} is a zoned device, whose writes move what they do not name")]
    Zoned { path: PathBuf },
    #[error("{path} is mapped into the memory of programs (DAX): its writes pass by the block layer")]
    Dax { path: PathBuf },
    #[error("the kernel does not count what is in flight to {path}")]
    NotCounted { path: PathBuf },
    #[error("the kernel does not tell one disk from the next behind {path}")]
    NoSequence { path: PathBuf },
    #[error("cannot examine {path}")]
    Io { path: PathBuf, source: io::Error },
}

impl DeviceError {
    pub fn help(&self) -> &'static str {
        match self {
            DeviceError::NotADevice { .. } => {
                "name a block device; a disk image in a file is protected with `--via nbd`, or through a loop device on it"
            }
            DeviceError::Zoned { .. } | DeviceError::Dax { .. } => "protect it in another way: `--via nbd`",
            DeviceError::NotCounted { .. } => "turn the counting on: `echo 1 > /sys/block/DISK/queue/iostats`",
            DeviceError::NoSequence { .. } => "a kernel from 5.15 on is needed",
            DeviceError::Io { .. } => "see the system's message",
        }
    }
}

/// A block device, or a partition of one, as it is now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// Of the whole disk: the number that each of its bios leads to, whichever partition it was for.
    pub major: u32,
    pub first_minor: u32,
    /// Where the partition begins, and how long it is. A whole disk begins at 0.
    pub first_sector: u64,
    pub sectors: u64,
    /// Counts the disks that were ever made on this system; another one behind the same name has another number.
    pub sequence: u64,
    /// The folder of the whole disk in sysfs.
    folder: PathBuf,
}

impl Device {
    pub fn examine(path: &Path) -> Result<Self, DeviceError> {
        let failed = |source| DeviceError::Io { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.file_type().is_block_device() {
            return Err(DeviceError::NotADevice { path: path.to_owned() });
        }
        let own = folder_of(metadata.rdev()).map_err(failed)?;
        let is_partition = own.join("partition").exists();
        let folder = if is_partition { own.parent().unwrap_or(&own).to_owned() } else { own.clone() };
        let (major, first_minor) = numbers(&folder).map_err(failed)?;
        let sectors = number(&own.join("size")).map_err(failed)?;
        let first_sector = if is_partition { number(&own.join("start")).map_err(failed)? } else { 0 };
        let queue = folder.join("queue");
        let says =
            |name: &str, value: &str| std::fs::read_to_string(queue.join(name)).is_ok_and(|text| text.trim() == value);
        if !says("zoned", "none") && queue.join("zoned").exists() {
            return Err(DeviceError::Zoned { path: path.to_owned() });
        }
        if says("dax", "1") {
            return Err(DeviceError::Dax { path: path.to_owned() });
        }
        if says("iostats", "0") {
            return Err(DeviceError::NotCounted { path: path.to_owned() });
        }
        let sequence =
            number(&folder.join("diskseq")).map_err(|_| DeviceError::NoSequence { path: path.to_owned() })?;
        Ok(Self { major, first_minor, first_sector, sectors, sequence, folder })
    }

    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    /// Writes that the kernel started and that did not end, on the whole disk.
    pub fn writes_in_flight(&self) -> io::Result<u64> {
        let text = std::fs::read_to_string(self.folder.join("inflight"))?;
        let writes = text.split_whitespace().nth(1).and_then(|writes| writes.parse().ok());
        writes.ok_or_else(|| io::Error::other(format!("{text:?} says nothing of writes in flight")))
    }

    /// Whether the same disk is still behind it.
    pub fn is_same(&self) -> bool {
        number(&self.folder.join("diskseq")).is_ok_and(|sequence| sequence == self.sequence)
    }

    /// Whether what is written to the device of this number lands on this disk: itself, a partition, or what is made of them (LVM, md).
    pub fn holds(&self, device: u64) -> bool {
        let mut seen = Vec::new();
        folder_of(device).is_ok_and(|folder| self.is_beneath(&folder, &mut seen))
    }

    fn is_beneath(&self, folder: &Path, seen: &mut Vec<PathBuf>) -> bool {
        if folder == self.folder || folder.starts_with(&self.folder) {
            return true;
        }
        if seen.iter().any(|known| known == folder) {
            return false;
        }
        seen.push(folder.to_owned());
        let whole = match folder.join("partition").exists() {
            true => folder.parent().unwrap_or(folder),
            false => folder,
        };
        let slaves = std::fs::read_dir(whole.join("slaves")).into_iter().flatten().flatten();
        slaves.filter_map(|slave| slave.path().canonicalize().ok()).any(|slave| self.is_beneath(&slave, seen))
    }
}

fn folder_of(device: u64) -> io::Result<PathBuf> {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    Path::new("/sys/dev/block").join(format!("{major}:{minor}")).canonicalize()
}

fn numbers(folder: &Path) -> io::Result<(u32, u32)> {
    let text = std::fs::read_to_string(folder.join("dev"))?;
    let parsed =
        text.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parsed.ok_or_else(|| io::Error::other(format!("{text:?} is no device number")))
}

fn number(path: &Path) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{} holds no number", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_block_device_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::File::create(&path).unwrap();
        for path in [path, folder.path().to_owned(), "/dev/null".into()] {
            let error = Device::examine(&path).unwrap_err();
            assert!(matches!(error, DeviceError::NotADevice { .. }), "{error}");
        }
    }

    /// Of each device here that can be examined: its numbers are those of its file.
    #[test]
    fn devices_are_what_sysfs_says() {
        for entry in std::fs::read_dir("/dev").unwrap().flatten() {
            let Ok(device) = Device::examine(&entry.path()) else { continue };
            let number = std::fs::metadata(entry.path()).unwrap().rdev();
            assert!(device.holds(number) && device.is_same());
            if device.first_sector == 0 {
                let own = (nix::sys::stat::major(number) as u32, nix::sys::stat::minor(number) as u32);
                assert_eq!((device.major, device.first_minor), own, "{:?}", entry.path());
            }
            assert!(device.writes_in_flight().is_ok());
        }
    }
}
