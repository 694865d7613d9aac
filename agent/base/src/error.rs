//! Errors as people read them, and those that say the same on every system.

use std::io;

/// An error with its causes, one after another.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let all: Vec<String> =
        std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect();
    all.join(": ")
}

/// What is asked for is not done here.
pub fn not_supported() -> io::Error {
    io::Error::from_raw_os_error(crate::platform::NOT_SUPPORTED)
}

/// Who is asked has ended.
pub fn shut_down() -> io::Error {
    io::Error::from_raw_os_error(crate::platform::SHUT_DOWN)
}
