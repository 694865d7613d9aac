//! Opening a journal: what is on disk after a crash, a kill, or damage.

use std::collections::VecDeque;
use std::sync::Arc;

use tidemark_base::storage::{OpenMode, Storage, write_again};

use super::active::Active;
use super::error::ReadError;
use super::history::{History, Loss};
use super::merged::{self, Levels, Merged};
use super::recovery;
use super::sealed::{Boundary, BoundaryKind, Sealed};
use super::segment::{HEADER_BYTES, Header, SegmentName};
use super::{Journal, JournalInfo, Limits, OpenReport, Part, SealError, Tip};
use crate::view::cache::BlockCache;

/// What is seen on the way through the segments.
struct Opening<'a> {
    write: bool,
    /// What was known to be lost before.
    losses: &'a [Loss],
    /// Starts and ends of scans, in order.
    boundaries: Vec<Boundary>,
    /// First and last of the cuts that are gone, and how many it are.
    lost: Vec<(u64, u64, u64)>,
    /// Lost before the oldest segment was begun: where, and its first cut.
    lost_before: Option<(u64, u64)>,
    /// The first cut of the oldest segment that says what was before it.
    begins_at: Option<u64>,
    report: OpenReport,
}

impl Opening<'_> {
    fn take_boundaries(&mut self, boundaries: &[Boundary]) {
        let is_damage = |boundary: &&Boundary| boundary.what == BoundaryKind::Damaged;
        let mut damaged = boundaries.iter().filter(is_damage).map(|boundary| boundary.cut);
        if let Some(first) = damaged.next() {
            let (last, cuts) = damaged.fold((first, 1), |(_, cuts), cut| (cut, cuts + 1));
            self.lost.push((first, last, cuts));
        }
        self.boundaries.extend(boundaries.iter().filter(|boundary| !is_damage(boundary)));
    }

    /// What was lost, known before or found now, and the history that follows from it.
    fn history(&self, base: u64, tip: u64) -> (Vec<Loss>, History) {
        // The numbers of cuts that nothing tells of any more are used again, so what comes after them is new.
        let known = self.losses.iter().filter(|loss| loss.first <= tip.max(base));
        let mut losses: Vec<Loss> =
            known.map(|loss| Loss { found_at: loss.found_at.min(tip.max(base)), ..*loss }).collect();
        for &(first, last, cuts) in &self.lost {
            let new = Loss { first, last, cuts, found_at: tip };
            let is_known =
                |loss: &Loss| (loss.first, loss.last, loss.cuts) == (first, last, cuts) || loss.covers(first, last);
            if !losses.iter().any(is_known) {
                losses.push(new);
            }
        }
        // Of what lies before the base, the oldest segment says whether a scan that was begun since repairs it.
        let counts =
            |loss: &&Loss| loss.last > base || self.begins_at.is_none_or(|begins_at| loss.found_at >= begins_at);
        let mut felt: Vec<Loss> = losses.iter().filter(counts).copied().collect();
        if let Some((cut, begins_at)) = self.lost_before {
            felt.push(Loss { first: cut, last: cut, cuts: 1, found_at: begins_at.saturating_sub(1) });
        }
        let history = History::new(&self.boundaries, &felt);
        losses.retain(|loss| history.is_felt(loss, base));
        (losses, history)
    }
}

impl Journal {
    /// Opens what is in `segments/`. `base` is where the base stands: segments at or before it are leftovers of a fold.
    /// `losses` is what was known to be lost; what is known now ([`Journal::losses`]) has to be stored before anything is
    /// appended. With `write` leftovers and torn tails go; without it nothing is changed.
    pub fn open(
        storage: Arc<dyn Storage>,
        info: JournalInfo,
        base: Tip,
        losses: &[Loss],
        limits: Limits,
        cache: Arc<BlockCache>,
        write: bool,
    ) -> Result<(Self, OpenReport), ReadError> {
        let io = |source| ReadError::Io { file: storage.path("segments").display().to_string(), source };
        if write {
            // A rename that a process before this one did not see the end of is seen to it now.
            storage.sync_folder("segments").map_err(io)?;
        }
        let files = storage.list("segments").map_err(io)?;
        let mut names: Vec<SegmentName> = files.iter().filter_map(|name| SegmentName::parse(name)).collect();
        names.sort_by_key(|name| (name.first(), matches!(name, SegmentName::Active { .. })));
        let mut journal = Self {
            storage: storage.clone(),
            info,
            limits,
            cache,
            parts: VecDeque::new(),
            levels: Levels::default(),
            active: None,
            tip: base.clone(),
            durable: base.clone(),
            history: History::default(),
            losses: Vec::new(),
            mended: Vec::new(),
            failed: None,
            no_room: None,
            needs_room: 0,
            end_soon: false,
            opened: 0,
        };
        let report = OpenReport::default();
        let (boundaries, lost) = (Vec::new(), Vec::new());
        let mut opening = Opening { write, losses, boundaries, lost, lost_before: None, begins_at: None, report };
        for name in names {
            match name {
                SegmentName::Sealed { last, .. } | SegmentName::Broken { last, .. } if last <= base.cut => {
                    if write {
                        storage.remove(&name.path()).map_err(io)?;
                    }
                }
                SegmentName::Sealed { first, last } if losses.iter().any(|loss| loss.covers(first, last)) => {
                    let file = storage.path(&name.path());
                    let what = format!("{} could not be read before", file.display());
                    journal.broken(first, last, &what, &mut opening)
                }
                SegmentName::Sealed { first, last } => journal.open_sealed(first, last, &mut opening)?,
                SegmentName::Broken { first, last } => {
                    let what = format!("{}: its header was destroyed", storage.path(&name.path()).display());
                    journal.broken(first, last, &what, &mut opening)
                }
                // The rename that sealed it was cut short where a file system makes it in two steps: both names are of one file.
                SegmentName::Active { first } if matches!(journal.parts.back(), Some(Part::Sealed(sealed)) if sealed.first_cut() == first) => {
                    if write {
                        storage.remove(&name.path()).and_then(|()| storage.sync_folder("segments")).map_err(io)?;
                    }
                }
                SegmentName::Active { first } => journal.open_active(first, &mut opening)?,
            }
        }
        journal.durable = journal.tip.clone();
        (journal.losses, journal.history) = opening.history(base.cut, journal.tip.cut);
        journal.open_merged(&files, base.cut, write, &mut opening.report)?;
        Ok((journal, opening.report))
    }

    /// After a failure: forgets what was not made durable and begins again from what was. The page cache calls the pages
    /// of a failed sync clean, so what they held is cut off before anything is read, and the host sends it again. Where
    /// that fails in turn, the journal stays as it was: what is durable can be read, and the next try cuts again.
    pub fn reopen(&mut self, base: Tip) -> Result<OpenReport, ReadError> {
        if let Some(active) = &self.active {
            let path = SegmentName::Active { first: active.header.first_cut }.path();
            let io = |source| ReadError::Io { file: active.segment.name.clone(), source };
            if self.storage.exists(&path).map_err(io)? {
                let file = self.storage.open(&path, OpenMode::ReadWrite).map_err(io)?;
                file.set_bytes(active.durable_end).map_err(io)?;
            }
        }
        let (storage, cache) = (self.storage.clone(), self.cache.clone());
        let (mut journal, report) = Self::open(storage, self.info, base, &self.losses, self.limits, cache, true)?;
        journal.opened = self.opened + 1;
        *self = journal;
        Ok(report)
    }

    fn open_merged(
        &mut self,
        files: &[String],
        base: u64,
        write: bool,
        report: &mut OpenReport,
    ) -> Result<(), ReadError> {
        let io = |source| ReadError::Io { file: self.storage.path("segments").display().to_string(), source };
        let remove = |name: &str| if write { self.storage.remove(name).map_err(io) } else { Ok(()) };
        for name in files {
            if merged::is_temporary(name) || name.ends_with(".repair") {
                remove(&format!("segments/{name}"))?;
            }
            let Some((first, last)) = merged::parse_name(name) else { continue };
            let path = merged::name_of(first, last);
            if last <= base {
                remove(&path)?;
                continue;
            }
            match Merged::open(&*self.storage, self.info.disk, first, last) {
                Ok(index) if Levels::fits(&index, &self.parts, base) => self.levels.insert(Arc::new(index)),
                Ok(_) => {
                    report.rebuilt.push(format!("{path}: its segments are others"));
                    remove(&path)?;
                }
                Err(ReadError::Damaged { file, what, .. }) => {
                    report.rebuilt.push(format!("{file}: {what}"));
                    remove(&path)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn broken(&mut self, first: u64, last: u64, what: &str, opening: &mut Opening<'_>) {
        let what = format!("cuts {first} to {last} are lost: {what}");
        opening.report.damage.push(what.clone());
        opening.lost.push((first, last, last.saturating_sub(first).saturating_add(1)));
        self.parts.push_back(Part::Broken { first, last, what });
        self.tip.cut = last;
    }

    /// Whether the segment follows what was opened before it; a gap becomes a broken part.
    fn join(&mut self, header: &Header, opening: &mut Opening<'_>) {
        let opened_any = !self.parts.is_empty();
        let after_broken = matches!(self.parts.back(), Some(Part::Broken { .. }));
        if header.first_cut > self.tip.cut + 1 {
            let (first, last) = (self.tip.cut + 1, header.first_cut - 1);
            self.broken(first, last, "their segment is missing", opening);
        } else if opened_any && !after_broken && header.commit_before != self.tip.commit {
            let first = header.first_cut;
            opening.report.damage.push(format!("the segment of cut {first} does not follow the one before it"));
            opening.lost.push((first, first, 1));
        }
        if opened_any {
            return;
        }
        // What the base was folded over began before this segment.
        let cut = header.first_cut.min(self.tip.cut);
        opening.begins_at = Some(header.first_cut);
        if header.damaged {
            opening.lost_before = Some((cut, header.first_cut));
        } else if header.scan_open {
            opening.boundaries.push(Boundary { cut, what: BoundaryKind::ScanStart });
        }
    }

    fn open_sealed(&mut self, first: u64, last: u64, opening: &mut Opening<'_>) -> Result<(), ReadError> {
        let ours = |sealed: Sealed| match self.belongs(&sealed.header) {
            true => Ok(sealed),
            false => Err(ReadError::damaged(&sealed.segment.name, "it is of another disk")),
        };
        let mut opened = Sealed::open(&*self.storage, first, last).and_then(ours);
        // The frames say it all again: only where they are damaged, too, is anything lost.
        if let (Err(ReadError::Damaged { file, what, .. }), true) = (&opened, opening.write) {
            let why = format!("{file}: {what}");
            if let Some(rebuilt) = Sealed::rebuild(&*self.storage, first, last, None)? {
                opening.report.rebuilt.push(why);
                opened = ours(rebuilt);
            }
        }
        let sealed = match opened {
            Ok(sealed) => sealed,
            Err(ReadError::Damaged { file, what, .. }) => {
                self.broken(first, last, &format!("{file}: {what}"), opening);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.join(&sealed.header, opening);
        opening.take_boundaries(&sealed.boundaries);
        self.tip = Tip {
            cut: last,
            position: sealed.last_position.or(self.tip.position),
            time: sealed.last_time,
            commit: sealed.last_commit,
        };
        self.parts.push_back(Part::Sealed(Arc::new(sealed)));
        Ok(())
    }

    fn belongs(&self, header: &Header) -> bool {
        // Of before it grew, too.
        header.disk == self.info.disk && header.disk_bytes <= self.info.disk_bytes
    }

    fn open_active(&mut self, first: u64, opening: &mut Opening<'_>) -> Result<(), ReadError> {
        let write = opening.write;
        let path = SegmentName::Active { first }.path();
        let name = self.storage.path(&path).display().to_string();
        let io = |source| ReadError::Io { file: name.clone(), source };
        let file = self.storage.open(&path, if write { OpenMode::ReadWrite } else { OpenMode::Read }).map_err(io)?;
        let bytes = file.bytes().map_err(io)?;
        let mut head = [0; HEADER_BYTES];
        let header = if bytes < HEADER_BYTES as u64 {
            Err("too short")
        } else {
            file.read_at(0, &mut head).map_err(io)?;
            Header::decode(&head)
        };
        let header = match header {
            Ok(header) if header.first_cut == first && self.belongs(&header) => header,
            _ if bytes <= HEADER_BYTES as u64 => {
                // Its creation was never finished, so no cut was ever in it.
                if write {
                    self.storage.remove(&path).and_then(|()| self.storage.sync_folder("segments")).map_err(io)?;
                }
                return Ok(());
            }
            _ => {
                // How many cuts it held is unknown; none of their numbers may come again.
                let last = first + self.limits.segment_cuts as u64;
                if write {
                    self.storage
                        .rename(&path, &SegmentName::Broken { first, last }.path())
                        .and_then(|()| self.storage.sync_folder("segments"))
                        .map_err(io)?;
                }
                self.broken(first, last, &format!("{name}: the active segment's header is destroyed"), opening);
                return Ok(());
            }
        };
        self.join(&header, opening);
        let mut active = Active::resume(&*self.storage, file, head, header, HEADER_BYTES as u64);
        let found = recovery::recover(&active.segment, &active.header, &active.frame_key)?;
        if let Some((position, time, commit)) = found.last {
            self.tip = Tip { cut: self.tip.cut, position: Some(position), time, commit };
        }
        self.tip.cut = first + found.commits.len() as u64 - 1;
        if write {
            let file = &active.segment.file;
            let truncated = if found.torn_bytes > 0 { file.set_bytes(found.data_end) } else { Ok(()) };
            // After a kill the cuts behind the last sync are only in the page cache, and the host is told that it
            // need not keep them. Where that sync failed, the cache calls their pages clean: only bytes that are
            // written again are sure to be synced.
            truncated
                .and_then(|()| write_again(&**file, found.proven_end, found.data_end))
                .and_then(|()| file.sync())
                .map_err(io)?;
        }
        opening.report.torn_bytes += found.torn_bytes;
        for cut in &found.damaged {
            opening.report.damage.push(format!("{name}: cut {} at {}: {}", cut.cut, cut.at, cut.what));
        }
        opening.take_boundaries(&found.boundaries);
        active.recovered(found);
        let damaged = active.boundaries.iter().any(|boundary| boundary.what == BoundaryKind::Damaged);
        self.active = Some(active);
        if damaged && write {
            // From now on its index says which cuts were lost; the evidence stays as it is.
            self.seal().map_err(|error: SealError| io(error.into_io()))?;
        }
        Ok(())
    }
}
