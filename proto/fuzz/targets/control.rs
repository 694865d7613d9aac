//! Any bytes as a message of the control streams: no panic.
//!
//! `cargo +nightly fuzz run control` in `proto`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use tidemark_proto::control::{
    AgentCommand, AgentReport, DenyList, EventBatch, Failure, Inventory, MachineSpec, PointInfo, Register, Reply,
    ServerCommand, ServerReport, Serving, wire,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    match which % 13 {
        0 => drop(wire::Register::decode(bytes).ok().map(Register::try_from)),
        1 => drop(wire::AgentCommand::decode(bytes).ok().map(AgentCommand::try_from)),
        2 => drop(wire::MachineSpec::decode(bytes).ok().map(MachineSpec::try_from)),
        3 => drop(wire::ServerCommand::decode(bytes).ok().map(ServerCommand::try_from)),
        4 => drop(wire::Failure::decode(bytes).ok().map(Failure::try_from)),
        5 => drop(wire::Reply::decode(bytes).ok().map(<(u64, Result<Reply, Failure>)>::try_from)),
        6 => drop(wire::Point::decode(bytes).ok().map(PointInfo::try_from)),
        7 => drop(wire::Serving::decode(bytes).ok().map(Serving::try_from)),
        8 => drop(wire::AgentReport::decode(bytes).ok().map(AgentReport::try_from)),
        10 => drop(wire::EventBatch::decode(bytes).ok().map(EventBatch::try_from)),
        12 => drop(wire::Inventory::decode(bytes).ok().map(Inventory::try_from)),
        11 => drop(wire::DenyList::decode(bytes).ok().map(DenyList::try_from)),
        _ => drop(wire::ServerReport::decode(bytes).ok().map(ServerReport::try_from)),
    }
});
