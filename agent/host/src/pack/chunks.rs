//! Data in disk order becomes chunks, and chunks a frame.

use bytes::Bytes;
use tidemark_base::chunk::{ChunkHash, EXTENT_LENGTH_MAX, EXTENTS_MAX, Sealer};
use tidemark_base::disk::is_zero;
use tidemark_base::{CHUNK_BYTES_MAX, Extent};

/// Zeroes in data are looked for in blocks of this size, aligned on the disk.
pub(super) const ZERO_BLOCK_BYTES: u64 = 4096;

/// What happens to blocks that are all zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroPolicy {
    /// They become extents without data.
    Send,
    /// They are left out: the replica is known to read as zeroes where nothing was sent.
    Omit,
}

/// A frame of sealed chunks.
#[derive(Clone, Debug)]
pub struct Sealed {
    pub chunks: Bytes,
    /// Of each chunk, in order.
    pub hashes: Vec<ChunkHash>,
    /// What the chunks unfold to.
    pub raw_bytes: u64,
    /// Ranges that are not in the frame because the log could not give them back.
    pub damaged: Vec<Extent>,
}

/// Fills chunks. Extents come in ascending order.
pub(super) struct ChunkWriter<'a> {
    sealer: &'a mut Sealer,
    zero_policy: ZeroPolicy,
    chunk_bytes: usize,
    extents: Vec<Extent>,
    raw: Vec<u8>,
    zeroes: Vec<Extent>,
    out: Vec<u8>,
    hashes: Vec<ChunkHash>,
    raw_bytes: u64,
}

impl<'a> ChunkWriter<'a> {
    /// `chunk_bytes` is the most data in a chunk, `bytes` how much is expected in all.
    pub fn new(sealer: &'a mut Sealer, zero_policy: ZeroPolicy, chunk_bytes: usize, bytes: usize) -> Self {
        debug_assert!(chunk_bytes <= CHUNK_BYTES_MAX);
        Self {
            sealer,
            zero_policy,
            chunk_bytes,
            extents: Vec::new(),
            // Grown from nothing it would be copied again and again.
            raw: Vec::with_capacity(chunk_bytes.min(bytes)),
            zeroes: Vec::new(),
            out: Vec::with_capacity(super::job_bytes(bytes as u64) as usize),
            hashes: Vec::new(),
            raw_bytes: 0,
        }
    }

    pub fn data(&mut self, extent: Extent, data: &[u8]) {
        debug_assert_eq!(extent.length, data.len() as u64);
        let mut start = extent.offset;
        let mut at = extent.offset;
        while at < extent.end() {
            let end = (at - at % ZERO_BLOCK_BYTES + ZERO_BLOCK_BYTES).min(extent.end());
            // Only whole blocks: shorter runs cost more in extents than they save in data.
            if end - at == ZERO_BLOCK_BYTES && is_zero(part(extent, data, at, end)) {
                self.push(Extent::new(start, at - start), part(extent, data, start, at));
                self.zeroes(Extent::new(at, end - at));
                start = end;
            }
            at = end;
        }
        self.push(Extent::new(start, extent.end() - start), part(extent, data, start, extent.end()));
    }

    pub fn zeroes(&mut self, extent: Extent) {
        if self.zero_policy == ZeroPolicy::Omit {
            return;
        }
        if let Some(last) = self.zeroes.last_mut()
            && last.end() == extent.offset
            && last.length + extent.length <= EXTENT_LENGTH_MAX
        {
            last.length += extent.length;
            return;
        }
        let mut at = extent.offset;
        while at < extent.end() {
            if self.zeroes.len() == EXTENTS_MAX {
                self.seal_zeroes();
            }
            let length = (extent.end() - at).min(EXTENT_LENGTH_MAX);
            self.zeroes.push(Extent::new(at, length));
            at += length;
        }
    }

    pub fn finish(mut self, damaged: Vec<Extent>) -> Sealed {
        self.seal();
        self.seal_zeroes();
        Sealed { chunks: Bytes::from(self.out), hashes: self.hashes, raw_bytes: self.raw_bytes, damaged }
    }

    fn push(&mut self, mut extent: Extent, mut data: &[u8]) {
        while !data.is_empty() {
            if self.raw.is_empty() && data.len() >= self.chunk_bytes {
                // A whole chunk in one piece needs no copy.
                let (chunk, rest) = data.split_at(self.chunk_bytes);
                let hash = self.sealer.seal(&[Extent::new(extent.offset, chunk.len() as u64)], chunk, &mut self.out);
                self.hashes.push(hash);
                self.raw_bytes += chunk.len() as u64;
                extent = Extent::new(extent.offset + chunk.len() as u64, rest.len() as u64);
                data = rest;
                continue;
            }
            let (now, rest) = data.split_at(data.len().min(self.chunk_bytes - self.raw.len()));
            self.raw.extend_from_slice(now);
            match self.extents.last_mut() {
                Some(last) if last.end() == extent.offset => last.length += now.len() as u64,
                _ => self.extents.push(Extent::new(extent.offset, now.len() as u64)),
            }
            extent = Extent::new(extent.offset + now.len() as u64, rest.len() as u64);
            data = rest;
            if self.raw.len() == self.chunk_bytes || self.extents.len() == EXTENTS_MAX {
                self.seal();
            }
        }
    }

    fn seal(&mut self) {
        if !self.raw.is_empty() {
            self.hashes.push(self.sealer.seal(&self.extents, &self.raw, &mut self.out));
            self.raw_bytes += self.raw.len() as u64;
            self.extents.clear();
            self.raw.clear();
        }
    }

    fn seal_zeroes(&mut self) {
        if !self.zeroes.is_empty() {
            self.hashes.push(self.sealer.seal_zeroes(&self.zeroes, &mut self.out));
            self.zeroes.clear();
        }
    }
}

fn part(of: Extent, data: &[u8], start: u64, end: u64) -> &[u8] {
    &data[(start - of.offset) as usize..(end - of.offset) as usize]
}
