//! Barriers: one instant of all machines of a group, on all of their hosts. This is the part of one host.
//!
//! ```text
//! asked to hold → locked out other marks → disks held, nothing in flight → told so → waits for the verdict
//!     → group: marks with the id that all hosts use, flagged → released
//!     → plain, or no verdict within the limit: marks of each machine by itself → released
//!     → nothing: released
//! ```
//!
//! *Consistency.* The verdict `group` is given only when every host holds. Whoever gets it within its own limit has held, without a
//! break, since before it was given: so all of them held at that instant, and their flagged marks are one instant of the group.
//! Whoever did not get it in time has no flagged mark, and then there is no point of the group: that is judged by who
//! has which marks, not by what anybody believes. *Retries.* Writes that stay in flight are let go on and the hold is tried again,
//! within the limit; barriers are tried again by whoever asked. *Cancellation.* A verdict `nothing`. A write waits for the limit at most,
//! whatever becomes of whoever asked: the thread that holds also lets go, by its own clock. *Crash.* Holds end
//! with the process. A flagged mark that some disk of its machine does not have never becomes a point.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::sync::{Condvar, Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{MachineId, MarkId};
use tidemark_proto::control::{HoldGroup, Verdict};
use tidemark_proto::replication::{Consistency, Mark};

use super::{Last, MarkOutcome, Marker};
use crate::capture::in_flight::Hold;
use crate::error::HostError;
use crate::protected::{HOLD_LIMIT, ProtectedDisk, pause};

/// Barriers that are under way, or whose outcome nobody asked for yet.
const ROUNDS_MAX: usize = 64;
/// An outcome that nobody asked for is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// What became of a barrier here.
#[derive(Debug)]
pub struct GroupOutcome {
    /// The verdict came within the limit. Where it was `group`, each machine got its flagged mark.
    pub in_time: bool,
    /// No verdict came within the limit.
    pub expired: bool,
    /// How long writes were held.
    pub held: Duration,
    /// `None`: none was wanted.
    pub marks: Vec<(MachineId, Option<Result<MarkOutcome, HostError>>)>,
}

/// A machine that takes part.
pub struct Joining {
    pub marker: Arc<Marker>,
    /// Refuses one that cannot be held, and while a scan runs: a mark inside it never becomes a point.
    pub refuse: Box<dyn Fn() -> Result<(), HostError> + Send>,
}

/// The barriers of one host.
#[derive(Default)]
pub struct Barriers {
    rounds: Mutex<BTreeMap<MarkId, Arc<Round>>>,
}

struct Round {
    stage: Mutex<Stage>,
    changed: Condvar,
    began: Instant,
}

enum Stage {
    Preparing,
    Held,
    Decided(Verdict),
    Ended(Result<GroupOutcome, HostError>),
    /// Its outcome was taken.
    Told,
}

impl Barriers {
    /// Holds all disks of these machines; returns when they are held. Blocks, for the limit at most. `expired` is called when nobody
    /// said in time how it ends.
    pub fn hold(
        &self,
        machines: Vec<Joining>,
        request: &HoldGroup,
        expired: impl FnOnce() + Send + 'static,
    ) -> Result<(), HostError> {
        let (stage, changed) = (Mutex::new(Stage::Preparing), Condvar::new());
        let round = Arc::new(Round { stage, changed, began: Instant::now() });
        {
            let mut rounds = self.rounds.lock().expect("no panic while held");
            rounds.retain(|_, round| round.began.elapsed() < FORGOTTEN_AFTER);
            if rounds.len() >= ROUNDS_MAX {
                return Err(HostError::Barriers { most: ROUNDS_MAX });
            }
            rounds.insert(request.round, round.clone());
        }
        let (request, running) = (request.clone(), round.clone());
        let id = request.round;
        let let_go = tidemark_base::sabotage::is("group-hold");
        // A thread of its own: it must let go in time whatever else this process has to do.
        let spawned = tidemark_base::thread::Builder::new().name("barrier".to_owned()).spawn(move || {
            let outcome = run(&machines, &request, &running, let_go);
            let was_expired = outcome.as_ref().is_ok_and(|outcome| outcome.expired);
            running.set(Stage::Ended(outcome));
            if was_expired {
                expired();
            }
        });
        if let Err(source) = spawned {
            self.forget(id);
            return Err(HostError::Io { what: "start a thread", source });
        }
        let mut stage = round.stage();
        while matches!(*stage, Stage::Preparing) {
            stage = round.changed.wait(stage).expect("no panic while held");
        }
        match std::mem::replace(&mut *stage, Stage::Told) {
            Stage::Ended(Err(error)) => {
                drop(stage);
                self.forget(id);
                Err(error)
            }
            // The limit may be over already: the outcome says so.
            other => {
                *stage = other;
                Ok(())
            }
        }
    }

    /// Ends a barrier; says what became of it, also where it ended by itself.
    pub fn release(&self, id: MarkId, verdict: Verdict) -> Result<GroupOutcome, HostError> {
        let unknown = || HostError::NoBarrier { round: id };
        let round = self.rounds.lock().expect("no panic while held").get(&id).cloned().ok_or_else(unknown)?;
        let mut stage = round.stage();
        loop {
            match std::mem::replace(&mut *stage, Stage::Told) {
                Stage::Ended(outcome) => {
                    drop(stage);
                    self.forget(id);
                    return outcome;
                }
                Stage::Told => return Err(unknown()),
                // Also when it is held only while this waits.
                Stage::Held => {
                    *stage = Stage::Decided(verdict);
                    round.changed.notify_all();
                }
                other => *stage = other,
            }
            stage = round.changed.wait(stage).expect("no panic while held");
        }
    }

    fn forget(&self, id: MarkId) {
        self.rounds.lock().expect("no panic while held").remove(&id);
    }
}

impl Round {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().expect("no panic while held")
    }

    fn set(&self, next: Stage) {
        *self.stage() = next;
        self.changed.notify_all();
    }

    /// What is to be done; `None` when nobody said so in time.
    fn verdict(&self, deadline: Instant) -> Option<Verdict> {
        let mut stage = self.stage();
        loop {
            if let Stage::Decided(verdict) = *stage {
                return Some(verdict);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            stage = self.changed.wait_timeout(stage, left).expect("no panic while held").0;
        }
    }
}

fn run(machines: &[Joining], request: &HoldGroup, round: &Round, let_go: bool) -> Result<GroupOutcome, HostError> {
    let give_up = Instant::now() + request.limit;
    let mut machines: Vec<&Joining> = machines.iter().collect();
    machines.sort_by_key(|joining| joining.marker.machine);
    let mut members = Vec::new();
    for machine in &machines {
        members.push(Member::enter(machine, give_up)?);
    }
    let mut disks: Vec<Arc<ProtectedDisk>> = members.iter().flat_map(|member| member.disks.iter().cloned()).collect();
    // Whoever holds several disks takes them in this order.
    disks.sort_by_key(|disk| disk.identity.disk);
    let (began, mut holds) = hold_until(&disks, give_up)?;
    round.set(Stage::Held);
    if let_go {
        holds.clear();
    }
    let verdict = round.verdict(began + request.limit);
    let group = match verdict {
        Some(Verdict::Nothing) => None,
        Some(Verdict::Group) => Some(true),
        Some(Verdict::Plain) | None => Some(false),
    };
    let marks: Vec<_> = members
        .iter_mut()
        .map(|member| (member.marker.machine, group.map(|group| member.mark(request, group))))
        .collect();
    drop(holds);
    let held = began.elapsed();
    for disk in &disks {
        disk.watchers.changed();
    }
    let all_marked = marks.iter().all(|(_, mark)| mark.as_ref().is_none_or(Result::is_ok));
    Ok(GroupOutcome { in_time: verdict.is_some() && all_marked, expired: verdict.is_none(), held, marks })
}

/// A machine of which no other mark is made meanwhile.
struct Member<'a> {
    marker: &'a Marker,
    last: MutexGuard<'a, Last>,
    disks: Vec<Arc<ProtectedDisk>>,
}

impl<'a> Member<'a> {
    fn enter(joining: &'a Joining, give_up: Instant) -> Result<Self, HostError> {
        let marker = &*joining.marker;
        (joining.refuse)()?;
        let mut attempt = 0;
        // Somebody else's mark may take long: an application is made quiet for it. Nothing is held here until it ended.
        let last = loop {
            match marker.last.try_lock() {
                Ok(last) => break last,
                Err(_) if Instant::now() < give_up => pause(attempt),
                Err(_) => {
                    let disk = marker.covered().first().copied().unwrap_or_else(tidemark_base::DiskId::random);
                    return Err(HostError::Busy { disk });
                }
            }
            attempt += 1;
        };
        let disks = marker.ready();
        if let Some(disk) = disks.iter().find(|disk| !disk.log.is_logging()) {
            return Err(super::not_logging(disk, &crate::log::Unlogged::NotLogging));
        }
        Ok(Self { marker, last, disks })
    }

    /// The disks are held and drained.
    fn mark(&mut self, request: &HoldGroup, group: bool) -> Result<MarkOutcome, HostError> {
        let time = self.disks.iter().map(|disk| disk.log.time_now()).max().unwrap_or_default();
        let mark = Mark {
            id: request.round,
            machine: self.marker.machine,
            disks: self.disks.iter().map(|disk| disk.identity.disk).collect(),
            consistency: Consistency::Crash,
            label: request.label.clone(),
            keep: true,
            time,
            group,
        };
        let outcome = self.marker.append_mark(&self.disks, mark)?;
        self.last.note(&outcome, true);
        Ok(outcome)
    }
}

/// Holds all disks with nothing in flight, and says since when. Writes that do not end are let go on between two tries.
fn hold_until(disks: &[Arc<ProtectedDisk>], give_up: Instant) -> Result<(Instant, Vec<Hold<'_>>), HostError> {
    let mut attempt = 0;
    loop {
        let began = Instant::now();
        let holds: Vec<Hold<'_>> = disks.iter().map(|disk| disk.in_flight.hold()).collect();
        let deadline = give_up.min(began + HOLD_LIMIT);
        let busy = disks.iter().zip(&holds).find(|(_, hold)| !hold.wait_drained(deadline));
        match busy.map(|(disk, _)| disk.identity.disk) {
            None => return Ok((began, holds)),
            Some(disk) => {
                drop(holds);
                if Instant::now() >= give_up {
                    return Err(HostError::Busy { disk });
                }
            }
        }
        pause(attempt);
        attempt += 1;
    }
}
