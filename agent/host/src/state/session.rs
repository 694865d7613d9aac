//! The session file: which run of the agent is (or was) attached to a disk, and how it left.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tidemark_base::disk::DiskIdentity;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{DiskId, Epoch, Position, Timestamp};

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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountIdentity {
    pub device: u64,
    pub mount: u64,
}

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
        Ok(Self { device, mount: found.stx_mnt_id })
    }
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
}

pub const VERSION: u32 = 1;
/// Older epochs are forgotten; a consumer that comes back from one is scanned whole.
pub const EPOCHS_MAX: usize = 64;
pub const FILE: &str = "session";
const FILE_BYTES_MAX: u64 = 64 << 10;

impl Session {
    /// Durable when it returns.
    pub fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        store_sealed(storage, FILE, self)
    }

    /// `None` when there is none, or when what is there cannot be trusted.
    pub fn load(storage: &dyn Storage) -> io::Result<Option<Self>> {
        let session = load_sealed::<Self>(storage, FILE, FILE_BYTES_MAX)?;
        Ok(session.filter(|session| session.version == VERSION && !session.epochs.is_empty()))
    }
}

/// Writes a small JSON file with its BLAKE3 in the line before.
pub fn store_sealed<T: Serialize>(storage: &dyn Storage, name: &str, content: &T) -> io::Result<()> {
    let json = serde_json::to_string(content).map_err(io::Error::other)?;
    let text = format!("{}\n{json}\n", blake3::hash(json.as_bytes()).to_hex());
    replace_file(storage, name, text.as_bytes())
}

/// Reads what [`store_sealed`] wrote; `None` when the file is absent, damaged or of another shape.
pub fn load_sealed<T: for<'de> Deserialize<'de>>(
    storage: &dyn Storage,
    name: &str,
    bytes_max: u64,
) -> io::Result<Option<T>> {
    if !storage.exists(name)? {
        return Ok(None);
    }
    let content = match read_file(storage, name, bytes_max) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some((hash, json)) = std::str::from_utf8(&content).ok().and_then(|text| text.split_once('\n')) else {
        return Ok(None);
    };
    let json = json.trim_end();
    if *hash != *blake3::hash(json.as_bytes()).to_hex() {
        return Ok(None);
    }
    Ok(serde_json::from_str(json).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::{OpenMode, RealStorage};

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
                is_block_device: false,
            },
            newest: Timestamp(7_000_000_000),
            clean: None,
            intent_lost: false,
        }
    }

    #[test]
    fn a_session_is_read_back_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        assert_eq!(Session::load(&*storage).unwrap(), None);
        let session = session();
        session.store(&*storage).unwrap();
        assert_eq!(Session::load(&*storage).unwrap(), Some(session));
        let file = storage.open(FILE, OpenMode::ReadWrite).unwrap();
        let mut byte = [0];
        file.read_at(100, &mut byte).unwrap();
        file.write_at(100, &[byte[0] ^ 1]).unwrap();
        assert_eq!(Session::load(&*storage).unwrap(), None);
    }
}
