//! Opening a journal: what is on disk after a crash, a kill, or damage.

use std::collections::VecDeque;
use std::sync::Arc;

use tidemark_base::storage::{OpenMode, Storage, write_again};

use super::active::Active;
use super::error::ReadError;
use super::history::History;
use super::merged::{self, Levels, Merged};
use super::recovery;
use super::sealed::{Boundary, BoundaryKind, Sealed};
use super::segment::{HEADER_BYTES, Header, SegmentName};
use super::{Journal, JournalInfo, Limits, OpenReport, Part, SealError, Tip};
use crate::view::cache::BlockCache;

impl Journal {
    /// Opens what is in `segments/`. `base` is where the base stands: segments at or before it are leftovers of a fold.
    /// With `write` leftovers and torn tails go; without it nothing is changed.
    pub fn open(
        storage: Arc<dyn Storage>,
        info: JournalInfo,
        base: Tip,
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
            failed: None,
            no_room: None,
            opened: 0,
        };
        let mut report = OpenReport::default();
        for name in names {
            match name {
                SegmentName::Sealed { last, .. } | SegmentName::Broken { last, .. } if last <= base.cut => {
                    if write {
                        storage.remove(&name.path()).map_err(io)?;
                    }
                }
                SegmentName::Sealed { first, last } => journal.open_sealed(first, last, write, &mut report)?,
                SegmentName::Broken { first, last } => {
                    journal.broken(first, last, "its header was destroyed", &mut report)
                }
                // The rename that sealed it was cut short where a file system makes it in two steps: both names are of one file.
                SegmentName::Active { first } if matches!(journal.parts.back(), Some(Part::Sealed(sealed)) if sealed.first_cut() == first) => {
                    if write {
                        storage.remove(&name.path()).and_then(|()| storage.sync_folder("segments")).map_err(io)?;
                    }
                }
                SegmentName::Active { first } => journal.open_active(first, write, &mut report)?,
            }
        }
        journal.durable = journal.tip.clone();
        journal.open_merged(&files, base.cut, write, &mut report)?;
        Ok((journal, report))
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
        let (mut journal, report) = Self::open(storage, self.info, base, self.limits, cache, true)?;
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

    fn broken(&mut self, first: u64, last: u64, what: &str, report: &mut OpenReport) {
        let what = format!("cuts {first} to {last} are lost: {what}");
        report.damage.push(what.clone());
        self.history.apply(Boundary { cut: first, what: BoundaryKind::Damaged });
        self.parts.push_back(Part::Broken { first, last, what });
        self.tip.cut = last;
    }

    /// Whether the segment follows what was opened before it; a gap becomes a broken part.
    fn join(&mut self, header: &Header, report: &mut OpenReport) {
        let opened_any = !self.parts.is_empty();
        let after_broken = matches!(self.parts.back(), Some(Part::Broken { .. }));
        if header.first_cut > self.tip.cut + 1 {
            let (first, last) = (self.tip.cut + 1, header.first_cut - 1);
            self.broken(first, last, "their segment is missing", report);
        } else if opened_any && !after_broken && header.commit_before != self.tip.commit {
            let first = header.first_cut;
            report.damage.push(format!("the segment of cut {first} does not follow the one before it"));
            self.history.apply(Boundary { cut: first, what: BoundaryKind::Damaged });
        }
        // What the base was folded over began before this segment.
        let cut = header.first_cut.min(self.tip.cut);
        if !opened_any && header.damaged {
            self.history.apply(Boundary { cut, what: BoundaryKind::Damaged });
        } else if !opened_any && header.scan_open {
            self.history.apply(Boundary { cut, what: BoundaryKind::ScanStart });
        }
    }

    fn open_sealed(&mut self, first: u64, last: u64, write: bool, report: &mut OpenReport) -> Result<(), ReadError> {
        let ours = |sealed: Sealed| match self.belongs(&sealed.header) {
            true => Ok(sealed),
            false => Err(ReadError::damaged(&sealed.segment.name, "it is of another disk")),
        };
        let mut opened = Sealed::open(&*self.storage, first, last).and_then(ours);
        // The frames say it all again: only where they are damaged, too, is anything lost.
        if let (Err(ReadError::Damaged { file, what, .. }), true) = (&opened, write) {
            let why = format!("{file}: {what}");
            if let Some(rebuilt) = Sealed::rebuild(&*self.storage, first, last)? {
                report.rebuilt.push(why);
                opened = ours(rebuilt);
            }
        }
        let sealed = match opened {
            Ok(sealed) => sealed,
            Err(ReadError::Damaged { file, what, .. }) => {
                self.broken(first, last, &format!("{file}: {what}"), report);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.join(&sealed.header, report);
        sealed.boundaries.iter().for_each(|boundary| self.history.apply(*boundary));
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
        header.disk == self.info.disk && header.disk_bytes == self.info.disk_bytes
    }

    fn open_active(&mut self, first: u64, write: bool, report: &mut OpenReport) -> Result<(), ReadError> {
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
                self.broken(first, last, "the active segment's header is destroyed", report);
                return Ok(());
            }
        };
        self.join(&header, report);
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
        report.torn_bytes += found.torn_bytes;
        for cut in &found.damaged {
            report.damage.push(format!("{name}: cut {} at {}: {}", cut.cut, cut.at, cut.what));
        }
        found.boundaries.iter().for_each(|boundary| self.history.apply(*boundary));
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
