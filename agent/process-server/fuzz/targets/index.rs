//! Sealed segments and merged indexes whose every hash holds and whose content does not: no panic, no large allocation.
//!
//! `cargo +nightly fuzz run index` in `agent/process-server`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tidemark_process_server_fuzz::journal::HEADER_BYTES;
use tidemark_process_server_fuzz::{Memory, damageable, look};

const FOOTER_BYTES: usize = 512;

type Base = (Memory, Vec<String>);

fn base(cuts: u64, segment_extents: usize) -> Base {
    let memory = damageable(cuts, segment_extents);
    let mut names = memory.ending_with(".sealed");
    names.extend(memory.ending_with(".merged"));
    (memory, names)
}

/// A sealed segment of two cuts, and an active one.
static ONE: LazyLock<Base> = LazyLock::new(|| base(3, 2));
/// Sealed segments of two cuts and of one, as many as a merged index takes, that index, and an active segment.
static MERGED: LazyLock<Base> = LazyLock::new(|| base(6, 1));

fuzz_target!(|bytes: &[u8]| {
    let [which, mend, changes @ ..] = bytes else { return };
    let (base, names) = if which % 4 == 0 { &*MERGED } else { &*ONE };
    let which = which / 4;
    let name = &names[usize::from(which) % names.len()];
    let memory = base.copy();
    let mut file = base.get(name);
    for change in changes.chunks_exact(6) {
        // Most of it in the footer and just before, where the structure is.
        let at = u16::from_le_bytes([change[0], change[1]]) as usize;
        let place = if change[2] % 4 == 0 { at % file.len() } else { file.len() - 1 - at % file.len().min(1024) };
        file[place] = if change[3] % 2 == 0 { change[4] } else { file[place] ^ change[5] };
    }
    if mend % 4 != 0 {
        mend_hashes(&mut file, name.ends_with(".sealed"));
    }
    if mend % 8 == 5 {
        let shorter = file.len() - usize::from(*mend) % file.len();
        file.truncate(shorter);
    }
    memory.put(name, file);
    look(&memory, mend >> 3);
});

/// Makes the hashes of directory and footer hold again.
fn mend_hashes(file: &mut [u8], sealed: bool) {
    let foot = file.len() - FOOTER_BYTES;
    let number = |file: &[u8], at: usize| u64::from_le_bytes(file[foot + at..foot + at + 8].try_into().unwrap());
    // Magic, places, numbers, position, commit; or magic, disk, numbers.
    let (place_at, bytes_at, hash_at) = if sealed { (56, 64, 192) } else { (64, 72, 80) };
    let (start, bytes) = (number(file, place_at) as usize, number(file, bytes_at) as usize);
    if let Some(directory) = start.checked_add(bytes).and_then(|end| file.get(start..end)) {
        let hash = *blake3::hash(directory).as_bytes();
        file[foot + hash_at..foot + hash_at + 32].copy_from_slice(&hash);
    }
    let content = &file[foot..foot + FOOTER_BYTES - 32];
    let hash = if sealed {
        let key: [u8; 32] = file[HEADER_BYTES - 32..HEADER_BYTES].try_into().unwrap();
        *blake3::keyed_hash(&key, content).as_bytes()
    } else {
        *blake3::hash(content).as_bytes()
    };
    file[foot + FOOTER_BYTES - 32..].copy_from_slice(&hash);
}
