//! Any bytes as sealed chunks, and good chunks that were changed: no panic, nothing unfolded beyond a chunk's size, and
//! nothing comes out but what was sealed.
//!
//! `cargo +nightly fuzz run chunk` in `agent/process-server`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_base::chunk::{ChunkKey, Compression, Opener, Sealer, UnverifiedChunk};
use tidemark_base::{CHUNK_BYTES_MAX, DiskId, Extent, Generation};
use tidemark_process_server_fuzz::journal::verify_chunks;

const DISK_BYTES: u64 = 1 << 30;
const SECTOR_BYTES: u64 = 512;

fuzz_target!(|input: &[u8]| {
    let Some((&mode, bytes)) = input.split_first() else { return };
    let key = ChunkKey::new(DiskId::from_bytes([1; 16]), Generation::FIRST);
    if mode % 2 == 0 { any(&key, bytes) } else { changed(&key, mode, bytes) }
});

fn any(key: &ChunkKey, bytes: &[u8]) {
    let _ = verify_chunks(bytes, 512, key, DISK_BYTES);
    let Ok((chunk, rest)) = UnverifiedChunk::split(bytes) else { return };
    assert!(chunk.sealed_bytes() + rest.len() == bytes.len());
    Opener::with_local(|opener| {
        if let Ok(chunk) = chunk.verify(key, DISK_BYTES, opener) {
            assert!(chunk.data.len() <= CHUNK_BYTES_MAX);
            assert!(chunk.extents.iter().all(|extent| extent.is_valid_on(DISK_BYTES)));
        }
    });
}

fn changed(key: &ChunkKey, mode: u8, bytes: &[u8]) {
    let [shape @ .., fill, lengths] = &bytes[..bytes.len().min(6)] else { return };
    let changes = &bytes[shape.len() + 2..];
    let (mut extents, mut end) = (Vec::new(), 0);
    for (index, gap) in shape.iter().enumerate() {
        let length = (u64::from(*lengths >> (index * 2)) % 4 + 1) * SECTOR_BYTES;
        let extent = Extent::new(end + u64::from(*gap) * SECTOR_BYTES, length);
        end = extent.end();
        extents.push(extent);
    }
    let length: u64 = extents.iter().map(|extent| extent.length).sum();
    if extents.is_empty() {
        return;
    }
    let raw: Vec<u8> = (0..length).map(|at| (at / 64) as u8 ^ fill).collect();
    let mut sealed = Vec::new();
    match mode / 2 % 3 {
        0 => drop(Sealer::new(key.clone(), Compression::Off).seal(&extents, &raw, &mut sealed)),
        1 => drop(Sealer::new(key.clone(), Compression::Level(1)).seal(&extents, &raw, &mut sealed)),
        _ => drop(Sealer::new(key.clone(), Compression::Off).seal_zeroes(&extents, &mut sealed)),
    }
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        // The header and the table are where most of the decisions are.
        let at = if at % 2 == 0 { at / 2 % 96 } else { at / 2 } % sealed.len();
        sealed[at] = change[2];
    }
    let Ok((chunk, _)) = UnverifiedChunk::split(&sealed) else { return };
    Opener::with_local(|opener| {
        let Ok(chunk) = chunk.verify(key, DISK_BYTES, opener) else { return };
        assert_eq!(chunk.extents, extents);
        assert!(chunk.data.is_empty() || chunk.data == raw);
    });
}
