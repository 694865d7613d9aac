//! Whether a folder is on an encrypted volume, as the kernel tells of block devices: every device beneath it is dm-crypt.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Device mappers are stacked a few times at most.
const DEPTH_MAX: usize = 16;

/// `None`: the folder's file system is of no block device that the kernel shows here.
pub fn is_encrypted(folder: &Path) -> Option<bool> {
    let device = fs::metadata(folder).ok()?.dev();
    let number = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    device_is_encrypted(&fs::canonicalize(Path::new("/sys/dev/block").join(number)).ok()?, DEPTH_MAX)
}

fn device_is_encrypted(device: &Path, depth: usize) -> Option<bool> {
    if depth == 0 || !device.is_dir() {
        return None;
    }
    if fs::read_to_string(device.join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("CRYPT-")) {
        return Some(true);
    }
    // A partition is a folder of its disk.
    if device.join("partition").exists() {
        return device_is_encrypted(device.parent()?, depth - 1);
    }
    let beneath: Vec<PathBuf> = match fs::read_dir(device.join("slaves")) {
        Ok(entries) => entries.filter_map(|entry| fs::canonicalize(entry.ok()?.path()).ok()).collect(),
        Err(_) => Vec::new(),
    };
    if beneath.is_empty() {
        return Some(false);
    }
    beneath.iter().map(|device| device_is_encrypted(device, depth - 1)).try_fold(true, |all, one| Some(all && one?))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn write(path: &Path, text: &str) {
        fs::File::create(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_volume_is_encrypted_when_everything_beneath_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let device = |name: &str, uuid: &str, beneath: &[&str]| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.join("dm")).unwrap();
            fs::create_dir_all(path.join("slaves")).unwrap();
            write(&path.join("dm/uuid"), uuid);
            for other in beneath {
                std::os::unix::fs::symlink(folder.path().join(other), path.join("slaves").join(other)).unwrap();
            }
            path
        };
        let plain = device("sda", "", &[]);
        let part = folder.path().join("sda/sda1");
        fs::create_dir_all(&part).unwrap();
        write(&part.join("partition"), "1");
        let crypt = device("dm-0", "CRYPT-LUKS2-ab", &["sda"]);
        let logical = device("dm-1", "LVM-x", &["dm-0"]);
        let mixed = device("dm-2", "LVM-y", &["dm-0", "sda"]);
        for (path, expected) in [(&plain, false), (&part, false), (&crypt, true), (&logical, true), (&mixed, false)] {
            assert_eq!(device_is_encrypted(path, DEPTH_MAX), Some(expected), "{path:?}");
        }
        assert_eq!(device_is_encrypted(&folder.path().join("none"), DEPTH_MAX), None);
    }
}
