//! Machines that failed over to here: run from their point at once, and from plain disks in the end.
//!
//! *Consistency.* The process server's entry is durable before the machine is defined, the machine's definition before it
//! starts; a machine of this process server is defined under its failover's id. *Retries.* Asking again goes on where it was
//! left. *Cancellation.* Ending a failover turns its machine off before its disks go. *Crash.* The machine goes on, its disks
//! wait for this process and are served again; a promotion goes on, and what it filled is moved to when it is found.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemark_base::MachineId;
use tidemark_hypervisor::call::{
    ByRecoveryKey, FailOverCall, FailedOver, FailedOverDisk, Lost, Promotion, Rights, encode,
};
use tidemark_hypervisor::drill;
use tidemark_hypervisor::hypervisor::Power;
use tidemark_hypervisor::machine::{Kernel, Purpose};
use tidemark_hypervisor::{Hypervisor, HypervisorError, Machine, Place};
use tidemark_process_server::FailoverState;
use tidemark_process_server::failed_over::Promote;
use tidemark_proto::control::{Failure, FailureKind, Selector};
use uuid::Uuid;

use super::{Machines, failed};

/// Nothing is copied: the plain disk shows everything already.
pub(super) const SWITCH_LIMIT: Duration = Duration::from_secs(60);
/// How often what was left is tried again, and machines are looked after.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Kernels that machines may be started with.
const KERNELS: &str = "kernels";

impl Machines {
    pub(super) async fn loss(&self, machine: MachineId, point: &str) -> Result<String, Failure> {
        let loss = self.server.loss(machine, selector(point)?).await?;
        let (point, time) = (loss.point.id, loss.point.time);
        Ok(encode(&Lost { point, time, newest: loss.newest, bytes: loss.bytes }))
    }

    pub(super) async fn rights(&self, machine: MachineId) -> Result<String, Failure> {
        let rights = self.server.rights(machine).await?;
        let by_recovery_key = rights.by_recovery_key.map(|(at, point_time)| ByRecoveryKey { at, point_time });
        Ok(encode(&Rights { generations: rights.generations, failed_over: rights.failed_over, by_recovery_key }))
    }

    pub(super) async fn fail_over(&self, call: FailOverCall, began: Instant) -> Result<String, Failure> {
        let selector = selector(&call.point)?;
        let is_new = self.server.failovers().iter().all(|(id, _)| *id != call.failover);
        if call.run.is_some() {
            self.hypervisor().await?.check().await.map_err(failed)?;
            self.refuse_name(&call).await?;
        }
        let state = self.server.fail_over(call.failover, call.machine, selector).await?;
        match self.run(&call, &state, began).await {
            Ok(seconds) => self.shown(state, seconds).await,
            Err(failure) => {
                if is_new && let Err(left) = self.end_failover(call.failover).await {
                    tracing::warn!(failover = %call.failover, %left, "what was begun is left");
                }
                Err(failure)
            }
        }
    }

    /// Before anything is begun: two machines of one name would be taken for each other.
    async fn refuse_name(&self, call: &FailOverCall) -> Result<(), Failure> {
        let listed = self.hypervisor().await?.inventory().await.map_err(failed)?;
        match listed.into_iter().find(|listed| listed.name == call.name && listed.id != call.failover) {
            Some(other) => Err(failed(HypervisorError::Exists { name: other.name, id: other.id })),
            None => Ok(()),
        }
    }

    /// Defines and starts the machine, unless it runs. How long that took since the command.
    pub(super) async fn run(
        &self,
        call: &FailOverCall,
        state: &FailoverState,
        began: Instant,
    ) -> Result<Option<f64>, Failure> {
        let Some(description) = &call.run else { return Ok(None) };
        self.check_kernel(description.hardware.kernel.as_ref())?;
        let qemu = self.hypervisor().await?;
        match qemu.power(call.failover).await {
            Ok(Power::On | Power::Paused) => return Ok(None),
            Ok(_) | Err(HypervisorError::Unknown { .. }) => {}
            Err(error) => return Err(failed(error)),
        }
        let place = |id| {
            let disk = state.disks.iter().find(|disk| disk.disk == id).ok_or_else(|| {
                let message = format!("point {} has no disk {id}", state.entry.point);
                Failure::new(FailureKind::NotFound, message, "choose a later point, which has all disks")
            })?;
            match (state.entry.promote, &disk.nbd) {
                (Promote::Plain, _) => Ok(Place::Raw { path: disk.plain.clone() }),
                (_, Some(uri)) => Place::from_nbd_uri(uri).map_err(|error| failed(error.into())),
                (_, None) => Err(not_served(state)),
            }
        };
        let machine = Machine {
            id: call.failover,
            name: call.name.clone(),
            hardware: description.hardware.clone(),
            disks: call.disks.iter().map(|disk| place(*disk)).collect::<Result<_, Failure>>()?,
            purpose: Purpose::Failover,
            ports: Vec::new(),
        };
        qemu.define(&machine).await.map_err(failed)?;
        let started = qemu.start(call.failover).await.map_err(failed)?;
        Ok(Some(started.first_instruction.saturating_duration_since(began).as_secs_f64()))
    }

    pub(super) async fn failover_shown(&self, id: Uuid) -> Result<String, Failure> {
        let state = self.server.failover(id).await?;
        self.shown(state, None).await
    }

    pub(super) async fn shown(&self, state: FailoverState, seconds: Option<f64>) -> Result<String, Failure> {
        let qemu = self.hypervisor().await?;
        let (hypervisor, power) = match qemu.power(state.id).await {
            Ok(power) => (qemu.name(), power),
            Err(HypervisorError::Unknown { .. }) => ("disks only", Power::Unknown),
            Err(error) => return Err(failed(error)),
        };
        let disks =
            state.disks.into_iter().map(|disk| FailedOverDisk { id: disk.disk, nbd: disk.nbd, plain: disk.plain });
        Ok(encode(&FailedOver {
            point: state.entry.point,
            time: state.entry.time,
            disks: disks.collect(),
            hypervisor: hypervisor.to_owned(),
            power,
            first_instruction_seconds: seconds,
            committed: state.entry.committed,
            stopped: state.entry.stopped,
            promotion: match state.entry.promote {
                Promote::No => Promotion::No,
                Promote::Wanted { .. } => Promotion::Running,
                Promote::Filled => Promotion::Filled,
                Promote::Plain => Promotion::Plain,
            },
            done_bytes: state.done_bytes,
            total_bytes: state.total_bytes,
            problem: state.problem,
        }))
    }

    pub(super) async fn change_point(&self, call: FailOverCall, began: Instant) -> Result<String, Failure> {
        let selector = selector(&call.point)?;
        let before = self.server.failover(call.failover).await?;
        before.entry.refuse_committed()?;
        // A point that is none costs no machine.
        self.server.loss(call.machine, selector).await?;
        if call.run.is_some() {
            drill::clean_up(&**self.hypervisor().await?, call.failover).await.map_err(failed)?;
        }
        let changed = self.server.change_failover_point(call.failover, selector).await;
        // One that was refused goes on from the point before.
        let state = match &changed {
            Ok(state) => state.clone(),
            Err(_) => self.server.failover(call.failover).await?,
        };
        let seconds = self.run(&call, &state, began).await;
        changed?;
        self.shown(state, seconds?).await
    }

    pub(super) async fn end_failover(&self, id: Uuid) -> Result<(), Failure> {
        match self.server.failover(id).await {
            Ok(state) => state.entry.refuse_committed()?,
            Err(failure) if failure.kind == FailureKind::NotFound => {}
            Err(failure) => return Err(failure),
        }
        drill::clean_up(&**self.hypervisor().await?, id).await.map_err(failed)?;
        self.server.end_failover(id).await
    }

    pub(super) async fn let_go(&self, id: Uuid) -> Result<(), Failure> {
        let filled =
            self.server.failovers().iter().any(|(known, entry)| *known == id && entry.promote == Promote::Filled);
        // A person moves to plain disks that no hypervisor here knows of: refused while somebody has the served ones open.
        if filled && matches!(self.hypervisor().await?.power(id).await, Err(HypervisorError::Unknown { .. })) {
            self.server.made_plain(id).await?;
        }
        self.server.let_go(id).await
    }

    /// Moves machines onto plain disks that have everything, and looks after what runs, until it is stopped.
    pub(super) async fn look_after(self: Arc<Self>) {
        let mut changes = self.server.failovers_changed();
        loop {
            tokio::select! {
                () = self.stopped.cancelled() => return,
                _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()) => {}
            }
            for (id, entry) in self.server.failovers() {
                // On its way home what it writes must be seen.
                if entry.promote == Promote::Filled
                    && !entry.captured
                    && let Err(failure) = self.switch(id).await
                {
                    tracing::warn!(failover = %id, %failure, "a machine cannot be moved onto its plain disks yet");
                }
            }
            self.end_old().await;
            self.trim_consoles().await;
        }
    }

    async fn switch(&self, id: Uuid) -> Result<(), Failure> {
        let state = self.server.failover(id).await?;
        let qemu = self.hypervisor().await?;
        let power = match qemu.power(id).await {
            // Whoever attached the disks attaches the plain ones.
            Err(HypervisorError::Unknown { .. }) => return Ok(()),
            other => other.map_err(failed)?,
        };
        let mut machine = qemu.describe(id).await.map_err(failed)?;
        for index in 0..machine.disks.len() {
            let Some(plain) = plain_of(&state, &machine.disks[index]) else { continue };
            let place = Place::Raw { path: plain };
            if power != Power::Off {
                qemu.switch_disk(id, index, &place, SWITCH_LIMIT).await.map_err(failed)?;
            }
            machine.disks[index] = place;
        }
        if power == Power::Off {
            qemu.define(&machine).await.map_err(failed)?;
        }
        self.server.made_plain(id).await?;
        tracing::info!(failover = %id, name = machine.name, "a machine has its plain disks");
        Ok(())
    }

    /// A guest that talks for years fills no volume.
    async fn trim_consoles(&self) {
        let Some(qemu) = self.qemu.get() else { return };
        let listed = qemu.inventory().await.unwrap_or_default();
        for machine in listed.iter().filter(|machine| machine.power == Power::On) {
            if let Err(error) = qemu.console(machine.id, u64::MAX).await {
                tracing::debug!(machine = %machine.id, %error, "a console cannot be trimmed");
            }
        }
    }

    /// An operator names a kernel of the folder that is there for it, and no other file of this host.
    pub(super) fn check_kernel(&self, kernel: Option<&Kernel>) -> Result<(), Failure> {
        let Some(kernel) = kernel else { return Ok(()) };
        let folder = self.folder.with_file_name(KERNELS);
        for path in std::iter::once(&kernel.image).chain(&kernel.initrd) {
            let real = tidemark_base::storage::canonical(path);
            let allowed = tidemark_base::storage::canonical(&folder);
            if !matches!((&real, &allowed), (Ok(real), Ok(allowed)) if real.starts_with(allowed)) {
                return Err(Failure::new(
                    FailureKind::BadRequest,
                    format!("{} is no kernel or initial file system that machines are started with", path.display()),
                    format!("put it into {} on the process server, and name it there", folder.display()),
                ));
            }
        }
        Ok(())
    }
}

fn plain_of(state: &FailoverState, place: &Place) -> Option<PathBuf> {
    let is_it = |uri: &str| Place::from_nbd_uri(uri).is_ok_and(|served| served == *place);
    let disk = state.disks.iter().find(|disk| disk.nbd.as_deref().is_some_and(is_it))?;
    Some(disk.plain.clone())
}

fn selector(point: &str) -> Result<Selector, Failure> {
    point.parse::<Selector>().map_err(|error| {
        Failure::from_error(FailureKind::BadRequest, &error, "name a point of `tidemark point list`, or `latest`")
    })
}

pub(super) fn not_served(state: &FailoverState) -> Failure {
    let reason = state.problem.clone().unwrap_or_else(|| "the process server does not say why".to_owned());
    let message = format!("the disks of the failover to the point of {} are not served: {reason}", state.entry.time);
    Failure::new(FailureKind::Unavailable, message, "see the process server's log, then try again")
}
