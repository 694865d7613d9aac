//! The memory that all streams together may fill with data that is not in a journal yet.
//!
//! A host asks (`Want`), the pool assigns, the stream sends it as `Grant`. What a stream was assigned comes back when the
//! data lies in the journal file, or when the stream ends; only then may the pool assign it again, so the bytes that
//! wait in memory never exceed the pool and the standing credits. Data that is appended and not yet durable is the
//! system's page cache and does not count here, so that a cut may be larger than the pool.
//!
//! Who waits is served in turn, a quantum at a time: one busy disk does not starve the others. An idle host may keep what
//! it was granted, and nothing takes that back; so a stream's limit shrinks with the number of streams, and a stream
//! whose turn has come holds at least one frame, even when that overdraws the pool: no stream can be stopped by others.
//! At most the pool, and for each stream a frame and the standing credit, is in memory.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tidemark_base::FRAME_BYTES_MAX;
use tidemark_transport::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};
use tokio::sync::Notify;

/// What all streams together are granted, unless configured otherwise.
pub const POOL_BYTES: u64 = 256 << 20;
/// What an idle stream may send without asking.
pub const STANDING_BYTES: u64 = 64 << 10;
/// What one stream holds at most, the standing credit included: its HTTP/2 window.
const STREAM_BYTES_MAX: u64 = STREAM_WINDOW_BYTES as u64 - STANDING_BYTES;
/// What the streams of one connection hold at most: its HTTP/2 window, less standing credits of 32 streams.
const CONNECTION_BYTES_MAX: u64 = CONNECTION_WINDOW_BYTES as u64 - 32 * STANDING_BYTES;
/// What is assigned in one turn.
const QUANTUM_BYTES: u64 = 4 << 20;
/// What a stream whose turn has come may hold in any case.
const STREAM_BYTES_MIN: u64 = FRAME_BYTES_MAX as u64;
/// Less than this is not worth a frame, unless less is wanted.
const GRANT_BYTES_MIN: u64 = 256 << 10;

pub struct CreditPool {
    state: Mutex<State>,
}

struct State {
    bytes: u64,
    /// Below zero while streams hold their minimum on overdraft.
    available: i64,
    members: HashMap<u64, Member>,
    connections: HashMap<SocketAddr, u64>,
    waiting: VecDeque<u64>,
    next_member: u64,
}

struct Member {
    connection: SocketAddr,
    wanted: u64,
    /// Assigned and not given back.
    held: u64,
    /// Assigned and not taken by the stream yet; a part of `held`.
    assigned: u64,
    waits: bool,
    notify: Arc<Notify>,
}

/// One stream's part of the pool; gives everything back when it is dropped.
pub struct Share {
    pool: Arc<CreditPool>,
    member: u64,
}

impl CreditPool {
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                bytes,
                available: bytes as i64,
                members: HashMap::new(),
                connections: HashMap::new(),
                waiting: VecDeque::new(),
                next_member: 0,
            }),
        })
    }

    /// `notify` is woken when something was assigned.
    pub fn join(self: &Arc<Self>, connection: SocketAddr, notify: Arc<Notify>) -> Share {
        let mut state = self.state();
        let member = state.next_member;
        state.next_member += 1;
        state.members.insert(member, Member { connection, wanted: 0, held: 0, assigned: 0, waits: false, notify });
        *state.connections.entry(connection).or_default() += 0;
        Share { pool: self.clone(), member }
    }

    #[cfg(test)]
    pub fn available_bytes(&self) -> i64 {
        self.state().available
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}

impl Share {
    /// So much the host waits for, all that it asked for before included.
    pub fn want(&self, bytes: u64) {
        let mut state = self.pool.state();
        state.member(self.member).wanted = bytes;
        state.enqueue(self.member);
        state.distribute();
    }

    /// What was assigned since the last call: to be sent as `Grant`.
    pub fn take_assigned(&self) -> u64 {
        std::mem::take(&mut self.pool.state().member(self.member).assigned)
    }

    /// Of what was taken, so much is still to come or waits in memory; the rest goes back.
    pub fn keep(&self, bytes: u64) {
        let mut state = self.pool.state();
        let member = state.member(self.member);
        let freed = member.held.saturating_sub(bytes.saturating_add(member.assigned));
        if freed == 0 {
            return;
        }
        member.held -= freed;
        let (connection, wants) = (member.connection, member.wanted > 0);
        state.free(connection, freed);
        if wants {
            state.enqueue(self.member);
        }
        state.distribute();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        let Some(member) = state.members.remove(&self.member) else { return };
        state.waiting.retain(|waiting| *waiting != self.member);
        state.free(member.connection, member.held);
        if !state.members.values().any(|other| other.connection == member.connection) {
            state.connections.remove(&member.connection);
        }
        state.distribute();
    }
}

impl State {
    fn member(&mut self, member: u64) -> &mut Member {
        self.members.get_mut(&member).expect("a share is a member until it is dropped")
    }

    fn enqueue(&mut self, member: u64) {
        let waits = &mut self.member(member).waits;
        if !std::mem::replace(waits, true) {
            self.waiting.push_back(member);
        }
    }

    fn free(&mut self, connection: SocketAddr, bytes: u64) {
        self.available += bytes as i64;
        if let Some(held) = self.connections.get_mut(&connection) {
            *held -= bytes;
        }
        // Whoever waits for room on this connection has its turn again.
        if bytes > 0 {
            let others: Vec<u64> = self
                .members
                .iter()
                .filter(|(_, member)| member.connection == connection && member.wanted > 0 && !member.waits)
                .map(|(member, _)| *member)
                .collect();
            others.into_iter().for_each(|member| self.enqueue(member));
        }
    }

    /// Serves who waits, in turn, until there is too little left. A member whose own limits leave it too little leaves
    /// the queue; it comes back when it, or its connection, gives something back.
    fn distribute(&mut self) {
        let share = (self.bytes / self.members.len().max(1) as u64).clamp(STREAM_BYTES_MIN, STREAM_BYTES_MAX);
        // Each is looked at once, so that those whom only others hold up do not go round for ever.
        let mut turns = self.waiting.len();
        while turns > 0 {
            turns -= 1;
            let Some(index) = self.waiting.pop_front() else { return };
            let member = &self.members[&index];
            let connection = member.connection;
            let connection_held = self.connections.get(&connection).copied().unwrap_or(0);
            let enough = member.wanted.min(GRANT_BYTES_MIN);
            let own_room = share
                .saturating_sub(member.held)
                .min(CONNECTION_BYTES_MAX.saturating_sub(connection_held))
                .min(member.wanted);
            let minimum = STREAM_BYTES_MIN.saturating_sub(member.held).min(member.wanted);
            let from_pool = own_room.min(QUANTUM_BYTES).min(self.available.max(0) as u64);
            let bytes = if from_pool >= enough { from_pool.max(minimum) } else { minimum };
            let waits_for_pool = bytes == 0 && own_room >= enough && own_room > 0;
            let member = self.member(index);
            member.waits = waits_for_pool;
            if bytes == 0 {
                if waits_for_pool {
                    self.waiting.push_back(index);
                }
                continue;
            }
            member.wanted -= bytes;
            member.held += bytes;
            member.assigned += bytes;
            member.notify.notify_one();
            let wants_more = member.wanted > 0;
            self.available -= bytes as i64;
            *self.connections.entry(connection).or_default() += bytes;
            if wants_more {
                self.enqueue(index);
                turns += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_kept_or_dropped_comes_back() {
        let pool = CreditPool::new(10 * MIB);
        let share = pool.join(address(1), Arc::default());
        share.want(3 * MIB);
        assert_eq!((share.take_assigned(), share.take_assigned()), (3 * MIB, 0));
        assert_eq!(pool.available_bytes(), 7 << 20);
        share.keep(MIB);
        assert_eq!(pool.available_bytes(), 9 << 20);
        // A new want replaces what is left of the one before.
        share.want(1);
        share.want(2 * MIB);
        assert_eq!(share.take_assigned(), 2 * MIB + 1);
        drop(share);
        assert_eq!(pool.available_bytes(), 10 << 20);
    }

    #[test]
    fn a_stream_and_a_connection_stay_within_their_windows() {
        let pool = CreditPool::new(1 << 30);
        let shares: Vec<Share> = (0..4).map(|_| pool.join(address(1), Arc::default())).collect();
        let other = pool.join(address(2), Arc::default());
        shares.iter().for_each(|share| share.want(1 << 40));
        other.want(1 << 40);
        let granted: Vec<u64> = shares.iter().map(Share::take_assigned).collect();
        assert!(granted.iter().all(|&bytes| bytes <= STREAM_BYTES_MAX), "{granted:?}");
        let total: u64 = granted.iter().sum();
        assert!(total <= CONNECTION_BYTES_MAX + 2 * STREAM_BYTES_MIN, "{granted:?}");
        assert!(total > CONNECTION_BYTES_MAX - GRANT_BYTES_MIN, "{granted:?}");
        assert_eq!(other.take_assigned(), STREAM_BYTES_MAX);
        // What one gives back goes to the others of its connection.
        let (first, others) = shares.split_first().expect("there are four");
        first.keep(0);
        first.want(0);
        assert!(others.iter().map(Share::take_assigned).sum::<u64>() > 0);
    }

    #[test]
    fn hosts_that_keep_their_credit_stop_nobody() {
        let pool = CreditPool::new(8 * MIB);
        let idle: Vec<Share> = (0..30).map(|port| pool.join(address(port % 3), Arc::default())).collect();
        for share in &idle {
            share.want(STREAM_BYTES_MAX);
            assert!(share.take_assigned() >= STREAM_BYTES_MIN);
        }
        let busy = pool.join(address(0), Arc::default());
        for _ in 0..10 {
            busy.want(STREAM_BYTES_MIN);
            assert_eq!(busy.take_assigned(), STREAM_BYTES_MIN);
            busy.keep(0);
        }
        let held: u64 = pool.state().members.values().map(|member| member.held).sum();
        assert!(held <= 8 * MIB + 30 * STREAM_BYTES_MIN, "{held}");
    }

    #[test]
    fn nobody_starves_and_nothing_is_given_twice() {
        let pool = CreditPool::new(4 * MIB);
        let shares: Vec<Share> = (0..20).map(|port| pool.join(address(port), Arc::default())).collect();
        let mut served = vec![0; shares.len()];
        shares.iter().for_each(|share| share.want(STREAM_BYTES_MAX));
        for _ in 0..200 {
            let mut held = 0;
            for (share, served) in shares.iter().zip(&mut served) {
                let bytes = share.take_assigned();
                *served += bytes;
                held += bytes;
            }
            assert!(held <= 4 * MIB + 20 * STREAM_BYTES_MIN);
            shares.iter().for_each(|share| {
                share.keep(0);
                share.want(STREAM_BYTES_MAX);
            });
        }
        assert!(served.iter().all(|&bytes| bytes > 10 * MIB), "{served:?}");
        drop(shares);
        assert_eq!(pool.available_bytes(), 4 << 20);
        assert!(pool.state().connections.is_empty() && pool.state().waiting.is_empty());
    }
}
