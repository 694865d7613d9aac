//! What logs that were not closed are worth after a crash.
//!
//! The companion is the authority: nothing in an unclosed `.hrl` file is searched for. Each record is checked by its tag,
//! its place in the history and its data's digest. What then holds:
//!
//! | cause | all durable records intact | the companion ends | decision |
//! |---|---|---|---|
//! | process killed | yes | after a record | keep all |
//! | process killed | yes | within a record | cut that record: it was never acknowledged |
//! | process killed | yes | otherwise: a whole slot (also of zeroes) or data that does not verify | damaged: a killed process leaves no such thing |
//! | power loss | yes | anyhow | keep what was durable, discard the rest |
//! | either | no | anyhow | damaged |
//!
//! *Consistency.* [`Examination::examine`] only reads. [`Examination::finish`] cuts and closes, so that only closed logs
//! remain; call it when the verdict is durable elsewhere, because afterwards a second examination finds nothing wrong.
//! *Retries.* Both can be repeated. *Cancellation.* Between logs; what is done stays done. *Crash.* Until a log is
//! closed an examination finds the same again, less a tail that was already cut.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::{DiskId, Epoch, Extent, ExtentSet, Position, Sequence, Timestamp};

use crate::companion::{RECORDS_OFFSET, Reached};
use crate::error::{LogError, Result};
use crate::format::{HEADER_BYTES, HrlFile, METADATA_BYTES, SetBuilder, zero_parts};
use crate::log::{Log, Parts, SyncState, io_error, reached_at_start};
use crate::name::LogName;
use crate::reader::{Control, Record, RecordKind, Scan, Step};

/// How the process that wrote the log ended. Boot id and session file tell one from the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The page cache survived.
    ProcessKilled,
    /// Only what was synced is certain.
    PowerLoss,
}

/// What the examination found, over all logs of the disk that were not closed.
#[derive(Debug)]
pub enum Verdict {
    /// No log was open.
    NothingOpen,
    /// Every record that was published is there.
    Kept { end: Position },
    /// History goes on in a new epoch after `end`: what came after it was not durable.
    Cut { end: Position, discarded_records: u64, lost_marks: Vec<LostMark> },
    /// Records from `from` on, of the epoch of `end`, cannot be replayed.
    Damaged { end: Position, from: Sequence, held: Held, path: PathBuf, offset: u64, what: String },
    /// There is no saying what the log held.
    NeedsCompare { path: PathBuf, what: String },
}

/// A mark that was logged but not durable: it never becomes a recovery point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LostMark {
    pub sequence: Sequence,
    pub time: Timestamp,
    pub body: Vec<u8>,
}

/// Which ranges the records from the damaged one on had changed.
#[derive(Clone, Debug)]
pub enum Held {
    Extents(ExtentSet),
    Unknown,
}

/// More separate ranges than this count as [`Held::Unknown`]: they bound what an examination allocates.
const HELD_RANGES_MAX: usize = 1 << 20;
/// Marks reported as lost; further ones are counted with the records.
const LOST_MARKS_MAX: usize = 1 << 16;
/// Where no file system goes: zeroes add up without occupying anything.
const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// Data is verified in parts of this size.
const PART_BYTES: usize = 1 << 20;

/// Examines and closes in one step, for callers that need not make the verdict durable in between.
pub fn recover(storage: Arc<dyn Storage>, stem: &str, disk: DiskId, cause: Cause, now: Timestamp) -> Result<Verdict> {
    Examination::examine(storage, stem, disk, cause)?.finish(now)
}

pub struct Examination {
    storage: Arc<dyn Storage>,
    stem: String,
    verdict: Verdict,
    keep: Vec<Keep>,
    /// Files that never held anything, or nothing that counts.
    remove: Vec<String>,
    /// The logs at and after damage.
    set_aside: Vec<LogName>,
    /// What is intact of the first of them.
    intact: Option<Keep>,
}

/// A log, or its beginning, that is to be closed.
struct Keep {
    log: Arc<Log>,
    reached: Reached,
}

/// A log that was not closed, opened.
struct OpenLog {
    log: Arc<Log>,
    durable: Option<Reached>,
    companion_bytes: u64,
    data_bytes: u64,
}

/// What is in the folder under one number.
enum Found {
    Closed,
    Leftover,
    Open(Box<OpenLog>),
    Unusable { path: PathBuf, what: String },
}

impl Examination {
    pub fn examine(storage: Arc<dyn Storage>, stem: &str, disk: DiskId, cause: Cause) -> Result<Self> {
        Self::examine_epoch(storage, stem, disk, cause, None)
    }

    /// The same, for an epoch that stands for certain: a log of another one that was not closed never counted, or what it held is
    /// known elsewhere. It is removed.
    pub fn examine_epoch(
        storage: Arc<dyn Storage>,
        stem: &str,
        disk: DiskId,
        cause: Cause,
        epoch: Option<Epoch>,
    ) -> Result<Self> {
        let mut this = Self {
            storage,
            stem: stem.to_owned(),
            verdict: Verdict::NothingOpen,
            keep: Vec::new(),
            remove: Vec::new(),
            set_aside: Vec::new(),
            intact: None,
        };
        for (name, files) in logs_in(&*this.storage, stem)? {
            match this.look_at(&name, files, disk)? {
                Found::Closed if this.set_aside.is_empty() => {}
                // Logs are closed in order, so what lies behind damage and is closed cannot be judged by it.
                Found::Closed => this.forget_extents(),
                Found::Leftover => {
                    this.remove.extend(files.has_hrl.then(|| name.hrl()));
                    this.remove.extend(files.has_companion.then(|| name.companion()));
                }
                Found::Unusable { path, what } => {
                    this.verdict = Verdict::NeedsCompare { path, what };
                    this.set_aside.push(name);
                }
                Found::Open(open) if epoch.is_some_and(|epoch| open.log.start.position.epoch != epoch) => {
                    this.remove.extend([name.hrl(), name.companion()]);
                }
                Found::Open(open) => this.judge(*open, cause)?,
            }
        }
        Ok(this)
    }

    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// What the intact records of logs that were not closed changed, after a position of theirs (`None`: all of them): for
    /// whoever cannot keep these logs and looks at the disk instead.
    pub fn extents(&self, after: Option<&Position>) -> Result<ExtentSet> {
        let mut extents = ExtentSet::new();
        for keep in self.keep.iter().chain(&self.intact) {
            let epoch = keep.log.start.position.epoch;
            let after = after.filter(|after| after.epoch == epoch).map_or(Sequence(0), |after| after.sequence);
            let mut scan = Scan::new(keep.log.clone());
            while let Step::Record(record) = scan.step(keep.reached.companion_bytes, u64::MAX)? {
                if record.sequence > after {
                    extents.insert(record.extent().unwrap_or(Extent::new(0, 0)));
                }
            }
        }
        Ok(extents)
    }

    fn look_at(&self, name: &LogName, files: Files, disk: DiskId) -> Result<Found> {
        let storage = &*self.storage;
        let unusable = |file: String, what: String| Ok(Found::Unusable { path: storage.path(&file), what });
        let mut header_defect = None;
        if files.has_hrl {
            let data = storage.open(&name.hrl(), OpenMode::Read).map_err(io_error(storage, name, "open"))?;
            match HrlFile::header_of(&data) {
                Ok((header, _)) if header.eol_location != 0 => {
                    // A close writes the companion's end first: without it this EOLLocation is damage, not a close.
                    return match self.has_end(name, files, disk)? {
                        true => Ok(Found::Closed),
                        false => unusable(name.hrl(), "it claims to be closed, its companion does not".to_owned()),
                    };
                }
                Ok(_) => {}
                Err(defect) => header_defect = Some(defect),
            }
            if !files.has_companion {
                return unusable(name.hrl(), "it was not closed and has no companion".to_owned());
            }
        }
        let companion = storage.open(&name.companion(), OpenMode::Read).map_err(io_error(storage, name, "open"))?;
        let control = match Control::read(storage, name, &*companion, disk) {
            Ok(control) => control,
            Err(LogError::Damaged { .. }) if !files.has_hrl && is_unused(&*companion).unwrap_or(false) => {
                return Ok(Found::Leftover);
            }
            Err(LogError::Damaged { what, .. }) => return unusable(name.companion(), what),
            Err(error) => return Err(error),
        };
        let Some(start) = control.start else {
            return match control.durable.reached {
                None => Ok(Found::Leftover),
                Some(_) => unusable(name.companion(), "it has durable records but no start".to_owned()),
            };
        };
        if !files.has_hrl {
            // A log is deleted `.hrl` file first, and only after it was closed.
            return match control.end {
                Some(_) => Ok(Found::Leftover),
                None => unusable(name.companion(), "the .hrl file beside it is missing".to_owned()),
            };
        }
        if let Some(defect) = header_defect {
            return unusable(name.hrl(), defect.to_string());
        }
        let open = |file: String| {
            let file = storage.open(&file, OpenMode::ReadWrite)?;
            let bytes = file.bytes()?;
            Ok((file, bytes))
        };
        let (data, data_bytes) = open(name.hrl()).map_err(io_error(storage, name, "open"))?;
        let (companion, companion_bytes) = open(name.companion()).map_err(io_error(storage, name, "open"))?;
        // From step 5 of a close on, the end says what is durable.
        let durable = control.end.map(|end| end.reached).or(control.durable.reached);
        let parts =
            Parts { storage: self.storage.clone(), name: name.clone(), identity: control.identity, data, companion };
        let sync = SyncState { durable: control.durable, before: None };
        let log = Arc::new(Log::new(parts, start, reached_at_start(&start), sync, false));
        Ok(Found::Open(Box::new(OpenLog { log, durable, companion_bytes, data_bytes })))
    }

    /// False only where a sound companion says that the log was not closed. What else is wrong with a closed log shows
    /// when it is read.
    fn has_end(&self, name: &LogName, files: Files, disk: DiskId) -> Result<bool> {
        if !files.has_companion {
            return Ok(true);
        }
        let storage = &*self.storage;
        let companion = storage.open(&name.companion(), OpenMode::Read).map_err(io_error(storage, name, "open"))?;
        match Control::read(storage, name, &*companion, disk) {
            Ok(control) => Ok(control.end.is_some()),
            Err(LogError::Damaged { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Adds one open log to the verdict over those before it.
    fn judge(&mut self, open: OpenLog, cause: Cause) -> Result<()> {
        let start = open.log.start.position;
        match &mut self.verdict {
            Verdict::NothingOpen => {}
            Verdict::Kept { end } if *end == start => {}
            Verdict::Kept { .. } => {
                let what = "it does not continue the log before it".to_owned();
                self.verdict = Verdict::NeedsCompare { path: open.log.storage.path(&open.log.name.companion()), what };
                self.set_aside.push(open.log.name.clone());
                return Ok(());
            }
            Verdict::Cut { end, discarded_records, .. }
                if (*discarded_records > 0 || *end != start) && open.durable.is_some() =>
            {
                let what = "it has durable records although the log before it lost some".to_owned();
                self.verdict = Verdict::NeedsCompare { path: open.log.storage.path(&open.log.name.companion()), what };
                self.set_aside.push(open.log.name.clone());
                return Ok(());
            }
            Verdict::Cut { end, discarded_records, .. } if *discarded_records > 0 || *end != start => {
                return self.discard_whole(&open);
            }
            Verdict::Cut { .. } => {}
            Verdict::Damaged { held, .. } => {
                self.set_aside.push(open.log.name.clone());
                let mut scan = Scan::new(open.log.clone());
                *held = gather(&mut scan, &open, std::mem::replace(held, Held::Unknown))?;
                return Ok(());
            }
            Verdict::NeedsCompare { .. } => {
                self.set_aside.push(open.log.name.clone());
                return Ok(());
            }
        }
        let walk = walk(&open, cause)?;
        match decide(cause, walk.reaches_durable, walk.tail) {
            Decision::KeepAll | Decision::CutTail => {
                self.verdict = Verdict::Kept { end: open.log.position_of(&walk.intact) };
                self.keep.push(Keep { log: open.log, reached: walk.intact });
            }
            Decision::KeepDurable => {
                if let Verdict::NothingOpen = self.verdict {
                    let end = open.log.start.position;
                    self.verdict = Verdict::Cut { end, discarded_records: 0, lost_marks: Vec::new() };
                }
                if open.durable.is_none() && !self.keep.is_empty() {
                    return self.discard_whole(&open);
                }
                let kept = open.durable.unwrap_or(reached_at_start(&open.log.start));
                if let Verdict::Cut { end, .. } = &mut self.verdict {
                    *end = open.log.position_of(&kept);
                }
                self.discard_after(&open, kept)?;
                self.keep.push(Keep { log: open.log, reached: kept });
            }
            Decision::Damaged => {
                let mut scan = walk.scan;
                let (path, offset) = match walk.bad_data {
                    Some(offset) => (open.log.storage.path(&open.log.name.hrl()), offset),
                    None => (open.log.storage.path(&open.log.name.companion()), scan.at),
                };
                let from = Sequence(walk.intact.sequence.0.saturating_add(1));
                let end = open.log.position_of(&walk.intact);
                let held = match walk.bad_data {
                    Some(_) => gather(&mut scan, &open, Held::Extents(walk.bad_extent.into_iter().collect()))?,
                    None => Held::Unknown,
                };
                self.set_aside.push(open.log.name.clone());
                self.intact = Some(Keep { log: open.log, reached: walk.intact });
                self.verdict = Verdict::Damaged { end, from, held, path, offset, what: walk.what };
            }
        }
        Ok(())
    }

    /// A log in which nothing was durable, after one that ends before it.
    fn discard_whole(&mut self, open: &OpenLog) -> Result<()> {
        self.remove.push(open.log.name.hrl());
        self.remove.push(open.log.name.companion());
        self.discard_after(open, reached_at_start(&open.log.start))
    }

    /// Counts what lies past the durable part, and names its marks.
    fn discard_after(&mut self, open: &OpenLog, kept: Reached) -> Result<()> {
        let Verdict::Cut { discarded_records, lost_marks, .. } = &mut self.verdict else { return Ok(()) };
        let mut scan = Scan::new(open.log.clone());
        scan.at = kept.companion_bytes;
        scan.before = (kept.sequence, kept.hash);
        while let Step::Record(record) = scan.step(open.companion_bytes, u64::MAX)? {
            *discarded_records += 1;
            if let RecordKind::Mark { body } = record.kind
                && lost_marks.len() < LOST_MARKS_MAX
            {
                lost_marks.push(LostMark { sequence: record.sequence, time: record.time, body });
            }
        }
        Ok(())
    }

    fn forget_extents(&mut self) {
        if let Verdict::Damaged { held, .. } = &mut self.verdict {
            *held = Held::Unknown;
        }
    }

    /// Cuts and closes what is kept, sets aside what is damaged, removes what never counted.
    pub fn finish(self, now: Timestamp) -> Result<Verdict> {
        let storage = &*self.storage;
        for keep in &self.keep {
            close_kept(keep, now)?;
        }
        let folder = LogName::new(self.stem.as_str(), 0);
        for file in &self.remove {
            storage.remove(file).map_err(io_error(storage, &folder, "remove"))?;
        }
        let mut set_aside = self.set_aside.iter();
        if let Some(damaged) = set_aside.next() {
            // One is kept to be looked at. Its `.hrl` file goes first: a companion alone still asks for a compare.
            remove_set_aside(storage, &self.stem).map_err(io_error(storage, damaged, "remove"))?;
            for file in [damaged.hrl(), damaged.companion()] {
                if storage.exists(&file).map_err(io_error(storage, damaged, "set aside"))? {
                    storage.rename(&file, &format!("{file}{SET_ASIDE}")).map_err(io_error(
                        storage,
                        damaged,
                        "set aside",
                    ))?;
                }
            }
        }
        for later in set_aside {
            for file in [later.hrl(), later.companion()] {
                if storage.exists(&file).map_err(io_error(storage, later, "remove"))? {
                    storage.remove(&file).map_err(io_error(storage, later, "remove"))?;
                }
            }
        }
        storage.sync_folder("").map_err(io_error(storage, &folder, "sync"))?;
        Ok(self.verdict)
    }
}

const SET_ASIDE: &str = ".damaged";

fn remove_set_aside(storage: &dyn Storage, stem: &str) -> std::io::Result<()> {
    for file in storage.list("")? {
        if file.strip_suffix(SET_ASIDE).is_some_and(|file| LogName::parse(stem, file).is_some()) {
            storage.remove(&file)?;
        }
    }
    Ok(())
}

/// Which of the two files a log has.
#[derive(Clone, Copy, Default)]
pub(crate) struct Files {
    pub has_hrl: bool,
    pub has_companion: bool,
}

/// The logs of a disk in a folder, in order of their numbers.
pub(crate) fn logs_in(storage: &dyn Storage, stem: &str) -> Result<BTreeMap<LogName, Files>> {
    let mut logs = BTreeMap::<LogName, Files>::new();
    for file in storage.list("").map_err(io_error(storage, &LogName::new(stem, 0), "list"))? {
        if let Some((name, is_hrl)) = LogName::parse(stem, &file) {
            let files = logs.entry(name).or_default();
            if is_hrl {
                files.has_hrl = true;
            } else {
                files.has_companion = true;
            }
        }
    }
    Ok(logs)
}

/// Whether a companion without a log holds no record: what a crash of its creation leaves, torn in any way.
fn is_unused(companion: &dyn StorageFile) -> std::io::Result<bool> {
    Ok(companion.bytes()? <= RECORDS_OFFSET)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tail {
    /// The companion ends with a record.
    Whole,
    /// It ends within one.
    Incomplete,
    /// A whole slot, or the data of a record, does not verify.
    Bad,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Decision {
    KeepAll,
    CutTail,
    KeepDurable,
    Damaged,
}

fn decide(cause: Cause, reaches_durable: bool, tail: Tail) -> Decision {
    match (cause, reaches_durable, tail) {
        (_, false, _) => Decision::Damaged,
        (Cause::ProcessKilled, true, Tail::Whole) => Decision::KeepAll,
        (Cause::ProcessKilled, true, Tail::Incomplete) => Decision::CutTail,
        (Cause::ProcessKilled, true, Tail::Bad) => Decision::Damaged,
        (Cause::PowerLoss, true, _) => Decision::KeepDurable,
    }
}

/// How far a log is intact.
struct Walk {
    intact: Reached,
    reaches_durable: bool,
    tail: Tail,
    /// After the last intact record, or, if that one's data is bad, after the record itself.
    scan: Scan,
    bad_data: Option<u64>,
    bad_extent: Option<Extent>,
    what: String,
}

/// Verifies records and data from the start: all of them, or after a power loss those that were durable.
fn walk(open: &OpenLog, cause: Cause) -> Result<Walk> {
    let mut sets = SetBuilder::new();
    let mut verifier = DataVerifier { buffer: Vec::new() };
    let mut walk = Walk {
        intact: reached_at_start(&open.log.start),
        reaches_durable: false,
        tail: Tail::Whole,
        scan: Scan::new(open.log.clone()),
        bad_data: None,
        bad_extent: None,
        what: String::new(),
    };
    let durable = open.durable.unwrap_or(walk.intact);
    loop {
        // The durable position must lie in the history, not only be passed.
        walk.reaches_durable |= walk.intact == durable;
        if cause == Cause::PowerLoss && walk.reaches_durable {
            return Ok(walk);
        }
        let record = match walk.scan.step(open.companion_bytes, u64::MAX)? {
            Step::Record(record) => record,
            Step::End => {
                walk.what = "records that were durable are missing".to_owned();
                return Ok(walk);
            }
            Step::Incomplete => {
                walk.tail = Tail::Incomplete;
                walk.what = "the record is cut off".to_owned();
                return Ok(walk);
            }
            Step::Bad(what) => {
                walk.tail = Tail::Bad;
                walk.what = what.to_owned();
                return Ok(walk);
            }
        };
        let data_offset = sets.end();
        let is_in_place = replay(&mut sets, &record, |_, _| Ok(()))?;
        if !is_in_place || !verifier.verify(open, &record)? {
            walk.tail = Tail::Bad;
            walk.what = format!("the data of record {} does not verify", record.sequence);
            walk.bad_data = Some(data_offset);
            walk.bad_extent = record.extent();
            return Ok(walk);
        }
        walk.intact = Reached {
            sequence: record.sequence,
            hash: record.history,
            companion_bytes: walk.scan.at,
            data_bytes: sets.end(),
        };
    }
}

/// Adds the ranges of all further records. Where they cannot all be read, nothing is known.
fn gather(scan: &mut Scan, open: &OpenLog, held: Held) -> Result<Held> {
    let Held::Extents(mut extents) = held else { return Ok(Held::Unknown) };
    loop {
        match scan.step(open.companion_bytes, u64::MAX)? {
            Step::Record(record) => extents.insert(record.extent().unwrap_or(Extent::new(0, 0))),
            Step::End | Step::Incomplete => return Ok(Held::Extents(extents)),
            Step::Bad(_) => return Ok(Held::Unknown),
        }
        if extents.len() > HELD_RANGES_MAX {
            return Ok(Held::Unknown);
        }
    }
}

/// Places a record as the appender did, and hands over each metadata block that fills up. False if the record says
/// that its data is elsewhere.
fn replay(
    sets: &mut SetBuilder,
    record: &Record,
    mut block: impl FnMut(u64, &[u8; METADATA_BYTES]) -> Result<()>,
) -> Result<bool> {
    let seconds = record.time.hrl_seconds();
    let at = sets.end();
    if at > FILE_BYTES_MAX {
        return Ok(false);
    }
    let mut add = |sets: &mut SetBuilder, offset, bytes, checksum| {
        sets.add(offset, bytes, seconds, checksum);
        if sets.is_full() {
            let mut full = Box::new([0; METADATA_BYTES]);
            let at = sets.finish(&mut full);
            block(at, &full)?;
        }
        Ok::<(), LogError>(())
    };
    match record.kind {
        RecordKind::Write { extent, data_offset, checksum, .. } => {
            let Ok(bytes) = u32::try_from(extent.length) else { return Ok(false) };
            add(sets, extent.offset, bytes, checksum)?;
            Ok(data_offset == at)
        }
        RecordKind::Zeroes { extent } => {
            for (offset, bytes) in zero_parts(extent.offset, extent.length) {
                add(sets, offset, bytes, u32::MAX)?;
            }
            Ok(true)
        }
        RecordKind::Mark { .. } => Ok(true),
    }
}

struct DataVerifier {
    buffer: Vec<u8>,
}

impl DataVerifier {
    fn verify(&mut self, open: &OpenLog, record: &Record) -> Result<bool> {
        let RecordKind::Write { extent, data_offset, digest, .. } = record.kind else { return Ok(true) };
        if data_offset < HEADER_BYTES as u64 || data_offset.saturating_add(extent.length) > open.data_bytes {
            return Ok(false);
        }
        let part_bytes = extent.length.min(PART_BYTES as u64) as usize;
        if self.buffer.len() < part_bytes {
            self.buffer.resize(part_bytes, 0);
        }
        let mut hasher = open.log.hasher.in_parts();
        let mut done = 0;
        while done < extent.length {
            let part = &mut self.buffer[..(extent.length - done).min(part_bytes as u64) as usize];
            open.log.data.read_at(data_offset + done, part).map_err(open.log.io_error("read"))?;
            hasher.update(part);
            done += part.len() as u64;
        }
        Ok(hasher.digest() == digest)
    }
}

/// Makes an immutable log of what is kept. The blocks within are made again from the companion where they differ.
fn close_kept(keep: &Keep, now: Timestamp) -> Result<()> {
    let log = &keep.log;
    let cut = || {
        log.data.set_bytes(keep.reached.data_bytes)?;
        log.companion.set_bytes(keep.reached.companion_bytes)
    };
    cut().map_err(log.io_error("cut"))?;
    let mut sets = SetBuilder::new();
    let mut scan = Scan::new(log.clone());
    let mut found = Box::new([0; METADATA_BYTES]);
    let mut mend = |at: u64, block: &[u8; METADATA_BYTES]| {
        let mut write = || {
            log.data.read_at(at, &mut found[..])?;
            if *found == *block { Ok(()) } else { log.data.write_at(at, block) }
        };
        write().map_err(log.io_error("mend"))
    };
    while let Step::Record(record) = scan.step(keep.reached.companion_bytes, u64::MAX)? {
        replay(&mut sets, &record, &mut mend)?;
    }
    if scan.at != keep.reached.companion_bytes || sets.end() != keep.reached.data_bytes {
        return Err(log.damaged_companion(scan.at, "the log changed while it was recovered"));
    }
    log.publish(keep.reached);
    log.close(&mut sets, now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_decisions() {
        use Cause::*;
        use Decision::*;
        use Tail::*;
        let table = [
            (ProcessKilled, true, Whole, KeepAll),
            (ProcessKilled, true, Incomplete, CutTail),
            (ProcessKilled, true, Bad, Damaged),
            (ProcessKilled, false, Whole, Damaged),
            (ProcessKilled, false, Incomplete, Damaged),
            (ProcessKilled, false, Bad, Damaged),
            (PowerLoss, true, Whole, KeepDurable),
            (PowerLoss, true, Incomplete, KeepDurable),
            (PowerLoss, true, Bad, KeepDurable),
            (PowerLoss, false, Whole, Damaged),
            (PowerLoss, false, Incomplete, Damaged),
            (PowerLoss, false, Bad, Damaged),
        ];
        let mut rows = 0;
        for cause in [ProcessKilled, PowerLoss] {
            for reaches_durable in [true, false] {
                for tail in [Whole, Incomplete, Bad] {
                    let row = table.iter().find(|row| (row.0, row.1, row.2) == (cause, reaches_durable, tail));
                    assert_eq!(row.expect("every input has a row").3, decide(cause, reaches_durable, tail));
                    rows += 1;
                }
            }
        }
        assert_eq!(rows, table.len());
    }
}
