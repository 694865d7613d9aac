//! Failovers to here: a point becomes a machine's disks for good, and plain disks in the end.
//!
//! 1. the point and the oldest place are pinned, durably
//! 2. the entry is stored
//! 3. the layers' files are made, and the disks are served
//!
//! A crash before 2 leaves pins that the next start removes; after it the disks are served again. Another point: the same for
//! the new one, whose entry replaces the old; then what the old one had goes.
//!
//! *Consistency · Retries · Cancellation · Crash*: [`crate::failed_over`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::{DiskId, MachineId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, PointInfo, Selector, ServeId};
use uuid::Uuid;

use super::{
    Inner, ProcessServer, blocking, now, point_failed, replica_failed, set_failed, store_failed, table_failed,
};
use crate::failed_over::{FOLDER, FailedOver, FailedOverDisk, FlushLater, Layer, PIN, Promote, Promotion, pin_of_all};
use crate::points::PointConsistency;
use crate::replica::Place;
use crate::serve::{ServeError, ServedPoint};
use crate::view::View;
use crate::view::scratch::{PLAIN, ScratchDisk};

/// What a machine's first writes need until somebody looks.
const ROOM_BYTES_MIN: u64 = 64 << 20;
/// How often a promotion makes durable what it took over.
const FLUSH_BYTES: u64 = 256 << 20;
/// After what could not be read or written.
const PROMOTE_AGAIN: Duration = Duration::from_secs(10);

/// How a failover does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FailoverState {
    pub id: Uuid,
    pub entry: FailedOver,
    pub disks: Vec<FailoverDisk>,
    /// Of all disks, in the plain ones.
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub problem: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FailoverDisk {
    pub disk: DiskId,
    /// Where it is served; none once the machine has its plain disks.
    pub nbd: Option<String>,
    /// The plain disk: whole when the promotion says so.
    pub plain: PathBuf,
}

/// What a failover to a point loses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loss {
    pub point: PointInfo,
    /// Of the newest that is here.
    pub newest: Timestamp,
    /// What is here and was written after the point, at most.
    pub bytes: u64,
}

impl ProcessServer {
    /// What is here of a machine after a point.
    pub async fn loss(&self, machine: MachineId, selector: Selector) -> Result<Loss, Failure> {
        let inner = self.0.clone();
        blocking(move || inner.loss(machine, selector)).await
    }

    /// Makes a point a machine's disks. The same again changes nothing.
    pub async fn fail_over(&self, id: Uuid, machine: MachineId, selector: Selector) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || inner.fail_over(id, machine, selector)).await
    }

    pub async fn failover(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            // What could not be served at the start may be by now.
            if entry.promote != Promote::Plain && inner.failed_over.layers_of(id).is_empty() {
                inner.serve_again(id, &entry);
            }
            inner.failover_state(id)
        })
        .await
    }

    /// All of them.
    pub fn failovers(&self) -> Vec<(Uuid, FailedOver)> {
        self.0.failed_over.all().into_iter().collect()
    }

    /// Tells when a promotion came to its end.
    pub fn failovers_changed(&self) -> tokio::sync::watch::Receiver<u64> {
        self.0.failed_over.changes.subscribe()
    }

    /// Another point; what was written since the failover is gone. The machine is off.
    pub async fn change_failover_point(&self, id: Uuid, selector: Selector) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || inner.change_point(id, selector)).await
    }

    /// The point is accepted: what was after it may go.
    pub async fn commit_failover(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            inner.failed_over.change(id, |entry| entry.committed = true).map_err(table_failed)?;
            inner.release(entry.machine, &pin_of_all(id))?;
            inner.failover_state(id)
        })
        .await
    }

    /// Undoes a failover: what was written since is gone. The machine is off. One that is not there is fine.
    pub async fn end_failover(&self, id: Uuid) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || inner.end_failover(id)).await
    }

    /// Takes over into plain disks what is only in the replica, in the background.
    pub async fn promote(&self, id: Uuid, bytes_per_second: Option<u64>) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            if matches!(entry.promote, Promote::No | Promote::Wanted { .. }) {
                inner.has_room_to_promote(id)?;
                inner.failed_over.change(id, |entry| entry.promote = Promote::No).map_err(table_failed)?;
                inner.failed_over.stop_promotion(id);
                let promote = Promote::Wanted { bytes_per_second };
                inner.failed_over.change(id, |entry| entry.promote = promote).map_err(table_failed)?;
                inner.clone().start_promotion(id, bytes_per_second)?;
            }
            inner.failover_state(id)
        })
        .await
    }

    /// Stops it; what was taken over stays.
    pub async fn stop_promote(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            if let Promote::Wanted { .. } = entry.promote {
                inner.failed_over.change(id, |entry| entry.promote = Promote::No).map_err(table_failed)?;
                inner.failed_over.stop_promotion(id);
            }
            inner.failover_state(id)
        })
        .await
    }

    /// The machine has its plain disks: nothing of it comes through here any more.
    pub async fn made_plain(&self, id: Uuid) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let entry = inner.failed_over.get(id).ok_or_else(|| unknown(id))?;
            match entry.promote {
                Promote::Plain => return Ok(()),
                Promote::Filled => {}
                Promote::No | Promote::Wanted { .. } => {
                    let message = format!("the plain disks of failover {id} do not have everything yet");
                    return Err(Failure::new(FailureKind::Conflict, message, "wait for the promotion"));
                }
            }
            inner.failed_over.change(id, |entry| entry.promote = Promote::Plain).map_err(table_failed)?;
            // Its point stays pinned until the machine lets go of its replica: it may go home. Nothing is replicated meanwhile.
            inner.stop_serving(id, &entry)
        })
        .await
    }

    /// Forgets a failover whose machine keeps its plain disks for good. The disks stay where they are.
    pub async fn let_go(&self, id: Uuid) -> Result<(), Failure> {
        let inner = self.0.clone();
        blocking(move || {
            let _one = inner.failed_over.changing.lock().expect("no panic while held");
            let Some(entry) = inner.failed_over.get(id) else { return Ok(()) };
            if entry.promote != Promote::Plain || !entry.committed {
                let message = format!("the machine of failover {id} still needs its replica");
                let help = "commit it, and let it have plain disks first: `tidemark failover promote NAME`";
                return Err(Failure::new(FailureKind::Conflict, message, help));
            }
            inner.keep_plain(&entry)?;
            inner.release(entry.machine, &entry.pin())?;
            inner.failed_over.remove(id).map_err(table_failed)
        })
        .await
    }
}

impl Inner {
    /// Serves what failed over before this process began, and removes what no entry names.
    pub(super) fn reopen_failovers(self: &Arc<Self>) -> Result<(), Failure> {
        let all = self.failed_over.all();
        let pins: Vec<String> = all.iter().flat_map(|(id, entry)| [entry.pin(), pin_of_all(*id)]).collect();
        for replica in self.set.replicas() {
            let stale = replica.durable_pins().into_iter().map(|pin| pin.holder);
            for holder in stale.filter(|holder| holder.starts_with(PIN) && !pins.contains(holder)) {
                if let Err(error) = replica.unpin(&holder) {
                    tracing::warn!(disk = %replica.disk(), holder, %error, "a pin stays until the next start");
                }
            }
        }
        if self.storage.exists(FOLDER).map_err(|error| store_failed(&error))? {
            for name in self.storage.list(FOLDER).map_err(|error| store_failed(&error))? {
                let folder = format!("{FOLDER}/{name}");
                let is_kept = self.storage.exists(&format!("{folder}/{KEPT}")).map_err(|error| store_failed(&error))?;
                if is_kept || all.values().any(|entry| entry.folder() == folder) {
                    continue;
                }
                self.storage.remove_folder(&folder).map_err(|error| store_failed(&error))?;
            }
        }
        for (id, entry) in &all {
            if entry.promote == Promote::Plain {
                continue;
            }
            self.serve_again(*id, entry);
            if let Promote::Wanted { bytes_per_second } = entry.promote {
                self.clone().start_promotion(*id, bytes_per_second)?;
            }
        }
        Ok(())
    }

    /// A failure is noted; asking how the failover does tries it again.
    fn serve_again(self: &Arc<Self>, id: Uuid, entry: &FailedOver) {
        // A volume that was full when it was pinned: nothing may fold under a machine.
        let outcome = self.pin(id, entry).and_then(|()| self.open_failover(id, entry));
        let problem = outcome.as_ref().err().map(|failure| failure.message.clone());
        match problem.as_ref() {
            Some(problem) => tracing::error!(failover = %id, problem, "the disks of a machine cannot be served"),
            None => tracing::info!(failover = %id, machine = %entry.machine, "the disks of a machine are served again"),
        }
        self.failed_over.note_problem(id, problem);
    }

    fn pin(&self, id: Uuid, entry: &FailedOver) -> Result<(), Failure> {
        for held in &entry.disks {
            let replica = self.set.get(held.disk).map_err(replica_failed)?;
            replica.pin(&entry.pin(), held.cut, now()).map_err(replica_failed)?;
        }
        if !entry.committed {
            for replica in self.set.of_machine(entry.machine) {
                let holder = pin_of_all(id);
                if !replica.durable_pins().iter().any(|pin| pin.holder == holder) {
                    replica.pin(&holder, replica.floor(), now()).map_err(replica_failed)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn release(&self, machine: MachineId, holder: &str) -> Result<(), Failure> {
        self.set.of_machine(machine).iter().try_for_each(|replica| replica.unpin(holder).map_err(replica_failed))
    }

    pub(super) fn open_failover(&self, id: Uuid, entry: &FailedOver) -> Result<(), Failure> {
        let place = Place {
            machine: entry.machine,
            id: Some(entry.point),
            time: entry.time,
            consistency: PointConsistency::Crash,
            cuts: entry.disks.iter().map(|held| (held.disk, held.cut)).collect(),
        };
        let views = self.set.views(&place).map_err(set_failed)?;
        self.serve_layers(id, entry, views.into_iter().map(|(disk, view)| (disk, Arc::new(view))).collect())
    }

    fn serve_layers(&self, id: Uuid, entry: &FailedOver, views: Vec<(DiskId, Arc<View>)>) -> Result<(), Failure> {
        let mut layers = Vec::new();
        for (disk, view) in views {
            let folder = format!("{}/{disk}", entry.folder());
            self.storage.create_folder(&folder).map_err(|error| store_failed(&error))?;
            for made in ["", FOLDER, &entry.folder()] {
                self.storage.sync_folder(made).map_err(|error| store_failed(&error))?;
            }
            let scratch = ScratchDisk::open_lasting(view, &*self.storage.folder(&folder), &self.boot);
            layers.push(Layer { disk, scratch: Arc::new(scratch.map_err(|error| store_failed(&error))?) });
        }
        // On its way home a machine that is off is read, and written by nobody.
        if !entry.stopped {
            self.serve_to_machine(entry, &layers)?;
        }
        self.failed_over.layers.lock().expect("no panic while held").insert(id, layers);
        Ok(())
    }

    pub(super) fn serve_to_machine(&self, entry: &FailedOver, layers: &[Layer]) -> Result<(), Failure> {
        let point = ServedPoint {
            machine: entry.machine,
            point: entry.point,
            time: entry.time,
            writable: true,
            disks: layers.iter().map(|layer| (layer.disk, layer.scratch.clone() as Arc<dyn Disk>)).collect(),
            listen: None,
            held: Some(Box::new(FlushLater(layers.to_vec()))),
        };
        Ok(self.serves.start(entry.serve, point, true).map(drop)?)
    }

    /// Ends the connections.
    pub(super) fn end_serve(&self, entry: &FailedOver) -> Result<(), Failure> {
        match self.serves.stop(entry.serve) {
            Ok(_) | Err(ServeError::Unknown { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the connections, and closes the layers, which stay on disk.
    pub(super) fn stop_serving(&self, id: Uuid, entry: &FailedOver) -> Result<(), Failure> {
        self.end_serve(entry)?;
        self.failed_over.layers.lock().expect("no panic while held").remove(&id);
        Ok(())
    }

    fn fail_over(&self, id: Uuid, machine: MachineId, selector: Selector) -> Result<FailoverState, Failure> {
        let _one = self.failed_over.changing.lock().expect("no panic while held");
        if let Some((known, entry)) = self.failed_over.of_machine(machine) {
            if known != id {
                let message = format!("machine {machine} failed over to a point of {} already", entry.time);
                let help = "see `tidemark failover show NAME`; cancel that one first: `tidemark failover cancel NAME`";
                return Err(Failure::new(FailureKind::Conflict, message, help));
            }
            return self.failover_state(id);
        }
        self.has_room(ROOM_BYTES_MIN)?;
        let (entry, views) = self.choose(machine, selector)?;
        self.begin(id, entry, views)?;
        self.failover_state(id)
    }

    /// A point as the disks of a new serve.
    fn choose(
        &self,
        machine: MachineId,
        selector: Selector,
    ) -> Result<(FailedOver, Vec<(DiskId, Arc<View>)>), Failure> {
        let (info, views, place) = self.open_views(machine, selector)?;
        if info.flags.iter().any(|flag| flag == "damaged") {
            return Err(Failure::new(
                FailureKind::Damaged,
                format!("point {} of {} is damaged", info.id, info.time),
                "choose another point of `tidemark point list`",
            ));
        }
        let entry = FailedOver {
            machine,
            serve: ServeId::random(),
            point: info.id,
            time: info.time,
            disks: place.cuts.iter().map(|&(disk, cut)| FailedOverDisk { disk, cut }).collect(),
            since: now(),
            committed: false,
            promote: Promote::No,
            captured: false,
            stopped: false,
        };
        Ok((entry, views))
    }

    /// Steps 1 to 3; what was begun is undone when one fails.
    fn begin(&self, id: Uuid, entry: FailedOver, views: Vec<(DiskId, Arc<View>)>) -> Result<(), Failure> {
        let before = self.failed_over.get(id);
        let begun = self
            .pin(id, &entry)
            .and_then(|()| self.failed_over.put(id, entry.clone()).map_err(table_failed))
            .and_then(|()| self.serve_layers(id, &entry, views));
        if let Err(failure) = begun {
            let undone = match &before {
                Some(before) => self.failed_over.put(id, before.clone()),
                None => self.failed_over.remove(id),
            };
            let undone = undone.map_err(table_failed).and_then(|()| self.discard(&entry));
            let undone = undone.and_then(|()| match &before {
                Some(_) => Ok(()),
                None => self.release(entry.machine, &pin_of_all(id)),
            });
            if let Err(left) = undone {
                tracing::warn!(failover = %id, %left, "what was begun is left until the next start");
            }
            return Err(failure);
        }
        self.failed_over.note_problem(id, None);
        Ok(())
    }

    /// What an entry had, which is not there any more.
    pub(super) fn discard(&self, entry: &FailedOver) -> Result<(), Failure> {
        self.release(entry.machine, &entry.pin())?;
        let folder = entry.folder();
        if self.storage.exists(&folder).map_err(|error| store_failed(&error))? {
            self.storage.remove_folder(&folder).map_err(|error| store_failed(&error))?;
        }
        Ok(())
    }

    fn change_point(&self, id: Uuid, selector: Selector) -> Result<FailoverState, Failure> {
        let _one = self.failed_over.changing.lock().expect("no panic while held");
        let before = self.failed_over.get(id).ok_or_else(|| unknown(id))?;
        before.refuse_committed()?;
        self.has_room(ROOM_BYTES_MIN)?;
        let (entry, views) = self.choose(before.machine, selector)?;
        self.failed_over.stop_promotion(id);
        self.stop_serving(id, &before)?;
        if let Err(failure) = self.begin(id, entry, views) {
            if before.promote != Promote::Plain
                && let Err(left) = self.open_failover(id, &before)
            {
                self.failed_over.note_problem(id, Some(left.message));
            }
            return Err(failure);
        }
        if let Err(left) = self.discard(&before) {
            tracing::warn!(failover = %id, %left, "what the point before had is left until the next start");
        }
        self.failover_state(id)
    }

    fn end_failover(&self, id: Uuid) -> Result<(), Failure> {
        let _one = self.failed_over.changing.lock().expect("no panic while held");
        let Some(entry) = self.failed_over.get(id) else { return Ok(()) };
        entry.refuse_committed()?;
        self.failed_over.stop_promotion(id);
        self.stop_serving(id, &entry)?;
        self.failed_over.remove(id).map_err(table_failed)?;
        self.failed_over.note_problem(id, None);
        self.release(entry.machine, &pin_of_all(id))?;
        self.discard(&entry)
    }

    pub(super) fn failover_state(&self, id: Uuid) -> Result<FailoverState, Failure> {
        let entry = self.failed_over.get(id).ok_or_else(|| unknown(id))?;
        let layers = self.failed_over.layers_of(id);
        let serving = self.serves.get(entry.serve);
        let nbd =
            |disk| serving.iter().flat_map(|serving| &serving.disks).find(|served| served.id == disk)?.nbd.clone();
        let disks = entry.disks.iter().map(|held| FailoverDisk {
            disk: held.disk,
            nbd: nbd(held.disk),
            plain: self.storage.path(&format!("{}/{}/{PLAIN}", entry.folder(), held.disk)),
        });
        let total_bytes = entry.disks.iter().filter_map(|held| Some(self.set.get(held.disk).ok()?.disk_bytes())).sum();
        let done_bytes = match entry.promote {
            Promote::Plain => total_bytes,
            _ => layers.iter().map(|layer| layer.scratch.taken_bytes()).sum(),
        };
        let problem = self.failed_over.problem(id);
        Ok(FailoverState { id, disks: disks.collect(), done_bytes, total_bytes, problem, entry })
    }

    fn loss(&self, machine: MachineId, selector: Selector) -> Result<Loss, Failure> {
        let (place, info) = self.resolve(machine, selector)?;
        let store = self.set.points(machine).map_err(point_failed)?;
        let all = store.all();
        let is_after = |cut_of: &dyn Fn(DiskId) -> Option<u64>| {
            place.cuts.iter().any(|&(disk, cut)| cut_of(disk).is_some_and(|theirs| theirs > cut))
        };
        let later: Vec<_> = all.iter().filter(|point| is_after(&|disk| point.cut_of(disk))).collect();
        // Kept points count from one to the next, the places between them from the kept one before.
        let mut bytes: u64 = later.iter().filter(|point| point.keep).map(|point| point.changed_bytes()).sum();
        if let Some(last) = later.last().filter(|point| !point.keep) {
            bytes += last.changed_bytes();
        }
        let chosen = all.iter().find(|point| Some(point.id) == place.id).filter(|point| !point.keep);
        bytes = bytes.saturating_sub(chosen.map_or(0, |point| point.changed_bytes()));
        let newest = self.set.of_machine(machine).iter().map(|replica| replica.durable().time).max();
        Ok(Loss { newest: newest.unwrap_or(info.time).max(info.time), point: info, bytes })
    }

    fn has_room(&self, needed: u64) -> Result<(), Failure> {
        let free = self.storage.available_bytes().map_err(|error| store_failed(&error))?;
        if free >= needed {
            return Ok(());
        }
        Err(Failure::new(
            FailureKind::Conflict,
            format!("the process server's volume lacks room: {free} bytes are free, {needed} are needed"),
            "free or add room there, then try again",
        ))
    }

    /// Plain disks take what the point's data takes, at most.
    fn has_room_to_promote(&self, id: Uuid) -> Result<(), Failure> {
        let mut needed = ROOM_BYTES_MIN;
        for layer in self.failed_over.layers_of(id) {
            needed += layer.scratch.missing_data_bytes().map_err(|error| store_failed(&error))?;
        }
        self.has_room(needed)
    }

    fn start_promotion(self: Arc<Self>, id: Uuid, bytes_per_second: Option<u64>) -> Result<(), Failure> {
        let stop = Stop::new();
        let inner = self.clone();
        let thread = tidemark_base::thread::Builder::new().name("promote".to_owned()).spawn({
            let stop = stop.clone();
            move || {
                while let Err(error) = inner.fill(id, bytes_per_second, &stop) {
                    tracing::warn!(failover = %id, %error, "plain disks cannot be written; it is tried again");
                    inner.failed_over.note_problem(id, Some(format!("plain disks cannot be written: {error}")));
                    if stop.wait_for(PROMOTE_AGAIN) {
                        return;
                    }
                }
            }
        });
        let thread = thread.map_err(|error| store_failed(&error))?;
        self.failed_over.promotions.lock().expect("no panic while held").insert(id, Promotion { stop, thread });
        Ok(())
    }

    /// Returns when everything was taken over, or it was stopped.
    fn fill(&self, id: Uuid, bytes_per_second: Option<u64>, stop: &Stop) -> std::io::Result<()> {
        let layers = self.failed_over.layers_of(id);
        if layers.is_empty() {
            return Err(std::io::Error::other("the machine's disks are not served"));
        }
        for layer in &layers {
            let (mut at, mut unflushed) = (0, 0);
            while let Some(filled) = layer.scratch.fill(at)? {
                (at, unflushed) = (filled.next, unflushed + filled.bytes);
                let pause =
                    bytes_per_second.map(|rate| Duration::from_secs_f64(filled.bytes as f64 / rate.max(1) as f64));
                let stopped = match pause.filter(|pause| !pause.is_zero()) {
                    Some(pause) => stop.wait_for(pause),
                    None => stop.is_stopped(),
                };
                if stopped {
                    return Ok(());
                }
                if unflushed >= FLUSH_BYTES {
                    layer.scratch.flush()?;
                    unflushed = 0;
                }
            }
            layer.scratch.flush()?;
        }
        // Whoever stops this waits for it, with the lock of changes: so without it.
        let filled = self.failed_over.change(id, |entry| {
            if let (Promote::Wanted { .. }, false) = (entry.promote, stop.is_stopped()) {
                entry.promote = Promote::Filled;
            }
        });
        filled.map_err(std::io::Error::other)?;
        self.failed_over.note_problem(id, None);
        tracing::info!(failover = %id, "the plain disks have everything");
        self.failed_over.changes.send_modify(|changes| *changes += 1);
        Ok(())
    }

    /// What is let go of is removed by no start.
    fn keep_plain(&self, entry: &FailedOver) -> Result<(), Failure> {
        // They are open in a running machine, so they keep their names; what names them as kept is an empty file.
        let name = format!("{}/{KEPT}", entry.folder());
        self.storage
            .open(&name, tidemark_base::storage::OpenMode::OpenOrCreate)
            .and_then(|file| file.sync())
            .and_then(|()| self.storage.sync_folder(&entry.folder()))
            .map_err(|error| store_failed(&error))
    }
}

/// In the folder of plain disks that belong to their machine alone.
const KEPT: &str = "kept";

impl FailedOver {
    pub fn refuse_committed(&self) -> Result<(), Failure> {
        if !self.committed {
            return Ok(());
        }
        Err(Failure::new(
            FailureKind::Conflict,
            format!("the failover to the point of {} was committed", self.time),
            "a committed failover is not changed or cancelled any more; protect the machine where it is now",
        ))
    }
}

pub(super) fn unknown(id: Uuid) -> Failure {
    let message = format!("failover {id} is not known to this process server");
    Failure::new(FailureKind::NotFound, message, "see `tidemark failover show NAME`")
}

impl Inner {
    /// What runs from a replica keeps it.
    pub(super) fn refuse_failed_over(&self, machine: MachineId) -> Result<(), Failure> {
        match self.failed_over.of_machine(machine) {
            None => Ok(()),
            Some((_, entry)) => Err(Failure::new(
                FailureKind::Conflict,
                format!("machine {machine} failed over to the point of {} and runs from its replica", entry.time),
                "cancel the failover first (`tidemark failover cancel NAME`), or complete it (`tidemark migrate NAME`)",
            )),
        }
    }
}
