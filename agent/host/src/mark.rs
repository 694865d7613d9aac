//! Marks: one instant over all disks of a machine at which no write was in flight.
//!
//! *Consistency.* While the disks are held nothing is admitted and nothing acknowledged; once nothing is in flight, each disk
//! equals its log's prefix, and the mark is appended to each with one id and one time. So every write that was
//! acknowledged before the mark is in it, and none that was admitted after. *Retries.* Writes that stay in flight for
//! more than [`HOLD_LIMIT`] are let go on, and the hold is tried again, [`HOLD_ATTEMPTS`] times. *Cancellation.* Dropping a
//! hold lets everybody go on. *Crash.* A mark that is not in the log of every disk never becomes a point: it names them all.

mod group;
mod instant;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::seam::{Event, observe};
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{DiskId, MachineId, MarkId, Position, Timestamp};
use tidemark_proto::replication::{Consistency, Mark};

use crate::capture::in_flight::Hold;
use crate::error::HostError;
use crate::freeze::{FreezeError, Freezer};
use crate::log::Unlogged;
use crate::protected::tracked::{FROZEN_BYTES_MAX, Gathered, LOGGED_BYTES_MAX};
use crate::protected::{Barrier, HOLD_ATTEMPTS, HOLD_LIMIT, ProtectedDisk, pause};
use crate::source::SourceError;

pub use group::{Barriers, GroupOutcome, Joining};

/// The longest that an application is kept frozen, its own scripts not counted.
pub const FROZEN_MAX: Duration = Duration::from_secs(10);

/// How long an instant without writes is waited for while writers go on.
const SETTLE_LIMIT: Duration = Duration::from_millis(250);
/// After so many passes that each found more than can be logged, writers are made to keep still.
const PASSES_MAX: u32 = 4;
/// How long file systems are frozen at most, and how often for a mark that nobody asked for.
const FREEZE_LIMIT: Duration = Duration::from_secs(4);
const FREEZE_INTERVAL: Duration = Duration::from_secs(15);
/// Of ends of scans, where the policy keeps no points by itself.
const KEPT_INTERVAL: Duration = Duration::from_secs(300);

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MarkOutcome {
    pub id: MarkId,
    pub time: Timestamp,
    pub consistency: Consistency,
    pub positions: Vec<(DiskId, Position)>,
}

/// A mark that somebody wants.
struct Asked<'a> {
    consistency: Consistency,
    label: &'a str,
    keep: bool,
    /// Called while all disks are held, with the mark in their logs.
    held: &'a mut dyn FnMut(&MarkOutcome),
}

/// Fails once the writers do not keep still any more.
type Quiet<'a> = &'a dyn Fn() -> Result<(), HostError>;

/// Makes the marks of one machine.
pub struct Marker {
    machine: MachineId,
    name: String,
    members: Mutex<Members>,
    freezer: Option<Arc<dyn Freezer>>,
    freeze_limit: Duration,
    /// One mark at a time; where each disk stood at the last one.
    last: Mutex<Last>,
    /// Of tracked disks.
    settling: Mutex<Settling>,
    point_interval: Mutex<Option<Duration>>,
}

/// How hard it was to find an instant without writes.
#[derive(Default)]
struct Settling {
    /// Passes over what changed that ended with more than can be logged.
    passes: u32,
    frozen_at: Option<Instant>,
}

struct Members {
    /// In the order of their ids: holds are taken in it.
    disks: Vec<Arc<ProtectedDisk>>,
    /// Came to a machine that was protected already. Until the first scan of one ended marks are without it.
    added: BTreeSet<DiskId>,
}

#[derive(Default)]
struct Last {
    positions: BTreeMap<DiskId, Position>,
    kept: BTreeMap<DiskId, Position>,
    kept_at: Option<Instant>,
    app: BTreeMap<DiskId, Position>,
}

impl Last {
    fn note(&mut self, outcome: &MarkOutcome, keep: bool) {
        for (disk, position) in &outcome.positions {
            self.positions.insert(*disk, *position);
            if keep {
                self.kept.insert(*disk, *position);
            }
            if outcome.consistency == Consistency::Application {
                self.app.insert(*disk, *position);
            }
        }
        if keep {
            self.kept_at = Some(Instant::now());
        }
    }
}

impl Marker {
    pub fn new(
        machine: MachineId,
        name: String,
        mut disks: Vec<Arc<ProtectedDisk>>,
        freezer: Option<Arc<dyn Freezer>>,
        freeze_limit: Duration,
    ) -> Self {
        disks.sort_by_key(|disk| disk.identity.disk);
        let members = Mutex::new(Members { disks, added: BTreeSet::new() });
        let (settling, point_interval) = (Mutex::default(), Mutex::default());
        Self { machine, name, members, freezer, freeze_limit, last: Mutex::default(), settling, point_interval }
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().expect("no panic while held")
    }

    fn all(&self) -> Vec<Arc<ProtectedDisk>> {
        self.members().disks.clone()
    }

    /// Those that a mark covers: all but added ones whose first scan goes on. A machine of which all disks are scanned for the
    /// first time has no marks that could become points, so none is left out then.
    fn ready(&self) -> Vec<Arc<ProtectedDisk>> {
        let members = self.members();
        let joins = |disk: &ProtectedDisk| members.added.contains(&disk.identity.disk) && disk.is_first_scanned();
        let ready: Vec<_> = members.disks.iter().filter(|disk| !joins(disk)).cloned().collect();
        if ready.is_empty() { members.disks.clone() } else { ready }
    }

    /// The disks that a mark made now would cover.
    pub fn covered(&self) -> Vec<DiskId> {
        self.ready().iter().map(|disk| disk.identity.disk).collect()
    }

    pub(crate) fn set_added(&self, added: BTreeSet<DiskId>) {
        self.members().added = added;
    }

    /// Waits for a mark that is being made.
    pub(crate) fn add(&self, disk: Arc<ProtectedDisk>, added: bool) {
        let _one = self.last();
        let mut members = self.members();
        if added {
            members.added.insert(disk.identity.disk);
        }
        members.disks.push(disk);
        members.disks.sort_by_key(|disk| disk.identity.disk);
    }

    /// Waits for a mark that is being made; later ones are without the disk.
    pub(crate) fn remove(&self, disk: DiskId) {
        let mut last = self.last();
        let mut members = self.members();
        members.disks.retain(|member| member.identity.disk != disk);
        members.added.remove(&disk);
        last.positions.remove(&disk);
        last.kept.remove(&disk);
        last.app.remove(&disk);
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().expect("no panic while held")
    }

    /// Whether anything was logged since the last mark (or the last kept one).
    pub fn is_written_since(&self, kept: bool) -> bool {
        let last = self.last();
        let positions = if kept { &last.kept } else { &last.positions };
        self.ready().iter().any(|disk| {
            let logged = disk.log.published().logged;
            let is_logged =
                positions.get(&disk.identity.disk).map_or(logged.sequence.0 > 0, |position| *position != logged);
            is_logged || disk.is_dirty()
        })
    }

    /// Whether anything was logged since the last app-consistent mark.
    pub fn is_written_since_app(&self) -> bool {
        let last = self.last();
        self.ready().iter().any(|disk| {
            let logged = disk.log.published().logged;
            let is_logged =
                last.app.get(&disk.identity.disk).map_or(logged.sequence.0 > 0, |position| *position != logged);
            is_logged || disk.is_dirty()
        })
    }

    pub fn is_kept_due(&self, interval: Duration) -> bool {
        self.last().kept_at.is_none_or(|at| at.elapsed() >= interval)
    }

    /// Makes a mark. An app-consistent one runs the machine's freeze scripts around it.
    pub fn mark(&self, consistency: Consistency, label: &str, keep: bool) -> Result<MarkOutcome, HostError> {
        self.mark_observed(consistency, label, keep, &mut |_| {})
    }

    /// The same; `held` is called while all disks are held, with the mark in their logs.
    pub fn mark_observed(
        &self,
        consistency: Consistency,
        label: &str,
        keep: bool,
        held: &mut dyn FnMut(&MarkOutcome),
    ) -> Result<MarkOutcome, HostError> {
        self.mark_of(&Self::ready, Asked { consistency, label, keep, held })
    }

    /// By a policy: nobody vouches for applications that nothing makes quiet.
    pub fn mark_app_unasked(&self) -> Result<MarkOutcome, HostError> {
        let is_made_quiet = self.all().iter().any(|disk| self.is_made_quiet(disk));
        if is_made_quiet || self.freezer.as_ref().is_some_and(|freezer| freezer.is_set_up(&self.name)) {
            return self.mark(Consistency::Application, "", true);
        }
        Err(self.not_quiet(FreezeError::NotConfigured { machine: self.name.clone() }))
    }

    fn not_quiet(&self, source: FreezeError) -> HostError {
        HostError::Freeze { machine: self.name.clone(), source }
    }

    /// Its hypervisor does it, with the instant.
    fn is_made_quiet(&self, disk: &ProtectedDisk) -> bool {
        let instants = disk.tracker().and_then(|tracker| tracker.instants());
        instants.is_some_and(|instants| self.is_made_quiet_by(&*instants))
    }

    fn mark_of(
        &self,
        which: &dyn Fn(&Self) -> Vec<Arc<ProtectedDisk>>,
        mut asked: Asked<'_>,
    ) -> Result<MarkOutcome, HostError> {
        let mut last = self.last();
        let disks = which(self);
        let frozen = match asked.consistency {
            Consistency::Crash => None,
            Consistency::Application if disks.iter().any(|disk| self.is_made_quiet(disk)) => None,
            Consistency::Application => {
                let not_configured = || FreezeError::NotConfigured { machine: self.name.clone() };
                let freezer = self.freezer.as_ref().ok_or_else(|| self.not_quiet(not_configured()))?;
                Some(freezer.freeze(&self.name, self.freeze_limit).map_err(|error| self.not_quiet(error))?)
            }
        };
        let quiet = || match &frozen {
            Some(frozen) if !frozen.is_quiet() => {
                Err(self.not_quiet(FreezeError::Outlasted { path: self.name.clone().into() }))
            }
            _ => Ok(()),
        };
        let result = self.mark_by(&disks, Instant::now() + FROZEN_MAX, &mut asked, &quiet);
        if let Some(frozen) = frozen {
            // The mark was made while everything was quiet; that thawing failed is another matter, and worse.
            if let Err(error) = frozen.thaw() {
                tracing::error!(machine = %self.name, error = %error, help = error.help(), "thawing failed");
                for disk in &disks {
                    disk.alarm("thaw", true, format!("{}: {error}", self.name), error.help());
                }
            }
        }
        let outcome = result?;
        last.note(&outcome, asked.keep);
        drop(last);
        disks.iter().for_each(|disk| disk.watchers.changed());
        Ok(outcome)
    }

    fn mark_by(
        &self,
        disks: &[Arc<ProtectedDisk>],
        deadline: Instant,
        asked: &mut Asked<'_>,
        quiet: Quiet<'_>,
    ) -> Result<MarkOutcome, HostError> {
        if let Some(instants) = disks.iter().find_map(|disk| disk.tracker()?.instants()) {
            return self.mark_instant(disks, &*instants, asked, quiet);
        }
        if disks.iter().any(|disk| disk.tracker().is_some()) {
            return self.mark_settled(disks, deadline, asked, quiet);
        }
        let mut busy = disks.first().map(|disk| disk.identity.disk).unwrap_or_else(DiskId::random);
        for attempt in 0..HOLD_ATTEMPTS {
            match hold_all(disks) {
                Ok(holds) => return self.append_held(disks, holds, asked, quiet),
                Err(disk) => busy = disk,
            }
            if Instant::now() >= deadline {
                break;
            }
            pause(attempt);
        }
        Err(HostError::Busy { disk: busy })
    }

    pub fn is_tracked(&self) -> bool {
        self.all().iter().any(|disk| disk.tracker().is_some())
    }

    /// How often a point is kept: the ends of the scans that a tracked machine has all day keep no more.
    pub fn set_point_interval(&self, interval: Option<Duration>) {
        *self.point_interval.lock().expect("no panic while held") = interval;
    }

    /// Takes what trackers saw, without a mark.
    pub fn drain(&self) {
        let _one = self.settling.lock().expect("no panic while held");
        for disk in &self.all() {
            if let Err(error) = disk.gather(LOGGED_BYTES_MAX) {
                tracing::debug!(disk = %disk.identity.disk, %error, "what changed stays claimed");
            }
        }
    }

    /// A mark of disks that others write to: at an instant at which everything that changed was read and nothing is in flight.
    /// Passes that find ever less come to such an instant by themselves; where they do not, the file systems on the
    /// disks are frozen, for a moment and not often.
    fn mark_settled(
        &self,
        disks: &[Arc<ProtectedDisk>],
        deadline: Instant,
        asked: &mut Asked<'_>,
        quiet: Quiet<'_>,
    ) -> Result<MarkOutcome, HostError> {
        let mut settling = self.settling.lock().expect("no panic while held");
        let mut busy = HostError::Unsettled { disk: disks[0].identity.disk, frozen: false };
        if settling.passes < PASSES_MAX {
            match settle(disks, deadline.min(Instant::now() + SETTLE_LIMIT), LOGGED_BYTES_MAX) {
                Ok(holds) => {
                    let outcome = self.append_held(disks, holds, asked, quiet)?;
                    settling.passes = 0;
                    return Ok(outcome);
                }
                Err(error @ HostError::Scanning { .. }) => {
                    settling.passes += 1;
                    return Err(error);
                }
                Err(error @ HostError::Unsettled { .. }) => busy = error,
                Err(error) => return Err(error),
            }
        }
        if !asked.keep && settling.frozen_at.is_some_and(|at| at.elapsed() < FREEZE_INTERVAL) {
            return Err(busy);
        }
        settling.frozen_at = Some(Instant::now());
        let mut frozen = Vec::new();
        for tracker in disks.iter().filter_map(|disk| disk.tracker()) {
            frozen.extend(tracker.freeze(FREEZE_LIMIT).map_err(|error| self.not_quiet(error))?);
        }
        if frozen.is_empty() {
            settling.passes = 0;
            return Err(busy);
        }
        let settled = settle(disks, Instant::now() + FREEZE_LIMIT / 2, FROZEN_BYTES_MAX)
            .and_then(|holds| self.append_held(disks, holds, asked, quiet));
        for frozen in frozen {
            if let Err(error) = frozen.thaw() {
                tracing::error!(machine = %self.name, error = %error, help = error.help(), "thawing failed");
                disks.iter().for_each(|disk| disk.alarm("thaw", true, format!("{}: {error}", self.name), error.help()));
            }
        }
        settling.passes = 0;
        settled.map_err(|error| match error {
            HostError::Unsettled { disk, .. } => HostError::Unsettled { disk, frozen: true },
            error => error,
        })
    }

    /// The disks are drained; they are held until the mark is in their logs and was told.
    fn append_held(
        &self,
        disks: &[Arc<ProtectedDisk>],
        holds: Vec<Hold<'_>>,
        asked: &mut Asked<'_>,
        quiet: Quiet<'_>,
    ) -> Result<MarkOutcome, HostError> {
        quiet()?;
        let outcome = self.append(disks, time_of(disks), asked)?;
        (asked.held)(&outcome);
        drop(holds);
        Ok(outcome)
    }

    fn append(
        &self,
        disks: &[Arc<ProtectedDisk>],
        time: Timestamp,
        asked: &Asked<'_>,
    ) -> Result<MarkOutcome, HostError> {
        let mark = Mark {
            id: MarkId::random(),
            machine: self.machine,
            disks: disks.iter().map(|disk| disk.identity.disk).collect(),
            consistency: asked.consistency,
            label: asked.label.to_owned(),
            keep: asked.keep,
            time,
            group: false,
        };
        self.append_mark(disks, mark)
    }

    fn append_mark(&self, disks: &[Arc<ProtectedDisk>], mark: Mark) -> Result<MarkOutcome, HostError> {
        // Looked at while nothing can be written: a replay that begins now says so first and writes then.
        if let Some(disk) = disks.iter().find(|disk| disk.is_importing()) {
            return Err(HostError::Replaying { disk: disk.identity.disk });
        }
        let time = mark.time;
        let body = mark.to_bytes();
        // What nobody can read back must not get into a log: its history would end there.
        if let Err(error) = Mark::from_bytes(&body) {
            return Err(HostError::Io { what: "make this mark", source: std::io::Error::other(error) });
        }
        if let Some(disk) = disks.iter().find(|disk| !disk.log.is_logging()) {
            return Err(not_logging(disk, &Unlogged::NotLogging));
        }
        let mut positions = Vec::new();
        for disk in disks {
            disk.log.raise_time(time);
            match disk.log.append_mark(&body) {
                Ok((position, _)) => positions.push((disk.identity.disk, position)),
                Err(reason) => {
                    disk.step_down(&reason);
                    return Err(not_logging(disk, &reason));
                }
            }
        }
        for (disk, position) in &positions {
            observe(Event::Marked { disk: *disk, mark: mark.id, position: *position });
        }
        Ok(MarkOutcome { id: mark.id, time, consistency: mark.consistency, positions })
    }

    /// Goes on in new logs: the end of a cycle.
    pub fn rotate(&self) {
        for disk in &self.all() {
            if let Err(reason) = disk.log.rotate() {
                disk.step_down(&reason);
            }
        }
    }

    pub fn is_logging(&self) -> bool {
        self.ready().iter().all(|disk| disk.log.is_logging())
    }
}

/// A time from which on none of them has a record: along each of them times never decrease.
fn time_of(disks: &[Arc<ProtectedDisk>]) -> Timestamp {
    disks.iter().map(|disk| disk.log.time_now()).max().unwrap_or_default()
}

/// Gathers until nothing is left and nothing in flight, and holds the disks there.
fn settle(disks: &[Arc<ProtectedDisk>], deadline: Instant, logged_max: u64) -> Result<Vec<Hold<'_>>, HostError> {
    let mut attempt = 0;
    loop {
        let mut busy = None;
        for disk in disks {
            let id = disk.identity.disk;
            match disk.gather(logged_max) {
                Ok(Gathered::All) => {}
                Ok(Gathered::InFlight) => busy = Some(id),
                Ok(Gathered::Scanning) => {
                    let total = disk.consumers().iter().map(|consumer| consumer.scan_bytes()).max().unwrap_or(0);
                    return Err(HostError::Scanning { disk: id, done: 0, total });
                }
                Err(error) => {
                    let source = std::io::Error::other(error);
                    return Err(HostError::Io { what: "read what changed", source });
                }
            }
        }
        if busy.is_none() {
            match hold_all(disks) {
                // Looked at twice: at the instant between the two all disks were, together, as they were read.
                Ok(holds)
                    if disks.iter().all(|disk| disk.is_settled()) && disks.iter().all(|disk| disk.is_settled()) =>
                {
                    return Ok(holds);
                }
                Ok(holds) => {
                    drop(holds);
                    busy = disks.iter().find(|disk| disk.is_dirty()).map(|disk| disk.identity.disk);
                }
                Err(disk) => busy = Some(disk),
            }
        }
        if Instant::now() >= deadline {
            let disk = busy.unwrap_or(disks[0].identity.disk);
            return Err(HostError::Unsettled { disk, frozen: false });
        }
        pause(attempt);
        attempt += 1;
    }
}

/// Holds all disks with nothing in flight, or names the one that is busy.
fn hold_all(disks: &[Arc<ProtectedDisk>]) -> Result<Vec<Hold<'_>>, DiskId> {
    let holds: Vec<Hold<'_>> = disks.iter().map(|disk| disk.in_flight.hold()).collect();
    let deadline = Instant::now() + HOLD_LIMIT;
    for (disk, hold) in disks.iter().zip(&holds) {
        if !hold.wait_drained(deadline) {
            return Err(disk.identity.disk);
        }
    }
    Ok(holds)
}

fn not_logging(disk: &ProtectedDisk, reason: &Unlogged) -> HostError {
    let reason = disk.mode().reason().map_or_else(|| reason.to_string(), str::to_owned);
    HostError::NotLogging { disk: disk.identity.disk, reason }
}

impl Barrier for Marker {
    fn barrier(&self) -> Result<Vec<(DiskId, Position)>, SourceError> {
        // The end of a scan is where a machine can first be recovered to, so it is kept. Of all disks: the one whose first scan
        // ends is among them.
        let interval = *self.point_interval.lock().expect("no panic while held");
        let keep = !self.is_tracked() || self.is_kept_due(interval.unwrap_or(KEPT_INTERVAL));
        let asked = Asked { consistency: Consistency::Crash, label: "", keep, held: &mut |_| {} };
        match self.mark_of(&Self::all, asked) {
            Ok(outcome) => Ok(outcome.positions),
            Err(
                HostError::Busy { disk }
                | HostError::Unsettled { disk, .. }
                | HostError::Scanning { disk, .. }
                | HostError::Replaying { disk },
            ) => Err(SourceError::Busy { disk }),
            // Its hypervisor is away, or is busy with something else.
            Err(HostError::Instant { source }) => {
                let disk = self.all().first().map(|disk| disk.identity.disk).unwrap_or_else(DiskId::random);
                tracing::debug!(machine = %self.name, error = %source, "no instant was made");
                Err(SourceError::Busy { disk })
            }
            Err(error) => {
                let disk = self.all().first().map(|disk| disk.identity.disk).unwrap_or_else(DiskId::random);
                let source = std::io::Error::other(error.to_string());
                Err(SourceError::Io { disk, what: "make a mark", source })
            }
        }
    }
}
