//! What the configuration server said of each machine: its name and how long its history is kept.
//!
//! *Consistency.* As in [`crate::accept::authorise`]: the file first, then memory. *Crash.* The old content or the new.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::MachineId;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::sync::{Mutex, MutexGuard};

use crate::points::Retention;

const FILE: &str = "machines.json";
const FILE_BYTES_MAX: u64 = 64 << 20;
const VERSION: u32 = 1;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineSettings {
    pub name: String,
    pub retention: Retention,
}

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    machines: BTreeMap<MachineId, MachineSettings>,
}

pub struct Settings {
    storage: Arc<dyn Storage>,
    machines: Mutex<BTreeMap<MachineId, MachineSettings>>,
    writing: Mutex<()>,
}

impl Settings {
    pub fn open(storage: Arc<dyn Storage>) -> io::Result<Self> {
        let machines = if storage.exists(FILE)? {
            let damaged = |reason: String| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {reason}", storage.path(FILE).display()))
            };
            let document: Document = serde_json::from_slice(&read_file(&*storage, FILE, FILE_BYTES_MAX)?)
                .map_err(|error| damaged(error.to_string()))?;
            if document.version != VERSION {
                return Err(damaged(format!("version {} is not known", document.version)));
            }
            document.machines
        } else {
            BTreeMap::new()
        };
        Ok(Self { storage, machines: Mutex::new(machines), writing: Mutex::new(()) })
    }

    pub fn all(&self) -> BTreeMap<MachineId, MachineSettings> {
        self.machines().clone()
    }

    pub fn get(&self, machine: MachineId) -> Option<MachineSettings> {
        self.machines().get(&machine).cloned()
    }

    /// Changes the table; durable when this returns. Blocks.
    pub fn change(&self, change: impl FnOnce(&mut BTreeMap<MachineId, MachineSettings>)) -> io::Result<()> {
        let _writing = self.writing.lock().expect("no panic while held");
        let mut machines = self.all();
        change(&mut machines);
        if machines == *self.machines() {
            return Ok(());
        }
        let document = Document { version: VERSION, machines };
        replace_file(&*self.storage, FILE, &serde_json::to_vec_pretty(&document).map_err(io::Error::other)?)?;
        *self.machines() = document.machines;
        Ok(())
    }

    fn machines(&self) -> MutexGuard<'_, BTreeMap<MachineId, MachineSettings>> {
        self.machines.lock().expect("no panic while held")
    }
}
