//! What the configuration server said of each machine: its name and how long its history is kept.
//!
//! *Consistency* and *Crash*: see [`crate::table`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tidemark_base::MachineId;

use crate::points::Retention;
use crate::table::Table;

pub const FILE: &str = "machines.json";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineSettings {
    pub name: String,
    pub retention: Retention,
}

pub type Settings = Table<BTreeMap<MachineId, MachineSettings>>;
