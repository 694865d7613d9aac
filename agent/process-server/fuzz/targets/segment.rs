//! Frames of any kind, order and content in an active segment: recovery neither panics nor takes memory that the file does not back.
//!
//! `cargo +nightly fuzz run segment` in `agent/process-server`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tidemark_process_server_fuzz::journal::{FRAME_HEADER_BYTES, Frame, FrameKey, FrameKind, HEADER_BYTES, body_sum};
use tidemark_process_server_fuzz::{Memory, damageable, look};

static BASE: LazyLock<(Memory, String)> = LazyLock::new(|| {
    // A sealed segment, and the active one.
    let memory = damageable(3, 2);
    let name = memory.ending_with(".active").remove(0);
    (memory, name)
});

fuzz_target!(|bytes: &[u8]| {
    let (base, name) = &*BASE;
    let memory = base.copy();
    let whole = base.get(name);
    let head: [u8; HEADER_BYTES] = whole[..HEADER_BYTES].try_into().unwrap();
    let key = FrameKey::new(&head);
    let Some((&mode, mut rest)) = bytes.split_first() else { return };
    let mut out = if mode & 1 == 0 { head.to_vec() } else { whole.clone() };
    while let Some((op, left)) = rest.split_first() {
        let take = left.len().min(usize::from(*op) * 4);
        let (body, left) = left.split_at(take);
        rest = left;
        match op % 4 {
            0 => out.extend_from_slice(body),
            // A byte of what is there changes.
            1 if body.len() > 4 => {
                let at = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize % out.len();
                out[at] ^= body[4];
            }
            kind => {
                let kind = if kind == 2 { FrameKind::Chunks } else { FrameKind::Commit };
                let cut = u64::from(body.first().copied().unwrap_or(0) % 8);
                // With the hash that ends a commit made right, what lies behind it is reached; and bodies as they were written.
                let mut body = body.to_vec();
                let mended = mode & 2 != 0;
                if mended && kind == FrameKind::Commit {
                    let hash = *blake3::hash(&body).as_bytes();
                    body.extend_from_slice(&hash);
                }
                let sum = if mended { body_sum(&body) } else { 0 };
                let frame = Frame { kind, body_bytes: body.len() as u32, cut, sum };
                let at = out.len() as u64;
                out.extend_from_slice(&key.encode(frame, at));
                debug_assert_eq!(out.len() as u64 - at, FRAME_HEADER_BYTES as u64);
                out.extend_from_slice(&body);
            }
        }
    }
    memory.put(name, out);
    look(&memory, mode >> 2);
});
