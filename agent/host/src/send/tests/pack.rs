//! Gathering and sealing alone.

use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use tidemark_base::chunk::{ChunkKey, Compression, Opener, UnverifiedChunk};
use tidemark_base::{Extent, Sequence};

use super::Random;
use super::source::MemorySource;
use crate::pack::{CutLimits, CutPieces, Piece, Priority, Records, Workers, frame_raw_bytes, seal_pieces};
use crate::source::Source;

const DISK_BYTES: u64 = 128 << 10;

/// All pieces of all records up to the end.
fn gather(source: &MemorySource, entries_max: usize) -> (Vec<(Extent, Piece)>, u32) {
    let from = source.epochs()[0].start();
    let mut records = Records::after(source, &from).unwrap();
    let limits = CutLimits::unlimited(Sequence(u64::MAX));
    let (span, mut pieces) = CutPieces::gather(source, &mut records, from, &limits, entries_max).unwrap().unwrap();
    let mut all = Vec::new();
    while let Some(piece) = pieces.next_within(source, &span, 3 * 512).unwrap() {
        all.push(piece);
    }
    (all, pieces.passes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was written, and however small the map: what unfolds from the chunks is the disk, in disk order, each
    /// block once.
    #[test]
    fn chunks_unfold_to_the_disk(
        writes in prop::collection::vec((0u64..240, 1u64..16, 0u8..4), 1..60),
        entries_max in 2usize..40,
    ) {
        let source = MemorySource::new(DISK_BYTES);
        for (number, (sector, sectors, kind)) in writes.into_iter().enumerate() {
            let extent = Extent::new(sector * 512, sectors * 512);
            match kind {
                0 => source.zero(extent),
                1 => source.write(extent.offset, &vec![0; extent.length as usize]),
                _ => source.write(extent.offset, &Random(number as u64).bytes(extent.length as usize)),
            };
        }
        let (pieces, passes) = gather(&source, entries_max);
        prop_assert!(pieces.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.offset));
        prop_assert!(pieces.len() <= entries_max || passes > 1 || pieces.iter().any(|(extent, _)| extent.length == 3 * 512));
        let key = ChunkKey::new(source.identity().disk, source.identity().generation);
        let mut worker = crate::pack::Worker::default();
        let sealed =
            seal_pieces(&mut worker, &*source, &key, Compression::Level(1), &pieces, false).unwrap();
        let mut image = vec![0xEE; DISK_BYTES as usize];
        let mut rest = &sealed.chunks[..];
        let mut opener = Opener::new();
        let mut hashes = Vec::new();
        while !rest.is_empty() {
            let (chunk, behind) = UnverifiedChunk::split(rest).unwrap();
            let chunk = chunk.verify(&key, DISK_BYTES, &mut opener).unwrap();
            for (extent, data) in chunk.parts() {
                let target = &mut image[extent.offset as usize..extent.end() as usize];
                prop_assert!(target.iter().all(|&byte| byte == 0xEE), "a block came twice");
                match data {
                    Some(data) => target.copy_from_slice(data),
                    None => target.fill(0),
                }
            }
            hashes.push(chunk.hash);
            rest = behind;
        }
        prop_assert_eq!(hashes, sealed.hashes);
        let disk = source.disk.content();
        let written: Vec<Extent> = pieces.iter().map(|(extent, _)| *extent).collect();
        for extent in &written {
            let range = extent.offset as usize..extent.end() as usize;
            prop_assert_eq!(&image[range.clone()], &disk[range]);
        }
        let total: u64 = written.iter().map(|extent| extent.length).sum();
        let untouched = image.chunks(512).filter(|sector| sector.iter().all(|&byte| byte == 0xEE)).count() as u64;
        prop_assert_eq!(total, DISK_BYTES - untouched * 512);
    }
}

/// `cargo test --release -p tidemark-host --lib -- --ignored pack_speed --nocapture`
#[test]
#[ignore = "measures"]
fn pack_speed() {
    const BLOCKS: u64 = 10_485;
    let source = MemorySource::new(4 << 30 >> 4);
    let mut random = Random(1);
    for index in 0..BLOCKS {
        let mut block = random.bytes(4096);
        if index % 2 == 0 {
            block[2048..].fill(7);
        }
        source.write(random.below(source.identity().disk_bytes / 4096) * 4096, &block);
    }
    let key = ChunkKey::new(source.identity().disk, source.identity().generation);
    for compression in [Compression::Off, Compression::Level(1), Compression::Level(3)] {
        for threads in [1, 2] {
            let workers = Workers::with_threads(threads).unwrap();
            let started = Instant::now();
            let from = source.epochs()[0].start();
            let mut records = Records::after(&*source, &from).unwrap();
            let limits = CutLimits::unlimited(Sequence(u64::MAX));
            let gathered = CutPieces::gather(&*source, &mut records, from, &limits, 1 << 17).unwrap();
            let (span, mut pieces) = gathered.unwrap();
            let gathered = started.elapsed();
            let (done, finished) = std::sync::mpsc::channel();
            let mut tickets = Vec::new();
            loop {
                let mut batch = Vec::new();
                let mut raw = 0;
                while raw < frame_raw_bytes(compression) {
                    let Some(piece) = pieces.next_within(&*source, &span, 1 << 20).unwrap() else { break };
                    raw += piece.0.length;
                    batch.push(piece);
                }
                if batch.is_empty() {
                    break;
                }
                let (source, key, done) = (source.clone(), key.clone(), done.clone());
                tickets.push(workers.submit(Priority::Live, Arc::new(|| {}), move |worker| {
                    let sealed = seal_pieces(worker, &*source, &key, compression, &batch, false).unwrap();
                    done.send(sealed.chunks.len()).unwrap();
                }));
            }
            let bytes: usize = finished.iter().take(tickets.len()).sum();
            println!(
                "{compression:?}, {threads} threads: {} blocks, gathered in {gathered:?}, sealed in {:?}, {bytes} bytes",
                BLOCKS,
                started.elapsed()
            );
        }
    }
}
