//! Sockets that are safe to listen on, and who is at their other end.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{Shutdown, getsockopt, setsockopt, shutdown, sockopt};

use crate::export::Peer;

/// The longest path of a Unix socket (`sun_path`), its final zero not counted.
const PATH_BYTES_MAX: usize = 107;

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("the socket path {path} has {} bytes, the system allows {PATH_BYTES_MAX}", path.as_os_str().len())]
    PathTooLong { path: PathBuf },
    #[error("the socket folder {folder} can be entered by other users (mode {mode:o}, owner {uid})")]
    FolderNotPrivate { folder: PathBuf, mode: u32, uid: u32 },
    #[error("the socket {path} is in use by another program")]
    InUse { path: PathBuf },
    #[error("{path} exists and is not a socket")]
    NotASocket { path: PathBuf },
    #[error("cannot listen on {path}")]
    Unix { path: PathBuf, source: io::Error },
    #[error("cannot listen on {address}")]
    Tcp { address: SocketAddr, source: io::Error },
}

impl ListenError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        ListenError::Unix { path: path.to_owned(), source }
    }

    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            ListenError::PathTooLong { .. } => "choose a shorter folder for Tidemark's state",
            ListenError::FolderNotPrivate { .. } => "make the folder your own and run `chmod 0700` on it",
            ListenError::InUse { .. } => {
                "stop the other program (another agent with the same folder?), or choose another path"
            }
            ListenError::NotASocket { .. } => "remove it, or choose another path",
            ListenError::Unix { .. } | ListenError::Tcp { .. } => "see the system's message",
        }
    }
}

/// Binds a socket file of mode 0600 in a private folder, in the place of one that nobody listens on any more.
pub fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::io(path, source);
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(ListenError::PathTooLong { path: path.to_owned() });
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    let metadata = std::fs::metadata(folder).map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    // With an ACL the group bits are its mask; `other` is nobody's in any case.
    if mode & 0o007 != 0
        || (metadata.uid() != own_uid() && metadata.uid() != 0)
        || (mode & 0o070 != 0 && !has_acl(folder))
    {
        return Err(ListenError::FolderNotPrivate { folder: folder.to_owned(), mode, uid: metadata.uid() });
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            _ => return Err(ListenError::InUse { path: path.to_owned() }),
        },
        Ok(_) => return Err(ListenError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { path: path.to_owned() },
        _ => failed(error),
    })?;
    // Nobody else gets into the folder between the two calls.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

fn has_acl(folder: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()) else { return false };
    // SAFETY: both strings end in zero; with a null buffer of no length only the size is asked for.
    unsafe { libc::getxattr(path.as_ptr(), c"system.posix_acl_access".as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

pub fn may_connect(uid: u32, allowed: &[u32]) -> bool {
    uid == own_uid() || uid == 0 || allowed.contains(&uid)
}

/// The process that connected, as the kernel noted it then.
pub fn peer_of(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = getsockopt(stream, sockopt::PeerCredentials)?;
    Ok(Peer::Local { uid: credentials.uid(), pid: credentials.pid() })
}

/// A client whose machine vanished ends some day.
pub fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    Ok(setsockopt(stream, sockopt::KeepAlive, &true)?)
}

pub fn shut(socket: &impl AsFd) -> io::Result<()> {
    Ok(shutdown(socket.as_fd().as_raw_fd(), Shutdown::Both)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_private_folder_gets_a_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/nbd.sock");
        let listener = bind_unix(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert!(matches!(bind_unix(&path), Err(ListenError::InUse { .. })));
        drop(listener);
        drop(bind_unix(&path).expect("a socket that nobody listens on is replaced"));
        std::fs::set_permissions(path.parent().unwrap(), std::fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(bind_unix(&path), Err(ListenError::FolderNotPrivate { mode: 0o750, .. })));
        let private = folder.path().join("private");
        std::fs::DirBuilder::new().mode(0o700).create(&private).unwrap();
        let file = private.join("file");
        std::fs::File::create(&file).unwrap();
        assert!(matches!(bind_unix(&file), Err(ListenError::NotASocket { .. })));
        let long = folder.path().join("x".repeat(120));
        assert!(matches!(bind_unix(&long), Err(ListenError::PathTooLong { .. })));
    }

    #[test]
    fn only_this_user_root_and_the_allowed_connect() {
        let other = own_uid() + 4711;
        assert!(may_connect(own_uid(), &[]) && may_connect(0, &[]));
        assert!(!may_connect(other, &[]) && may_connect(other, &[other]));
    }
}
