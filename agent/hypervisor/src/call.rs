//! What the control plane asks of whoever runs machines at a recovery site, as it goes over the control stream: JSON, checked
//! by these types on both ends.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, MachineId, MarkId, Timestamp};
use uuid::Uuid;

use crate::drill::{Report, Sign};
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
}

impl Default for Description {
    fn default() -> Self {
        Self { hardware: Hardware::default(), sign: None, sign_limit_seconds: 300 }
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

/// How a drill went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drilled {
    pub point: MarkId,
    pub time: Timestamp,
    #[serde(flatten)]
    pub report: Report,
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
        assert_eq!(decode::<Call>("\"check\"").unwrap(), Call::Check);
        assert!(decode::<Call>("{\"run\":\"/bin/sh\"}").is_err());
        assert!(decode::<Description>("{\"firmwear\":\"bios\"}").is_err());
        assert!(decode::<Call>(&format!("\"{}\"", "x".repeat(CALL_BYTES_MAX))).is_err());
    }
}
