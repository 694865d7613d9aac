//! What every operation stands on: the state, the streams, the jobs, and one lock a machine.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tidemark_base::{Clock, HostId, MachineId, ServerId, SystemClock, Timestamp};
use tidemark_proto::control::{AgentCommand, Failure, FailureKind, Reply, ServerCommand};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backup::Backups;
use crate::cycles::Cycles;
use crate::deliver::Deliveries;
use crate::history::History;
use crate::hub::{Hub, PeerId, unexpected};
use crate::identity::Registrar;
use crate::jobs::Jobs;
use crate::model::Machine;
use crate::serves::Serves;
use crate::store::Store;

/// What an agent or a process server answers from memory.
pub const QUICK: Duration = Duration::from_secs(15);
/// What takes opening files and talking to a neighbour.
pub const SETTLE: Duration = Duration::from_secs(60);
/// What reads a whole disk.
pub const WHOLE_DISK: Duration = Duration::from_secs(7 * 86_400);

pub struct Core {
    pub store: Arc<Store>,
    pub hub: Arc<Hub>,
    pub jobs: Arc<Jobs>,
    pub history: Arc<History>,
    pub registrar: Arc<Registrar>,
    pub backups: Backups,
    pub serves: Serves,
    pub cycles: Cycles,
    pub deliveries: Deliveries,
    pub stop: CancellationToken,
    pub clock: SystemClock,
    /// When this process began to listen: nobody was heard of before.
    pub started: Timestamp,
    /// How many peers were told everything that concerns them since they connected.
    pub settled_peers: watch::Sender<BTreeSet<PeerId>>,
    /// Grows whenever a side could not do what is wanted of it.
    pub failed: watch::Sender<u64>,
    /// The configuration server's own folder, where scripts are.
    folder: OnceLock<PathBuf>,
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Why what is wanted of a machine could not be done, as of the last try.
    unsettled: Mutex<HashMap<(MachineId, Side), Failure>>,
    /// Machines that failed over without us, as of the last answer of their process servers: what happened, and what to do.
    taken_over: Mutex<HashMap<MachineId, Failure>>,
}

/// The two sides that must agree to what is wanted of a machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    Agent,
    Server,
}

impl Core {
    pub fn new(
        store: Arc<Store>,
        hub: Arc<Hub>,
        jobs: Arc<Jobs>,
        history: Arc<History>,
        registrar: Arc<Registrar>,
        backups: Backups,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            hub,
            jobs,
            history,
            registrar,
            backups,
            serves: Serves::default(),
            cycles: Cycles::default(),
            deliveries: Deliveries::default(),
            stop: CancellationToken::new(),
            clock: SystemClock::new(),
            started: SystemClock::new().wall_now(),
            settled_peers: watch::Sender::default(),
            failed: watch::Sender::default(),
            folder: OnceLock::new(),
            locks: Mutex::default(),
            unsettled: Mutex::default(),
            taken_over: Mutex::default(),
        })
    }

    pub fn set_folder(&self, folder: PathBuf) {
        // Said once, at the start.
        let _ = self.folder.set(folder);
    }

    /// Where scripts of a kind are installed.
    pub fn scripts(&self, kind: &str) -> PathBuf {
        self.folder.get().map(|folder| folder.join(kind)).unwrap_or_default()
    }

    /// Whether requests can be answered: the database does, and stores what it is told. Blocks.
    pub fn is_ready(&self) -> Result<(), Failure> {
        Ok(self.store.database().check()?)
    }

    /// Operations that change what is wanted of a machine, one after another.
    pub async fn lock(&self, name: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().expect("no panic while held");
            // Names that nobody waits for are not kept.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(name.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }

    pub fn machine(&self, name: &str) -> Result<Machine, Failure> {
        self.store.state().machines.get(name).cloned().ok_or_else(|| {
            let shown: String = name.chars().take(80).collect();
            Failure::new(
                FailureKind::NotFound,
                format!("there is no machine {shown:?}"),
                "see `tidemark status` for those that are protected, or protect it with `tidemark protect`",
            )
        })
    }

    pub async fn agent(&self, id: HostId, command: &AgentCommand, limit: Duration) -> Result<Reply, Failure> {
        self.hub.agent(id, command, limit).await
    }

    pub async fn server(&self, id: ServerId, command: &ServerCommand, limit: Duration) -> Result<Reply, Failure> {
        self.hub.server(id, command, limit).await
    }

    /// For commands that answer `Done`.
    pub async fn agent_does(&self, id: HostId, command: &AgentCommand, limit: Duration) -> Result<(), Failure> {
        match self.agent(id, command, limit).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(PeerId::Agent(id), &other)),
        }
    }

    pub async fn server_does(&self, id: ServerId, command: &ServerCommand, limit: Duration) -> Result<(), Failure> {
        match self.server(id, command, limit).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(PeerId::ProcessServer(id), &other)),
        }
    }

    /// Notes how telling a side went, for the status.
    pub fn settled(&self, machine: MachineId, side: Side, failure: Option<&Failure>) {
        let mut unsettled = self.unsettled.lock().expect("no panic while held");
        match failure {
            None => unsettled.remove(&(machine, side)),
            Some(failure) => unsettled.insert((machine, side), failure.clone()),
        };
        drop(unsettled);
        if failure.is_some() {
            self.failed.send_modify(|failures| *failures += 1);
        }
    }

    /// Notes whether a machine failed over without us.
    pub fn note_taken_over(&self, machine: MachineId, taken: Option<Failure>) {
        let mut all = self.taken_over.lock().expect("no panic while held");
        match taken {
            Some(taken) => all.insert(machine, taken),
            None => all.remove(&machine),
        };
    }

    pub fn taken_over(&self, machine: MachineId) -> Option<Failure> {
        self.taken_over.lock().expect("no panic while held").get(&machine).cloned()
    }

    pub fn is_unsettled(&self, machine: MachineId, side: Side) -> bool {
        self.unsettled.lock().expect("no panic while held").contains_key(&(machine, side))
    }

    pub fn unsettled(&self, machine: MachineId) -> Vec<Failure> {
        let unsettled = self.unsettled.lock().expect("no panic while held");
        [Side::Agent, Side::Server].iter().filter_map(|side| unsettled.get(&(machine, *side)).cloned()).collect()
    }
}
