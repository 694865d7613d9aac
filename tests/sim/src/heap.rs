//! Memory of a process that simulates one seed: a region that was there before it, and is there after it for the next.
//!
//! A run makes and drops some hundred thousand blocks, and what a killed process of the simulation owned is never given back. With
//! the system's allocator a quarter of a run went into finding, joining and splitting blocks, and as much again into the kernel, which
//! clears each page of 4 KiB that is touched for the first time. So a few seeds at a time are run by a process that is forked from one
//! which reserved a region for all of them: its pages are shared, one process uses them at a time, and nobody clears them in between. Blocks are of classes, four for each power of two; a class
//! has a list of those that are free.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Address space; pages are there once they are written.
const REGION_BYTES: usize = 32 << 30;
/// So much is mapped at once: page by page, each would be a fault.
const STEP_BYTES: usize = 4 << 20;
/// Every block begins at a multiple of this; what needs more is the system's.
const ALIGN: usize = 16;
/// Below this, classes are multiples of [`ALIGN`].
const FINE_MAX: usize = 1024;
const FINE_CLASSES: usize = FINE_MAX / ALIGN;
/// Longer blocks are the system's.
const BLOCK_MAX: usize = 64 << 20;
/// A page of [`crate::paged`] with its count of references: most of a run's memory, and a fifth more in the class that it would be in.
const PAGE_BYTES: usize = crate::paged::PAGE + 16;
const PAGE_CLASS: usize = CLASSES - 1;
const CLASSES: usize = FINE_CLASSES + 4 * 16 + 1;

pub struct Heap {
    /// Where the region begins; 0 before [`Heap::reserve`].
    reserved: AtomicUsize,
    /// The same; 0 before [`Heap::take_over`].
    start: AtomicUsize,
    is_held: AtomicBool,
    inner: UnsafeCell<Inner>,
}

struct Inner {
    /// Behind it nothing was handed out yet.
    end: usize,
    /// Up to here pages are mapped.
    mapped: usize,
    /// The first free block of each class; each holds the address of the next one.
    free: [usize; CLASSES],
}

// SAFETY: `inner` is reached while `is_held` is, and by whoever set it alone.
unsafe impl Sync for Heap {}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

impl Heap {
    pub const fn new() -> Self {
        let inner = UnsafeCell::new(Inner { end: 0, mapped: 0, free: [0; CLASSES] });
        Self { reserved: AtomicUsize::new(0), start: AtomicUsize::new(0), is_held: AtomicBool::new(false), inner }
    }

    /// Makes the region, for the processes that are forked from this one. Where there is none their blocks are the system's.
    pub fn reserve(&self) {
        // SAFETY: a mapping of its own, at a place that the system chooses.
        let found = unsafe {
            libc::mmap(
                ptr::null_mut(),
                REGION_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if found != libc::MAP_FAILED {
            self.reserved.store(found as usize, Ordering::Release);
        }
    }

    /// From now on blocks come from the region: in a process that nobody shares it with while it runs.
    pub fn take_over(&self) {
        let start = self.reserved.load(Ordering::Acquire);
        self.with(|inner| (inner.end, inner.mapped) = (start, start));
        self.start.store(start, Ordering::Release);
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        while self.is_held.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        // SAFETY: nobody else is here until it is let go below, and `act` allocates nothing.
        let result = act(unsafe { &mut *self.inner.get() });
        self.is_held.store(false, Ordering::Release);
        result
    }

    fn is_ours(&self, block: *mut u8) -> bool {
        let start = self.start.load(Ordering::Relaxed);
        start != 0 && (block as usize).wrapping_sub(start) < REGION_BYTES
    }

    /// A block of the class, with whatever is in it.
    fn take(&self, class: usize) -> *mut u8 {
        self.with(|inner| {
            let block = inner.free[class];
            if block != 0 {
                // SAFETY: a free block of this heap holds the address of the next one.
                inner.free[class] = unsafe { *(block as *const usize) };
                return block as *mut u8;
            }
            let (block, bytes) = (inner.end, bytes_of(class));
            if block + bytes > self.start.load(Ordering::Relaxed) + REGION_BYTES {
                return ptr::null_mut();
            }
            inner.end = block + bytes;
            if inner.end > inner.mapped {
                let more = (inner.end - inner.mapped).next_multiple_of(STEP_BYTES);
                // SAFETY: within the region, or refused; what is not mapped now is when it is touched.
                unsafe { libc::madvise(inner.mapped as *mut libc::c_void, more, libc::MADV_POPULATE_WRITE) };
                inner.mapped += more;
            }
            block as *mut u8
        })
    }

    fn class(&self, layout: &Layout) -> Option<usize> {
        let is_here = self.start.load(Ordering::Relaxed) != 0 && layout.align() <= ALIGN && layout.size() <= BLOCK_MAX;
        is_here.then(|| class_of(layout.size()))
    }
}

fn class_of(bytes: usize) -> usize {
    if bytes <= FINE_MAX {
        return bytes.max(1).div_ceil(ALIGN) - 1;
    }
    if bytes == PAGE_BYTES {
        return PAGE_CLASS;
    }
    // Of 1024 < bytes <= 2048 the classes are 1280, 1536, 1792 and 2048, and so on.
    let power = usize::BITS - 1 - (bytes - 1).leading_zeros();
    let quarter = ((bytes - 1) >> (power - 2)) & 3;
    FINE_CLASSES + 4 * (power as usize - 10) + quarter
}

fn bytes_of(class: usize) -> usize {
    match class.checked_sub(FINE_CLASSES) {
        _ if class == PAGE_CLASS => PAGE_BYTES,
        None => (class + 1) * ALIGN,
        Some(coarse) => (5 + coarse % 4) << (8 + coarse / 4),
    }
}

// SAFETY: a block is handed out once until it is given back, is as long as its class says, and is given back to the list of
// the same class, because the layout says the same; what is not of the region is the system's from begin to end.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.class(&layout) {
            Some(class) => self.take(class),
            // SAFETY: as the caller promises.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(class) = self.class(&layout) else {
            // SAFETY: as the caller promises.
            return unsafe { System.alloc_zeroed(layout) };
        };
        let block = self.take(class);
        if !block.is_null() {
            // SAFETY: the block has at least these bytes.
            unsafe { ptr::write_bytes(block, 0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !self.is_ours(block) {
            // SAFETY: it came from there.
            return unsafe { System.dealloc(block, layout) };
        }
        let class = class_of(layout.size());
        self.with(|inner| {
            // SAFETY: nobody uses it any more, and each block has room for an address, at a multiple of 16.
            unsafe { *(block as *mut usize) = inner.free[class] };
            inner.free[class] = block as usize;
        });
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if !self.is_ours(block) {
            // SAFETY: it came from there, and stays there.
            return unsafe { System.realloc(block, layout, bytes) };
        }
        if bytes <= BLOCK_MAX && class_of(bytes) == class_of(layout.size()) {
            return block;
        }
        // SAFETY: the alignment is the one of before; the caller checked the size.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(bytes, layout.align())) };
        if !new.is_null() {
            // SAFETY: two blocks, each with at least the bytes that are copied.
            unsafe {
                ptr::copy_nonoverlapping(block, new, layout.size().min(bytes));
                self.dealloc(block, layout);
            }
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::random::Random;

    #[test]
    fn each_size_is_of_the_smallest_class_that_holds_it() {
        for bytes in (0..1 << 16).chain([1 << 20, (1 << 20) + 1, BLOCK_MAX - 1, BLOCK_MAX]) {
            let class = class_of(bytes);
            assert!(bytes_of(class) >= bytes && bytes_of(class).is_multiple_of(ALIGN), "{bytes}");
            assert!(class == 0 || class == PAGE_CLASS || bytes_of(class - 1) < bytes, "{bytes}");
        }
        assert_eq!(class_of(BLOCK_MAX) + 1, PAGE_CLASS, "none lies behind the lists");
    }

    /// Blocks do not overlap, keep what was written to them, and are zeroes when that is asked for.
    #[test]
    #[expect(
        clippy::undocumented_unsafe_blocks,
        reason = "each block is used as long as its layout says, until it is given back"
    )]
    fn blocks_keep_what_is_written_to_them() {
        let heap = Heap::new();
        heap.reserve();
        heap.take_over();
        let mut random = Random::new(7);
        let mut held: Vec<(*mut u8, Layout, u8)> = Vec::new();
        let is = |block: *mut u8, bytes: usize, byte: u8| (0..bytes).all(|at| unsafe { *block.add(at) } == byte);
        for number in 0..20_000u64 {
            let byte = (number % 251) as u8 + 1;
            if held.len() > 200 || !held.is_empty() && random.below(3) == 0 {
                let (block, layout, byte) = held.swap_remove(random.below(held.len() as u64) as usize);
                assert!(is(block, layout.size(), byte));
                if random.below(2) == 0 {
                    unsafe { heap.dealloc(block, layout) };
                    continue;
                }
                let bytes = 1 + random.below(9000) as usize;
                let block = unsafe { heap.realloc(block, layout, bytes) };
                assert!(is(block, layout.size().min(bytes), byte));
                let layout = Layout::from_size_align(bytes, layout.align()).unwrap();
                unsafe { ptr::write_bytes(block, byte, bytes) };
                held.push((block, layout, byte));
                continue;
            }
            let layout = Layout::from_size_align(1 + random.below(9000) as usize, 1 << random.below(6)).unwrap();
            let block = match random.below(2) {
                0 => unsafe { heap.alloc(layout) },
                _ => {
                    let block = unsafe { heap.alloc_zeroed(layout) };
                    assert!(is(block, layout.size(), 0));
                    block
                }
            };
            assert_eq!(block as usize % layout.align(), 0);
            unsafe { ptr::write_bytes(block, byte, layout.size()) };
            held.push((block, layout, byte));
        }
        for (block, layout, byte) in held {
            assert!(is(block, layout.size(), byte));
            unsafe { heap.dealloc(block, layout) };
        }
    }
}
