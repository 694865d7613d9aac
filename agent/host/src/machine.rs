//! A protected machine: its disks, their senders, and the threads that keep them.
//!
//! *Consistency.* Exports appear when every disk is attached, and go before any is detached. *Retries.* Marks that could not
//! be made are tried again a second later. *Cancellation.* [`Machine::stop`] ends exports, marks and senders, then leaves
//! each disk cleanly. *Crash.* Dropping a machine without stopping it is what a crash is: the next attach finds out.

mod feed;
mod fence;
mod status;
mod watch;

use std::net::IpAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::sync::Mutex;
use tidemark_base::thread::JoinHandle;
use tidemark_base::time::Instant;
use tidemark_base::{Clock, DiskId, Generation, Timestamp};
use tidemark_proto::control::{
    AttachedDisk, Compression, DiskSpec, Endpoint, Failure, MachineSpec, ReplicationPolicy, Via,
};
use tidemark_proto::replication::Consistency;

use crate::attach::{AttachRequest, attach};
use crate::capture::{Address, CaptureProvider, HomeDisk};
use crate::error::HostError;
use crate::host::DEVICES_FOLDER;
use crate::log::LogLimits;
use crate::mark::{Joining, Marker};
use crate::pack::CompressionPolicy;
use crate::protected::{Barrier, ProtectedDisk};
use crate::send::{SendPolicy, SenderConfig, ShipMode};
use crate::{HostConfig, HostLimits};
use feed::Feed;

/// Logs in memory: those of trackers are small, and what is more is marked in bitmaps.
const MEMORY_LOG_BYTES_MAX: u64 = 64 << 20;
const KEEPER_INTERVAL: Duration = Duration::from_secs(1);
/// The places of any-time recovery are so far apart in continuous mode.
const MARK_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether a scan ended.
const SCAN_POLL: Duration = Duration::from_millis(20);
/// Who had a disk open and ends lets go of it within this.
const KEEP_LIMIT: Duration = Duration::from_secs(3);

/// How a disk of a machine is sent to a process server.
pub(crate) type Senders<'a> = &'a dyn Fn(&MachineSpec, &Endpoint) -> SenderConfig;

pub struct Machine {
    spec: Mutex<MachineSpec>,
    /// In the order of the specification.
    disks: Mutex<Vec<Arc<MachineDisk>>>,
    marker: Arc<Marker>,
    provider: Arc<dyn CaptureProvider>,
    limits: HostLimits,
    clock: Arc<dyn Clock>,
    stop: Stop,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct MachineDisk {
    disk: Arc<ProtectedDisk>,
    export: String,
    address: Address,
    /// In the order of the specification. None once it is left.
    feeds: Mutex<Vec<Feed>>,
    stop: Stop,
    keeper: Mutex<Option<JoinHandle<()>>>,
    /// What changed before everybody was kept from it is told elsewhere.
    is_at_rest: AtomicBool,
}

impl Machine {
    /// Attaches every disk, then serves and sends them. What was attached is left again when one cannot be.
    pub(crate) fn start(
        spec: MachineSpec,
        config: &HostConfig,
        provider: Arc<dyn CaptureProvider>,
        sender: Senders<'_>,
    ) -> Result<Arc<Self>, HostError> {
        keep(&*provider, &spec)?;
        let mut attached: Vec<Arc<ProtectedDisk>> = Vec::new();
        for disk in &spec.disks {
            match attach_disk(&spec, disk, config, &*provider) {
                Ok(disk) => attached.push(disk),
                Err(error) => {
                    leave(&attached);
                    return Err(error);
                }
            }
        }
        let marker = Arc::new(Marker::new(
            spec.machine,
            spec.name.clone(),
            attached.clone(),
            config.freezer.clone(),
            config.limits.freeze_limit,
        ));
        marker.set_point_interval(spec.policy.point_interval);
        marker.set_added(spec.disks.iter().filter(|disk| disk.added).map(|disk| disk.disk).collect());
        let machine = Arc::new(Self {
            spec: Mutex::new(spec.clone()),
            disks: Mutex::default(),
            marker,
            provider,
            limits: config.limits.clone(),
            clock: config.clock.clone(),
            stop: Stop::new(),
            threads: Mutex::default(),
        });
        for (disk, named) in attached.iter().zip(&spec.disks) {
            match machine.open(disk, named, &spec, sender) {
                Ok(disk) => machine.disks.lock().expect("no panic while held").push(disk),
                Err(source) => {
                    spec.disks.iter().for_each(|named| drop(machine.provider.detach(&named.export)));
                    machine.opened().iter().for_each(|disk| disk.stop_keeper());
                    // With them their senders end.
                    machine.disks.lock().expect("no panic while held").clear();
                    leave(&attached);
                    return Err(HostError::Io { what: "serve the disk", source });
                }
            }
        }
        machine.watch_fence();
        machine.start_threads().map_err(|source| HostError::Io { what: "start a thread", source })?;
        Ok(machine)
    }

    /// Serves, sends and keeps a disk that is attached.
    fn open(
        &self,
        disk: &Arc<ProtectedDisk>,
        named: &DiskSpec,
        spec: &MachineSpec,
        sender: Senders<'_>,
    ) -> std::io::Result<Arc<MachineDisk>> {
        let barrier: Weak<dyn Barrier> = Arc::downgrade(&(self.marker.clone() as Arc<dyn Barrier>));
        let _ = disk.barrier.set(barrier);
        let address = self.provider.attach(&named.export, disk)?;
        let feeds = spec.servers().map(|server| Feed::start(disk, server, spec, sender)).collect::<Result<_, _>>()?;
        let opened = Arc::new(MachineDisk {
            disk: disk.clone(),
            export: named.export.clone(),
            address,
            feeds: Mutex::new(feeds),
            stop: Stop::new(),
            keeper: Mutex::default(),
            is_at_rest: AtomicBool::new(false),
        });
        let (disk, stop) = (disk.clone(), opened.stop.clone());
        let keeper = tidemark_base::thread::Builder::new().name("keeper".to_owned()).spawn(move || {
            disk.log.set_keeper(tidemark_base::thread::current());
            let mut next = Instant::now() + KEEPER_INTERVAL;
            while !stop.is_stopped() {
                tidemark_base::thread::park_timeout(next.saturating_duration_since(Instant::now()));
                if Instant::now() >= next {
                    next = Instant::now() + KEEPER_INTERVAL;
                    disk.tick();
                } else {
                    disk.make_room();
                }
            }
        })?;
        *opened.keeper.lock().expect("no panic while held") = Some(keeper);
        Ok(opened)
    }

    /// Attaches one disk more, of this specification, while the others go on. Marks cover it from the end of its first scan on:
    /// until then the machine has recovery points without it, instead of none.
    pub(crate) fn add_disk(
        &self,
        named: &DiskSpec,
        spec: &MachineSpec,
        config: &HostConfig,
        sender: Senders<'_>,
    ) -> Result<(), HostError> {
        keep(&*self.provider, spec)?;
        let disk = attach_disk(spec, named, config, &*self.provider)?;
        // Before anything is sent: the end of its scan is a mark of all disks.
        self.marker.add(disk.clone(), named.added);
        match self.open(&disk, named, spec, sender) {
            Ok(opened) => {
                self.disks.lock().expect("no panic while held").push(opened);
                Ok(())
            }
            Err(source) => {
                self.marker.remove(named.disk);
                drop(self.provider.detach(&named.export));
                leave(&[disk]);
                Err(HostError::Io { what: "serve the disk", source })
            }
        }
    }

    /// Leaves one disk cleanly, while the others go on. Marks from now on are without it.
    pub(crate) fn remove_disk(&self, id: DiskId) {
        self.marker.remove(id);
        let removed = {
            let mut disks = self.disks.lock().expect("no panic while held");
            let at = disks.iter().position(|disk| disk.disk.identity.disk == id);
            at.map(|at| disks.remove(at))
        };
        let Some(removed) = removed else { return };
        if let Err(error) = self.provider.detach(&removed.export) {
            tracing::warn!(export = %removed.export, %error, "export is still in use");
        }
        removed.stop_keeper();
        removed.stop_feeds();
        leave(std::slice::from_ref(&removed.disk));
    }

    fn opened(&self) -> Vec<Arc<MachineDisk>> {
        self.disks.lock().expect("no panic while held").clone()
    }

    fn start_threads(self: &Arc<Self>) -> std::io::Result<()> {
        let mut threads = self.threads.lock().expect("no panic while held");
        let (machine, stop) = (Arc::downgrade(self), self.stop.clone());
        threads.push(tidemark_base::thread::Builder::new().name("marks".to_owned()).spawn(move || {
            let mut marked = Instant::now();
            let mut app_tried = marked;
            while !stop.wait_for(MARK_INTERVAL) {
                let Some(machine) = machine.upgrade() else { break };
                machine.opened().iter().for_each(|disk| disk.watch_feeds());
                machine.watch_fence();
                machine.follow_throttle();
                machine.mark_by_policy(&mut marked);
                machine.mark_app_by_policy(&mut app_tried);
            }
        })?);
        Ok(())
    }

    /// A mark when it is time for one and something was written.
    fn mark_by_policy(&self, marked: &mut Instant) {
        let MachineSpec { policy, fenced, .. } = self.spec();
        // Nobody writes, but for a master target: what it writes is a mix until it is done, and no point.
        if fenced {
            return;
        }
        let is_cycle_over =
            policy.cycle.is_none_or(|cycle| marked.elapsed() >= cycle) && marked.elapsed() >= self.marker.rest();
        // A scan ends with a mark of its own; until then there are no points, and what changes meanwhile waits in the tracker.
        let covered = self.marker.covered();
        let is_scanning = |disk: &ProtectedDisk| covered.contains(&disk.identity.disk) && !disk.is_scanned();
        if !is_cycle_over || self.marker.is_tracked() && self.disks().any(|disk| is_scanning(&disk)) {
            return;
        }
        if !self.marker.is_logging() {
            self.marker.drain();
            return;
        }
        let is_kept = policy.point_interval.is_some_and(|interval| self.marker.is_kept_due(interval))
            && self.marker.is_written_since(true);
        if is_kept || self.marker.is_written_since(false) {
            match self.marker.mark(Consistency::Crash, "", is_kept) {
                Ok(_) => self.opened().iter().for_each(|disk| drop(disk.disk.alarms().remove("marks"))),
                // So much changed that it is scanned: the mark follows.
                Err(HostError::Scanning { .. } | HostError::Replaying { .. }) => return,
                Err(error) => {
                    for disk in &self.opened() {
                        disk.disk.alarm("marks", false, error.to_string(), &error.help());
                    }
                    return;
                }
            }
            if policy.cycle.is_some() {
                self.marker.rotate();
            }
        }
        *marked = Instant::now();
    }

    /// An app-consistent point when it is time for one and something was written since the last. One that could not be made
    /// is tried again after another interval: its scripts hold the application.
    fn mark_app_by_policy(&self, tried: &mut Instant) {
        let MachineSpec { policy, fenced, .. } = self.spec();
        let Some(interval) = policy.app_point_interval.filter(|_| !fenced) else {
            self.opened().iter().for_each(|disk| drop(disk.disk.alarms().remove("app-points")));
            return;
        };
        if tried.elapsed() < interval || !self.marker.is_logging() || !self.marker.is_written_since_app() {
            return;
        }
        *tried = Instant::now();
        match self.marker.mark_app_unasked() {
            Ok(_) => self.opened().iter().for_each(|disk| drop(disk.disk.alarms().remove("app-points"))),
            Err(error) => {
                let message = format!("no app-consistent point was made: {error}");
                self.opened()
                    .iter()
                    .for_each(|disk| disk.disk.alarm("app-points", false, message.clone(), &error.help()));
            }
        }
    }

    /// The limits of a schedule begin and end, and an address is known once the stream is there.
    pub(crate) fn follow_throttle(&self) {
        let policy = self.spec().policy;
        if policy.throttle.rules.is_empty() {
            return;
        }
        let now = self.clock.wall_now();
        for disk in &self.opened() {
            for Feed { sender, .. } in &*disk.feeds() {
                sender.set_policy(send_policy(&policy, now, sender.remote()));
            }
        }
    }

    /// The limit of each disk's first sender.
    #[cfg(all(test, unix))]
    pub(crate) fn throttled_to(&self) -> Vec<Option<u64>> {
        let limit =
            |disk: &Arc<MachineDisk>| disk.feeds().first().and_then(|feed| feed.sender.policy().bytes_per_second_max);
        self.opened().iter().map(limit).collect()
    }

    pub fn spec(&self) -> MachineSpec {
        self.spec.lock().expect("no panic while held").clone()
    }

    pub fn marker(&self) -> &Marker {
        &self.marker
    }

    pub fn attachments(&self) -> Vec<AttachedDisk> {
        self.opened()
            .iter()
            .map(|disk| {
                let Address { nbd, file } = disk.address.clone();
                let nbds = self.provider.remote(&disk.export);
                let identity = &disk.disk.identity;
                AttachedDisk { id: identity.disk, nbd, nbds, file, bytes: identity.disk_bytes }
            })
            .collect()
    }

    /// Serves remote clients where the specification says so, unless that is done already. A failure shows in the status and
    /// is tried again: the workload that is here has its disks all the same.
    pub(crate) fn listen(&self) {
        let spec = self.spec();
        let is_served = |disk: &Arc<MachineDisk>| self.provider.remote(&disk.export).is_some();
        if spec.listen.is_none() || self.opened().iter().all(is_served) {
            return;
        }
        match self.provider.listen(spec.machine, spec.listen) {
            Ok(_) => self.opened().iter().for_each(|disk| drop(disk.disk.alarms().remove("listen"))),
            Err(error) => {
                let message = Failure::from(&error).message;
                self.opened().iter().for_each(|disk| disk.disk.alarm("listen", false, message.clone(), &error.help()));
            }
        }
    }

    /// Changes what can be changed while the machine stays attached: its policy, and whether it sends.
    pub(crate) fn adjust(&self, spec: MachineSpec) {
        self.marker.set_point_interval(spec.policy.point_interval);
        for disk in &self.opened() {
            disk.disk.set_log_limits(log_limits(&self.limits, &spec.policy, disk.disk.identity.disk_bytes));
            for Feed { sender, .. } in &*disk.feeds() {
                sender.set_policy(send_policy(&spec.policy, self.clock.wall_now(), sender.remote()));
            }
        }
        // As they are named.
        let place = |disk: &Arc<MachineDisk>| spec.disks.iter().position(|named| named.disk == disk.disk.identity.disk);
        self.disks.lock().expect("no panic while held").sort_by_key(place);
        let is_paused = spec.paused;
        *self.spec.lock().expect("no panic while held") = spec;
        self.set_paused(is_paused);
    }

    pub(crate) fn set_paused(&self, is_paused: bool) {
        let mut spec = self.spec.lock().expect("no panic while held");
        if spec.paused == is_paused && is_paused {
            return;
        }
        spec.paused = is_paused;
        for disk in &self.opened() {
            disk.disk.consumers().iter().for_each(|consumer| consumer.set_paused(is_paused));
            for Feed { sender, .. } in &*disk.feeds() {
                if is_paused { sender.pause() } else { sender.resume() }
            }
        }
    }

    /// Keeps everybody from its disks, or lets them back, as its specification says. After this nothing more is written. What ends just now
    /// is waited for.
    pub(crate) fn follow_fence(&self) -> Result<(), HostError> {
        let (spec, deadline) = (self.spec(), Instant::now() + KEEP_LIMIT);
        loop {
            match keep(&*self.provider, &spec) {
                Err(_) if Instant::now() < deadline && !self.stop.wait_for(SCAN_POLL) => {}
                outcome => {
                    if !spec.fenced {
                        self.end_fence();
                    }
                    return outcome;
                }
            }
        }
    }

    /// Writes to one of its disks, on the machine's way home.
    pub(crate) fn home(&self, disk: &Arc<ProtectedDisk>) -> std::io::Result<Box<dyn HomeDisk>> {
        self.provider.home(disk)
    }

    pub fn resync(&self) -> std::io::Result<()> {
        self.opened().iter().try_for_each(|disk| disk.disk.resync())
    }

    /// Takes a resync back; whether one ran. Senders begin again, with what is pending now: the scan that they began ends at
    /// once when that is nothing.
    pub fn cancel_resync(&self) -> std::io::Result<bool> {
        let mut ran = false;
        for disk in &self.opened() {
            if disk.disk.cancel_resync()? {
                ran = true;
                disk.feeds().iter().for_each(|feed| feed.sender.restart_stream());
            }
        }
        Ok(ran)
    }

    /// Waits until no disk that marks cover is being scanned, for one process server at least: a mark inside a scan never becomes
    /// a recovery point there. When `limit` passed first, says of which disk how much is done.
    pub fn wait_scanned(&self, limit: Duration) -> Result<(), (DiskId, u64, u64)> {
        let deadline = Instant::now() + limit;
        loop {
            match self.scanned() {
                None => return Ok(()),
                Some(scanned) if Instant::now() >= deadline || self.stop.wait_for(SCAN_POLL) => return Err(scanned),
                Some(_) => {}
            }
        }
    }

    /// For a barrier with other machines.
    pub(crate) fn joining(self: &Arc<Self>) -> Joining {
        let machine = self.clone();
        let refuse = move || {
            let spec = machine.spec();
            // Only those whose writes pass through here can be held at an instant.
            if !matches!(spec.via, Via::Nbd | Via::Fuse) {
                return Err(HostError::NotHeld { machine: spec.name });
            }
            let scanned = machine.wait_scanned(Duration::ZERO);
            scanned.map_err(|(disk, done, total)| HostError::Scanning { disk, done, total })
        };
        Joining { marker: self.marker.clone(), refuse: Box::new(refuse) }
    }

    pub fn disks(&self) -> impl Iterator<Item = Arc<ProtectedDisk>> {
        self.opened().into_iter().map(|disk| disk.disk.clone())
    }

    /// The disks that are attached, and at which generation.
    pub(crate) fn attached(&self) -> Vec<(DiskId, Generation)> {
        let disks = self.opened();
        disks.iter().map(|disk| (disk.disk.identity.disk, disk.disk.identity.generation)).collect()
    }

    /// Disks of the machine that could not be attached when they grew.
    pub(crate) fn unattached(&self) -> Vec<DiskSpec> {
        let attached = self.attached();
        self.spec().disks.into_iter().filter(|disk| !attached.iter().any(|(id, _)| *id == disk.disk)).collect()
    }

    pub(crate) fn set_spec(&self, spec: MachineSpec) {
        *self.spec.lock().expect("no panic while held") = spec;
    }

    /// Ends exports, marks and senders, then leaves each disk cleanly.
    pub fn stop(&self) {
        for disk in &self.opened() {
            if let Err(error) = self.provider.detach(&disk.export) {
                tracing::warn!(export = %disk.export, %error, "export is still in use");
            }
        }
        self.stop_threads();
        self.opened().iter().for_each(|disk| disk.stop_feeds());
        let disks: Vec<Arc<ProtectedDisk>> = self.disks().collect();
        leave(&disks);
    }

    fn stop_threads(&self) {
        self.stop.stop();
        let this = tidemark_base::thread::current().id();
        for thread in std::mem::take(&mut *self.threads.lock().expect("no panic while held")) {
            thread.thread().unpark();
            // The thread of marks may be the last to let go of the machine.
            if thread.thread().id() != this && thread.join().is_err() {
                tracing::error!("a thread of a machine panicked");
            }
        }
        self.opened().iter().for_each(|disk| disk.stop_keeper());
    }
}

impl MachineDisk {
    fn stop_keeper(&self) {
        self.stop.stop();
        if let Some(keeper) = self.keeper.lock().expect("no panic while held").take() {
            keeper.thread().unpark();
            if keeper.join().is_err() {
                tracing::error!("the keeper of a disk panicked");
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for disk in &self.opened() {
            let _ = self.provider.detach(&disk.export);
        }
        self.stop_threads();
    }
}

/// As the specification says.
fn keep(provider: &dyn CaptureProvider, spec: &MachineSpec) -> Result<(), HostError> {
    let kept = provider.fence(spec.machine, &spec.disks, spec.fenced);
    kept.map_err(|source| HostError::NotKept { machine: spec.name.clone(), source })
}

fn attach_disk(
    spec: &MachineSpec,
    disk: &DiskSpec,
    config: &HostConfig,
    provider: &dyn CaptureProvider,
) -> Result<Arc<ProtectedDisk>, HostError> {
    provider.prepare(disk.path.as_ref(), disk.disk)?;
    let state = config.state_of(provider, spec.disks.iter().chain([disk]).map(|disk| &*disk.path));
    let in_memory = state != config.state_folder;
    let elsewhere = if in_memory { HostConfig::storage_in(state)? } else { config.storage()? };
    let request = AttachRequest {
        disk: disk.disk,
        machine: spec.machine,
        generation: disk.generation,
        path: provider.place(disk.path.as_ref(), disk.disk),
        tracker: provider.track(disk.path.as_ref(), disk.disk, state)?,
        device_folder: state.join(DEVICES_FOLDER),
        elsewhere,
        consumers: spec.servers().map(|endpoint| endpoint.server).collect(),
        // The disk's size is not known yet; the limits follow below.
        limits: log_limits(&config.limits, &spec.policy, u64::MAX),
        log_bytes_max: if in_memory { MEMORY_LOG_BYTES_MAX } else { u64::MAX },
        boot: config.boot.clone(),
        clock: config.clock.clone(),
        events: config.events.clone(),
    };
    let found = attach(request)?;
    found.disk.set_log_limits(log_limits(&config.limits, &spec.policy, found.disk.disk.bytes()));
    if in_memory {
        tracing::info!(
            disk = %disk.disk,
            folder = %state.display(),
            "the agent's state lies on this disk itself: what tells of its changes is kept in memory, and after a reboot the whole disk is compared"
        );
    }
    report(&found.disk, found.lost_marks);
    Ok(found.disk)
}

fn leave(disks: &[Arc<ProtectedDisk>]) {
    for disk in disks {
        if let Err(error) = disk.detach() {
            tracing::warn!(disk = %disk.identity.disk, %error, "disk was not left cleanly");
        }
    }
}

/// Says what an attach found, where people look for it.
fn report(disk: &ProtectedDisk, lost_marks: usize) {
    if lost_marks > 0 {
        disk.alarm(
            "lost",
            false,
            format!("{lost_marks} marks that were made shortly before the machine went down are lost"),
            "recovery points of that time may be missing; later ones are not affected",
        );
    }
}

fn log_limits(limits: &HostLimits, policy: &ReplicationPolicy, disk_bytes: u64) -> LogLimits {
    // As Hyper-V: half of the disk.
    let limit_bytes = policy.log_limit_bytes.unwrap_or((disk_bytes / 2).max(limits.log_bytes_min));
    LogLimits {
        // A log goes as a whole: several must fit under the limit for acknowledged ones to make room in time.
        rotate_bytes: limits.log_rotate_bytes.min(limit_bytes / 8),
        limit_bytes,
        reserve_bytes: limits.log_reserve_bytes,
    }
}

/// What holds now for a process server at that address.
pub(crate) fn send_policy(policy: &ReplicationPolicy, now: Timestamp, to: Option<IpAddr>) -> SendPolicy {
    SendPolicy {
        mode: if policy.cycle.is_some() { ShipMode::Interval } else { ShipMode::Continuous },
        compression: match policy.compression {
            Compression::Off => CompressionPolicy::Off,
            Compression::Auto => CompressionPolicy::Auto,
            Compression::Level(level) => CompressionPolicy::Level(level),
        },
        bytes_per_second_max: policy.throttle.limit(now, to),
    }
}
