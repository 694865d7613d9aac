//! What is still to be looked at, a stretch of it at a time: a bitmap with millions of scattered bits would be hundreds of
//! megabytes of extents.

use std::collections::VecDeque;

use tidemark_base::{Extent, ExtentSet, ServerId};

use crate::source::{PendingWindow, ScanRevision, Source, SourceError};

/// Additions that are passed over the disk by themselves; with more, the last pass begins again.
const PASSES_MAX: usize = 4;

pub struct Todo {
    consumer: ServerId,
    /// What was fetched, and what has to be looked at again.
    pub extents: ExtentSet,
    /// What is fetched next, stretch after stretch.
    passes: VecDeque<Pass>,
}

/// One walk over what was added after a revision.
struct Pass {
    newer_than: ScanRevision,
    from: u64,
}

impl Todo {
    /// Everything that is pending.
    pub fn new(consumer: ServerId) -> Self {
        let passes = VecDeque::from([Pass { newer_than: ScanRevision(0), from: 0 }]);
        Self { consumer, extents: ExtentSet::new(), passes }
    }

    /// The first stretch of what was added after `newer_than`, with where there is more.
    pub fn add(&mut self, newer_than: ScanRevision, window: &PendingWindow) {
        window.extents.iter().for_each(|extent| self.extents.insert(extent));
        let Some(from) = window.next else { return };
        if self.passes.len() < PASSES_MAX {
            self.passes.push_back(Pass { newer_than, from });
        } else if let Some(last) = self.passes.back_mut() {
            last.newer_than = last.newer_than.min(newer_than);
            last.from = 0;
        }
    }

    /// Fetches the next stretch when the one before was used up. Returns what it said, if anything was fetched.
    pub fn refill(&mut self, source: &dyn Source) -> Result<Option<PendingWindow>, SourceError> {
        let mut last = None;
        while self.extents.is_empty()
            && let Some(pass) = self.passes.front_mut()
        {
            let window = source.pending_window(self.consumer, pass.newer_than, pass.from)?;
            match window.next {
                Some(next) => pass.from = next,
                None => drop(self.passes.pop_front()),
            }
            window.extents.iter().for_each(|extent| self.extents.insert(extent));
            last = Some(window);
        }
        Ok(last)
    }

    pub fn first(&self) -> Option<Extent> {
        self.extents.iter().next()
    }

    pub fn is_empty(&self) -> bool {
        self.extents.is_empty() && self.passes.is_empty()
    }
}
