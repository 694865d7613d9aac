//! Group commit: a few threads make ended cuts durable, one sync for all the cuts of a disk that waited.
//!
//! There is no timer. A disk is synced as soon as a cut of it ended and a thread is free; cuts that end while it is being
//! synced wait for the next sync of that disk, which follows at once. Under load the groups grow by themselves.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use tidemark_proto::replication::{Durable, Refusal};

use super::progress::Progress;
use super::{Disk, Store};

/// Syncs under way at once: enough that the file system can join them, few enough to leave the disk to the appenders.
const COMMITTERS: usize = 4;

pub struct Committer {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    /// Each disk at most once.
    queue: VecDeque<Arc<Disk>>,
    stopped: bool,
}

/// A disk's part in it.
#[derive(Default)]
pub struct Pending {
    state: Mutex<PendingState>,
}

#[derive(Default)]
struct PendingState {
    /// In the queue, or to be put there when the sync under way is done.
    wanted: bool,
    syncing: bool,
    store: Option<Arc<dyn Store>>,
    /// Who is told: the disk's present stream.
    listener: Option<Arc<Progress>>,
}

impl Pending {
    fn state(&self) -> MutexGuard<'_, PendingState> {
        self.state.lock().expect("no panic while held")
    }

    pub fn set_store(&self, store: Arc<dyn Store>) {
        self.state().store = Some(store);
    }

    pub fn set_listener(&self, listener: Option<Arc<Progress>>) {
        self.state().listener = listener;
    }
}

impl Committer {
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new() });
        let committer = Self { shared: shared.clone(), threads: Mutex::default() };
        for index in 0..COMMITTERS {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("commit-{index}")).spawn(move || shared.run())?;
            committer.threads.lock().expect("no panic while held").push(thread);
        }
        Ok(committer)
    }

    /// A cut of this disk ended.
    pub fn request(&self, disk: &Arc<Disk>) {
        {
            let mut pending = disk.pending.state();
            if std::mem::replace(&mut pending.wanted, true) || pending.syncing {
                return;
            }
        }
        self.shared.enqueue(disk.clone());
    }

    /// Every request made before is done when this returns.
    pub fn stop(&self) {
        self.shared.state().stopped = true;
        self.shared.work.notify_all();
        for thread in self.threads.lock().expect("no panic while held").drain(..) {
            if thread.join().is_err() {
                tracing::error!("a committer thread panicked");
            }
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn enqueue(&self, disk: Arc<Disk>) {
        self.state().queue.push_back(disk);
        self.work.notify_one();
    }

    fn run(&self) {
        loop {
            let disk = {
                let mut state = self.state();
                loop {
                    if let Some(disk) = state.queue.pop_front() {
                        break disk;
                    }
                    if state.stopped {
                        return;
                    }
                    state = self.work.wait(state).expect("no panic while held");
                }
            };
            self.commit(&disk);
            let again = {
                let mut pending = disk.pending.state();
                pending.syncing = false;
                pending.wanted
            };
            if again {
                self.enqueue(disk);
            }
        }
    }

    fn commit(&self, disk: &Disk) {
        let store = {
            let mut pending = disk.pending.state();
            pending.wanted = false;
            pending.syncing = true;
            pending.store.clone()
        };
        let Some(store) = store else { return };
        let result: Result<Option<Durable>, Refusal> = store.sync();
        let listener = disk.pending.state().listener.clone();
        match (result, listener) {
            (Ok(Some(durable)), Some(listener)) => listener.durable(durable),
            (Ok(_), _) => {}
            (Err(refusal), Some(listener)) => listener.refuse(refusal),
            (Err(refusal), None) => {
                tracing::error!(disk = %disk.id, reason = ?refusal.reason, message = refusal.message, "cannot make cuts durable");
            }
        }
    }
}
