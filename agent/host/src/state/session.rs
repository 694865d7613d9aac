//! The session file: which run of the agent is (or was) attached to a disk, and how it left.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::disk::DiskIdentity;
use tidemark_base::storage::Storage;
use tidemark_base::{DiskId, Epoch, Position, Timestamp};

use super::sealed::SealedFile;

/// One attachment of one disk by one run of the agent.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    pub fn random() -> Self {
        Self(*DiskId::random().as_bytes())
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({:02x}{:02x}{:02x}{:02x}…)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// Which boot of the machine this is. Two boots never share a page cache.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Boot {
    pub id: String,
    /// When the machine started.
    pub started: Timestamp,
}

impl Boot {
    pub fn current() -> io::Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let stat = std::fs::read_to_string("/proc/stat")?;
        let seconds = stat
            .lines()
            .find_map(|line| line.strip_prefix("btime "))
            .and_then(|seconds| seconds.trim().parse::<u64>().ok())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "/proc/stat does not say when the machine started")
            })?;
        Ok(Self { id, started: Timestamp(seconds.saturating_mul(1_000_000_000)) })
    }
}

/// Which mount of which file system a folder is in. After an unmount the page cache is gone, boot or not.
///
/// A service that systemd gives a mount namespace of its own sees copies of the host's mounts, with new ids at each start. Their
/// peer group (`shared:N` or, of a copy that only follows, `master:N` in mountinfo) is that of the host's mount, and goes
/// with it; so the group counts where there is one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountIdentity {
    pub device: u64,
    /// The peer group with [`PEER_GROUP`] set, or the mount's id.
    pub mount: u64,
}

const PEER_GROUP: u64 = 1 << 63;

impl MountIdentity {
    pub fn of(folder: &Path) -> io::Result<Self> {
        use std::os::unix::ffi::OsStrExt;
        if let Some((device, mount)) = tidemark_base::seam::mount_of(folder) {
            return Ok(Self { device, mount });
        }
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
        Ok(Self { device, mount })
    }
}

/// The group whose mount this one is, or is a copy of (proc_pid_mountinfo(5)).
fn peer_group(mounts: &str, id: u64) -> Option<u64> {
    let line = mounts.lines().find(|line| line.split(' ').next().and_then(|first| first.parse().ok()) == Some(id))?;
    let tags: Vec<&str> = line.split(' ').skip(6).take_while(|field| *field != "-").collect();
    // A copy that was made shared again has a group of its own as well.
    let group = |name: &str| tags.iter().find_map(|tag| tag.strip_prefix(name)?.parse().ok());
    group("master:").or_else(|| group("shared:"))
}

/// How a disk's changes are recorded.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Mode {
    /// Order and data are in the log.
    Data,
    /// Which blocks changed is in the dirty bitmap; the log could not be kept.
    Bitmap { reason: String },
}

impl Mode {
    pub fn name(&self) -> &'static str {
        match self {
            Mode::Data => "data",
            Mode::Bitmap { .. } => "bitmap",
        }
    }

    pub fn reason(&self) -> Option<&str> {
        match self {
            Mode::Data => None,
            Mode::Bitmap { reason } => Some(reason),
        }
    }
}

/// Proof that nothing was in flight when the disk was left.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CleanDetach {
    pub identity: DiskIdentity,
    pub position: Position,
    pub at: Timestamp,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    pub version: u32,
    pub disk: DiskId,
    pub session: SessionId,
    pub boot: Boot,
    pub mount: MountIdentity,
    /// The histories of this disk, oldest first; the log continues the last. At least one, at most [`EPOCHS_MAX`].
    pub epochs: Vec<Epoch>,
    pub mode: Mode,
    /// The disk when it was attached: device, inode and size are compared.
    pub identity: DiskIdentity,
    /// The time that the newest record or mark carried, so that times never decrease along the disk.
    pub newest: Timestamp,
    pub clean: Option<CleanDetach>,
    /// The intent bitmap could not be kept, so after a power loss the whole disk counts.
    pub intent_lost: bool,
    /// The disk could not be synced, in this session or one before it in the same boot. The page cache shows what may never
    /// reach the medium, and the next sync succeeds all the same: no detach is clean until the boot ended, and then the
    /// whole disk counts.
    #[serde(default)]
    pub sync_failed: bool,
}

pub const VERSION: u32 = 2;
/// Older epochs are forgotten; a consumer that comes back from one is scanned whole.
pub const EPOCHS_MAX: usize = 64;
pub const FILE: &str = "session";
/// 64 epochs, a reason and the identity fit many times.
pub const SLOT_BYTES: usize = 16 << 10;
/// A longer reason is cut.
const REASON_BYTES_MAX: usize = 1024;

/// The session file, open, with what it holds.
pub struct SessionFile {
    file: SealedFile<Session>,
    current: Session,
}

impl SessionFile {
    /// What the session before left; `None` when there is none, or when what is there cannot be trusted.
    pub fn peek(storage: &Arc<dyn Storage>) -> io::Result<Option<Session>> {
        let session = SealedFile::<Session>::peek(storage, FILE, SLOT_BYTES)?;
        Ok(session.filter(|session| session.version == VERSION && !session.epochs.is_empty()))
    }

    /// Durable when it returns.
    pub fn begin(storage: Arc<dyn Storage>, session: Session) -> io::Result<Self> {
        let (file, _) = SealedFile::open(storage, FILE, SLOT_BYTES)?;
        let mut this = Self { file, current: session.clone() };
        this.store(session)?;
        Ok(this)
    }

    pub fn current(&self) -> &Session {
        &self.current
    }

    /// As if there had been no session: the next attach compares everything. Durable when it returns.
    pub fn remove(&mut self) -> io::Result<()> {
        self.file.remove()
    }

    /// Has every store and removal refused from now on, or works again.
    #[cfg(test)]
    pub fn set_storage(&mut self, storage: Arc<dyn Storage>) {
        self.file.set_storage(storage);
    }

    /// Durable when it returns; after an error the session before holds.
    pub fn store(&mut self, mut session: Session) -> io::Result<()> {
        if let Mode::Bitmap { reason } = &mut session.mode
            && reason.len() > REASON_BYTES_MAX
        {
            let end = (0..=REASON_BYTES_MAX).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
            reason.truncate(end);
        }
        self.file.store(&session)?;
        self.current = session;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{CStr, CString};

    use super::*;
    use tidemark_base::storage::RealStorage;

    fn session() -> Session {
        Session {
            version: VERSION,
            disk: DiskId::random(),
            session: SessionId::random(),
            boot: Boot::current().unwrap(),
            mount: MountIdentity::of(Path::new("/")).unwrap(),
            epochs: vec![Epoch::random()],
            mode: Mode::Bitmap { reason: "the log's folder is full".into() },
            identity: DiskIdentity {
                device: 1,
                inode: 2,
                bytes: 3,
                changed_ns: 4,
                modified_ns: 5,
                born_ns: Some(6),
                is_block_device: false,
                data_write_guid: None,
            },
            newest: Timestamp(7_000_000_000),
            clean: None,
            intent_lost: false,
            sync_failed: false,
        }
    }

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
        let seen = std::thread::spawn(move || -> io::Result<[(MountIdentity, u64); 3]> {
            let target = CString::new(path.to_str().unwrap()).unwrap();
            let look = || {
                let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                let line = text.lines().find(|line| line.contains(path.to_str().unwrap())).unwrap().to_owned();
                let id: u64 = line.split(' ').next().unwrap().parse().unwrap();
                let group = peer_group(&text, id).map_or(id, |group| group | PEER_GROUP);
                (MountIdentity { device: 0, mount: group }, id)
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

    #[test]
    fn the_largest_session_fits_and_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        assert_eq!(SessionFile::peek(&storage).unwrap(), None);
        let mut session = session();
        session.epochs = (0..EPOCHS_MAX).map(|_| Epoch::random()).collect();
        // Each needs six bytes in JSON.
        session.mode = Mode::Bitmap { reason: "\u{1}".repeat(3000) };
        let file = SessionFile::begin(storage.clone(), session.clone()).unwrap();
        session.mode = Mode::Bitmap { reason: "\u{1}".repeat(REASON_BYTES_MAX) };
        assert_eq!(SessionFile::peek(&storage).unwrap().as_ref(), Some(&session));
        assert_eq!(*file.current(), session);
    }
}
