//! What a role knows of its configuration server: where it is, which one it is, and who else may know.
//!
//! The higher incarnation counts: it is of a later restore. Of two that were restored from the same backup the one that was
//! heard of first stays; the other is refused, and says so.
//!
//! *Consistency.* Durable before it is relied on. *Retries.* None. *Cancellation.* None. *Crash.* The file is replaced as a
//! whole; one that cannot be read is as none: the next configuration server that answers is taken.
//!
//! Process servers are told to agents by the configuration server, so that a host that protects nothing yet finds it after a
//! restore elsewhere as those do that send somewhere. They are kept beside, in a file of their own.

use std::sync::{Arc, Mutex};

use serde::de::DeserializeOwned;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_proto::control::{Neighbour, Whereabouts};

const FILE: &str = "config-server-known.json";
const NEIGHBOURS_FILE: &str = "process-servers-known.json";
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Addresses that are dialled in turn.
const CANDIDATES_MAX: usize = 64;

pub struct Known {
    storage: Arc<dyn Storage>,
    whereabouts: Mutex<Option<Whereabouts>>,
    /// What others said; not believed, but dialled: who answers there proves what it is.
    hints: Mutex<Vec<String>>,
    neighbours: Mutex<Vec<Neighbour>>,
}

impl Known {
    /// Blocks.
    pub fn open(storage: Arc<dyn Storage>) -> Arc<Self> {
        let whereabouts = Mutex::new(read(&*storage, FILE));
        let neighbours = Mutex::new(read(&*storage, NEIGHBOURS_FILE).unwrap_or_default());
        Arc::new(Self { storage, whereabouts, hints: Mutex::default(), neighbours })
    }

    /// Process servers that the configuration server told of.
    pub fn neighbours(&self) -> Vec<Neighbour> {
        self.neighbours.lock().expect("no panic while held").clone()
    }

    /// Takes what the configuration server says of them. Blocks.
    pub fn meet(&self, new: Vec<Neighbour>) {
        let mut known = self.neighbours.lock().expect("no panic while held");
        if *known == new {
            return;
        }
        let kept = serde_json::to_vec(&new).map_err(std::io::Error::other);
        // When they cannot be kept they count until the next start.
        if let Err(error) = kept.and_then(|content| replace_file(&*self.storage, NEIGHBOURS_FILE, &content)) {
            tracing::warn!(%error, "which process servers there are cannot be kept");
        }
        *known = new;
    }

    pub fn get(&self) -> Option<Whereabouts> {
        self.whereabouts.lock().expect("no panic while held").clone()
    }

    /// Takes what a configuration server says of itself, or says why it is not the right one. Blocks.
    pub fn take(&self, new: Whereabouts) -> Result<(), String> {
        let mut known = self.whereabouts.lock().expect("no panic while held");
        if let Some(before) = known.as_ref() {
            if *before == new {
                return Ok(());
            }
            let Whereabouts { incarnation, server, .. } = before;
            if new.incarnation < *incarnation {
                return Err(format!(
                    "it is of before a restore (incarnation {}, and {incarnation} is known, at {})",
                    new.incarnation,
                    before.addresses.join(", ")
                ));
            }
            if new.incarnation == *incarnation && new.incarnation > 1 && new.server != *server {
                return Err(format!(
                    "another one was restored from the same backup (incarnation {incarnation}, at {})",
                    before.addresses.join(", ")
                ));
            }
        }
        let content = serde_json::to_vec(&new).map_err(|error| error.to_string())?;
        // When it cannot be kept it counts until the next start.
        if let Err(error) = replace_file(&*self.storage, FILE, &content) {
            tracing::warn!(%error, "what is known of the configuration server cannot be kept");
        }
        *known = Some(new);
        Ok(())
    }

    /// What process servers said of where it is.
    pub fn hint(&self, addresses: Vec<String>) {
        *self.hints.lock().expect("no panic while held") = addresses;
    }

    /// Where to dial, in this order: as the role was told, as the configuration server said, as others said.
    pub fn candidates(&self, told: Option<&str>) -> Vec<String> {
        let told = told.into_iter().flat_map(|told| told.split(',')).map(|address| address.trim().to_owned());
        let said = self.get().map(|known| known.addresses).unwrap_or_default();
        let hints = self.hints.lock().expect("no panic while held").clone();
        let mut candidates: Vec<String> = Vec::new();
        for address in told.chain(said).chain(hints) {
            if !address.is_empty() && !candidates.contains(&address) && candidates.len() < CANDIDATES_MAX {
                candidates.push(address);
            }
        }
        candidates
    }
}

fn read<T: DeserializeOwned>(storage: &dyn Storage, file: &str) -> Option<T> {
    let read = || -> Result<Option<T>, String> {
        if !storage.exists(file).map_err(|error| error.to_string())? {
            return Ok(None);
        }
        let content = read_file(storage, file, FILE_BYTES_MAX).map_err(|error| error.to_string())?;
        serde_json::from_slice(&content).map(Some).map_err(|error| error.to_string())
    };
    read().unwrap_or_else(|error| {
        tracing::warn!(file, error, "what is known of the configuration server cannot be read");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::ServerId;
    use tidemark_base::storage::RealStorage;

    fn at(incarnation: u64, server: u8, address: &str) -> Whereabouts {
        Whereabouts { incarnation, server: ServerId::from_bytes([server; 16]), addresses: vec![address.to_owned()] }
    }

    #[test]
    fn a_server_of_before_a_restore_and_a_second_restore_are_refused_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Known::open(RealStorage::open_folder(folder.path()));
        let known = open();
        known.take(at(1, 1, "old:1")).unwrap();
        known.take(at(1, 1, "moved:1")).unwrap();
        known.take(at(2, 2, "new:1")).unwrap();
        for known in [known, open()] {
            let old = known.take(at(1, 1, "old:1")).unwrap_err();
            assert!(old.contains("before a restore") && old.contains("new:1"), "{old}");
            let second = known.take(at(2, 3, "other:1")).unwrap_err();
            assert!(second.contains("same backup"), "{second}");
            assert_eq!(known.get().unwrap(), at(2, 2, "new:1"));
        }
        open().take(at(3, 4, "third:1")).unwrap();
    }

    #[test]
    fn process_servers_that_were_told_are_known_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Known::open(RealStorage::open_folder(folder.path()));
        let neighbour = |port: u8| Neighbour { server: ServerId::from_bytes([port; 16]), address: format!("p:{port}") };
        open().meet(vec![neighbour(1), neighbour(2)]);
        assert_eq!(open().neighbours(), [neighbour(1), neighbour(2)]);
        open().meet(Vec::new());
        assert_eq!(open().neighbours(), []);
        std::fs::File::create(folder.path().join(NEIGHBOURS_FILE)).unwrap();
        assert_eq!(open().neighbours(), [], "a damaged file keeps nobody from starting");
    }

    #[test]
    fn addresses_are_dialled_in_turn_and_hints_prove_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let known = Known::open(RealStorage::open_folder(folder.path()));
        known.take(at(1, 1, "said:1")).unwrap();
        known.hint(vec!["hint:1".into(), "told:2".into()]);
        assert_eq!(known.candidates(Some("told:1, told:2")), ["told:1", "told:2", "said:1", "hint:1"]);
        assert_eq!(known.candidates(None), ["said:1", "hint:1", "told:2"]);
        assert_eq!(known.get().unwrap(), at(1, 1, "said:1"), "a hint is not believed");
        known.hint((0..1000).map(|port| format!("h:{port}")).collect());
        assert_eq!(known.candidates(None).len(), CANDIDATES_MAX);
    }
}
