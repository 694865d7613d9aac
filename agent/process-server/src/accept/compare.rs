//! Questions of a compare, answered beside the stream that they came on.
//!
//! A question's turn comes in its lane, which lists what it is about ([`super::Writer::compare`]); reading and hashing goes on here, on a
//! few threads of all streams, so that neither the frames behind it nor other disks wait for it. Answers may overtake
//! each other.

use std::sync::Arc;

use tidemark_proto::replication::{Differing, RefusalReason};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::progress::Progress;
use super::refusal;

/// Questions that are worked on at once, of all disks together: enough to keep a disk busy, few enough to leave processors for
/// what is live.
const COMPARES_MAX: usize = 4;

/// What is left to do for one question: given a way to see that nobody waits any more, the answer.
pub type Comparison = Box<dyn FnOnce(&dyn Fn() -> bool) -> Option<Differing> + Send>;

pub fn places() -> Arc<Semaphore> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    Arc::new(Semaphore::new(threads.clamp(1, COMPARES_MAX)))
}

/// The questions of one stream.
#[derive(Clone)]
pub struct Compares {
    places: Arc<Semaphore>,
    progress: Arc<Progress>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Compares {
    pub fn new(places: Arc<Semaphore>, progress: Arc<Progress>) -> Self {
        Self { places, progress, stop: CancellationToken::new(), tasks: TaskTracker::new() }
    }

    pub fn start(&self, comparison: Comparison) {
        let Self { places, progress, stop, .. } = self.clone();
        self.tasks.spawn(async move {
            let place = tokio::select! {
                () = stop.cancelled() => return,
                place = places.acquire_owned() => place.expect("the semaphore is never closed"),
            };
            let work = tokio::task::spawn_blocking(move || {
                let answer = comparison(&|| stop.is_cancelled());
                drop(place);
                answer
            });
            match work.await {
                Ok(Some(answer)) => progress.answer(answer),
                Ok(None) => {}
                Err(_) => progress.refuse(refusal(
                    RefusalReason::StoreFailed,
                    "the process server failed while it compared",
                    "report this, with the process server's log",
                )),
            }
        });
    }

    /// Nothing is read for this stream any more when it returns.
    pub async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
