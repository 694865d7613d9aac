//! A disk of a machine: a file of blocks, what was written above each snapshot, and what changed when.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: u64 = 4096;
/// Changes are told in units of this.
pub const GRANULE: u64 = 64 << 10;

pub struct Disk {
    pub key: u64,
    pub unit: u64,
    pub uuid: String,
    pub bytes: u64,
    pub mode: &'static str,
    base: File,
    /// What was written above each snapshot, oldest first.
    above: Vec<BTreeMap<u64, Vec<u8>>>,
    tracking: String,
    /// What is written now.
    epoch: u64,
    /// Granules, by epoch.
    changed: BTreeMap<u64, BTreeSet<u64>>,
    resets: u64,
    /// Of one answer.
    pub areas_max: usize,
    /// Areas are told longer than they are, into each other.
    pub overlap: bool,
}

impl Disk {
    pub fn open(number: u64, image: &Path) -> Self {
        let base = OpenOptions::new().read(true).write(true).open(image).unwrap();
        let bytes = base.metadata().unwrap().len();
        let mut this = Self {
            key: 2000 + number,
            unit: number,
            uuid: format!("6000c29a-1111-2222-3333-{number:012}"),
            bytes,
            mode: "persistent",
            base,
            above: Vec::new(),
            tracking: "52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 00".to_owned(),
            epoch: 1,
            changed: BTreeMap::new(),
            resets: 0,
            areas_max: 3,
            overlap: false,
        };
        let written: BTreeSet<u64> = (0..bytes.div_ceil(GRANULE))
            .filter(|granule| this.read_granule(*granule).iter().any(|byte| *byte != 0))
            .collect();
        this.changed.insert(0, written);
        this
    }

    fn read_granule(&self, granule: u64) -> Vec<u8> {
        let offset = granule * GRANULE;
        let mut data = vec![0; GRANULE.min(self.bytes - offset) as usize];
        self.base.read_exact_at(&mut data, offset).unwrap();
        data
    }

    pub fn write(&mut self, offset: u64, data: &[u8], tracks: bool) {
        let end = offset + data.len() as u64;
        assert!(end <= self.bytes);
        if tracks {
            let epoch = self.changed.entry(self.epoch).or_default();
            epoch.extend(offset / GRANULE..=(end - 1) / GRANULE);
        } else {
            self.changed.entry(0).or_default().extend(offset / GRANULE..=(end - 1) / GRANULE);
        }
        if self.above.is_empty() {
            self.base.write_all_at(data, offset).unwrap();
            return;
        }
        for block in offset / BLOCK..=(end - 1) / BLOCK {
            let at = block * BLOCK;
            let mut whole = self.block(block);
            let (from, to) = (offset.max(at), end.min(at + BLOCK));
            whole[(from - at) as usize..(to - at) as usize]
                .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            self.above.last_mut().unwrap().insert(block, whole);
        }
    }

    fn block(&self, block: u64) -> Vec<u8> {
        if let Some(data) = self.above.iter().rev().find_map(|above| above.get(&block)) {
            return data.clone();
        }
        let mut data = vec![0; BLOCK as usize];
        self.base.read_exact_at(&mut data, block * BLOCK).unwrap();
        data
    }

    /// As its machine reads it.
    pub fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.bytes as usize];
        self.base.read_exact_at(&mut content, 0).unwrap();
        for (block, data) in self.above.iter().flatten() {
            content[(block * BLOCK) as usize..][..BLOCK as usize].copy_from_slice(data);
        }
        content
    }

    /// A part of the file of blocks.
    pub fn read_base(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.base.read_exact_at(&mut data, offset).unwrap();
        data
    }

    /// Its change id then.
    pub fn snapshot(&mut self, tracks: bool) -> Option<String> {
        self.above.push(BTreeMap::new());
        let id = tracks.then(|| self.change_id());
        self.epoch += 1;
        id
    }

    pub fn change_id(&self) -> String {
        format!("{}/{}", self.tracking, self.epoch)
    }

    /// What was written above a snapshot goes into what is below it.
    pub fn merge(&mut self, at: usize) {
        let above = self.above.remove(at);
        for (block, data) in above {
            match at.checked_sub(1) {
                Some(below) => drop(self.above[below].insert(block, data)),
                None => self.base.write_all_at(&data, block * BLOCK).unwrap(),
            }
        }
    }

    pub fn reset_tracking(&mut self) {
        self.resets += 1;
        self.tracking = format!("52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 {:02}", self.resets);
        let ever: BTreeSet<u64> = self.changed.values().flatten().copied().collect();
        self.changed = BTreeMap::from([(0, ever)]);
        self.epoch = 1;
    }

    /// As after a machine was reverted: the same name, and numbers that were there before.
    pub fn turn_tracking_back(&mut self) {
        self.epoch = 1;
    }

    pub fn replace_by_another(&mut self) {
        self.uuid = "6000c29a-9999-2222-3333-000000000000".to_owned();
    }

    pub fn grow(&mut self, bytes: u64) {
        self.base.set_len(bytes).unwrap();
        self.bytes = bytes;
    }

    /// Start, and length of what is covered, with areas; or the name of a fault.
    pub fn query(&self, since: &str, until: &str, from: u64) -> Result<(u64, Vec<(u64, u64)>), &'static str> {
        let number = |id: &str| -> Result<u64, &'static str> {
            let (tracking, number) = id.rsplit_once('/').ok_or("InvalidArgument")?;
            let number = number.parse().map_err(|_| "InvalidArgument")?;
            if tracking == self.tracking { Ok(number) } else { Err("FileFault") }
        };
        let until = number(until)?;
        let after = match since {
            "*" => None,
            since => Some(number(since)?),
        };
        if from >= self.bytes {
            return Err("InvalidArgument");
        }
        let is_within = |epoch: &u64| after.is_none_or(|after| *epoch > after) && *epoch <= until;
        let epochs = self.changed.iter().filter(|(epoch, _)| is_within(epoch));
        let granules: BTreeSet<u64> = epochs.flat_map(|(_, granules)| granules).copied().collect();
        let mut areas: Vec<(u64, u64)> = Vec::new();
        for granule in granules {
            let (start, end) = (granule * GRANULE, ((granule + 1) * GRANULE).min(self.bytes));
            if end <= from {
                continue;
            }
            let is_full = areas.len() == self.areas_max;
            match areas.last_mut() {
                Some((_, before)) if *before == start => *before = end,
                // The rest is another question's.
                _ if is_full => return Ok((start - from, self.told(areas))),
                _ => areas.push((start, end)),
            }
        }
        Ok((self.bytes - from, self.told(areas)))
    }

    fn told(&self, areas: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
        let mut told: Vec<(u64, u64)> = areas.iter().map(|(start, end)| (*start, end - start)).collect();
        if self.overlap {
            let again = areas.iter().map(|(start, end)| (*start, (end + 512).min(self.bytes) - start));
            told.extend(again.collect::<Vec<_>>());
        }
        told
    }
}
