//! Machines that failed over to here: what of them must outlive this process.
//!
//! `failed-over.json` ([`crate::table`]) has one entry a failover; `failed-over/<serve>/<disk>/` the layer of each disk
//! ([`crate::view::scratch`]). A failover to another point gets another serve, so that nothing of the one before shows.
//!
//! *Consistency.* An entry is durable after its pins and before its folders, and goes before both: what no entry names is of no
//! failover, and is removed at the next start. *Retries.* Every step may be repeated. *Cancellation.* A promotion stops at its
//! next block and goes on from there when it is wanted again. *Crash.* Entries are served again, at the same addresses, with
//! everything that was acknowledged; promotions go on.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;
use tidemark_base::sync::Mutex;
use tidemark_base::thread::JoinHandle;
use tidemark_base::{DiskId, MachineId, MarkId, Timestamp};
use tidemark_proto::control::ServeId;
use tokio::sync::watch;
use uuid::Uuid;

use crate::server::failback::{ActiveRound, ActiveRounds};
use crate::table::{Table, TableError};
use crate::view::scratch::ScratchDisk;

pub const FILE: &str = "failed-over.json";
pub const FOLDER: &str = "failed-over";
/// Begins the holders of pins, which end with a serve's or a failover's id.
pub const PIN: &str = "failed over ";

/// A machine that runs, or may run, from its replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FailedOver {
    pub machine: MachineId,
    /// Names its exports and its folders.
    pub serve: ServeId,
    pub point: MarkId,
    pub time: Timestamp,
    pub disks: Vec<FailedOverDisk>,
    pub since: Timestamp,
    /// The point was accepted: no other can be chosen.
    pub committed: bool,
    pub promote: Promote,
    /// Its home follows it: it stays where its writes are seen.
    #[serde(default)]
    pub captured: bool,
    /// Nobody opens its disks: the machine is off, on its way home.
    #[serde(default)]
    pub stopped: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FailedOverDisk {
    pub disk: DiskId,
    pub cut: u64,
}

/// How far the machine's disks became plain ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promote {
    /// Its disks are a point and what was written since.
    No,
    Wanted {
        bytes_per_second: Option<u64>,
    },
    /// The plain disks have everything; the machine still comes through here.
    Filled,
    /// The machine has its plain disks.
    Plain,
}

impl FailedOver {
    /// Of its pins at its point.
    pub fn pin(&self) -> String {
        format!("{PIN}{}", self.serve)
    }

    pub fn folder(&self) -> String {
        format!("{FOLDER}/{}", self.serve)
    }
}

/// Of its pins at the oldest place: before a failover is committed nothing folds.
pub fn pin_of_all(id: Uuid) -> String {
    format!("{PIN}{id} all")
}

#[derive(Clone)]
pub struct Layer {
    pub disk: DiskId,
    pub scratch: Arc<ScratchDisk>,
}

pub struct Promotion {
    pub stop: Stop,
    pub thread: JoinHandle<()>,
}

pub struct FailedOvers {
    table: Table<BTreeMap<Uuid, FailedOver>>,
    /// Of those that are served.
    pub layers: Mutex<BTreeMap<Uuid, Vec<Layer>>>,
    /// Why one is not, or not as it should be.
    pub problems: Mutex<BTreeMap<Uuid, String>>,
    pub promotions: Mutex<BTreeMap<Uuid, Promotion>>,
    /// On the way home.
    rounds: Mutex<ActiveRounds>,
    /// One change at a time.
    pub changing: Mutex<()>,
    /// Grows whenever a promotion came to its end.
    pub changes: watch::Sender<u64>,
}

impl FailedOvers {
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, TableError> {
        Ok(Self {
            table: Table::open(storage, FILE)?,
            layers: Mutex::default(),
            problems: Mutex::default(),
            promotions: Mutex::default(),
            rounds: Mutex::default(),
            changing: Mutex::default(),
            changes: watch::channel(0).0,
        })
    }

    pub fn all(&self) -> BTreeMap<Uuid, FailedOver> {
        self.table.all()
    }

    pub fn get(&self, id: Uuid) -> Option<FailedOver> {
        self.table.read(|table| table.get(&id).cloned())
    }

    pub fn of_machine(&self, machine: MachineId) -> Option<(Uuid, FailedOver)> {
        self.table.read(|table| {
            table.iter().find(|(_, entry)| entry.machine == machine).map(|(id, entry)| (*id, entry.clone()))
        })
    }

    /// Whether every point of a machine stays as it is: until somebody commits, another may be chosen.
    pub fn holds(&self, machine: MachineId) -> bool {
        self.table.read(|table| table.values().any(|entry| entry.machine == machine && !entry.committed))
    }

    /// Durable when it returns. Blocks.
    pub fn put(&self, id: Uuid, entry: FailedOver) -> Result<(), TableError> {
        let put = self.table.change(|table| -> Result<(), TableError> {
            table.insert(id, entry);
            Ok(())
        });
        put.map(drop)
    }

    /// Changes an entry that is there, as it is then: a promotion may have come to its end meanwhile. Durable when it returns. Blocks.
    pub fn change(&self, id: Uuid, change: impl FnOnce(&mut FailedOver)) -> Result<(), TableError> {
        let changed = self.table.change(|table| -> Result<(), TableError> {
            table.get_mut(&id).map(change);
            Ok(())
        });
        changed.map(drop)
    }

    /// Durable when it returns. Blocks.
    pub fn remove(&self, id: Uuid) -> Result<(), TableError> {
        let removed = self.table.change(|table| -> Result<(), TableError> {
            table.remove(&id);
            Ok(())
        });
        removed.map(drop)
    }

    /// The layers of a failover that is served.
    pub fn layers_of(&self, id: Uuid) -> Vec<Layer> {
        self.layers.lock().expect("no panic while held").get(&id).cloned().unwrap_or_default()
    }

    pub fn round(&self, id: Uuid) -> Option<ActiveRound> {
        self.rounds.lock().expect("no panic while held").get(&id).cloned()
    }

    pub fn set_round(&self, id: Uuid, round: ActiveRound) {
        self.rounds.lock().expect("no panic while held").insert(id, round);
    }

    pub fn forget_round(&self, id: Uuid) {
        self.rounds.lock().expect("no panic while held").remove(&id);
    }

    pub fn note_problem(&self, id: Uuid, problem: Option<String>) {
        let mut problems = self.problems.lock().expect("no panic while held");
        match problem {
            Some(problem) => problems.insert(id, problem),
            None => problems.remove(&id),
        };
    }

    pub fn problem(&self, id: Uuid) -> Option<String> {
        self.problems.lock().expect("no panic while held").get(&id).cloned()
    }

    /// Ends a promotion's thread; it goes on from where it was when it is started again. Blocks.
    pub fn stop_promotion(&self, id: Uuid) {
        let promotion = self.promotions.lock().expect("no panic while held").remove(&id);
        if let Some(Promotion { stop, thread }) = promotion {
            stop.stop();
            if thread.join().is_err() {
                tracing::error!(failover = %id, "a promotion panicked");
            }
        }
    }

    pub fn stop_promotions(&self) {
        let all: Vec<Uuid> = self.promotions.lock().expect("no panic while held").keys().copied().collect();
        all.into_iter().for_each(|id| self.stop_promotion(id));
    }
}

/// Dropped when the serve has ended: what was written is durable then.
pub struct FlushLater(pub Vec<Layer>);

impl Drop for FlushLater {
    fn drop(&mut self) {
        for layer in &self.0 {
            if let Err(error) = layer.scratch.flush() {
                tracing::error!(disk = %layer.disk, %error, "a failed-over disk cannot be made durable");
            }
        }
    }
}
