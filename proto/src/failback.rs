//! The way home of a machine that failed over: what the control plane asks of the master target, which is the agent at the
//! machine's home. It goes over the control stream as JSON, checked by these types on both ends. The data goes from the
//! process server to the agent alone (`failback.proto`).

use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, MachineId, Timestamp};
use uuid::Uuid;

pub mod wire {
    tonic::include_proto!("tidemark.failback.v1");
}

/// The most of a disk that one answer is about.
pub const BLOCKS_BYTES_MAX: u64 = 1 << 20;
/// Runs in one answer.
pub const RUNS_MAX: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Only what changed on either side since the point.
    Delta,
    /// Both sides are hashed, and what differs crosses.
    Compare,
    /// Everything crosses: there is nothing at home to compare with.
    Full,
}

impl Method {
    pub const ALL: [Method; 3] = [Method::Delta, Method::Compare, Method::Full];

    pub fn name(self) -> &'static str {
        match self {
            Method::Delta => "delta",
            Method::Compare => "compare",
            Method::Full => "full",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// What the control plane asks of the master target. Each may be repeated.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetCall {
    /// Whether the home disks can be written. Changes nothing.
    Check {
        machine: MachineId,
    },
    /// Whether disks could be made: nothing is in their place, and there is room for what they will hold. Changes nothing.
    Room {
        disks: Vec<NewDisk>,
    },
    /// Makes the disks that are gone, empty. Those that are there stay as they are. All of them, or none.
    Make {
        disks: Vec<NewDisk>,
    },
    /// Brings the home disks to the state of the machine, and keeps them there: a round every few seconds, and one now.
    Sync {
        machine: MachineId,
        failover: Uuid,
        method: Method,
    },
    /// The machine is off: one last round, and none after it.
    Finish {
        machine: MachineId,
        failover: Uuid,
        method: Method,
    },
    /// Where the machine ran is lost: disks that show it at one instant are finished as they are.
    TakeOver {
        machine: MachineId,
        failover: Uuid,
    },
    /// Gives the home disks back what they had before the first round.
    Undo {
        machine: MachineId,
        failover: Uuid,
    },
    /// The home disks are the machine's again, or are left as they are: what was kept for an undo goes.
    LetGo {
        machine: MachineId,
        failover: Uuid,
    },
    Report {
        machine: MachineId,
    },
}

/// A home disk that is made where there is none.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewDisk {
    pub path: String,
    pub bytes: u64,
    /// Nothing may be there: it is another place than the original's. Otherwise what is there stays as it is.
    #[serde(default)]
    pub fresh: bool,
    /// What it will hold once everything crossed; the room that it needs.
    #[serde(default)]
    pub data_bytes: u64,
}

/// Where a master target is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// It has nothing to do with the machine.
    #[default]
    Idle,
    /// The home disks are on their way: what they had is kept aside.
    Syncing,
    /// They are as the machine was at an instant.
    Consistent,
    /// They are as the machine was when it was stopped.
    Finished,
    /// They are given back what they had.
    Undoing,
    /// They have what they had.
    Undone,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct TargetReport {
    pub stage: Stage,
    pub failover: Option<Uuid>,
    /// Rounds whose content is durable on the home disks, since this was begun.
    pub rounds: u64,
    /// Of the round under way, or of the undo.
    pub done_bytes: u64,
    pub total_bytes: u64,
    /// Since this was begun, over all rounds: hashed on both sides.
    pub compared_bytes: u64,
    /// What came, before compression.
    pub received_bytes: u64,
    /// What came, as it came.
    pub wire_bytes: u64,
    /// Rounds of one instant: their state is what the home disks show.
    pub consistent_at: Option<Timestamp>,
    /// Written at the other side since then.
    pub behind_bytes: u64,
    /// What the home disks had, of what was overwritten.
    pub kept_bytes: u64,
    /// Why it does not go on now; it is tried again.
    pub problem: Option<String>,
    pub help: Option<String>,
    /// What is in the way of a start, by disk.
    pub obstacles: Vec<Obstacle>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Obstacle {
    pub disk: Option<DiskId>,
    pub message: String,
    pub help: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_one_name_each() {
        for method in Method::ALL {
            assert_eq!(Method::named(method.name()), Some(method));
        }
        assert_eq!(Method::named("diff"), None);
    }
}
