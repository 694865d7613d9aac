//! Disks whose machine runs elsewhere: who writes to one all the same is told of.
//!
//! Where writes pass by the agent, somebody who is not kept from a disk shows in its tracker. What changed before the fence closed shows
//! there as well: it is taken once, as the machine is attached, and what comes after that is no machine of ours. While the last changes are still sent (the
//! machine is fenced, and not paused) whoever makes the mark takes what changed, and proves that nothing came after it.

use std::sync::atomic::Ordering;

use super::{Machine, MachineDisk};
use crate::protected::tracked::LOGGED_BYTES_MAX;

const ALARM: &str = "fence";
const HELP: &str = "its machine runs elsewhere: turn the one that is here off. What it writes is in no recovery point; see `tidemark failover show NAME`";

impl Machine {
    /// To be called about every second.
    pub(super) fn watch_fence(&self) {
        let spec = self.spec();
        if !spec.fenced || !spec.paused {
            return self.end_fence();
        }
        for disk in &self.opened() {
            let named = spec.disks.iter().find(|named| named.disk == disk.disk.identity.disk);
            let trespass = named.and_then(|named| self.provider.trespass(spec.machine, named));
            if let Some(reason) = trespass {
                disk.tell_fence(reason);
            } else if self.provider.is_going_home(disk.disk.identity.disk) {
                // What we write is taken once it is all there.
                disk.is_at_rest.store(false, Ordering::Relaxed);
                disk.disk.alarms().remove(ALARM);
            } else if disk.is_written_all_the_same() {
                disk.tell_fence("it was written to".to_owned());
            } else {
                disk.disk.alarms().remove(ALARM);
            }
        }
    }

    pub(super) fn end_fence(&self) {
        for disk in &self.opened() {
            disk.is_at_rest.store(false, Ordering::Relaxed);
            disk.disk.alarms().remove(ALARM);
        }
    }
}

impl MachineDisk {
    fn is_written_all_the_same(&self) -> bool {
        // A program of ours that has its image open is the only one who can write, and whether it does is no question to ask each second.
        let is_watched = self.disk.tracker().is_some_and(|tracker| tracker.instants().is_none());
        if !is_watched || !self.disk.is_dirty() {
            self.is_at_rest.store(true, Ordering::Relaxed);
            return false;
        }
        // What a tracker missed is compared, whoever it was.
        if self.is_at_rest.load(Ordering::Relaxed) && !self.disk.is_unwitnessed() {
            return true;
        }
        // Into the log, a bitmap or a scan: nothing is sent.
        match self.disk.gather(LOGGED_BYTES_MAX) {
            Ok(_) => self.is_at_rest.store(!self.disk.is_dirty(), Ordering::Relaxed),
            Err(error) => {
                tracing::debug!(disk = %self.disk.identity.disk, %error, "what changed before the fence stays claimed");
            }
        }
        false
    }

    fn tell_fence(&self, reason: String) {
        let path = self.disk.path().display();
        let message = format!("disk {path} is not kept from everybody, though its machine runs elsewhere: {reason}");
        self.disk.alarm(ALARM, true, message, HELP);
    }
}
