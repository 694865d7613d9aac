//! Who is connected and what is open.

use std::collections::HashMap;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::pool::Pool;
use crate::limits::Limits;
use crate::stream::Stream;

#[derive(Default)]
pub struct Registry {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stopping: bool,
    numbers: u64,
    connections: HashMap<u64, Connection>,
    exports: HashMap<String, Open>,
}

struct Connection {
    stream: Arc<Stream>,
    ending: Arc<AtomicBool>,
    /// `None` in the handshake.
    export: Option<String>,
    is_remote: bool,
}

struct Open {
    connections: usize,
    pool: Arc<Pool>,
}

/// A connection's entry; gone when this is dropped, which is the last thing that its thread does.
pub struct Entry {
    registry: Arc<Registry>,
    pub number: u64,
    /// Set when the connection is to end after the requests that it has received.
    pub ending: Arc<AtomicBool>,
}

/// One connection's hold on an open export.
pub struct Lease {
    registry: Arc<Registry>,
    connection: u64,
    pub name: String,
    pub pool: Arc<Pool>,
}

impl Registry {
    pub fn is_stopping(&self) -> bool {
        self.state.lock().expect("no panic while held").stopping
    }

    /// `None` when too many are in the handshake already, or nobody is let in any more. Local and remote connections
    /// are counted apart: whoever reaches the TCP port cannot keep this machine's guests out.
    pub fn admit(self: &Arc<Self>, stream: &Arc<Stream>, is_remote: bool, limits: &Limits) -> Option<Entry> {
        let mut state = self.state.lock().expect("no panic while held");
        let shakes = |connection: &&Connection| connection.export.is_none() && connection.is_remote == is_remote;
        let in_handshake = state.connections.values().filter(shakes).count();
        if state.stopping || in_handshake >= limits.connections_in_handshake_max {
            return None;
        }
        state.numbers += 1;
        let number = state.numbers;
        let ending = Arc::new(AtomicBool::new(false));
        let connection = Connection { stream: stream.clone(), ending: ending.clone(), export: None, is_remote };
        state.connections.insert(number, connection);
        Some(Entry { registry: self.clone(), number, ending })
    }

    pub fn lease(self: &Arc<Self>, connection: u64, name: &str, limits: &Limits) -> Option<Lease> {
        let mut state = self.state.lock().expect("no panic while held");
        if state.stopping {
            return None;
        }
        let open = state.exports.entry(name.to_owned()).or_insert_with(|| Open {
            connections: 0,
            pool: Pool::new(name.to_owned(), limits.workers_per_export_max),
        });
        if open.connections >= limits.connections_per_export_max {
            return None;
        }
        open.connections += 1;
        let pool = open.pool.clone();
        if let Some(entry) = state.connections.get_mut(&connection) {
            entry.export = Some(name.to_owned());
        }
        Some(Lease { registry: self.clone(), connection, name: name.to_owned(), pool })
    }

    pub fn stop_admitting(&self) {
        self.state.lock().expect("no panic while held").stopping = true;
    }

    /// How many connections have the export open.
    pub fn connections(&self, name: &str) -> usize {
        self.state.lock().expect("no panic while held").exports.get(name).map_or(0, |open| open.connections)
    }

    /// Ends the connections of one export, or all, and waits for their threads: `polite` long for clients to take
    /// their replies, then as long again for what is being executed. How many are left.
    pub fn end(&self, export: Option<&str>, polite: Duration) -> usize {
        let concerns = |connection: &Connection| export.is_none() || connection.export.as_deref() == export;
        for how in [Shutdown::Read, Shutdown::Both] {
            let deadline = Instant::now() + polite;
            let mut state = self.state.lock().expect("no panic while held");
            for connection in state.connections.values().filter(|connection| concerns(connection)) {
                connection.ending.store(true, Ordering::Release);
                connection.stream.shutdown(how);
            }
            while state.connections.values().any(concerns) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self.changed.wait_timeout(state, left).expect("no panic while held").0;
            }
            if !state.connections.values().any(concerns) {
                return 0;
            }
        }
        let state = self.state.lock().expect("no panic while held");
        state.connections.values().filter(|connection| concerns(connection)).count()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.registry.state.lock().expect("no panic while held");
        state.connections.remove(&self.number);
        drop(state);
        self.registry.changed.notify_all();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.registry.state.lock().expect("no panic while held");
        if let Some(connection) = state.connections.get_mut(&self.connection) {
            connection.export = None;
        }
        let Some(open) = state.exports.get_mut(&self.name) else { return };
        open.connections -= 1;
        if open.connections == 0 {
            state.exports.remove(&self.name);
            drop(state);
            self.pool.close();
        }
        self.registry.changed.notify_all();
    }
}
