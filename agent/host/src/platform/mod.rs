//! What the systems of hosts do each in their own way; [`crate::capture::providers`] says who catches changes on each.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
pub use windows::*;
