//! `kill -9` of one role while the others live.
