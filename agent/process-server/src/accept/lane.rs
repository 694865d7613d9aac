//! One stream's frames, verified and appended in their order on blocking threads.
//!
//! A lane holds a thread only while it has work: a hundred idle streams cost none.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tidemark_proto::replication::{CutEnd, CutOrdinal, Hashes, Refusal, RefusalReason};
use tokio::sync::{Notify, Semaphore};

use super::progress::Progress;
use super::{Comparison, Writer, refusal};

pub enum Work {
    Data { cut: CutOrdinal, chunks: Bytes },
    CutEnd(Box<CutEnd>),
    Compare(Hashes),
}

/// What frames ask for, on the lane's thread: the end of a cut, first whether it may be committed, then a sync; a question,
/// to be answered.
pub trait CutGate: Send + Sync {
    fn may_commit(&self) -> Result<(), Refusal>;
    fn ended(&self);
    fn compare(&self, comparison: Comparison);
}

pub struct Lane(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    idle: Notify,
    progress: Arc<Progress>,
    gate: Box<dyn CutGate>,
    workers: Arc<Semaphore>,
}

struct State {
    /// Bounded by the stream's credit, [`super::stream::CUTS_PENDING_MAX`] and the questions that may be under way.
    queue: VecDeque<Work>,
    /// With the thread while it runs; gone once the lane is closed or failed.
    writer: Option<Box<dyn Writer>>,
    running: bool,
    closed: bool,
}

impl Lane {
    pub fn new(
        writer: Box<dyn Writer>,
        progress: Arc<Progress>,
        gate: Box<dyn CutGate>,
        workers: Arc<Semaphore>,
    ) -> Self {
        let state = State { queue: VecDeque::new(), writer: Some(writer), running: false, closed: false };
        Self(Arc::new(Shared { state: Mutex::new(state), idle: Notify::new(), progress, gate, workers }))
    }

    pub fn push(&self, work: Work) {
        let mut state = self.0.state();
        if state.closed {
            return;
        }
        state.queue.push_back(work);
        self.0.schedule(&mut state);
    }

    pub fn is_idle(&self) -> bool {
        let state = self.0.state();
        !state.running && state.queue.is_empty()
    }

    /// Drops what is queued, waits for what is being appended, and discards an incomplete cut. Cancel safe: the lane
    /// closes all the same.
    pub async fn close(&self) {
        self.begin_close();
        loop {
            let idle = self.0.idle.notified();
            if !self.0.state().running {
                return;
            }
            idle.await;
        }
    }

    fn begin_close(&self) {
        let mut state = self.0.state();
        if !std::mem::replace(&mut state.closed, true) {
            state.queue.clear();
            // Discarding touches the disk, so the writer is dropped there.
            self.0.schedule(&mut state);
        }
    }
}

/// A panic while appending must not leave a stream, and the one that takes its disk over, waiting for ever.
struct Failure<'a>(&'a Shared);

impl Drop for Failure<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.progress.refuse(refusal(
                RefusalReason::StoreFailed,
                "the process server failed while it appended",
                "report this, with the process server's log",
            ));
            self.0.state().running = false;
            self.0.idle.notify_waiters();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.begin_close();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn schedule(self: &Arc<Self>, state: &mut State) {
        if std::mem::replace(&mut state.running, true) {
            return;
        }
        let shared = self.clone();
        match self.workers.clone().try_acquire_owned() {
            Ok(worker) => {
                tokio::task::spawn_blocking(move || {
                    shared.work();
                    drop(worker);
                });
            }
            Err(_) => {
                tokio::spawn(async move {
                    let worker = shared.workers.clone().acquire_owned().await.expect("the semaphore is never closed");
                    tokio::task::spawn_blocking(move || {
                        shared.work();
                        drop(worker);
                    });
                });
            }
        }
    }

    fn work(&self) {
        let _failure = Failure(self);
        let mut state = self.state();
        let mut writer = state.writer.take();
        loop {
            if state.closed || writer.is_none() {
                state.queue.clear();
                drop(state);
                drop(writer.take());
                state = self.state();
            }
            let Some(work) = state.queue.pop_front() else { break };
            drop(state);
            if let Some(running) = &mut writer
                && let Err(refusal) = self.apply(&mut **running, work)
            {
                self.progress.refuse(refusal);
                // Nothing after a failure is written: the cut that it was in is discarded.
                drop(writer.take());
            }
            state = self.state();
        }
        state.writer = writer;
        state.running = false;
        self.idle.notify_waiters();
        drop(state);
        self.progress.notify.notify_one();
    }

    fn apply(&self, writer: &mut dyn Writer, work: Work) -> Result<(), Refusal> {
        match work {
            Work::Data { cut, chunks } => {
                let bytes = chunks.len() as u64;
                writer.append(cut, &chunks)?;
                drop(chunks);
                self.progress.appended(bytes);
            }
            Work::CutEnd(end) => {
                self.gate.may_commit()?;
                let cut = end.cut;
                writer.end_cut(*end)?;
                self.progress.ended(cut);
                self.gate.ended();
            }
            Work::Compare(hashes) => self.gate.compare(writer.compare(hashes)?),
        }
        Ok(())
    }
}
