//! Composition: the roles, the command line, the demonstration. Alone knows every role.

pub mod cli;
pub mod client;
pub mod demo;
pub mod folder;
pub mod roles;
