//! The roles as they run: each with its part of a folder, dialling the configuration server.

pub mod agent;
pub mod config_server;
pub mod known;
pub mod link;
pub mod machines;
pub mod metrics;
pub mod notify;
pub mod outbox;
pub mod owner;
pub mod place;
pub mod process_server;
pub mod quiet;
pub mod register;
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

impl From<crate::folder::FolderError> for RoleError {
    fn from(error: crate::folder::FolderError) -> Self {
        RoleError::new(&error, error.help())
    }
}

impl From<tidemark_config_server::StartError> for RoleError {
    fn from(error: tidemark_config_server::StartError) -> Self {
        RoleError::new(&error, error.help())
    }
}

/// The host's name, as people know it.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
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
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
