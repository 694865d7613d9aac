//! What disks a host has, told to the configuration server with the first report of each stream, and whenever it changed.
//!
//! *Consistency.* What is told is what one look found, as a whole. *Retries.* The next look; what found no room in a stream goes with the
//! next report. *Cancellation.* A look that hangs holds up no report, and no second one begins. *Crash.* Nothing is kept here.

use std::sync::{Arc, Mutex};

use tidemark_proto::control::Inventory;
use tokio::sync::Semaphore;

use super::link::Handler;

/// What was found last, for all streams of a role.
pub struct Looking {
    found: Mutex<Option<Inventory>>,
    places: Arc<Semaphore>,
}

impl Default for Looking {
    fn default() -> Self {
        Self { found: Mutex::default(), places: Arc::new(Semaphore::new(1)) }
    }
}

impl Looking {
    /// Looks beside everything else, unless a look is under way.
    pub fn begin(self: &Arc<Self>, handler: Arc<dyn Handler>) {
        let Ok(place) = self.places.clone().try_acquire_owned() else { return };
        let looking = self.clone();
        tokio::task::spawn_blocking(move || {
            if let Some(found) = handler.inventory() {
                *looking.found.lock().expect("no panic while held") = Some(found);
            }
            drop(place);
        });
    }

    /// What is to be told where `told` was told before.
    fn news(&self, told: Option<&Inventory>) -> Option<Inventory> {
        let found = self.found.lock().expect("no panic while held");
        found.as_ref().filter(|found| told.is_none_or(|told| !is_same(told, found))).cloned()
    }
}

/// Whenever it was found.
fn is_same(one: &Inventory, other: &Inventory) -> bool {
    one.disks == other.disks && one.left_out == other.left_out
}

/// What one stream told.
pub struct Told {
    looking: Arc<Looking>,
    last: Mutex<Option<Inventory>>,
}

impl Told {
    pub fn nothing(looking: Arc<Looking>) -> Arc<Self> {
        Arc::new(Self { looking, last: Mutex::default() })
    }

    pub fn news(&self) -> Option<Inventory> {
        self.looking.news(self.last.lock().expect("no panic while held").as_ref())
    }

    /// It was sent.
    pub fn note(&self, inventory: Inventory) {
        *self.last.lock().expect("no panic while held") = Some(inventory);
    }
}

#[cfg(test)]
mod tests {
    use tidemark_base::Timestamp;
    use tidemark_proto::control::HostDisk;

    use super::*;

    #[test]
    fn what_was_told_is_told_again_when_it_differs_and_on_each_stream() {
        let looking = Arc::new(Looking::default());
        let found = |time, paths: &[&str]| {
            let disks = paths.iter().map(|path| HostDisk { path: (*path).to_owned(), ..HostDisk::default() }).collect();
            *looking.found.lock().unwrap() = Some(Inventory { time: Timestamp(time), disks, left_out: 0 });
        };
        let told = Told::nothing(looking.clone());
        assert_eq!(told.news(), None, "nothing is known yet");
        found(1, &["/dev/sda"]);
        let first = told.news().unwrap();
        assert_eq!(told.news().as_ref(), Some(&first), "it was not sent");
        told.note(first);
        found(2, &["/dev/sda"]);
        assert_eq!(told.news(), None, "a look that finds the same is no news");
        found(3, &["/dev/sda", "/dev/sdb"]);
        let second = told.news().unwrap();
        assert_eq!(second.disks.len(), 2);
        told.note(second);
        assert_eq!(told.news(), None);
        assert!(Told::nothing(looking).news().is_some(), "another stream knows nothing");
    }
}
