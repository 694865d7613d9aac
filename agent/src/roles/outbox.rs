//! Events on their way to the configuration server: kept here until it has them.
//!
//! *Consistency.* An event has its number, and is durable, before it is sent; numbers go on over restarts. What is not
//! acknowledged is sent again with the next stream, and the receiver takes each number once. *Retries.* With each stream,
//! for ever. *Cancellation.* None. *Crash.* The file is replaced as a whole. One that cannot be read begins a new stream:
//! its events are lost, and no number of the old one is used again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{Clock, DiskId, MachineId, SystemClock, Timestamp};
use tidemark_proto::control::{EVENTS_MAX, Event, EventBatch, Severity};
use tokio::sync::Notify;
use uuid::Uuid;

const FILE: &str = "events.json";
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Events that wait; when more happen the oldest go, and one that says how many takes their place.
pub const WAITING_MAX: usize = 2_000;

/// An event without its number.
#[derive(Clone, Debug)]
pub struct Draft {
    pub time: Timestamp,
    pub severity: Severity,
    pub machine: Option<MachineId>,
    pub disk: Option<DiskId>,
    pub kind: String,
    pub message: String,
    pub help: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    stream: Uuid,
    /// The number that comes next.
    next: u64,
    /// Not acknowledged yet, ascending.
    waiting: VecDeque<Event>,
    /// Gone without having been sent.
    lost: u64,
}

pub struct Outbox {
    storage: Arc<dyn Storage>,
    kept: Mutex<Kept>,
    added: Notify,
}

impl Outbox {
    /// Blocks.
    pub fn open(storage: Arc<dyn Storage>) -> Self {
        let read = || -> Result<Option<Kept>, String> {
            if !storage.exists(FILE).map_err(|error| error.to_string())? {
                return Ok(None);
            }
            let content = read_file(&*storage, FILE, FILE_BYTES_MAX).map_err(|error| error.to_string())?;
            serde_json::from_slice(&content).map(Some).map_err(|error| error.to_string())
        };
        let kept = read().unwrap_or_else(|error| {
            tracing::warn!(
                error,
                "events that waited for the configuration server cannot be read; a new stream begins"
            );
            None
        });
        let new = || Kept { stream: Uuid::new_v4(), next: 1, waiting: VecDeque::new(), lost: 0 };
        Self { storage, kept: Mutex::new(kept.unwrap_or_else(new)), added: Notify::new() }
    }

    /// Numbers events and keeps them; durable when it returns. Blocks. When they cannot be kept they go to the log only.
    pub fn add(&self, drafts: Vec<Draft>) {
        if drafts.is_empty() {
            return;
        }
        let mut kept = self.kept.lock().expect("no panic while held");
        let mut next = kept.clone();
        for draft in drafts {
            push(&mut next, draft);
        }
        if next.waiting.len() > WAITING_MAX {
            // One more, for the event that says so.
            let surplus = next.waiting.len() + 1 - WAITING_MAX;
            next.waiting.drain(..surplus);
            next.lost += surplus as u64;
            let message = format!("{} events were lost while the configuration server was away", next.lost);
            let draft = Draft {
                time: SystemClock::new().wall_now(),
                severity: Severity::Warning,
                machine: None,
                disk: None,
                kind: "events_lost".to_owned(),
                message,
                help: "see this role's log for them".to_owned(),
            };
            next.lost = 0;
            push(&mut next, draft);
        }
        match self.save(&next) {
            Ok(()) => *kept = next,
            Err(error) => tracing::warn!(%error, "events cannot be kept for the configuration server"),
        }
        drop(kept);
        self.added.notify_one();
    }

    /// What is to be sent next, if anything.
    pub fn batch(&self) -> Option<EventBatch> {
        let kept = self.kept.lock().expect("no panic while held");
        let events: Vec<Event> = kept.waiting.iter().take(EVENTS_MAX).cloned().collect();
        (!events.is_empty()).then_some(EventBatch { stream: kept.stream, events })
    }

    /// The configuration server has everything up to `sequence`. Blocks.
    pub fn taken(&self, stream: Uuid, sequence: u64) {
        let mut kept = self.kept.lock().expect("no panic while held");
        if kept.stream != stream || kept.waiting.front().is_none_or(|event| event.sequence > sequence) {
            return;
        }
        let mut next = kept.clone();
        next.waiting.retain(|event| event.sequence > sequence);
        // When this is not kept they are sent again, and not taken twice.
        if let Err(error) = self.save(&next) {
            tracing::warn!(%error, "that events were taken cannot be kept");
        }
        *kept = next;
    }

    /// Returns when something was added since the last call.
    pub async fn added(&self) {
        self.added.notified().await;
    }

    fn save(&self, kept: &Kept) -> std::io::Result<()> {
        let content = serde_json::to_vec(kept).map_err(std::io::Error::other)?;
        replace_file(&*self.storage, FILE, &content)
    }
}

fn push(kept: &mut Kept, draft: Draft) {
    let Draft { time, severity, machine, disk, kind, message, help } = draft;
    let sequence = kept.next;
    kept.next += 1;
    kept.waiting.push_back(Event { sequence, time, severity, machine, disk, kind, message, help });
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    fn draft(message: &str) -> Draft {
        Draft {
            time: Timestamp(1),
            severity: Severity::Info,
            machine: None,
            disk: None,
            kind: "test".into(),
            message: message.into(),
            help: String::new(),
        }
    }

    #[test]
    fn numbers_go_on_over_restarts_and_what_was_not_taken_waits() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Outbox::open(RealStorage::open_folder(folder.path()));
        let outbox = open();
        assert!(outbox.batch().is_none());
        outbox.add(vec![draft("one"), draft("two")]);
        let first = outbox.batch().unwrap();
        let outbox = open();
        assert_eq!(outbox.batch().unwrap(), first, "a restart sends the same again");
        outbox.taken(first.stream, 1);
        outbox.taken(Uuid::new_v4(), 2);
        outbox.add(vec![draft("three")]);
        let rest = open().batch().unwrap();
        let numbers: Vec<(u64, &str)> =
            rest.events.iter().map(|event| (event.sequence, event.message.as_str())).collect();
        assert_eq!((rest.stream, numbers), (first.stream, vec![(2, "two"), (3, "three")]));
        outbox.taken(first.stream, 3);
        let outbox = open();
        assert!(outbox.batch().is_none());
        outbox.add(vec![draft("four")]);
        assert_eq!(outbox.batch().unwrap().events[0].sequence, 4);
    }

    #[test]
    fn too_many_are_bounded_and_that_some_were_lost_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let outbox = Outbox::open(RealStorage::open_folder(folder.path()));
        outbox.add(vec![draft("first")]);
        outbox.add(vec![draft("x"); WAITING_MAX + 10]);
        let kept = outbox.kept.lock().unwrap();
        assert_eq!(kept.waiting.len(), WAITING_MAX);
        let last = kept.waiting.back().unwrap();
        assert!(last.kind == "events_lost" && last.message.starts_with("12 events"), "{last:?}");
        let first = kept.waiting.front().unwrap().sequence;
        assert_eq!((first, last.sequence), (13, WAITING_MAX as u64 + 12), "no number is used for another event");
    }

    #[test]
    fn a_damaged_file_begins_a_new_stream() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let outbox = Outbox::open(storage.clone());
        outbox.add(vec![draft("one")]);
        let before = outbox.batch().unwrap().stream;
        replace_file(&*storage, FILE, b"{\"stream\":").unwrap();
        let outbox = Outbox::open(storage);
        outbox.add(vec![draft("one")]);
        assert_ne!(outbox.batch().unwrap().stream, before, "no number of the old stream is used again");
    }
}
