//! The disk that logs are applied to: a raw image or block device directly, other formats through `qemu-nbd`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use tidemark_base::Extent;
use tidemark_base::disk::{Access, Allocation, Disk, Durability, FileDisk};
use tidemark_nbd::client::Client;
use tidemark_nbd::qemu::{QemuAccess, QemuNbd, QemuNbdError};
use tidemark_proto::control::ImageFormat;

use super::HrlError;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{path} is not named as a {format} image, but begins like one")]
    Ambiguous { path: PathBuf, format: &'static str },
    #[error(transparent)]
    Qemu(#[from] QemuNbdError),
}

impl ImageError {
    pub fn help(&self) -> &'static str {
        match self {
            Self::Ambiguous { .. } => "say which it is with --format",
            Self::Qemu(QemuNbdError::Run { .. }) => "install QEMU's tools (Debian: qemu-utils)",
            Self::Qemu(QemuNbdError::Refused { .. }) => {
                "check that it is an image of that format and that no other program has it open"
            }
            Self::Qemu(QemuNbdError::NotReady { .. } | QemuNbdError::Finish { .. }) => {
                "check the image with `qemu-img check`, then apply again"
            }
        }
    }
}

/// Opens the disk, hands it to `work`, and closes it.
pub(super) fn with_disk<T>(
    path: &Path,
    format: Option<ImageFormat>,
    work: impl FnOnce(&dyn Disk) -> Result<T, HrlError>,
) -> Result<T, HrlError> {
    match format.unwrap_or(ImageFormat::of_name(path)) {
        ImageFormat::Raw => {
            let disk = FileDisk::open(path, Access::Exclusive)?;
            if format.is_none() {
                refuse_other_format(&disk, path)?;
            }
            work(&disk)
        }
        other => {
            let mut server = QemuNbd::start(path, other.qemu_name(), QemuAccess::Write).map_err(ImageError::from)?;
            let disk = QemuDisk { client: Mutex::new(server.connect().map_err(ImageError::from)?) };
            let result = work(&disk);
            drop(disk);
            // The first failure is the one to tell.
            let finished = server.finish();
            let result = result?;
            finished.map_err(ImageError::from)?;
            Ok(result)
        }
    }
}

/// Raw writes into an image of another format would ruin it.
fn refuse_other_format(disk: &FileDisk, path: &Path) -> Result<(), HrlError> {
    let mut start = [0; 8];
    disk.read_at(0, &mut start)
        .map_err(|source| HrlError::Disk(tidemark_base::disk::DiskError::Open { path: path.to_owned(), source }))?;
    let format = match &start {
        b"vhdxfile" => "VHDX",
        b"conectix" => "VHD",
        [b'Q', b'F', b'I', 0xfb, ..] => "qcow2",
        [b'K', b'D', b'M', b'V', ..] => "VMDK",
        _ => return Ok(()),
    };
    Err(ImageError::Ambiguous { path: path.to_owned(), format }.into())
}

struct QemuDisk {
    client: Mutex<Client>,
}

impl QemuDisk {
    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().expect("no panic while held")
    }
}

impl Disk for QemuDisk {
    fn bytes(&self) -> u64 {
        self.client().bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        Ok(self.client().read(offset, buffer)?)
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        match durability {
            Durability::Cached => Ok(self.client().write(offset, data)?),
            Durability::Durable => Ok(self.client().write_durable(offset, data)?),
        }
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        let mut client = self.client();
        client.zero(extent, discard)?;
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => Ok(client.flush()?),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(self.client().flush()?)
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        let mut client = self.client();
        let rest = Extent::new(offset, client.bytes() - offset);
        let first = client.block_status(rest)?.into_iter().next();
        Ok(first.map_or((rest.length, Allocation::Data), |(extent, allocation)| (extent.length, allocation)))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use tidemark_base::storage::create_private_folder;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("tidemark-test-{}", uuid::Uuid::new_v4()));
            create_private_folder(&path).unwrap();
            Self(path)
        }

        fn qemu_img(&self, arguments: &[&str]) {
            let output = Command::new("qemu-img").current_dir(&self.0).args(arguments).output();
            let output = output.expect("qemu-img runs (Debian: qemu-utils)");
            assert!(output.status.success(), "{output:?}");
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn images_are_written_through_qemu() {
        let folder = Folder::new();
        for (name, format) in [("disk.vhdx", "vhdx"), ("disk.qcow2", "qcow2")] {
            folder.qemu_img(&["create", "-q", "-f", format, name, "8M"]);
            let path = folder.0.join(name);
            with_disk(&path, None, |disk| {
                assert_eq!(disk.bytes(), 8 << 20);
                disk.write_at(4096, &[7; 8192], Durability::Cached).unwrap();
                disk.zero(Extent::new(8192, 512), true, Durability::Cached).unwrap();
                disk.flush().unwrap();
                Ok(())
            })
            .unwrap();
            folder.qemu_img(&["convert", "-f", format, "-O", "raw", name, "disk.raw"]);
            let mut expected = vec![0; 8 << 20];
            expected[4096..4096 + 8192].fill(7);
            expected[8192..8192 + 512].fill(0);
            assert!(std::fs::read(folder.0.join("disk.raw")).unwrap() == expected, "{name} differs");

            let raw_name = folder.0.join(format!("{name}.img"));
            std::fs::copy(&path, &raw_name).unwrap();
            let error = with_disk(&raw_name, None, |_| Ok(())).unwrap_err();
            assert!(matches!(error, HrlError::Image(ImageError::Ambiguous { .. })), "{error}");
        }
    }

    #[test]
    fn what_qemu_cannot_open_says_why() {
        let folder = Folder::new();
        let path = folder.0.join("disk.vhdx");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let error = with_disk(&path, None, |_| Ok(())).unwrap_err();
        assert!(
            matches!(&error, HrlError::Image(ImageError::Qemu(QemuNbdError::Refused { message, .. })) if !message.is_empty()),
            "{error}"
        );
    }
}
