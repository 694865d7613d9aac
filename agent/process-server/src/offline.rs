//! Failing over where no configuration server is left: with the recovery key, on the process server's own machine.
//!
//! The key's public half came with the first backup of the configuration (`server/backups.rs`), so a process server that was
//! never given one knows no offline failover. Whoever is root here could change files; the key is what makes it a decision
//! of those who may decide, and the record that stays is signed with it.
//!
//! *Consistency.* In this order, each step durable before the next: the point is pinned, the disks' authorisations are raised
//! to a new generation (the old host is refused from here on), their replicas follow, the record is written. *Retries.*
//! Again with the same or another point: the generation is raised once. *Cancellation.* Between two steps, as a crash.
//! *Crash.* After the pin: nothing happened but a pin. After some authorisations: those disks take nothing any more, and the
//! next try raises the others. After the record: done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::disk::Disk;
use tidemark_base::stop::Stop;
use tidemark_base::storage::{RealStorage, Storage, StorageFile};
use tidemark_base::{DiskId, Generation, MachineId, MarkId, Timestamp};
use tidemark_proto::control::{Exported, ExportedFile, Failure, FailureKind, ImageFormat, ServeId, Serving};
use tidemark_transport::recovery::{RecoveryKey, verify_break_glass};

use crate::accept::authorise::{Authorisation, Authorisations};
use crate::export::{export_raw, targets, try_targets};
use crate::journal::Limits;
use crate::points::PointSelector;
use crate::replica::manifest::Manifest;
use crate::replica::{OpenFailure, Place, Replica, ReplicaSet};
use crate::serve::{ServedPoint, Serves};
use crate::server::{backups, lock_folder};
use crate::settings::{self, Settings};
use crate::table::Table;

const RECORDS_FILE: &str = "failovers.json";
const HOLDER: &str = "failover";

/// That a machine was failed over here, and by which right.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    pub machine: MachineId,
    pub name: String,
    /// The mark; none for a position between marks.
    pub point: Option<MarkId>,
    pub point_time: Timestamp,
    pub disks: BTreeMap<DiskId, FailedOverDisk>,
    pub at: Timestamp,
    /// Ed25519 by the recovery key, over everything before, in hex.
    pub signature: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FailedOverDisk {
    pub cut: u64,
    pub generation: Generation,
}

impl Record {
    /// What is signed: the record without its signature.
    fn message(&self) -> Vec<u8> {
        let unsigned = Self { signature: String::new(), ..self.clone() };
        serde_json::to_vec(&unsigned).unwrap_or_default()
    }

    pub fn is_signed_for(&self, break_glass: &[u8; 32]) -> bool {
        let digits = self.signature.as_bytes().chunks(2);
        let bytes: Option<Vec<u8>> =
            digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
        bytes.is_some_and(|bytes| verify_break_glass(break_glass, &self.message(), &bytes))
    }
}

/// The records of a process server's folder.
pub fn records(storage: Arc<dyn Storage>) -> Result<BTreeMap<MachineId, Record>, Failure> {
    let table = Table::<BTreeMap<MachineId, Record>>::open(storage, RECORDS_FILE);
    Ok(table.map_err(|error| Failure::from_error(FailureKind::Failed, &error, error.help()))?.all())
}

/// A configuration server lets the source write again, under a generation above that of the failover: what that holds is given
/// back, and its record goes. Blocks.
pub(crate) fn supersede(
    storage: Arc<dyn Storage>,
    set: &ReplicaSet,
    machine: MachineId,
    granted: &BTreeMap<DiskId, Generation>,
) -> Result<(), Failure> {
    if !storage.exists(RECORDS_FILE).map_err(|error| failed(&error, "check the process server's volume"))? {
        return Ok(());
    }
    let table = Table::<BTreeMap<MachineId, Record>>::open(storage, RECORDS_FILE)
        .map_err(|error| failed(&error, error.help()))?;
    let is_above = |record: &Record| {
        let above = |(disk, of): (&DiskId, &FailedOverDisk)| granted.get(disk).is_none_or(|now| *now > of.generation);
        record.disks.iter().all(above)
    };
    match table.read(|records| records.get(&machine).is_some_and(is_above)) {
        true => give_back(&table, set, machine),
        false => Ok(()),
    }
}

fn give_back(table: &Table<BTreeMap<MachineId, Record>>, set: &ReplicaSet, machine: MachineId) -> Result<(), Failure> {
    for replica in set.of_machine(machine) {
        replica.unpin(HOLDER).map_err(|error| failed(&error, error.help()))?;
    }
    // Last: until it is gone this can be repeated.
    let removed = table.change(|records| {
        records.remove(&machine);
        Ok(())
    });
    removed.map(drop).map_err(|error: crate::table::TableError| failed(&error, error.help()))
}

/// A machine that was failed over, and the folder that nobody else uses meanwhile.
pub struct FailedOver {
    pub record: Record,
    set: Arc<ReplicaSet>,
    place: Place,
    storage: Arc<dyn Storage>,
    _lock: Arc<dyn StorageFile>,
}

/// A process server's folder, or that of one disk's replica in it; and the machine, where the folder says which.
fn resolve_folder(folder: &Path) -> Result<(PathBuf, Option<MachineId>), Failure> {
    let wrong = |what: &str| {
        Failure::new(
            FailureKind::BadRequest,
            format!("{} {what}", folder.display()),
            "name the process server's folder, or the folder of one disk's replica: replicas/<disk> in it",
        )
    };
    let folder = folder.canonicalize().map_err(|error| wrong(&format!("cannot be opened: {error}")))?;
    if folder.join("replicas").is_dir() {
        return Ok((folder, None));
    }
    let manifest = Manifest::load(&*RealStorage::open_folder(&folder))
        .map_err(|error| wrong(&format!("is no process server's folder and no replica: {error}")))?;
    match folder.parent().filter(|parent| parent.ends_with("replicas")).and_then(Path::parent) {
        Some(root) => Ok((root.to_owned(), Some(manifest.manifest.machine))),
        None => Err(wrong("is a replica that is not in a process server's folder")),
    }
}

fn failed(error: &dyn std::error::Error, help: &str) -> Failure {
    Failure::from_error(FailureKind::Failed, error, help)
}

/// Takes a machine over at a point, under a new generation. The process server must not run. Where its images are to go is
/// tried before its old host is refused. Blocks.
pub fn failover(
    folder: &Path,
    machine: Option<&str>,
    selector: PointSelector,
    without: &[DiskId],
    to: Option<&Path>,
    key: &RecoveryKey,
) -> Result<FailedOver, Failure> {
    let Opened { storage, lock, set, failures, settings, machine } = open(folder, machine, key)?;
    refuse_unopened(&storage, &failures, machine, without)?;
    let mut place = set.resolve(machine, selector).map_err(|error| {
        let help = error.help();
        failed(&error, help)
    })?;
    place.cuts.retain(|(disk, _)| !without.contains(disk));
    if place.cuts.is_empty() {
        return Err(Failure::new(
            FailureKind::BadRequest,
            "no disk of the point is left",
            "leave out fewer disks with --without-disk, or choose another point",
        ));
    }
    let replicas = set.of_machine(machine);
    let missing: Vec<String> = place
        .cuts
        .iter()
        .filter(|(disk, _)| !replicas.iter().any(|replica| replica.disk() == *disk))
        .map(|(disk, _)| disk.to_string())
        .collect();
    if !missing.is_empty() {
        return Err(Failure::new(
            FailureKind::Damaged,
            format!("the replicas of these disks of the point cannot be opened: {}", missing.join(", ")),
            "see `tidemark replica verify` on them; choose another point, or bring the folder back from a copy",
        ));
    }
    // Every disk of the point can be opened before anything is changed.
    let views = set.views(&place).map_err(|error| {
        let help = error.help();
        failed(&error, help)
    })?;
    if let Some(to) = to {
        let disks: Vec<DiskId> = place.cuts.iter().map(|(disk, _)| *disk).collect();
        try_targets(to, &disks)?;
    }
    let name = settings.get(&machine).map_or_else(|| machine.to_string(), |settings| settings.name.clone());
    let record = take_over(&set, &storage, machine, name, &place, key)?;
    drop(views);
    Ok(FailedOver { record, set, place, storage, _lock: lock })
}

struct Opened {
    storage: Arc<dyn Storage>,
    lock: Arc<dyn StorageFile>,
    set: Arc<ReplicaSet>,
    failures: Vec<OpenFailure>,
    settings: BTreeMap<MachineId, settings::MachineSettings>,
    machine: MachineId,
}

/// The process server's folder, for whoever holds the recovery key, and alone.
fn open(folder: &Path, machine: Option<&str>, key: &RecoveryKey) -> Result<Opened, Failure> {
    let (root, of_folder) = resolve_folder(folder)?;
    let storage = RealStorage::open_folder(&root);
    let break_glass = backups::recovery(storage.clone())?.break_glass.ok_or_else(|| {
        Failure::new(
            FailureKind::Conflict,
            "this process server was never told a break-glass key: it comes with the first backup of the configuration",
            "fail over with the configuration server, or restore that first: `tidemark config-server restore`",
        )
    })?;
    let is_right = key.keeper().map(|keeper| keeper.break_glass() == break_glass);
    if !is_right.map_err(|error| failed(&error, error.help()))? {
        return Err(Failure::new(
            FailureKind::Conflict,
            "the recovery key is not that of this installation",
            "use the key that `tidemark config-server init` showed, or the newest that was made since",
        ));
    }
    let help = "stop it first: an offline failover is alone with the replicas";
    let lock = lock_folder(&*storage, "a process server", help)?;
    let (set, failures) = ReplicaSet::open(storage.clone(), Limits::default()).map_err(|error| {
        let help = error.help();
        failed(&error, help)
    })?;
    let set = Arc::new(set);
    let settings = Settings::open(storage.clone(), settings::FILE).map_err(|error| failed(&error, error.help()))?.all();
    let machine = choose(&set, &settings, of_folder, machine)?;
    Ok(Opened { storage, lock, set, failures, settings, machine })
}

/// Half a machine is not failed over by accident: a disk of it that cannot be opened has to be left out by name.
fn refuse_unopened(
    storage: &Arc<dyn Storage>,
    failures: &[OpenFailure],
    machine: MachineId,
    without: &[DiskId],
) -> Result<(), Failure> {
    if failures.is_empty() {
        return Ok(());
    }
    let authorisations = Authorisations::open(storage.clone()).map_err(|error| failed(&error, error.help()))?;
    for failure in failures {
        let disk: Option<DiskId> = failure.folder.rsplit('/').next().and_then(|name| name.parse().ok());
        let manifest = Manifest::load(&*RealStorage::open_folder(&failure.folder)).ok();
        let known = manifest.map(|loaded| loaded.manifest.machine);
        let known = known.or_else(|| Some(authorisations.get(disk?)?.machine));
        // One of which nobody knows whose it is may be of this machine.
        let is_other = known.is_some_and(|known| known != machine);
        if is_other || disk.is_some_and(|disk| without.contains(&disk)) {
            tracing::warn!(folder = failure.folder, error = %failure.error, "a replica cannot be opened");
            continue;
        }
        let disk = disk.map_or_else(|| failure.folder.clone(), |disk| disk.to_string());
        return Err(Failure::new(
            FailureKind::Damaged,
            format!("the replica of disk {disk} cannot be opened: {}", failure.error),
            format!(
                "see `tidemark replica verify` on it, or bring its folder back from a copy; to go on without it: --without-disk {disk}"
            ),
        ));
    }
    Ok(())
}

/// Gives back what a failover holds: its point may be folded away, and its record is gone. The old host stays refused until a
/// configuration server lets it write again, under a generation of its own. Blocks.
pub fn release(folder: &Path, machine: Option<&str>, key: &RecoveryKey) -> Result<Record, Failure> {
    let Opened { storage, lock: _lock, set, settings: _, failures: _, machine } = open(folder, machine, key)?;
    let table = Table::<BTreeMap<MachineId, Record>>::open(storage, RECORDS_FILE)
        .map_err(|error| failed(&error, error.help()))?;
    let record = table.read(|records| records.get(&machine).cloned()).ok_or_else(|| {
        Failure::new(
            FailureKind::NotFound,
            format!("machine {machine} was not failed over here"),
            "see `failovers.json` in the process server's folder for those that were",
        )
    })?;
    give_back(&table, &set, machine)?;
    Ok(record)
}

fn choose(
    set: &ReplicaSet,
    settings: &BTreeMap<MachineId, settings::MachineSettings>,
    of_folder: Option<MachineId>,
    wanted: Option<&str>,
) -> Result<MachineId, Failure> {
    let mut there: Vec<MachineId> = set.replicas().iter().map(|replica| replica.machine()).collect();
    there.sort();
    there.dedup();
    let name = |id: &MachineId| settings.get(id).map_or_else(|| id.to_string(), |settings| settings.name.clone());
    let fits = |id: &&MachineId| match wanted {
        Some(wanted) => id.to_string() == wanted || name(id) == wanted,
        None => of_folder.is_none_or(|machine| machine == **id),
    };
    // Also those that were unprotected and whose replica was kept: by name alone nobody tells them apart.
    let described = |id: &MachineId| {
        let bytes: u64 = set.of_machine(*id).iter().map(|replica| replica.disk_bytes()).sum();
        let newest = set.points(*id).ok().and_then(|points| points.list().last().map(|point| point.time));
        let newest = newest.map_or("no points".to_owned(), |time| format!("newest point {time}"));
        format!("{} ({id}, {bytes} bytes, {newest})", name(id))
    };
    let described = |ids: &[MachineId]| ids.iter().map(described).collect::<Vec<_>>().join("; ");
    let fitting: Vec<MachineId> = there.iter().filter(fits).copied().collect();
    let (what, help) = match fitting[..] {
        [machine] if of_folder.is_none_or(|of| of == machine) => return Ok(machine),
        [] if wanted.is_some() => (
            format!("there is no such machine here; there are: {}", described(&there)),
            "name one of them with --machine",
        ),
        [_] => (
            format!("the folder is of another machine; there are: {}", described(&there)),
            "name the process server's own folder",
        ),
        [] => (format!("there is no replica of a machine here; there are: {}", described(&there)), "see the folder"),
        _ => (
            format!("several machines could be meant: {}", described(&fitting)),
            "name one of them by its id: --machine ID",
        ),
    };
    Err(Failure::new(FailureKind::BadRequest, what, help))
}

fn take_over(
    set: &ReplicaSet,
    storage: &Arc<dyn Storage>,
    machine: MachineId,
    name: String,
    place: &Place,
    key: &RecoveryKey,
) -> Result<Record, Failure> {
    let authorisations = Authorisations::open(storage.clone()).map_err(|error| failed(&error, error.help()))?;
    let table = Table::<BTreeMap<MachineId, Record>>::open(storage.clone(), RECORDS_FILE)
        .map_err(|error| failed(&error, error.help()))?;
    let before = table.read(|records| records.get(&machine).cloned());
    let replica_of =
        |disk: DiskId| -> Result<Arc<Replica>, Failure> { set.get(disk).map_err(|error| failed(&error, error.help())) };
    let mut disks = BTreeMap::new();
    for &(disk, cut) in &place.cuts {
        let replica = replica_of(disk)?;
        replica.pin(HOLDER, cut, Timestamp::now()).map_err(|error| failed(&error, error.help()))?;
        let known = authorisations.get(disk);
        let highest = known.map_or(replica.generation(), |known| known.generation.max(replica.generation()));
        // Another point of a machine that was failed over already: its generation stands.
        let taken = before.as_ref().and_then(|record| record.disks.get(&disk)).map(|disk| disk.generation);
        let generation = taken.filter(|taken| *taken == highest).unwrap_or(Generation(highest.0 + 1));
        disks.insert(disk, FailedOverDisk { cut, generation });
    }
    for (disk, FailedOverDisk { generation, .. }) in &disks {
        let replica = replica_of(*disk)?;
        if let Some(known) = authorisations.get(*disk) {
            let raised = Authorisation { generation: *generation, ..known };
            authorisations.authorise(*disk, raised).map_err(|error| failed(&error, error.help()))?;
        }
        let current = replica.generation();
        if current < *generation {
            replica.advance_generation(current, *generation).map_err(|error| failed(&error, error.help()))?;
        }
    }
    let (point, point_time, at) = (place.id, place.time, Timestamp::now());
    let mut record = Record { machine, name, point, point_time, disks, at, signature: String::new() };
    let signature = key.sign(&record.message()).map_err(|error| failed(&error, error.help()))?;
    record.signature = signature.iter().map(|byte| format!("{byte:02x}")).collect();
    table
        .change(|records| {
            records.insert(machine, record.clone());
            Ok(())
        })
        .map_err(|error: crate::table::TableError| failed(&error, error.help()))?;
    Ok(record)
}

impl FailedOver {
    fn disks(&self) -> Result<Vec<(DiskId, Arc<dyn Disk>)>, Failure> {
        let views = self.set.views(&self.place).map_err(|error| {
            let help = error.help();
            failed(&error, help)
        })?;
        Ok(views.into_iter().map(|(disk, view)| (disk, Arc::new(view) as Arc<dyn Disk>)).collect())
    }

    /// Writes the point's disks as raw images: to the file `to`, or into the folder `to`. Blocks.
    pub fn export(&self, to: &Path, stop: &Stop) -> Result<Exported, Failure> {
        let disks = self.disks()?;
        let ids: Vec<DiskId> = disks.iter().map(|(disk, _)| *disk).collect();
        let paths = targets(to, &ids, ImageFormat::Raw)?;
        let mut files = Vec::new();
        for ((disk, view), path) in disks.iter().zip(paths) {
            let image = export_raw(&**view, &path, stop)?;
            files.push(ExportedFile { id: *disk, path: path.display().to_string(), bytes: image.bytes });
        }
        Ok(Exported { point: self.place.id.unwrap_or_else(MarkId::random), time: self.place.time, files })
    }

    /// Serves the point's disks, read-only, over NBD on a socket, until what is returned is dropped. Blocks.
    pub fn serve(&self, socket: &Path) -> Result<(Serving, impl Drop + use<>), Failure> {
        let serves = Serves::open(self.storage.clone(), socket)?;
        let point = ServedPoint {
            machine: self.record.machine,
            point: self.place.id.unwrap_or_else(MarkId::random),
            time: self.place.time,
            writable: false,
            listen: None,
            disks: self.disks()?,
            held: None,
        };
        let serving = serves.start(ServeId::random(), point, false)?;
        Ok((serving, StopAll(serves)))
    }
}

struct StopAll(Serves);

impl Drop for StopAll {
    fn drop(&mut self) {
        self.0.stop_all();
    }
}
