//! Composition of the roles.
