//! All machines of one host.
//!
//! *Consistency.* What is protected is stored before `protect` returns, so that a restart serves it again at the same
//! addresses. *Retries.* A machine whose disks cannot be attached at a start is tried again every few seconds.
//! *Cancellation.* [`Host::stop`] leaves every disk cleanly. *Crash.* Dropping it without is one.

mod group;
#[cfg(unix)]
mod inventory;
mod probe;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use prost::Message;
use tidemark_base::stop::Stop;
use tidemark_base::storage::{RealStorage, Storage, read_file, remove_if_there, replace_file};
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::thread::JoinHandle;
use tidemark_base::time::Instant;
use tidemark_base::{Clock, DiskId, MachineId, ServerId, SystemClock};
use tidemark_proto::control::{
    AgentReport, AttachedDisk, Consistency as Requested, DiskSpec, Endpoint, Failure, MachineSpec, MarkRequest,
    Problem, SourceDisk, SourceMode, SourceState, Via, wire,
};
use tidemark_proto::replication::{Consistency, SessionId};
use tidemark_transport::{Identity, PeerIdentity};
use tokio::runtime::Handle;

use crate::capture::CaptureProvider;
use crate::capture::providers::{self, Providers};
use crate::error::HostError;
use crate::events::{EventKind, Events, News, Severity};
use crate::freeze::Freezer;
use crate::machine::{Machine, send_policy};
use crate::mark::{Barriers, MarkOutcome};
use crate::pack::Workers;
use crate::send::grpc::GrpcLink;
use crate::send::link::Link;
use crate::send::{SendLimits, SenderConfig};
use crate::state::session::Boot;

/// Machines that could not be attached are tried again so often.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// How often a mark that is asked for looks whether a log was replayed.
const REPLAY_POLL: Duration = Duration::from_millis(50);
const SPEC_BYTES_MAX: u64 = 4 << 20;
/// Holds a folder for each block device, named after its id.
pub(crate) const DEVICES_FOLDER: &str = "devices";

/// How to reach a process server.
pub type LinkFactory = Arc<dyn Fn(&Endpoint) -> Arc<dyn Link> + Send + Sync>;

#[derive(Clone)]
pub struct HostConfig {
    /// What is protected, and what is kept for block devices.
    pub state_folder: PathBuf,
    /// For the state of disks that the agent's own state lies on: in memory, there until the next boot. `None`: they are refused.
    pub memory_folder: Option<PathBuf>,
    /// The sockets.
    pub run_folder: PathBuf,
    /// Users besides root and the agent's own who may open the exports.
    pub allowed_uids: Vec<u32>,
    pub link: LinkFactory,
    pub freezer: Option<Arc<dyn Freezer>>,
    pub limits: HostLimits,
    pub boot: Boot,
    pub clock: Arc<dyn Clock>,
    /// What happens is told here; whoever wants to miss nothing subscribes before the host starts.
    pub events: Arc<Events>,
}

#[derive(Clone, Debug)]
pub struct HostLimits {
    /// A log is rotated when it is longer.
    pub log_rotate_bytes: u64,
    /// The log limit of a small disk, where the policy names none.
    pub log_bytes_min: u64,
    /// What must stay free in the folder of a log, for the disk itself.
    pub log_reserve_bytes: u64,
    /// What each freeze script may take.
    pub freeze_limit: Duration,
    /// How long a mark that is asked for waits for a scan to end.
    pub mark_scan_wait: Duration,
    pub send: SendLimits,
}

impl Default for HostLimits {
    fn default() -> Self {
        Self {
            log_rotate_bytes: 256 << 20,
            log_bytes_min: 256 << 20,
            log_reserve_bytes: 64 << 20,
            freeze_limit: Duration::from_secs(30),
            mark_scan_wait: Duration::from_secs(20),
            send: SendLimits::default(),
        }
    }
}

impl HostConfig {
    /// A host that sends over gRPC. `freeze_folder` holds a folder of scripts for each machine.
    pub fn new(
        state_folder: PathBuf,
        run_folder: PathBuf,
        freeze_folder: Option<PathBuf>,
        identity: Identity,
        runtime: Handle,
    ) -> Result<Self, HostError> {
        let links: Mutex<BTreeMap<(ServerId, String), GrpcLink>> = Mutex::default();
        let link: LinkFactory = Arc::new(move |endpoint| {
            // Disks of all machines share the connections to one process server.
            let mut links = links.lock().expect("no panic while held");
            let key = (endpoint.server, endpoint.address.clone());
            let make = || {
                let expected = PeerIdentity::ProcessServer(endpoint.server);
                GrpcLink::new(runtime.clone(), endpoint.address.clone(), expected, identity.clone())
            };
            Arc::new(links.entry(key).or_insert_with(make).clone())
        });
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        Ok(Self {
            state_folder,
            memory_folder: None,
            run_folder,
            allowed_uids: Vec::new(),
            link,
            freezer: freeze_folder.and_then(providers::freezer),
            limits: HostLimits::default(),
            boot: Boot::current().map_err(|source| HostError::Io { what: "find out which boot this is", source })?,
            events: Events::new(clock.clone()),
            clock,
        })
    }

    pub(crate) fn storage(&self) -> Result<Arc<dyn Storage>, HostError> {
        Self::storage_in(&self.state_folder)
    }

    pub(crate) fn storage_in(folder: &Path) -> Result<Arc<dyn Storage>, HostError> {
        let failed = |source| HostError::State { what: "make a folder", folder: folder.to_owned(), source };
        RealStorage::create(folder.to_owned()).map(|storage| storage as _).map_err(failed)
    }

    /// Where the state of the disks of a machine is kept that is not beside them. They are frozen together, so that the state of none of
    /// them may lie on another one.
    pub(crate) fn state_of<'a>(
        &self,
        provider: &dyn CaptureProvider,
        mut disks: impl Iterator<Item = &'a str>,
    ) -> &Path {
        let mut wants = |memory: &PathBuf| {
            disks.any(|disk| provider.wants_state_in_memory(disk.as_ref(), &self.state_folder, memory))
        };
        self.memory_folder.as_ref().filter(|memory| wants(memory)).unwrap_or(&self.state_folder)
    }
}

/// A machine as `status` shows it.
#[derive(Clone, PartialEq, Debug)]
pub struct MachineStatus {
    pub machine: MachineId,
    pub name: String,
    pub paused: bool,
    pub disks: Vec<SourceDisk>,
}

/// The host role.
pub struct Host {
    shared: Arc<Shared>,
    barriers: Barriers,
    stop: Stop,
    retry: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    config: HostConfig,
    providers: Providers,
    workers: Arc<Workers>,
    session: SessionId,
    storage: Arc<dyn Storage>,
    machines: Mutex<BTreeMap<MachineId, Entry>>,
}

enum Entry {
    Running(Arc<Machine>),
    /// Protected, but its disks cannot be attached now.
    Failed(Box<FailedMachine>),
}

struct FailedMachine {
    spec: MachineSpec,
    failure: Failure,
}

impl Entry {
    fn spec(&self) -> MachineSpec {
        match self {
            Entry::Running(machine) => machine.spec(),
            Entry::Failed(failed) => failed.spec.clone(),
        }
    }
}

impl Host {
    /// Attaches again whatever was protected. Machines that cannot be attached now show in the status and are tried again.
    pub fn start(config: HostConfig) -> Result<Self, HostError> {
        let splitter = providers::splitter(&config)?;
        Self::start_with(config, splitter)
    }

    /// As [`Host::start`], with another way to catch changes.
    pub fn start_with(config: HostConfig, splitter: Arc<dyn CaptureProvider>) -> Result<Self, HostError> {
        let storage = config.storage()?;
        let failed = |source| HostError::Io { what: "read what is protected", source };
        if !storage.exists("machines").map_err(failed)? {
            storage.create_folder("machines").map_err(failed)?;
            storage.sync_folder("").map_err(failed)?;
        }
        let workers = Workers::start().map_err(|source| HostError::Io { what: "start threads", source })?;
        let shared = Arc::new(Shared {
            providers: Providers::new(&config, splitter),
            config,
            workers,
            session: SessionId::random(),
            storage,
            machines: Mutex::default(),
        });
        for spec in shared.stored().map_err(failed)? {
            let machine = spec.machine;
            let entry = shared.try_start(spec);
            shared.machines().insert(machine, entry);
        }
        let stop = Stop::new();
        let retry = tidemark_base::thread::Builder::new().name("host".to_owned()).spawn({
            let (shared, stop): (Weak<Shared>, Stop) = (Arc::downgrade(&shared), stop.clone());
            move || {
                while !stop.wait_for(RETRY_INTERVAL) {
                    let Some(shared) = shared.upgrade() else { break };
                    shared.retry_failed();
                }
            }
        });
        let retry = retry.map_err(|source| HostError::Io { what: "start a thread", source })?;
        Ok(Self { shared, barriers: Barriers::default(), stop, retry: Mutex::new(Some(retry)) })
    }

    /// What happened on this host.
    pub fn events(&self) -> &Arc<Events> {
        &self.shared.config.events
    }

    /// Protects a machine. The same again gives the same addresses, and takes over a changed policy. Disks that are named now
    /// and were not before are added, those that are not named any more are left, one at a higher generation is attached anew
    /// (it grew); the others go on meanwhile.
    pub fn protect(&self, mut spec: MachineSpec) -> Result<Vec<AttachedDisk>, HostError> {
        if self.stop.is_stopped() {
            return Err(HostError::Stopping);
        }
        let mut machines = self.shared.machines();
        self.shared.check(&machines, &spec)?;
        let before = machines.get(&spec.machine).map(Entry::spec);
        let is_known = before.is_some();
        // "Any port" is the one that it was before.
        if let (Some(wanted), Some(before)) =
            (spec.listen, machines.get(&spec.machine).and_then(|entry| entry.spec().listen))
            && wanted.port() == 0
            && wanted.ip() == before.ip()
        {
            spec.listen = Some(before);
        }
        if let Some(Entry::Running(machine)) = machines.get(&spec.machine) {
            let before = machine.spec();
            if is_same_or_grown(&before, &spec) {
                let changed = self.shared.change(machine, &before, &mut spec);
                let machine = machine.clone();
                // As stored: the workload goes on with its disks in any case.
                machine.drop_servers(if changed.is_ok() { &spec } else { &before });
                changed?;
                machine.adjust(spec);
                machine.follow_fence()?;
                return Ok(machine.attachments());
            }
            // Another generation: the same history, sealed with another key. Stored first: what does not start now is tried
            // again.
            self.shared.store(&spec)?;
            machine.stop();
            machines.remove(&spec.machine);
        }
        let machine = match self.shared.start(spec.clone()) {
            Ok(machine) => machine,
            Err(error) => {
                if is_known {
                    let failed = FailedMachine { failure: Failure::from(&error), spec: spec.clone() };
                    machines.insert(spec.machine, Entry::Failed(Box::new(failed)));
                }
                return Err(error);
            }
        };
        let stored = self.shared.provider(spec.via).listen(spec.machine, spec.listen).and_then(|listen| {
            spec.listen = listen;
            machine.adjust(spec.clone());
            self.shared.store(&spec)
        });
        if let Err(error) = stored {
            machine.stop();
            return Err(error);
        }
        for disk in before.iter().flat_map(|before| gone(before, &spec)) {
            self.shared.remove_state(spec.via, disk);
        }
        let attachments = machine.attachments();
        self.shared.tell(&spec, Severity::Information, EventKind::MachineProtected, "is protected from now on", "");
        machines.insert(spec.machine, Entry::Running(machine));
        Ok(attachments)
    }

    /// Stops protecting a machine and removes its logs and state. The disks stay as they are.
    pub fn unprotect(&self, machine: MachineId) -> Result<(), HostError> {
        let mut machines = self.shared.machines();
        let entry = machines.remove(&machine).ok_or(HostError::UnknownMachine { machine })?;
        // First the list: a crash in between leaves files, not a machine that comes back.
        self.shared.forget(machine)?;
        let spec = entry.spec();
        if let Entry::Running(machine) = entry {
            machine.stop();
        }
        let provider = self.shared.provider(spec.via);
        for disk in &spec.disks {
            if let Err(error) = provider.untrack(disk.disk) {
                tracing::warn!(path = %disk.path, %error, "the kernel goes on watching a disk");
            }
        }
        if let Err(error) = provider.fence(machine, &spec.disks, false) {
            tracing::warn!(machine = %spec.name, %error, "the disks of a machine are kept from everybody still");
        }
        if let Err(error) = provider.forget(machine) {
            tracing::warn!(machine = %spec.name, %error, "certificates of a machine could not be removed");
        }
        spec.disks.iter().for_each(|disk| self.shared.remove_state(spec.via, disk));
        self.shared.tell(&spec, Severity::Information, EventKind::MachineUnprotected, "is not protected any more", "");
        Ok(())
    }

    pub fn pause(&self, machine: MachineId) -> Result<(), HostError> {
        self.set_paused(machine, true)
    }

    pub fn resume(&self, machine: MachineId) -> Result<(), HostError> {
        self.set_paused(machine, false)
    }

    fn set_paused(&self, id: MachineId, is_paused: bool) -> Result<(), HostError> {
        let mut machines = self.shared.machines();
        let entry = machines.get_mut(&id).ok_or(HostError::UnknownMachine { machine: id })?;
        let spec = MachineSpec { paused: is_paused, ..entry.spec() };
        self.shared.store(&spec)?;
        let was_paused = entry.spec().paused;
        match entry {
            Entry::Running(machine) => machine.set_paused(is_paused),
            Entry::Failed(failed) => failed.spec = spec.clone(),
        }
        match (was_paused, is_paused) {
            (false, true) => {
                self.shared.tell(&spec, Severity::Information, EventKind::MachinePaused, "sends nothing now", "")
            }
            (true, false) => {
                self.shared.tell(&spec, Severity::Information, EventKind::MachineResumed, "sends again", "")
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads every block again and sends it.
    pub fn resync(&self, machine: MachineId) -> Result<(), HostError> {
        let machine = self.machine(machine)?;
        machine.resync().map_err(|source| HostError::Io { what: "mark blocks", source })?;
        let message = "is compared with its replica, because somebody asked for it";
        self.shared.tell(&machine.spec(), Severity::Information, EventKind::ResyncRequested, message, "");
        Ok(())
    }

    /// Takes a resync back: what only it asked for is not read. Where none runs, nothing changes.
    pub fn cancel_resync(&self, machine: MachineId) -> Result<(), HostError> {
        let machine = self.machine(machine)?;
        if machine.cancel_resync().map_err(|source| HostError::Io { what: "take marks of blocks back", source })? {
            let message = "is no longer compared with its replica, because somebody cancelled that";
            self.shared.tell(&machine.spec(), Severity::Information, EventKind::ResyncCancelled, message, "");
        }
        Ok(())
    }

    /// Makes a mark on all disks of a machine. It becomes a recovery point once the process server holds it on each. One
    /// that is to be kept waits for scans to end, for a while: inside a scan there are no points.
    pub fn mark(&self, request: &MarkRequest) -> Result<MarkOutcome, HostError> {
        let consistency = match request.consistency {
            Requested::Crash => Consistency::Crash,
            Requested::App => Consistency::Application,
        };
        let machine = self.machine(request.machine)?;
        let deadline = Instant::now() + self.shared.config.limits.mark_scan_wait;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if request.keep
                && let Err((disk, done, total)) = machine.wait_scanned(left)
            {
                return Err(HostError::Scanning { disk, done, total });
            }
            match machine.marker().mark(consistency, &request.label, request.keep) {
                // A tracker saw so much that it is scanned first.
                Err(HostError::Scanning { .. }) if Instant::now() < deadline => {}
                Err(HostError::Replaying { .. }) if Instant::now() < deadline => drop(self.stop.wait_for(REPLAY_POLL)),
                outcome => return outcome,
            }
        }
    }

    /// The machine, for whoever needs more than this.
    pub fn machine(&self, id: MachineId) -> Result<Arc<Machine>, HostError> {
        match self.shared.machines().get(&id) {
            Some(Entry::Running(machine)) => Ok(machine.clone()),
            _ => Err(HostError::UnknownMachine { machine: id }),
        }
    }

    pub fn status(&self) -> Vec<MachineStatus> {
        let machines = self.shared.machines();
        machines
            .values()
            .map(|entry| {
                let spec = entry.spec();
                let disks = match entry {
                    Entry::Running(machine) => machine.status(),
                    Entry::Failed(failed) => {
                        spec.disks.iter().map(|disk| failed_disk(disk.disk, &failed.failure)).collect()
                    }
                };
                MachineStatus { machine: spec.machine, name: spec.name, paused: spec.paused, disks }
            })
            .collect()
    }

    /// The status as it goes to the control plane.
    pub fn report(&self) -> AgentReport {
        let disks = self.status().into_iter().flat_map(|machine| machine.disks).collect();
        AgentReport { time: self.shared.config.clock.wall_now(), disks }
    }

    /// Leaves every disk cleanly.
    pub fn stop(&self) {
        self.stop.stop();
        if let Some(retry) = self.retry.lock().expect("no panic while held").take() {
            let _ = retry.join();
        }
        for provider in self.shared.providers.writers() {
            if let Err(error) = provider.stop() {
                tracing::warn!(%error, "exports are still in use");
            }
        }
        let machines = std::mem::take(&mut *self.shared.machines());
        for entry in machines.into_values() {
            if let Entry::Running(machine) = entry {
                machine.stop();
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(retry) = self.retry.lock().expect("no panic while held").take() {
            let _ = retry.join();
        }
    }
}

impl Shared {
    fn machines(&self) -> MutexGuard<'_, BTreeMap<MachineId, Entry>> {
        self.machines.lock().expect("no panic while held")
    }

    fn start(&self, spec: MachineSpec) -> Result<Arc<Machine>, HostError> {
        let provider = self.provider(spec.via).clone();
        Machine::start(spec, &self.config, provider, &|spec, server| self.sender(spec, server))
    }

    fn sender(&self, spec: &MachineSpec, server: &Endpoint) -> SenderConfig {
        SenderConfig {
            consumer: server.server,
            session: self.session,
            link: (self.config.link)(server),
            workers: self.workers.clone(),
            clock: self.config.clock.clone(),
            policy: send_policy(&spec.policy, self.config.clock.wall_now(), None),
            limits: self.config.limits.send,
            moved: spec.moved,
        }
    }

    fn provider(&self, via: Via) -> &Arc<dyn CaptureProvider> {
        self.providers.of(via)
    }

    /// Feeds whoever else is named now, changes the disks, and stores what is wanted. Whoever is not named any more is fed still.
    fn change(&self, machine: &Machine, before: &MachineSpec, spec: &mut MachineSpec) -> Result<(), HostError> {
        let added = machine.add_servers(spec, &|spec, server| self.sender(spec, server));
        added.map_err(|source| HostError::Io { what: "feed another process server", source })?;
        self.change_disks(machine, before, spec)?;
        spec.listen = self.provider(spec.via).listen(spec.machine, spec.listen)?;
        self.store(spec)
    }

    /// Adds, leaves and attaches anew whatever differs from what is attached; the other disks go on.
    ///
    /// 1. stored: the disks of before, without those that go, and at the generations that are wanted
    /// 2. disks that go are left, and their state is removed
    /// 3. disks that grew are left and attached anew
    /// 4. disks that come are attached
    /// 5. (by the caller) stored: what is wanted
    ///
    /// Crash before 1: nothing happened. Before 5: a start finds the disks of 1, attaches those that grew as grown, and is told
    /// again what is wanted; a state that 2 left is cleared when its disk is attached under another id, and one that 4 began is
    /// taken over by the same disk. A disk that cannot be attached in 4 is refused and the others are as in 1; one in 3 shows as
    /// failed, and is tried again.
    fn change_disks(&self, machine: &Machine, before: &MachineSpec, spec: &MachineSpec) -> Result<(), HostError> {
        let attached = machine.attached();
        let is_attached = |disk: &DiskSpec| attached.contains(&(disk.disk, disk.generation));
        if spec.disks.iter().all(is_attached) && attached.len() == spec.disks.len() {
            return Ok(());
        }
        let stays = |disk: &DiskSpec| spec.disks.iter().find(|wanted| wanted.disk == disk.disk).cloned();
        let remaining = MachineSpec { disks: before.disks.iter().filter_map(stays).collect(), ..before.clone() };
        self.store(&remaining)?;
        machine.set_spec(remaining.clone());
        for disk in gone(before, spec) {
            machine.remove_disk(disk.disk);
            if let Err(error) = self.provider(spec.via).untrack(disk.disk) {
                tracing::warn!(path = %disk.path, %error, "the kernel goes on watching a disk");
            }
            self.remove_state(spec.via, disk);
            let message = format!("is without disk {} from now on", disk.path);
            self.tell(spec, Severity::Information, EventKind::MachineProtected, &message, "");
        }
        for disk in remaining.disks.iter().filter(|disk| !is_attached(disk)) {
            machine.remove_disk(disk.disk);
            machine.add_disk(disk, spec, &self.config, &|spec, server| self.sender(spec, server))?;
        }
        let mut added: Vec<&DiskSpec> = Vec::new();
        for disk in spec.disks.iter().filter(|disk| before.disks.iter().all(|known| known.disk != disk.disk)) {
            let sender = |spec: &MachineSpec, server: &Endpoint| self.sender(spec, server);
            if let Err(error) = machine.add_disk(disk, spec, &self.config, &sender) {
                for disk in added {
                    machine.remove_disk(disk.disk);
                    self.remove_state(spec.via, disk);
                }
                self.remove_state(spec.via, disk);
                return Err(error);
            }
            let message = format!("has disk {} as well from now on", disk.path);
            self.tell(spec, Severity::Information, EventKind::MachineProtected, &message, "");
            added.push(disk);
        }
        Ok(())
    }

    fn remove_state(&self, via: Via, disk: &DiskSpec) {
        let path = self.provider(via).place(disk.path.as_ref(), disk.disk);
        let mut folders = vec![(self.config.state_folder.join(DEVICES_FOLDER), self.storage.clone())];
        if let Some(memory) = self.config.memory_folder.as_ref().filter(|memory| memory.exists()) {
            folders.push((memory.join(DEVICES_FOLDER), RealStorage::open_folder(memory) as _));
        }
        for (devices, elsewhere) in folders {
            if let Err(error) = crate::attach::remove_state(&path, &devices, &*elsewhere, disk.disk) {
                tracing::warn!(path = %disk.path, %error, "state of a disk could not be removed");
            }
        }
    }

    /// An event of a machine.
    fn tell(&self, spec: &MachineSpec, severity: Severity, kind: EventKind, message: &str, help: &str) {
        let message = format!("machine {} {message}", spec.name);
        let (machine, help) = (Some(spec.machine), help.to_owned());
        self.config.events.publish(News { severity, kind, machine, disk: None, message, help });
    }

    fn try_start(&self, spec: MachineSpec) -> Entry {
        match self.start(spec.clone()) {
            Ok(machine) => {
                machine.listen();
                Entry::Running(machine)
            }
            Err(error) => {
                tracing::warn!(machine = %spec.name, error = %error, help = error.help(), "machine cannot be attached");
                let message = format!("cannot be attached: {error}");
                self.tell(&spec, Severity::Critical, EventKind::AttachFailed, &message, &error.help());
                Entry::Failed(Box::new(FailedMachine { failure: Failure::from(&error), spec }))
            }
        }
    }

    fn retry_failed(&self) {
        let mut machines = self.machines();
        for entry in machines.values_mut() {
            match entry {
                Entry::Running(machine) => {
                    // A port that another program held at our start.
                    machine.listen();
                    for disk in machine.unattached() {
                        let spec = machine.spec();
                        let sender = |spec: &MachineSpec, server: &Endpoint| self.sender(spec, server);
                        if let Err(error) = machine.add_disk(&disk, &spec, &self.config, &sender) {
                            tracing::warn!(machine = %spec.name, path = %disk.path, %error, "disk cannot be attached");
                        }
                    }
                }
                Entry::Failed(failed) => match self.start(failed.spec.clone()) {
                    Ok(machine) => {
                        machine.listen();
                        *entry = Entry::Running(machine);
                    }
                    Err(error) => failed.failure = Failure::from(&error),
                },
            }
        }
    }

    /// What can be refused before a disk is touched.
    fn check(&self, machines: &BTreeMap<MachineId, Entry>, spec: &MachineSpec) -> Result<(), HostError> {
        if spec.via == Via::Hrl && spec.disks.len() > 1 {
            return Err(HostError::OneDisk { machine: spec.name.clone() });
        }
        let canonical = |path: &str| tidemark_base::storage::canonical(path.as_ref()).unwrap_or_else(|_| path.into());
        let mut paths = Vec::new();
        for disk in &spec.disks {
            let path = canonical(&disk.path);
            if paths.contains(&path) {
                return Err(HostError::DuplicateDisk { path });
            }
            paths.push(path);
        }
        for (machine, entry) in machines {
            let other = entry.spec();
            if *machine == spec.machine {
                if other.via != spec.via {
                    return Err(HostError::OtherWay { machine: spec.name.clone(), before: other.via.name() });
                }
                // The same disk stays at its place; what grew comes with a higher generation.
                let moved = other.disks.iter().any(|known| {
                    let wanted = spec.disks.iter().find(|wanted| wanted.disk == known.disk);
                    wanted.is_some_and(|wanted| {
                        canonical(&wanted.path) != canonical(&known.path)
                            || wanted.export != known.export
                            || wanted.generation < known.generation
                    })
                });
                let exports: std::collections::BTreeSet<_> = spec.disks.iter().map(|disk| &disk.export).collect();
                if moved || exports.len() != spec.disks.len() {
                    return Err(HostError::OtherDisks { machine: spec.name.clone() });
                }
                continue;
            }
            for disk in &other.disks {
                let path = canonical(&disk.path);
                if paths.contains(&path) {
                    return Err(HostError::AlreadyProtected { path, machine: other.name });
                }
            }
        }
        Ok(())
    }

    fn file(machine: MachineId) -> String {
        format!("machines/{machine}")
    }

    /// A BLAKE3 and the wire encoding, which grows fields and keeps old ones.
    fn store(&self, spec: &MachineSpec) -> Result<(), HostError> {
        let encoded = wire::MachineSpec::from(spec).encode_to_vec();
        let content = [blake3::hash(&encoded).as_bytes().as_slice(), &encoded].concat();
        replace_file(&*self.storage, &Self::file(spec.machine), &content)
            .map_err(|source| HostError::Io { what: "store what is protected", source })
    }

    fn forget(&self, machine: MachineId) -> Result<(), HostError> {
        let remove = || {
            remove_if_there(&*self.storage, &Self::file(machine))?;
            self.storage.sync_folder("machines")
        };
        remove().map_err(|source| HostError::Io { what: "store what is protected", source })
    }

    fn stored(&self) -> io::Result<Vec<MachineSpec>> {
        let mut specs = Vec::new();
        // Renames that a process before this one did not see the end of are durable before they are believed.
        self.storage.sync_folder("machines")?;
        for name in self.storage.list("machines")? {
            if name.ends_with(".new") {
                continue;
            }
            let content = read_file(&*self.storage, &format!("machines/{name}"), SPEC_BYTES_MAX)?;
            let spec = content
                .split_at_checked(32)
                .filter(|(hash, encoded)| *hash == blake3::hash(encoded).as_bytes().as_slice())
                .and_then(|(_, encoded)| wire::MachineSpec::decode(encoded).ok())
                .and_then(|spec| MachineSpec::try_from(spec).ok());
            match spec {
                Some(spec) => specs.push(spec),
                None => tracing::error!(
                    file = %self.storage.path(&format!("machines/{name}")).display(),
                    help = "protect the machine again",
                    "what is protected cannot be read"
                ),
            }
        }
        Ok(specs)
    }
}

/// Whether the disks that stay are at the generations of before, but for those that grew.
fn is_same_or_grown(before: &MachineSpec, wanted: &MachineSpec) -> bool {
    before.disks.iter().all(|known| {
        let stays = wanted.disks.iter().find(|disk| disk.disk == known.disk);
        stays.is_none_or(|disk| disk.generation == known.generation || disk.bytes > known.bytes)
    })
}

/// The disks that are not wanted any more.
fn gone<'a>(before: &'a MachineSpec, wanted: &'a MachineSpec) -> impl Iterator<Item = &'a DiskSpec> {
    before.disks.iter().filter(|known| wanted.disks.iter().all(|disk| disk.disk != known.disk))
}

pub(crate) fn failed_disk(disk: DiskId, failure: &Failure) -> SourceDisk {
    SourceDisk {
        disk,
        server: None,
        state: SourceState::Failed,
        mode: SourceMode::Compare,
        mode_reason: failure.message.clone(),
        logged: String::new(),
        sent: String::new(),
        durable: String::new(),
        pending_bytes: 0,
        written_bytes: 0,
        sent_bytes: 0,
        log_bytes: 0,
        rpo: Duration::ZERO,
        scan: None,
        compare: Default::default(),
        current_bytes: 0,
        problems: vec![Problem { critical: true, message: failure.message.clone(), help: failure.help.clone() }],
    }
}
