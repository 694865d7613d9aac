//! How fast one thread appends to a journal, checks included: `cargo run --release -p tidemark-process-server --example append -- FOLDER`.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::storage::RealStorage;
use tidemark_base::{DiskId, Epoch, Extent, FRAME_BYTES_MAX, Generation, MachineId, Timestamp};
use tidemark_process_server::journal::Limits;
use tidemark_process_server::replica::{ReplicaInfo, ReplicaSet};
use tidemark_proto::replication::{CutEnd, CutKind, CutOrdinal};

const DISK_BYTES: u64 = 4 << 30;
const CUT_FRAMES: u64 = 16;

/// What this thread has used of a processor: on a busy machine the wall says less.
fn processor() -> f64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(0.0, |time| Duration::from(time).as_secs_f64())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("name a folder to write 2 GiB to")?;
    let (set, _) = ReplicaSet::open(RealStorage::create(folder)?, Limits::default())?;
    let (disk, generation) = (DiskId::random(), Generation::FIRST);
    let replica = set.create(ReplicaInfo { disk, machine: MachineId::random(), generation, disk_bytes: DISK_BYTES })?;
    let session = replica.begin_session(generation, DISK_BYTES)?;
    let mut sealer = Sealer::new(ChunkKey::new(disk, generation), Compression::Off);
    let (mut raw, mut state) = (vec![0; 64 << 10], 1u64);
    raw.iter_mut().for_each(|byte| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    });
    let at = Epoch::random().start();
    let end = |cut, kind, chunks: u64, bytes, hashes: blake3::Hasher| CutEnd {
        cut: CutOrdinal(cut),
        kind,
        from: at,
        to: at,
        time: Timestamp(1),
        clock_stepped: false,
        chunks,
        chunk_bytes: bytes,
        chunks_hash: *hashes.finalize().as_bytes(),
        written_bytes: 0,
        mark: None,
    };
    session.end_cut(&end(1, CutKind::ScanStart, 0, 0, blake3::Hasher::new()))?;
    let (mut total, mut appending, mut used, mut syncing, mut offset) = (0u64, 0.0, 0.0, 0.0, 0);
    for cut in 2..130 {
        let mut frames = Vec::new();
        let mut hashes = blake3::Hasher::new();
        let mut chunks = 0;
        for _ in 0..CUT_FRAMES {
            let mut frame = Vec::new();
            while frame.len() + raw.len() + 100 <= FRAME_BYTES_MAX {
                hashes.update(&sealer.seal(&[Extent::new(offset % DISK_BYTES, raw.len() as u64)], &raw, &mut frame));
                offset += raw.len() as u64;
                chunks += 1;
            }
            frames.push(frame);
        }
        let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
        let (begin, used_before) = (Instant::now(), processor());
        for frame in &frames {
            session.append_chunks(cut, frame)?;
        }
        session.end_cut(&end(cut, CutKind::Scan, chunks, bytes, hashes))?;
        appending += begin.elapsed().as_secs_f64();
        used += processor() - used_before;
        let begin = Instant::now();
        session.sync()?;
        syncing += begin.elapsed().as_secs_f64();
        total += bytes;
    }
    println!(
        "{} MB appended: {:.2} GB/s appending and checking ({:.2} GB per processor second), {:.2} GB/s with a sync every {CUT_FRAMES} MiB",
        total / 1_000_000,
        total as f64 / appending / 1e9,
        total as f64 / used / 1e9,
        total as f64 / (appending + syncing) / 1e9
    );
    Ok(())
}
