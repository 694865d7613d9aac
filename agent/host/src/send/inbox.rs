//! Everything that an emitter waits for, in one place.

use std::collections::VecDeque;
use std::sync::Arc;

use tidemark_base::sync::{Condvar, Mutex};
use tidemark_base::time::Instant;

use tidemark_proto::replication::ServerFrame;

use super::link::{LinkError, LinkEvents};

/// Frames of the server that the emitter did not handle yet. The protocol makes one per cut and per wish for credit, so
/// a server that sends more than this does not follow it.
const EVENTS_MAX: usize = 4096;

#[derive(Debug)]
pub enum Event {
    Frame(ServerFrame),
    Closed(LinkError),
}

#[derive(Default)]
pub struct Inbox {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    /// Counts streams: what an older one still says is not heard.
    stream: u64,
    events: VecDeque<Event>,
    woken: bool,
}

impl Inbox {
    /// Something changed that the emitter looks at by itself.
    pub fn wake(&self) {
        self.state.lock().expect("no panic while held").woken = true;
        self.more.notify_one();
    }

    /// A new stream's way in here. Forgets what the one before it said.
    pub fn stream(self: &Arc<Self>) -> Arc<dyn LinkEvents> {
        let mut state = self.state.lock().expect("no panic while held");
        state.stream += 1;
        state.events.clear();
        Arc::new(StreamEvents { inbox: self.clone(), stream: state.stream })
    }

    /// The next event, at once.
    pub fn take(&self) -> Option<Event> {
        self.state.lock().expect("no panic while held").events.pop_front()
    }

    /// Waits until there is an event, a wake came, or the deadline passed.
    pub fn wait(&self, deadline: Instant) {
        let mut state = self.state.lock().expect("no panic while held");
        while !state.woken && state.events.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.more.wait_timeout(state, left).expect("no panic while held").0;
        }
        state.woken = false;
    }
}

struct StreamEvents {
    inbox: Arc<Inbox>,
    stream: u64,
}

impl StreamEvents {
    fn push(&self, event: Event) -> bool {
        let mut state = self.inbox.state.lock().expect("no panic while held");
        if state.stream != self.stream || state.events.len() >= EVENTS_MAX {
            return false;
        }
        state.events.push_back(event);
        drop(state);
        self.inbox.more.notify_one();
        true
    }
}

impl LinkEvents for StreamEvents {
    fn frame(&self, frame: ServerFrame) -> bool {
        self.push(Event::Frame(frame))
    }

    fn closed(&self, error: LinkError) {
        self.push(Event::Closed(error));
    }
}
