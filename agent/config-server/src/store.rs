//! The durable state: one JSON file, replaced as a whole.
//!
//! *Consistency.* A change is durable before it is seen by anyone: [`Store::change`] edits a copy, writes it, and only then
//! puts it in the place of the old. *Retries.* None: a change that could not be written did not happen, and its caller says
//! so. *Cancellation.* Changes do not await. *Crash.* See `tidemark_base::storage::replace_file`: the old state or the new.

use std::io;
use std::sync::{Arc, Mutex};

use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_proto::control::{Failure, FailureKind};

use crate::model::{STATE_VERSION, State};

const FILE: &str = "state.json";
/// Ten thousand machines fit in it several times.
const STATE_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot read the configuration server's state")]
    Read(#[source] io::Error),
    #[error("{path} is damaged")]
    Damaged { path: String, source: serde_json::Error },
    #[error("{path} was written by a newer Tidemark (version {version} of the state, this one knows {STATE_VERSION})")]
    Newer { path: String, version: u32 },
}

impl StoreError {
    pub fn help(&self) -> &'static str {
        match self {
            StoreError::Read(_) => "check the folder's owner and mode",
            StoreError::Damaged { .. } => {
                "restore the file from a backup; replicas and protected disks are not affected"
            }
            StoreError::Newer { .. } => {
                "run the newer version, or restore a backup of the state from before the upgrade"
            }
        }
    }
}

pub struct Store {
    storage: Arc<dyn Storage>,
    state: Mutex<Arc<State>>,
}

impl Store {
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, StoreError> {
        let path = || storage.path(FILE).display().to_string();
        let state = if storage.exists(FILE).map_err(StoreError::Read)? {
            let content = read_file(&*storage, FILE, STATE_BYTES_MAX).map_err(StoreError::Read)?;
            let damaged = |source| StoreError::Damaged { path: path(), source };
            // The version first: a newer state need not have today's shape.
            let versioned: Version = serde_json::from_slice(&content).map_err(damaged)?;
            if versioned.version > STATE_VERSION {
                return Err(StoreError::Newer { path: path(), version: versioned.version });
            }
            serde_json::from_slice(&content).map_err(damaged)?
        } else {
            State::default()
        };
        Ok(Self { storage, state: Mutex::new(Arc::new(state)) })
    }

    /// What is wanted now.
    pub fn state(&self) -> Arc<State> {
        self.state.lock().expect("no panic while held").clone()
    }

    /// Edits the state. Nothing happened when the edit refuses or the result cannot be made durable.
    pub fn change<T>(&self, edit: impl FnOnce(&mut State) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut current = self.state.lock().expect("no panic while held");
        let mut next = State::clone(&current);
        let result = edit(&mut next)?;
        let content = serde_json::to_vec_pretty(&next).expect("the state is plain data");
        replace_file(&*self.storage, FILE, &content).map_err(|error| {
            Failure::new(
                FailureKind::Failed,
                format!("the configuration server cannot store its state: {error}"),
                "free space on, or repair, the volume of its folder; nothing was changed",
            )
        })?;
        *current = Arc::new(next);
        Ok(result)
    }
}

#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DEFAULT_POLICY, Policy};
    use tidemark_base::storage::RealStorage;

    #[test]
    fn changes_survive_and_refused_ones_do_not_happen() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Store::open(RealStorage::open_folder(folder.path())).unwrap();
        let store = open();
        store
            .change(|state| {
                state.policies.insert("p".into(), Policy { compression: 7, ..Policy::default() });
                Ok(())
            })
            .unwrap();
        let refused: Result<(), Failure> = store.change(|state| {
            state.policies.clear();
            Err(Failure::new(FailureKind::Conflict, "no", ""))
        });
        assert!(refused.is_err());
        for state in [store.state(), open().state()] {
            assert_eq!(state.policies["p"].compression, 7);
            assert!(state.policies.contains_key(DEFAULT_POLICY));
        }
    }

    #[test]
    fn a_change_that_cannot_be_written_did_not_happen() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(RealStorage::open_folder(folder.path().join("gone"))).unwrap();
        let failure = store
            .change(|state| {
                state.policies.clear();
                Ok(())
            })
            .unwrap_err();
        assert!(failure.message.contains("cannot store"), "{failure}");
        assert!(store.state().policies.contains_key(DEFAULT_POLICY));
    }

    #[test]
    fn damaged_and_newer_states_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        for (content, part) in [("{\"version\": 1, ", "damaged"), ("{\"version\": 99, \"else\": 1}", "newer")] {
            replace_file(&*storage, FILE, content.as_bytes()).unwrap();
            let error = Store::open(storage.clone()).err().unwrap().to_string();
            assert!(error.contains(part) && error.contains(FILE), "{error}");
        }
    }
}
