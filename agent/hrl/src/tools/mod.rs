//! Tools for closed `.hrl` files of anyone, ours or a Hyper-V host's: look at them, check them, replay them.
//!
//! *Consistency.* They never write to a log. [`apply`] checks every log, and the place of every entry, before it
//! writes the first byte. *Retries.* An apply that failed in the middle is repeated as a whole: it writes the same again.
//! *Cancellation.* Between entries nothing is held; a disk that was partly written needs the apply again. *Crash.* The same.

pub mod apply;
pub mod inspect;
pub mod verify;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_base::Extent;
use tidemark_base::storage::{OpenMode, RealStorage, Storage, StorageFile};
use uuid::Uuid;

use crate::format::{Defect, DefectKind};

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} {defect}", path.display())]
    Defect { path: PathBuf, defect: Defect },
    #[error("{} has {count} defects; the first: {first}", path.display())]
    Unsound { path: PathBuf, count: u64, first: String },
    #[error("the logs are no chain: {what}")]
    NotAChain { what: String },
    #[error("{}, entry at byte {entry_offset}: the write {extent} lies beyond the disk of {disk_bytes} bytes", path.display())]
    BeyondDisk { path: PathBuf, entry_offset: u64, extent: Extent, disk_bytes: u64 },
    #[error("cannot write {extent} of the disk")]
    Write { extent: Extent, source: io::Error },
    #[error("cannot flush the disk")]
    Flush { source: io::Error },
    #[error("cannot print")]
    Print { source: io::Error },
}

impl ToolError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            ToolError::Open { .. } => "check the path and that you may read the file",
            ToolError::Defect { defect, .. } => match defect.kind {
                DefectKind::NotClosed => {
                    "only a closed log can be used; start the agent that wrote it, which recovers and closes it"
                }
                DefectKind::Cookie { .. } | DefectKind::Short { .. } | DefectKind::Version { .. } => {
                    "name a Hyper-V Replica Log file (.hrl)"
                }
                _ => "the file is damaged or incomplete: copy it again from where it was made",
            },
            ToolError::Unsound { .. } => {
                "see all defects with `tidemark hrl verify`; copy the file again from its origin"
            }
            ToolError::NotAChain { .. } => "name all logs from the oldest to the newest, each once",
            ToolError::BeyondDisk { .. } => "this is the log of another or of a larger disk; nothing was written",
            ToolError::Write { .. } | ToolError::Flush { .. } => {
                "the disk is written in part; when the cause is gone, apply the same logs again from the oldest on"
            }
            ToolError::Print { .. } => "see the system's message",
        }
    }
}

/// A file to look at, with the folder that it is in.
pub(crate) struct Opened {
    pub path: PathBuf,
    pub storage: Arc<dyn Storage>,
    pub file_name: String,
    pub file: Arc<dyn StorageFile>,
}

impl Opened {
    /// Follows links: whoever names a file here means what it leads to.
    pub(crate) fn open(path: &Path) -> Result<Self, ToolError> {
        let named = |source| ToolError::Open { path: path.to_owned(), source };
        let real = path.canonicalize().map_err(named)?;
        let (folder, file_name) = real
            .parent()
            .zip(real.file_name().and_then(|name| name.to_str()))
            .ok_or_else(|| named(io::ErrorKind::InvalidFilename.into()))?;
        if !real.is_file() {
            return Err(named(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        let storage = RealStorage::open_folder(folder);
        let file = storage.open(file_name, OpenMode::Read).map_err(named)?;
        Ok(Self { path: path.to_owned(), storage, file_name: file_name.to_owned(), file })
    }

    pub(crate) fn defect(&self, defect: Defect) -> ToolError {
        ToolError::Defect { path: self.path.clone(), defect }
    }
}

/// What links a log to others.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub path: PathBuf,
    pub id: Uuid,
    /// Nil: it says that it is the first.
    pub previous: Uuid,
}

/// The order of logs from the oldest to the newest, as indexes; everything that keeps them from being one chain.
pub(crate) fn chain_order(links: &[Link]) -> Result<Vec<usize>, Vec<String>> {
    let mut faults = Vec::new();
    for (index, link) in links.iter().enumerate() {
        for earlier in &links[..index] {
            if earlier.id == link.id {
                faults.push(format!(
                    "{} and {} have the same id {}",
                    earlier.path.display(),
                    link.path.display(),
                    link.id
                ));
            } else if earlier.previous == link.previous {
                let (one, other) = (earlier.path.display(), link.path.display());
                faults.push(format!("{one} and {other} both follow {}", link.previous));
            }
        }
    }
    let has_predecessor = |link: &Link| links.iter().any(|other| other.id == link.previous);
    let mut order: Vec<usize> = (0..links.len()).filter(|&index| !has_predecessor(&links[index])).collect();
    for &index in order.iter().skip(1) {
        let link = &links[index];
        faults.push(format!("{} follows {}, which is not among them", link.path.display(), link.previous));
    }
    order.truncate(1);
    if order.is_empty() && !links.is_empty() {
        faults.push("each log follows another: none is the oldest".to_owned());
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    while let Some(next) = order
        .last()
        .and_then(|&last| links.iter().position(|link| link.previous == links[last].id))
        .filter(|next| !order.contains(next))
    {
        order.push(next);
    }
    if order.len() < links.len() {
        return Err(vec!["some logs follow each other in a circle".to_owned()]);
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(pairs: &[(u128, u128)]) -> Vec<Link> {
        pairs
            .iter()
            .map(|&(id, previous)| Link {
                path: PathBuf::from(format!("{id}.hrl")),
                id: Uuid::from_u128(id),
                previous: Uuid::from_u128(previous),
            })
            .collect()
    }

    #[test]
    fn logs_are_ordered_by_their_links() {
        assert_eq!(chain_order(&links(&[(3, 2), (1, 0), (2, 1)])).unwrap(), [1, 2, 0]);
        assert_eq!(chain_order(&links(&[(5, 4)])).unwrap(), [0]);
        assert_eq!(chain_order(&links(&[])).unwrap(), [0; 0]);
    }

    #[test]
    fn what_is_no_chain_says_why() {
        for (pairs, expected) in [
            (&[(1, 0), (3, 2)][..], "not among them"),
            (&[(1, 0), (1, 0)], "the same id"),
            (&[(1, 0), (2, 1), (3, 1)], "both follow"),
            (&[(1, 2), (2, 1)], "none is the oldest"),
            (&[(1, 0), (3, 4), (4, 3)], "in a circle"),
        ] {
            let faults = chain_order(&links(pairs)).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{pairs:?}: {faults:?}");
        }
    }
}
