//! One idle-class busy loop per processor while latency is measured.
//!
//! In a virtual machine an idle processor halts, and waking it costs about 50 µs, more than what is measured. The loops
//! keep them awake and yield to every other task.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

pub struct Spinners {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Spinners {
    pub fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let spin = |processor: usize| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                if idle_class_on(processor) {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                }
            })
        };
        let threads = (0..count).map(spin).collect();
        Self { stop, threads }
    }
}

/// Gives the calling thread the idle class on one processor. Without it a loop would take time from others: none then.
fn idle_class_on(processor: usize) -> bool {
    // SAFETY: an all-zero cpu_set_t is an empty set, and sched_param has one number; both outlive the calls.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        let parameter = libc::sched_param { sched_priority: 0 };
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) == 0
            && libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameter) == 0
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
