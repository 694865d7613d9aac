//! Programs and settings that an administrator installs: whoever can change one, or swap it, has it run as this user.

use std::io;
use std::path::{Path, PathBuf};

/// Why a file or folder must not be trusted, if so.
pub fn distrust(path: &Path) -> io::Result<Option<&'static str>> {
    crate::platform::distrust(path)
}

/// Where what was installed for a machine lies; `None`: its name is not a plain file name, and finds nothing.
pub fn folder_of(top: &Path, machine: &str) -> Option<PathBuf> {
    let is_plain = !machine.is_empty() && !machine.starts_with('.') && !machine.contains(['/', '\0']);
    is_plain.then(|| top.join(machine))
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_others_may_change_is_not_trusted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (mode, trusted) in [(0o700, true), (0o755, true), (0o720, false), (0o702, false)] {
            file.as_file().set_permissions(Permissions::from_mode(mode)).unwrap();
            assert_eq!(distrust(file.path()).unwrap().is_none(), trusted, "{mode:o}");
        }
        assert!(distrust(&file.path().join("absent")).is_err());
    }
}
