//! The trait, and what its answers look like.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::error::HypervisorError;
use crate::machine::{Machine, Place};

type Result<T> = std::result::Result<T, HypervisorError>;

/// What a failover needs of a hypervisor. Machines are known by their id.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// For messages and reports: `QEMU`, `libvirt`, …
    fn name(&self) -> &'static str;

    /// Whether it answers, and what it is. Asked before anything is begun.
    async fn check(&self) -> Result<About>;

    /// Every machine that it knows, its own and others'.
    async fn inventory(&self) -> Result<Vec<Listed>>;

    async fn power(&self, id: Uuid) -> Result<Power>;

    /// Makes a machine, off. The same again changes it, when it is off.
    async fn define(&self, machine: &Machine) -> Result<()>;

    /// The machine as it was defined; disks as they are now.
    async fn describe(&self, id: Uuid) -> Result<Machine>;

    /// Returns when the guest's first instruction may run.
    async fn start(&self, id: Uuid) -> Result<Started>;

    /// Asks the guest to shut down and waits for it; then, or with no limit at once, turns it off. Of a machine that is off: nothing.
    async fn stop(&self, id: Uuid, shutdown: Option<Duration>) -> Result<Stopped>;

    /// Forgets a machine, which is turned off before. Its disks stay. Of one that is not there: nothing.
    async fn delete(&self, id: Uuid) -> Result<()>;

    /// The networks that cards can be on; the isolated one is always there.
    async fn networks(&self) -> Result<Vec<String>>;

    /// Where a machine's disks are now, in their order.
    async fn places(&self, id: Uuid) -> Result<Vec<Place>> {
        Ok(self.describe(id).await?.disks)
    }

    /// Moves a disk to another place while the machine runs: the content is copied, then the machine goes on there. The place
    /// must be there and as large. A failure leaves the machine where it was.
    async fn move_disk(&self, id: Uuid, disk: usize, to: &Place, limit: Duration) -> Result<()>;

    /// The same, to a place that shows the disk's content already and whatever is written to it, so that nothing is copied.
    async fn switch_disk(&self, id: Uuid, disk: usize, to: &Place, limit: Duration) -> Result<()> {
        self.move_disk(id, disk, to, limit).await
    }

    /// What happens to a machine from now on.
    async fn events(&self, id: Uuid) -> Result<broadcast::Receiver<Event>>;

    /// The end of what the machine said on its first serial line, and how much it said in all.
    async fn console(&self, id: Uuid, from: u64) -> Result<Console>;

    /// Its screen, as a PNG.
    async fn screenshot(&self, id: Uuid, to: &Path) -> Result<()>;

    /// Where a guest's port can be reached from the host.
    async fn reach(&self, id: Uuid, port: u16) -> Result<std::net::SocketAddr>;

    /// One question to the guest's agent.
    async fn ask_guest(&self, id: Uuid, question: Question, limit: Duration) -> Result<serde_json::Value>;
}

#[derive(Clone, Debug, Serialize)]
pub struct About {
    pub name: &'static str,
    pub version: String,
    /// `kvm`, `tcg`, or what the hypervisor says.
    pub accelerator: String,
    /// Why it is not the fastest.
    pub why: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    pub id: Uuid,
    pub name: String,
    pub power: Power,
    /// It was defined by us.
    pub ours: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    On,
    /// It waits, such as for room on its disk.
    Paused,
    Off,
    /// Nobody here can tell.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
pub struct Started {
    /// When the guest's processors were let go.
    pub first_instruction: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    WasOff,
    ByGuest,
    TurnedOff,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest, or somebody for it, ended it.
    Ended {
        by_guest: bool,
    },
    Paused,
    Resumed,
    Restarted,
    Panicked,
    /// A disk failed to read or write.
    DiskFailed {
        node: String,
        write: bool,
        reason: String,
        paused: bool,
    },
}

#[derive(Clone, Debug, Default)]
pub struct Console {
    /// From where `text` is, in bytes since the machine started.
    pub from: u64,
    pub bytes: Vec<u8>,
}

impl Console {
    pub fn end(&self) -> u64 {
        self.from + self.bytes.len() as u64
    }
}

/// What the guest's agent can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    Ping,
    /// Flushes the guest's file systems and holds their writes.
    Freeze,
    Thaw,
    Frozen,
    /// Runs a program to its end; its exit code and output.
    Run {
        program: PathBuf,
        arguments: Vec<String>,
    },
    Shutdown,
}
