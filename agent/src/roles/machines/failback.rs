//! Machines that go home from here: off at this end, on at the other.
//!
//! *Consistency.* A machine is off, and nobody can open its disks, before home is told that it has everything. *Retries.* Asking
//! again goes on where it was left. *Cancellation.* Starting it again takes a stop back. *Crash.* A stop is durable: this
//! process keeps the disks closed when it starts again.

use std::time::{Duration, Instant};

use tidemark_hypervisor::call::{Difference, FailOverCall, encode};
use tidemark_hypervisor::hypervisor::Power;
use tidemark_hypervisor::{Hypervisor, HypervisorError, Place, drill};
use tidemark_proto::control::Failure;
use uuid::Uuid;

use super::failover::{SWITCH_LIMIT, not_served};
use super::{Machines, failed};

impl Machines {
    pub(super) async fn changed(&self, id: Uuid) -> Result<String, Failure> {
        let changed = self.server.changed(id).await?;
        Ok(encode(&Difference {
            changed_bytes: changed.changed_bytes,
            total_bytes: changed.total_bytes,
            data_bytes: changed.data_bytes,
        }))
    }

    pub(super) async fn stop_machine(&self, id: Uuid, limit: Duration) -> Result<String, Failure> {
        // What is not on its way home is not stopped for it.
        let state = self.server.failover(id).await?;
        if !state.entry.stopped {
            match self.hypervisor().await?.stop(id, Some(limit)).await {
                // Disks alone: whoever has them open is cut off.
                Ok(_) | Err(HypervisorError::Unknown { .. } | HypervisorError::Off { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let state = self.server.stop_failed_over(id).await?;
        self.shown(state, None).await
    }

    pub(super) async fn start_machine(&self, call: FailOverCall, began: Instant) -> Result<String, Failure> {
        let state = self.server.start_failed_over(call.failover).await?;
        let seconds = self.run(&call, &state, began).await?;
        self.shown(state, seconds).await
    }

    /// Asked each time before home follows it: a crash may have left it on its plain disks, with its writes unseen.
    pub(super) async fn see_again(&self, id: Uuid) -> Result<String, Failure> {
        let state = self.server.see_again(id).await?;
        let qemu = self.hypervisor().await?;
        let power = match qemu.power(id).await {
            // Whoever attached the disks has those that are served.
            Err(HypervisorError::Unknown { .. }) => return self.shown(state, None).await,
            other => other.map_err(failed)?,
        };
        let mut machine = qemu.describe(id).await.map_err(failed)?;
        for index in 0..machine.disks.len() {
            let Place::Raw { path } = &machine.disks[index] else { continue };
            let Some(disk) = state.disks.iter().find(|disk| disk.plain == *path) else { continue };
            let uri = disk.nbd.as_deref().ok_or_else(|| not_served(&state))?;
            let place = Place::from_nbd_uri(uri).map_err(|error| failed(error.into()))?;
            if power != Power::Off {
                qemu.switch_disk(id, index, &place, SWITCH_LIMIT).await.map_err(failed)?;
            }
            machine.disks[index] = place;
        }
        if power == Power::Off {
            qemu.define(&machine).await.map_err(failed)?;
        }
        self.shown(state, None).await
    }

    pub(super) async fn return_home(&self, id: Uuid) -> Result<(), Failure> {
        let qemu = self.hypervisor().await?;
        if let Ok(Power::On | Power::Paused) = qemu.power(id).await {
            return Err(Failure::new(
                tidemark_proto::control::FailureKind::Conflict,
                format!("the machine of failover {id} is on here"),
                "fail it back first: `tidemark failback NAME`",
            ));
        }
        drill::clean_up(&**qemu, id).await.map_err(failed)?;
        self.server.return_home(id).await
    }
}
