//! Names that people choose. They are shown and compared, and never become paths.

use tidemark_proto::control::{Failure, FailureKind, is_full_path_of_windows};

use crate::model::State;

pub const NAME_BYTES_MAX: usize = 64;
pub const LABEL_BYTES_MAX: usize = 256;
const PATH_BYTES_MAX: usize = 4096;

pub fn bad_request(message: impl Into<String>, help: impl Into<String>) -> Failure {
    Failure::new(FailureKind::BadRequest, message, help)
}

/// Which version of a thing a change is meant for: what `If-Match` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    Any,
    /// One of these; none where the tags were no revisions.
    OneOf(Vec<u64>),
}

/// Begins the message of a change that was meant for another version.
pub const CHANGED_MEANWHILE: &str = "it was changed meanwhile";

impl Expected {
    pub fn check(self, state: &State, table: &'static str, id: &str) -> Result<(), Failure> {
        let revision = state.revisions.get(&(table, id.to_owned())).copied().unwrap_or(0);
        match self {
            Expected::OneOf(expected) if !expected.contains(&revision) => Err(Failure::new(
                FailureKind::Conflict,
                format!("{CHANGED_MEANWHILE}: {id:?} is at revision {revision}, which If-Match does not name"),
                "read it again and repeat the change if it still makes sense",
            )),
            _ => Ok(()),
        }
    }
}

/// `what` is "machine", "policy", …
pub fn check_name(what: &str, name: &str) -> Result<(), Failure> {
    let help = format!(
        "use 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes or underscores, and begin with a letter or a digit"
    );
    if name.is_empty() {
        return Err(bad_request(format!("the {what} has no name"), help));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(bad_request(format!("the name of the {what} has {} bytes, which is too long", name.len()), help));
    }
    let sound = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if sound { Ok(()) } else { Err(bad_request(format!("{name:?} can be no name of a {what}"), help)) }
}

pub fn check_label(label: &str) -> Result<(), Failure> {
    if label.len() > LABEL_BYTES_MAX || label.chars().any(char::is_control) {
        return Err(bad_request(
            format!("a label of {} bytes, or with control characters, is not possible", label.len()),
            format!("use at most {LABEL_BYTES_MAX} bytes of printable text"),
        ));
    }
    Ok(())
}

/// A disk on another machine: a path there, or one of a machine in a vCenter, which lies in no folder.
pub fn check_disk(path: &str) -> Result<(), Failure> {
    if path.starts_with("vsphere:") { check_length(path) } else { check_path(path) }
}

/// A path on another machine, of Linux or Windows: absolute, and of a length that a system takes.
pub fn check_path(path: &str) -> Result<(), Failure> {
    check_length(path)?;
    if !path.starts_with('/') && !is_full_path_of_windows(path) {
        return Err(bad_request(format!("{path:?} is no absolute path"), "name the disk by its full path on its host"));
    }
    Ok(())
}

fn check_length(path: &str) -> Result<(), Failure> {
    if path.len() > PATH_BYTES_MAX || path.contains('\0') {
        return Err(bad_request(
            format!("a path of {} bytes is not possible", path.len()),
            format!("name a path of at most {PATH_BYTES_MAX} bytes"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_full_paths_of_either_system_or_lie_in_a_vcenter() {
        for path in
            ["/dev/sdb", r"D:\Machines\web.vhdx", r"\\files\machines\web.vhdx", "vsphere:lab/DC0/vm/web/scsi0:0"]
        {
            assert_eq!(check_disk(path), Ok(()), "{path}");
        }
        for path in [
            "",
            "web.vhdx",
            r"Machines\web.vhdx",
            "D:web.vhdx",
            "7:/web.vhdx",
            "/a\0b",
            &format!("/{}", "x".repeat(5000)),
        ] {
            assert!(check_disk(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn names_are_plain_words() {
        for name in ["a", "web-1", "db.example.org", "9_x", &"x".repeat(64)] {
            assert_eq!(check_name("machine", name), Ok(()), "{name}");
        }
        for name in ["", "../a", "a/b", "-a", ".a", "a b", "ä", "a\n", &"x".repeat(65), &"x".repeat(10_000)] {
            let failure = check_name("machine", name).unwrap_err();
            assert!(failure.message.len() < 200 && !failure.help.is_empty(), "{failure:?}");
        }
    }
}
