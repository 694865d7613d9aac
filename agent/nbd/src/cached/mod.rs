//! Reads that never wait for a device, where the system has them.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use unix::CachedReader;
#[cfg(windows)]
pub use windows::CachedReader;
