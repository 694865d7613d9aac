//! What was read and verified lately: decoded chunks and index pages, of all replicas of a server, in bounded memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemark_base::sync::Mutex;

/// The cache of one process server, unless told otherwise.
pub const CACHE_BYTES: usize = 16 << 20;

/// An opened file, as the cache names it: numbers are never used twice in a process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileNumber(u64);

impl FileNumber {
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Least recently used goes first.
pub struct BlockCache {
    bytes_max: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    blocks: HashMap<(FileNumber, u64), (Arc<Vec<u8>>, u64)>,
    by_use: BTreeMap<u64, (FileNumber, u64)>,
    uses: u64,
    bytes: usize,
}

impl BlockCache {
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, inner: Mutex::default() })
    }

    pub fn get(&self, file: FileNumber, at: u64) -> Option<Arc<Vec<u8>>> {
        let mut inner = self.inner.lock().expect("no panic while held");
        let inner = &mut *inner;
        let (block, used) = inner.blocks.get_mut(&(file, at))?;
        inner.by_use.remove(used);
        inner.uses += 1;
        *used = inner.uses;
        inner.by_use.insert(inner.uses, (file, at));
        Some(block.clone())
    }

    pub fn put(&self, file: FileNumber, at: u64, block: Arc<Vec<u8>>) {
        if block.len() > self.bytes_max {
            return;
        }
        let mut inner = self.inner.lock().expect("no panic while held");
        inner.uses += 1;
        let used = inner.uses;
        inner.bytes += block.len();
        if let Some((old, used)) = inner.blocks.insert((file, at), (block, used)) {
            inner.bytes -= old.len();
            inner.by_use.remove(&used);
        }
        inner.by_use.insert(used, (file, at));
        while inner.bytes > self.bytes_max {
            let Some((_, key)) = inner.by_use.pop_first() else { break };
            if let Some((old, _)) = inner.blocks.remove(&key) {
                inner.bytes -= old.len();
            }
        }
    }

    pub fn bytes(&self) -> usize {
        self.inner.lock().expect("no panic while held").bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_block_goes_first() {
        let cache = BlockCache::new(300);
        let file = FileNumber::next();
        (0..3).for_each(|at| cache.put(file, at, Arc::new(vec![at as u8; 100])));
        assert!(cache.get(file, 0).is_some());
        cache.put(file, 3, Arc::new(vec![3; 100]));
        assert!(cache.get(file, 1).is_none());
        assert!(cache.get(file, 0).is_some() && cache.get(file, 3).is_some());
        assert_eq!(cache.bytes(), 300);
        cache.put(file, 4, Arc::new(vec![0; 301]));
        assert_eq!(cache.bytes(), 300);
    }
}
