//! A storage whose crashes can be chosen, and a host whose every cut is known.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::compare::{BLOCK_BYTES, CompareKey, PART_BYTES, pieces};
use tidemark_base::disk::is_zero;
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::{DiskId, Epoch, Extent, Generation, HistoryHash, MachineId, MarkId, Position, Sequence, Timestamp};
use tidemark_proto::replication::{
    Claim, Consistency, CutEnd, CutKind, CutOrdinal, Differing, Found, HashedRun, Hashes, Mark,
};

use super::{Comparer, ReplicaInfo, Session};

/// A small, fast source of chance with a seed.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound.max(1)
    }
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
    Zero(u64, u64),
}

#[derive(Default, Clone)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// What happened since the last sync.
    changes: Vec<Change>,
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
        Change::Length(length) => content.resize(*length as usize, 0),
        Change::Zero(at, length) => {
            let end = ((at + length) as usize).min(content.len());
            content[(*at as usize).min(end)..end].fill(0);
        }
    }
}

#[derive(Default)]
struct World {
    inodes: HashMap<u64, Inode>,
    next: u64,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    /// Folders whose names changed since their sync, with the changes in order: name, and what it names now.
    name_changes: Vec<(String, Option<u64>)>,
    steps: u64,
    crash_at: Option<u64>,
    /// What may still be written behind the ends of files; all of it when `None`.
    room: Option<u64>,
    syncs_fail: bool,
    next_sync_fails: bool,
}

impl World {
    fn step(&mut self) -> io::Result<()> {
        self.steps += 1;
        match self.crash_at {
            Some(at) if self.steps > at => Err(io::Error::other("the power is off")),
            _ => Ok(()),
        }
    }
}

/// Files in memory. What was not synced may be lost, sector by sector, when the power goes.
#[derive(Clone, Default)]
pub struct SimStorage {
    world: Arc<Mutex<World>>,
    prefix: String,
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

impl SimStorage {
    pub fn steps(&self) -> u64 {
        self.world.lock().unwrap().steps
    }

    /// The power goes after this many more steps (writes, syncs, renames).
    pub fn crash_at(&self, step: u64) {
        self.world.lock().unwrap().crash_at = Some(step);
    }

    /// It was a kill and not the power: what was done until then is there, synced or not.
    pub fn go_on(&self) {
        self.world.lock().unwrap().crash_at = None;
    }

    /// Leaves this much room on the volume; `None`: as much as anybody wants.
    pub fn set_room(&self, bytes: Option<u64>) {
        self.world.lock().unwrap().room = bytes;
    }

    /// From now on every sync of a file fails.
    pub fn fail_syncs(&self) {
        self.world.lock().unwrap().syncs_fail = true;
    }

    /// The next sync of a file fails, and what it was for never reaches the media.
    pub fn fail_next_sync(&self) {
        self.world.lock().unwrap().next_sync_fails = true;
    }

    /// What is there now, as another machine would have it.
    pub fn copy(&self) -> SimStorage {
        self.after_crash(1)
    }

    /// Puts the files of another storage whose names begin so in the place of its own.
    pub fn replace_files(&self, prefix: &str, from: &SimStorage) {
        let files = from.files();
        let mut world = self.world.lock().unwrap();
        world.names.retain(|name, _| !name.starts_with(prefix));
        for (name, content) in files.into_iter().filter(|(name, _)| name.starts_with(prefix)) {
            world.next += 1;
            let inode = world.next;
            world.inodes.insert(inode, Inode { now: content.clone(), durable: content, changes: Vec::new() });
            world.names.insert(name, inode);
        }
        world.durable_names = world.names.clone();
    }

    pub fn is_off(&self) -> bool {
        let world = self.world.lock().unwrap();
        world.crash_at.is_some_and(|at| world.steps > at)
    }

    /// What is found when the power is back: durable content, and of the rest what chance says.
    pub fn after_crash(&self, seed: u64) -> SimStorage {
        let world = self.world.lock().unwrap();
        let mut chance = Chance(seed);
        // Of three crashes, one loses all that was not synced, one nothing, one some sectors of it.
        let mode = chance.below(3);
        let survives = |chance: &mut Chance| mode == 1 || (mode == 2 && chance.below(2) == 0);
        let mut names = world.durable_names.clone();
        let kept = if mode == 0 { 0 } else { chance.below(world.name_changes.len() as u64 + 1) as usize };
        for (name, inode) in &world.name_changes[..kept] {
            match inode {
                Some(inode) => names.insert(name.clone(), *inode),
                None => names.remove(name),
            };
        }
        let mut inodes = HashMap::new();
        for &inode in names.values() {
            let file = &world.inodes[&inode];
            let mut content = file.durable.clone();
            for change in &file.changes {
                match change {
                    Change::Write(at, data) => {
                        let mut from = 0;
                        while from < data.len() {
                            let until = (from + 512 - (*at as usize + from) % 512).min(data.len());
                            if survives(&mut chance) {
                                apply(&mut content, &Change::Write(at + from as u64, data[from..until].to_vec()));
                            }
                            from = until;
                        }
                    }
                    change if survives(&mut chance) => apply(&mut content, change),
                    _ => {}
                }
            }
            inodes.insert(inode, Inode { now: content.clone(), durable: content, changes: Vec::new() });
        }
        let world = World { inodes, next: world.next, durable_names: names.clone(), names, ..World::default() };
        SimStorage { world: Arc::new(Mutex::new(world)), prefix: self.prefix.clone() }
    }

    /// Every file with its content.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let world = self.world.lock().unwrap();
        world.names.iter().map(|(name, inode)| (name.clone(), world.inodes[inode].now.clone())).collect()
    }

    /// A copy in which one bit of a file differs.
    pub fn with_flipped_bit(&self, name: &str, bit: u64) -> SimStorage {
        let copy = self.after_crash(1);
        {
            let mut world = copy.world.lock().unwrap();
            let inode = world.names[name];
            let file = world.inodes.get_mut(&inode).unwrap();
            file.now[(bit / 8) as usize] ^= 1 << (bit % 8);
            file.durable = file.now.clone();
        }
        copy
    }

    /// Writes into a file behind everybody's back.
    pub fn write(&self, name: &str, at: u64, data: &[u8]) {
        let mut world = self.world.lock().unwrap();
        let inode = world.names[name];
        let file = world.inodes.get_mut(&inode).unwrap();
        apply(&mut file.now, &Change::Write(at, data.to_vec()));
        apply(&mut file.durable, &Change::Write(at, data.to_vec()));
    }

    /// A copy in which a file holds this.
    pub fn with_file(&self, name: &str, content: &[u8]) -> SimStorage {
        let copy = self.after_crash(1);
        {
            let mut world = copy.world.lock().unwrap();
            world.next += 1;
            let (inode, content) = (world.next, content.to_vec());
            world.inodes.insert(inode, Inode { now: content.clone(), durable: content, changes: Vec::new() });
            world.names.insert(name.to_owned(), inode);
            world.durable_names.insert(name.to_owned(), inode);
        }
        copy
    }

    pub fn without_file(&self, name: &str) -> SimStorage {
        let copy = self.after_crash(1);
        copy.world.lock().unwrap().names.remove(name);
        copy
    }

    fn full(&self, name: &str) -> String {
        match (self.prefix.is_empty(), name.is_empty()) {
            (true, _) => name.to_owned(),
            (false, true) => self.prefix.clone(),
            (false, false) => format!("{}/{name}", self.prefix),
        }
    }
}

impl Storage for SimStorage {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let name = self.full(name);
        let mut world = self.world.lock().unwrap();
        let inode = match (world.names.get(&name).copied(), mode) {
            (Some(_), OpenMode::Create) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(inode), _) => inode,
            (None, OpenMode::Create | OpenMode::OpenOrCreate) => {
                world.step()?;
                world.next += 1;
                let inode = world.next;
                world.inodes.insert(inode, Inode::default());
                world.names.insert(name.clone(), inode);
                world.name_changes.push((name, Some(inode)));
                inode
            }
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(SimFile { world: self.world.clone(), inode, read_only: mode == OpenMode::Read }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.full(from), self.full(to));
        let mut world = self.world.lock().unwrap();
        world.step()?;
        let inode = world.names.remove(&from).ok_or(io::ErrorKind::NotFound)?;
        world.names.insert(to.clone(), inode);
        // Both or neither survive: chance keeps a prefix, so the new name comes first and a stale old one is left at worst.
        world.name_changes.push((to, Some(inode)));
        world.name_changes.push((from, None));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let name = self.full(name);
        let mut world = self.world.lock().unwrap();
        world.step()?;
        world.names.remove(&name).ok_or(io::ErrorKind::NotFound)?;
        world.name_changes.push((name, None));
        Ok(())
    }

    fn create_folder(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        let prefix = format!("{}/", self.full(name));
        let mut world = self.world.lock().unwrap();
        world.step()?;
        world.names.retain(|name, _| !name.starts_with(&prefix));
        world.durable_names.retain(|name, _| !name.starts_with(&prefix));
        world.name_changes.retain(|(name, _)| !name.starts_with(&prefix));
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{}/", self.full(folder));
        let world = self.world.lock().unwrap();
        let mut names: Vec<String> = world
            .names
            .keys()
            .filter_map(|name| Some(name.strip_prefix(&prefix)?.split('/').next()?.to_owned()))
            .collect();
        names.dedup();
        Ok(names)
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        let name = self.full(name);
        let folder = format!("{name}/");
        let world = self.world.lock().unwrap();
        Ok(world.names.keys().any(|other| *other == name || other.starts_with(&folder)))
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        let folder = self.full(folder);
        let mut world = self.world.lock().unwrap();
        world.step()?;
        let (synced, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut world.name_changes).into_iter().partition(|(name, _)| parent(name) == folder);
        world.name_changes = rest;
        for (name, inode) in synced {
            match inode {
                Some(inode) => world.durable_names.insert(name, inode),
                None => world.durable_names.remove(&name),
            };
        }
        Ok(())
    }

    fn available_bytes(&self) -> io::Result<u64> {
        Ok(self.world.lock().unwrap().room.unwrap_or(1 << 40))
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/sim").join(self.full(name))
    }

    fn folder(&self, name: &str) -> Arc<dyn Storage> {
        Arc::new(SimStorage { world: self.world.clone(), prefix: self.full(name) })
    }
}

struct SimFile {
    world: Arc<Mutex<World>>,
    inode: u64,
    read_only: bool,
}

impl SimFile {
    fn change(&self, change: Change) -> io::Result<()> {
        assert!(!self.read_only, "a file that was opened for reading is written");
        let mut world = self.world.lock().unwrap();
        world.step()?;
        let World { inodes, room, .. } = &mut *world;
        let file = inodes.get_mut(&self.inode).unwrap();
        let mut full = false;
        let mut change = change;
        if let (Change::Write(at, data), Some(room)) = (&mut change, room) {
            let fits = (file.now.len() as u64).saturating_sub(*at) + *room;
            full = data.len() as u64 > fits;
            // A full volume takes the first part of a write.
            data.truncate(fits as usize);
            *room -= (*at + data.len() as u64).saturating_sub(file.now.len() as u64);
        }
        apply(&mut file.now, &change);
        file.changes.push(change);
        if full { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }
}

impl StorageFile for SimFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let world = self.world.lock().unwrap();
        let file = &world.inodes[&self.inode].now;
        let range = offset as usize..(offset as usize).saturating_add(buffer.len());
        buffer.copy_from_slice(file.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write(offset, data.to_vec()))
    }

    fn write_vectored_at(&self, offset: u64, data: &[IoSlice<'_>]) -> io::Result<()> {
        let data = data.iter().flat_map(|slice| slice.iter().copied()).collect();
        self.change(Change::Write(offset, data))
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.world.lock().unwrap();
        world.step()?;
        let fails = world.syncs_fail || world.next_sync_fails;
        world.next_sync_fails = false;
        let file = world.inodes.get_mut(&self.inode).unwrap();
        let changes = std::mem::take(&mut file.changes);
        if fails {
            // As the kernel does: what could not be written is called clean, and is in memory alone.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        changes.iter().for_each(|change| apply(&mut file.durable, change));
        Ok(())
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.change(Change::Length(bytes))
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.world.lock().unwrap().inodes[&self.inode].now.len() as u64)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.bytes()
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Change::Zero(offset, length))
    }

    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// A host with one disk: what the replica must show at each cut is remembered.
pub struct TestHost {
    pub info: ReplicaInfo,
    pub disks: Vec<DiskId>,
    pub position: Option<Position>,
    pub cut: u64,
    pub content: Vec<u8>,
    pub contents: BTreeMap<u64, Vec<u8>>,
    pub positions: BTreeMap<u64, Position>,
    pub time: u64,
    pub scanning: bool,
}

pub const SECOND: u64 = 1_000_000_000;

impl TestHost {
    pub fn new(disk_bytes: u64) -> Self {
        let info = ReplicaInfo {
            disk: DiskId::from_bytes([1; 16]),
            machine: MachineId::from_bytes([9; 16]),
            generation: Generation::FIRST,
            disk_bytes,
        };
        Self {
            info,
            disks: vec![info.disk],
            position: None,
            cut: 0,
            content: vec![0; disk_bytes as usize],
            contents: BTreeMap::from([(0, vec![0; disk_bytes as usize])]),
            positions: BTreeMap::new(),
            time: 1000 * SECOND,
            scanning: false,
        }
    }

    /// Random chunks; what they write is applied to `content`. Later chunks of a cut lie behind earlier ones.
    pub fn chunks(&mut self, chance: &mut Chance) -> Vec<Vec<u8>> {
        let key = ChunkKey::new(self.info.disk, self.info.generation);
        let sectors = self.info.disk_bytes / 512;
        let mut at = chance.below(sectors);
        let mut chunks = Vec::new();
        for _ in 0..1 + chance.below(3) {
            let mut extents = Vec::new();
            let mut bytes = 0;
            for _ in 0..1 + chance.below(4) {
                at += chance.below(6);
                let length = (1 + chance.below(20)).min(sectors.saturating_sub(at)).min((65536 - bytes) / 512);
                if length == 0 {
                    break;
                }
                extents.push(Extent::new(at * 512, length * 512));
                at += length;
                bytes += length * 512;
            }
            if extents.is_empty() {
                break;
            }
            let mut sealed = Vec::new();
            if chance.below(4) == 0 {
                Sealer::new(key.clone(), Compression::Off).seal_zeroes(&extents, &mut sealed);
                extents.iter().for_each(|e| self.content[e.offset as usize..e.end() as usize].fill(0));
            } else {
                let mut raw = Vec::new();
                for extent in &extents {
                    let fill = chance.below(255) as u8;
                    let data: Vec<u8> = (0..extent.length).map(|index| fill ^ (index / 97) as u8).collect();
                    self.content[extent.offset as usize..extent.end() as usize].copy_from_slice(&data);
                    raw.extend(data);
                }
                let compression = if chance.below(2) == 0 { Compression::Off } else { Compression::Level(1) };
                Sealer::new(key.clone(), compression).seal(&extents, &raw, &mut sealed);
            }
            chunks.push(sealed);
        }
        chunks
    }

    pub fn mark(&self, keep: bool) -> Mark {
        Mark {
            id: MarkId::random(),
            machine: self.info.machine,
            disks: self.disks.clone(),
            consistency: Consistency::Crash,
            label: String::new(),
            keep,
            time: Timestamp(self.time),
            group: false,
        }
    }

    /// Blocks as they are now, as a scan sends them.
    pub fn scan(&mut self, session: &Session, blocks: &[Extent]) -> Result<(), crate::journal::JournalError> {
        let mut sealer = Sealer::new(ChunkKey::new(self.info.disk, self.info.generation), Compression::Off);
        let mut chunks = Vec::new();
        for block in blocks.iter().flat_map(|extent| pieces(*extent, BLOCK_BYTES)) {
            let mut sealed = Vec::new();
            let data = &self.content[block.offset as usize..block.end() as usize];
            match is_zero(data) {
                true => sealer.seal_zeroes(&[block], &mut sealed),
                false => sealer.seal(&[block], data, &mut sealed),
            };
            chunks.push(sealed);
        }
        let end = self.end(CutKind::Scan, &chunks, None);
        chunks.iter().try_for_each(|chunk| session.append_chunks(end.cut.0, chunk))?;
        session.end_cut(&end)?;
        self.cut = end.cut.0;
        Ok(())
    }

    /// Asks about the whole disk as a host with this content does; what it would send because of the answers, and
    /// what of that is because nothing was said about it.
    pub fn compare(&self, session: &Session) -> (Vec<Extent>, u64) {
        let key = CompareKey::new(self.info.disk, self.info.generation, [3; 16]);
        let comparer = Comparer::new(key.clone());
        let mut send = Vec::new();
        let mut unknown = 0;
        for (number, extent) in pieces(Extent::new(0, self.info.disk_bytes), 16 * BLOCK_BYTES).enumerate() {
            let hashes = question(&key, &self.content, number as u64 + 1, extent);
            let differing = session.compare(&comparer, hashes).unwrap().run(&|| false).unwrap();
            let (parts, untold) = told(&key, &self.content, &differing);
            send.extend(parts);
            unknown += untold;
        }
        (send, unknown)
    }

    /// The end of the next cut with these chunks.
    pub fn end(&mut self, kind: CutKind, chunks: &[Vec<u8>], mark: Option<Mark>) -> CutEnd {
        let from = match (kind, self.position) {
            (_, Some(position)) => position,
            (_, None) => Epoch([7; 16]).start(),
        };
        let to = match kind {
            CutKind::Records | CutKind::ScanEnd if !chunks.is_empty() || mark.is_some() => Position {
                epoch: from.epoch,
                sequence: Sequence(from.sequence.0 + 1),
                hash: HistoryHash(*blake3::hash(&from.hash.0).as_bytes()),
            },
            _ => from,
        };
        let mut hashes = blake3::Hasher::new();
        for chunk in chunks {
            hashes.update(&chunk[16..48]);
        }
        self.time += SECOND;
        CutEnd {
            cut: CutOrdinal(self.cut + 1),
            kind,
            from,
            to,
            time: Timestamp(self.time),
            clock_stepped: false,
            chunks: chunks.len() as u64,
            chunk_bytes: chunks.iter().map(|chunk| chunk.len() as u64).sum(),
            chunks_hash: *hashes.finalize().as_bytes(),
            written_bytes: 512,
            mark,
        }
    }

    /// Sends a cut that holds the newest content of these places.
    pub fn send_at(
        &mut self,
        session: &Session,
        places: &[Extent],
        mark: Option<Mark>,
    ) -> Result<(), crate::journal::JournalError> {
        let mut sealer = Sealer::new(ChunkKey::new(self.info.disk, self.info.generation), Compression::Off);
        let mut chunks = Vec::new();
        for place in places {
            let mut at = place.offset;
            while at < place.end() {
                let length = (place.end() - at).min(65536);
                let mut sealed = Vec::new();
                let data = &self.content[at as usize..(at + length) as usize];
                sealer.seal(&[Extent::new(at, length)], data, &mut sealed);
                chunks.push(sealed);
                at += length;
            }
        }
        let end = self.end(CutKind::Records, &chunks, mark);
        chunks.iter().try_for_each(|chunk| session.append_chunks(end.cut.0, chunk))?;
        session.end_cut(&end)?;
        (self.cut, self.position) = (end.cut.0, Some(end.to));
        self.positions.insert(self.cut, end.to);
        self.contents.insert(self.cut, self.content.clone());
        Ok(())
    }

    /// Sends one cut. After an error the host is as it was, but for `content`.
    pub fn send(
        &mut self,
        session: &Session,
        kind: CutKind,
        mark: Option<Mark>,
        chance: &mut Chance,
    ) -> Result<(), crate::journal::JournalError> {
        let before = self.content.clone();
        let chunks = if kind == CutKind::ScanStart { Vec::new() } else { self.chunks(chance) };
        let end = self.end(kind, &chunks, mark);
        let send = || {
            for chunk in &chunks {
                session.append_chunks(end.cut.0, chunk)?;
            }
            session.end_cut(&end)
        };
        if let Err(error) = send() {
            self.content = before;
            return Err(error);
        }
        self.cut = end.cut.0;
        self.position = Some(end.to);
        self.positions.insert(self.cut, end.to);
        match kind {
            CutKind::ScanStart => self.scanning = true,
            CutKind::ScanEnd => self.scanning = false,
            _ => {}
        }
        if self.scanning {
            self.contents.remove(&self.cut);
        } else {
            self.contents.insert(self.cut, self.content.clone());
        }
        Ok(())
    }
}

/// What a host with this content asks about a range.
pub fn question(key: &CompareKey, content: &[u8], number: u64, extent: Extent) -> Hashes {
    let of = |extent: Extent| &content[extent.offset as usize..extent.end() as usize];
    let runs = pieces(extent, BLOCK_BYTES).map(|block| HashedRun {
        extent: block,
        claim: match is_zero(of(block)) {
            true => Claim::Zeroes,
            false => Claim::Hashes(key.hash(block, of(block)).to_vec().into()),
        },
    });
    Hashes { question: number, runs: runs.collect() }
}

/// What such a host would send because of an answer, and how many bytes of it only because nothing was said about them.
pub fn told(key: &CompareKey, content: &[u8], differing: &Differing) -> (Vec<Extent>, u64) {
    let of = |extent: Extent| &content[extent.offset as usize..extent.end() as usize];
    let mut send = Vec::new();
    let mut unknown = 0;
    for run in &differing.runs {
        for (index, part) in pieces(run.extent, PART_BYTES).enumerate() {
            let differs = match &run.found {
                Found::Unknown => {
                    unknown += part.length;
                    true
                }
                Found::Zeroes => !is_zero(of(part)),
                Found::Parts(hashes) => hashes[index * 16..][..16] != key.hash(part, of(part)),
            };
            if differs {
                send.push(part);
            }
        }
    }
    (send, unknown)
}
