//! Blocks that a replica cannot read any more and asks its host for.
//!
//! Whoever finds damage calls [`Needs::ask`] (through `Replica::ask_for`); the disk's stream sends what is asked for, at once or
//! when it begins, and what a cut brought is asked for no longer. *Consistency.* A block is forgotten when a cut with new data for it ended;
//! if that cut is lost with a crash, whoever found the damage finds it again. *Crash.* Nothing here is durable: who asks
//! remembers the damage, and asks again when the replica was opened.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::{Extent, ExtentSet};

/// Asked for in whole pieces of this size, which is what a host keeps track of: bounds what is remembered and sent.
pub const NEED_BYTES: u64 = 64 << 10;

type Listener = Arc<dyn Fn() + Send + Sync>;

pub struct Needs {
    /// Only grows.
    disk_bytes: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    extents: ExtentSet,
    /// Of these, what the present stream was not told yet.
    untold: ExtentSet,
    listener: Option<Listener>,
}

impl Needs {
    pub fn new(disk_bytes: u64) -> Arc<Self> {
        Arc::new(Self { disk_bytes: AtomicU64::new(disk_bytes), state: Mutex::default() })
    }

    pub fn grow(&self, disk_bytes: u64) {
        self.disk_bytes.store(disk_bytes, Ordering::Release);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// The host is to send what it has at these ranges; they are rounded out to [`NEED_BYTES`].
    pub fn ask(&self, extents: impl IntoIterator<Item = Extent>) {
        let disk_bytes = self.disk_bytes.load(Ordering::Acquire);
        let listener = {
            let mut state = self.state();
            for extent in extents {
                let end = extent.end().next_multiple_of(NEED_BYTES).min(disk_bytes);
                let offset = extent.offset / NEED_BYTES * NEED_BYTES;
                let extent = Extent::new(offset, end.saturating_sub(offset));
                state.extents.insert(extent);
                state.untold.insert(extent);
            }
            state.listener.clone()
        };
        if let Some(listener) = listener {
            listener();
        }
    }

    /// A cut with new data for this range ended.
    pub fn came(&self, extent: Extent) {
        let mut state = self.state();
        state.extents.remove(extent);
        state.untold.remove(extent);
    }

    pub fn is_empty(&self) -> bool {
        self.state().extents.is_empty()
    }

    /// Whether any part of the range is needed: what is stored there must not be believed.
    pub fn overlaps(&self, extent: Extent) -> bool {
        self.state().extents.overlapping(extent).next().is_some()
    }

    /// A stream of the disk begins: it is told everything, and `listener` is called when there is more.
    pub fn begin(&self, listener: Listener) {
        let mut state = self.state();
        state.untold = state.extents.clone();
        state.listener = Some(listener);
    }

    /// The stream ended: the next one is told instead.
    pub fn end(&self) {
        self.state().listener = None;
    }

    /// At most `count` ranges that the present stream was not told yet.
    pub fn take(&self, count: usize) -> Vec<Extent> {
        let mut state = self.state();
        let extents: Vec<Extent> = state.untold.iter().take(count).collect();
        extents.iter().for_each(|extent| state.untold.remove(*extent));
        extents
    }
}
