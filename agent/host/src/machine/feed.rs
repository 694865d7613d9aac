//! What feeds one process server from one disk, and how a machine comes to feed others while its workload goes on.
//!
//! A machine feeds each of its process servers by a sender a disk. They share the log, the marks and the workers, and nothing else:
//! cursor, scan bitmap and mode are of (disk, process server), so one that is away or slow holds up no other
//! (`protected/keeper.rs` says when the log stops waiting for it).
//!
//! *Consistency.* There is one sender of a (disk, process server) at a time: one that is dialled elsewhere is stopped first. *Retries.*
//! As of the senders; what failed halfway is repeated by whoever is told the specification again. *Cancellation.* None: a stop
//! takes as long as closing a stream. *Crash.* A process server that is new is known to the disk before the specification that names it
//! is stored, and one that goes is forgotten after: what a crash leaves between is begun, or cleared, by the next attach.

use std::io;
use std::sync::Arc;

use tidemark_base::ServerId;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_proto::control::{Endpoint, MachineSpec};

use super::watch::SenderSeen;
use super::{Machine, MachineDisk, Senders};
use crate::protected::ProtectedDisk;
use crate::send::{Sender, SenderStatus};

pub(super) struct Feed {
    pub endpoint: Endpoint,
    pub sender: Sender,
    pub seen: Mutex<SenderSeen>,
}

impl Feed {
    pub fn start(
        disk: &Arc<ProtectedDisk>,
        endpoint: &Endpoint,
        spec: &MachineSpec,
        sender: Senders<'_>,
    ) -> io::Result<Self> {
        let sender = Sender::start(disk.clone(), sender(spec, endpoint))?;
        if spec.paused {
            sender.pause();
        }
        if let Some(consumer) = disk.consumer(endpoint.server) {
            consumer.set_paused(spec.paused);
        }
        Ok(Self { endpoint: endpoint.clone(), sender, seen: Mutex::default() })
    }
}

impl Machine {
    /// Feeds process servers that are new, and dials those that moved where they are now.
    pub(crate) fn add_servers(&self, spec: &MachineSpec, sender: Senders<'_>) -> io::Result<()> {
        for disk in &self.opened() {
            for endpoint in spec.servers() {
                if disk.feeds().iter().any(|feed| feed.endpoint == *endpoint) {
                    continue;
                }
                disk.disk.add_consumer(endpoint.server)?;
                disk.stop_feed(endpoint.server);
                let feed = Feed::start(&disk.disk, endpoint, spec, sender)?;
                disk.feeds().push(feed);
            }
            let place = |feed: &Feed| spec.servers().position(|endpoint| *endpoint == feed.endpoint);
            disk.feeds().sort_by_key(|feed| place(feed).unwrap_or(usize::MAX));
        }
        Ok(())
    }

    /// Lets go of process servers that the specification does not name any more: the log does not wait for them.
    pub(crate) fn drop_servers(&self, spec: &MachineSpec) {
        for disk in &self.opened() {
            let is_gone = |server: &ServerId| spec.servers().all(|endpoint| endpoint.server != *server);
            let gone: Vec<ServerId> = disk.feeds().iter().map(|feed| feed.endpoint.server).filter(is_gone).collect();
            for server in gone {
                disk.stop_feed(server);
                if let Err(error) = disk.disk.remove_consumer(server) {
                    tracing::warn!(disk = %disk.disk.identity.disk, %server, %error, "what is known of a process server stays");
                }
            }
        }
    }
}

impl MachineDisk {
    pub(super) fn feeds(&self) -> MutexGuard<'_, Vec<Feed>> {
        self.feeds.lock().expect("no panic while held")
    }

    pub(super) fn sender_status(&self, server: ServerId) -> Option<SenderStatus> {
        self.feeds().iter().find(|feed| feed.endpoint.server == server).map(|feed| feed.sender.status())
    }

    fn stop_feed(&self, server: ServerId) {
        let stopped = {
            let mut feeds = self.feeds();
            let at = feeds.iter().position(|feed| feed.endpoint.server == server);
            at.map(|at| feeds.remove(at))
        };
        if let Some(feed) = stopped {
            feed.sender.stop();
        }
    }

    pub(super) fn stop_feeds(&self) {
        let feeds = std::mem::take(&mut *self.feeds());
        feeds.into_iter().for_each(|feed| feed.sender.stop());
    }
}
