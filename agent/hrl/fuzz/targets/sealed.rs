//! Companions whose tags are right whatever their slots say, so that what lies behind the tags is reached.

pub fn seal_again(companion: &mut [u8]) {
    let Some(ids) = companion.get(48..80) else { return };
    let key = blake3::derive_key("tidemark 2026-11 slots of one companion", ids);
    let control = [0, 512, 1024, 1536, 2048];
    for at in control.into_iter().chain((4096..companion.len()).step_by(128)) {
        let Some(slot) = companion.get_mut(at..at + 128) else { return };
        if slot.iter().any(|&byte| byte != 0) {
            let mut bytes = (at as u64).to_le_bytes().to_vec();
            bytes.extend(&slot[..112]);
            slot[112..].copy_from_slice(&blake3::keyed_hash(&key, &bytes).as_bytes()[..16]);
        }
    }
}
