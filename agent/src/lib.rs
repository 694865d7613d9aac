//! Composition: the roles, the command line, the demonstration. Alone knows every role. On Windows there is the agent alone, with a
//! command line of its own.

#[cfg(unix)]
pub mod cli;
pub mod client;
#[cfg(unix)]
pub mod demo;
#[cfg(unix)]
pub mod folder;
pub mod roles;
#[cfg(windows)]
pub mod windows;

#[cfg(unix)]
pub use cli::main;
#[cfg(windows)]
pub use windows::main;
