//! The `tidemark` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    keep_large_blocks();
    tidemark::main()
}

/// Frames are a few hundred KiB each. By default glibc maps and unmaps every such block, and the kernel clears its pages
/// each time: a tenth of the time of an initial replication. Freed memory is still given back above the limit.
#[cfg(all(unix, target_env = "gnu"))]
fn keep_large_blocks() {
    const MAPPED_FROM_BYTES: i32 = 16 << 20;
    const KEPT_BYTES_MAX: i32 = 32 << 20;
    const ARENAS_MAX: i32 = 4;
    // SAFETY: no other thread runs yet; the calls only set numbers.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
    }
}

#[cfg(not(all(unix, target_env = "gnu")))]
fn keep_large_blocks() {}
