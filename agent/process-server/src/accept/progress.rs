//! What lane and committers tell a stream.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use tidemark_proto::replication::{CutOrdinal, Differing, Durable, Refusal};
use tokio::sync::Notify;

#[derive(Default)]
pub struct Progress {
    state: Mutex<State>,
    pub notify: Arc<Notify>,
}

#[derive(Default)]
struct State {
    appended_bytes: u64,
    /// Cuts whose commit record is appended, with the stream's chunk bytes up to their end. Bounded by
    /// [`super::stream::CUTS_PENDING_MAX`].
    ended: VecDeque<(CutOrdinal, u64)>,
    durable: Option<Durable>,
    acknowledged: (u64, u64),
    /// Bounded by the questions that a stream may have under way.
    answers: VecDeque<Differing>,
    refusal: Option<Refusal>,
}

/// A `Durable` to send, and what it acknowledges of this stream.
pub struct Acknowledgement {
    pub durable: Durable,
    pub bytes: u64,
}

impl Progress {
    pub fn appended(&self, bytes: u64) {
        self.state().appended_bytes += bytes;
        self.notify.notify_one();
    }

    pub fn appended_bytes(&self) -> u64 {
        self.state().appended_bytes
    }

    pub fn ended(&self, cut: CutOrdinal) {
        let mut state = self.state();
        let bytes = state.appended_bytes;
        state.ended.push_back((cut, bytes));
    }

    /// A sync covered everything up to this cut.
    pub fn durable(&self, durable: Durable) {
        self.state().durable = Some(durable);
        self.notify.notify_one();
    }

    pub fn answer(&self, answer: Differing) {
        self.state().answers.push_back(answer);
        self.notify.notify_one();
    }

    pub fn take_answer(&self) -> Option<Differing> {
        self.state().answers.pop_front()
    }

    /// The first refusal is the one that is sent.
    pub fn refuse(&self, refusal: Refusal) {
        self.state().refusal.get_or_insert(refusal);
        self.notify.notify_one();
    }

    pub fn take_refusal(&self) -> Option<Refusal> {
        self.state().refusal.take()
    }

    /// What became durable since the last call, if any cut of this stream did.
    pub fn acknowledge(&self) -> Option<Acknowledgement> {
        let mut state = self.state();
        let durable = state.durable?;
        let mut cuts = 0;
        let mut bytes = state.acknowledged.1;
        while let Some((_, end)) = state.ended.pop_front_if(|(cut, _)| *cut <= durable.cut) {
            cuts += 1;
            bytes = end;
        }
        if cuts == 0 {
            return None;
        }
        let acknowledged = bytes - state.acknowledged.1;
        state.acknowledged = (state.acknowledged.0 + cuts, bytes);
        Some(Acknowledgement { durable, bytes: acknowledged })
    }

    /// Cuts and bytes acknowledged since the stream began.
    pub fn acknowledged(&self) -> (u64, u64) {
        self.state().acknowledged
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}
