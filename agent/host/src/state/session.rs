//! The session file: which run of the agent is (or was) attached to a disk, and how it left.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::disk::DiskIdentity;
use tidemark_base::storage::Storage;
use tidemark_base::{DiskId, Epoch, Position, Timestamp};

use super::sealed::SealedFile;
use crate::platform;

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
        let (id, started) = platform::boot()?;
        Ok(Self { id, started })
    }
}

/// Which mount of which file system a folder is in. After an unmount the page cache is gone, boot or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountIdentity {
    pub device: u64,
    /// Which mount, as far as the system tells ([`crate::platform`]).
    pub mount: u64,
}

impl MountIdentity {
    pub fn of(folder: &Path) -> io::Result<Self> {
        if let Some((device, mount)) = tidemark_base::seam::mount_of(folder) {
            return Ok(Self { device, mount });
        }
        let (device, mount) = platform::mount_of(folder)?;
        Ok(Self { device, mount })
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
    use super::*;
    use tidemark_base::storage::RealStorage;

    fn session() -> Session {
        Session {
            version: VERSION,
            disk: DiskId::random(),
            session: SessionId::random(),
            boot: Boot::current().unwrap(),
            mount: MountIdentity::of(&std::env::temp_dir()).unwrap(),
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
