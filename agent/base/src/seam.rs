//! The one seam through which the same code runs on a real machine and in a deterministic simulation (feature
//! `simulation`, never part of a release): a [`World`] that a thread of the system has entered answers for its clocks,
//! randomness, threads, locks, folders and disks. Without the feature none of this is compiled; with it, a thread that
//! entered no world sees the real machine.

use crate::{MarkId, Position};

/// What a simulation wants to know of at the instant at which it happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event<'a> {
    /// The disk is held: it equals its log up to the mark.
    Marked { disk: crate::DiskId, mark: MarkId, position: Position },
    /// A name for something that a test wants to have happened.
    Reached(&'a str),
}

/// Tells the simulation, if this is one.
pub fn observe(event: Event<'_>) {
    #[cfg(feature = "simulation")]
    if let Some(world) = current() {
        world.observe(event);
    }
    #[cfg(not(feature = "simulation"))]
    let _ = event;
}

/// Random bytes, of the simulation if this is one.
pub(crate) fn random_bytes() -> Option<[u8; 16]> {
    #[cfg(feature = "simulation")]
    if let Some(world) = current() {
        return Some(world.random());
    }
    None
}

/// Device and mount of a folder, as the simulation has them.
pub fn mount_of(folder: &std::path::Path) -> Option<(u64, u64)> {
    #[cfg(feature = "simulation")]
    if let Some(world) = current() {
        return Some(world.mount_of(folder));
    }
    let _ = folder;
    None
}

#[cfg(feature = "simulation")]
pub use simulated::{SimulatedDisk, World, current, enter};

#[cfg(feature = "simulation")]
mod simulated {
    use std::cell::RefCell;
    use std::io;
    use std::path::Path;
    use std::rc::Rc;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, SystemTime};

    use super::Event;
    use crate::disk::{Access, Disk, DiskError, DiskIdentity};
    use crate::storage::Storage;

    /// A simulated machine. All its threads are run by one thread of the real one, in turns.
    pub trait World {
        /// Monotonic time.
        fn now(&self) -> Duration;
        fn wall_now(&self) -> SystemTime;
        fn random(&self) -> [u8; 16];
        fn spawn(&self, name: &str, run: Box<dyn FnOnce()>) -> u64;
        fn current_thread(&self) -> u64;
        /// Returns when the thread ended.
        fn join(&self, thread: u64);
        fn park_token(&self, thread: u64) -> Arc<Mutex<bool>>;
        /// Lets others run until `key` is woken (true) or the time came (false).
        fn wait(&self, key: usize, until: Option<Duration>) -> bool;
        fn wake(&self, key: usize, all: bool);
        fn create_folder(&self, path: &Path) -> io::Result<()>;
        fn folder(&self, path: &Path) -> Arc<dyn Storage>;
        fn mount_of(&self, path: &Path) -> (u64, u64);
        fn open_disk(&self, path: &Path, access: Access) -> Result<Arc<dyn SimulatedDisk>, DiskError>;
        fn observe(&self, event: Event<'_>);
    }

    pub trait SimulatedDisk: Disk {
        fn identity(&self) -> io::Result<DiskIdentity>;
    }

    thread_local! {
        static CURRENT: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
    }

    pub fn current() -> Option<Rc<dyn World>> {
        CURRENT.with(|current| current.borrow().clone())
    }

    /// Sets the world of this thread; `None` leaves it.
    pub fn enter(world: Option<Rc<dyn World>>) {
        CURRENT.with(|current| *current.borrow_mut() = world);
    }
}
