//! Marks: instants at which no write was in flight.

use prost::Message;
use tidemark_base::{DiskId, MachineId, MarkId, Timestamp};

use super::{WireError, id, positive, wire};

/// The longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;
/// The most disks that one mark spans: 64 machines with 64 disks each.
pub const MARK_DISKS_MAX: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Consistency {
    Crash,
    Application,
}

/// A mark, the same on each disk that was held at its instant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark {
    pub id: MarkId,
    pub machine: MachineId,
    /// Every disk that was held at this instant.
    pub disks: Vec<DiskId>,
    pub consistency: Consistency,
    pub label: String,
    /// A recovery point of its own; otherwise only a place to recover to within the any-time window.
    pub keep: bool,
    pub time: Timestamp,
    /// Held behind a barrier with the other machines of a group, whose marks have the same id.
    pub group: bool,
}

impl Mark {
    /// The mark as it lies in a log. The encoding is that of the wire, which may grow fields and keeps old ones.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::Mark::from(self.clone()).encode_to_vec()
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        wire::Mark::decode(bytes).map_err(|_| WireError::Contradiction("a mark cannot be decoded"))?.try_into()
    }
}

impl TryFrom<wire::Mark> for Mark {
    type Error = WireError;

    fn try_from(wire: wire::Mark) -> Result<Self, WireError> {
        if wire.disks.is_empty() || wire.disks.len() > MARK_DISKS_MAX {
            return Err(WireError::Length { field: "the disks of a mark", bytes: wire.disks.len() });
        }
        if wire.label.len() > LABEL_BYTES_MAX {
            return Err(WireError::Length { field: "the label of a mark", bytes: wire.label.len() });
        }
        Ok(Self {
            consistency: match wire.consistency() {
                wire::Consistency::Crash => Consistency::Crash,
                wire::Consistency::Application => Consistency::Application,
                wire::Consistency::Invalid => {
                    return Err(WireError::Value { field: "consistency", value: wire.consistency as u64 });
                }
            },
            id: id!(MarkId, "mark id", wire.id)?,
            machine: id!(MachineId, "machine id", wire.machine)?,
            disks: wire.disks.iter().map(|disk| id!(DiskId, "disk id", disk)).collect::<Result<_, _>>()?,
            label: wire.label,
            keep: wire.keep,
            time: Timestamp(positive("the time of a mark", wire.time_ns)?),
            group: wire.group,
        })
    }
}

impl From<Mark> for wire::Mark {
    fn from(mark: Mark) -> Self {
        Self {
            id: mark.id.to_vec(),
            machine: mark.machine.to_vec(),
            disks: mark.disks.iter().map(|disk| disk.to_vec()).collect(),
            consistency: match mark.consistency {
                Consistency::Crash => wire::Consistency::Crash,
                Consistency::Application => wire::Consistency::Application,
            } as i32,
            label: mark.label,
            keep: mark.keep,
            time_ns: mark.time.0,
            group: mark.group,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_survives_its_encoding_and_a_bad_one_is_refused() {
        let mark = Mark {
            id: MarkId::random(),
            machine: MachineId::random(),
            disks: vec![DiskId::random(), DiskId::random()],
            consistency: Consistency::Crash,
            label: "before the upgrade".into(),
            keep: true,
            time: Timestamp(5),
            group: true,
        };
        assert_eq!(Mark::from_bytes(&mark.to_bytes()), Ok(mark.clone()));
        assert!(Mark::from_bytes(&[0xff; 3]).is_err());
        let wire = wire::Mark::from(mark);
        for bad in [
            wire::Mark { disks: vec![], ..wire.clone() },
            wire::Mark { disks: vec![vec![1; 3]], ..wire.clone() },
            wire::Mark { label: "x".repeat(257), ..wire.clone() },
            wire::Mark { consistency: 9, ..wire.clone() },
            wire::Mark { id: vec![0; 16], ..wire.clone() },
            wire::Mark { time_ns: 0, ..wire },
        ] {
            assert!(Mark::try_from(bad).is_err());
        }
    }
}
