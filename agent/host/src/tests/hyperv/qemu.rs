//! Images by QEMU's tools.

use std::path::Path;
use std::process::Command;

/// False where they are not there.
pub fn create(path: &Path, bytes: u64) -> bool {
    let mut qemu = Command::new("qemu-img");
    qemu.args(["create", "-q", "-f", "vhdx", "-o", "block_size=1M"]).arg(path).arg(bytes.to_string());
    qemu.status().is_ok_and(|status| status.success())
}

/// Each of them one byte, again and again.
pub fn write(path: &Path, writes: &[(u64, Vec<u8>)]) {
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "vhdx"]);
    for (offset, data) in writes {
        qemu.args(["-c", &format!("write -q -P {} {offset} {}", data[0], data.len())]);
    }
    let output = qemu.arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

pub fn content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let output =
        Command::new("qemu-img").args(["convert", "-f", "vhdx", "-O", "raw"]).args([path, &raw]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let content = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    content
}
