//! Any bytes as an `.hrl` file: no panic, no memory that the file does not back, and every entry's data in the file.
//!
//! `cargo +nightly fuzz run reader` in `agent/hrl`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_hrl::format::{BlockHeader, HrlFile};

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    let mut bytes = match mode % 4 {
        0 => bytes.to_vec(),
        // The fuzzer need not find 4 KiB of header by itself.
        _ => template(bytes),
    };
    if mode % 2 == 1 {
        mend_checksums(&mut bytes);
    }
    let Ok(file) = HrlFile::open(&bytes) else { return };
    let mut buffer = vec![0; 4096];
    let mut end = 4096;
    let _ = file.for_each(
        |located| {
            assert!(located.data_offset >= end, "entries overlap");
            end = located.data_offset + u64::from(located.entry.data_bytes);
            assert!(end <= bytes.len() as u64, "data beyond the file");
            file.data_checksum(located, &mut buffer).map(drop).map_err(|_| ())
        },
        |_| Ok(()),
    );
});

/// A valid header, then the input; the log ends where the input does.
fn template(input: &[u8]) -> Vec<u8> {
    let mut header = tidemark_hrl::format::Header::new(
        uuid::Uuid::from_u128(1),
        uuid::Uuid::nil(),
        tidemark_base::Timestamp(1_763_000_000_000_000_000),
    );
    header.metadata_bytes = 512;
    header.eol_location = 4096 + input.len() as u64;
    let mut bytes = header.encode().to_vec();
    bytes.extend(input);
    bytes
}

/// Follows the links as a reader would and makes each block's checksum right, so that what lies behind it is reached.
fn mend_checksums(bytes: &mut [u8]) {
    let Some(mut at) = bytes.len().checked_sub(512) else { return };
    for _ in 0..64 {
        let Some(block) = bytes.get_mut(at..at + 32) else { return };
        let mut raw = [0; 32];
        raw.copy_from_slice(block);
        let (header, pair) = BlockHeader::decode(&raw);
        block[12..16].copy_from_slice(&pair.computed.to_le_bytes());
        match at.checked_sub(header.previous as usize) {
            Some(before) if header.previous != 0 => at = before,
            _ => return,
        }
    }
}
