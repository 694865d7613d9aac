//! For physical servers, and wherever nobody but a person starts machines: the disks are made ready, the rest is said.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::error::HypervisorError;
use crate::hypervisor::{About, Console, Event, Hypervisor, Listed, Power, Question, Started, Stopped};
use crate::machine::{Machine, Place};

type Result<T> = std::result::Result<T, HypervisorError>;

/// Drives nothing. What it refuses says what a person must do.
#[derive(Default)]
pub struct DiskOnly;

fn by_hand<T>(what: &'static str) -> Result<T> {
    Err(HypervisorError::Unsupported { hypervisor: "a disk-only target", what })
}

#[async_trait]
impl Hypervisor for DiskOnly {
    fn name(&self) -> &'static str {
        "disks only"
    }

    async fn check(&self) -> Result<About> {
        Ok(About { name: self.name(), version: String::new(), accelerator: "none".to_owned(), why: None })
    }

    async fn inventory(&self) -> Result<Vec<Listed>> {
        Ok(Vec::new())
    }

    /// Nobody here can tell, so whoever needs it off must ask.
    async fn power(&self, _: Uuid) -> Result<Power> {
        Ok(Power::Unknown)
    }

    async fn define(&self, machine: &Machine) -> Result<()> {
        Ok(machine.check()?)
    }

    async fn describe(&self, id: Uuid) -> Result<Machine> {
        Err(HypervisorError::Unknown { id })
    }

    async fn start(&self, _: Uuid) -> Result<Started> {
        by_hand("start a machine; attach the disks to it and turn it on")
    }

    async fn stop(&self, _: Uuid, _: Option<Duration>) -> Result<Stopped> {
        by_hand("stop a machine; shut it down and say so")
    }

    async fn delete(&self, _: Uuid) -> Result<()> {
        Ok(())
    }

    async fn networks(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn move_disk(&self, _: Uuid, _: usize, _: &Place, _: Duration) -> Result<()> {
        by_hand("move a disk while a machine runs; stop it first")
    }

    async fn events(&self, _: Uuid) -> Result<broadcast::Receiver<Event>> {
        by_hand("tell what happens to a machine")
    }

    async fn console(&self, _: Uuid, _: u64) -> Result<Console> {
        Ok(Console::default())
    }

    async fn screenshot(&self, _: Uuid, _: &Path) -> Result<()> {
        by_hand("see a machine's screen")
    }

    async fn reach(&self, _: Uuid, _: u16) -> Result<std::net::SocketAddr> {
        by_hand("reach a guest's port")
    }

    async fn ask_guest(&self, _: Uuid, _: Question, _: Duration) -> Result<serde_json::Value> {
        by_hand("ask a guest's agent")
    }
}
