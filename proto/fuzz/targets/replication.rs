//! Any bytes as a frame of the data path, from either side: no panic, and what is accepted survives the way back.
//!
//! `cargo +nightly fuzz run replication` in `proto`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use tidemark_proto::replication::{HostFrame, ServerFrame, wire};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(frame) = wire::HostFrame::decode(bytes)
        && let Ok(frame) = HostFrame::try_from(frame)
    {
        assert_eq!(HostFrame::try_from(wire::HostFrame::from(frame.clone())), Ok(frame));
    }
    if let Ok(frame) = wire::ServerFrame::decode(bytes)
        && let Ok(frame) = ServerFrame::try_from(frame)
    {
        assert_eq!(ServerFrame::try_from(wire::ServerFrame::from(frame.clone())), Ok(frame));
    }
});
