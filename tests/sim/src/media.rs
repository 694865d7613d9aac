//! What a machine stores on: files and disks that know what is durable and what is only in the page cache.
//!
//! A killed process loses nothing that it wrote. A power cut loses what was not synced: of each change any sector may
//! have reached the media and any may not, in whatever order; names that were not synced with their folder are lost or
//! kept one by one. A sync that failed leaves pages that look clean and were never written.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Disk, DiskIdentity, Durability};
use tidemark_base::random::Random;
use tidemark_base::seam::{SimulatedDisk, World};
use tidemark_base::storage::{OpenMode, Storage, StorageFile};

use crate::counts::Kind;
use crate::paged::{PAGE, Paged};
use crate::world::{Process, Sim};

const SECTOR: usize = 512;
const SLOW_MS_MAX: u64 = 20;

#[derive(Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Length(u64),
}

#[derive(Default)]
struct Inode {
    /// As programs see it. A mapped file has it in `mapped` instead.
    now: Paged,
    durable: Paged,
    changes: Vec<Change>,
    /// A sync failed: what it should have written is not durable, although nothing shows it.
    has_lost: bool,
    mapped: Option<Arc<File>>,
    /// Bytes in which a bit turned, and what they are since: until they are written over.
    turned: Vec<(usize, u8)>,
}

impl Inode {
    /// What a mapped file holds.
    fn mapped_content(file: &File) -> Vec<u8> {
        let mut content = vec![0; file.metadata().map_or(0, |metadata| metadata.len()) as usize];
        file.read_exact_at(&mut content, 0).expect("memory can be read");
        content
    }

    fn bytes(&self) -> u64 {
        self.mapped.as_ref().map_or(self.now.bytes(), |file| file.metadata().map_or(0, |found| found.len()))
    }

    fn change(&mut self, change: Change) {
        self.turned.retain(|(byte, _)| !change.covers(*byte));
        if let Some(file) = &self.mapped {
            match &change {
                Change::Write(at, data) => file.write_all_at(data, *at).expect("memory can be written"),
                Change::Zero(at, length) => {
                    file.write_all_at(&vec![0; *length as usize], *at).expect("memory can be written");
                }
                Change::Length(bytes) => file.set_len(*bytes).expect("memory can be resized"),
            }
        } else {
            apply(&mut self.now, &change);
            self.changes.push(change);
        }
    }

    fn sync(&mut self) {
        let changes = std::mem::take(&mut self.changes);
        if let Some(file) = &self.mapped {
            let content = Self::mapped_content(file);
            self.durable.resize(content.len() as u64);
            for (page, after) in content.chunks(PAGE).enumerate() {
                let before = self.durable.page(page as u64);
                if before.is_none_or(|before| before[..after.len()] != *after) {
                    self.durable.write((page * PAGE) as u64, after);
                }
            }
        } else if self.has_lost {
            changes.iter().for_each(|change| apply(&mut self.durable, change));
        } else if changes.iter().any(|change| matches!(change, Change::Length(_))) {
            self.durable = self.now.clone();
        } else {
            // Nothing but these changes is between the two.
            for change in &changes {
                match change {
                    Change::Write(at, data) => self.durable.share(&self.now, *at, data.len() as u64),
                    Change::Zero(at, length) => self.durable.share(&self.now, *at, *length),
                    Change::Length(_) => {}
                }
            }
        }
    }

    /// Gives it a file of the real machine's memory, for those who map it.
    fn map(&mut self) -> io::Result<Arc<File>> {
        if self.mapped.is_none() {
            let descriptor = nix::sys::memfd::memfd_create(c"sim", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
            let file = File::from(descriptor);
            let mut content = vec![0; self.now.bytes() as usize];
            self.now.read(0, &mut content);
            file.write_all_at(&content, 0)?;
            // What was not synced when it was mapped counts as not synced still: the content differs from `durable`.
            self.changes.clear();
            self.now = Paged::default();
            self.mapped = Some(Arc::new(file));
        }
        Ok(self.mapped.clone().expect("made above"))
    }
}

impl Change {
    /// Whether the byte is another one after it.
    fn covers(&self, byte: usize) -> bool {
        match self {
            Change::Write(at, data) => (*at as usize..*at as usize + data.len()).contains(&byte),
            Change::Zero(at, length) => (*at as usize..(*at + *length) as usize).contains(&byte),
            Change::Length(bytes) => byte >= *bytes as usize,
        }
    }
}

fn apply(content: &mut Paged, change: &Change) {
    match change {
        Change::Write(at, data) => content.write(*at, data),
        Change::Zero(at, length) => content.zero(*at, *length),
        Change::Length(bytes) => content.resize(*bytes),
    }
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(String, u64),
    Gone(String),
    Moved { from: String, to: String, inode: u64 },
}

impl NameChange {
    /// The folders that have to be synced for it to be durable.
    fn is_in(&self, folder: &str) -> bool {
        match self {
            NameChange::Set(name, _) | NameChange::Gone(name) => parent(name) == folder,
            NameChange::Moved { from, to, .. } => parent(to) == folder || parent(from) == folder,
        }
    }

    fn apply(&self, names: &mut BTreeMap<String, u64>) {
        match self {
            NameChange::Set(name, inode) => drop(names.insert(name.clone(), *inode)),
            NameChange::Gone(name) => drop(names.remove(name)),
            NameChange::Moved { from, to, inode } => {
                names.remove(from);
                names.insert(to.clone(), *inode);
            }
        }
    }
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[derive(Default)]
struct Files {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    name_changes: Vec<NameChange>,
    next: u64,
}

/// How likely each fault is: one in so many operations; 0 is never.
#[derive(Clone, Copy, Default, Debug)]
pub struct FaultRates {
    pub read: u64,
    pub write: u64,
    pub sync: u64,
    pub no_room: u64,
    pub disk: u64,
    pub disk_flush: u64,
}

/// One machine's media.
pub struct Media {
    sim: Weak<Sim>,
    process: Process,
    files: RefCell<Files>,
    disks: RefCell<BTreeMap<String, Arc<MemoryDisk>>>,
    boot: Cell<u64>,
    pub rates: Cell<FaultRates>,
    /// One operation of a file or disk in so many takes time, up to [`SLOW_MS_MAX`]; 0: none does.
    pub slow_one_in: Cell<u64>,
    /// No room at all for a while.
    pub is_full: Cell<bool>,
    /// Syncs, by what the name of the file says it is.
    pub syncs: RefCell<BTreeMap<String, u64>>,
    /// Kill the process just before or just after the n-th sync of a kind.
    pub stop_at_sync: RefCell<Option<(String, u64, bool)>>,
}

impl Media {
    pub fn new(process: Process, sim: Weak<Sim>) -> Rc<Self> {
        Rc::new(Self {
            sim,
            process,
            files: RefCell::default(),
            disks: RefCell::default(),
            boot: Cell::new(1),
            rates: Cell::default(),
            slow_one_in: Cell::default(),
            is_full: Cell::new(false),
            syncs: RefCell::default(),
            stop_at_sync: RefCell::default(),
        })
    }

    pub fn sim(&self) -> Rc<Sim> {
        self.sim.upgrade().expect("the simulation outlives its media")
    }

    pub fn boot(&self) -> u64 {
        self.boot.get()
    }

    /// Another machine, with nothing on it, is in the place of this one.
    pub fn replace(&self) {
        *self.files.borrow_mut() = Files::default();
    }

    pub fn forget(&self) {
        *self.files.borrow_mut() = Files::default();
        self.disks.borrow_mut().clear();
    }

    pub fn add_disk(self: &Rc<Self>, path: &str, bytes: u64) -> Arc<MemoryDisk> {
        let inode = self.disks.borrow().len() as u64 + 100;
        // Reached from one real thread alone, as everything here is.
        let disk = Arc::new(MemoryDisk {
            media: Rc::downgrade(self),
            inode,
            bytes,
            state: RefCell::new(DiskState {
                now: Paged::new(bytes),
                durable: Paged::new(bytes),
                pending: Vec::new(),
                has_lost: false,
                changed: 1,
            }),
            on_lost: std::cell::OnceCell::new(),
        });
        self.disks.borrow_mut().insert(path.to_owned(), disk.clone());
        disk
    }

    pub fn disk(&self, path: &str) -> Option<Arc<dyn SimulatedDisk>> {
        self.disks.borrow().get(path).map(|disk| disk.clone() as Arc<dyn SimulatedDisk>)
    }

    /// The power goes, and comes back.
    pub fn cut_power(&self, random: &mut Random) {
        self.boot.set(self.boot.get() + 1);
        let sim = self.sim();
        let mut files = self.files.borrow_mut();
        let files = &mut *files;
        // How much the page cache had written back by itself: nothing, everything, or any part.
        let mood = random.below(4);
        let survives = |random: &mut Random| match mood {
            0 => false,
            1 => true,
            _ => random.chance(1, 2),
        };
        let ordered_names = random.chance(1, 2);
        let mut names = files.durable_names.clone();
        for change in std::mem::take(&mut files.name_changes) {
            if survives(random) {
                change.apply(&mut names);
            } else {
                sim.count(Kind::LostName);
                if ordered_names {
                    break;
                }
            }
        }
        let mut kept = BTreeMap::new();
        for inode in names.values() {
            let Some(mut file) = files.inodes.remove(inode) else { continue };
            let mut content = std::mem::take(&mut file.durable);
            if let Some(mapped) = &file.mapped {
                let now = Inode::mapped_content(mapped);
                content.resize(now.len() as u64);
                for (index, after) in now.chunks(SECTOR).enumerate() {
                    let mut before = [0; SECTOR];
                    content.read((index * SECTOR) as u64, &mut before);
                    if before[..after.len()] != *after && survives(random) {
                        content.write((index * SECTOR) as u64, after);
                    }
                }
            }
            for change in &file.changes {
                match change {
                    Change::Write(at, data) => survive_write(&mut content, *at, data, &mut || survives(random), &sim),
                    change if survives(random) => apply(&mut content, change),
                    _ => sim.count(Kind::LostWrite),
                }
            }
            let mut turned = file.turned;
            turned.retain(|(byte, value)| {
                let mut is = [0];
                content.read(*byte as u64, &mut is);
                (*byte as u64) < content.bytes() && is[0] == *value
            });
            kept.insert(*inode, Inode { now: content.clone(), durable: content, turned, ..Inode::default() });
        }
        files.inodes = kept;
        files.durable_names = names.clone();
        files.names = names;
        for disk in self.disks.borrow().values() {
            disk.cut_power(&mut || survives(random), &sim);
        }
    }

    /// Turns one bit of a file whose name contains `part`, where it lies on the media. Says which.
    pub fn rot(&self, random: &mut Random, part: &[&str]) -> Option<(String, u64)> {
        let mut files = self.files.borrow_mut();
        let found: Vec<(String, u64)> = files
            .names
            .iter()
            .filter(|(name, inode)| {
                part.iter().any(|part| name.contains(part))
                    && files.inodes.get(inode).is_some_and(|file| file.durable.bytes() > 0 && file.mapped.is_none())
            })
            .map(|(name, inode)| (name.clone(), *inode))
            .collect();
        let (name, inode) = found.get(random.below(found.len() as u64) as usize)?.clone();
        let file = files.inodes.get_mut(&inode)?;
        let bit = random.below(file.durable.bytes() * 8);
        let (byte, mask) = ((bit / 8) as usize, 1 << (bit % 8));
        // What is only in memory does not rot on the medium.
        if byte as u64 >= file.now.bytes() || file.changes.iter().any(|change| change.covers(byte)) {
            return None;
        }
        file.durable.flip(byte, mask);
        let turned = file.now.flip(byte, mask);
        file.turned.retain(|(other, _)| *other != byte);
        file.turned.push((byte, turned));
        Some((name, bit))
    }

    /// Files, by name, in which a bit turned that nobody wrote over since, with where.
    pub fn turned(&self) -> Vec<(String, usize)> {
        let files = self.files.borrow();
        let of = |(name, inode): (&String, &u64)| {
            let turned = files.inodes.get(inode).map(|file| file.turned.clone()).unwrap_or_default();
            turned.into_iter().map(|(byte, _)| (name.clone(), byte)).collect::<Vec<_>>()
        };
        files.names.iter().flat_map(of).collect()
    }

    /// How long a file is, by part of its name; for tests.
    pub fn names(&self) -> Vec<String> {
        self.files.borrow().names.keys().cloned().collect()
    }

    fn step(&self) -> Rc<Sim> {
        let sim = self.sim();
        sim.step();
        sim
    }

    /// The medium is at work: others go on meanwhile, and time passes.
    fn take_time(&self, sim: &Sim) {
        if sim.running() == self.process && sim.one_in(self.slow_one_in.get()) {
            sim.count(Kind::SlowMedium);
            sim.sleep(Duration::from_micros(1 + sim.below(SLOW_MS_MAX * 1000)));
        }
    }

    /// Whether an operation fails now. Only those of the machine's own process do.
    fn fails(&self, sim: &Sim, rate: u64, kind: Kind, error: i32, what: &str) -> io::Result<()> {
        if sim.running() == self.process && sim.one_in(rate) {
            sim.count(kind);
            sim.note(|| format!("{} of {what}", kind.text()));
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok(())
    }

    fn check_room(&self, sim: &Sim, what: &str) -> io::Result<()> {
        if self.is_full.get() && sim.running() == self.process {
            sim.count(Kind::NoRoom);
            sim.note(|| format!("no room for {what}"));
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.fails(sim, self.rates.get().no_room, Kind::NoRoom, libc::ENOSPC, what)
    }

    /// Counts a sync by its kind, and says whether the process ends here.
    fn at_sync(&self, name: &str, is_after: bool) {
        let kind = kind_of(name);
        let count = {
            let mut syncs = self.syncs.borrow_mut();
            let count = syncs.entry(kind.to_owned()).or_default();
            if !is_after {
                *count += 1;
            }
            *count
        };
        let stops = self
            .stop_at_sync
            .borrow()
            .as_ref()
            .is_some_and(|(of, number, after)| of == kind && *number == count && *after == is_after);
        if stops {
            self.stop_at_sync.borrow_mut().take();
            let sim = self.sim();
            sim.traps.borrow_mut().entry(self.process).or_default().steps_left = Some(0);
            sim.step();
        }
    }
}

/// Keeps of a write the sectors that reached the media.
fn survive_write(content: &mut Paged, at: u64, data: &[u8], survives: &mut dyn FnMut() -> bool, sim: &Sim) {
    let (mut from, mut kept, mut lost) = (0, 0, 0);
    let mut lost_first = false;
    while from < data.len() {
        let until = (from + SECTOR - (at as usize + from) % SECTOR).min(data.len());
        if survives() {
            kept += 1;
            lost_first |= lost > 0;
            content.write(at + from as u64, &data[from..until]);
        } else {
            lost += 1;
        }
        from = until;
    }
    if lost > 0 {
        sim.count(if kept > 0 { Kind::TornWrite } else { Kind::LostWrite });
    }
    if lost_first {
        sim.count(Kind::ReorderedWrite);
    }
}

/// What a file is, by its name.
pub fn kind_of(name: &str) -> &'static str {
    let last = name.rsplit('/').next().unwrap_or_default();
    match last {
        _ if last.starts_with("intent") => "intent",
        _ if last.starts_with("session") => "session",
        _ if last.starts_with("dirty") || last.contains("scan") => "bitmap",
        _ if last.starts_with("consumer") || last.starts_with("cursor") => "cursor",
        _ if last.ends_with(".hrl") => "log",
        _ if last.contains(".hrl") || last.ends_with(".companion") => "companion",
        _ if last.starts_with("manifest") => "manifest",
        _ if last.starts_with("base") || last.starts_with("sums") => "base",
        _ if last.starts_with("points") => "points",
        _ if name.starts_with("server") || name.starts_with("second") => "journal",
        _ => "other",
    }
}

/// A folder of a machine's media.
pub struct MediaFolder {
    media: Rc<Media>,
    prefix: String,
}

// SAFETY: everything of a simulation is reached by the one real thread that runs it; the traits of the product ask for
// more because it runs on many.
unsafe impl Send for MediaFolder {}
unsafe impl Sync for MediaFolder {}

impl MediaFolder {
    pub fn new(media: Rc<Media>, prefix: String) -> Self {
        Self { media, prefix }
    }

    fn full(&self, name: &str) -> String {
        if name.is_empty() { self.prefix.clone() } else { format!("{}/{name}", self.prefix) }
    }
}

impl Storage for MediaFolder {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let name = self.full(name);
        let sim = self.media.step();
        let found = self.media.files.borrow().names.get(&name).copied();
        let inode = match (found, mode) {
            (Some(_), OpenMode::Create) => return Err(io::Error::from_raw_os_error(libc::EEXIST)),
            (Some(inode), _) => inode,
            (None, OpenMode::Create | OpenMode::OpenOrCreate) => {
                self.media.check_room(&sim, &name)?;
                let mut files = self.media.files.borrow_mut();
                files.next += 1;
                let inode = files.next;
                files.inodes.insert(inode, Inode::default());
                files.names.insert(name.clone(), inode);
                files.name_changes.push(NameChange::Set(name.clone(), inode));
                inode
            }
            (None, _) => return Err(io::Error::from_raw_os_error(libc::ENOENT)),
        };
        Ok(Arc::new(MediaFile {
            media: self.media.clone(),
            name,
            inode,
            is_latched: Cell::new(false),
            mapped: std::cell::OnceCell::new(),
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.full(from), self.full(to));
        let sim = self.media.step();
        self.media.fails(&sim, self.media.rates.get().write, Kind::WriteError, libc::EIO, &to)?;
        let mut files = self.media.files.borrow_mut();
        let inode = files.names.remove(&from).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        files.names.insert(to.clone(), inode);
        files.name_changes.push(NameChange::Moved { from, to, inode });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let name = self.full(name);
        let sim = self.media.step();
        self.media.fails(&sim, self.media.rates.get().write, Kind::WriteError, libc::EIO, &name)?;
        let mut files = self.media.files.borrow_mut();
        files.names.remove(&name).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        files.name_changes.push(NameChange::Gone(name));
        Ok(())
    }

    fn create_folder(&self, _name: &str) -> io::Result<()> {
        self.media.step();
        Ok(())
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        let prefix = format!("{}/", self.full(name));
        self.media.step();
        let mut files = self.media.files.borrow_mut();
        let names: Vec<String> = files.names.keys().filter(|name| name.starts_with(&prefix)).cloned().collect();
        for name in names {
            files.names.remove(&name);
            files.name_changes.push(NameChange::Gone(name));
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{}/", self.full(folder));
        self.media.step();
        let files = self.media.files.borrow();
        let mut names: Vec<String> = files
            .names
            .keys()
            .filter_map(|name| Some(name.strip_prefix(&prefix)?.split('/').next()?.to_owned()))
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        let name = self.full(name);
        self.media.step();
        let folder = format!("{name}/");
        Ok(self.media.files.borrow().names.keys().any(|other| *other == name || other.starts_with(&folder)))
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        let folder = self.full(folder);
        let sim = self.media.step();
        self.media.fails(&sim, self.media.rates.get().sync, Kind::SyncError, libc::EIO, &folder)?;
        let mut files = self.media.files.borrow_mut();
        let files = &mut *files;
        let (synced, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut files.name_changes).into_iter().partition(|change| change.is_in(&folder));
        files.name_changes = rest;
        synced.iter().for_each(|change| change.apply(&mut files.durable_names));
        Ok(())
    }

    fn available_bytes(&self) -> io::Result<u64> {
        self.media.step();
        Ok(if self.media.is_full.get() { 0 } else { 1 << 40 })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/").join(self.full(name))
    }

    fn folder(&self, name: &str) -> Arc<dyn Storage> {
        Arc::new(MediaFolder { media: self.media.clone(), prefix: self.full(name) })
    }
}

struct MediaFile {
    media: Rc<Media>,
    name: String,
    inode: u64,
    is_latched: Cell<bool>,
    mapped: std::cell::OnceCell<Arc<File>>,
}

// SAFETY: as for [`MediaFolder`].
unsafe impl Send for MediaFile {}
unsafe impl Sync for MediaFile {}

impl MediaFile {
    fn with<T>(&self, act: impl FnOnce(&mut Inode) -> T) -> T {
        act(self.media.files.borrow_mut().inodes.entry(self.inode).or_default())
    }

    fn check_latch(&self) -> io::Result<()> {
        if self.is_latched.get() {
            return Err(io::Error::other(format!("{}: an earlier sync failed; reopen the file", self.name)));
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: Vec<u8>) -> io::Result<()> {
        self.check_latch()?;
        let sim = self.media.step();
        self.media.take_time(&sim);
        let rates = self.media.rates.get();
        let result = self
            .media
            .check_room(&sim, &self.name)
            .and_then(|()| self.media.fails(&sim, rates.write, Kind::WriteError, libc::EIO, &self.name));
        // A write that failed may have been done in part.
        let length = data.len() as u64;
        let mut data = data;
        if result.is_err() {
            data.truncate(sim.below(length + 1) as usize);
        }
        sim.mix(offset ^ length);
        self.with(|file| file.change(Change::Write(offset, data)));
        result
    }
}

impl StorageFile for MediaFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let sim = self.media.step();
        self.media.fails(&sim, self.media.rates.get().read, Kind::ReadError, libc::EIO, &self.name)?;
        self.with(|file| match &file.mapped {
            Some(file) => file.read_exact_at(buffer, offset),
            None => {
                if offset.saturating_add(buffer.len() as u64) > file.now.bytes() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                file.now.read(offset, buffer);
                Ok(())
            }
        })
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data.to_vec())
    }

    fn write_vectored_at(&self, offset: u64, data: &[IoSlice<'_>]) -> io::Result<()> {
        let mut all = Vec::with_capacity(data.iter().map(|slice| slice.len()).sum());
        data.iter().for_each(|slice| all.extend_from_slice(slice));
        self.write(offset, all)
    }

    fn sync(&self) -> io::Result<()> {
        self.check_latch()?;
        self.media.at_sync(&self.name, false);
        let sim = self.media.step();
        self.media.take_time(&sim);
        let result = self.media.fails(&sim, self.media.rates.get().sync, Kind::SyncError, libc::EIO, &self.name);
        if result.is_err() {
            self.is_latched.set(true);
            // Clean pages that were never written: no later sync brings them to the media.
            self.with(|file| {
                file.changes.clear();
                file.has_lost = true;
            });
            return result;
        }
        self.with(Inode::sync);
        self.media.at_sync(&self.name, true);
        Ok(())
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.check_latch()?;
        self.media.step();
        self.with(|file| file.change(Change::Length(bytes)));
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.with(|file| file.bytes()))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.bytes()
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_latch()?;
        self.media.step();
        self.with(|file| file.change(Change::Zero(offset, length)));
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_latch()?;
        let sim = self.media.step();
        self.media.check_room(&sim, &self.name)?;
        self.with(|file| {
            if file.bytes() < offset + length {
                file.change(Change::Length(offset + length));
            }
        });
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        // The server's files are not mapped: it uses one for SEEK_DATA and locks, which it can do without.
        if self.media.process != Process::Host {
            return None;
        }
        if self.mapped.get().is_none() {
            let file = self.with(Inode::map).ok()?;
            let _ = self.mapped.set(file);
        }
        self.mapped.get().map(|file| &**file)
    }
}

/// A protected disk.
pub struct MemoryDisk {
    media: Weak<Media>,
    inode: u64,
    bytes: u64,
    state: RefCell<DiskState>,
    /// Told when a flush fails and what was written is lost.
    on_lost: std::cell::OnceCell<Box<dyn Fn()>>,
}

// SAFETY: as for [`MediaFolder`].
unsafe impl Send for MemoryDisk {}
unsafe impl Sync for MemoryDisk {}

struct DiskState {
    now: Paged,
    durable: Paged,
    /// Written and not flushed, in order.
    pending: Vec<(u64, Vec<u8>)>,
    /// What is durable differs from what is seen by more than what is pending.
    has_lost: bool,
    changed: i128,
}

impl MemoryDisk {
    pub fn set_on_lost(&self, act: impl Fn() + 'static) {
        let _ = self.on_lost.set(Box::new(act));
    }

    /// Has it hold something before anybody protects it: written by a program that did not flush.
    pub fn fill_before(&self, random: &mut Random) {
        let mut state = self.state.borrow_mut();
        for _ in 0..1 + random.below(6) {
            let sectors = 1 + random.below(256.min(self.bytes / SECTOR as u64));
            let offset = random.below(self.bytes / SECTOR as u64 - sectors + 1) * SECTOR as u64;
            let mut data = vec![0; sectors as usize * SECTOR];
            random.fill(&mut data);
            state.now.write(offset, &data);
            state.pending.push((offset, data));
        }
    }

    /// What a sector holds now.
    pub fn peek(&self, sector: u64) -> [u8; SECTOR] {
        let mut content = [0; SECTOR];
        self.state.borrow().now.read(sector * SECTOR as u64, &mut content);
        content
    }

    /// What a sector holds on the medium.
    pub fn peek_durable(&self, sector: u64) -> [u8; SECTOR] {
        let mut content = [0; SECTOR];
        self.state.borrow().durable.read(sector * SECTOR as u64, &mut content);
        content
    }

    pub fn snapshot(&self) -> Paged {
        self.state.borrow().now.clone()
    }

    fn media(&self) -> Rc<Media> {
        self.media.upgrade().expect("the media outlive their disks")
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let sim = self.media().sim();
        let mut state = self.state.borrow_mut();
        state.now.write(offset, data);
        state.pending.push((offset, data.to_vec()));
        state.changed = i128::from(tidemark_base::Timestamp::from_system(sim.wall_now()).0);
    }

    fn cut_power(&self, survives: &mut dyn FnMut() -> bool, sim: &Sim) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        for (offset, data) in std::mem::take(&mut state.pending) {
            let (mut kept, mut lost, mut reordered) = (0, 0, false);
            for (index, sector) in data.chunks(SECTOR).enumerate() {
                if survives() {
                    kept += 1;
                    reordered |= lost > 0;
                    state.durable.write(offset + (index * SECTOR) as u64, sector);
                } else {
                    lost += 1;
                }
            }
            if lost > 0 {
                sim.count(if kept > 0 { Kind::TornWrite } else { Kind::LostWrite });
            }
            if reordered {
                sim.count(Kind::ReorderedWrite);
            }
        }
        state.now = state.durable.clone();
        state.has_lost = false;
    }
}

impl Disk for MemoryDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let media = self.media();
        let sim = media.step();
        media.fails(&sim, media.rates.get().disk, Kind::DiskError, libc::EIO, "the disk (read)")?;
        self.state.borrow().now.read(offset, buffer);
        // Long enough for others to write in between.
        sim.step();
        media.take_time(&sim);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let media = self.media();
        let sim = media.step();
        sim.mix(offset ^ data.len() as u64);
        // Not at once: a kill in the middle leaves a part.
        let mut at = 0;
        while at < data.len() {
            let result = media.fails(&sim, media.rates.get().disk, Kind::DiskError, libc::EIO, "the disk (write)");
            result?;
            let left = (data.len() - at) / SECTOR;
            let part = if sim.one_in(4) { (1 + sim.below(left as u64)) as usize * SECTOR } else { left * SECTOR };
            self.write(offset + at as u64, &data[at..at + part]);
            at += part;
            sim.step();
            media.take_time(&sim);
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => {
                media.fails(&sim, media.rates.get().disk_flush, Kind::DiskFlushError, libc::EIO, "the disk (fua)")?;
                let mut state = self.state.borrow_mut();
                let state = &mut *state;
                // This write alone; what others wrote before to the same place came first.
                state.durable.write(offset, data);
                // Another write to the same place may have come after it: that one is not pending any more, nor durable.
                let mut is = vec![0; data.len()];
                state.now.read(offset, &mut is);
                state.has_lost |= is != data;
                let extent = Extent::new(offset, data.len() as u64);
                let pending = std::mem::take(&mut state.pending);
                for (at, written) in pending {
                    let (start, end) = (extent.offset.max(at), extent.end().min(at + written.len() as u64));
                    if start >= end {
                        state.pending.push((at, written));
                        continue;
                    }
                    if at < start {
                        state.pending.push((at, written[..(start - at) as usize].to_vec()));
                    }
                    if end < at + written.len() as u64 {
                        state.pending.push((end, written[(end - at) as usize..].to_vec()));
                    }
                }
                Ok(())
            }
        }
    }

    fn zero(&self, extent: Extent, _discard: bool, durability: Durability) -> io::Result<()> {
        let media = self.media();
        let sim = media.step();
        media.fails(&sim, media.rates.get().disk, Kind::DiskError, libc::EIO, "the disk (zero)")?;
        let zeroes = vec![0; 64 << 10];
        let mut at = extent.offset;
        while at < extent.end() {
            let length = (extent.end() - at).min(zeroes.len() as u64);
            self.write(at, &zeroes[..length as usize]);
            at += length;
            sim.step();
            media.take_time(&sim);
        }
        if durability == Durability::Durable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        let media = self.media();
        let sim = media.step();
        media.take_time(&sim);
        let result =
            media.fails(&sim, media.rates.get().disk_flush, Kind::DiskFlushError, libc::EIO, "the disk (flush)");
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let pending = std::mem::take(&mut state.pending);
        if result.is_ok() {
            for (offset, data) in pending {
                if state.has_lost {
                    state.durable.write(offset, &data);
                } else {
                    state.durable.share(&state.now, offset, data.len() as u64);
                }
            }
        } else {
            state.has_lost = true;
            if let Some(act) = self.on_lost.get() {
                act();
            }
        }
        result
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.media().step();
        let state = self.state.borrow();
        let (page_bytes, page) = (PAGE as u64, offset / PAGE as u64);
        let is_data = state.now.holds(page);
        let mut end = page + 1;
        while end * page_bytes < self.bytes && state.now.holds(end) == is_data {
            end += 1;
        }
        let kind = if is_data { Allocation::Data } else { Allocation::Hole };
        Ok(((end * page_bytes).min(self.bytes) - offset, kind))
    }
}

impl SimulatedDisk for MemoryDisk {
    fn identity(&self) -> io::Result<DiskIdentity> {
        self.media().step();
        let changed = self.state.borrow().changed;
        Ok(DiskIdentity {
            device: 1,
            inode: self.inode,
            bytes: self.bytes,
            changed_ns: changed,
            modified_ns: changed,
            born_ns: Some(1),
            data_write_guid: None,
            is_block_device: false,
        })
    }
}
