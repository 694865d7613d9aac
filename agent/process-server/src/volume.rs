//! How large the volume of a folder is, and what of it is free.

use std::path::Path;

use tidemark_proto::control::Volume;

/// `None`: the system does not say.
pub fn of(folder: &Path) -> Option<Volume> {
    let found = nix::sys::statvfs::statvfs(folder).ok()?;
    let unit = found.fragment_size() as u64;
    let bytes = (found.blocks() as u64).saturating_mul(unit);
    // What is kept for the superuser is not free for those who are not.
    let free_bytes = (found.blocks_available() as u64).saturating_mul(unit);
    (bytes > 0).then_some(Volume { bytes, free_bytes: free_bytes.min(bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_has_a_size_and_what_is_written_to_it_is_not_free() {
        let folder = tempfile::tempdir().unwrap();
        let volume = of(folder.path()).unwrap();
        assert!(volume.bytes > 0 && volume.free_bytes <= volume.bytes, "{volume:?}");
        let output =
            std::process::Command::new("df").args(["-B1", "--output=size"]).arg(folder.path()).output().unwrap();
        let size = String::from_utf8(output.stdout).unwrap();
        assert_eq!(size.lines().nth(1).unwrap().trim().parse::<u64>().unwrap(), volume.bytes);
        assert_eq!(of(&folder.path().join("none")), None);
    }
}
