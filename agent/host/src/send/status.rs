//! What a sender says of itself.

use std::collections::VecDeque;
use std::time::Duration;

use tidemark_base::chunk::Compression;
use tidemark_base::{Position, Timestamp};
use tidemark_proto::replication::RefusalReason;

use super::resume::Alarm;
use crate::scan::ScanProgress;

/// RPO samples that the percentile is taken of: about a minute of continuous mode.
const RPO_SAMPLES: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Connecting,
    /// Live changes only.
    Live,
    Scanning,
    Paused,
    /// Waits before it tries again; [`SenderStatus::problem`] says why.
    Retrying,
    /// Halted until an operator acts; [`SenderStatus::problem`] says why.
    Halted,
    Stopped,
}

/// What went wrong last, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    pub message: String,
    pub help: String,
    /// Set when the server refused.
    pub refusal: Option<RefusalReason>,
}

#[derive(Clone, Debug)]
pub struct SenderStatus {
    pub phase: Phase,
    /// Cleared when something becomes durable.
    pub problem: Option<Problem>,
    /// The gravest thing that was seen since the sender started.
    pub alarm: Option<Alarm>,
    pub sent: Option<Position>,
    /// The newest durable position of this run.
    pub durable: Option<Position>,
    /// The time that the newest durable cut stands for: now minus this is the RPO of an idle or busy disk.
    pub durable_time: Option<Timestamp>,
    /// A scan began and its end is not durable: the replica is not consistent.
    pub scan_open: bool,
    pub scan: Option<ScanProgress>,
    /// Encoded bytes, and what they unfold to.
    pub chunk_bytes_sent: u64,
    pub raw_bytes_sent: u64,
    /// Of hashes, which count as well.
    pub question_bytes_sent: u64,
    /// What was asked about and answered since the sender started, holes included.
    pub compared_bytes: u64,
    /// Of it, blocks of which something differed.
    pub differing_bytes: u64,
    pub cuts_sent: u64,
    pub cuts_durable: u64,
    pub streams_opened: u64,
    /// The most that was held of data being packed or queued.
    pub held_bytes_peak: u64,
    pub compression: Compression,
    rpo: VecDeque<Duration>,
}

impl SenderStatus {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Connecting,
            problem: None,
            alarm: None,
            sent: None,
            durable: None,
            durable_time: None,
            scan_open: false,
            scan: None,
            chunk_bytes_sent: 0,
            raw_bytes_sent: 0,
            question_bytes_sent: 0,
            compared_bytes: 0,
            differing_bytes: 0,
            cuts_sent: 0,
            cuts_durable: 0,
            streams_opened: 0,
            held_bytes_peak: 0,
            compression: Compression::Off,
            rpo: VecDeque::new(),
        }
    }

    /// The consumer holds everything up to `position` durably and consistently.
    pub fn holds(&self, position: &Position) -> bool {
        !self.scan_open
            && self
                .durable
                .is_some_and(|durable| durable.epoch == position.epoch && durable.sequence >= position.sequence)
    }

    /// The scan that runs sends hashes instead of data.
    pub fn compares(&self) -> bool {
        self.scan.is_some_and(|scan| scan.compares)
    }

    /// From the guest's acknowledgement of the oldest write of a cut to the durable acknowledgement of the cut: the
    /// given share (0.0 … 1.0) of recent cuts took at most this.
    pub fn rpo(&self, share: f64) -> Option<Duration> {
        let mut samples: Vec<Duration> = self.rpo.iter().copied().collect();
        samples.sort_unstable();
        let index = (samples.len().checked_sub(1)? as f64 * share.clamp(0.0, 1.0)).round() as usize;
        Some(samples[index])
    }

    pub(super) fn sample_rpo(&mut self, rpo: Duration) {
        if self.rpo.len() == RPO_SAMPLES {
            self.rpo.pop_front();
        }
        self.rpo.push_back(rpo);
    }
}
