//! What is there: points, positions, problems.

use std::sync::Arc;
use std::time::Duration;

use tidemark_base::{DiskId, MachineId, MarkId};
use tidemark_proto::control::{
    Consistency, Failure, FailureKind, GROUP_CANDIDATE, GROUP_POINT, PointInfo, Problem, ReplicaDisk, ReplicaMachine,
    Selector, ServerReport,
};

use super::background::Background;
use super::{Inner, ProcessServer, blocking, now, point_failed, set_failed, unknown_machine};
use crate::points::{Point, PointConsistency, PointSelector, of_group};
use crate::replica::{OpenFailure, Place, Replica};

impl ProcessServer {
    /// The recovery points of a machine, oldest first.
    pub async fn points(&self, machine: MachineId) -> Result<Vec<PointInfo>, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            inner.known(machine)?;
            let points = inner.set.points(machine).map_err(point_failed)?;
            Ok(points.list().iter().map(point_info).collect())
        })
        .await
    }

    /// What a selector means now.
    pub async fn resolve(&self, machine: MachineId, selector: Selector) -> Result<PointInfo, Failure> {
        let inner = self.0.clone();
        blocking(move || inner.resolve(machine, selector).map(|(_, info)| info)).await
    }

    /// A locked point is never thinned.
    pub async fn lock(&self, machine: MachineId, selector: Selector, locked: bool) -> Result<PointInfo, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let (place, _) = inner.resolve(machine, selector)?;
            let Some(id) = place.id else {
                return Err(Failure::new(
                    FailureKind::BadRequest,
                    format!("{selector} is a position between marks, not a recovery point"),
                    "lock a point of `tidemark point list`",
                ));
            };
            let points = inner.set.points(machine).map_err(point_failed)?;
            points.lock(id, locked).map(|point| point_info(&point)).map_err(point_failed)
        })
        .await
    }

    /// Every machine of the group has this point; or it is in none any more.
    pub async fn confirm_point(&self, machine: MachineId, point: Option<MarkId>) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let points = inner.set.points(machine).map_err(point_failed)?;
            let confirmed = match point {
                Some(point) => points.confirm(point).map(drop),
                None => points.leave_group(),
            };
            confirmed.map_err(point_failed)
        })
        .await
    }

    /// Waits until every disk of the machine holds this mark durably and consistently.
    pub async fn wait_point(&self, machine: MachineId, mark: MarkId, limit: Duration) -> Result<PointInfo, Failure> {
        let mut changes = self.0.points.subscribe();
        let waiting = async {
            loop {
                changes.mark_unchanged();
                let inner = self.0.clone();
                let found = blocking(move || {
                    inner.known(machine)?;
                    Ok(inner.set.points(machine).map_err(point_failed)?.get(mark))
                });
                if let Some(point) = found.await? {
                    return Ok(point_info(&point));
                }
                if changes.changed().await.is_err() {
                    return Err(Failure::new(FailureKind::Unavailable, "the process server stops", "try again"));
                }
            }
        };
        tokio::time::timeout(limit, waiting).await.unwrap_or_else(|_| {
            Err(Failure::new(
                FailureKind::TimedOut,
                format!(
                    "mark {mark} of machine {machine} did not become a recovery point within {} s",
                    limit.as_secs_f64()
                ),
                "look at `tidemark status`: a disk is behind, is being scanned, or its host is not connected",
            ))
        })
    }

    /// Whether what comes for each of its disks is taken; otherwise why not.
    pub async fn is_ready(&self) -> Result<(), String> {
        let inner = self.0.clone();
        let refused = blocking(move || {
            let unopened = inner.open_failures.iter().filter_map(unopened_disk).flat_map(|disk| disk.problems);
            let unopened = unopened.chain(inner.ended());
            Ok(inner.set.replicas().iter().flat_map(|replica| refusals(replica)).chain(unopened).next())
        });
        match refused.await {
            Ok(None) => Ok(()),
            Ok(Some(problem)) => Err(problem.message),
            Err(failure) => Err(failure.message),
        }
    }

    /// Positions, sizes, serves, points: all that the status shows.
    pub async fn status(&self) -> Result<ServerReport, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let mut disks: Vec<ReplicaDisk> =
                inner.set.replicas().iter().map(|replica| inner.replica_disk(replica)).collect();
            disks.extend(inner.open_failures.iter().filter_map(unopened_disk));
            let ended: Vec<Problem> = inner.ended().collect();
            disks.iter_mut().for_each(|disk| disk.problems.extend(ended.iter().cloned()));
            let mut machines = Vec::new();
            for machine in inner.settings.all().into_keys() {
                let points = match inner.set.points(machine) {
                    Ok(points) => points.list(),
                    Err(error) => {
                        let help = error.help().to_owned();
                        let message = point_failed(error).message;
                        for disk in disks.iter_mut().filter(|disk| inner.is_of(disk.disk, machine)) {
                            let (message, help) = (message.clone(), help.clone());
                            disk.problems.push(Problem { critical: true, message, help });
                        }
                        Vec::new()
                    }
                };
                let damaged = points.iter().filter(|point| point.damaged).count();
                if damaged > 0
                    && let Some(disk) = disks.iter_mut().find(|disk| inner.is_of(disk.disk, machine))
                {
                    let message = format!("{damaged} recovery points show damage; the others are whole");
                    let help = "choose another one: `tidemark point list NAME` flags them until retention takes them"
                        .to_owned();
                    disk.problems.push(Problem { critical: false, message, help });
                }
                let latest = points.last().map(point_info);
                let (group_candidate, group_point) = of_group(&points);
                let points = points.len() as u64;
                machines.push(ReplicaMachine { machine, points, latest, group_candidate, group_point });
            }
            Ok(ServerReport {
                time: now(),
                disks,
                serves: inner.serves.list(),
                machines,
                storage_encrypted: inner.storage_encrypted,
                volume: crate::volume::of(&inner.storage.path("")),
            })
        })
        .await
    }
}

impl Inner {
    /// What is not done any more.
    fn ended(&self) -> impl Iterator<Item = Problem> {
        let threads = [&self.maintainer.thread, &self.scrubber.thread, &self.tender.thread];
        threads.into_iter().filter_map(Background::problem)
    }

    pub(super) fn known(&self, machine: MachineId) -> Result<(), Failure> {
        if !self.settings.read(|machines| machines.contains_key(&machine)) && self.set.of_machine(machine).is_empty() {
            return Err(unknown_machine(machine));
        }
        Ok(())
    }

    pub(super) fn resolve(&self, machine: MachineId, selector: Selector) -> Result<(Place, PointInfo), Failure> {
        self.known(machine)?;
        let wanted = match selector {
            Selector::Latest => PointSelector::Latest,
            Selector::LatestApp => PointSelector::LatestApp,
            Selector::LowestRpo => PointSelector::LowestRpo,
            Selector::Point(id) => PointSelector::Id(id),
            Selector::Time(time) => PointSelector::Time(time),
        };
        let place = self.set.resolve(machine, wanted).map_err(set_failed)?;
        let point = match place.id {
            Some(id) => self.set.points(machine).map_err(point_failed)?.get(id),
            None => None,
        };
        let info = point.as_ref().map_or_else(|| place_info(&place), point_info);
        Ok((place, info))
    }

    fn is_of(&self, disk: DiskId, machine: MachineId) -> bool {
        self.set.get(disk).is_ok_and(|replica| replica.machine() == machine)
    }

    fn replica_disk(&self, replica: &Arc<Replica>) -> ReplicaDisk {
        let (durable, statistics) = (replica.durable(), replica.statistics());
        let mut problems: Vec<Problem> = self.maintainer.problem(replica.disk()).into_iter().collect();
        problems.extend(self.scrubber.problem(replica.disk()));
        problems.extend(self.set.unread_marks(replica.disk()).map(|message| Problem {
            critical: true,
            message: format!("disk {}: {message}", replica.disk()),
            help: "the recovery points at these marks are lost, others are whole; check the volume, and `tidemark point verify` them".to_owned(),
        }));
        problems.extend(refusals(replica));
        problems.extend(self.scrubber.file_problems().into_iter().map(|message| Problem {
            critical: false,
            message: format!("a file of the process server was damaged, and was written again: {message}"),
            help: "check the process server's volume".to_owned(),
        }));
        problems.extend(self.set.untended(replica.disk()).map(|message| Problem {
            critical: false,
            message: format!("disk {}: {message}", replica.disk()),
            help: "check the process server's volume (free room, kernel log)".to_owned(),
        }));
        if statistics.needed_bytes > 0 {
            problems.push(Problem {
                critical: true,
                message: format!(
                    "disk {}: {} bytes of its newest content are damaged here; recovery points made now are flagged",
                    replica.disk(),
                    statistics.needed_bytes
                ),
                help:
                    "the host sends them again by itself when it is connected; check the volume of the process server"
                        .to_owned(),
            });
        }
        if durable.needs_scan {
            problems.push(Problem {
                critical: true,
                message: format!(
                    "cuts of disk {} were lost; it is not consistent until it was scanned",
                    replica.disk()
                ),
                help: "the host scans the disk by itself when it connects; older recovery points stay".to_owned(),
            });
        }
        for damage in &replica.opening_damage() {
            problems.push(Problem {
                critical: true,
                message: format!("disk {}: {damage}", replica.disk()),
                help: "check the process server's volume; run `tidemark point verify` on the points".to_owned(),
            });
        }
        let folded = match replica.position_of(statistics.base_cut) {
            Ok((position, _)) => position.map_or(String::new(), |position| position.to_string()),
            Err(error) => {
                let help = error.help().to_owned();
                problems.push(Problem { critical: true, message: error.to_string(), help });
                String::new()
            }
        };
        let scrubbed = self.scrubber.scrubbed(replica.disk());
        let pass = scrubbed.as_ref().and_then(|scrubbed| scrubbed.pass.as_ref());
        ReplicaDisk {
            disk: replica.disk(),
            consistent: !durable.scan_open && !durable.needs_scan && durable.consistent_cut > 0,
            durable: durable.position.map_or(String::new(), |position| position.to_string()),
            folded,
            durable_time: (durable.cut > 0).then_some(durable.time),
            stored_bytes: statistics.journal_bytes + statistics.base_allocated_bytes,
            problems,
            scrubbed_time: scrubbed.as_ref().and_then(|scrubbed| scrubbed.ended),
            scrub_started: pass.map(|pass| pass.started),
            scrub_bytes: pass.map_or(0, |pass| pass.bytes),
        }
    }
}

/// A replica that could not be opened when the server started; its folder is named by its disk.
fn unopened_disk(failure: &OpenFailure) -> Option<ReplicaDisk> {
    let disk = failure.folder.rsplit('/').next()?.parse().ok()?;
    let message = format!("the replica cannot be opened: {}", failure.error);
    let problem = Problem { critical: true, message, help: failure.error.help().to_owned() };
    Some(ReplicaDisk {
        disk,
        consistent: false,
        durable: String::new(),
        folded: String::new(),
        durable_time: None,
        stored_bytes: 0,
        problems: vec![problem],
        scrubbed_time: None,
        scrub_started: None,
        scrub_bytes: 0,
    })
}

/// Why nothing that comes for this disk is taken.
fn refusals(replica: &Replica) -> impl Iterator<Item = Problem> {
    let failed = replica.failure().map(|message| Problem {
        critical: true,
        message: format!("disk {}: the journal failed and takes nothing more: {message}", replica.disk()),
        help: "check the process server's volume (see its kernel log), then restart the process server".to_owned(),
    });
    let full = replica.lacks_room().map(|free| Problem {
        critical: true,
        message: format!(
            "disk {}: what comes is refused for want of room: {free} bytes were free on the volume",
            replica.disk()
        ),
        help: "free or add room on the process server's volume, or shorten the retention; nothing was lost, the host waits and goes on by itself".to_owned(),
    });
    failed.into_iter().chain(full)
}

pub(super) fn point_info(point: &Point) -> PointInfo {
    PointInfo {
        id: point.id,
        time: point.time,
        consistency: consistency(point.consistency),
        label: point.label.clone(),
        locked: point.locked,
        change_bytes: point.changed_bytes(),
        flags: flags(point),
    }
}

fn flags(point: &Point) -> Vec<String> {
    let damaged = point.damaged.then(|| "damaged".to_owned());
    let group = match (point.group, point.confirmed) {
        (_, true) => Some(GROUP_POINT.to_owned()),
        (true, false) => Some(GROUP_CANDIDATE.to_owned()),
        (false, false) => None,
    };
    damaged.into_iter().chain(group).chain(point.proven.map(|time| format!("booted {time}"))).collect()
}

/// A place between marks has no id of its own. It gets one that is the same whenever the same place is meant.
fn place_info(place: &Place) -> PointInfo {
    let mut hasher = blake3::Hasher::new_derive_key("tidemark 2026-11 id of a place between marks");
    hasher.update(place.machine.as_bytes());
    for (disk, cut) in &place.cuts {
        hasher.update(disk.as_bytes()).update(&cut.to_le_bytes());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    PointInfo {
        id: MarkId::from_bytes(id),
        time: place.time,
        consistency: consistency(place.consistency),
        label: String::new(),
        locked: false,
        change_bytes: 0,
        flags: vec!["between marks".to_owned()],
    }
}

fn consistency(from: PointConsistency) -> Consistency {
    match from {
        PointConsistency::Crash => Consistency::Crash,
        PointConsistency::Application => Consistency::App,
    }
}
