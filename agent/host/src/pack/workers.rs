//! The threads that read, verify and seal for all disks of the host.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;

use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::sync::{Condvar, Mutex};
use tidemark_base::thread::JoinHandle;

use super::room::{Room, Rooms};

/// More threads than this do not help: the link and the other end need processors, too.
const THREADS_MAX: usize = 4;

/// Live data is sealed before scanned data of any disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Priority {
    Live,
    Scan,
}

/// What a worker keeps between jobs.
#[derive(Default)]
pub struct Worker {
    sealer: Option<Sealer>,
    buffer: Vec<u8>,
    rooms: Rooms,
}

impl Worker {
    /// The sealer, set up for a disk, and room for `bytes` of raw data.
    pub fn tools(&mut self, key: &ChunkKey, compression: Compression, bytes: usize) -> (&mut Sealer, &mut [u8]) {
        let sealer = self.sealer.get_or_insert_with(|| Sealer::new(key.clone(), compression));
        sealer.set_key(key);
        sealer.set_compression(compression);
        if self.buffer.len() < bytes {
            self.buffer.resize(bytes, 0);
        }
        (sealer, &mut self.buffer[..bytes])
    }

    /// Memory for a frame.
    pub(super) fn room(&self, bytes: usize) -> Room {
        self.rooms.take(bytes)
    }

    /// Room for `bytes` of raw data alone.
    pub fn buffer(&mut self, bytes: usize) -> &mut [u8] {
        if self.buffer.len() < bytes {
            self.buffer.resize(bytes, 0);
        }
        &mut self.buffer[..bytes]
    }
}

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// A pool of threads. Its queue is bounded by the permits that whoever submits must hold.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Default)]
struct Queue {
    live: VecDeque<Job>,
    scan: VecDeque<Job>,
    stopping: bool,
}

impl Workers {
    /// A pool with one thread a processor.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let processors = tidemark_base::thread::available_parallelism().map_or(2, usize::from);
        Self::with_threads(processors.min(THREADS_MAX))
    }

    pub fn with_threads(count: usize) -> std::io::Result<Arc<Self>> {
        let shared = Arc::new(Shared::default());
        let threads = (0..count.max(1))
            .map(|index| {
                let shared = shared.clone();
                tidemark_base::thread::Builder::new().name(format!("pack-{index}")).spawn(move || shared.run())
            })
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self { shared, threads }))
    }

    /// Queues a job. `done` is called when its result can be taken; it must not block.
    pub fn submit<T: Send + 'static>(
        &self,
        priority: Priority,
        done: Arc<dyn Fn() + Send + Sync>,
        job: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Ticket<T> {
        let slot = Arc::new(Mutex::new(Slot::Waiting));
        let ticket = Ticket(slot.clone());
        let job: Job = Box::new(move |worker| {
            // Only the job holds the slot once the ticket was dropped.
            if Arc::strong_count(&slot) > 1 {
                let result = catch_unwind(AssertUnwindSafe(|| job(worker)));
                *slot.lock().expect("no panic while held") = result.map_or(Slot::Lost, Slot::Done);
                done();
            }
        });
        let mut queue = self.shared.queue.lock().expect("no panic while held");
        match priority {
            Priority::Live => queue.live.push_back(job),
            Priority::Scan => queue.scan.push_back(job),
        }
        drop(queue);
        self.shared.more.notify_one();
        ticket
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.queue.lock().expect("no panic while held").stopping = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // A job's panic is caught in the job.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut worker = Worker::default();
        while let Some(job) = self.next() {
            job(&mut worker);
        }
    }

    fn next(&self) -> Option<Job> {
        let queue = self.queue.lock().expect("no panic while held");
        let mut queue = self
            .more
            .wait_while(queue, |queue| queue.live.is_empty() && queue.scan.is_empty() && !queue.stopping)
            .expect("no panic while held");
        queue.live.pop_front().or_else(|| queue.scan.pop_front())
    }
}

/// The result of a job, once there is one.
pub struct Ticket<T>(Arc<Mutex<Slot<T>>>);

enum Slot<T> {
    Waiting,
    Done(T),
    Lost,
}

/// A job panicked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lost;

impl<T> Ticket<T> {
    /// The result; after it was taken, the job counts as lost.
    pub fn poll(&self) -> Poll<Result<T, Lost>> {
        let mut slot = self.0.lock().expect("no panic while held");
        match std::mem::replace(&mut *slot, Slot::Lost) {
            Slot::Waiting => {
                *slot = Slot::Waiting;
                Poll::Pending
            }
            Slot::Done(result) => Poll::Ready(Ok(result)),
            Slot::Lost => Poll::Ready(Err(Lost)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn live_jobs_overtake_scan_jobs_and_a_panic_is_told() {
        let workers = Workers::with_threads(1).unwrap();
        let (entered_to, entered) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let (order_to, order) = mpsc::channel();
        let nothing: Arc<dyn Fn() + Send + Sync> = Arc::new(|| {});
        let blocked = workers.submit(Priority::Live, nothing.clone(), move |_| {
            entered_to.send(()).unwrap();
            released.recv().unwrap();
        });
        entered.recv().unwrap();
        let scan = order_to.clone();
        let scan = workers.submit(Priority::Scan, nothing.clone(), move |_| scan.send("scan").unwrap());
        let live = order_to.clone();
        let live = workers.submit(Priority::Live, nothing.clone(), move |_| live.send("live").unwrap());
        let cancelled = order_to.clone();
        drop(workers.submit(Priority::Live, nothing.clone(), move |_| cancelled.send("cancelled").unwrap()));
        let panics =
            workers.submit(Priority::Scan, Arc::new(move || order_to.send("lost").unwrap()), |_| panic!("on purpose"));
        assert!(blocked.poll().is_pending());
        release.send(()).unwrap();
        assert_eq!(order.iter().take(3).collect::<Vec<_>>(), ["live", "scan", "lost"]);
        assert_eq!(panics.poll(), Poll::<Result<(), Lost>>::Ready(Err(Lost)));
        drop((scan, live));
    }
}
