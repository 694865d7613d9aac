//! The logs beside an image, and which of them is next.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use tidemark_base::storage::{OpenMode, RealStorage};
use tidemark_hrl::format::{Header, HrlFile};
use uuid::Uuid;

/// Logs of one disk that are looked at: a host that keeps more has not been replicated for weeks.
const LOGS_MAX: usize = 65_536;

#[derive(Clone, Debug)]
pub struct Log {
    pub path: PathBuf,
    pub header: Header,
}

impl Log {
    pub fn id(&self) -> Uuid {
        self.header.unique_id
    }

    pub fn is_closed(&self) -> bool {
        self.header.eol_location != 0
    }
}

/// Those whose name begins as the image's: `web.vhdx` has `web*.hrl`. A file that is no log, or is gone again, is none.
pub fn list(image: &Path) -> io::Result<Vec<Log>> {
    let folder = image.parent().unwrap_or(Path::new("/"));
    let stem = image.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let storage = RealStorage::open_folder(folder);
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let lower = name.to_lowercase();
        let rest = lower.strip_prefix(&stem).and_then(|rest| rest.strip_suffix(".hrl"));
        // `web-2.vhdx` lies beside `web.vhdx`, and its logs are its own.
        let is_ours = rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric()));
        if !is_ours || has_image_of_its_own(folder, &lower, &stem) {
            continue;
        }
        let Ok(file) = storage.open(&name, OpenMode::Read) else { continue };
        match HrlFile::header_of(&file) {
            Ok((header, _)) => logs.push(Log { path: entry.path(), header }),
            Err(defect) => tracing::debug!(log = %entry.path().display(), %defect, "no log, or not one yet"),
        }
        if logs.len() >= LOGS_MAX {
            return Err(io::Error::other(format!("more than {LOGS_MAX} logs lie beside the disk")));
        }
    }
    Ok(logs)
}

/// Another image beside this one whose name is the longer beginning of the log's.
fn has_image_of_its_own(folder: &Path, log: &str, stem: &str) -> bool {
    std::fs::read_dir(folder).into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().to_lowercase();
        let other = name.strip_suffix(".vhdx").or_else(|| name.strip_suffix(".vhd"));
        other.is_some_and(|other| other.len() > stem.len() && other.starts_with(stem) && log.starts_with(other))
    })
}

/// What the logs say to somebody who took `last`.
#[derive(Clone, Debug)]
pub enum Next {
    /// Nothing new.
    Nothing,
    Log(Box<Log>),
    /// Closed logs are there that do not follow.
    Broken {
        reason: String,
    },
}

pub fn next(logs: &[Log], last: Option<Uuid>, passed: &BTreeSet<Uuid>) -> Next {
    let logs: Vec<&Log> = logs.iter().filter(|log| !passed.contains(&log.id())).collect();
    let mut closed = logs.iter().filter(|log| log.is_closed());
    let Some(last) = last else {
        return match closed.next() {
            None => Next::Nothing,
            Some(log) => Next::Broken {
                reason: format!("log {} appeared, and nobody knows what came before it", log.path.display()),
            },
        };
    };
    let mut following = logs.iter().filter(|log| log.header.previous_unique_id == last && log.id() != last);
    match (following.next(), following.next()) {
        (Some(one), Some(other)) => {
            let (one, other) = (one.path.display(), other.path.display());
            Next::Broken { reason: format!("{one} and {other} both follow log {last}") }
        }
        (Some(log), None) if log.is_closed() => Next::Log(Box::new((*log).clone())),
        (Some(log), None) if logs.iter().any(|other| other.header.previous_unique_id == log.id()) => {
            Next::Broken { reason: format!("{} was never closed, and others follow it", log.path.display()) }
        }
        // It is written still.
        (Some(_), None) => Next::Nothing,
        (None, _) => {
            // Logs that were taken and are there still lead back from the last one.
            let mut taken = vec![last];
            while let Some(log) = logs.iter().find(|log| Some(&log.id()) == taken.last())
                && !taken.contains(&log.header.previous_unique_id)
            {
                taken.push(log.header.previous_unique_id);
            }
            match logs.iter().find(|log| !taken.contains(&log.id())) {
                None => Next::Nothing,
                Some(log) => Next::Broken {
                    reason: format!("{} does not follow log {last}, which was taken last", log.path.display()),
                },
            }
        }
    }
}

/// The log that is written now: the open one. Of several the one that follows another.
pub fn active(logs: &[Log]) -> Option<&Log> {
    let mut open: Vec<&Log> = logs.iter().filter(|log| !log.is_closed()).collect();
    open.sort_by_key(|log| (log.header.created_seconds, log.header.modified_seconds));
    open.last().copied()
}

/// The closed log that no other log follows.
pub fn newest_closed(logs: &[Log]) -> Option<&Log> {
    let is_followed =
        |log: &Log| logs.iter().any(|other| other.is_closed() && other.header.previous_unique_id == log.id());
    let mut ends: Vec<&Log> = logs.iter().filter(|log| log.is_closed() && !is_followed(log)).collect();
    ends.sort_by_key(|log| (log.header.modified_seconds, log.header.created_seconds));
    ends.last().copied()
}
