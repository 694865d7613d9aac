#![doc = include_str!("FORMAT.md")]

pub mod base;
mod pending;
pub mod plan;

use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;
use tidemark_base::{Extent, ExtentMap, SECTOR_BYTES};

use crate::journal::{Layer, Part, Place, ReadError};
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
    let Some(fold_to) = manifest.fold_to else { return Ok(()) };
    let blocks = Pending::load(storage, manifest.base.cut, fold_to, base)?;
    if !write {
        base.set_overlay(blocks);
        return Ok(());
    }
    let blocks: Vec<Block> = blocks.into_iter().map(|(number, data)| Block { number, data: Some(data) }).collect();
    base.write_blocks(&blocks)
        .and_then(|()| base.sync())
        .map_err(|source| ReadError::Io { file: storage.path(base::DATA_NAME).display().to_string(), source })
}

/// Folds towards `target`, in steps; finishes what an earlier run began first. Stops between batches.
pub fn fold(replica: &Replica, target: u64, stop: &Stop) -> Result<Folded, ReplicaError> {
    let _one = replica.fold_lock().lock().expect("no panic while held");
    let from = replica.manifest().base.cut;
    let mut folded = Folded { from, to: from, bytes: 0, finished: true };
    loop {
        let step = step_target(replica, folded.to, target);
        let Some((to, sources)) = replica.declare_fold(step)? else { return Ok(folded) };
        let read = |source| ReplicaError::Read { disk: replica.disk(), source };
        let layers = sources
            .into_iter()
            .map(|source| source.layer(replica.cache()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(read)?;
        let mut sweep = Sweep { replica, layers, from: folded.to, to, bytes: 0, dirty: false };
        if !sweep.run(stop)? {
            return Ok(Folded { finished: false, bytes: folded.bytes + sweep.bytes, ..folded });
        }
        folded.bytes += sweep.bytes;
        replica.finish_fold(to)?;
        folded.to = to;
        if stop.is_stopped() {
            return Ok(Folded { finished: to >= target, ..folded });
        }
    }
}

/// The end of a step of at most [`SEGMENTS_MAX`] segments that is consistent; the whole way when there is none. Where
/// room is short, no more segments than the base has room to take: each gives its own back when it is done.
fn step_target(replica: &Replica, base: u64, target: u64) -> u64 {
    let parts = replica.parts();
    let mut room = replica.storage().available_bytes().unwrap_or(u64::MAX);
    let fits = |part: &&Part| {
        let bytes = if let Part::Sealed(sealed) = part { sealed.file_bytes } else { 0 };
        let fits = bytes <= room;
        room = room.saturating_sub(bytes);
        fits
    };
    let count = parts.iter().take_while(fits).count().clamp(1, SEGMENTS_MAX);
    let Some(last) = parts.get(count - 1) else { return target };
    if count == parts.len() {
        return target;
    }
    match replica.consistent_at_or_before(last.last().min(target)) {
        step if step > base => step,
        _ => target,
    }
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
        let mut newest: ExtentMap<LayerPlace> = ExtentMap::new();
        for (number, layer) in self.layers.iter().enumerate().rev() {
            layer.overlapping(window, self.replica.cache(), &mut |extent, place| {
                newest.insert(extent, LayerPlace { layer: number, place });
            })?;
        }
        let mut building: std::collections::BTreeMap<u64, (Vec<u8>, u8)> = Default::default();
        let mut data = Vec::new();
        for (extent, &LayerPlace { layer, place }) in newest.iter() {
            data.resize(extent.length as usize, 0);
            self.layers[layer].segment().read_extent(extent, &place, &mut data, self.replica.cache())?;
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
struct LayerPlace {
    layer: usize,
    place: Place,
}

impl tidemark_base::extent::Sliced for LayerPlace {
    fn slice(&self, skip: u64) -> Self {
        Self { layer: self.layer, place: self.place.slice(skip) }
    }
}
