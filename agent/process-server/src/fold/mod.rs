#![doc = include_str!("FORMAT.md")]

pub mod base;
mod pending;
pub mod plan;

use std::sync::Arc;

use tidemark_base::stop::Stop;
use tidemark_base::storage::{Storage, os_error};
use tidemark_base::{Extent, ExtentMap, SECTOR_BYTES};

use crate::journal::{Layer, Part, Place, ReadError, SegmentFile};
use crate::replica::manifest::Manifest;
use crate::replica::{Replica, ReplicaError};
use base::{BLOCK_BYTES, BaseStore, Block};
use pending::Pending;

/// What one batch covers of the disk at most; bounds a fold's memory. Small in tests, so that a small disk has many.
const BATCH_BYTES: u64 = if cfg!(test) { 8 << 10 } else { 8 << 20 };
/// Segments that one fold takes at most, so that a long backlog gives room back in steps.
const SEGMENTS_MAX: usize = if cfg!(test) { 2 } else { 64 };

#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Folded {
    pub from: u64,
    pub to: u64,
    /// Bytes written to the base, zeroes not counted.
    pub bytes: u64,
    /// False: it was stopped and goes on with the next run.
    pub finished: bool,
}

/// Makes the base whole after a crash in the middle of a batch; without `write` in memory only.
pub fn recover(storage: &dyn Storage, manifest: &Manifest, base: &mut BaseStore, write: bool) -> Result<(), ReadError> {
    if !write {
        if let Some(step) = manifest.fold_step {
            base.set_overlay(Pending::load(storage, manifest.base.cut, step, base)?);
        }
        return Ok(());
    }
    finish_batch(storage, manifest, base)
}

/// Writes the batch that was being written again, and syncs it.
fn finish_batch(storage: &dyn Storage, manifest: &Manifest, base: &BaseStore) -> Result<(), ReadError> {
    let Some(step) = manifest.fold_step else { return Ok(()) };
    let blocks = Pending::load(storage, manifest.base.cut, step, base)?;
    let blocks: Vec<Block> = blocks.into_iter().map(|(number, data)| Block { number, data: Some(data) }).collect();
    base.write_blocks(&blocks)
        .and_then(|()| base.sync())
        .map_err(|source| ReadError::Io { file: storage.path(base::DATA_NAME).display().to_string(), source })
}

/// Folds towards `target`, in steps; goes on with what an earlier run began. Stops between batches.
pub fn fold(replica: &Replica, target: u64, stop: &Stop) -> Result<Folded, ReplicaError> {
    let _one = replica.fold_lock().lock().expect("no panic while held");
    let from = replica.manifest().base.cut;
    let mut folded = Folded { from, to: from, bytes: 0, finished: true };
    let Some(target) = replica.declare_fold(target)? else { return Ok(folded) };
    while folded.to < target {
        let mut outcome = step(replica, next_step(replica, folded.to, target), stop);
        // What is damaged in the step may have been written over between its end and the target.
        if matches!(outcome, Err(ReplicaError::Read { source: ReadError::Damaged { .. }, .. })) {
            outcome = step(replica, target, stop);
        }
        let (to, bytes) = outcome?;
        folded.bytes += bytes;
        let Some(to) = to else { return Ok(Folded { finished: false, ..folded }) };
        folded.to = to;
        if stop.is_stopped() {
            return Ok(Folded { finished: to >= target, ..folded });
        }
    }
    Ok(folded)
}

/// One step: the base becomes the state at `to`. Returns where it stands and what was written; without a place: it was stopped.
fn step(replica: &Replica, to: u64, stop: &Stop) -> Result<(Option<u64>, u64), ReplicaError> {
    let read = |source| ReplicaError::Read { disk: replica.disk(), source };
    // A batch that failed half-way is made whole before anything else is read from the base.
    replica.base().reopen(&**replica.storage()).map_err(read)?;
    finish_batch(&**replica.storage(), &replica.manifest(), replica.base()).map_err(read)?;
    let sources = replica.declare_step(to)?;
    let layers =
        sources.into_iter().map(|source| source.layer(replica.cache())).collect::<Result<Vec<_>, _>>().map_err(read)?;
    let from = replica.manifest().base.cut;
    let mut sweep = Sweep { replica, layers, from, to, bytes: 0, dirty: false };
    if !sweep.run(stop).map_err(|error| without_room(replica, to, error))? {
        return Ok((None, sweep.bytes));
    }
    replica.finish_step(to)?;
    Ok((Some(to), sweep.bytes))
}

/// Says how much room a step takes at most, when there was too little.
fn without_room(replica: &Replica, to: u64, error: ReplicaError) -> ReplicaError {
    match &error {
        ReplicaError::Write { source, .. } if matches!(os_error(source), Some(libc::ENOSPC | libc::EDQUOT)) => {
            let taken =
                replica.parts().into_iter().filter(|part| part.first() <= to).map(|part| base_bytes(&part)).sum();
            let available_bytes = replica.storage().available_bytes().unwrap_or(0);
            ReplicaError::FoldNoRoom { disk: replica.disk(), needed_bytes: taken, available_bytes }
        }
        _ => error,
    }
}

/// What a segment takes in the base at most.
fn base_bytes(part: &Part) -> u64 {
    if let Part::Sealed(sealed) = part { sealed.base_bytes } else { 0 }
}

/// The end of the next step: as many segments as there is room for in the base, one at least. Each gives its own room
/// back when its step is done, so that folding never needs the room of all of them at once. The state in between may be
/// the middle of a scan: no view opens before the declared target.
fn next_step(replica: &Replica, base: u64, target: u64) -> u64 {
    let mut room = replica.storage().available_bytes().unwrap_or(u64::MAX) / 2;
    let mut step = None;
    for (count, part) in replica.parts().iter().filter(|part| part.last() > base).enumerate() {
        let bytes = base_bytes(part);
        if let Some(step) = step.filter(|_| count >= SEGMENTS_MAX || bytes > room) {
            return step;
        }
        if part.last() >= target {
            break;
        }
        room = room.saturating_sub(bytes);
        // Only a cut that can be read again is a place for the base to stand.
        if replica.commit(part.last()).is_ok_and(|commit| commit.is_some()) {
            step = Some(part.last());
        }
    }
    target
}

struct Sweep<'a> {
    replica: &'a Replica,
    /// Newest first.
    layers: Vec<Layer>,
    from: u64,
    to: u64,
    bytes: u64,
    /// Batches were written since the last sync of the base.
    dirty: bool,
}

impl Sweep<'_> {
    fn read_error(&self, source: ReadError) -> ReplicaError {
        ReplicaError::Read { disk: self.replica.disk(), source }
    }

    fn write_error(&self, source: std::io::Error) -> ReplicaError {
        ReplicaError::Write { disk: self.replica.disk(), source }
    }

    /// False: stopped.
    fn run(&mut self, stop: &Stop) -> Result<bool, ReplicaError> {
        let base = self.replica.base().clone();
        let mut at = 0;
        while let Some(next) = self.next(at).map_err(|error| self.read_error(error))? {
            if stop.is_stopped() {
                return Ok(false);
            }
            let start = next.max(at) / BLOCK_BYTES * BLOCK_BYTES;
            let zeroes = self.zero_run(start).map_err(|error| self.read_error(error))?;
            if zeroes >= start + BLOCK_BYTES {
                base.zero_blocks(start / BLOCK_BYTES, zeroes.div_ceil(BLOCK_BYTES))
                    .map_err(|error| self.write_error(error))?;
                self.dirty = true;
                at = zeroes;
            } else {
                let window = Extent::new(start, BATCH_BYTES.min(base.disk_bytes() - start));
                self.batch(window, &base)?;
                at = window.end();
            }
        }
        self.sync(&base)?;
        Ok(true)
    }

    /// Where the layers' next extent begins.
    fn next(&self, at: u64) -> Result<Option<u64>, ReadError> {
        let mut first = None;
        for layer in &self.layers {
            if let Some((extent, _)) = layer.next(at, self.replica.cache())? {
                first = Some(first.map_or(extent.offset, |first: u64| first.min(extent.offset)));
            }
        }
        Ok(first)
    }

    /// The end of the whole blocks from `start` on that read as zeroes at the target, whatever their number: extents of zeroes may span the disk.
    fn zero_run(&self, start: u64) -> Result<u64, ReadError> {
        let disk_bytes = self.replica.disk_bytes();
        let mut at = start;
        'run: while at < disk_bytes {
            let mut end = disk_bytes;
            for layer in &self.layers {
                match layer.next(at, self.replica.cache())? {
                    Some((extent, place)) if extent.offset == at => {
                        if !place.is_zeroes() {
                            break 'run;
                        }
                        at = extent.end().min(end);
                        continue 'run;
                    }
                    Some((extent, _)) => end = end.min(extent.offset),
                    None => {}
                }
            }
            break;
        }
        Ok(if at == disk_bytes { at } else { at / BLOCK_BYTES * BLOCK_BYTES })
    }

    fn batch(&mut self, window: Extent, base: &BaseStore) -> Result<(), ReplicaError> {
        let (blocks, partial) = self.blocks(window, base).map_err(|error| self.read_error(error))?;
        if !partial.is_empty() {
            // What the last batch's pending blocks guard must be durable before they are overwritten.
            self.sync(base)?;
            let chosen = blocks.iter().filter(|block| partial.contains(&block.number));
            Pending::store(&**self.replica.storage(), self.from, self.to, chosen)
                .map_err(|error| self.write_error(error))?;
        }
        base.write_blocks(&blocks).map_err(|error| self.write_error(error))?;
        self.dirty = true;
        self.bytes += blocks.len() as u64 * BLOCK_BYTES;
        Ok(())
    }

    fn sync(&mut self, base: &BaseStore) -> Result<(), ReplicaError> {
        if std::mem::take(&mut self.dirty) && !tidemark_base::sabotage::is("fold-sync") {
            base.sync().map_err(|error| self.write_error(error))?;
        }
        Ok(())
    }

    /// The window's blocks as they are at the target, and the numbers of those that the layers cover only in part.
    fn blocks(&self, window: Extent, base: &BaseStore) -> Result<(Vec<Block>, Vec<u64>), ReadError> {
        let mut newest: ExtentMap<LayerPlace<'_>> = ExtentMap::new();
        for layer in self.layers.iter().rev() {
            layer.overlapping(window, self.replica.cache(), &mut |found| {
                newest.insert(found.extent, LayerPlace { segment: found.segment, place: found.place });
            })?;
        }
        let mut building: std::collections::BTreeMap<u64, (Vec<u8>, u8)> = Default::default();
        let mut data = Vec::new();
        for (extent, &LayerPlace { segment, place }) in newest.iter() {
            data.resize(extent.length as usize, 0);
            segment.read_extent(extent, &place, &mut data, self.replica.cache())?;
            let mut at = extent.offset;
            while at < extent.end() {
                let number = at / BLOCK_BYTES;
                let start = number * BLOCK_BYTES;
                let bytes = BLOCK_BYTES.min(base.disk_bytes() - start) as usize;
                let (block, sectors) = building.entry(number).or_insert_with(|| (vec![0; bytes], 0));
                let until = extent.end().min(start + bytes as u64);
                block[(at - start) as usize..(until - start) as usize]
                    .copy_from_slice(&data[(at - extent.offset) as usize..(until - extent.offset) as usize]);
                for sector in (at - start) / SECTOR_BYTES..(until - start) / SECTOR_BYTES {
                    *sectors |= 1 << sector;
                }
                at = until;
            }
        }
        let mut partial = Vec::new();
        let mut blocks = Vec::with_capacity(building.len());
        for (number, (mut block, sectors)) in building {
            let all = block.len() as u64 / SECTOR_BYTES;
            if u64::from(sectors.count_ones()) < all {
                let old = base.block(number)?;
                for sector in (0..all as usize).filter(|sector| sectors & (1 << sector) == 0) {
                    let bytes = sector * SECTOR_BYTES as usize..(sector + 1) * SECTOR_BYTES as usize;
                    block[bytes.clone()].copy_from_slice(&old[bytes]);
                }
                partial.push(number);
            }
            blocks.push(Block { number, data: Some(block) });
        }
        Ok((blocks, partial))
    }
}

#[derive(Clone, Copy)]
struct LayerPlace<'a> {
    segment: &'a Arc<SegmentFile>,
    place: Place,
}

impl tidemark_base::extent::Sliced for LayerPlace<'_> {
    fn slice(&self, skip: u64) -> Self {
        Self { segment: self.segment, place: self.place.slice(skip) }
    }
}
