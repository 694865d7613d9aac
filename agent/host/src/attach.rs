//! What an attach takes over from the session before it: one table ([`decide()`]), every row tested.
//!
//! After a crash the disk is the truth. The question is only where the replica may differ from it: nowhere beyond the log
//! (the log goes on), in what was in flight (slots), in what the log or the page cache may have lost (intent regions), in
//! what a log held that cannot be read back (as its companion names it, or the unshipped regions), or anywhere (the whole disk).
//!
//! **A disk that grew** while it was attached, and was left cleanly, is the same disk with a longer end. Whoever left it saw that it was
//! never shorter, and stored its times of after the growing: they prove that nobody wrote since, as they do for a disk that did
//! not grow. So its log, epoch and regions go on. They are read at the size of the session before, whose file says it, and
//! written at the new one; what they name stays named. Of the new end they know nothing: it is added to the scan of each
//! consumer, durably, before the session is stored with the new size. A crash before that finds the session of the smaller
//! disk, and scans that may be of the larger one already, with their bits and the new end in them: it grows again, to the same
//! end. A dirty bitmap of the new size beside a session of the old one counts as lost, and the unshipped regions name what it
//! held. One that grew while nobody was attached, that was not left cleanly, or that has no times (a block device) is compared
//! whole: rule 3.6 asks for a proof, and there is none.

mod decide;
mod remains;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use tidemark_base::disk::{Access, Disk, FileDisk};
use tidemark_base::sabotage;
use tidemark_base::storage::{OpenMode, RealStorage, Storage, StorageFile};
use tidemark_base::sync::Mutex;
use tidemark_base::{Clock, DiskId, Epoch, Extent, ExtentSet, Generation, MachineId, ServerId, Timestamp};

use crate::capture::in_flight::InFlight;
use crate::capture::splitter::log_from_disk;
use crate::capture::tracker::Tracker;
use crate::consumer::Consumer;
use crate::error::HostError;
use crate::events::{DiskEvents, EventKind, Events, Severity};
use crate::log::{DiskLog, Found, LogLimits, LogPlace, Unlogged, logs_in, remove_log};
use crate::protected::{Lost, ProtectedDisk, insert_granules, lost_file, push_epoch};
use crate::source::{ScanReason, ScanRevision, SourceIdentity, Watchers};
use crate::state::dirty::DirtyBitmap;
use crate::state::intent::{Intent, IntentFound};
use crate::state::sealed::SealedFile;
use crate::state::session::{self, Boot, Mode, MountIdentity, Session, SessionFile, SessionId};
use crate::state::slots::{self, SlotTable};
pub use decide::{Before, Decision, DiskFound, Evidence, LogFound, Why, Written, decide};
use remains::{Places, Remains};

/// Everything that an attach needs to know.
pub struct AttachRequest {
    pub disk: DiskId,
    pub machine: MachineId,
    pub generation: Generation,
    pub path: PathBuf,
    /// Where others write to the disk: what tells of it, at work already.
    pub tracker: Option<Arc<dyn Tracker>>,
    /// Where state and logs of block devices are kept, each in a folder named after its id.
    pub device_folder: PathBuf,
    /// Another volume than the disk's, if there is one.
    pub elsewhere: Arc<dyn Storage>,
    /// The process servers that the disk feeds.
    pub consumers: Vec<ServerId>,
    pub limits: LogLimits,
    /// What its logs never take more of.
    pub log_bytes_max: u64,
    pub boot: Boot,
    pub clock: Arc<dyn Clock>,
    pub events: Arc<Events>,
}

/// A disk that is attached, and what the attach found.
pub struct Attached {
    pub disk: Arc<ProtectedDisk>,
    pub decision: Decision,
    /// What was added to the scans for it.
    pub scan_bytes: u64,
    /// Marks that a power loss took: they never become recovery points.
    pub lost_marks: usize,
}

/// Opens a disk and takes over what the session before left, by the table of [`decide()`].
///
/// 1. the disk is locked
/// 2. the remains are read, and logs that were not closed are cut and closed
/// 3. where a new epoch begins, the disk is synced
/// 4. by the decision: what must be scanned is added to each consumer's scan, durably, or ranges in flight are logged
///    again, in a new log (where none can be made, they are marked dirty)
/// 5. the slots begin anew
/// 6. the session is stored
/// 7. the intent bitmap begins anew
/// 8. logs that nobody needs are removed
/// 9. a tracker is armed: it is a witness for this session from here on
///
/// Crash before 6: the session before still stands and is not clean, the slots are not its own any more (or still are): the
/// next attach decides at least as much. After 6: this session stands, not clean.
pub fn attach(request: AttachRequest) -> Result<Attached, HostError> {
    let disk = Arc::new(match &request.tracker {
        None => crate::capture::images::open(&request.path)?,
        Some(tracker) => match tracker.reader() {
            None => FileDisk::open(&request.path, Access::Observe)?,
            Some(reader) => FileDisk::through(&request.path, reader)?,
        },
    });
    let places = Places::of(&request, disk.is_block_device())?;
    let identity = disk.identity().map_err(places.failed("examine the disk"))?;
    let mount = MountIdentity::of(&places.state.path("")).map_err(places.failed("examine the folder"))?;
    let now = request.clock.wall_now();
    let source = SourceIdentity {
        disk: request.disk,
        machine: request.machine,
        generation: request.generation,
        disk_bytes: disk.bytes(),
    };
    let events = DiskEvents { events: request.events.clone(), machine: request.machine, disk: request.disk };

    clear_state_of_another(&places, request.disk).map_err(places.failed("clear the folder"))?;
    let (lost_file, lost) = open_lost(&request)?;
    let mut remains = Remains::read(&places, &source)?;
    let consumers = open_consumers(&places, &request, remains.known_bytes(disk.bytes()), disk.bytes())?;
    let mut evidence = Evidence {
        before: Before::Nothing,
        disk: DiskFound::Same,
        written: Written::Unwitnessed,
        was_logging: false,
        has_history: false,
        log: LogFound::Unknown,
        has_dirty: false,
        has_intent: false,
    };
    if let Some(session) = remains.session.take() {
        evidence = remains.examine(&session, &identity, mount, &request.boot, now);
        evidence.has_intent &= !lost.intent;
        let witnessed = request.tracker.as_ref().and_then(|tracker| tracker.witnessed());
        if witnessed == Some(session.session.0) {
            evidence.written = Written::No;
        }
        // What one of several acknowledged says nothing about the others.
        let cursor = if let [consumer] = &*consumers { consumer.cursor() } else { None };
        evidence.log = remains.read_logs(&places, &session, &evidence, cursor.as_ref(), now)?;
        let wants_records = |end| consumers.iter().any(|consumer| consumer.wants_records_of(&end));
        evidence.has_history = remains.end().is_some_and(wants_records);
        remains.session = Some(session);
    }
    let mut decision = decide(&evidence);
    if decision == Decision::ScanWhole(Why::First) && consumers.iter().any(|consumer| consumer.cursor().is_some()) {
        // A consumer's file tells that this disk was fed before.
        decision = Decision::ScanWhole(Why::StateDamaged);
    }

    // What is scanned is read from the page cache, and process servers have it then. Programs that wrote it before, or a
    // session that was killed, may not have synced it: a power cut would take it from the disk, and no bit would name it.
    let is_synced = decision.is_same_epoch()
        || sabotage::is("attach-sync")
        || match disk.flush() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(disk = %request.disk, %error, "the disk cannot be synced: a power cut costs a compare of all of it");
                false
            }
        };

    // What must be scanned, before anything is forgotten.
    let in_flight = remains.in_flight(disk.bytes());
    let mut scan_bytes = 0;
    let scans = what_to_scan(&mut decision, &remains, &places, &request, &consumers, &source, &evidence);
    for (consumer, scan) in consumers.iter().zip(&scans) {
        scan_bytes = scan.total_bytes().max(scan_bytes);
        // One that holds nothing is to be scanned whole already, and its reason is worth keeping: zeroes need not be sent.
        if !scan.is_empty() && !consumer.holds_nothing() {
            let reason = reason_of(decision, &evidence);
            consumer.add(scan, reason, ScanRevision(1)).map_err(places.failed("mark blocks"))?;
        }
    }
    let dirty = match remains.dirty.take() {
        Some(dirty) if dirty.disk_bytes() == disk.bytes() => dirty,
        // Of the disk before it grew: what it held is in the scans.
        _ => {
            let file = emptied(&*places.state, "dirty").map_err(places.failed("make the dirty bitmap"))?;
            DirtyBitmap::create(file, disk.bytes()).map_err(places.failed("make the dirty bitmap"))?
        }
    };

    // The log.
    let mut epochs = remains.session.as_ref().map(|session| session.epochs.clone()).unwrap_or_default();
    let old_logs = logs_in(&*places.logs, &places.stem).map_err(places.failed("list the logs"))?;
    let is_same_epoch = decision.is_same_epoch();
    if !is_same_epoch {
        let held: Vec<Epoch> = consumers.iter().filter_map(|consumer| Some(consumer.cursor()?.epoch)).collect();
        push_epoch(&mut epochs, Epoch::random(), &held);
        remains.logs.clear();
        remains.last = None;
        remains.marked = None;
    }
    let start = remains.end().unwrap_or_else(|| epochs[epochs.len() - 1].start());
    let kept: Vec<u64> = remains.logs.iter().map(|log| log.name.number).collect();
    let newest = remains.newest.max(remains.session.as_ref().map_or(Timestamp(0), |session| session.newest));
    let (log, no_log) = DiskLog::start(
        LogPlace {
            storage: places.logs.clone(),
            stem: places.stem.clone(),
            disk: request.disk,
            disk_bytes: disk.bytes(),
            clock: request.clock.clone(),
        },
        request.limits,
        start,
        Found {
            closed: std::mem::take(&mut remains.logs),
            last: remains.last.take(),
            newest,
            marked: remains.marked,
            next_number: old_logs.last().map_or(1, |name| name.number + 1),
            is_ended: decision == Decision::StayInBitmap,
        },
    );
    let mut unlogged = no_log;
    if is_same_epoch && !in_flight.is_empty() {
        if unlogged.is_none() {
            unlogged = log_from_disk(&*disk, &log, &in_flight).err();
        }
        if unlogged.is_some() {
            in_flight.iter().for_each(|extent| dirty.mark(*extent));
        }
    }
    let mode = match (&unlogged, &remains.session) {
        (None, _) => Mode::Data,
        (Some(Unlogged::NotLogging), Some(Session { mode: mode @ Mode::Bitmap { .. }, .. })) => mode.clone(),
        (Some(reason), _) => Mode::Bitmap { reason: reason.text() },
    };

    // This session.
    // Whatever the mount: a service in a namespace of its own sees another one at each start.
    let sync_failed =
        remains.session.as_ref().is_some_and(|before| before.sync_failed && before.boot.id == request.boot.id);
    let session = Session {
        version: session::VERSION,
        disk: request.disk,
        session: SessionId::random(),
        boot: request.boot,
        mount,
        epochs,
        mode: mode.clone(),
        identity,
        newest,
        clean: None,
        intent_lost: false,
        sync_failed,
    };
    let slots_file =
        preallocated(&*places.state, "slots", slots::FILE_BYTES).map_err(places.failed("make the slots"))?;
    let intent_file = preallocated(&*places.state, "intent", Intent::file_bytes(disk.bytes()))
        .map_err(places.failed("make the intent bitmap"))?;
    places.state.sync_folder("").map_err(places.failed("sync the folder"))?;
    let slot_table = slots_file
        .as_file()
        .ok_or_else(|| io::Error::other("the slot table needs a file that can be mapped"))
        .and_then(|file| SlotTable::start(file, session.session, now))
        .map_err(places.failed("map the slots"))?;
    let session = SessionFile::begin(places.state.clone(), session).map_err(places.failed("store the session"))?;
    let intent = begin_intent(intent_file, &source, decision, &evidence, remains.intent.take(), is_synced)
        .map_err(places.failed("make the intent bitmap"))?;
    if mode == Mode::Data && is_same_epoch {
        intent.kept_reach(log.published().logged.sequence);
    }
    if decision != Decision::StayInBitmap && (mode == Mode::Data || !is_same_epoch) {
        dirty.clear_all();
    }
    let lost_file = Lost::settle(lost_file, lost).map_err(places.failed("forget a lost intent bitmap"))?;
    for name in old_logs.iter().filter(|name| !kept.contains(&name.number)) {
        remove_log(&*places.logs, name).map_err(places.failed("remove an old log"))?;
    }
    tracing::info!(disk = %request.disk, path = %request.path.display(), ?decision, epoch = %start.epoch, "disk attached");
    tell(&events, &request.path, decision, &evidence, &remains, in_flight.len(), scan_bytes);
    if let Some(tracker) = &request.tracker {
        tracker.arm(session.current().session.0);
    }
    let attached = request.clock.monotonic_now();
    let disk = Arc::new(ProtectedDisk {
        identity: source,
        path: request.path,
        disk,
        state: places.state.clone(),
        lost: Mutex::new(lost_file),
        owed: Mutex::default(),
        log: Arc::new(log),
        tracker: request.tracker,
        gathering: Mutex::default(),
        in_flight: InFlight::new(slot_table),
        intent,
        dirty,
        consumers: Mutex::new(consumers),
        watchers: Watchers::default(),
        clock: request.clock,
        attached,
        log_bytes_max: request.log_bytes_max,
        session: Mutex::new(session),
        mode: Mutex::new(Mode::Data),
        adding: Mutex::new(()),
        revision: AtomicU64::new(1),
        changing_epoch: Mutex::new(()),
        closed: AtomicBool::new(false),
        writes: AtomicU64::new(0),
        written_bytes: AtomicU64::new(0),
        keeper: Mutex::default(),
        alarms: Mutex::default(),
        events,
        write_failures: AtomicBool::new(false),
        importing: AtomicBool::new(false),
        has_shrunk: AtomicBool::new(false),
        barrier: OnceLock::new(),
    });
    if let Some(reason) = unlogged {
        disk.begin_in_bitmap(&reason, mode);
    }
    Ok(Attached { disk, decision, scan_bytes, lost_marks: remains.lost_marks })
}

/// What a new epoch leaves to the scan of each consumer. A log that cannot be read back after all makes the decision a graver
/// one, for all of them.
fn what_to_scan(
    decision: &mut Decision,
    remains: &Remains,
    places: &Places,
    request: &AttachRequest,
    consumers: &[Arc<Consumer>],
    source: &SourceIdentity,
    evidence: &Evidence,
) -> Vec<ExtentSet> {
    let mut common = ExtentSet::new();
    if let DiskFound::Grown { from, to } = evidence.disk {
        common.insert(Extent::new(from, to - from));
    }
    let dirty = remains.dirty.iter().flat_map(|dirty| dirty.extents().iter().collect::<Vec<_>>());
    match *decision {
        // Their log goes on, and so does their bitmap.
        Decision::StayInBitmap => return vec![common; consumers.len()],
        Decision::Continue | Decision::ReadSlots => {
            dirty.for_each(|extent| common.insert(extent));
            return vec![common; consumers.len()];
        }
        Decision::ScanWhole(_) => return vec![whole(source); consumers.len()],
        Decision::ScanDirty | Decision::ScanTouched | Decision::ScanUnshipped => {}
    }
    dirty.for_each(|extent| common.insert(extent));
    let in_flight = remains.in_flight(source.disk_bytes);
    in_flight.iter().for_each(|extent| insert_granules(&mut common, *extent));
    remains.held.iter().for_each(|extent| insert_granules(&mut common, extent));
    let mut scans = vec![common; consumers.len()];
    for (consumer, scan) in consumers.iter().zip(&mut scans) {
        if let Err(error) = remains.unacknowledged(places, request, consumer.cursor().as_ref(), scan) {
            tracing::warn!(disk = %request.disk, error = %error, "the old log cannot be read");
            *decision = match evidence.has_intent {
                true => Decision::ScanUnshipped,
                false => Decision::ScanWhole(Why::LogUnusable),
            };
        }
    }
    for scan in &mut scans {
        let intent = remains.intent.iter().flat_map(|found| found.intent.iter());
        let unshipped = remains.intent.iter().flat_map(|found| found.unshipped.iter());
        match decision {
            Decision::ScanTouched => intent.for_each(|extent| scan.insert(extent)),
            Decision::ScanUnshipped => intent.chain(unshipped).for_each(|extent| scan.insert(extent)),
            Decision::ScanWhole(_) => *scan = whole(source),
            _ => {}
        }
        // Granules reach past the end of a disk that does not end with one.
        scan.remove(Extent::new(source.disk_bytes, u64::MAX - source.disk_bytes));
    }
    scans
}

fn whole(source: &SourceIdentity) -> ExtentSet {
    ExtentSet::from_iter([Extent::new(0, source.disk_bytes)])
}

fn reason_of(decision: Decision, evidence: &Evidence) -> ScanReason {
    match decision {
        // The new end is not known to differ.
        _ if matches!(evidence.disk, DiskFound::Grown { .. }) => ScanReason::Unclean,
        Decision::Continue | Decision::ReadSlots | Decision::StayInBitmap => ScanReason::Dirty,
        Decision::ScanDirty if evidence.log == LogFound::Sound => ScanReason::Dirty,
        Decision::ScanDirty | Decision::ScanUnshipped => ScanReason::LogDamaged,
        Decision::ScanTouched | Decision::ScanWhole(_) => ScanReason::Unclean,
    }
}

/// Regions whose sync is still owed keep their bits; where a new epoch begins they are in the scans, and `is_synced` says
/// that the disk was synced since.
fn begin_intent(
    file: Arc<dyn StorageFile>,
    source: &SourceIdentity,
    decision: Decision,
    evidence: &Evidence,
    found: Option<IntentFound>,
    is_synced: bool,
) -> io::Result<Intent> {
    let all = || whole(source);
    let found =
        found.filter(|_| evidence.has_intent).unwrap_or_else(|| IntentFound { intent: all(), unshipped: all() });
    let kept = match (decision.is_same_epoch(), evidence.before) {
        (false, _) if is_synced => IntentFound::default(),
        (false, _) => IntentFound { intent: all(), unshipped: ExtentSet::new() },
        (true, Before::Clean) => IntentFound { intent: ExtentSet::new(), unshipped: found.unshipped },
        (true, _) => found,
    };
    Intent::start(file, source.disk_bytes, &kept)
}

/// Says what was found and decided, once.
fn tell(
    events: &DiskEvents,
    path: &Path,
    decision: Decision,
    evidence: &Evidence,
    remains: &Remains,
    in_flight: usize,
    scan_bytes: u64,
) {
    let path = path.display();
    let log = remains.defect.as_deref().unwrap_or("the log cannot be read");
    let was = match evidence.before {
        Before::Killed => "after its agent was killed",
        _ => "where it was left",
    };
    let (severity, kind, message, help) = match decision {
        Decision::Continue => {
            (Severity::Information, EventKind::DiskContinued, format!("disk {path} goes on where it was left"), "")
        }
        Decision::ReadSlots => (
            Severity::Warning,
            EventKind::AgentWasKilled,
            format!(
                "disk {path} goes on after its agent was killed: {in_flight} writes in flight were logged again, nothing is compared"
            ),
            "",
        ),
        Decision::StayInBitmap => (
            Severity::Warning,
            EventKind::DiskContinued,
            format!("disk {path} goes on {was}, without a log until the process server took what the old one holds"),
            "",
        ),
        Decision::ScanDirty if evidence.log == LogFound::Sound => (
            Severity::Warning,
            EventKind::DiskContinued,
            format!("disk {path} goes on {was}: {scan_bytes} bytes that changed without a log are read again"),
            "",
        ),
        Decision::ScanTouched => (
            Severity::Warning,
            EventKind::PowerWasLost,
            format!(
                "the power was lost, or something like it, while disk {path} was in use: {scan_bytes} bytes of regions that may differ are compared"
            ),
            "",
        ),
        Decision::ScanDirty | Decision::ScanUnshipped => (
            Severity::Warning,
            if evidence.has_dirty { EventKind::LogDamaged } else { EventKind::StateDamaged },
            format!("{log}: {scan_bytes} bytes of disk {path} that it may have held are compared"),
            Why::LogUnusable.help(),
        ),
        Decision::ScanWhole(why) => {
            (why.severity(), why.event(), format!("the whole of disk {path} is compared: {why}"), why.help())
        }
    };
    events.publish(severity, kind, message, help);
    if let (DiskFound::Grown { from, to }, false) = (evidence.disk, matches!(decision, Decision::ScanWhole(_))) {
        let message = format!("disk {path} grew from {from} to {to} bytes: its new end is compared");
        events.publish(Severity::Information, EventKind::DiskResized, message, "");
    }
    if remains.lost_marks > 0 {
        let message = format!(
            "{} marks of disk {path} that were made shortly before the machine went down are lost",
            remains.lost_marks
        );
        let help = "recovery points of that time may be missing; later ones are not affected";
        events.publish(Severity::Warning, EventKind::MarksLost, message, help);
    }
}

/// A crash between forgetting a disk and removing its state leaves that behind: what it tells is of a disk that was this one
/// under another id, with a replica of its own.
fn clear_state_of_another(places: &Places, disk: DiskId) -> io::Result<()> {
    if SessionFile::peek(&places.state)?.is_none_or(|session| session.disk == disk) {
        return Ok(());
    }
    for name in logs_in(&*places.logs, &places.stem)? {
        remove_log(&*places.logs, &name)?;
    }
    // The session last: while it is there, this is done again.
    let names = places.state.list("")?;
    let is_session = |name: &&String| name.starts_with(session::FILE);
    for name in names.iter().filter(|name| !is_session(name)).chain(names.iter().filter(is_session)) {
        places.state.remove(name)?;
    }
    places.state.sync_folder("")
}

/// The file on another volume that says whether the intent bitmap is kept.
fn open_lost(request: &AttachRequest) -> Result<(SealedFile<Lost>, Lost), HostError> {
    let opened = SealedFile::open(request.elsewhere.clone(), &lost_file(request.disk), Lost::SLOT_BYTES);
    let (file, found) = opened.map_err(|source| HostError::State {
        what: "keep a file",
        folder: request.elsewhere.path(""),
        source,
    })?;
    Ok((file, found.unwrap_or_default()))
}

/// Removes the logs and the state of a disk that is not protected any more. The disk is not attached.
pub fn remove_state(path: &Path, device_folder: &Path, elsewhere: &dyn Storage, disk: DiskId) -> io::Result<()> {
    if elsewhere.exists(&lost_file(disk))? {
        elsewhere.remove(&lost_file(disk))?;
    }
    // As at attach: beside the file itself, not beside a link to it.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let device = device_folder.join(disk.to_string());
    if device.exists() {
        return RealStorage::open_folder(device_folder).remove_folder(&disk.to_string());
    }
    let (Some(folder), Some(stem)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let storage = RealStorage::open_folder(folder);
    for name in logs_in(&*storage, stem)? {
        remove_log(&*storage, &name)?;
    }
    let state = format!("{stem}.tidemark");
    if storage.exists(&state)? {
        storage.remove_folder(&state)?;
    }
    storage.sync_folder("")
}

/// What a process server acknowledged that is not fed any more says nothing: changes would be missed if it came back, so
/// it is scanned whole then.
fn forget_other_consumers(state: &dyn Storage, consumers: &[ServerId]) -> io::Result<()> {
    for name in state.list("")? {
        let of = ["consumer-", "scan-", "kept-"].iter().find_map(|kind| name.strip_prefix(kind));
        if of.is_some_and(|of| consumers.iter().all(|consumer| of != consumer.to_string())) {
            state.remove(&name)?;
        }
    }
    state.sync_folder("")
}

fn open_consumers(
    places: &Places,
    request: &AttachRequest,
    known_bytes: u64,
    disk_bytes: u64,
) -> Result<Vec<Arc<Consumer>>, HostError> {
    let open = |server: &ServerId| -> io::Result<Arc<Consumer>> {
        Ok(Arc::new(match Consumer::open_grown(places.state.clone(), *server, known_bytes, disk_bytes)? {
            Some(consumer) => consumer,
            None => Consumer::create(places.state.clone(), *server, disk_bytes)?,
        }))
    };
    forget_other_consumers(&*places.state, &request.consumers)
        .and_then(|()| request.consumers.iter().map(open).collect())
        .map_err(places.failed("keep the consumers' state"))
}

fn emptied(state: &dyn Storage, name: &str) -> io::Result<Arc<dyn StorageFile>> {
    let file = state.open(name, OpenMode::OpenOrCreate)?;
    file.set_bytes(0)?;
    Ok(file)
}

/// A file of exactly this size whose blocks are all there, so that no store to it can lack room. What it holds stays.
fn preallocated(state: &dyn Storage, name: &str, bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
    let file = state.open(name, OpenMode::OpenOrCreate)?;
    let found = file.bytes()?;
    if found > bytes {
        file.set_bytes(bytes)?;
    } else if found < bytes {
        file.write_at(found, &vec![0; (bytes - found) as usize])?;
    }
    file.sync()?;
    Ok(file)
}
