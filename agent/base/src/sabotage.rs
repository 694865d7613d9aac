//! Negative controls: one safeguard taken out at a time, by name, to see that the tests notice (feature `sabotage`, never
//! part of a release). Without the feature every question here is answered with a constant *no*.

/// Every safeguard that can be taken out.
pub const NAMES: [&str; 21] = [
    // The replica's journal is not synced before an acknowledgement leaves.
    "journal-sync",
    // Chunks are believed, as they come and as they are read back.
    "chunk-hash",
    // The host says that a flush was done without doing it.
    "disk-flush",
    // A write goes to the disk before its intent bit is durable.
    "intent-wait",
    // What an attach finds on the disk is not synced before it is scanned.
    "attach-sync",
    // An intent bit is cleared although log and disk were not synced since.
    "intent-clear",
    // Ranges in flight are not read again after a kill.
    "slots-read",
    // Records that left before a chunk of a scan are not cut out of it.
    "scan-cut-out",
    // A chunk of a scan does not wait for the records that were logged before its read.
    "scan-wait",
    // What cannot be logged is not marked dirty.
    "dirty-mark",
    // A mark does not wait for writes in flight.
    "mark-hold",
    // The base is not synced before the manifest says that it was folded.
    "fold-sync",
    // A scan is taken off the list when it was sent, not when it is durable.
    "scan-acknowledged",
    // A file is replaced without syncing its new content.
    "replace-sync",
    // A write goes to the disk without a slot that names it.
    "slots-set",
    // A region counts as shipped as soon as it has no intent.
    "unshipped-clear",
    // A small state file is written over its newest slot.
    "state-slot",
    // What the log of an epoch that ends held is not left to the scans.
    "epoch-scan",
    // A barrier over machines lets their writes go on before it is released.
    "group-hold",
    // What home disks held before a failback is not synced before they are written to.
    "undo-sync",
    // A write to a block of an image that was not written to before is acknowledged while only the program that has the image
    // open knows where the block is.
    "image-settle",
];

/// Whether this safeguard is taken out. The choice is per thread, as simulations are.
#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub const fn is(_name: &str) -> bool {
    false
}

#[cfg(feature = "sabotage")]
pub use chosen::{choose, is};

#[cfg(feature = "sabotage")]
mod chosen {
    use std::cell::RefCell;
    use std::sync::OnceLock;

    thread_local! {
        static CHOSEN: RefCell<Option<String>> = const { RefCell::new(None) };
    }

    /// Takes out one safeguard, for this thread.
    pub fn choose(name: Option<&str>) {
        CHOSEN.with(|chosen| *chosen.borrow_mut() = name.map(str::to_owned));
    }

    pub fn is(name: &str) -> bool {
        debug_assert!(super::NAMES.contains(&name), "{name} is no known safeguard");
        of_process() == Some(name) || CHOSEN.with(|chosen| chosen.borrow().as_deref() == Some(name))
    }

    /// For controls of the whole command: what `TIDEMARK_SABOTAGE` names is taken out of the whole process.
    fn of_process() -> Option<&'static str> {
        static NAME: OnceLock<Option<String>> = OnceLock::new();
        NAME.get_or_init(|| std::env::var("TIDEMARK_SABOTAGE").ok()).as_deref()
    }
}
