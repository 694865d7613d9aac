//! Manifest, log of points, table of damage, sums of the base, batch of a fold: any content, with hashes that hold.
//!
//! `cargo +nightly fuzz run small_files` in `agent/process-server`.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use tidemark_process_server_fuzz::points::PointStore;
use tidemark_process_server_fuzz::{Memory, damageable, info, look};

static BASE: LazyLock<Memory> = LazyLock::new(|| damageable(5, 2));

fuzz_target!(|bytes: &[u8]| {
    let Some((&which, content)) = bytes.split_first() else { return };
    let memory = BASE.copy();
    let hashed = |content: &[u8]| {
        let json = content.strip_suffix(b"\n").unwrap_or(content);
        [blake3::hash(json).to_hex().as_bytes(), b"\n", json, b"\n"].concat()
    };
    match which % 8 {
        0 => memory.put("manifest", hashed(content)),
        // A manifest that nearly is one.
        1 => {
            let mut text = memory.get("manifest").split_off(65);
            for change in content.chunks_exact(3) {
                let at = u16::from_le_bytes([change[0], change[1]]) as usize % text.len();
                text[at] = change[2];
            }
            memory.put("manifest", hashed(&text));
        }
        2 => memory.put("damage", hashed(content)),
        3 => memory.put("base.sums", content.to_vec()),
        4 => memory.put("fold.pending", content.to_vec()),
        _ => {
            let lines: Vec<u8> = content
                .split(|&byte| byte == b'\n')
                .flat_map(|line| {
                    let digest = blake3::hash(line).to_hex();
                    let digest =
                        if which % 8 == 5 { &digest.as_bytes()[..32] } else { b"0123456789abcdef0123456789abcdef" };
                    [digest, b" ", line, b"\n"].concat()
                })
                .collect();
            memory.put("points", lines);
            if let Ok((store, _)) = PointStore::open(Arc::new(memory.clone()), info().machine, which % 2 == 0) {
                let _ = store.all();
                let _ = store.check();
            }
            return;
        }
    }
    look(&memory, which >> 3);
});
