//! The way back to the client: replies of the connection's own thread and of worker threads, in any order, each whole.
//!
//! A worker never waits for a client that does not read: what cannot be sent at once goes to the connection's writer
//! thread, which is started with the first request that goes to a worker.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex};

use super::flight::Permit;
use crate::stream::Stream;

pub struct Outlet {
    stream: Arc<Stream>,
    /// Whose turn it is to send; holds what is left of a reply that went out in part and must be finished first.
    turn: Mutex<Option<Reply>>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    // bounded by the permits that the replies carry
    replies: VecDeque<Reply>,
    /// `turn` holds a rest.
    rest: bool,
    closed: bool,
}

/// A finished request on its way out. The permit returns when it is sent or given up.
pub struct Reply {
    pub bytes: Vec<u8>,
    pub sent: usize,
    pub _permit: Permit,
}

impl Outlet {
    pub fn new(stream: Arc<Stream>) -> Self {
        Self { stream, turn: Mutex::new(None), queue: Mutex::default(), wake: Condvar::new() }
    }

    /// For the connection's own thread: waits until all is sent.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut turn = self.turn.lock().expect("no panic while held");
        if let Some(rest) = turn.take() {
            self.stream.send(&rest.bytes[rest.sent..])?;
        }
        self.stream.send(bytes)
    }

    /// For workers: never waits for the client.
    pub fn deliver(&self, mut reply: Reply) {
        if self.stream.is_plain()
            && let Ok(mut turn) = self.turn.try_lock()
            && turn.is_none()
            && self.queue.lock().expect("no panic while held").replies.is_empty()
        {
            match self.stream.try_send(&reply.bytes) {
                Ok(count) if count == reply.bytes.len() => return,
                // Nothing went out: it may as well wait in the queue.
                Ok(0) => {}
                Ok(count) => {
                    reply.sent = count;
                    *turn = Some(reply);
                    drop(turn);
                    self.queue.lock().expect("no panic while held").rest = true;
                    return self.wake.notify_one();
                }
                Err(_) => return self.break_off(),
            }
        }
        self.queue.lock().expect("no panic while held").replies.push_back(reply);
        self.wake.notify_one();
    }

    /// The writer thread: until [`close`](Self::close), then until all is sent.
    pub fn write(&self) {
        loop {
            let replies = {
                let mut queue = self.queue.lock().expect("no panic while held");
                while queue.replies.is_empty() && !queue.rest && !queue.closed {
                    queue = self.wake.wait(queue).expect("no panic while held");
                }
                if queue.replies.is_empty() && !queue.rest {
                    return;
                }
                queue.rest = false;
                std::mem::take(&mut queue.replies)
            };
            if self.send(&[]).is_err() {
                self.break_off();
            }
            for reply in replies {
                // Also when it broke off: the permits must return.
                if self.send(&reply.bytes).is_err() {
                    self.break_off();
                }
            }
        }
    }

    pub fn close(&self) {
        self.queue.lock().expect("no panic while held").closed = true;
        self.wake.notify_all();
    }

    /// The client cannot be told any more; its connection ends, and with it whoever waits for it.
    pub fn break_off(&self) {
        self.stream.shutdown(Shutdown::Both);
    }
}
