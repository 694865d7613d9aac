//! What the control plane asks of whoever runs machines at a recovery site, as it goes over the control stream: JSON, checked
//! by these types on both ends.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, Generation, MachineId, MarkId, Timestamp};
use uuid::Uuid;

use crate::convert::{self, Was, convert, revert};
use crate::drill::{Report, Sign};
use crate::hypervisor::{Power, Stopped};
use crate::machine::Hardware;

/// Longer ones are not ours.
pub const CALL_BYTES_MAX: usize = 64 << 10;

/// How a machine is run where it fails over to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Description {
    pub hardware: Hardware,
    /// What shows that it lives; without one, that it was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sign: Option<Sign>,
    /// How long a drill waits for the sign.
    pub sign_limit_seconds: u64,
    /// What its conversion to the other generation changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub converted: Option<Was>,
}

impl Description {
    /// Makes it a machine of that generation. One that was converted gets back what it was, and keeps what was changed since.
    pub fn become_generation(&mut self, to: convert::Generation, disks: usize) {
        if convert::Generation::of(&self.hardware) == to {
            return;
        }
        match self.converted.take() {
            Some(was) => self.hardware = revert(&self.hardware, &was),
            None => (self.hardware, self.converted) = convert(&self.hardware, disks, to),
        }
    }
}

impl Default for Description {
    fn default() -> Self {
        Self { hardware: Hardware::default(), sign: None, sign_limit_seconds: 300, converted: None }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// What it is, and whether it works. Finds out what machines run under, so that no drill waits for that.
    Check,
    Drill(Box<DrillCall>),
    /// Ends a drill that was left running. Repeating it changes nothing.
    EndDrill {
        drill: Uuid,
    },
    /// What a failover to a point loses of what is here. Changes nothing.
    Loss {
        machine: MachineId,
        point: String,
    },
    /// Who may write a machine's replica, whether by a configuration server's word or with the recovery key. Changes nothing.
    Rights {
        machine: MachineId,
    },
    /// Runs a machine from a point, for good. The same again changes nothing.
    FailOver(Box<FailOverCall>),
    /// How a failover does.
    Failover {
        failover: Uuid,
    },
    /// The same from another point; what was written since is gone.
    ChangePoint(Box<FailOverCall>),
    Commit {
        failover: Uuid,
    },
    /// Undoes a failover; what was written since is gone. Repeating it changes nothing.
    EndFailover {
        failover: Uuid,
    },
    /// Writes plain disks in the background and moves the machine onto them.
    Promote {
        failover: Uuid,
        bytes_per_second: Option<u64>,
    },
    StopPromote {
        failover: Uuid,
    },
    /// The machine keeps its plain disks for good, and its replica is not its affair any more.
    LetGo {
        failover: Uuid,
    },
    /// How much may differ between the machine and its home. Changes nothing.
    Changed {
        failover: Uuid,
    },
    /// Shuts the machine down, and keeps everybody from its disks: it goes home. Repeating it changes nothing.
    Stop {
        failover: Uuid,
        /// What the guest may take to shut down; then it is turned off.
        limit_seconds: u64,
    },
    /// Runs it again: it does not go home.
    Start(Box<FailOverCall>),
    /// A machine on plain disks goes home: what it writes is seen again. Of any other: nothing.
    SeeAgain {
        failover: Uuid,
    },
    /// Its home does not follow it any more.
    StayAway {
        failover: Uuid,
    },
    /// The machine is home: what it had here goes, the replica stays.
    Return {
        failover: Uuid,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillCall {
    /// Made by the control plane; the machine's id at the hypervisor.
    pub drill: Uuid,
    pub machine: MachineId,
    /// Of the machine at the hypervisor.
    pub name: String,
    /// As people name points.
    pub point: String,
    /// In their order.
    pub disks: Vec<DiskId>,
    pub description: Description,
    /// Leaves the machine running for people when it lives.
    pub keep: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailOverCall {
    /// Made by the control plane; the machine's id at the hypervisor.
    pub failover: Uuid,
    pub machine: MachineId,
    /// Of the machine at the hypervisor.
    pub name: String,
    /// As people name points.
    pub point: String,
    /// In their order.
    pub disks: Vec<DiskId>,
    /// None: the disks are made ready, and a person attaches them.
    pub run: Option<Description>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub point: MarkId,
    pub time: Timestamp,
    /// Of the newest change that is here.
    pub newest: Timestamp,
    /// What is here and was written after the point, at most.
    pub bytes: u64,
}

/// What a way home is chosen by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Written since the failover, and after its point in the replica. None: not known, so everything is compared.
    pub changed_bytes: Option<u64>,
    pub total_bytes: u64,
    /// What a plain image of each disk occupies, at most.
    #[serde(default)]
    pub data_bytes: Vec<(DiskId, u64)>,
}

/// How a machine that failed over does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailedOver {
    pub point: MarkId,
    pub time: Timestamp,
    pub disks: Vec<FailedOverDisk>,
    /// What runs it.
    pub hypervisor: String,
    pub power: Power,
    /// From the call to the guest's first instruction, when this call started it.
    pub first_instruction_seconds: Option<f64>,
    pub committed: bool,
    /// It is off, on its way home.
    #[serde(default)]
    pub stopped: bool,
    pub promotion: Promotion,
    /// Of all disks, in the plain ones.
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub problem: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedOverDisk {
    pub id: DiskId,
    /// Where it can be opened until the machine has its plain disks.
    pub nbd: Option<String>,
    /// The plain disk, whole once the promotion says so.
    pub plain: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promotion {
    /// Nobody wants it, or it was stopped.
    No,
    Running,
    /// The plain disks have everything; the machine is not on them yet.
    Filled,
    /// The machine has its plain disks.
    Plain,
}

/// What the control plane asks of whoever runs a machine at its home ([`crate::owner`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnerCall {
    pub machine: MachineId,
    /// Under which its owner is written down there.
    pub name: String,
    pub what: Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// Whether it is on. Changes nothing.
    Power,
    /// Asks the guest to shut down. One that does not within the limit is turned off, or left on: that is refused.
    ShutDown { limit_seconds: u64, turn_off: bool },
    /// Of one that is on: nothing.
    Start,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerAnswer {
    /// `QEMU`, `libvirt`, `scripts`. None: nobody is written down for the machine.
    pub owner: Option<String>,
    pub power: Power,
    /// How it was shut down.
    #[serde(default)]
    pub stopped: Option<Stopped>,
}

/// How a drill went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drilled {
    pub point: MarkId,
    pub time: Timestamp,
    #[serde(flatten)]
    pub report: Report,
}

/// Who may write a machine's replica here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// Older ones are refused.
    pub generations: BTreeMap<DiskId, Generation>,
    /// The machine runs here, or could: since when.
    pub failed_over: Option<Timestamp>,
    /// It was failed over with the recovery key, without any configuration server.
    pub by_recovery_key: Option<ByRecoveryKey>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByRecoveryKey {
    pub at: Timestamp,
    pub point_time: Timestamp,
}

/// Why a text is no call, or no answer.
#[derive(Debug, thiserror::Error)]
#[error("what came about a hypervisor is not understood: {0}")]
pub struct NotUnderstood(String);

pub fn encode<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data")
}

pub fn decode<T: DeserializeOwned>(text: &str) -> Result<T, NotUnderstood> {
    if text.len() > CALL_BYTES_MAX {
        return Err(NotUnderstood(format!("{} bytes", text.len())));
    }
    serde_json::from_str(text).map_err(|error| NotUnderstood(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Bus, Firmware};

    #[test]
    fn h6_a_machine_becomes_the_other_generation_and_what_it_was() {
        let hardware = Hardware { firmware: Firmware::Uefi, buses: vec![Bus::Scsi, Bus::Nvme], ..Hardware::default() };
        let before = Description { hardware, ..Description::default() };
        let mut description = before.clone();
        description.become_generation(convert::Generation::Two, 2);
        assert_eq!(description, before, "it is that already");
        description.become_generation(convert::Generation::One, 2);
        assert_eq!(description.hardware.firmware, Firmware::Bios);
        assert_eq!(description.hardware.buses, [Bus::Ide, Bus::Nvme], "it boots from IDE");
        let stored: Description = decode(&encode(&description)).unwrap();
        assert_eq!(stored, description);
        description.hardware.processors = 7;
        description.become_generation(convert::Generation::Two, 2);
        let hardware = Hardware { processors: 7, ..before.hardware.clone() };
        assert_eq!(description, Description { hardware, ..before });
    }

    #[test]
    fn calls_survive_the_wire_and_nothing_else_is_one() {
        let call = Call::Drill(Box::new(DrillCall {
            drill: Uuid::new_v4(),
            machine: MachineId::random(),
            name: "web-drill".into(),
            point: "latest".into(),
            disks: vec![DiskId::random()],
            description: Description {
                sign: Some(Sign::Port { port: 22, send: String::new() }),
                ..Description::default()
            },
            keep: true,
        }));
        assert_eq!(decode::<Call>(&encode(&call)).unwrap(), call);
        let call = Call::FailOver(Box::new(FailOverCall {
            failover: Uuid::new_v4(),
            machine: MachineId::random(),
            name: "web".into(),
            point: "latest".into(),
            disks: vec![DiskId::random()],
            run: None,
        }));
        assert_eq!(decode::<Call>(&encode(&call)).unwrap(), call);
        assert_eq!(decode::<Call>("\"check\"").unwrap(), Call::Check);
        assert!(decode::<Call>("{\"run\":\"/bin/sh\"}").is_err());
        assert!(decode::<Description>("{\"firmwear\":\"bios\"}").is_err());
        assert!(decode::<Call>(&format!("\"{}\"", "x".repeat(CALL_BYTES_MAX))).is_err());
    }
}
