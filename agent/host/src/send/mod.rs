//! The sender: the one emitter of a (disk, consumer). It alone decides in what order cuts and scan chunks leave.
//!
//! ```text
//! source ──→ emitter (one thread) ──→ link (gRPC, or a simulation) ──→ process server
//!               ↑  inbox: frames of the server, finished jobs, new records, stop
//! ```
//!
//! In continuous mode a cut is what was logged while the one before it was sent; in interval mode it is one cycle, which
//! ends at a mark. Every mark ends a cut. While a scan is pending, live cuts go out between its cuts, live first.
//!
//! *Consistency.* A cut is complete with its `CutEnd` only; the server discards what was not ended. Cuts of one stream
//! follow each other without gaps: each begins where the one before ended, hash included. Extents of one cut never
//! overlap. Marks inside a scan are never points; only the barrier mark that ends it is.
//!
//! *Retries.* A stream that ends is opened again after 0.1 s, then ever later up to 10 s; each opening decides anew where
//! to begin ([`resume`]). Refusals that only an operator can lift (fenced, not authorised, superseded, another size) halt
//! the sender until [`Sender::resume`].
//!
//! *Cancellation.* [`Sender::stop`] closes the stream with its totals between two cuts, or resets it inside one; it
//! returns when the thread ended. Nothing is lost either way: what was not acknowledged is sent again.
//!
//! *Crash.* Nothing here is durable. The cursor and what must be scanned are the source's; they move on durable
//! acknowledgements only, so a crash repeats work and skips none.

mod backoff;
mod emitter;
pub mod grpc;
mod inbox;
pub mod link;
pub mod resume;
mod session;
mod status;
#[cfg(test)]
pub(crate) mod tests;
mod throttle;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::sync::{Condvar, Mutex};
use tidemark_base::thread::JoinHandle;
use tidemark_base::time::Instant;
use tidemark_base::{Clock, Position, ServerId};
use tidemark_proto::replication::SessionId;

use crate::pack::{CompressionPolicy, MAP_ENTRIES_MAX, Workers};
use crate::source::Source;
use emitter::Emitter;
use inbox::Inbox;
use link::Link;
pub use status::{Phase, Problem, SenderStatus};

/// When cuts are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ShipMode {
    /// As changes come.
    #[default]
    Continuous,
    /// Whole cycles: up to the newest mark.
    Interval,
}

/// What an operator may change while the sender runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SendPolicy {
    pub mode: ShipMode,
    pub compression: CompressionPolicy,
    /// `None`: no limit.
    pub bytes_per_second_max: Option<u64>,
}

/// Every limit of a sender, by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SendLimits {
    /// Live data being packed or queued for the link.
    pub live_bytes_max: u64,
    /// The same for a scan. Apart, so that a scan cannot hold up live data.
    pub scan_bytes_max: u64,
    /// Extents of one pass over a cut.
    pub map_entries_max: usize,
    /// Between two cuts in continuous mode.
    pub cut_gap: Duration,
    /// The data, and the time, that one cut in continuous mode spans.
    pub cut_bytes_max: u64,
    pub cut_span_max: Duration,
    /// Blocks in one cut of a scan, and how long it may stay open.
    pub scan_cut_bytes_max: u64,
    pub scan_cut_age_max: Duration,
    /// Cuts that were sent and are not acknowledged.
    pub cuts_under_way_max: usize,
    pub heartbeat: Duration,
    /// What is asked for at once when credit runs out.
    pub want_bytes: u64,
    /// From Hello to Welcome, from the end of a cut to its acknowledgement, and from Close to Close.
    pub welcome_timeout: Duration,
    pub acknowledge_timeout: Duration,
    pub close_timeout: Duration,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

impl Default for SendLimits {
    fn default() -> Self {
        Self {
            live_bytes_max: 8 << 20,
            scan_bytes_max: 8 << 20,
            map_entries_max: MAP_ENTRIES_MAX,
            cut_gap: Duration::from_millis(50),
            cut_bytes_max: 16 << 20,
            cut_span_max: Duration::from_secs(1),
            scan_cut_bytes_max: 4 << 20,
            scan_cut_age_max: Duration::from_millis(50),
            cuts_under_way_max: 64,
            heartbeat: Duration::from_secs(1),
            want_bytes: 8 << 20,
            welcome_timeout: Duration::from_secs(30),
            acknowledge_timeout: Duration::from_secs(120),
            close_timeout: Duration::from_secs(5),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
        }
    }
}

/// Records of one cut in continuous mode: bounds its map when records are small.
const CUT_RECORDS_MAX: u64 = 64 << 10;

/// What one cut of a cycle spans at most: the receiver keeps an index of an open cut, which may not grow without limit.
/// A longer cycle leaves as several cuts, of which the last ends at the mark.
const CYCLE_RECORDS_MAX: u64 = 1 << 20;
const CYCLE_BYTES_MAX: u64 = 4 << 30;

#[derive(Clone)]
pub struct SenderConfig {
    pub consumer: ServerId,
    /// One per run of the agent, the same for all its disks.
    pub session: SessionId,
    pub link: Arc<dyn Link>,
    /// Shared by all disks.
    pub workers: Arc<Workers>,
    pub clock: Arc<dyn Clock>,
    pub policy: SendPolicy,
    pub limits: SendLimits,
    /// The disk was brought here from another place, whose history the consumer holds.
    pub moved: bool,
}

/// A running sender. Dropping it stops it.
pub struct Sender {
    shared: Arc<Shared>,
    link: Arc<dyn Link>,
    thread: Option<JoinHandle<()>>,
}

/// What the emitter and its handle share.
struct Shared {
    inbox: Arc<Inbox>,
    control: Mutex<Control>,
    status: Mutex<SenderStatus>,
    status_changed: Condvar,
}

#[derive(Clone, Copy)]
struct Control {
    stop: bool,
    paused: bool,
    /// Counts calls of [`Sender::resume`].
    resumed: u64,
    /// Counts calls of [`Sender::restart_stream`].
    restarted: u64,
    policy: SendPolicy,
}

impl Shared {
    fn control(&self) -> Control {
        *self.control.lock().expect("no panic while held")
    }

    fn set_control(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.control.lock().expect("no panic while held"));
        self.inbox.wake();
    }

    fn set_status(&self, change: impl FnOnce(&mut SenderStatus)) {
        change(&mut self.status.lock().expect("no panic while held"));
        self.status_changed.notify_all();
    }
}

impl Sender {
    pub fn start(source: Arc<dyn Source>, config: SenderConfig) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            inbox: Arc::default(),
            control: Mutex::new(Control {
                stop: false,
                paused: false,
                resumed: 0,
                restarted: 0,
                policy: config.policy,
            }),
            status: Mutex::new(SenderStatus::new()),
            status_changed: Condvar::new(),
        });
        let link = config.link.clone();
        let emitter = Emitter::new(source, config, shared.clone());
        let thread = tidemark_base::thread::Builder::new().name("send".to_owned()).spawn(move || emitter.run())?;
        Ok(Self { shared, link, thread: Some(thread) })
    }

    /// Ends the stream and the thread.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.set_control(|control| control.stop = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a sender panicked");
        }
    }

    /// Closes the stream until [`Sender::resume`]; changes gather in the log.
    pub fn pause(&self) {
        self.shared.set_control(|control| control.paused = true);
    }

    /// Goes on after a pause, after a refusal that halted it, and without waiting for the next try.
    pub fn resume(&self) {
        self.shared.set_control(|control| {
            control.paused = false;
            control.resumed += 1;
        });
    }

    /// Ends the stream and opens another one, which begins with what is pending then.
    pub fn restart_stream(&self) {
        self.shared.set_control(|control| control.restarted += 1);
    }

    pub fn set_policy(&self, policy: SendPolicy) {
        if self.shared.control().policy != policy {
            self.shared.set_control(|control| control.policy = policy);
        }
    }

    #[cfg(all(test, unix))]
    pub(crate) fn policy(&self) -> SendPolicy {
        self.shared.control().policy
    }

    /// Where the process server is; `None`: not known yet.
    pub fn remote(&self) -> Option<IpAddr> {
        self.link.remote()
    }

    pub fn status(&self) -> SenderStatus {
        self.shared.status.lock().expect("no panic while held").clone()
    }

    /// Waits until the status is as asked; false when `limit` passed first.
    pub fn wait_for(&self, limit: Duration, mut is: impl FnMut(&SenderStatus) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut status = self.shared.status.lock().expect("no panic while held");
        while !is(&status) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            status = self.shared.status_changed.wait_timeout(status, left).expect("no panic while held").0;
        }
        true
    }

    /// Waits until the consumer holds everything up to `position` durably and consistently.
    pub fn wait_durable(&self, position: Position, limit: Duration) -> bool {
        self.wait_for(limit, |status| status.holds(&position))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.end();
    }
}
