//! What the configuration server said of each machine: its name and how long its history is kept.
//!
//! *Consistency* and *Crash*: see [`crate::table`].

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, MachineId};

use crate::points::Retention;
use crate::table::Table;

pub const FILE: &str = "machines.json";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineSettings {
    pub name: String,
    pub retention: Retention,
    /// Disks that it had, and whose replicas are here for the points that they are part of.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left: BTreeSet<DiskId>,
}

pub type Settings = Table<BTreeMap<MachineId, MachineSettings>>;
