//! Machines that run beside their replica, from points that this process server serves: drills here, failovers in [`failover`].
//!
//! *Consistency.* A drill's disks are a point with a scratch layer, so the replica is never written. Its serve is held as long
//! as its machine. *Retries.* None. *Cancellation.* A drill whose asker is gone goes to its end: within its limit, or by
//! `EndDrill`, or when it is too old. *Crash.* A drill's scratch layer ends with the process server, so a drill that an earlier
//! process left is ended when the machines are opened again.

mod failback;
mod failover;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tidemark_hypervisor::call::{Call, DrillCall, Drilled, decode, encode};
use tidemark_hypervisor::drill::{self, Drill, Outcome};
use tidemark_hypervisor::machine::{InvalidMachine, Purpose};
use tidemark_hypervisor::qemu::{Qemu, QemuSettings};
use tidemark_hypervisor::{Hypervisor, HypervisorError, Machine, Place};
use tidemark_process_server::ProcessServer;
use tidemark_proto::control::{Failure, FailureKind, Reply, Selector, ServeId, Serving};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Drills at once: each is a machine with its memory.
const DRILLS_MAX: usize = 32;
/// A drill that nobody ends is ended.
const AGE_MAX: Duration = Duration::from_secs(14 * 86_400);

pub struct Machines {
    server: ProcessServer,
    folder: PathBuf,
    qemu: OnceCell<Arc<Qemu>>,
    drills: Mutex<HashMap<Uuid, Running>>,
    stopped: CancellationToken,
    /// Changes of failovers, one after another: a machine is not started while it is being ended.
    changing: tokio::sync::Mutex<()>,
}

struct Running {
    /// None: it is being started.
    serve: Option<ServeId>,
    began: Instant,
}

impl Machines {
    /// Ends, in the background, what an earlier process left.
    pub fn open(server: ProcessServer, folder: PathBuf) -> Arc<Self> {
        let machines = Arc::new(Self {
            server,
            folder,
            qemu: OnceCell::new(),
            drills: Mutex::default(),
            stopped: CancellationToken::new(),
            changing: tokio::sync::Mutex::default(),
        });
        if machines.folder.exists() {
            let machines = machines.clone();
            tokio::spawn(async move {
                if let Err(failure) = machines.hypervisor().await {
                    tracing::warn!(%failure, "machines that an earlier process left cannot be looked for");
                }
            });
        }
        tokio::spawn(machines.clone().look_after());
        machines
    }

    /// The hypervisor, without drills of an earlier process.
    async fn hypervisor(&self) -> Result<&Arc<Qemu>, Failure> {
        self.qemu
            .get_or_try_init(|| async {
                let settings = QemuSettings::new(&self.folder);
                let opened = tokio::task::spawn_blocking(move || Qemu::open(settings)).await;
                let qemu = opened.map_err(|error| {
                    Failure::new(FailureKind::Failed, format!("the machines cannot be opened: {error}"), "see the log")
                })?;
                let qemu = Arc::new(qemu.map_err(failed)?);
                for listed in qemu.inventory().await.map_err(failed)? {
                    let purpose = qemu.describe(listed.id).await.map_err(failed)?.purpose;
                    if purpose == Purpose::Drill {
                        tracing::info!(machine = listed.name, "a drill of an earlier process is ended");
                        drill::clean_up(&*qemu, listed.id).await.map_err(failed)?;
                    }
                }
                Ok(qemu)
            })
            .await
    }

    pub async fn execute(self: &Arc<Self>, call: &str) -> Result<Reply, Failure> {
        let call = decode::<Call>(call).map_err(|error| {
            Failure::new(FailureKind::BadRequest, error.to_string(), "let both ends be of the same version")
        })?;
        let answer = match call {
            Call::Check => encode(&self.hypervisor().await?.check().await.map_err(failed)?),
            Call::Drill(call) => {
                let began = Instant::now();
                let machines = self.clone();
                // A task of its own: a command whose stream ends leaves no half of a drill.
                let drilling = tokio::spawn(async move { machines.drill(*call, began).await });
                let drilled = drilling.await.map_err(|error| {
                    Failure::new(FailureKind::Failed, format!("the drill stopped abruptly: {error}"), "see the log")
                })?;
                encode(&drilled?)
            }
            Call::EndDrill { drill } => {
                self.end(drill).await?;
                "{}".to_owned()
            }
            Call::Loss { machine, point } => self.loss(machine, &point).await?,
            Call::Rights { machine } => self.rights(machine).await?,
            Call::Failover { failover } => self.failover_shown(failover).await?,
            change => {
                let (began, machines) = (Instant::now(), self.clone());
                // A task of its own: a command whose stream ends leaves no half of a failover.
                let changing = tokio::spawn(async move { machines.change(change, began).await });
                let changed = changing.await.map_err(|error| {
                    Failure::new(FailureKind::Failed, format!("the failover stopped abruptly: {error}"), "see the log")
                })?;
                return changed.map(Reply::Hypervisor);
            }
        };
        Ok(Reply::Hypervisor(answer))
    }

    async fn change(&self, call: Call, began: Instant) -> Result<String, Failure> {
        let _one = self.changing.lock().await;
        match call {
            Call::FailOver(call) => self.fail_over(*call, began).await,
            Call::ChangePoint(call) => self.change_point(*call, began).await,
            Call::EndFailover { failover } => self.end_failover(failover).await.map(|()| "{}".to_owned()),
            Call::Commit { failover } => {
                self.server.commit_failover(failover).await?;
                self.failover_shown(failover).await
            }
            Call::Promote { failover, bytes_per_second } => {
                self.server.promote(failover, bytes_per_second).await?;
                self.failover_shown(failover).await
            }
            Call::StopPromote { failover } => {
                self.server.stop_promote(failover).await?;
                self.failover_shown(failover).await
            }
            Call::LetGo { failover } => self.let_go(failover).await.map(|()| "{}".to_owned()),
            Call::Changed { failover } => self.changed(failover).await,
            Call::Stop { failover, limit_seconds } => {
                self.stop_machine(failover, Duration::from_secs(limit_seconds)).await
            }
            Call::Start(call) => self.start_machine(*call, began).await,
            Call::SeeAgain { failover } => self.see_again(failover).await,
            Call::StayAway { failover } => self.server.stay_away(failover).await.map(|()| "{}".to_owned()),
            Call::Return { failover } => self.return_home(failover).await.map(|()| "{}".to_owned()),
            Call::Check
            | Call::Drill(_)
            | Call::EndDrill { .. }
            | Call::Loss { .. }
            | Call::Rights { .. }
            | Call::Failover { .. } => {
                Err(Failure::new(FailureKind::BadRequest, "that changes no failover", "ask for it alone"))
            }
        }
    }

    async fn drill(&self, call: DrillCall, began: Instant) -> Result<Drilled, Failure> {
        let selector: Selector = call.point.parse().map_err(|error| {
            Failure::from_error(FailureKind::BadRequest, &error, "name a point of `tidemark point list`, or `latest`")
        })?;
        self.end_old().await;
        {
            let mut drills = self.drills.lock().expect("no panic while held");
            if drills.len() >= DRILLS_MAX {
                return Err(Failure::new(
                    FailureKind::Conflict,
                    format!("{DRILLS_MAX} drills run here, which is the limit"),
                    "end some of them: `tidemark failover cleanup NAME`",
                ));
            }
            drills.insert(call.drill, Running { serve: None, began });
        }
        let outcome = self.boot(&call, selector, began).await;
        if !outcome.as_ref().is_ok_and(|drilled| drilled.report.running) {
            self.end(call.drill).await?;
        }
        outcome
    }

    async fn boot(&self, call: &DrillCall, selector: Selector, began: Instant) -> Result<Drilled, Failure> {
        self.check_kernel(call.description.hardware.kernel.as_ref())?;
        let qemu = self.hypervisor().await?;
        let serving = self.server.serve_machine(call.machine, selector).await?;
        let is_known = {
            let mut drills = self.drills.lock().expect("no panic while held");
            drills.get_mut(&call.drill).map(|running| running.serve = Some(serving.serve)).is_some()
        };
        if !is_known {
            // It was ended meanwhile.
            self.server.stop_serve(serving.serve).await?;
            return Err(Failure::new(FailureKind::Conflict, "the drill was ended before it began", "begin it again"));
        }
        let machine = Machine {
            id: call.drill,
            name: call.name.clone(),
            hardware: call.description.hardware.clone().isolated(),
            disks: places(call, &serving)?,
            purpose: Purpose::Drill,
            ports: Vec::new(),
        };
        let drill = Drill {
            machine,
            sign: call.description.sign.clone(),
            limit: Duration::from_secs(call.description.sign_limit_seconds),
            evidence: self.folder.with_file_name("drills"),
            keep: call.keep,
        };
        let report = drill::run(&**qemu, &drill, began, &|step| tracing::info!(drill = %call.drill, step)).await;
        if report.outcome == Outcome::Alive && report.sign.is_some() {
            self.server.prove_point(call.machine, serving.point).await?;
        }
        Ok(Drilled { point: serving.point, time: serving.time, report })
    }

    /// Ends a drill's machine, then its serve.
    async fn end(&self, drill: Uuid) -> Result<(), Failure> {
        if let Some(qemu) = self.qemu.get() {
            drill::clean_up(&**qemu, drill).await.map_err(failed)?;
        }
        let serve = {
            let drills = self.drills.lock().expect("no panic while held");
            drills.get(&drill).and_then(|running| running.serve)
        };
        if let Some(serve) = serve {
            match self.server.stop_serve(serve).await {
                Err(failure) if failure.kind != FailureKind::NotFound => return Err(failure),
                _ => {}
            }
        }
        self.drills.lock().expect("no panic while held").remove(&drill);
        Ok(())
    }

    async fn end_old(&self) {
        let old: Vec<Uuid> = {
            let drills = self.drills.lock().expect("no panic while held");
            drills.iter().filter(|(_, running)| running.began.elapsed() > AGE_MAX).map(|(id, _)| *id).collect()
        };
        for drill in old {
            if let Err(failure) = self.end(drill).await {
                tracing::warn!(%drill, %failure, "an old drill cannot be ended yet");
            }
        }
    }

    /// Ends all drills: their disks end with this process. Machines that failed over go on.
    pub async fn stop(&self) {
        self.stopped.cancel();
        let all: Vec<Uuid> = self.drills.lock().expect("no panic while held").keys().copied().collect();
        for drill in all {
            if let Err(failure) = self.end(drill).await {
                tracing::warn!(%drill, %failure, "a drill is left until the next start");
            }
        }
    }
}

/// Where the machine finds its disks, in the order that the control plane says.
fn places(call: &DrillCall, serving: &Serving) -> Result<Vec<Place>, Failure> {
    let place = |id| {
        let found = serving.disks.iter().find(|disk| disk.id == id).and_then(|disk| disk.nbd.as_deref());
        let uri = found.ok_or_else(|| {
            let message = format!("point {} has no disk {id}", serving.point);
            Failure::new(FailureKind::NotFound, message, "choose a later point, which has all disks")
        })?;
        Place::from_nbd_uri(uri).map_err(|error: InvalidMachine| failed(error.into()))
    };
    call.disks.iter().map(|disk| place(*disk)).collect()
}

pub(super) fn failed(error: HypervisorError) -> Failure {
    let kind = match &error {
        HypervisorError::Unreachable { .. } | HypervisorError::Missing { .. } => FailureKind::Unavailable,
        HypervisorError::Unknown { .. } => FailureKind::NotFound,
        HypervisorError::Exists { .. }
        | HypervisorError::Running { .. }
        | HypervisorError::Off { .. }
        | HypervisorError::InUse => FailureKind::Conflict,
        HypervisorError::Invalid(_) | HypervisorError::Unsupported { .. } => FailureKind::BadRequest,
        HypervisorError::TimedOut { .. } => FailureKind::TimedOut,
        _ => FailureKind::Failed,
    };
    Failure::new(kind, error.to_string(), error.help())
}
