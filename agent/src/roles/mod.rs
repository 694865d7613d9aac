//! The roles as they run: each with its part of a folder, dialling the configuration server.

pub mod agent;
#[cfg(unix)]
pub mod config_server;
mod errors;
pub mod known;
pub mod link;
mod looking;
#[cfg(unix)]
pub mod machines;
pub mod metrics;
#[cfg(unix)]
pub mod notify;
pub mod outbox;
#[cfg(unix)]
pub mod owner;
pub mod place;
#[cfg(unix)]
pub mod process_server;
#[cfg(unix)]
pub mod quiet;
pub mod register;
pub mod system;
#[cfg(unix)]
pub mod up;

use tidemark_proto::control::{Failure, FailureKind};

/// Why a role did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RoleError {
    pub message: String,
    pub help: String,
}

impl RoleError {
    pub fn new(error: &dyn std::error::Error, help: impl Into<String>) -> Self {
        let failure = Failure::from_error(FailureKind::Failed, error, help);
        Self { message: failure.message, help: failure.help }
    }
}

impl From<Failure> for RoleError {
    fn from(failure: Failure) -> Self {
        Self { message: failure.message, help: failure.help }
    }
}

/// What is wrong with settings that people wrote, and in which line.
pub fn settings_in_words(text: &str, error: &toml::de::Error) -> String {
    let said = tidemark_base::words::in_words("", error.message());
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {said}", before.matches('\n').count() + 1),
        None => said,
    }
}

/// The host's name, as people know it.
pub fn host_name() -> String {
    let name = system::host_name();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

/// As [`host_name`], of the letters that names have.
pub fn plain_host_name() -> String {
    let name: String = host_name()
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() || ".-_".contains(letter) { letter } else { '-' })
        .take(63)
        .collect();
    if name.starts_with(|letter: char| letter.is_ascii_alphanumeric()) { name } else { format!("h{name}") }
}

/// Tells one boot of this machine from the next.
pub fn boot_id() -> String {
    tidemark_host::state::session::Boot::current().map(|boot| boot.id).unwrap_or_default()
}
