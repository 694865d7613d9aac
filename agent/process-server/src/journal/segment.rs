//! Encoding of a segment's header, frames and commit records.

use tidemark_base::{DiskId, Epoch, Generation, HistoryHash, MachineId, MarkId, Position, Sequence, Timestamp};

use tidemark_proto::replication::{Consistency, CutEnd, CutKind, CutOrdinal, LABEL_BYTES_MAX, MARK_DISKS_MAX, Mark};

pub const HEADER_BYTES: usize = 512;
pub const FRAME_HEADER_BYTES: usize = 32;
pub const FRAME_MAGIC: [u8; 4] = *b"TDFR";
pub const POSITION_BYTES: usize = 56;
const MAGIC: [u8; 8] = *b"TDMKSEG1";
const VERSION: u32 = 2;
const COMMIT_FIXED_BYTES: usize = 232;
const MARK_FIXED_BYTES: usize = 40;
/// The longest commit record; a frame that claims more is none.
pub const COMMIT_BYTES_MAX: usize = COMMIT_FIXED_BYTES + MARK_FIXED_BYTES + 16 * MARK_DISKS_MAX + LABEL_BYTES_MAX + 32;

const _: () = assert!(72 + POSITION_BYTES == 128 && 200 + 32 == COMMIT_FIXED_BYTES && 112 + 32 + 16 + 8 <= 480);

/// Reads little-endian fields one after another; `None` past the end.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]: [u8; 1]| byte)
    }
    pub fn position(&mut self) -> Option<Position> {
        Some(Position {
            epoch: Epoch(self.array()?),
            sequence: Sequence(self.u64()?),
            hash: HistoryHash(self.array()?),
        })
    }
}

pub fn put_position(out: &mut Vec<u8>, position: &Position) {
    out.extend_from_slice(&position.epoch.0);
    out.extend_from_slice(&position.sequence.0.to_le_bytes());
    out.extend_from_slice(&position.hash.0);
}

/// Where the journal stands before a segment's first cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    pub disk: DiskId,
    pub generation: Generation,
    pub disk_bytes: u64,
    pub first_cut: u64,
    pub start: Option<Position>,
    pub scan_open: bool,
    pub damaged: bool,
    pub commit_before: [u8; 32],
    pub nonce: [u8; 16],
    pub time_before: Timestamp,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        let flags = u8::from(self.start.is_some()) | u8::from(self.scan_open) << 1 | u8::from(self.damaged) << 2;
        out.extend_from_slice(&[0, flags, 0, 0]);
        out.extend_from_slice(self.disk.as_bytes());
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.extend_from_slice(&self.disk_bytes.to_le_bytes());
        out.extend_from_slice(&self.first_cut.to_le_bytes());
        match &self.start {
            Some(start) => put_position(&mut out, start),
            None => out.resize(out.len() + POSITION_BYTES, 0),
        }
        out.extend_from_slice(&self.commit_before);
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&self.time_before.0.to_le_bytes());
        out.resize(HEADER_BYTES - 32, 0);
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out.try_into().expect("512 bytes")
    }

    /// `Err` says what is wrong.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, &'static str> {
        let (content, hash) = bytes.split_at(HEADER_BYTES - 32);
        if blake3::hash(content).as_bytes() != hash {
            return Err("the header's hash does not hold");
        }
        let mut fields = Fields(content);
        Self::fields(&mut fields).ok_or("not a redo segment of version 2")
    }

    fn fields(fields: &mut Fields<'_>) -> Option<Self> {
        if fields.array()? != MAGIC || fields.u32()? != VERSION || fields.u8()? != 0 {
            return None;
        }
        let flags = fields.u8()?;
        fields.take(2)?;
        let disk = DiskId::from_slice(fields.take(16)?)?;
        let generation = Generation(fields.u64()?);
        let disk_bytes = fields.u64()?;
        let first_cut = fields.u64()?;
        let start = fields.position()?;
        Some(Self {
            disk,
            generation,
            disk_bytes,
            first_cut,
            start: (flags & 1 != 0).then_some(start),
            scan_open: flags & 2 != 0,
            damaged: flags & 4 != 0,
            commit_before: fields.array()?,
            nonce: fields.array()?,
            time_before: Timestamp(fields.u64()?),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    Chunks = 1,
    Commit = 2,
}

/// What frame checks of one segment are keyed with.
#[derive(Clone)]
pub struct FrameKey([u8; 32]);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    pub kind: FrameKind,
    pub body_bytes: u32,
    pub cut: u64,
    /// [`body_sum`] of the body as it is stored.
    pub sum: u64,
}

/// 56 bits over stored bytes in which every single changed bit shows. Not a proof of content, chunks have that: it
/// finds the bits that a decompressor ignores.
pub fn body_sum(body: &[u8]) -> u64 {
    // Odd, so that a difference of less than 32 bits is never multiplied away.
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let word = |bytes: &[u8]| u64::from(u32::from_le_bytes(bytes.try_into().expect("four bytes")));
    let mut lanes = [body.len() as u64, 1, 2, 3];
    let mut blocks = body.chunks_exact(16);
    for block in &mut blocks {
        for (lane, bytes) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane = lane.wrapping_mul(FACTOR).wrapping_add(word(bytes));
        }
    }
    let mut sum = lanes.into_iter().fold(0u64, |sum, lane| sum.wrapping_mul(FACTOR).wrapping_add(lane));
    for &byte in blocks.remainder() {
        sum = sum.wrapping_mul(FACTOR).wrapping_add(u64::from(byte));
    }
    sum & ((1 << 56) - 1)
}

impl FrameKey {
    pub fn new(header: &[u8; HEADER_BYTES]) -> Self {
        Self(blake3::derive_key("tidemark 2026-11 journal frame", header))
    }

    pub fn encode(&self, frame: Frame, at: u64) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[..4].copy_from_slice(&FRAME_MAGIC);
        out[4] = frame.kind as u8;
        let sum = frame.sum.to_le_bytes();
        out[5..8].copy_from_slice(&sum[..3]);
        out[8..12].copy_from_slice(&frame.body_bytes.to_le_bytes());
        out[12..16].copy_from_slice(&sum[3..7]);
        out[16..24].copy_from_slice(&frame.cut.to_le_bytes());
        let check = self.check(&out[..24], at);
        out[24..].copy_from_slice(&check);
        out
    }

    pub fn decode(&self, bytes: &[u8; FRAME_HEADER_BYTES], at: u64) -> Option<Frame> {
        if bytes[..4] != FRAME_MAGIC || bytes[24..] != self.check(&bytes[..24], at) {
            return None;
        }
        let kind = match bytes[4] {
            1 => FrameKind::Chunks,
            2 => FrameKind::Commit,
            _ => return None,
        };
        let body_bytes = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let mut sum = [0; 8];
        sum[..3].copy_from_slice(&bytes[5..8]);
        sum[3..7].copy_from_slice(&bytes[12..16]);
        let cut = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
        Some(Frame { kind, body_bytes, cut, sum: u64::from_le_bytes(sum) })
    }

    fn check(&self, front: &[u8], at: u64) -> [u8; 8] {
        let mut message = [0; 32];
        message[..24].copy_from_slice(front);
        message[24..].copy_from_slice(&at.to_le_bytes());
        blake3::keyed_hash(&self.0, &message).as_bytes()[..8].try_into().expect("eight bytes")
    }
}

/// A commit record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Commit {
    pub end: CutEnd,
    pub durable_cut: u64,
    pub commit_before: [u8; 32],
    pub hash: [u8; 32],
}

pub fn kind_number(kind: CutKind) -> u8 {
    match kind {
        CutKind::Records => 1,
        CutKind::Scan => 2,
        CutKind::ScanStart => 3,
        CutKind::ScanEnd => 4,
    }
}

/// Encodes the commit of a cut; returns it with its hash.
pub fn encode_commit(end: &CutEnd, durable_cut: u64, commit_before: &[u8; 32]) -> (Vec<u8>, [u8; 32]) {
    let mut out = Vec::with_capacity(COMMIT_FIXED_BYTES + 128);
    let mark = end.mark.as_ref();
    let application = mark.is_some_and(|mark| mark.consistency == Consistency::Application);
    let flags = u8::from(end.clock_stepped)
        | u8::from(mark.is_some()) << 1
        | u8::from(mark.is_some_and(|mark| mark.keep)) << 2
        | u8::from(application) << 3
        | u8::from(mark.is_some_and(|mark| mark.group)) << 4;
    out.extend_from_slice(&end.cut.0.to_le_bytes());
    out.extend_from_slice(&[kind_number(end.kind), flags]);
    out.extend_from_slice(&(mark.map_or(0, |mark| mark.disks.len()) as u16).to_le_bytes());
    out.extend_from_slice(&(mark.map_or(0, |mark| mark.label.len()) as u16).to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    put_position(&mut out, &end.from);
    put_position(&mut out, &end.to);
    for number in [end.time.0, end.chunks, end.chunk_bytes] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&end.chunks_hash);
    out.extend_from_slice(&end.written_bytes.to_le_bytes());
    out.extend_from_slice(&durable_cut.to_le_bytes());
    out.extend_from_slice(commit_before);
    if let Some(mark) = mark {
        out.extend_from_slice(mark.id.as_bytes());
        out.extend_from_slice(mark.machine.as_bytes());
        out.extend_from_slice(&mark.time.0.to_le_bytes());
        mark.disks.iter().for_each(|disk| out.extend_from_slice(disk.as_bytes()));
        out.extend_from_slice(mark.label.as_bytes());
    }
    let hash = *blake3::hash(&out).as_bytes();
    out.extend_from_slice(&hash);
    (out, hash)
}

/// `None` when the bytes are not a whole commit record.
pub fn decode_commit(bytes: &[u8]) -> Option<Commit> {
    let (content, hash) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if blake3::hash(content).as_bytes() != hash {
        return None;
    }
    let mut fields = Fields(content);
    let cut = CutOrdinal(fields.u64()?);
    let kind = match fields.u8()? {
        1 => CutKind::Records,
        2 => CutKind::Scan,
        3 => CutKind::ScanStart,
        4 => CutKind::ScanEnd,
        _ => return None,
    };
    let flags = fields.u8()?;
    let (disks, label_bytes) = (usize::from(fields.u16()?), usize::from(fields.u16()?));
    fields.take(2)?;
    let (from, to) = (fields.position()?, fields.position()?);
    let time = Timestamp(fields.u64()?);
    let (chunks, chunk_bytes) = (fields.u64()?, fields.u64()?);
    let chunks_hash = fields.array()?;
    let (written_bytes, durable_cut) = (fields.u64()?, fields.u64()?);
    let commit_before = fields.array()?;
    let mark = if flags & 2 == 0 {
        None
    } else {
        let id = MarkId::from_slice(fields.take(16)?)?;
        let machine = MachineId::from_slice(fields.take(16)?)?;
        let time = Timestamp(fields.u64()?);
        let disks = (0..disks).map(|_| DiskId::from_slice(fields.take(16)?)).collect::<Option<Vec<_>>>()?;
        let label = String::from_utf8(fields.take(label_bytes)?.to_vec()).ok()?;
        let consistency = if flags & 8 != 0 { Consistency::Application } else { Consistency::Crash };
        Some(Mark { id, machine, disks, consistency, label, keep: flags & 4 != 0, time, group: flags & 16 != 0 })
    };
    if !fields.0.is_empty() {
        return None;
    }
    let end = CutEnd {
        cut,
        kind,
        from,
        to,
        time,
        clock_stepped: flags & 1 != 0,
        chunks,
        chunk_bytes,
        chunks_hash,
        written_bytes,
        mark,
    };
    Some(Commit { end, durable_cut, commit_before, hash: hash.try_into().ok()? })
}

/// File names, made from ordinals only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentName {
    Active { first: u64 },
    Sealed { first: u64, last: u64 },
    Broken { first: u64, last: u64 },
}

impl SegmentName {
    pub fn first(&self) -> u64 {
        match *self {
            SegmentName::Active { first } | SegmentName::Sealed { first, .. } | SegmentName::Broken { first, .. } => {
                first
            }
        }
    }

    /// Relative to the replica's folder.
    pub fn path(&self) -> String {
        match self {
            SegmentName::Active { first } => format!("segments/seg-{first:016x}.active"),
            SegmentName::Sealed { first, last } => format!("segments/seg-{first:016x}-{last:016x}.sealed"),
            SegmentName::Broken { first, last } => format!("segments/seg-{first:016x}-{last:016x}.broken"),
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        let (stem, kind) = name.strip_prefix("seg-")?.split_once('.')?;
        let number = |text: &str| if text.len() == 16 { u64::from_str_radix(text, 16).ok() } else { None };
        if kind == "active" {
            return Some(SegmentName::Active { first: number(stem)? });
        }
        let (first, last) = stem.split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        match kind {
            "sealed" => Some(SegmentName::Sealed { first, last }),
            "broken" => Some(SegmentName::Broken { first, last }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in [
            SegmentName::Active { first: 1 },
            SegmentName::Sealed { first: 1, last: u64::MAX },
            SegmentName::Broken { first: 7, last: 9 },
        ] {
            assert_eq!(SegmentName::parse(name.path().strip_prefix("segments/").unwrap()), Some(name));
        }
        assert_eq!(SegmentName::parse("seg-1.active"), None);
    }

    #[test]
    fn a_commit_survives_and_every_bit_of_it_matters() {
        let position = Epoch([3; 16]).start();
        let end = CutEnd {
            cut: CutOrdinal(7),
            kind: CutKind::Records,
            from: position,
            to: position,
            time: Timestamp(5),
            clock_stepped: true,
            chunks: 1,
            chunk_bytes: 2,
            chunks_hash: [4; 32],
            written_bytes: 3,
            mark: Some(Mark {
                id: MarkId::random(),
                machine: MachineId::random(),
                disks: vec![DiskId::random(), DiskId::random()],
                consistency: Consistency::Application,
                label: "before the update".to_owned(),
                keep: true,
                time: Timestamp(4),
                group: true,
            }),
        };
        let (bytes, hash) = encode_commit(&end, 6, &[9; 32]);
        assert!(bytes.len() <= COMMIT_BYTES_MAX);
        let commit = decode_commit(&bytes).unwrap();
        assert_eq!((commit.end, commit.durable_cut, commit.commit_before, commit.hash), (end, 6, [9; 32], hash));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_commit(&damaged), None);
        }
    }

    #[test]
    fn every_bit_of_a_body_changes_its_sum() {
        let body: Vec<u8> = (0..200u32).map(|number| (number * 7) as u8).collect();
        for length in [1, 15, 16, 17, 200] {
            let sum = body_sum(&body[..length]);
            for bit in 0..length * 8 {
                let mut damaged = body[..length].to_vec();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(body_sum(&damaged), sum, "bit {bit} of {length} bytes");
            }
        }
        assert_ne!(body_sum(&[0; 16]), body_sum(&[0; 17]));
    }

    #[test]
    fn a_frame_at_another_place_is_none() {
        let key = FrameKey([1; 32]);
        let frame = Frame { kind: FrameKind::Chunks, body_bytes: 5, cut: 2, sum: body_sum(b"hello") };
        let bytes = key.encode(frame, 512);
        assert_eq!(key.decode(&bytes, 512), Some(frame));
        assert_eq!(key.decode(&bytes, 513), None);
    }
}
