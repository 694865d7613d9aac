//! What must be true, kept as plainly as possible.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use tidemark_base::{DiskId, Extent, MarkId};
use tidemark_process_server::replica::ReplicaSet;
use tidemark_proto::replication::Durable;

use crate::counts::Kind;
use crate::paged::{PAGE, Paged};
use crate::server::ServerState;
use crate::world::{Process, Sim};

/// A disk at an instant.
#[derive(Clone)]
pub struct Content {
    pub pages: Paged,
}

impl Content {
    /// The first byte at or after `at` that is not as it should be.
    pub fn differs(&self, at: u64, found: &[u8]) -> Option<u64> {
        // Page by page, without copying what is as it should be.
        let first = at / PAGE as u64;
        let is_same = |(page, found): (u64, &[u8])| match self.pages.page(page) {
            Some(right) => right[..found.len()] == *found,
            None => tidemark_base::disk::is_zero(found),
        };
        if at.is_multiple_of(PAGE as u64) && (first..).zip(found.chunks(PAGE)).all(is_same) {
            return None;
        }
        let mut expected = vec![0; found.len()];
        self.pages.read(at, &mut expected);
        expected.iter().zip(found).position(|(right, is)| right != is).map(|index| at + index as u64)
    }
}

/// One sector's writes since the last flush that covered it.
#[derive(Default, Clone)]
struct Sector {
    /// What each write left, oldest first: the first is what is certain to survive.
    contents: Vec<u64>,
    /// How many of them were acknowledged, counted from the first.
    acknowledged: usize,
    /// How many are certain to survive a power cut.
    floor: usize,
    /// How many had come when a flush of the disk failed: what it did not write, no later flush writes.
    lost: usize,
    /// Writes under way. Which of two that overlap comes last, only the disk knows.
    under_way: usize,
    overlapped: bool,
}

/// Enough to tell the contents of a simulation's sectors apart.
fn digest(content: &[u8]) -> u64 {
    // Four at a time: one waits for no other.
    let mut lanes = [0x9e37_79b9_7f4a_7c15u64, 0xd1b5_4a32_d192_ed03, 0x94d0_49bb_1331_11eb, 0x2545_f491_4f6c_dd1d];
    for part in content.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(part.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            *lane = (*lane ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(29);
        }
    }
    lanes.into_iter().fold(0, |digest, lane| (digest ^ lane).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(29))
}

pub struct Oracle {
    sim: std::rc::Rc<Sim>,
    marks: RefCell<BTreeMap<(MarkId, DiskId), Content>>,
    /// By number; absent where nobody wrote.
    sectors: RefCell<BTreeMap<DiskId, Vec<Option<Sector>>>>,
    /// The highest cut of each disk that a server acknowledged.
    acknowledged: RefCell<BTreeMap<(Process, DiskId), u64>>,
    dropped: RefCell<BTreeSet<(Process, MarkId)>>,
    /// Kept points that a server listed: they stay until retention drops them.
    listed: RefCell<BTreeSet<(Process, MarkId)>>,
}

impl Oracle {
    pub fn new(sim: std::rc::Rc<Sim>) -> std::rc::Rc<Self> {
        std::rc::Rc::new(Self {
            sim,
            marks: RefCell::default(),
            sectors: RefCell::default(),
            acknowledged: RefCell::default(),
            dropped: RefCell::default(),
            listed: RefCell::default(),
        })
    }

    pub fn marked(&self, mark: MarkId, disk: DiskId, content: Content) {
        self.marks.borrow_mut().insert((mark, disk), content);
    }

    pub fn at_mark(&self, mark: MarkId, disk: DiskId) -> Option<Content> {
        self.marks.borrow().get(&(mark, disk)).cloned()
    }

    pub fn acknowledged(&self, server: Process, disk: DiskId, durable: &Durable) {
        let mut all = self.acknowledged.borrow_mut();
        let highest = all.entry((server, disk)).or_default();
        *highest = (*highest).max(durable.cut.0);
    }

    pub fn holds_anything(&self, server: Process, disk: DiskId) -> bool {
        self.acknowledged.borrow().contains_key(&(server, disk))
    }

    pub fn dropped(&self, server: Process, points: &[MarkId]) {
        self.dropped.borrow_mut().extend(points.iter().map(|point| (server, *point)));
    }

    /// Another machine is in the place of this server: it promised nothing.
    pub fn replaced(&self, server: Process) {
        self.acknowledged.borrow_mut().retain(|(of, _), _| *of != server);
        self.listed.borrow_mut().retain(|(of, _)| *of != server);
    }

    /// A server that started holds every cut that it acknowledged, and every kept point that it listed.
    pub fn check_held(&self, server: &ServerState, set: &ReplicaSet) {
        if server.is_rotten.get() {
            return;
        }
        for ((_, disk), cut) in self.acknowledged.borrow().iter().filter(|((of, _), _)| *of == server.process) {
            let held = set.get(*disk).map_or(0, |replica| replica.durable().cut);
            if held < *cut {
                self.sim.fail(format!("the server acknowledged cut {cut} of {disk} and holds {held} after its start"));
            }
        }
        let Ok(points) = set.points(server.machine) else { return };
        let (listed, dropped) = (self.listed.borrow(), self.dropped.borrow());
        for (_, mark) in listed.difference(&dropped).filter(|(of, _)| *of == server.process) {
            if points.get(*mark).is_none() {
                self.sim.fail(format!("recovery point {mark} was listed and is gone after a restart"));
            }
        }
    }

    /// Gives back what it remembers: threads that were killed hold on to it for ever.
    pub fn forget(&self) {
        self.marks.borrow_mut().clear();
        self.sectors.borrow_mut().clear();
    }

    /// Kept points that a server lists now.
    pub fn list(&self, server: Process, marks: impl Iterator<Item = MarkId>) {
        self.listed.borrow_mut().extend(marks.map(|mark| (server, mark)));
    }

    // ---- what the guest was promised

    /// A write of these sectors is given to the disk; `now` and `durable` read what a sector holds, and what of it is certain.
    pub fn issued(
        &self,
        disk: DiskId,
        offset: u64,
        data: &[u8],
        now: &dyn Fn(u64) -> [u8; 512],
        durable: &dyn Fn(u64) -> [u8; 512],
    ) {
        let mut all = self.sectors.borrow_mut();
        let sectors = all.entry(disk).or_default();
        let (first, count) = ((offset / 512) as usize, data.len().div_ceil(512));
        if sectors.len() < first + count {
            sectors.resize(first + count, None);
        }
        for (index, content) in data.chunks(512).enumerate() {
            let found = sectors[first + index].get_or_insert_with(|| {
                let mut contents = Vec::with_capacity(6);
                // They differ by what was there before the disk was protected.
                contents.push(digest(&durable((first + index) as u64)));
                contents.push(digest(&now((first + index) as u64)));
                contents.dedup();
                Sector { acknowledged: contents.len(), contents, ..Sector::default() }
            });
            found.contents.push(digest(content));
            found.under_way += 1;
            found.overlapped |= found.under_way > 1;
        }
    }

    /// It ended. `is_acknowledged`: it did what it was asked for. `is_forced`: and is durable already.
    pub fn done(
        &self,
        disk: DiskId,
        extent: Extent,
        is_acknowledged: bool,
        is_forced: bool,
        now: &dyn Fn(u64) -> [u8; 512],
    ) {
        let mut all = self.sectors.borrow_mut();
        let Some(sectors) = all.get_mut(&disk) else { return };
        for sector in extent.offset / 512..extent.end() / 512 {
            let Some(Some(found)) = sectors.get_mut(sector as usize) else { continue };
            found.under_way = found.under_way.saturating_sub(1);
            if found.under_way > 0 {
                continue;
            }
            let met_another = std::mem::take(&mut found.overlapped);
            if met_another {
                found.contents.push(digest(&now(sector)));
            }
            if is_acknowledged {
                found.acknowledged = found.contents.len();
                if is_forced && !met_another {
                    found.floor = found.acknowledged;
                }
            }
        }
    }

    /// Whatever was under way was never acknowledged.
    pub fn host_ended(&self) {
        for found in self.sectors.borrow_mut().values_mut().flatten().flatten() {
            found.under_way = 0;
            found.overlapped = false;
        }
    }

    /// What was acknowledged when a flush was asked for: it is durable once the flush is.
    pub fn flush_begins(&self, disk: DiskId) -> Vec<(usize, usize)> {
        let all = self.sectors.borrow();
        let sectors = all.get(&disk).into_iter().flatten().enumerate();
        let written = sectors.filter_map(|(at, found)| Some((at, found.as_ref()?)));
        written
            .filter(|(_, found)| found.acknowledged > found.floor.max(found.lost))
            .map(|(at, found)| (at, found.acknowledged))
            .collect()
    }

    /// The disk's medium failed a flush. Every flush fails then until the disk is attached again (rule 3.2); one that does not
    /// after that covers what was written since: the system does not write again what it failed to write.
    pub fn flush_failed(&self, disk: DiskId) {
        for found in self.sectors.borrow_mut().get_mut(&disk).into_iter().flatten().flatten() {
            found.lost = found.contents.len();
        }
    }

    pub fn flushed(&self, disk: DiskId, covered: &[(usize, usize)]) {
        let mut all = self.sectors.borrow_mut();
        let Some(sectors) = all.get_mut(&disk) else { return };
        for (sector, number) in covered {
            if let Some(Some(found)) = sectors.get_mut(*sector) {
                found.floor = found.floor.max(*number);
            }
        }
    }

    /// After a power cut each sector is what the last flush covered, or something that was written since.
    pub fn check_floor(&self, disk: DiskId, content: &Content) {
        let sectors = self.sectors.borrow_mut().remove(&disk).unwrap_or_default();
        let written = sectors.iter().enumerate().filter_map(|(sector, found)| Some((sector, found.as_ref()?)));
        for (sector, found) in written {
            let mut is = [0; 512];
            content.pages.read(sector as u64 * 512, &mut is);
            let from = found.floor.saturating_sub(1);
            if !found.contents[from..].contains(&digest(&is)) {
                self.sim.fail(format!(
                    "sector {sector} of {disk} lost what a flush had covered: {} writes, {} acknowledged, {} covered",
                    found.contents.len() - 1,
                    found.acknowledged - 1,
                    found.floor
                ));
                break;
            }
        }
        self.sim.count(Kind::FloorChecked);
    }
}
