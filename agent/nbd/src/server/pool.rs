//! Threads for what must not block a connection: one pool for each open export, so that a disk that hangs holds up
//! nobody else's requests.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

pub type Job = Box<dyn FnOnce() + Send>;

pub struct Pool {
    name: String,
    threads_max: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    // bounded by the limits on requests in flight of the connections that submit
    jobs: VecDeque<Job>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

impl Pool {
    pub fn new(name: String, threads_max: usize) -> Arc<Self> {
        let threads_max = threads_max.max(1);
        Arc::new(Self { name, threads_max, state: Mutex::default(), wake: Condvar::new() })
    }

    /// Runs the job on a thread of the pool; on the caller's own if the system gives us none.
    pub fn submit(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock().expect("no panic while held");
        if state.idle <= state.jobs.len() && state.threads.len() < self.threads_max {
            let pool = self.clone();
            let number = state.threads.len();
            match std::thread::Builder::new().name(format!("nbd-work-{number}")).spawn(move || pool.work()) {
                Ok(thread) => state.threads.push(thread),
                Err(error) if state.threads.is_empty() => {
                    drop(state);
                    tracing::warn!(export = self.name, %error, "no worker thread: a connection does its slow work itself");
                    return job();
                }
                Err(_) => {}
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.wake.notify_one();
    }

    fn work(&self) {
        let mut state = self.state.lock().expect("no panic while held");
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A panicking job ends its connection (see `Flying`), not the thread that others wait for.
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!(export = self.name, "a request panicked");
                }
                state = self.state.lock().expect("no panic while held");
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                state = self.wake.wait(state).expect("no panic while held");
                state.idle -= 1;
            }
        }
    }

    /// Finishes what was submitted and ends the threads.
    pub fn close(&self) {
        let threads = {
            let mut state = self.state.lock().expect("no panic while held");
            state.closed = true;
            std::mem::take(&mut state.threads)
        };
        self.wake.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}
