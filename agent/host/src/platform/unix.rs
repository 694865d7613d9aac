//! Linux.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tidemark_base::Timestamp;

/// The kernel's own name for it.
pub fn boot() -> io::Result<(String, Timestamp)> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let stat = std::fs::read_to_string("/proc/stat")?;
    let seconds = stat
        .lines()
        .find_map(|line| line.strip_prefix("btime "))
        .and_then(|seconds| seconds.trim().parse::<u64>().ok())
        .ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "/proc/stat does not say when the machine started")
        })?;
    Ok((id, Timestamp(seconds.saturating_mul(1_000_000_000))))
}

const PEER_GROUP: u64 = 1 << 63;

/// The device, and the mount: its peer group with [`PEER_GROUP`] set, or its id.
///
/// A service that systemd gives a mount namespace of its own sees copies of the host's mounts, with new ids at each start. Their
/// peer group (`shared:N` or, of a copy that only follows, `master:N` in mountinfo) is that of the host's mount, and goes
/// with it; so the group counts where there is one.
pub fn mount_of(folder: &Path) -> io::Result<(u64, u64)> {
    let name = std::ffi::CString::new(folder.as_os_str().as_bytes())?;
    let device = std::fs::metadata(folder)?.dev();
    // SAFETY: `name` is a terminated string and `found` is as large as the call wants; all zeroes is a valid statx.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let result = unsafe { libc::statx(libc::AT_FDCWD, name.as_ptr(), 0, libc::STATX_MNT_ID, &raw mut found) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = peer_group(&mounts, found.stx_mnt_id).map_or(found.stx_mnt_id, |group| group | PEER_GROUP);
    Ok((device, mount))
}

/// The group whose mount this one is, or is a copy of (proc_pid_mountinfo(5)).
fn peer_group(mounts: &str, id: u64) -> Option<u64> {
    let line = mounts.lines().find(|line| line.split(' ').next().and_then(|first| first.parse().ok()) == Some(id))?;
    let tags: Vec<&str> = line.split(' ').skip(6).take_while(|field| *field != "-").collect();
    // A copy that was made shared again has a group of its own as well.
    let group = |name: &str| tags.iter().find_map(|tag| tag.strip_prefix(name)?.parse().ok());
    group("master:").or_else(|| group("shared:"))
}

#[cfg(test)]
mod tests {
    use std::ffi::{CStr, CString};

    use super::*;

    #[test]
    fn copies_of_a_mount_in_other_namespaces_are_told_by_its_group() {
        let mounts = "36 35 98:0 /m /mnt rw,noatime shared:12 - ext4 /dev/root rw\n\
                      361 35 98:0 /m /mnt rw shared:40 master:12 propagate_from:2 - ext4 /dev/root rw\n\
                      7 1 0:5 / /dev rw - tmpfs master:9 rw\n";
        assert_eq!([36, 361, 7, 1].map(|id| peer_group(mounts, id)), [Some(12), Some(12), None, None]);
    }

    /// As a unit with `ProtectSystem` is started: once, and again.
    #[test]
    fn a_mount_namespace_of_its_own_does_not_look_like_a_remount() {
        fn done(result: libc::c_int) -> io::Result<()> {
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }
        fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: libc::c_ulong) -> io::Result<()> {
            // SAFETY: three terminated strings, and no data.
            done(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) })
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let seen = std::thread::spawn(move || -> io::Result<[(u64, u64); 3]> {
            let target = CString::new(path.to_str().unwrap()).unwrap();
            let look = || {
                let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                let line = text.lines().find(|line| line.contains(path.to_str().unwrap())).unwrap().to_owned();
                let id: u64 = line.split(' ').next().unwrap().parse().unwrap();
                let group = peer_group(&text, id).map_or(id, |group| group | PEER_GROUP);
                (group, id)
            };
            let enter = || {
                // SAFETY: of this thread alone, which has nothing open.
                done(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
                mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_SLAVE)
            };
            // Out of the sight of others; then a mount as systemd makes all of them.
            enter()?;
            mount(c"tidemark-test", &target, c"tmpfs", 0)?;
            mount(c"none", &target, c"none", libc::MS_SHARED)?;
            // The host's namespace lives on, as it does.
            let service = || std::thread::scope(|scope| scope.spawn(|| enter().map(|()| look())).join().unwrap());
            Ok([look(), service()?, service()?])
        });
        match seen.join().unwrap() {
            Ok([(host, first), (once, second), (again, third)]) => {
                assert!(first != second && first != third, "these are namespaces of their own");
                assert_eq!((host, host), (once, again));
            }
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => eprintln!("skipped: only root makes namespaces"),
            Err(error) => panic!("{error}"),
        }
    }
}
