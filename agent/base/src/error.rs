//! Errors as people read them.

/// An error with its causes, one after another.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let all: Vec<String> =
        std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect();
    all.join(": ")
}
