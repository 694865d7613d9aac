//! What happened on this host that people want to hear of, once each, in order.
//!
//! An event is not a state: what is wrong *now* are the problems of the status. Events say what was noticed and decided
//! (a disk was edited while it was away, and is compared for it), and outlive it in a ring of [`EVENTS_MAX`].
//!
//! *Consistency.* Numbers grow by one and never repeat within a run of the agent; whoever reads too slowly is told how many
//! events went by. *Retries*, *Crash.* The ring is memory: a restarted agent begins a new run. What must
//! survive is state, and the attach says it again. *Cancellation.* Waiting has a limit.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::sync::{Condvar, Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{Clock, DiskId, MachineId, Timestamp};

/// Older events are forgotten.
pub const EVENTS_MAX: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Information,
    /// Something is worse than it should be and mends by itself, or did.
    Warning,
    /// Somebody must act.
    Critical,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What happened, for programs.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum EventKind {
            $($(#[$doc])* $name,)*
        }

        impl EventKind {
            pub const ALL: &[EventKind] = &[$(EventKind::$name,)*];

            /// The same word as in JSON.
            pub fn name(self) -> &'static str {
                match self {
                    $(EventKind::$name => $text,)*
                }
            }
        }
    };
}

kinds! {
    /// A machine is protected from now on.
    MachineProtected = "machine_protected",
    MachineUnprotected = "machine_unprotected",
    MachinePaused = "machine_paused",
    MachineResumed = "machine_resumed",
    ResyncRequested = "resync_requested",
    ResyncCancelled = "resync_cancelled",
    /// A disk of a machine cannot be opened; it is tried again.
    AttachFailed = "attach_failed",
    /// Nobody knows this disk: it is replicated from the beginning.
    DiskAttachedFirst = "disk_attached_first",
    /// The disk goes on where it was left.
    DiskContinued = "disk_continued",
    /// The agent was killed; what was in flight was logged again.
    AgentWasKilled = "agent_was_killed",
    /// The power was cut, or the page cache was lost some other way.
    PowerWasLost = "power_was_lost",
    /// Another program wrote to the disk while it was not attached.
    DiskWrittenMeanwhile = "disk_written_meanwhile",
    /// A block device cannot prove that nobody wrote to it.
    DiskUnwitnessed = "disk_unwitnessed",
    DiskReplaced = "disk_replaced",
    DiskResized = "disk_resized",
    /// The clock went back, so that the disk's times prove nothing.
    ClockSteppedBack = "clock_stepped_back",
    /// Records of the log cannot be read back.
    LogDamaged = "log_damaged",
    /// Another file of the state beside the disk cannot be read back.
    StateDamaged = "state_damaged",
    /// The files beside the disk are older than what the process server acknowledged, or of another disk's life.
    HistoryDiverged = "history_diverged",
    /// The process server holds nothing of what it acknowledged.
    ReplicaLost = "replica_lost",
    /// Marks that a power loss took.
    MarksLost = "marks_lost",
    /// From data to bitmap.
    SteppedDown = "stepped_down",
    /// From bitmap back to data.
    SteppedUp = "stepped_up",
    /// One process server lags so far that the log no longer waits for it.
    ConsumerSteppedDown = "consumer_stepped_down",
    IntentBitmapLost = "intent_bitmap_lost",
    SyncFailed = "sync_failed",
    WriteFailed = "write_failed",
    /// The program that has a disk image open ended; another one goes on.
    ImageReopened = "image_reopened",
    MarksFailed = "marks_failed",
    /// A barrier of a group was not released in time: writes were let go on, and the marks are of each machine alone.
    BarrierMissed = "barrier_missed",
    ThawFailed = "thaw_failed",
    CompareStarted = "compare_started",
    CompareEnded = "compare_ended",
    SendingHalted = "sending_halted",
    /// Somebody may write to a disk whose machine runs elsewhere, or does.
    SourceOpen = "source_open",
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Event {
    /// Counts from 1 in each run of the agent.
    pub number: u64,
    pub time: Timestamp,
    pub severity: Severity,
    pub kind: EventKind,
    pub machine: Option<MachineId>,
    pub disk: Option<DiskId>,
    pub message: String,
    /// What to do; may be empty.
    pub help: String,
}

/// What is published: the ring adds number and time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct News {
    pub severity: Severity,
    pub kind: EventKind,
    pub machine: Option<MachineId>,
    pub disk: Option<DiskId>,
    pub message: String,
    pub help: String,
}

/// The events of one host.
pub struct Events {
    clock: Arc<dyn Clock>,
    ring: Mutex<Ring>,
    published: Condvar,
}

/// Called after each event, on the thread that published it; must not block.
pub type Waker = dyn Fn() + Send + Sync;

#[derive(Default)]
struct Ring {
    newest: u64,
    /// Oldest first, without a gap; the last has the number `newest`.
    events: VecDeque<Event>,
    wakers: Vec<Weak<Waker>>,
}

impl Events {
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { clock, ring: Mutex::default(), published: Condvar::new() })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().expect("no panic while held")
    }

    pub fn publish(&self, news: News) {
        let News { severity, kind, machine, disk, message, help } = news;
        let time = self.clock.wall_now();
        let wakers: Vec<Arc<Waker>> = {
            let mut ring = self.ring();
            ring.newest += 1;
            let number = ring.newest;
            if ring.events.len() == EVENTS_MAX {
                ring.events.pop_front();
            }
            ring.events.push_back(Event { number, time, severity, kind, machine, disk, message, help });
            ring.wakers.retain(|waker| waker.strong_count() > 0);
            ring.wakers.iter().filter_map(Weak::upgrade).collect()
        };
        self.published.notify_all();
        wakers.iter().for_each(|waker| waker());
    }

    /// The number of the newest event; 0 before the first.
    pub fn newest(&self) -> u64 {
        self.ring().newest
    }

    /// Those after `number` that are remembered, oldest first. When more than those were published, the first one's number
    /// says so.
    pub fn after(&self, number: u64) -> Vec<Event> {
        let ring = self.ring();
        let oldest = ring.newest + 1 - ring.events.len() as u64;
        let skip = (number + 1).saturating_sub(oldest) as usize;
        ring.events.iter().skip(skip).cloned().collect()
    }

    /// Has `waker` called after each event, as long as it lives: the bridge to whoever must not wait here.
    pub fn wake(&self, waker: &Arc<Waker>) {
        self.ring().wakers.push(Arc::downgrade(waker));
    }

    /// Reads on from `number`: 0 for everything that is remembered, [`Events::newest`] for what comes.
    pub fn subscribe(self: &Arc<Self>, number: u64) -> Subscriber {
        Subscriber { events: self.clone(), read: number, missed: 0 }
    }
}

/// Reads events in order.
pub struct Subscriber {
    events: Arc<Events>,
    read: u64,
    missed: u64,
}

impl Subscriber {
    /// What was published since the last call and is remembered.
    pub fn take(&mut self) -> Vec<Event> {
        let found = self.events.after(self.read);
        if let (Some(first), Some(last)) = (found.first(), found.last()) {
            self.missed += first.number - self.read - 1;
            self.read = last.number;
        }
        found
    }

    /// The same, once there is something, or nothing after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Vec<Event> {
        let deadline = Instant::now() + limit;
        let mut ring = self.events.ring();
        while ring.newest <= self.read {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Vec::new();
            }
            ring = self.events.published.wait_timeout(ring, left).expect("no panic while held").0;
        }
        drop(ring);
        self.take()
    }

    /// Events that were forgotten before they were read.
    pub fn missed(&self) -> u64 {
        self.missed
    }
}

/// Publishes for one disk.
#[derive(Clone)]
pub struct DiskEvents {
    pub events: Arc<Events>,
    pub machine: MachineId,
    pub disk: DiskId,
}

impl DiskEvents {
    pub fn publish(&self, severity: Severity, kind: EventKind, message: impl Into<String>, help: impl Into<String>) {
        let (message, help) = (message.into(), help.into());
        let (machine, disk) = (Some(self.machine), Some(self.disk));
        self.events.publish(News { severity, kind, machine, disk, message, help });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tidemark_base::SystemClock;

    fn news(message: String) -> News {
        News {
            severity: Severity::Warning,
            kind: EventKind::SteppedDown,
            machine: None,
            disk: Some(DiskId::random()),
            message,
            help: String::new(),
        }
    }

    #[test]
    fn events_are_read_in_order_and_what_is_missed_is_counted() {
        let events = Events::new(Arc::new(SystemClock::new()));
        let mut early = events.subscribe(0);
        assert!(early.take().is_empty() && early.wait(Duration::ZERO).is_empty());
        events.publish(news("first".into()));
        assert_eq!(early.take().iter().map(|event| event.number).collect::<Vec<_>>(), [1]);
        for number in 0..EVENTS_MAX + 10 {
            events.publish(news(number.to_string()));
        }
        let all = early.take();
        assert_eq!((all.len(), all[0].number, early.missed()), (EVENTS_MAX, 12, 10));
        assert!(all.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
        assert!(events.subscribe(events.newest()).take().is_empty());
        assert_eq!(events.after(events.newest() - 1).len(), 1);
        assert!(events.after(u64::MAX - 1).is_empty());
    }

    #[test]
    fn a_subscriber_is_woken() {
        let events = Events::new(Arc::new(SystemClock::new()));
        let count = Arc::new(AtomicU64::new(0));
        let waker: Arc<Waker> = Arc::new({
            let count = count.clone();
            move || {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        events.wake(&waker);
        let mut subscriber = events.subscribe(0);
        let waiter = std::thread::spawn(move || subscriber.wait(Duration::from_secs(60)));
        events.publish(news("now".into()));
        assert_eq!(waiter.join().unwrap()[0].message, "now");
        drop(waker);
        events.publish(news("again".into()));
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_kind_has_one_word() {
        for kind in EventKind::ALL {
            assert_eq!(serde_json::to_string(kind).unwrap(), format!("\"{kind}\""));
        }
    }
}
