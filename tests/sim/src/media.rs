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

use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Disk, DiskIdentity, Durability};
use tidemark_base::random::Random;
use tidemark_base::seam::{SimulatedDisk, World};
use tidemark_base::storage::{OpenMode, Storage, StorageFile};

use crate::counts::Kind;
use crate::world::{Process, Sim};

const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Rc<[u8]>),
    Zero(u64, u64),
    Length(u64),
}

#[derive(Default)]
struct Inode {
    /// As programs see it. A mapped file has it in `mapped` instead.
    now: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Change>,
    mapped: Option<Arc<File>>,
    /// Bytes in which a bit turned, and what they are since: until they are written over.
    turned: Vec<(usize, u8)>,
}

impl Inode {
    fn content(&self) -> Vec<u8> {
        match &self.mapped {
            None => self.now.clone(),
            Some(file) => {
                let mut content = vec![0; file.metadata().map_or(0, |metadata| metadata.len()) as usize];
                file.read_exact_at(&mut content, 0).expect("memory can be read");
                content
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.mapped.as_ref().map_or(self.now.len() as u64, |file| file.metadata().map_or(0, |found| found.len()))
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
        if self.mapped.is_some() {
            self.durable = self.content();
        } else {
            for change in std::mem::take(&mut self.changes) {
                apply(&mut self.durable, &change);
            }
        }
    }

    /// Gives it a file of the real machine's memory, for those who map it.
    fn map(&mut self) -> io::Result<Arc<File>> {
        if self.mapped.is_none() {
            let descriptor = nix::sys::memfd::memfd_create(c"sim", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
            let file = File::from(descriptor);
            file.write_all_at(&self.now, 0)?;
            file.set_len(self.now.len() as u64)?;
            // What was not synced when it was mapped counts as not synced still: the content differs from `durable`.
            self.changes.clear();
            self.now = Vec::new();
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

fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, data) => {
            let end = *at as usize + data.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[*at as usize..end].copy_from_slice(data);
        }
        Change::Zero(at, length) => {
            let end = ((*at + *length) as usize).min(content.len());
            if (*at as usize) < end {
                content[*at as usize..end].fill(0);
            }
        }
        Change::Length(bytes) => content.resize(*bytes as usize, 0),
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
                now: BTreeMap::new(),
                changed: 1,
                pending: Vec::new(),
                durable: BTreeMap::new(),
            }),
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
            if file.mapped.is_some() {
                let now = file.content();
                content.resize(now.len(), 0);
                for (before, after) in content.chunks_mut(SECTOR).zip(now.chunks(SECTOR)) {
                    if before != after && survives(random) {
                        before.copy_from_slice(after);
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
            turned.retain(|(byte, value)| content.get(*byte) == Some(value));
            let (now, changes) = (content.clone(), Vec::new());
            kept.insert(*inode, Inode { now, durable: content, changes, mapped: None, turned });
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
                    && files.inodes.get(inode).is_some_and(|file| !file.durable.is_empty() && file.mapped.is_none())
            })
            .map(|(name, inode)| (name.clone(), *inode))
            .collect();
        let (name, inode) = found.get(random.below(found.len() as u64) as usize)?.clone();
        let file = files.inodes.get_mut(&inode)?;
        let bit = random.below(file.durable.len() as u64 * 8);
        let (byte, mask) = ((bit / 8) as usize, 1 << (bit % 8));
        // What is only in memory does not rot on the medium.
        if byte >= file.now.len() || file.changes.iter().any(|change| change.covers(byte)) {
            return None;
        }
        file.durable[byte] ^= mask;
        file.now[byte] ^= mask;
        let turned = file.now[byte];
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
fn survive_write(content: &mut Vec<u8>, at: u64, data: &[u8], survives: &mut dyn FnMut() -> bool, sim: &Sim) {
    let (mut from, mut kept, mut lost) = (0, 0, 0);
    let mut lost_first = false;
    while from < data.len() {
        let until = (from + SECTOR - (at as usize + from) % SECTOR).min(data.len());
        if survives() {
            kept += 1;
            lost_first |= lost > 0;
            apply(content, &Change::Write(at + from as u64, data[from..until].into()));
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
        _ if name.starts_with("server") => "journal",
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
        let rates = self.media.rates.get();
        let result = self
            .media
            .check_room(&sim, &self.name)
            .and_then(|()| self.media.fails(&sim, rates.write, Kind::WriteError, libc::EIO, &self.name));
        // A write that failed may have been done in part.
        let length = if result.is_ok() { data.len() } else { sim.below(data.len() as u64 + 1) as usize };
        sim.mix(offset ^ data.len() as u64);
        self.with(|file| file.change(Change::Write(offset, data[..length].into())));
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
                let range = offset as usize..(offset as usize).saturating_add(buffer.len());
                let found = file.now.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(found);
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
        let result = self.media.fails(&sim, self.media.rates.get().sync, Kind::SyncError, libc::EIO, &self.name);
        if result.is_err() {
            self.is_latched.set(true);
            // Clean pages that were never written: no later sync brings them to the media.
            self.with(|file| file.changes.clear());
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
        if self.media.process == Process::Server {
            return None;
        }
        if self.mapped.get().is_none() {
            let file = self.with(Inode::map).ok()?;
            let _ = self.mapped.set(file);
        }
        self.mapped.get().map(|file| &**file)
    }
}

const PAGE: u64 = 4096;
pub type Pages = BTreeMap<u64, Rc<[u8]>>;

/// A protected disk.
pub struct MemoryDisk {
    media: Weak<Media>,
    inode: u64,
    bytes: u64,
    state: RefCell<DiskState>,
}

// SAFETY: as for [`MediaFolder`].
unsafe impl Send for MemoryDisk {}
unsafe impl Sync for MemoryDisk {}

struct DiskState {
    now: Pages,
    durable: Pages,
    /// Written and not flushed, in order.
    pending: Vec<(u64, Rc<[u8]>)>,
    changed: i128,
}

fn write_pages(pages: &mut Pages, offset: u64, data: &[u8]) {
    let mut at = 0;
    while at < data.len() {
        let place = offset + at as u64;
        let (page, within) = (place / PAGE, (place % PAGE) as usize);
        let length = (PAGE as usize - within).min(data.len() - at);
        let mut content: Vec<u8> = pages.get(&page).map_or_else(|| vec![0; PAGE as usize], |found| found.to_vec());
        content[within..within + length].copy_from_slice(&data[at..at + length]);
        pages.insert(page, content.into());
        at += length;
    }
}

pub fn read_pages(pages: &Pages, offset: u64, buffer: &mut [u8]) {
    let mut at = 0;
    while at < buffer.len() {
        let place = offset + at as u64;
        let (page, within) = (place / PAGE, (place % PAGE) as usize);
        let length = (PAGE as usize - within).min(buffer.len() - at);
        match pages.get(&page) {
            Some(found) => buffer[at..at + length].copy_from_slice(&found[within..within + length]),
            None => buffer[at..at + length].fill(0),
        }
        at += length;
    }
}

impl MemoryDisk {
    /// What a sector holds now.
    pub fn peek(&self, sector: u64) -> Vec<u8> {
        let mut content = vec![0; SECTOR];
        read_pages(&self.state.borrow().now, sector * SECTOR as u64, &mut content);
        content
    }

    pub fn snapshot(&self) -> Pages {
        self.state.borrow().now.clone()
    }

    fn media(&self) -> Rc<Media> {
        self.media.upgrade().expect("the media outlive their disks")
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let sim = self.media().sim();
        let mut state = self.state.borrow_mut();
        write_pages(&mut state.now, offset, data);
        state.pending.push((offset, data.into()));
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
                    write_pages(&mut state.durable, offset + (index * SECTOR) as u64, sector);
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
        read_pages(&self.state.borrow().now, offset, buffer);
        // Long enough for others to write in between.
        sim.step();
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
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => {
                media.fails(&sim, media.rates.get().disk_flush, Kind::DiskFlushError, libc::EIO, "the disk (fua)")?;
                let mut state = self.state.borrow_mut();
                let state = &mut *state;
                // This write alone; what others wrote before to the same place came first.
                write_pages(&mut state.durable, offset, data);
                let extent = Extent::new(offset, data.len() as u64);
                let pending = std::mem::take(&mut state.pending);
                for (at, written) in pending {
                    for (index, sector) in written.chunks(SECTOR).enumerate() {
                        let place = at + (index * SECTOR) as u64;
                        if !extent.contains(&Extent::new(place, SECTOR as u64)) {
                            state.pending.push((place, sector.into()));
                        }
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
        }
        if durability == Durability::Durable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        let media = self.media();
        let sim = media.step();
        let result =
            media.fails(&sim, media.rates.get().disk_flush, Kind::DiskFlushError, libc::EIO, "the disk (flush)");
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let pending = std::mem::take(&mut state.pending);
        if result.is_ok() {
            for (offset, data) in pending {
                write_pages(&mut state.durable, offset, &data);
            }
        }
        result
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.media().step();
        let state = self.state.borrow();
        let page = offset / PAGE;
        let is_data = state.now.contains_key(&page);
        let mut end = page + 1;
        while end * PAGE < self.bytes && state.now.contains_key(&end) == is_data {
            end += 1;
        }
        let kind = if is_data { Allocation::Data } else { Allocation::Hole };
        Ok(((end * PAGE).min(self.bytes) - offset, kind))
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
