//! The manifest of a replica: what it is of, where its base stands, what is pinned.
//!
//! `manifest`: one line of 64 hexadecimal digits (BLAKE3 of the rest), then JSON. Replaced as a whole (`replace_file`), so that a crash leaves the old or the new.
//!
//! `manifest.copy` is the same again: a bit that turns in either keeps no replica closed. The copy is replaced first. Whatever
//! a manifest says is true before it is stored, so a copy that a crash left newer may be taken as well; one that is
//! older is never there when anything relies on the newer. Opening and the scrub write a damaged one again.

use std::io;

use serde::{Deserialize, Serialize};
use tidemark_base::error::with_causes;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{DiskId, Generation, HistoryHash, MachineId, Position, Timestamp};

use crate::journal::{Loss, ReadError, Tip};
use crate::table::{seal, unseal};

pub const NAME: &str = "manifest";
pub const COPY_NAME: &str = "manifest.copy";
const VERSION: u32 = 1;
const BYTES_MAX: u64 = 4 << 20;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    pub disk: DiskId,
    pub machine: MachineId,
    pub disk_bytes: u64,
    pub generation: Generation,
    pub base: BaseTip,
    /// A fold to this cut was begun: from now on the base is of no older cut, whether the fold finished or not.
    pub fold_to: Option<u64>,
    /// The step that the fold is at: the base becomes the state at this cut next.
    #[serde(default)]
    pub fold_step: Option<u64>,
    pub pins: Vec<Pin>,
    /// Cuts of the journal that are gone. Durable before anything is appended to the journal in which that was found.
    #[serde(default)]
    pub losses: Vec<Loss>,
    /// How large the disk was before it grew, oldest first: `disk_bytes` is what it is now.
    #[serde(default)]
    pub grown: Vec<Grown>,
}

/// Cuts before this one are of a smaller disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Grown {
    pub cut: u64,
    pub bytes_before: u64,
}

/// The last cut that is in the base.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BaseTip {
    pub cut: u64,
    pub position: Option<Position>,
    pub time: Timestamp,
    pub commit: HistoryHash,
}

impl From<Tip> for BaseTip {
    fn from(tip: Tip) -> Self {
        Self { cut: tip.cut, position: tip.position, time: tip.time, commit: HistoryHash(tip.commit) }
    }
}

impl From<&BaseTip> for Tip {
    fn from(tip: &BaseTip) -> Self {
        Self { cut: tip.cut, position: tip.position, time: tip.time, commit: tip.commit.0 }
    }
}

/// A cut that something stands on and that is not folded over, whatever happens to this process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pin {
    /// Who holds it: a serve, an export, a failed-over machine.
    pub holder: String,
    pub cut: u64,
    pub since: Timestamp,
}

/// A manifest that was read.
pub struct Loaded {
    pub manifest: Manifest,
    /// One of its two files is to be written again.
    pub is_stale: bool,
    pub damaged: Option<String>,
}

impl Manifest {
    pub fn new(disk: DiskId, machine: MachineId, disk_bytes: u64, generation: Generation) -> Self {
        let base = Tip::default().into();
        let (fold_to, fold_step, pins, losses, grown) = (None, None, Vec::new(), Vec::new(), Vec::new());
        Self { version: VERSION, disk, machine, disk_bytes, generation, base, fold_to, fold_step, pins, losses, grown }
    }

    pub fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        let content = seal(self)?;
        replace_file(storage, COPY_NAME, content.as_bytes())?;
        replace_file(storage, NAME, content.as_bytes())
    }

    /// What both copies say, or the one that is whole, with what is wrong with the other. A copy that is not there, or is
    /// another, is wrong without a word: an earlier version made none, a crash leaves two.
    pub fn load(storage: &dyn Storage) -> Result<Loaded, ReadError> {
        let (first, copy) = (Self::read(storage, NAME), Self::read(storage, COPY_NAME));
        Ok(match (first, copy) {
            (Ok(manifest), Ok(copy)) => Loaded { is_stale: copy != manifest, manifest, damaged: None },
            (Ok(manifest), Err(ReadError::Io { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
                Loaded { manifest, is_stale: true, damaged: None }
            }
            // Without a first one there is no replica: its removal begins with that.
            (Err(ReadError::Io { file, source }), _) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ReadError::Io { file, source });
            }
            (Ok(manifest), Err(error)) | (Err(error), Ok(manifest)) => {
                Loaded { manifest, is_stale: true, damaged: Some(with_causes(&error)) }
            }
            (Err(ReadError::Damaged { file, extent, what }), Err(_)) => {
                let what = format!(
                    "{what}, and {COPY_NAME} beside it does not hold either; move this folder away and protect the disk again"
                );
                return Err(ReadError::Damaged { file, extent, what });
            }
            (Err(error), _) => return Err(error),
        })
    }

    fn read(storage: &dyn Storage, name: &str) -> Result<Self, ReadError> {
        let file = storage.path(name).display().to_string();
        let content =
            read_file(storage, name, BYTES_MAX).map_err(|source| ReadError::Io { file: file.clone(), source })?;
        let damaged = |what: &str| ReadError::damaged(&file, what);
        let manifest: Self = unseal(&content).map_err(|reason| damaged(&reason))?;
        if manifest.version != VERSION {
            return Err(damaged(&format!("version {} is not known", manifest.version)));
        }
        Ok(manifest)
    }

    /// How large the disk is at a cut.
    pub fn bytes_at(&self, cut: u64) -> u64 {
        self.grown.iter().find(|grown| cut < grown.cut).map_or(self.disk_bytes, |grown| grown.bytes_before)
    }

    /// No view may be older than this.
    pub fn floor(&self) -> u64 {
        self.fold_to.unwrap_or(self.base.cut).max(self.base.cut)
    }
}
